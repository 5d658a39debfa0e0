"""The whole run to disk and back, behind the step's back, without pickle.

A checkpoint is one safetensors file, `checkpoint-<step>.safetensors`: student, teacher, centers and AdamW's moments by
parameter name; in its header the step, the resolved config, the data set's fingerprint, what the run was made with
(processes, arithmetic, versions) and the sha256 of the file itself, computed with zeros where the digest stands. Nothing
else is state: plan, draws and drop path follow from (seed, step).

Imports no torch by itself: whether a folder's run can be gone on with is told before anything heavy loads.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from runtime.config import Config, differences, load_config, parse_config
from runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn, optim

FORMAT = 2
LARGEST_HEADER = 4 * 2**20  # bytes; a ViT-S run's header has 200,000
DTYPES = {
    "torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16",
    "torch.int64": "I64", "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8", "torch.uint8": "U8",
    "torch.bool": "BOOL",
}  # fmt: skip
_DIGEST, _NONE = b'"sha256":"', b"0" * 64  # no text inside a header's JSON can hold the first: its quotes are escaped

# ------------------------------------------------------------------------------------------------ a file of tensors


def save_tensors(path: Path, tensors: "Mapping[str, Tensor]", metadata: dict[str, str]) -> None:
    """Write a safetensors file of CPU tensors so that at every moment the path holds a whole file or none.

    Written here and not by safetensors: its temporary file has a name of its own making, which a kill would leave behind.
    Raises UserError where there is no room or no right to write; then nothing is left of it.
    """
    import torch

    order = sorted(tensors, key=lambda n: (-tensors[n].element_size(), n))  # every tensor aligned to its own elements
    header: dict[str, Any] = {"__metadata__": metadata | {"sha256": _NONE.decode()}}
    end = 0
    for name in order:
        t, start = tensors[name], end
        end = start + t.nbytes
        header[name] = {"dtype": DTYPES[str(t.dtype)], "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    needed, free = len(head) + end, 0
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        total, _, free = shutil.disk_usage(path.parent)
        if total and free < needed:  # told before the disk is filled to its last byte, which others need
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with open(temporary, "wb", buffering=0) as file:
            digest = hashlib.sha256()
            blocks = [tensors[n].contiguous().reshape(-1).view(torch.uint8).numpy().data for n in order]
            for block in (memoryview(head), *blocks):
                digest.update(block)
                _write(file, block)
            file.seek(head.index(_DIGEST) + len(_DIGEST))
            file.write(digest.hexdigest().encode())
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        limit = " (ulimit -f)" if error.errno == errno.EFBIG else ""
        raise UserError(
            f"{path}: not written: {error.strerror}{limit}; {needed:,} bytes needed, {free:,} free"
        ) from None


def _write(file: BinaryIO, block: memoryview) -> None:
    while block:  # the kernel takes 2 GiB at most
        block = block[file.write(block) :]


def _sync_folder(folder: Path) -> None:
    """A rename is on the disk once its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_header(path: Path) -> dict[str, Any]:
    """{tensor's name: {dtype, shape, data_offsets}, "__metadata__": {...}} of a safetensors file of any origin.

    Raises UserError where it is none, before memory is taken for what it promises.
    """
    try:
        with open(path, "rb") as file:
            return json.loads(_header_bytes(file)[8:])
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: no safetensors file ({error})") from None


def _header_bytes(file: BinaryIO) -> bytes:
    """The first eight bytes, which give the length of what follows, and the header."""
    size, first = os.fstat(file.fileno()).st_size, file.read(8)
    length = int.from_bytes(first, "little")
    if length > min(size - 8, LARGEST_HEADER) or len(first) < 8:
        raise ValueError(f"{size:,} bytes, of which the header would take {length:,}")
    text = file.read(length)
    if not text.startswith(b'{"'):
        raise ValueError("its header is no JSON object")
    return first + text


def read_tensors(path: Path) -> "dict[str, Tensor]":
    """The tensors of a safetensors file of any origin. Raises UserError where it is none, or where its header promises
    other bytes than stand in it."""
    from safetensors import SafetensorError, safe_open

    read_header(path)
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{path}: no safetensors file ({error})") from None


# ------------------------------------------------------------------------------------------------ reading checkpoints


class CorruptCheckpoint(UserError):
    """A checkpoint file that is not what was written."""


