"""Weights in every checkpoint format: the same features whatever the names, and an error that names what is wrong."""

import argparse
import copy
import json
import os
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file
from torchvision.transforms.functional import normalize

from eval.features import tokens
from model.vit import ViT, require_vit
from model.weights import load_backbone, read_network, remap_keys
from runtime.checkpoint import save_backbone
from runtime.errors import UserError
from runtime.pixels import IMAGENET, Pixels


@pytest.fixture
def vit() -> ViT:
    torch.manual_seed(0)
    return ViT(width=64, depth=2, heads=1, patch=8, image_size=32).eval()


def official(vit: ViT, split: bool) -> dict:
    """A checkpoint as published: student and teacher, options, prefixes, heads."""
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
        return network(torch.randn(2, 3, 32, 32)).patches


@pytest.mark.parametrize("checkpoint_format", ["densedino", "dino", "timm", "timm with classifier", "leopart", "ours"])
def test_every_checkpoint_format(vit, tmp_path, checkpoint_format):
    path = tmp_path / "weights.pth"
    plain = dict(vit.state_dict())
    if checkpoint_format in ("densedino", "dino"):
        torch.save(official(vit, checkpoint_format == "densedino"), path)
        names = set(read_network(path)[0])
        assert {"cls_head.mlp.0.weight", "backbone.pos_embed"} <= names
        assert ("reference_head.last_layer.weight_v" in names) == (checkpoint_format == "densedino")
        assert not read_network(path, "student")[0]["backbone.cls_token"].any()
    elif checkpoint_format == "leopart":
        extra = {"projection_head.0.weight": torch.ones(3, 3), "prototypes.weight": torch.ones(3, 3)}
        torch.save({"state_dict": {f"teacher.{n}": t for n, t in (plain | extra).items()}}, path)
    elif checkpoint_format == "ours":
        path = tmp_path / "backbone.safetensors"
        about = {"heads": 1, "attention": "patches", "border": "border", "locality": 0.7}
        save_backbone(path, vit, about)  # as before files had their pixels: ImageNet's
        imagenet = {"mean": list(IMAGENET.mean), "std": list(IMAGENET.std)}
        assert load_backbone(path).about() == about | imagenet
    else:
        extra = {"head.weight": torch.ones(10, 64), "head.bias": torch.ones(10)} if "class" in checkpoint_format else {}
        torch.save(plain | extra, path)
    assert torch.equal(features(load_backbone(path)), features(vit))


def test_a_real_timm_model_loads_both_ways(tmp_path):
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0).eval()
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    ours = load_backbone(tmp_path / "timm.pth")
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert (ours(images).cls - theirs(images)).abs().max() < 1e-4
    save_backbone(tmp_path / "ours.safetensors", ours, {})
    again = timm.create_model("vit_tiny_patch16_224", num_classes=0, checkpoint_path=str(tmp_path / "ours.safetensors"))
    with torch.no_grad():
        assert torch.equal(again.eval()(images), theirs(images))


def test_moco_v3_as_published(tmp_path):
    """Base encoder, momentum encoder and predictor in one file; 12 heads for every width."""
    torch.manual_seed(0)
    vit = ViT(width=48, depth=1, heads=12, patch=8, image_size=32).eval()
    projection = {
        "head.0.weight": torch.ones(4, 48),
        "head.1.running_mean": torch.ones(4),
        "head.3.weight": torch.ones(4, 4),
    }
    base = {f"module.base_encoder.{n}": t for n, t in (dict(vit.state_dict()) | projection).items()}
    momentum = {n.replace("base", "momentum"): torch.zeros_like(t) for n, t in base.items()}
    predictor = {"module.predictor.0.weight": torch.ones(3, 3)}
    path = tmp_path / "vit-s-300ep.pth.tar"
    torch.save({"epoch": 300, "arch": "vit_small", "state_dict": base | momentum | predictor, "optimizer": {}}, path)
    loaded = load_backbone(path)
    assert loaded.heads == 12
    assert torch.equal(features(loaded), features(vit))
    torch.save({"state_dict": base | {"module.base_encoder.patch_embed.proj.9.weight": torch.ones(1)}}, path)
    with pytest.raises(UserError, match=r"'patch_embed\.proj\.9\.weight' is not a parameter of a ViT"):
        load_backbone(path)


def test_timm_name_gives_timms_features_whatever_its_normalization(monkeypatch):
    """The augreg ViTs take images normalized by mean .5 and deviation .5, and are evaluated with these."""
    real = timm.create_model

    def without_a_download(name, pretrained=False, **given):
        torch.manual_seed(3)
        model = real(name, **given)
        if pretrained:
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
            made.append(copy.deepcopy(model).eval())
        return model

    made: list = []
    monkeypatch.setattr(timm, "create_model", without_a_download)
    monkeypatch.setattr("model.weights.timm_hub._is_cached", lambda _: True)
    ours = load_backbone("timm:vit_tiny_patch16_224")
    theirs = made[0]
    assert (theirs.pretrained_cfg["mean"], ours.heads, ours.image_size) == ((0.5, 0.5, 0.5), 3, 224)
    images = torch.randint(256, (2, 3, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        theirs_cls = theirs((images / 255 - 0.5) / 0.5)
    torch.testing.assert_close(tokens(ours, images)[0], theirs_cls, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tiny_patch16_225", "no such model, did you mean 'vit_tiny_patch16_"),
        ("vit_base_patch16_siglip_224", "not a ViT with .CLS. and learned positions: it has no .CLS."),
        ("resnet50", "it is a ResNet"),
        ("vit_small_patch16_18x2_224", "timm has no pretrained weights for it"),
    ],
)
def test_unusable_timm_name_is_refused(name, message):
    with pytest.raises(UserError, match=f"timm:{name}: .*{message}"):
        load_backbone(f"timm:{name}")


def test_timm_weights_without_a_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"timm:vit_tiny_patch16_384: its weights are not in the cache .* does not answer"
    ):
        load_backbone("timm:vit_tiny_patch16_384")


