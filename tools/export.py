"""Hand a trained backbone to others: a folder in timm's hub format, and ONNX.

    python -m tools.export NETWORK DST [--onnx]

NETWORK is a run folder, a checkpoint, a backbone file, weights of DINO, DenseDINO, Leopart or timm, or timm:NAME.

    DST/model.safetensors   the backbone under timm's names
    DST/config.json         architecture, its arguments, size and normalization of the pictures, as timm's hub keeps them
    DST/model.onnx          --onnx: normalized pictures float32 [batch,3,S,S] -> cls [batch,D], patches [batch,N,D]

The last line printed is the Python that loads it; nothing of this repository is needed for that. Before the folder is
called finished, timm loads it, and its features are those of the network here; with --onnx, ONNX Runtime's too.

That holds for pictures of the size S that the network was made for. For other sizes timm resizes the position grid to
exactly h x w patches with antialiasing; the published code samples it at (h + 0.1) / 14 (28.1 / 14 for 448 pixels) and
without. Features are then near each other, not equal: compare published figures through `eval`, which keeps the rule.

A network trained with reference.attention: all_query is refused: its patches never attend to [CLS], a plain ViT's do.
With every other mode (`none` too) a network without reference tokens is a plain ViT.

S side of a picture, pixels · D width · N patches.
"""

import argparse
import importlib.util
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from eval.datasets import shorter_side
from model.vit import ARCHS, ViT
from model.weights import load_backbone
from pipeline.augment.recipe import MEAN, STD
from runtime.checkpoint import save_tensors
from runtime.errors import UserError, run_cli

NEAR = 1e-3  # of the largest feature: other kernels round otherwise, other weights are far
OPSET = 20  # 18 is the least that torch writes, 20 the first with a GELU of its own


def timm_form(vit: ViT) -> tuple[str, dict[str, int]]:
    """(timm's name, the arguments that it must be given beside) of a backbone."""
    shape = {"embed_dim": vit.width, "depth": len(vit.blocks), "num_heads": vit.heads}
    alike = [name for name, dims in ARCHS.items() if dims == tuple(shape.values())]
    arguments = {} if alike else shape
    if vit.patch != 16:
        arguments["patch_size"] = vit.patch
    if vit.image_size != 224:
        arguments["img_size"] = vit.image_size
    return f"{alike[0] if alike else 'vit_tiny'}_patch16_224", arguments


def crop_share(size: int) -> float:
    """timm's `crop_pct` with which its own transform cuts photos as eval/datasets.py does: it takes floor(size / share)."""
    shorter = shorter_side(size)
    return 0.875 if int(size / 0.875) == shorter else size / (shorter + 0.5)


def hub_config(vit: ViT) -> dict[str, Any]:
    """What timm's hub format tells of a model beside its weights."""
    name, arguments = timm_form(vit)
    pictures = {
        "input_size": [3, vit.image_size, vit.image_size], "fixed_input_size": True, "interpolation": "bicubic",
        "crop_pct": crop_share(vit.image_size), "crop_mode": "center", "mean": list(MEAN), "std": list(STD),
        "num_classes": 0, "first_conv": "patch_embed.proj", "classifier": "head",
    }  # fmt: skip
    ours = {"heads": vit.heads, "attention": vit.attention, "border": vit.border}
    about = {"architecture": name, "num_classes": 0, "num_features": vit.width, "global_pool": "token"}
    return about | {"model_args": arguments, "pretrained_cfg": pictures, "densedino": ours}


def as_timm_loads_it(vit: ViT, weights: Path) -> nn.Module:
    """The model that timm makes of the exported weights."""
    name, arguments = timm_form(vit)
    create: Any = timm.create_model
    return create(name, num_classes=0, checkpoint_path=str(weights), **arguments).eval()


