"""Continued pretraining (model.init): a run starts from weights in any format, with heads; others are refused."""

import argparse
import json
from pathlib import Path

import pytest
import timm
import torch
from conftest import run_program
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models.vision_transformer import VisionTransformer

from model.methods import Method, build
from model.weights import load_backbone, load_pretrained, with_architecture
from runtime.checkpoint import Writer, latest_valid, save_backbone
from runtime.config import Config, dump_config, load_config, parse_config
from runtime.errors import UserError

SMALL = """
method: {method}
data: {{min_overlap: 0.01, views: [{{count: 2, size: 32, teacher: true}}]}}
model: {{arch: custom, patch: 8, width: 64, depth: 2, heads: 1}}
reference: {{attention: {attention}}}
head: {{hidden: 4, bottleneck: 4, prototypes: {prototypes}, shared: {shared}}}
"""


def small(method="densedino", attention="patches+self", prototypes=5, shared="false") -> Config:
    return parse_config(SMALL.format(**locals()), "small")


def new(config: Config | None = None) -> Method:
    """A model with its initial weights, the same at each call."""
    torch.manual_seed(2)
    return build(config or small())


def trained(config: Config | None = None) -> Method:
    """A model whose student, teacher, heads and centers all differ from each other and from a new model's."""
    model = new(config)
    torch.manual_seed(3)
    for name, t in model.state_dict().items():
        if not name.endswith("weight_g"):
            t.normal_()
    return model


def published(model: Method, checkpoint_format: str, path: Path) -> str:
    """A whole checkpoint as the published code saves it, with its names, roles, prefixes, centers and options."""

    def rename(state: dict) -> dict:
        state = {n.replace("cls_head.", "head.").replace("reference_head.", "ref_head."): t for n, t in state.items()}
        if checkpoint_format == "densedino":
            positions = state.pop("backbone.pos_embed")
            state |= {"backbone.cls_pos_embed": positions[:, :1], "backbone.patch_pos_embed": positions[:, 1:]}
        return state

    centers = {"center": model.cls_center[None]}
    if checkpoint_format == "densedino":
        centers["ref_center"] = model.reference_center[None]
    whole = {
        "student": {f"module.{n}": t for n, t in rename(model.student.state_dict()).items()},
        "teacher": rename(model.teacher.state_dict()),
        "dino_loss": centers, "optimizer": {}, "fp16_scaler": None, "epoch": 3,
        "args": argparse.Namespace(arch="vit_small"),
    }  # fmt: skip
    torch.save(whole, path)
    return str(path)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_published_densedino(tmp_path):
    theirs, ours = trained(), new()
    source = published(theirs, "densedino", tmp_path / "dense.pth")
    assert (
        load_pretrained(ours, source)
        == f"initialized from {source} (DenseDINO): backbone, cls_head, reference_head, centers"
    )
    assert same(ours, theirs)


def test_published_dino(tmp_path):
    """DINO has one head and one center: reference tokens start from the same, as with the published --finetune."""
    theirs, ours = trained(small("dino")), new()
    message = load_pretrained(ours, published(theirs, "dino", tmp_path / "dino.pth"))
    assert message.endswith("dino.pth (DINO): backbone, cls_head, reference_head (a copy of its cls_head), centers")
    for mine, given in ((ours.student, theirs.student), (ours.teacher, theirs.teacher)):
        assert same(mine.backbone, given.backbone)
        assert same(mine.cls_head, given.cls_head)
        assert same(mine.reference_head, given.cls_head)
    assert torch.equal(ours.cls_center, theirs.cls_center)
    assert torch.equal(ours.reference_center, theirs.cls_center)


@pytest.mark.parametrize("config", [small("dino"), small(shared="true")], ids=["dino", "one head for both"])
def test_a_head_that_the_method_lacks_is_ignored(tmp_path, config):
    ours = new(config)
    message = load_pretrained(ours, published(trained(), "densedino", tmp_path / "dense.pth"))
    assert message.endswith("dense.pth (DenseDINO): backbone, cls_head, centers")
    assert same(ours.teacher.cls_head, trained().teacher.cls_head)


def test_our_checkpoints_and_backbone_files(tmp_path):
    """A checkpoint, its folder and its run initialize the whole model, a backbone file the backbone."""
    theirs = trained()
    run = tmp_path / "run"
    optimizer = torch.optim.AdamW(theirs.student.parameters())
    writer = Writer(run / "checkpoints", 1, dump_config(small()), {}, {})
    writer.save(7, theirs, optimizer)
    writer.finish()
    (file,) = (run / "checkpoints").glob("checkpoint-*.safetensors")
    (run / "config.yaml").write_text(dump_config(small()))
    for source in (file, file.parent, run):
        ours = new()
        assert load_pretrained(ours, str(source)).endswith(": backbone, cls_head, reference_head, centers")
        assert same(ours, theirs)
    save_backbone(tmp_path / "backbone.safetensors", theirs.teacher.backbone, {"heads": 1})
    ours = new()
    message = load_pretrained(ours, str(tmp_path / "backbone.safetensors"))
    assert message.endswith("backbone.safetensors: backbone; new: cls_head, reference_head, centers")
    assert same(ours.student.backbone, theirs.teacher.backbone)
    assert same(ours.teacher.backbone, theirs.teacher.backbone)
    assert same(ours.teacher.reference_head, new().teacher.reference_head)
    assert not ours.cls_center.any()