def test_learned_reference_token_is_refused(vit, tmp_path):
    """Published code has `ref_learn_token` with --with_learnable_token only; our reference tokens have no such content."""
    path, checkpoint = tmp_path / "dense.pth", official(vit, split=True)
    checkpoint["teacher"]["backbone.ref_learn_token"] = torch.zeros(1, 1, 64)
    torch.save(checkpoint, path)
    assert torch.equal(features(load_backbone(path)), features(vit))  # a zero vector adds nothing
    checkpoint["teacher"]["backbone.ref_learn_token"][0, 0, 5] = 0.02
    torch.save(checkpoint, path)
    with pytest.raises(
        UserError, match=r"dense\.pth \(DenseDINO\): 'backbone\.ref_learn_token' is the learned content"
    ):
        load_backbone(path)
    torch.save(checkpoint["teacher"] | {"ref_learn_token": torch.ones(1, 1, 64)}, path)
    with pytest.raises(UserError, match="ref_learn_token"):
        load_backbone(path)


def test_a_network_without_a_teacher(vit, tmp_path):
    """The checkpoint of a method without a teacher: the student is evaluated."""
    path = tmp_path / "student.pth"
    torch.save({"model": {f"student.backbone.{n}": t for n, t in vit.state_dict().items()}}, path)
    assert torch.equal(features(load_backbone(path)), features(vit))


def test_leopart_of_the_oracle(oracle):
    tensors = {
        n.removeprefix("loss.teacher."): t for n, t in oracle("g_leopart").items() if n.startswith("loss.teacher.")
    }
    ours = remap_keys(tensors)
    assert "backbone.blocks.1.mlp.fc2.bias" in ours
    assert not any("prototypes" in n or "projection" in n for n in ours)


def test_errors_name_what_is_wrong(vit, tmp_path):
    path = tmp_path / "weights.pth"
    plain = dict(vit.state_dict())
    torch.save(plain | {"blocks.0.attn.rel_pos": torch.ones(1)}, path)
    with pytest.raises(UserError, match=r"'blocks\.0\.attn\.rel_pos' is not a parameter of a ViT"):
        load_backbone(path)
    torch.save({n: t for n, t in plain.items() if n != "blocks.1.norm1.weight"}, path)
    with pytest.raises(UserError, match=r"'blocks\.1\.norm1\.weight' is missing"):
        load_backbone(path)
    torch.save(plain | {"norm.bias": torch.ones(3)}, path)
    with pytest.raises(UserError, match=r"'norm\.bias' has shape \(3,\), expected \(64,\)"):
        load_backbone(path)
    torch.save({"cls_pos_embed": torch.ones(1, 1, 64)}, path)
    with pytest.raises(UserError, match="one is missing"):
        load_backbone(path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="contains no state dict"):
        load_backbone(path)
    with pytest.raises(UserError, match="no such file"):
        load_backbone(tmp_path / "missing.pth")


def test_unpickling_executes_nothing(tmp_path):
    canary = tmp_path / "canary"

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {canary}",)

    for name, write in (("plain.pth", pickle.dump), ("zip.pth", lambda x, f: torch.save(x, f))):
        with open(tmp_path / name, "wb") as file:
            write({"teacher": Hostile()}, file)
        with pytest.raises(UserError, match="not weights that can be read safely"):
            load_backbone(tmp_path / name)
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(UserError, match=r"broken\.safetensors"):
        load_backbone(tmp_path / "broken.safetensors")
    assert not canary.exists()


def test_a_vit_with_rotary_positions_is_evaluated(tmp_path):
    """DINOv3's architecture: timm's own features, at any size, for images in its colors. It cannot be trained."""
    torch.manual_seed(0)
    arguments = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32}
    theirs = timm.create_model("vit_small_patch16_dinov3", num_classes=0, dynamic_img_size=True, **arguments).eval()
    about = {"architecture": "vit_small_patch16_dinov3", "num_classes": 0, "model_args": arguments}
    colors = {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.1]}
    (tmp_path / "config.json").write_text(json.dumps(about | {"pretrained_cfg": colors}))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    ours = load_backbone(f"timm:local-dir:{tmp_path}")
    assert (ours.width, ours.patch, ours.image_size) == (48, 16, 32)
    assert ours.pixels == Pixels((0.5, 0.4, 0.3), (0.3, 0.2, 0.1))
    photo = torch.rand(2, 3, 48, 64)
    with torch.no_grad():
        expected = theirs.forward_features(normalize(photo, **colors))
        out = ours(normalize(photo, **colors))
    assert (out.cls - expected[:, 0]).abs().max() < 1e-5
    assert (out.patches - expected[:, theirs.num_prefix_tokens :]).abs().max() < 1e-5
    with pytest.raises(UserError, match="can be evaluated, but not trained: its positions are rotary"):
        read_network(f"timm:local-dir:{tmp_path}")
    with pytest.raises(UserError, match="the point probe needs a ViT that takes points: its positions are rotary"):
        require_vit(ours, tmp_path, "the point probe")
