"""An export: a folder with a network in several formats. Each is read again and its features are compared.

    FOLDER/config.json, model.safetensors    timm's (always)
    FOLDER/transformers/                     --to transformers
    FOLDER/model.pt2                         --to torch
    FOLDER/model.onnx                        --to onnx
    FOLDER/README.md                         --to card

n images · N patches · D width.
"""

import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.architecture import Architecture
from model.vit import ViT
from model.weights import load_backbone
from runtime.errors import UserError
from tools.export import graph, timm_folder, transformers_folder
from tools.export.card import is_edited
from tools.export.timm_folder import load_with_timm, write_timm
from tools.export.transformers_folder import write_transformers

DEFAULT = ("timm", "transformers", "torch", "card")  # all that need no further package
TOLERANCE = 1e-3  # as a share of the largest feature: other kernels differ by less, other weights by more
FILES = {  # of each format of __main__.py
    "timm": timm_folder.FILES,
    "transformers": tuple(f"transformers/{name}" for name in transformers_folder.FILES),
    "torch": ("model.pt2",),
    "onnx": ("model.onnx",),
    "card": ("README.md",),
}


def default_formats(a: Architecture) -> tuple[tuple[str, ...], str | None]:
    """(the formats that are written by default, why transformers is not among them)."""
    reason = transformers_folder.refusal(a)
    return (DEFAULT, None) if reason is None else (tuple(n for n in DEFAULT if n != "transformers"), reason)


def check(vit: ViT, folder: Path, formats: Collection[str]) -> None:
    """Raises UserError if a plain ViT cannot have these features, if a format or its package is missing, or if the folder
    holds something else."""
    if vit.attention == "all_query":
        raise UserError(
            "trained with reference.attention: all_query, its patches never attend to [CLS]; those of a plain ViT do, so "
            "the same weights would have other features"
        )
    if "transformers" in formats and (reason := transformers_folder.refusal(vit.architecture)):
        raise UserError(f"--to transformers: no model there is this network: {reason}; leave transformers out of --to")
    if "onnx" in formats:
        graph.require_onnx()
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or _is_export(folder))):
        raise UserError(f"{folder} is not empty and holds no export; name another folder")


def _is_export(folder: Path) -> bool:
    try:
        return "densedino" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False


def export(vit: ViT, folder: Path, formats: Collection[str]) -> tuple[dict[str, float], list[str]]:
    """Write timm's files and the formats, but for the card. Returns ({reader: largest difference of its features, as a share
    of the largest feature}, what was removed, for the user).

    Raises UserError as `check`, if a file cannot be written, or if the features differ.
    """
    check(vit, folder, formats)
    try:
        removed = _remove_others(folder, formats)
        write_timm(vit, folder)
        readers: dict[str, Callable[[Tensor], Sequence[Tensor]]] = {
            "timm": lambda images: _of_timm(load_with_timm(vit, folder / "model.safetensors"), images)
        }
        if "transformers" in formats:
            write_transformers(vit, folder / "transformers")
            readers["transformers' folder"] = lambda images: _ours(load_backbone(folder / "transformers"), images)
        sized: dict[str, Callable[[Tensor], Sequence[Tensor]]] = {}  # those that take any size
        if {"torch", "onnx"} & set(formats):
            program = graph.trace(vit)
            if "torch" in formats:
                graph.save_torch(program, folder / "model.pt2")
                sized["torch.export"] = lambda images: graph.run_torch(folder / "model.pt2", images)
            if "onnx" in formats:
                graph.save_onnx(program, folder / "model.onnx")
                sized["ONNX Runtime"] = lambda images: graph.run_onnx(folder / "model.onnx", images)
        differences = compare(vit, readers, sized)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from None
    wrong = [f"{reader}'s by {d:.1e}" for reader, d in differences.items() if d > TOLERANCE]
    if wrong:
        raise UserError(f"{folder}: the features differ from {' and '.join(wrong)}; do not use this export")
    return differences, removed


def _remove_others(folder: Path, formats: Collection[str]) -> list[str]:
    """Remove an earlier export's files of formats that are not written now: they may be of other weights. An edited card is
    kept. Returns what was removed."""
    others = [name for kind, files in FILES.items() if kind not in {*formats, "timm"} for name in files]
    removed = [name for name in others if (folder / name).is_file() and not is_edited(folder / name)]
    for name in removed:
        (folder / name).unlink()
    if (folder / "transformers").is_dir() and not any((folder / "transformers").iterdir()):
        (folder / "transformers").rmdir()
    return removed


@torch.no_grad()
def compare(vit: ViT, readers: dict[str, Any], sized: dict[str, Any]) -> dict[str, float]:
    """{reader: largest difference from the network's features, as a share of the largest}: on random images of the network's
    size; of those that take any, on another size and number of images, too."""
    a, patch = vit.architecture, vit.patch
    side = vit.image_size // patch
    sizes = [(3, side, side), (1, max(2, side // 2), max(2, side // 2) + 1)]
    generator = torch.Generator().manual_seed(0)
    differences: dict[str, float] = {}
    for number, (n, rows, columns) in enumerate(sizes):
        images = torch.randn(n, a.channels, rows * patch, columns * patch, generator=generator)
        ours = _ours(vit, images)
        for name, read in (sized if number else readers | sized).items():
            difference = _largest_difference(read(images), ours)
            differences[name] = max(difference, differences.get(name, 0.0))
    return differences


def _ours(network: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """[CLS] [n,D] and patches [n,N,D] of a network of ours."""
    out = network(images)
    return out.cls, out.patches


def _of_timm(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    tokens = model.forward_features(images)
    return tokens[:, 0], tokens[:, model.num_prefix_tokens :]


def _largest_difference(exported: Sequence[Tensor], ours: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(exported, ours, strict=True))