@dataclass
class Checkpoint:
    """What the header of a whole checkpoint says; its tensors are read when asked for."""

    path: Path
    step: int  # steps done
    config: str  # resolved, as yaml
    data: dict[str, Any]  # `fingerprint` of the data set
    environment: dict[str, str]  # processes, arithmetic, versions

    def tensors(self) -> "dict[str, Tensor]":
        return read_tensors(self.path)


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint whose bytes are those that were written. Raises CorruptCheckpoint where they are not, UserError where it is of
    another format."""
    try:
        header = read_header(path)["__metadata__"]
        step, config, told = int(header["step"]), str(header["config"]), int(header["format"])
    except UserError as mistake:
        raise CorruptCheckpoint(str(mistake)) from None
    except (KeyError, TypeError, ValueError):
        raise CorruptCheckpoint(f"{path}: no checkpoint (its header tells no step, config and format)") from None
    if told != FORMAT:
        raise UserError(
            f"{path}: a checkpoint of format {told}, this program goes on from format {FORMAT}; "
            "finish that run with the program that began it, or start another (RUN=another/folder)"
        )
    try:
        with open(path, "rb") as file:
            head = _header_bytes(file)
            at = head.index(_DIGEST) + len(_DIGEST)
            digest = hashlib.sha256(head[:at] + _NONE + head[at + len(_NONE) :])
            found = hashlib.file_digest(file, lambda: digest).hexdigest()  # type: ignore[arg-type, return-value]
        if found != header["sha256"]:
            raise ValueError("sha256 differs")
        return Checkpoint(path, step, config, json.loads(header["data"]), json.loads(header["environment"]))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CorruptCheckpoint(f"{path}: its content is not what was written ({error})") from None


def latest_valid(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of a folder that is whole; None where there is none at all. CorruptCheckpoint ones are told of and passed
    over. Raises UserError where all of them are damaged: a run that begins again unasked would lose days."""
    paths = _newest_first(folder)
    for path in paths:
        try:
            return open_checkpoint(path)
        except CorruptCheckpoint as damage:
            last = damage
            if path != paths[-1]:
                print(f"passed over: {damage}")
    if paths:
        raise UserError(f"{last}; no checkpoint of {folder} is whole: remove them to begin the run again")
    return None


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*.safetensors"), reverse=True)


# ------------------------------------------------------------------------------------------------ is it the same run?


def fingerprint(manifest: dict[str, Any]) -> dict[str, Any]:
    """What tells a data set from another, wherever it lies: samples, shards, a hash over the shards' sizes and hashes."""
    shards = manifest["shards"]
    rows = json.dumps([[s["samples"], s["bytes"], s.get("sha256")] for s in shards])
    samples = sum(s["samples"] for s in shards)
    return {"samples": samples, "shards": len(shards), "sha256": hashlib.sha256(rows.encode()).hexdigest()}


def find_resume(
    folder: Path, config: Config, data: dict[str, Any], forced: list[str] | tuple[str, ...] = ()
) -> tuple[Checkpoint | None, list[str]]:
    """(the checkpoint that a run folder goes on from, or None; a line to tell for each difference that was forced).

    data: `fingerprint` of the photos to train on. forced: names of values that may differ ("loss.alpha", "data.shards").
    Raises UserError with every other difference between that run and this one, in words.
    """
    found = latest_valid(folder / "checkpoints")
    if found:
        before = parse_config(found.config, str(found.path))
    elif (folder / "config.yaml").is_file():
        before = load_config(folder / "config.yaml")
    else:
        return None, []
    different = differences(before, config)
    if found and found.data != data:
        there, here = (f"{d['samples']:,} samples in {d['shards']} shards" for d in (found.data, data))
        what = f"{there} there, {here} now" if there != here else f"{here}, but other photos than there"
        different["data.shards"] = f"data.shards: {what}"
    refused = [words for name, words in different.items() if name not in forced]
    if refused:
        raise UserError(
            f"{folder} holds another run ({'; '.join(refused)}); RUN=another/folder starts a new one, "
            "--allow-change NAME goes on in this one although NAME differs"
        )
    return found, [f"forced: {words}" for words in different.values()]


def environment_changes(found: Checkpoint | None, environment: dict[str, str]) -> list[str]:
    """A line to tell: what a run is made with that is not what the checkpoint it goes on from was made with, if anything.

    None of it is refused. DistributedContext, device and arithmetic are what a run moves between machines with, and none changes
    which samples, windows, points and colors a step sees; but they change how its sums are rounded, so it is told.
    """
    if found is None:
        return []
    names = [n for n in found.environment | environment if found.environment.get(n) != environment.get(n)]
    told = [f"{n} {found.environment.get(n, 'none')} there, {environment.get(n, 'none')} now" for n in names]
    return [f"rounded otherwise than before step {found.step}: {'; '.join(told)}"] if told else []


# ------------------------------------------------------------------------------------------------ the state of a run


def state_of(model: "nn.Module", adamw: "optim.Optimizer") -> "dict[str, Tensor]":
    """All that is state, by name, where it stands."""
    names = {id(p): n for n, p in model.named_parameters()}
    tensors = {n: t.detach() for n, t in model.state_dict().items()}
    for p, moments in adamw.state.items():
        tensors |= {f"adamw.{names[id(p)]}.{key}": t.detach() for key, t in moments.items()}
    return tensors


