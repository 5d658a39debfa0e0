"""A backbone as a folder in timm's hub format: model.safetensors and config.json."""

import json
from pathlib import Path
from typing import Any

import timm
from torch import nn

from eval.datasets import shorter_side
from model.vit import ViT
from model.weights import timm_model
from runtime.checkpoint import save_tensors
from runtime.files import write_atomic

FILES = ("config.json", "model.safetensors")


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


def write_timm(vit: ViT, folder: Path) -> None:
    """Write both files."""
    about = hub_config(vit)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "config.json", json.dumps(about, indent=1) + "\n")  # first: with it the folder is an export
    tensors = {n: t.detach().contiguous() for n, t in vit.state_dict().items()}
    save_tensors(folder / "model.safetensors", tensors, {"format": "pt", "densedino": json.dumps(about["densedino"])})


def load_with_timm(vit: ViT, weights: Path) -> nn.Module:
    """The model that timm makes of the exported weights."""
    name, arguments = timm_model(vit)
    create: Any = timm.create_model
    return create(name, num_classes=0, checkpoint_path=str(weights), **arguments).eval()