class Tokens(nn.Module):
    """timm's model as ONNX has it: [CLS] and patches apart."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model: Any = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.model.forward_features(images)
        return tokens[:, 0], tokens[:, 1:]


def export_onnx(model: nn.Module, size: int, path: Path) -> None:
    """Write model.onnx, its batch dynamic, whole or not at all. Raises UserError where the packages are missing."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"--onnx: package {package} is missing; `.venv/bin/pip install -e '.[onnx]'`")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter, about itself
        program = torch.onnx.export(
            Tokens(model).eval(), (torch.zeros(2, 3, size, size),), dynamo=True, opset_version=OPSET, verbose=False,
            input_names=["images"], output_names=["cls", "patches"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        )  # fmt: skip
    assert program is not None
    partial = path.with_name(f".{path.name}.partial")
    program.save(partial)
    os.replace(partial, path)


@torch.no_grad()
def farthest(vit: ViT, folder: Path, onnx: bool) -> dict[str, float]:
    """How far the exported features are from those here: {"timm" and "ONNX Runtime": largest difference, as a share of the
    largest feature}."""
    torch.manual_seed(0)
    images = torch.randn(3, 3, vit.image_size, vit.image_size)
    own = vit(images)[:2]
    model = as_timm_loads_it(vit, folder / "model.safetensors")
    found = {"timm": _far(Tokens(model)(images), own)}
    if onnx:
        export_onnx(model, vit.image_size, folder / "model.onnx")
        from onnxruntime import InferenceSession

        session = InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
        for n in (1, 3):  # the batch is dynamic
            got = [torch.from_numpy(out) for out in session.run(None, {"images": images[:n].numpy()})]
            found["ONNX Runtime"] = max(found.get("ONNX Runtime", 0.0), _far(got, [out[:n] for out in own]))
    return found


def _far(got: Sequence[Tensor], own: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, own, strict=True))


def export(vit: ViT, folder: Path, onnx: bool) -> dict[str, float]:
    """Fill the folder; returns what `farthest` finds. Raises UserError where it holds something else, and where the features
    come out otherwise."""
    if vit.attention == "all_query":
        raise UserError(
            "trained with reference.attention: all_query, its patches never attend to [CLS]; a plain ViT's do, and "
            "would make other features of the same weights"
        )
    config = folder / "config.json"
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or _is_export(config))):
        raise UserError(f"{folder} is not empty and holds no export; name another folder")
    about = hub_config(vit)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config.write_text(json.dumps(about, indent=1) + "\n")  # first: whatever happens, the folder is an export
        (folder / "model.onnx").unlink(missing_ok=True)  # of other weights, perhaps
        tensors = {n: t.detach().contiguous() for n, t in vit.state_dict().items()}
        header = {"format": "pt", "densedino": json.dumps(about["densedino"])}
        save_tensors(folder / "model.safetensors", tensors, header)
        far = farthest(vit, folder, onnx)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from None
    wrong = [f"{who}'s by {d:.1e}" for who, d in far.items() if d > NEAR]
    if wrong:
        raise UserError(f"{folder}: features differ from {' and '.join(wrong)}; what lies there is not to be used")
    return far


def _is_export(config: Path) -> bool:
    try:
        return "densedino" in json.loads(config.read_text())
    except (OSError, ValueError):
        return False


def main() -> None:
    parser = argparse.ArgumentParser("python -m tools.export", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("network", help="a run folder, a checkpoint, weights of any dialect, or timm:NAME")
    parser.add_argument("dst", type=Path, help="the folder to write")
    parser.add_argument("--onnx", action="store_true", help="model.onnx too")
    args = parser.parse_args()

    vit = load_backbone(args.network)
    far = export(vit, args.dst, args.onnx)
    print(f"{args.dst}: {', '.join(sorted(p.name for p in args.dst.iterdir()))}")
    print(f"pictures of {vit.image_size} px have the same features here and in {' and '.join(far)}")
    name, arguments = timm_form(vit)
    words = "".join(f", {key}={value}" for key, value in arguments.items())
    print(f'timm.create_model("{name}", num_classes=0{words}, checkpoint_path="{args.dst}/model.safetensors")')
    print(f'timm.create_model("local-dir:{args.dst}", pretrained=True)  # the same, by config.json')


if __name__ == "__main__":
    run_cli(main)