def restore(model: "nn.Module", adamw: "optim.Optimizer", tensors: "Mapping[str, Tensor]") -> None:
    """Put a checkpoint's tensors back. Raises UserError where they are another model's."""
    own = {n: t for n, t in tensors.items() if not n.startswith("adamw.")}
    wanted = model.state_dict()
    wrong = [f"'{n}' is missing" for n in sorted(wanted.keys() - own.keys())]
    wrong += [f"'{n}' is unknown here" for n in sorted(own.keys() - wanted.keys())]
    wrong += [
        f"'{n}' is {tuple(own[n].shape)} there, {tuple(wanted[n].shape)} here"
        for n in sorted(wanted.keys() & own.keys())
        if wanted[n].shape != own[n].shape
    ]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise UserError(f"the checkpoint is another model's, which nothing can force: {', '.join(wrong[:3])}{more}")
    model.load_state_dict(own)
    parameters = dict(model.named_parameters())
    for name, t in tensors.items():
        if name.startswith("adamw."):
            parameter, _, key = name.removeprefix("adamw.").rpartition(".")
            p = parameters[parameter]
            if key == "step":  # fused AdamW counts where the parameter is
                adamw.state[p][key] = t.to(p.device)
            else:
                adamw.state[p][key] = t.to(p.device, p.dtype)


class Writer:
    """Writes a run's checkpoints while the run goes on. Made and called by the first process only.

    `save` copies the state off the device, all that a step waits for, and leaves the rest to a thread; one write at a time,
    the next `save` waits for the last. Whatever goes wrong with a write is raised by the next call: a UserError that names
    the file, the bytes it needs and those that are free, while the older checkpoints stand.

    folder: the checkpoints'. keep: how many whole ones stay. config, data, environment: see `Checkpoint`.
    """

    def __init__(self, folder: Path, keep: int, config: str, data: dict[str, Any], environment: dict[str, str]):
        self.folder, self.keep = folder, keep
        self._header = {"config": config, "data": json.dumps(data), "environment": json.dumps(environment)}
        self._copies: dict[str, Tensor] = {}
        self._whole: set[Path] = set()  # written here, or read and found whole
        self._thread: threading.Thread | None = None
        self._wrong: BaseException | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(".checkpoint-*.tmp"):  # of a process that was killed while it wrote
                leftover.unlink()
            probe = folder / ".checkpoint-probe.tmp"  # told now, not after the first thousand steps
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"{folder}: no checkpoint can be written there ({error.strerror})") from None
        if len(_newest_first(folder)) > keep:  # killed before they could go
            self._prune()

    def save(self, step: int, model: "nn.Module", adamw: "optim.Optimizer") -> None:
        """Take the state after `step` steps, and write it behind the next ones."""
        import torch

        self.finish()
        state = state_of(model, adamw)
        for name, t in state.items():
            if name not in self._copies:  # kept for the next save: new pages, or pinned ones, cost more than the copy
                self._copies[name] = torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda)
            self._copies[name].copy_(t, non_blocking=True)
        if any(t.is_cuda for t in state.values()):
            torch.cuda.current_stream().synchronize()
        copies = {name: self._copies[name] for name in state}
        self._thread = threading.Thread(target=self._write, args=(step, copies), name="checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong with the last write."""
        if self._wrong is not None:
            wrong, self._wrong = self._wrong, None
            raise wrong

    def wait(self) -> None:
        """Until the last write is over."""
        if self._thread:
            self._thread.join()

    def finish(self) -> None:
        """`wait`, then `check`: after it the last checkpoint is on the disk."""
        self.wait()
        self.check()

    def _write(self, step: int, state: "dict[str, Tensor]") -> None:
        path = self.folder / f"checkpoint-{step:08d}.safetensors"
        try:
            for name, t in state.items():
                if t.is_floating_point() and not np.isfinite(t.numpy()).all():
                    raise UserError(
                        f"'{name}' is not finite at step {step}: nothing is saved, the last checkpoint stands"
                    )
            try:
                save_tensors(path, state, {"format": str(FORMAT), "step": str(step)} | self._header)
            except UserError as mistake:
                standing = next(iter(_newest_first(self.folder)), None)
                stands = f"{standing.name} stands" if standing else "there is none yet"
                raise UserError(f"{mistake}; {stands}") from None
            self._whole.add(path)
            self._prune()
        except BaseException as error:  # told by the thread that trains
            self._wrong = error

    def _prune(self) -> None:
        """Remove what is older than the newest `keep` whole checkpoints: a damaged one pushes no good one out."""
        whole = 0
        for path in _newest_first(self.folder):
            if whole == self.keep:
                path.unlink(missing_ok=True)
            elif path in self._whole or _is_whole(path):
                self._whole.add(path)
                whole += 1


def _is_whole(path: Path) -> bool:
    try:
        open_checkpoint(path)
    except UserError:
        return False
    return True


def save_backbone(path: Path, backbone: "nn.Module", about: dict) -> None:
    """The backbone file: timm's names and nothing else; `about` (what it is) as JSON in the header."""
    tensors = {n: t.detach().cpu().contiguous() for n, t in backbone.state_dict().items()}
    save_tensors(path, tensors, {"densedino": json.dumps(about)})
