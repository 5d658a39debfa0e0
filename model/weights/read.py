"""Reads a file, a checkpoint or a run folder. Safe with any file: nothing is unpickled but tensors and the options that
published checkpoints contain, and nothing takes more memory than the file has bytes. Imports no timm."""

import argparse
import json
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from model.weights.names import CENTERS, PARTS, ROLES, find_encoder, is_unused, remap_keys, select_part
from runtime.checkpoint import latest_valid, open_checkpoint, read_header, read_tensors
from runtime.config import parse_config
from runtime.errors import UserError, suggest
from runtime.methods import evaluated


def read_file(source: str) -> tuple[dict, dict]:
    """(all contents, metadata about the backbone) of a run folder (its newest checkpoint), a checkpoint (folder or file) or
    a file in any checkpoint format.

    Raises UserError if there is none, or if it cannot be read safely.
    """
    path = Path(source)
    found = None
    if path.is_dir():
        is_run = (path / "config.yaml").is_file()
        found = latest_valid(path / "checkpoints" if is_run else path)
        if found is None:
            kind = "a run without a checkpoint" if is_run else "neither a run nor a folder of checkpoints"
            raise UserError(f"{path}: {kind}")
    elif not path.is_file():
        siblings = path.parent.iterdir() if path.parent.is_dir() else ()
        raise UserError(f"{path}: no such file{suggest(source, map(str, siblings))}")
    elif path.name.startswith("checkpoint-") and path.suffix == ".safetensors":
        found = open_checkpoint(path)
    if found:  # a method from outside this repository may have other heads, which are ignored
        ours = tuple(f"{role}.{part}." for role in ROLES for part in PARTS)
        centers = {name for names in CENTERS.values() for name in names}
        tensors = {n: t for n, t in found.tensors().items() if n.startswith(ours) or n in centers}
        return tensors, _about_config(found.config, str(found.path))
    if path.suffix == ".safetensors":
        metadata = read_header(path).get("__metadata__") or {}
        try:
            about = dict(json.loads(metadata.get("densedino", "{}")))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: its metadata 'densedino' is not a JSON object ({error})") from None
        return read_tensors(path), about
    contents = _read_torch(path)
    if not isinstance(contents, dict):
        raise UserError(f"{path}: contains no state dict of a ViT or a ResNet")
    return contents, {}


def _about_config(text: str, source: str) -> dict:
    """What a checkpoint's config says about its backbone."""
    from model.architecture import architecture  # imports timm

    config = parse_config(text, source)
    reference = config.reference
    return {
        **architecture(config.model).not_in_tensors(),
        "attention": reference.attention,
        "border": reference.border,
        "locality": reference.locality,
        "role": evaluated(config.method),
    }


def _read_torch(path: Path) -> object:
    """What torch.save wrote. Raises UserError if it is anything else, or would run code."""
    try:
        with open(path, "rb") as file:
            # as torch distinguishes them: older files are a bare pickle followed by the tensors
            zipped = file.read(4) == b"PK\x03\x04"
        if zipped:
            entries = zipfile.ZipFile(path).infolist()
            if any(e.compress_type != zipfile.ZIP_STORED for e in entries):
                raise ValueError("its entries are compressed, which torch.save never does")
            if sum(e.file_size for e in entries) > path.stat().st_size:
                raise ValueError("its entries claim more bytes than the file has")
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a hostile or broken file
        reason = next(
            (line for line in str(error).splitlines() if " " in line), "neither a torch nor a safetensors file"
        )
        raise UserError(f"{path}: not weights that can be read safely ({reason})") from None


def roles_of(contents: dict) -> list[str]:
    """The roles (student, teacher) that a file's contents distinguish; none if they are a single network's."""
    inner = _unwrap(contents)
    return [
        role for role in ROLES
        if isinstance(inner.get(role), dict) or any(str(name).startswith(f"{role}.") for name in inner)
    ]  # fmt: skip


def select_network(contents: dict, role: str, source: str) -> tuple[dict[str, Tensor], dict]:
    """(one network's tensors with our names, metadata that follows from their names) of a file's contents.

    The other role's network if the file has only that, as the checkpoint of a method without a teacher. Raises UserError if
    there is no network, or if its tensors claim more bytes than the file has.
    """
    roles = roles_of(contents)
    role = role if role in roles or not roles else roles[0]
    tensors = _unwrap(contents)
    if isinstance(tensors.get(role), dict):
        tensors = tensors[role]
    if not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError(f"{source}: contains no state dict of a {role}, of a ViT or of a ResNet")
    odd = [n for n, t in tensors.items() if not isinstance(n, str) or not is_plain(t)]
    if odd:
        raise UserError(f"{source}: '{odd[0]}' is not a dense tensor of a CPU")
    claimed = sum({(t.data_ptr(), t.shape): t.numel() * t.element_size() for t in tensors.values()}.values())
    size = Path(source).stat().st_size if Path(source).is_file() else claimed
    if claimed > size:  # a pickle may claim any shape for a storage of four bytes
        raise UserError(f"{source}: its tensors would take {claimed:,} bytes, the file has {size:,}")
    named = {n.removeprefix("module."): t for n, t in (select_part(tensors, role) or tensors).items()}
    family, prefix = find_encoder(named)
    family = family or str(contents.get("author") or "")  # DenseCL's extracted backbones have their author beside them
    encoder = {n.removeprefix(prefix): t for n, t in named.items() if n.startswith(prefix)}
    # DenseCL's training checkpoints name the query backbone twice
    others = [n for n in named if not n.startswith(prefix) and n.removeprefix("backbone.") not in encoder]
    about: dict = {"family": family, "unused": others + [n for n in encoder if is_unused(n)]}
    if family == "MoCo-v3":
        about["heads"] = 12  # of its ViTs, as published, for every width
    return remap_keys(encoder, f"{source} ({family})" if family else source), about


def is_plain(t: Tensor) -> bool:
    return t.layout == torch.strided and t.device.type == "cpu"


def _unwrap(contents: dict) -> dict:
    """The state dict inside the dicts that trainers put around it."""
    for key in ("state_dict", "model"):
        if isinstance(contents.get(key), dict):
            contents = contents[key]
    return contents
