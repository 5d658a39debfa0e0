"""Exported weights: a process with torch and timm only gets the same features. Other formats: test_export_formats.py."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import run_program
from PIL import Image

from eval.datasets import center_crop
from eval.features import normalized
from model.architecture import ARCHS
from model.reference import resize_grid
from model.vit import ViT
from model.weights import load_backbone, timm_model
from runtime.checkpoint import save_backbone
from runtime.errors import UserError
from runtime.pixels import IMAGENET
from tools.export.folder import export
from tools.export.graph import run_torch
from tools.export.timm_folder import hub_config

# Evaluates each expression on the same images; imports torch and timm only.
_ELSEWHERE = """
import sys, timm, torch
images = torch.load("images.pt")
for n, words in enumerate(sys.argv[1:]):
    model = eval(words).eval()
    with torch.no_grad():
        torch.save((model(images), model.forward_features(images)), f"{n}.pt")
assert not {"model", "runtime", "tools", "eval", "pipeline"} & sys.modules.keys()
"""


def a_vit(width=64, depth=2, heads=2, patch=8, image_size=32, attention="patches+self") -> ViT:
    torch.manual_seed(0)
    vit = ViT(width=width, depth=depth, heads=heads, patch=patch, image_size=image_size, attention=attention)
    torch.nn.init.normal_(vit.pos_embed)  # far apart, so that a misread position shows
    return vit.eval()


def same_elsewhere(vit: ViT, tmp_path: Path, *loads: str) -> bool:
    """Whether each way of loading gives this network's [CLS] and patches."""
    torch.manual_seed(1)
    images = torch.randn(2, 3, vit.image_size, vit.image_size)
    torch.save(images, tmp_path / "images.pt")
    command = [sys.executable, "-c", _ELSEWHERE, *loads]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        cls, patches = vit(images)[:2]
    near = dict(atol=1e-4, rtol=1e-4)
    for n in range(len(loads)):
        theirs, tokens = torch.load(tmp_path / f"{n}.pt")
        if not (
            torch.allclose(theirs, cls, **near)
            and torch.allclose(tokens[:, vit.architecture.prefix :], patches, **near)
        ):
            return False
    return True


def test_vit_small(tmp_path):
    """ViT-S/16 at 224 px: the line in the README, unchanged."""
    width, depth, heads = ARCHS["vit_small"]
    vit = a_vit(width, depth, heads, 16, 224)
    export(vit, tmp_path / "out", [])
    load = 'timm.create_model("vit_small_patch16_224", num_classes=0, checkpoint_path="out/model.safetensors")'
    assert same_elsewhere(vit, tmp_path, load, 'timm.create_model("local-dir:out", pretrained=True)')


def test_the_program_and_onnx(tmp_path):
    """A custom network: the printed lines load it; ONNX and torch.export take any batch and any size, by our rule."""
    import onnx
    from onnxruntime import InferenceSession

    vit = a_vit(attention="none")
    save_backbone(tmp_path / "b.safetensors", vit, {"heads": 2, "attention": "none"})
    stdout = run_program(
        "-m", "tools.export", tmp_path / "b.safetensors", tmp_path / "out", "--to", "torch,onnx"
    ).stdout
    lines = [line for line in stdout.splitlines() if line.startswith("timm.create_model")]
    assert len(lines) == 2
    assert "embed_dim=64, depth=2, num_heads=2, patch_size=8, img_size=32" in lines[0]
    assert same_elsewhere(vit, tmp_path, *lines)

    file = tmp_path / "out" / "model.onnx"
    onnx.checker.check_model(onnx.load(file), full_check=True)
    session = InferenceSession(file, providers=["CPUExecutionProvider"])
    for n, h, w in ((1, 32, 32), (5, 40, 64), (2, 16, 24)):
        images = torch.randn(n, 3, h, w)
        with torch.no_grad():
            ours = vit(images)[:2]
        of_onnx = map(torch.from_numpy, session.run(["cls", "patches"], {"images": images.numpy()}))
        of_torch = run_torch(tmp_path / "out" / "model.pt2", images)
        for a, b, c in zip(ours, of_onnx, of_torch, strict=True):
            assert torch.allclose(a, b, atol=1e-4, rtol=1e-4)
            assert torch.allclose(a, c, atol=1e-4, rtol=1e-4)
    # our own loader reads it too, and without --to no model of other weights is left
    again = load_backbone(tmp_path / "out" / "model.safetensors")
    assert (again.heads, again.attention) == (2, "none")
    export(a_vit(heads=1), tmp_path / "out", [])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_args"]["num_heads"] == 1


