"""The whole run to disk and back, atomically, without pickle.

A checkpoint is one safetensors file, `checkpoint-<step>.safetensors`: student, teacher, centres and AdamW's moments by
parameter name; in its header the step, the resolved config and the sha256 of the tensors. Nothing else is state: plan,
draws and drop path follow from (seed, step).
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from runtime.mistake import Mistake

FORMAT = 1


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file so that at every moment the path holds a whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata=metadata)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def content_hash(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        digest.update(t.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _state(model: nn.Module, adamw: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, Tensor]:
    tensors = {n: t.detach().cpu().contiguous() for n, t in model.state_dict().items()}
    for p, state in adamw.state.items():
        for key, value in state.items():
            tensors[f"adamw.{names[id(p)]}.{key}"] = value.detach().cpu().contiguous()
    return tensors


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, adamw: torch.optim.Optimizer, config: str, keep: int
) -> Path:
    """Save the run after `step` steps (model on any device) and forget all but the newest `keep` checkpoints."""
    names = {id(p): n for n, p in model.named_parameters()}
    tensors = _state(model, adamw, names)
    header = {"format": str(FORMAT), "step": str(step), "config": config, "sha256": content_hash(tensors)}
    for name, t in tensors.items():
        if t.is_floating_point() and not t.isfinite().all():
            raise Mistake(f"'{name}' is not finite at step {step}: nothing is saved, the last checkpoint stands")
    path = folder / f"checkpoint-{step:08d}.safetensors"
    for leftover in folder.glob(".checkpoint-*.tmp"):  # of a process killed while it wrote
        leftover.unlink(missing_ok=True)
    save_tensors(path, tensors, header)
    for old in sorted(folder.glob("checkpoint-*.safetensors"))[:-keep]:
        old.unlink()
    return path


def read_checkpoint(path: Path) -> tuple[int, str, dict[str, Tensor]]:
    """(step, config as yaml, tensors) of one checkpoint. Raises Mistake where it is none, or not whole."""
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        raise Mistake(f"{path}: {error}") from None
    if "step" not in header:
        raise Mistake(f"{path}: no checkpoint (its header names no step)")
    if content_hash(tensors) != header["sha256"]:
        raise Mistake(f"{path}: its content is not what was written (sha256 differs)")
    return int(header["step"]), header["config"], tensors


def newest_checkpoint(folder: Path) -> tuple[Path, int, str, dict[str, Tensor]] | None:
    """The newest checkpoint of a folder that is whole; None where there is none. A damaged one is told and passed over."""
    for path in sorted(folder.glob("checkpoint-*.safetensors"), reverse=True):
        try:
            return path, *read_checkpoint(path)
        except Mistake as mistake:
            print(f"passed over: {mistake}")
    return None


def restore(model: nn.Module, adamw: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put a checkpoint's tensors back. Raises Mistake where they are another model's."""
    own = {n: t for n, t in tensors.items() if not n.startswith("adamw.")}
    wanted = model.state_dict()
    wrong = [n for n in sorted(wanted.keys() | own.keys()) if n not in own or n not in wanted]
    wrong += [n for n in sorted(wanted.keys() & own.keys()) if wanted[n].shape != own[n].shape]
    if wrong:
        raise Mistake(f"the checkpoint is another model's: {', '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''}")
    model.load_state_dict(own)
    moments: dict[str, dict[str, Tensor]] = {}
    for name, t in tensors.items():
        if name.startswith("adamw."):
            parameter, _, key = name.removeprefix("adamw.").rpartition(".")
            moments.setdefault(parameter, {})[key] = t
    parameters = dict(model.named_parameters())
    for name, state in moments.items():
        p = parameters[name]
        where = {k: "cpu" if k == "step" and not p.is_cuda else p.device for k in state}
        adamw.state[p] = {k: t.to(where[k], t.dtype if k == "step" else p.dtype) for k, t in state.items()}


def save_backbone(path: Path, backbone: nn.Module, about: dict) -> None:
    """The backbone file: timm's names and nothing else; `about` (what it is) as JSON in the header."""
    tensors = {n: t.detach().cpu().contiguous() for n, t in backbone.state_dict().items()}
    save_tensors(path, tensors, {"densedino": json.dumps(about)})
