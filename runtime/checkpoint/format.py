"""A checkpoint is one safetensors file, `checkpoint-<step>.safetensors`.

Its tensors are the student, the teacher, the centers and AdamW's moments, each by parameter name. Its header has the step,
the resolved config, the data set's fingerprint, the environment (processes, precision, versions) and the sha256 of the file
itself, computed with zeros in the digest's place. There is no other state: the plan, the random draws and drop path follow
from (seed, step).
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from runtime.errors import UserError
from runtime.files import atomic_path

if TYPE_CHECKING:
    from torch import Tensor, nn, optim

FORMAT = 2
MAX_HEADER_BYTES = 4 * 2**20  # the header of a ViT-S run has 200,000
DTYPES = {
    "torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16",
    "torch.int64": "I64", "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8", "torch.uint8": "U8",
    "torch.bool": "BOOL",
}  # fmt: skip
_TORCH_NAMES = {name: kind.removeprefix("torch.") for kind, name in DTYPES.items()}
_DIGEST_KEY = b'"sha256":"'  # no text inside the header's JSON can contain it: its quotes would be escaped
_EMPTY_DIGEST = b"0" * 64

# ------------------------------------------------------------------------------------------------ a file of tensors


def save_tensors(path: Path, tensors: "Mapping[str, Tensor]", metadata: dict[str, str]) -> None:
    """Write CPU tensors to a safetensors file, atomically.

    safetensors' own writer is not used: the name of its temporary file is random, so a kill would leave it behind for ever.
    Raises UserError if there is no space or no permission to write; no partial file is left.
    """
    import torch

    order = sorted(tensors, key=lambda n: (-tensors[n].element_size(), n))  # every tensor aligned to its own elements
    header: dict[str, Any] = {"__metadata__": metadata | {"sha256": _EMPTY_DIGEST.decode()}}
    end = 0
    for name in order:
        t, start = tensors[name], end
        end = start + t.nbytes
        header[name] = {"dtype": DTYPES[str(t.dtype)], "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    needed, free = len(head) + end, 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        total, _, free = shutil.disk_usage(path.parent)
        if total and free < needed:  # fail before the disk is filled to its last byte, which others need
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        # only one process writes a run's checkpoints, and Writer removes leftovers by this name
        temporary = path.with_name(f".{path.name}.tmp")
        with atomic_path(path, temporary), open(temporary, "wb", buffering=0) as file:
            digest = hashlib.sha256()
            blocks = [tensors[n].contiguous().reshape(-1).view(torch.uint8).numpy().data for n in order]
            for block in (memoryview(head), *blocks):
                digest.update(block)
                _write(file, block)
            file.seek(head.index(_DIGEST_KEY) + len(_DIGEST_KEY))
            file.write(digest.hexdigest().encode())
    except OSError as error:
        limit = " (ulimit -f)" if error.errno == errno.EFBIG else ""
        raise UserError(
            f"{path}: not written: {error.strerror}{limit}; {needed:,} bytes needed, {free:,} free"
        ) from None


def _write(file: BinaryIO, block: memoryview) -> None:
    while block:  # one call writes at most 2 GiB
        block = block[file.write(block) :]


def read_header(path: Path) -> dict[str, Any]:
    """The header of any safetensors file: {tensor name: {dtype, shape, data_offsets}, "__metadata__": {...}}.

    Raises UserError if it is not a safetensors file, before memory is allocated for what the header claims.
    """
    try:
        with open(path, "rb") as file:
            return json.loads(_header_bytes(file)[8:])
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a safetensors file ({error})") from None


def _header_bytes(file: BinaryIO) -> bytes:
    """The first eight bytes, which are the header's length, and the header."""
    size, length_bytes = os.fstat(file.fileno()).st_size, file.read(8)
    length = int.from_bytes(length_bytes, "little")
    if length > min(size - 8, MAX_HEADER_BYTES) or len(length_bytes) < 8:
        raise ValueError(f"the file has {size:,} bytes, its header claims {length:,}")
    text = file.read(length)
    if not text.startswith(b'{"'):
        raise ValueError("its header is not a JSON object")
    return length_bytes + text


def read_tensors(path: Path) -> "dict[str, Tensor]":
    """The tensors of any safetensors file. Raises UserError if it is not one, or if its header does not match its size."""
    from safetensors import SafetensorError, safe_open

    read_header(path)
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{path}: not a safetensors file ({error})") from None


def save_backbone(path: Path, backbone: "nn.Module", about: dict) -> None:
    """Write the backbone file: tensors under timm's names, and `about` as JSON in the header. Raises UserError as
    `save_tensors`."""
    tensors = {n: t.detach().cpu().contiguous() for n, t in backbone.state_dict().items()}
    save_tensors(path, tensors, {"densedino": json.dumps(about)})


# ------------------------------------------------------------------------------------------------------- a checkpoint


class CorruptCheckpoint(UserError):
    """The bytes of a checkpoint file are not those that were written."""