def test_leopart(tmp_path):
    theirs, ours = trained(), new()
    backbones = {role: getattr(theirs, role).backbone for role in ("student", "teacher")}
    state = {f"{role}.{n}": t for role, backbone in backbones.items() for n, t in backbone.state_dict().items()}
    state |= {"teacher.projection_head.2.weight": torch.ones(3, 3), "student.prototypes.weight": torch.ones(3, 3)}
    torch.save({"state_dict": state}, tmp_path / "leopart.ckpt")
    message = load_pretrained(ours, str(tmp_path / "leopart.ckpt"))
    assert message.endswith(
        "leopart.ckpt (Leopart): backbone; new: cls_head, reference_head, centers; not used: prototypes, projection_head"
    )
    assert same(ours.student.backbone, theirs.student.backbone)
    assert same(ours.teacher.backbone, theirs.teacher.backbone)


def test_timm(tmp_path):
    """A model that timm knows by name, here a folder in its hub's format; and a classifier's file that timm saved."""
    backbone = trained().teacher.backbone
    save_backbone(tmp_path / "hub" / "model.safetensors", backbone, {})
    shape = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1, "img_size": 32}
    about = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": shape, "pretrained_cfg": {}}
    (tmp_path / "hub" / "config.json").write_text(json.dumps(about))
    classifier = {"head.weight": torch.ones(10, 64), "head.bias": torch.ones(10)}
    torch.save(backbone.state_dict() | classifier, tmp_path / "timm.pth")
    unused = "; not used: head (2 tensors)"
    for source, more in ((f"timm:local-dir:{tmp_path}/hub", ""), (str(tmp_path / "timm.pth"), unused)):
        ours = new()
        parts = f"backbone; new: cls_head, reference_head, centers{more}"
        assert load_pretrained(ours, source) == f"initialized from {source}: {parts}"
        assert same(ours.student.backbone, backbone)
    assert load_backbone(f"timm:local-dir:{tmp_path}/hub").heads == 1


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_another_grid_patch_and_number_of_channels(tmp_path, channels):
    """Positions, filters and channels are what timm makes of them."""
    torch.manual_seed(3)
    theirs = VisionTransformer(
        img_size=48, patch_size=12, embed_dim=64, depth=2, num_heads=1, num_classes=0, in_chans=channels
    )  # a grid of 4 x 4 patches of 12 pixels; ours has 8 x 8 of 8
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    config = small()
    config.data.views[0].size = 64
    ours = new(config)
    message = load_pretrained(ours, str(tmp_path / "timm.pth"))
    resampled = resample_patch_embed(theirs.patch_embed.proj.weight.detach(), [8, 8])
    expected = {
        "pos_embed": resample_abs_pos_embed(theirs.pos_embed.detach(), [8, 8]),
        "patch_embed.proj.weight": timm.models.adapt_input_conv(3, resampled, base_chans=channels),
    }
    for role in (ours.student, ours.teacher):
        own = role.backbone.state_dict()
        assert all(torch.equal(own[name], expected.get(name, t)) for name, t in theirs.state_dict().items())
    assert "; its 4 x 4 positions resampled to 8 x 8 (bicubic), its " in message
    assert "its patches of 12 pixels resampled to 8 (bicubic)" in message
    how = {1: "fitted to 3 (repeated, times 1/3)", 4: "fitted to 3 (the first, times 4/3)"}
    assert ("filters of" in message) == (channels != 3)
    assert how.get(channels, "") in message
    evaluated = load_backbone(tmp_path / "timm.pth")
    assert how.get(channels if channels > 1 else 3, "") in evaluated.note  # a photo's gray is one channel
    assert evaluated.patch_embed.proj.weight.shape == (64, min(channels, 3), 12, 12)
    torch.save(theirs.state_dict() | {"pos_embed": torch.ones(1, 15, 64)}, tmp_path / "odd.pth")
    with pytest.raises(
        UserError, match=r"15 positions, expected 1 for .CLS. .or none. and a square number for the patches"
    ):
        load_pretrained(ours, str(tmp_path / "odd.pth"))


