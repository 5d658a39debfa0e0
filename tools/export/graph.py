"""A network as one graph of any batch, height and width: torch.export's program, and ONNX made from it.

    images float32 [n,C,h,w], normalized -> cls [n,D], patches [n,N,D]

h and w are multiples of the patch size, two patches at least, and need not be equal: the position grid is resized inside the
graph, by the rule of `model.reference.resize_grid`, so features are those of the network at every size.

n images · C channels · h, w height and width in pixels · N patches · D width.
"""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.vit import ViT
from runtime.errors import UserError
from runtime.files import atomic_path

OPSET = 20  # torch needs at least 18; 20 is the first with GELU


class Features(nn.Module):
    """The network with images alone as input, and two tensors as output."""

    def __init__(self, vit: ViT):
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.vit(images)
        return tokens.cls, tokens.patches


def trace(vit: ViT) -> torch.export.ExportedProgram:
    """The network's graph."""
    patch, channels = vit.patch, vit.architecture.channels
    rows, columns = (torch.export.Dim(name, min=2) for name in ("rows", "columns"))
    dynamic = {"images": {0: torch.export.Dim("batch"), 2: patch * rows, 3: patch * columns}}
    images = torch.zeros(2, channels, 3 * patch, 4 * patch)
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        return torch.export.export(Features(vit).eval(), (images,), dynamic_shapes=dynamic)


def save_torch(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write model.pt2 atomically."""
    with atomic_path(path) as draft, warnings.catch_warnings(action="ignore"), open(draft, "wb") as file:
        torch.export.save(program, file)


def require_onnx() -> None:
    """Raises UserError if a package is missing."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"--to onnx: package {package} is missing; `.venv/bin/pip install -e '.[onnx]'`")


def save_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write model.onnx atomically."""
    with warnings.catch_warnings(action="ignore"):  # torch's exporter warns about itself
        exported = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, input_names=["images"], output_names=["cls", "patches"],
            verbose=False,
        )  # fmt: skip
    assert exported is not None
    with atomic_path(path) as draft:
        exported.save(draft)


def run_torch(path: Path, images: Tensor) -> tuple[Tensor, Tensor]:
    """What model.pt2 computes."""
    module: Any = torch.export.load(path).module()
    return module(images)


def run_onnx(path: Path, images: Tensor) -> tuple[Tensor, ...]:
    """What ONNX Runtime computes with model.onnx, on the CPU."""
    from onnxruntime import InferenceSession

    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    return tuple(torch.from_numpy(array) for array in session.run(["cls", "patches"], {"images": images.numpy()}))
