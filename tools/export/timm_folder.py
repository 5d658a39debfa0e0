"""A backbone as a folder in timm's hub format, with ONNX if wanted; the exported features are compared before it is used.

See tools/export/__main__.py for the files. S side of an image, pixels · D width · N patches.
"""

import importlib.util
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from eval.datasets import shorter_side
from model.vit import ViT
from model.weights import timm_model
from runtime.checkpoint import save_tensors
from runtime.errors import UserError
from runtime.files import atomic_path

TOLERANCE = 1e-3  # as a share of the largest feature: other kernels differ by less, other weights by more
OPSET = 20  # torch needs at least 18; 20 is the first with GELU


def crop_pct(size: int) -> float:
    """timm's `crop_pct` with which its transform crops photos as eval/datasets.py does: timm uses floor(size / crop_pct)."""
    shorter = shorter_side(size)
    return 0.875 if int(size / 0.875) == shorter else size / (shorter + 0.5)


def hub_config(vit: ViT) -> dict[str, Any]:
    """The contents of config.json."""
    name, arguments = timm_model(vit)
    pretrained = {
        "input_size": [vit.pixels.channels, vit.image_size, vit.image_size], "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": crop_pct(vit.image_size), "crop_mode": "center", "mean": list(vit.pixels.mean),
        "std": list(vit.pixels.std),
        "num_classes": 0, "first_conv": "patch_embed.proj", "classifier": "head",
    }  # fmt: skip
    about = {"architecture": name, "num_classes": 0, "num_features": vit.width, "global_pool": "token"}
    return about | {"model_args": arguments, "pretrained_cfg": pretrained, "densedino": vit.about()}


def load_with_timm(vit: ViT, weights: Path) -> nn.Module:
    """The model that timm makes of the exported weights."""
    name, arguments = timm_model(vit)
    create: Any = timm.create_model
    return create(name, num_classes=0, checkpoint_path=str(weights), **arguments).eval()


class Tokens(nn.Module):
    """timm's model with the outputs of model.onnx: images [n,3,S,S] -> [CLS] [n,D], patches [n,N,D]."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model: Any = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.model.forward_features(images)
        return tokens[:, 0], tokens[:, self.model.num_prefix_tokens :]


def export_onnx(model: nn.Module, size: int, path: Path, channels: int) -> None:
    """Write model.onnx atomically, for any batch size. Raises UserError if a package is missing."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"--onnx: package {package} is missing; `.venv/bin/pip install -e '.[onnx]'`")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns about itself
        program = torch.onnx.export(
            Tokens(model).eval(), (torch.zeros(2, channels, size, size),), dynamo=True, opset_version=OPSET, verbose=False,
            input_names=["images"], output_names=["cls", "patches"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        )  # fmt: skip
    assert program is not None
    with atomic_path(path) as draft:
        program.save(draft)


@torch.no_grad()
def compare_features(vit: ViT, folder: Path, onnx: bool) -> dict[str, float]:
    """Write model.onnx if wanted, and compare features on random images: {"timm" and "ONNX Runtime": largest difference,
    as a share of the largest feature}."""
    torch.manual_seed(0)
    images = torch.randn(3, vit.pixels.channels, vit.image_size, vit.image_size)
    out = vit(images)
    assert out.patches is not None
    ours = (out.cls, out.patches)
    model = load_with_timm(vit, folder / "model.safetensors")
    differences = {"timm": _largest_difference(Tokens(model)(images), ours)}
    if onnx:
        export_onnx(model, vit.image_size, folder / "model.onnx", vit.pixels.channels)
        from onnxruntime import InferenceSession

        session = InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        for n in (1, 3):  # the batch is dynamic
            exported = [torch.from_numpy(array) for array in session.run(None, {"images": images[:n].numpy()})]
            difference = _largest_difference(exported, [tensor[:n] for tensor in ours])
            differences["ONNX Runtime"] = max(differences.get("ONNX Runtime", 0.0), difference)
    return differences


def _largest_difference(exported: Sequence[Tensor], ours: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(exported, ours, strict=True))


def export(vit: ViT, folder: Path, onnx: bool) -> dict[str, float]:
    """Write the export; returns the differences of `compare_features`.

    Raises UserError if the folder holds something else, if a plain ViT cannot have these features, or if they differ.
    """
    if vit.attention == "all_query":
        raise UserError(
            "trained with reference.attention: all_query, its patches never attend to [CLS]; those of a plain ViT do, so "
            "the same weights would have other features"
        )
    config = folder / "config.json"
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or _is_export(config))):
        raise UserError(f"{folder} is not empty and holds no export; name another folder")
    about = hub_config(vit)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config.write_text(json.dumps(about, indent=1) + "\n")  # first: from now on the folder counts as an export
        (folder / "model.onnx").unlink(missing_ok=True)  # possibly of other weights
        tensors = {n: t.detach().contiguous() for n, t in vit.state_dict().items()}
        header = {"format": "pt", "densedino": json.dumps(about["densedino"])}
        save_tensors(folder / "model.safetensors", tensors, header)
        differences = compare_features(vit, folder, onnx)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from None
    wrong = [f"{runtime}'s by {d:.1e}" for runtime, d in differences.items() if d > TOLERANCE]
    if wrong:
        raise UserError(f"{folder}: the features differ from {' and '.join(wrong)}; do not use this export")
    return differences


def _is_export(config: Path) -> bool:
    try:
        return "densedino" in json.loads(config.read_text())
    except (OSError, ValueError):
        return False