@dataclass
class Checkpoint:
    """The header of a valid checkpoint. Tensors are read on demand."""

    path: Path
    step: int  # steps done
    config: str  # resolved, as yaml
    data: dict[str, Any]  # `resume.identify` of the data set
    environment: dict[str, str]  # processes, precision, versions
    shapes: dict[str, tuple[str, list[int]]]  # of each tensor: safetensors' name of its dtype, its shape

    def tensors(self) -> "dict[str, Tensor]":
        return read_tensors(self.path)

    def stream(self, read: bool = True) -> "Iterator[tuple[str, Tensor]]":
        """The tensors with their names, one at a time. read: False makes tensors of the same shapes and reads nothing, to
        receive another process's. Raises UserError if the file cannot be read."""
        import torch
        from safetensors import SafetensorError, safe_open

        if not read:
            for name, (dtype, shape) in self.shapes.items():
                yield name, torch.empty(shape, dtype=getattr(torch, _TORCH_NAMES[dtype]))
            return
        try:
            with safe_open(self.path, "pt") as file:
                for name in self.shapes:
                    yield name, file.get_tensor(name)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise UserError(f"{self.path}: cannot be read any more ({error})") from None


def open_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint whose sha256 has been checked.

    Raises CorruptCheckpoint if its bytes are not those that were written, UserError if it has another format.
    """
    try:
        tensors = read_header(path)
        header = tensors.pop("__metadata__")
        step, config, version = int(header["step"]), str(header["config"]), int(header["format"])
    except UserError as error:
        raise CorruptCheckpoint(str(error)) from None
    except (KeyError, TypeError, ValueError):
        raise CorruptCheckpoint(f"{path}: not a checkpoint (its header has no step, config and format)") from None
    if version != FORMAT:
        raise UserError(
            f"{path}: a checkpoint of format {version}, but this program resumes from format {FORMAT} only; "
            "finish that run with the version that began it, or start a new one with RUN=another/folder"
        )
    try:
        with open(path, "rb") as file:
            head = _header_bytes(file)
            at = head.index(_DIGEST_KEY) + len(_DIGEST_KEY)
            digest = hashlib.sha256(head[:at] + _EMPTY_DIGEST + head[at + len(_EMPTY_DIGEST) :])
            actual = hashlib.file_digest(file, lambda: digest).hexdigest()  # type: ignore[arg-type, return-value]
        if actual != header["sha256"]:
            raise ValueError("sha256 differs")
        shapes = {name: (t["dtype"], t["shape"]) for name, t in tensors.items()}
        return Checkpoint(path, step, config, json.loads(header["data"]), json.loads(header["environment"]), shapes)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CorruptCheckpoint(f"{path}: damaged, its content is not what was written ({error})") from None


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint files of a folder, valid or not, newest first."""
    return sorted(folder.glob("checkpoint-*.safetensors"), reverse=True)


# ------------------------------------------------------------------------------------------------ the state of a run


def training_state(model: "nn.Module", adamw: "optim.Optimizer") -> "dict[str, Tensor]":
    """All state of a run by name, on the device, without copies."""
    names = {id(p): n for n, p in model.named_parameters()}
    tensors = {n: t.detach() for n, t in model.state_dict().items()}
    for p, moments in adamw.state.items():
        tensors |= {f"adamw.{names[id(p)]}.{key}": t.detach() for key, t in moments.items()}
    return tensors


def restore(
    model: "nn.Module", adamw: "optim.Optimizer", found: Checkpoint,
    tensors: "Iterable[tuple[str, Tensor]] | None" = None,
) -> None:  # fmt: skip
    """Load a checkpoint. tensors: those of `found.stream()`, from wherever they come; by default they are read.

    Raises UserError if names or shapes are not the model's, before the first tensor is taken.
    """
    saved = {n: tuple(shape) for n, (_, shape) in found.shapes.items() if not n.startswith("adamw.")}
    wanted = {n: t.detach() for n, t in model.state_dict().items()}  # the model's own memory
    wrong = [f"'{n}' is missing" for n in sorted(wanted.keys() - saved.keys())]
    wrong += [f"'{n}' is unknown" for n in sorted(saved.keys() - wanted.keys())]
    wrong += [
        f"'{n}': saved {saved[n]}, current {tuple(wanted[n].shape)}"
        for n in sorted(wanted.keys() & saved.keys())
        if tuple(wanted[n].shape) != saved[n]
    ]
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise UserError(
            f"the checkpoint does not fit the model, which --allow-change cannot change: {', '.join(wrong[:3])}{more}"
        )
    parameters = dict(model.named_parameters())
    for name, t in found.stream() if tensors is None else tensors:
        if name in wanted:
            wanted[name].copy_(t)
        else:
            parameter, _, key = name.removeprefix("adamw.").rpartition(".")
            p = parameters[parameter]
            if key == "step":  # fused AdamW counts on the parameter's device
                adamw.state[p][key] = t.to(p.device)
            else:
                adamw.state[p][key] = t.to(p.device, p.dtype)