def test_the_architecture_follows_from_the_weights(tmp_path):
    source = tmp_path / "backbone.safetensors"
    save_backbone(source, trained().teacher.backbone, {"heads": 2})
    config = parse_config(f"model: {{init: {source}, patch: 8}}", "config")
    assert config.model.arch is None
    model = with_architecture(config).model
    assert (model.arch, model.width, model.depth, model.heads, model.patch) == ("custom", 64, 2, 2, 8)
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "tiny.pth")
    assert with_architecture(parse_config(f"model: {{init: {tmp_path}/tiny.pth}}", "config")).model.arch == "vit_tiny"
    assert parse_config("model: {patch: 8}", "config").model.arch == "vit_small"
    registers = VisionTransformer(
        img_size=28, patch_size=14, embed_dim=64, depth=2, num_heads=1, num_classes=0, init_values=1.0, reg_tokens=4,
        no_embed_class=True,
    )  # fmt: skip
    torch.save(registers.state_dict(), tmp_path / "registers.pth")
    config = parse_config(f"model: {{patch: 14, init: {tmp_path}/registers.pth}}", "config")
    model = with_architecture(config).model
    assert (model.arch, model.width, model.depth, model.heads) == ("vit_small_patch14_reg4_dinov2", 64, 2, 1)
    with pytest.raises(UserError, match=r"no known model\.arch with patches of 16 pixels .* set model\.patch=14"):
        with_architecture(parse_config(f"model: {{init: {tmp_path}/registers.pth}}", "config"))
    given = parse_config(f"model: {{arch: vit_base, init: {source}}}", "config")
    assert with_architecture(given) is given
    torch.save({"conv1.weight": torch.ones(4, 3, 7, 7)}, tmp_path / "resnet.pth")
    with pytest.raises(UserError, match=r"resnet\.pth is a ResNet; this run trains a ViT"):
        with_architecture(parse_config(f"model: {{init: {tmp_path}/resnet.pth}}", "config"))


def test_another_network_is_refused_with_the_differences(tmp_path):
    def refused(config: Config, source: object) -> str:
        with pytest.raises(UserError) as error:
            load_pretrained(new(config), str(source))
        assert "\n" not in str(error.value)
        return str(error.value)

    theirs = trained()
    source = published(theirs, "densedino", tmp_path / "dense.pth")
    other = small(prototypes=6)
    other.model.width, other.model.depth, other.model.patch = 32, 3, 16
    assert refused(other, source) == (
        f"{source} (DenseDINO) does not fit this model (model.width: 64 saved, 32 current; "
        "model.depth: 2 saved, 3 current; head.prototypes: 5 saved, 6 current); "
        "model.arch=null takes the architecture of the weights; head.prototypes=5 takes the heads' sizes"
    )
    save_backbone(tmp_path / "b.safetensors", theirs.teacher.backbone, {"heads": 2, "attention": "all_query"})
    assert "(model.heads: 2 saved, 1 current; reference.attention: all_query saved, patches+self current)" in refused(
        small(), tmp_path / "b.safetensors"
    )
    state = theirs.teacher.state_dict()
    torch.save({n: t for n, t in state.items() if n != "backbone.norm.bias"}, tmp_path / "less.pth")
    assert refused(small(), tmp_path / "less.pth") == f"{tmp_path}/less.pth, backbone: 'norm.bias' is missing"
    torch.save({n: t for n, t in state.items() if "backbone" not in n}, tmp_path / "heads.pth")
    assert refused(small(), tmp_path / "heads.pth").endswith("heads.pth: contains no backbone")
    state["cls_head.last_layer.weight_g"] = 2 * state["cls_head.last_layer.weight_g"]
    torch.save(state, tmp_path / "gains.pth")
    assert "its prototypes have learned gains; set head.norm_last_layer=false" in refused(
        small(), tmp_path / "gains.pth"
    )
    assert "no such file, did you mean" in refused(small(), tmp_path / "dens.pth")
    assert "did you mean 'vit_tiny_patch16_224" in refused(small(), "timm:vit_tinny_patch16_224")
    assert "timm:resnet18d.none" in refused(small(), "timm:resnet18d.none")


def test_a_run_starts_from_weights_and_resumes_without_them(tiny_config, tmp_path):
    """train.py: a run starts from given weights, whose architecture it has, and logs it; once it has a checkpoint it resumes
    without them."""
    source = tmp_path / "backbone.safetensors"
    save_backbone(source, trained(load_config(tiny_config)).teacher.backbone, {"heads": 2})
    error = run_program("train.py", tiny_config, f"model.init={source}x", expect=2).stderr
    assert "backbone.safetensorsx: no such file or folder, did you mean" in error
    assert not (tmp_path / "run").exists()  # nothing prevents a corrected command

    words = ["optim.epochs=1", "optim.warmup_epochs=0", f"model.init={source}", "optim.lr=1e-12", "optim.min_lr=0"]
    words += [f"model.{key}=null" for key in ("arch", "width", "depth", "heads")]
    output = run_program("train.py", tiny_config, *words).stdout
    assert f"initialized from {source}: backbone; new: cls_head, reference_head, centers" in output
    given, found = load_file(source), latest_valid(tmp_path / "run" / "checkpoints")
    assert found
    assert all((found.tensors()[f"student.backbone.{n}"] - t).abs().max() < 1e-9 for n, t in given.items())
    untrained = load_backbone(tmp_path / "run", untrained=True).state_dict()
    assert all(torch.equal(untrained[n], t) for n, t in given.items())  # what the run started from

    source.unlink()
    (tmp_path / "run" / "backbone.safetensors").unlink()  # otherwise the run is finished and only reports that
    assert "resumed at step 5" in run_program("train.py", tiny_config, *words).stdout
