"""Weights of every dialect, strictly: the same features whatever the names, and an error that names what is wrong."""

import argparse
import os
import pickle

import pytest
import timm
import torch

from model.vit import ViT
from model.weights import load_backbone, our_names, read_network
from runtime.checkpoint import save_backbone
from runtime.mistake import Mistake


@pytest.fixture
def vit() -> ViT:
    torch.manual_seed(0)
    return ViT(width=64, depth=2, heads=1, patch=8, image_size=32).eval()


def official(vit: ViT, split: bool) -> dict:
    """A published checkpoint's shape: student and teacher, options, prefixes, heads."""
    backbone = dict(vit.state_dict())
    if split:
        positions = backbone.pop("pos_embed")
        backbone |= {"cls_pos_embed": positions[:, :1], "patch_pos_embed": positions[:, 1:]}
    head = {
        "mlp.0.weight": torch.ones(4, 64),
        "last_layer.weight_g": torch.ones(5, 1),
        "last_layer.weight_v": torch.ones(5, 4),
    }
    heads = {f"{h}.{n}": t for h in (("head", "ref_head") if split else ("head",)) for n, t in head.items()}
    teacher = {f"backbone.{n}": t for n, t in backbone.items()} | heads
    student = {f"module.{n}": torch.zeros_like(t) for n, t in teacher.items()}
    return {"student": student, "teacher": teacher, "epoch": 3, "args": argparse.Namespace(arch="vit_small")}


def features(network: ViT) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return network(torch.randn(2, 3, 32, 32))[1]


@pytest.mark.parametrize("dialect", ["densedino", "dino", "timm", "timm with classifier", "leopart", "ours"])
def test_every_dialect(vit, tmp_path, dialect):
    path = tmp_path / "weights.pth"
    plain = dict(vit.state_dict())
    if dialect in ("densedino", "dino"):
        torch.save(official(vit, dialect == "densedino"), path)
        names = set(read_network(path)[0])
        assert {"cls_head.mlp.0.weight", "backbone.pos_embed"} <= names
        assert ("reference_head.last_layer.weight_v" in names) == (dialect == "densedino")
        assert not read_network(path, "student")[0]["backbone.cls_token"].any()
    elif dialect == "leopart":
        extra = {"projection_head.0.weight": torch.ones(3, 3), "prototypes.weight": torch.ones(3, 3)}
        torch.save({"state_dict": {f"teacher.{n}": t for n, t in (plain | extra).items()}}, path)
    elif dialect == "ours":
        path = tmp_path / "backbone.safetensors"
        save_backbone(path, vit, {"heads": 1, "attention": "patches", "border": "border"})
        assert (load_backbone(path).attention, load_backbone(path).border) == ("patches", "border")
    else:
        extra = {"head.weight": torch.ones(10, 64), "head.bias": torch.ones(10)} if "class" in dialect else {}
        torch.save(plain | extra, path)
    assert torch.equal(features(load_backbone(path)), features(vit))


def test_a_real_timm_model_loads_both_ways(tmp_path):
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    ours = load_backbone(tmp_path / "timm.pth")
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert (ours(images)[0] - theirs(images)).abs().max() < 1e-4
    save_backbone(tmp_path / "ours.safetensors", ours, {})
    again = timm.create_model("vit_tiny_patch16_224", num_classes=0, checkpoint_path=str(tmp_path / "ours.safetensors"))
    with torch.no_grad():
        assert torch.equal(again.eval()(images), theirs(images))


def test_leopart_of_the_oracle(oracle):
    tensors = {
        n.removeprefix("loss.teacher."): t for n, t in oracle("g_leopart").items() if n.startswith("loss.teacher.")
    }
    ours = our_names(tensors)
    assert "backbone.blocks.1.mlp.fc2.bias" in ours
    assert not any("prototypes" in n or "projection" in n for n in ours)


def test_what_is_wrong_is_named(vit, tmp_path):
    path = tmp_path / "weights.pth"
    plain = dict(vit.state_dict())
    torch.save(plain | {"blocks.0.attn.rel_pos": torch.ones(1)}, path)
    with pytest.raises(Mistake, match=r"'blocks\.0\.attn\.rel_pos' is no name"):
        load_backbone(path)
    torch.save({n: t for n, t in plain.items() if n != "blocks.1.norm1.weight"}, path)
    with pytest.raises(Mistake, match=r"'blocks\.1\.norm1\.weight' is missing"):
        load_backbone(path)
    torch.save(plain | {"norm.bias": torch.ones(3)}, path)
    with pytest.raises(Mistake, match=r"'norm\.bias' has shape \(3,\), expected \(64,\)"):
        load_backbone(path)
    torch.save({"cls_pos_embed": torch.ones(1, 1, 64)}, path)
    with pytest.raises(Mistake, match="one is missing"):
        load_backbone(path)
    torch.save([1, 2], path)
    with pytest.raises(Mistake, match="holds no state dict"):
        load_backbone(path)
    with pytest.raises(Mistake, match="no such file"):
        load_backbone(tmp_path / "nothing.pth")


def test_nothing_is_executed(tmp_path):
    canary = tmp_path / "canary"

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {canary}",)

    for name, write in (("plain.pth", pickle.dump), ("zip.pth", lambda x, f: torch.save(x, f))):
        with open(tmp_path / name, "wb") as file:
            write({"teacher": Hostile()}, file)
        with pytest.raises(Mistake, match="not weights that can be read safely"):
            load_backbone(tmp_path / name)
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(Mistake, match=r"broken\.safetensors"):
        load_backbone(tmp_path / "broken.safetensors")
    assert not canary.exists()
