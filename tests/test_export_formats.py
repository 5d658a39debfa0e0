"""Exports for transformers, torch.export and ONNX, and the model card: the same features, and no file that was not wanted.

transformers itself is asked if it is installed, or if $TRANSFORMERS_PYTHON is a Python that has it.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_program
from PIL import Image
from runs import write_run

from eval.datasets import center_crop
from eval.features import normalized
from model.architecture import Architecture
from model.methods import build
from model.vit import ViT
from model.weights import load_backbone, load_pretrained, with_architecture
from runtime.config import parse_config
from runtime.errors import UserError
from tools.export import folder as export_folder
from tools.export import graph
from tools.export.__main__ import main as program
from tools.export.__main__ import read_formats
from tools.export.folder import default_formats, export
from tools.export.transformers_folder import refusal, tensors_of

SHAPE = {"width": 48, "depth": 2, "heads": 3, "patch": 8}
DINOV2 = {"registers": 4, "class_position": False, "layer_scale": True}
KINDS = {  # the class in transformers: architectures of it
    "ViTModel": {}, "ViTModel without biases": {"qkv_bias": False, "hidden": 100, "eps": 1e-5, "activation": "quick_gelu"},
    "Dinov2Model": {"layer_scale": True, "activation": "gelu_tanh"},
    "Dinov2Model with SwiGLU": {"layer_scale": True, "swiglu": True, "activation": "silu", "hidden": 256},
    "Dinov2WithRegistersModel": DINOV2,
    "Dinov2WithRegistersModel with all positions": {"registers": 2, "class_position": True},
}  # fmt: skip
BLOCK = {  # names of a block in the published files (facebook/dino-vits16, facebook/dinov2-with-registers-small); shapes
    "ViTModel": {
        "layernorm_before.weight": (48,), "attention.attention.query.weight": (48, 48),
        "attention.attention.key.bias": (48,), "attention.attention.value.weight": (48, 48),
        "attention.output.dense.weight": (48, 48), "layernorm_after.bias": (48,),
        "intermediate.dense.weight": (192, 48), "output.dense.weight": (48, 192), "output.dense.bias": (48,),
    },
    "Dinov2WithRegistersModel": {
        "norm1.weight": (48,), "attention.attention.query.bias": (48,), "attention.output.dense.weight": (48, 48),
        "layer_scale1.lambda1": (48,), "norm2.bias": (48,), "mlp.fc1.weight": (192, 48), "mlp.fc2.bias": (48,),
        "layer_scale2.lambda1": (48,),
    },
    "Dinov2Model with SwiGLU": {"mlp.weights_in.weight": (256, 48), "mlp.weights_out.weight": (48, 128)},
}  # fmt: skip
FRONT = {
    "cls_token": (1, 1, 48),
    "position_embeddings": (1, 17, 48),
    "patch_embeddings.projection.weight": (48, 3, 8, 8),
}

# In a process of transformers: the tokens of the images, the pixels of a photo, and what a conversion had to say.
_TRANSFORMERS = """
import sys, torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel
images = torch.load("images.pt")
for n, folder in enumerate(sys.argv[1:]):
    model, loading = AutoModel.from_pretrained(folder, output_loading_info=True)
    processor = AutoImageProcessor.from_pretrained(folder)
    pixels = processor(Image.open("photo.png"), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        out = model.eval()(images)
    loading = {key: sorted(map(str, loading[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    torch.save((type(model).__name__, out.last_hidden_state, out.pooler_output, pixels, loading), f"{n}.pt")
    model.save_pretrained(folder + "-saved")
"""


def a_vit(image_size=32, **options) -> ViT:
    """All its parameters are random, so that one that is lost or misread shows."""
    torch.manual_seed(0)
    vit = ViT(image_size=image_size, **SHAPE | options).eval()
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return vit.requires_grad_(False)


def python_of_transformers() -> str:
    """Skips the test if there is none."""
    if found := os.environ.get("TRANSFORMERS_PYTHON"):
        return found
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed, and $TRANSFORMERS_PYTHON names no Python that has it")
    return sys.executable


def in_transformers(folder: Path, images: torch.Tensor, *exports: str) -> list[tuple]:
    """(class, tokens, pooled output, pixels of photo.png, what was missing) of each export, by transformers."""
    python = python_of_transformers()
    torch.save(images, folder / "images.pt")
    done = subprocess.run(
        [python, "-c", _TRANSFORMERS, *exports], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{n}.pt") for n in range(len(exports))]


@pytest.mark.parametrize("kind", BLOCK)
def test_names_and_shapes_of_transformers(kind):
    found = {name: tuple(tensor.shape) for name, tensor in tensors_of(a_vit(**KINDS[kind])).items()}
    expected = {f"embeddings.{name}": shape for name, shape in FRONT.items()} | {"layernorm.bias": (48,)}
    expected |= {f"encoder.layer.1.{name}": shape for name, shape in BLOCK[kind].items()}
    assert found.items() >= expected.items()
    if kind == "ViTModel":
        assert found["pooler.dense.weight"] == (48, 48)
        assert len(found) == 6 + 2 + 2 * 16  # embeddings and last norm, pooler, two blocks: no other
    if kind == "Dinov2WithRegistersModel":
        assert found["embeddings.register_tokens"] == (1, 4, 48)
        assert found["embeddings.mask_token"] == (1, 48)
        assert len(found) == 8 + 2 * 18


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_transformers_comes_back(kind, tmp_path):
    """Our reader has the same network, by the header of the tensors."""
    vit = a_vit(**KINDS[kind], attention="patches", locality=2.0)
    export(vit, tmp_path / "out", ["transformers"])
    again = load_backbone(tmp_path / "out" / "transformers")
    assert (again.heads, again.attention, again.locality) == (3, "patches", 2.0)
    images = torch.randn(2, 3, 32, 40)
    for ours, theirs in zip(vit(images)[:2], again(images)[:2], strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_run_continues_from_a_folder_of_transformers(tmp_path):
    vit, out = a_vit(), tmp_path / "out"
    export(vit, out, ["transformers"])
    config = parse_config(
        f"{{data: {{views: [{{count: 2, size: 32, teacher: true}}]}}, model: {{arch: null, patch: 8, "
        f"init: {out / 'transformers'}}}, head: {{hidden: 8, bottleneck: 8, prototypes: 8}}}}",
        "config",
    )
    method = build(with_architecture(config))
    assert "a ViT of Hugging Face" in load_pretrained(method, config.model.init)
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(method.backbone.eval()(images).patches, vit(images).patches, atol=1e-5, rtol=1e-5)


def test_in_transformers(tmp_path):
    """The library itself: the same tokens, [CLS] as the pooled output, photos cropped as here; and what it saves again."""
    python_of_transformers()
    coarse = np.random.default_rng(0).integers(0, 256, (9, 13, 3), np.uint8)
    photo = Image.fromarray(coarse).resize((390, 270), Image.Resampling.BICUBIC)
    photo.save(tmp_path / "photo.png")
    vits = [a_vit(**options) for options in KINDS.values()]
    for n, vit in enumerate(vits):
        export(vit, tmp_path / str(n), ["transformers"])
    images = torch.randn(2, 3, 32, 32)
    folders = [f"{n}/transformers" for n in range(len(vits))]
    for (kind, tokens, pooled, pixels, loading), name, vit, folder in zip(
        in_transformers(tmp_path, images, *folders), KINDS, vits, folders, strict=True
    ):
        assert kind == name.partition(" ")[0]
        assert not any(loading.values()), (name, loading)
        out = vit(images)
        assert torch.allclose(tokens[:, 0], out.cls, atol=1e-5, rtol=1e-5), name
        assert torch.allclose(tokens[:, vit.architecture.prefix :], out.patches, atol=1e-5, rtol=1e-5), name
        assert torch.allclose(pooled, out.cls, atol=1e-5, rtol=1e-5), name
        ours = normalized(center_crop(torch.from_numpy(np.array(photo)).permute(2, 0, 1), 32)[None], vit.pixels)
        assert (pixels - ours).abs().max() < 2.01 / 255 / 0.224  # two levels of gray
        saved = load_backbone(tmp_path / f"{folder}-saved")  # without the header of ours: config.json tells the rest
        assert torch.allclose(saved(images).patches, out.patches, atol=1e-5, rtol=1e-5), name


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"pre_norm": True}, "pre_norm"),
        ({"qk_norm": True}, "qk_norm"),
        ({"scale_norms": True}, "scale_norms"),
        ({"layer_scale": True, "hidden": 100}, "100 units for a width of 48"),
        ({"swiglu": True, "activation": "gelu"}, "activation gelu"),
    ],
)
def test_what_transformers_cannot_express(options, reason, tmp_path):
    assert reason in refusal(Architecture(**SHAPE | options))
    vit = a_vit(**options)
    with pytest.raises(UserError, match=f"--to transformers: .*{reason}.*; leave transformers out of --to"):
        export(vit, tmp_path / "out", ["transformers"])
    assert not (tmp_path / "out").exists()
    formats, why = default_formats(vit.architecture)  # by default it is left out, with the reason
    assert formats == ("timm", "torch", "card")
    assert reason in why
    assert default_formats(Architecture(**SHAPE)) == (("timm", "transformers", "torch", "card"), None)


@pytest.mark.slow  # the same of a plain ViT: test_export.py
@pytest.mark.parametrize("options", [DINOV2, {"pre_norm": True, "qk_norm": True, "swiglu": True, "activation": "silu"}])
def test_graphs_of_any_size(options, tmp_path):
    """torch.export and ONNX: the network's own features, its rule for positions included, at any batch, height and width."""
    onnx = pytest.importorskip("onnx")
    vit = a_vit(**options)
    export(vit, tmp_path, ["torch", "onnx"])
    onnx.checker.check_model(onnx.load(tmp_path / "model.onnx"), full_check=True)
    for n, h, w in ((1, 32, 32), (5, 40, 64), (2, 16, 24)):
        images = torch.randn(n, 3, h, w)
        out = vit(images)
        for read in (graph.run_torch(tmp_path / "model.pt2", images), graph.run_onnx(tmp_path / "model.onnx", images)):
            assert torch.allclose(read[0], out.cls, atol=1e-4, rtol=1e-4)
            assert torch.allclose(read[1], out.patches, atol=1e-4, rtol=1e-4)


def test_a_wrong_export_is_refused(tmp_path, monkeypatch):
    """If what was written has other features, the program does not say that it is an export."""
    right = tensors_of(a_vit(**DINOV2))
    wrong = right | {"embeddings.register_tokens": 3 * right["embeddings.register_tokens"]}
    monkeypatch.setattr("tools.export.transformers_folder.tensors_of", lambda _: wrong)
    with pytest.raises(UserError, match=r"the features differ from transformers' folder's by .*do not use this export"):
        export(a_vit(**DINOV2), tmp_path / "out", ["transformers"])


def test_formats(tmp_path):
    assert read_formats("all") == ("timm", "transformers", "torch", "onnx", "card")
    assert read_formats("torch, card,torch") == ("torch", "card")
    with pytest.raises(UserError, match=r"--to onx: 'onx' must be one of timm, .*did you mean 'onnx'"):
        read_formats("onx")
    assert {*export_folder.FILES} == {*read_formats("all")}


def test_the_card_and_a_second_export(tmp_path, tiny_shards, capsys):
    """What the run knows is in the card; files of other weights do not stay; an edited card does."""
    run, out = write_run(tmp_path / "mine", tiny_shards), tmp_path / "out"
    program([str(run), str(out), "--to", "card,transformers"])
    card = (out / "README.md").read_text()
    assert "# mine" in card
    assert f"`{tiny_shards.parent.name}/{tiny_shards.name}`" in card  # no whole path of this machine
    for words in (
        "library_name: timm", "# license:", "Method: densedino, 2 reference points", "batches of 8 images, 7 steps",
        "Not measured", 'AutoModel.from_pretrained("out/transformers")', 'create_model("local-dir:out"',
    ):  # fmt: skip
        assert words in card
    assert "model.pt2" not in card
    capsys.readouterr()
    program([str(run), str(out), "--to", "timm"])
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]
    assert "removed, of an earlier export: transformers/config.json" in capsys.readouterr().out
    program([str(run), str(out), "--to", "card"])
    (out / "README.md").write_text(f"{(out / 'README.md').read_text()}License: mine\n")
    program([str(run), str(out), "--to", "card"])
    assert "README.md was edited and is kept" in capsys.readouterr().out
    program([str(run), str(out), "--to", "timm"])
    assert "License: mine" in (out / "README.md").read_text()


def test_a_word_that_is_no_format_stops_at_once(tmp_path):
    error = run_program("-m", "tools.export", tmp_path, tmp_path / "out", "--to", "transformer", expect=2).stderr
    assert "'transformer' must be one of" in error