@pytest.mark.parametrize("size", [32, 48, 64, 96, 224])
def test_timms_transform_crops_photos_as_evaluation_does(size):
    """With crop_pct of config.json: 55 pixels for 48; a share of .875 would give 54."""
    from timm.data import create_transform

    settings = hub_config(a_vit(image_size=size))["pretrained_cfg"]
    words = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")
    theirs = create_transform(**{word: settings[word] for word in words})
    coarse = np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)
    photo = Image.fromarray(coarse).resize((390, 270), Image.Resampling.BICUBIC)
    ours = normalized(center_crop(torch.from_numpy(np.array(photo)).permute(2, 0, 1), size)[None], IMAGENET)[0]
    assert (theirs(photo) - ours).abs().max() < 2.01 / 255 / 0.224  # two levels of gray


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_small_patch14_reg4_dinov2", {"registers": 4, "class_position": False, "layer_scale": True, "patch": 14}),
        ("vit_giant_patch14_dinov2", {"swiglu": True, "activation": "silu", "layer_scale": True, "hidden": 256}),
        ("vit_base_patch16_clip_224", {"pre_norm": True, "eps": 1e-5, "activation": "quick_gelu"}),
        ("", {"qkv_bias": False, "hidden": 100, "registers": 1, "activation": "gelu_tanh"}),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_a_file_of_any_architecture(name, options, named, tmp_path):
    """It loads here with all that its shapes do not tell, and in timm under a name that it came from, or a near one."""
    torch.manual_seed(0)
    shape = {"width": 48, "depth": 2, "heads": 3, "patch": 8, "name": name if named else ""} | options
    vit = ViT(image_size=4 * shape["patch"], **shape).eval()
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    export(vit, tmp_path / "out", [])  # it compares all features with those of timm
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architecture"].startswith(
        name if named else "vit"
    )
    again = load_backbone(tmp_path / "out" / "model.safetensors")
    assert again.architecture == replace(vit.architecture, hidden=vit.architecture.hidden or 4 * 48)
    images = torch.randn(1, 3, vit.image_size, vit.image_size)
    assert torch.equal(again(images).patches, vit(images).patches)


@pytest.mark.parametrize("arch", ["vit_tiny", "vit_base"])
def test_names_of_standard_networks(arch):
    with torch.device("meta"):
        vit = a_vit(*ARCHS[arch], 16, 224)
        assert timm_model(vit) == (f"{arch}_patch16_224", {})
        assert timm_model(a_vit(*ARCHS[arch], 8, 96)) == (f"{arch}_patch16_224", {"patch_size": 8, "img_size": 96})


def test_at_another_size_the_rules_differ(tmp_path):
    """As documented: timm resizes the position grid by another rule, so features are close, not equal."""
    vit = a_vit()
    export(vit, tmp_path / "out", [])
    load = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True, img_size=48)
    theirs = load.pos_embed[0, 1:].detach()
    ours = resize_grid(vit.pos_embed[0, 1:].unflatten(0, (4, 4)), 6, 6).flatten(0, 1).detach()
    assert theirs.shape == ours.shape
    assert 1e-3 < (theirs - ours).abs().mean() < 0.5 * ours.abs().mean()


def test_what_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"reference\.attention: all_query, its patches never attend to \[CLS\]"):
        export(a_vit(attention="all_query"), tmp_path / "out", [])
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="mine is not empty and holds no export"):
        export(a_vit(), tmp_path / "mine", [])
    assert (tmp_path / "mine" / "config.json").read_text() == "{}"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is not empty and holds no export"):
        export(a_vit(), tmp_path / "file", [])
    error = run_program("-m", "tools.export", tmp_path / "nothing", tmp_path / "out", expect=2).stderr
    assert error.startswith("error: ")
    assert "nothing: no such run, checkpoint or backbone file" in error
    assert error.count("\n") == 1
