"""Continued pretraining (model.init): weights of every dialect begin a run, heads included; another network is refused."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from conftest import run_program
from safetensors.torch import load_file

from model.methods import Method, build
from model.weights import load_backbone, load_pretrained
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
    """A model at its first weights, the same at every call."""
    torch.manual_seed(2)
    return build(config or small())


def trained(config: Config | None = None) -> Method:
    """A model whose student, teacher, heads and centers are all different from each other and from a new one's."""
    model = new(config)
    torch.manual_seed(3)
    for name, t in model.state_dict().items():
        if not name.endswith("weight_g"):
            t.normal_()
    return model


def published(model: Method, dialect: str, path: Path) -> str:
    """A whole checkpoint as the published code saves it: names, roles, prefixes, centers and options of its own."""

    def named(state: dict) -> dict:
        state = {n.replace("cls_head.", "head.").replace("reference_head.", "ref_head."): t for n, t in state.items()}
        if dialect == "densedino":
            positions = state.pop("backbone.pos_embed")
            state |= {"backbone.cls_pos_embed": positions[:, :1], "backbone.patch_pos_embed": positions[:, 1:]}
        return state

    centers = {"center": model.cls_center[None]}
    if dialect == "densedino":
        centers["ref_center"] = model.reference_center[None]
    whole = {
        "student": {f"module.{n}": t for n, t in named(model.student.state_dict()).items()},
        "teacher": named(model.teacher.state_dict()),
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
    assert load_pretrained(ours, source) == f"begins with {source}: backbone, cls_head, reference_head, centers"
    assert same(ours, theirs)


def test_published_dino(tmp_path):
    """DINO has one head and one center: points begin with the same, as the published --finetune does it."""
    theirs, ours = trained(small("dino")), new()
    told = load_pretrained(ours, published(theirs, "dino", tmp_path / "dino.pth"))
    assert told.endswith("dino.pth: backbone, cls_head, reference_head (a copy of its cls_head), centers")
    for mine, given in ((ours.student, theirs.student), (ours.teacher, theirs.teacher)):
        assert same(mine.backbone, given.backbone)
        assert same(mine.cls_head, given.cls_head)
        assert same(mine.reference_head, given.cls_head)
    assert torch.equal(ours.cls_center, theirs.cls_center)
    assert torch.equal(ours.reference_center, theirs.cls_center)


@pytest.mark.parametrize("config", [small("dino"), small(shared="true")], ids=["dino", "one head for both"])
def test_a_head_that_has_no_place_here(tmp_path, config):
    ours = new(config)
    told = load_pretrained(ours, published(trained(), "densedino", tmp_path / "dense.pth"))
    assert told.endswith("dense.pth: backbone, cls_head, centers")
    assert same(ours.teacher.cls_head, trained().teacher.cls_head)


def test_our_own(tmp_path):
    """A checkpoint, its folder, its run: the whole model; a backbone file: the backbone."""
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
    told = load_pretrained(ours, str(tmp_path / "backbone.safetensors"))
    assert told.endswith("backbone.safetensors: backbone; new: cls_head, reference_head, centers")
    assert same(ours.student.backbone, theirs.teacher.backbone)
    assert same(ours.teacher.backbone, theirs.teacher.backbone)
    assert same(ours.teacher.reference_head, new().teacher.reference_head)
    assert not ours.cls_center.any()


def test_leopart(tmp_path):
    theirs, ours = trained(), new()
    backbones = {role: getattr(theirs, role).backbone for role in ("student", "teacher")}
    state = {f"{role}.{n}": t for role, backbone in backbones.items() for n, t in backbone.state_dict().items()}
    state |= {"teacher.projection_head.0.weight": torch.ones(3, 3), "student.prototypes.weight": torch.ones(3, 3)}
    torch.save({"state_dict": state}, tmp_path / "leopart.ckpt")
    told = load_pretrained(ours, str(tmp_path / "leopart.ckpt"))
    assert told.endswith("leopart.ckpt: backbone; new: cls_head, reference_head, centers")
    assert same(ours.student.backbone, theirs.student.backbone)
    assert same(ours.teacher.backbone, theirs.teacher.backbone)


def test_timm(tmp_path):
    """What timm knows by name, here a folder in its hub's form; and a file of a classifier that it saved."""
    backbone = trained().teacher.backbone
    save_backbone(tmp_path / "hub" / "model.safetensors", backbone, {})
    shape = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1, "img_size": 32}
    about = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": shape, "pretrained_cfg": {}}
    (tmp_path / "hub" / "config.json").write_text(json.dumps(about))
    classifier = {"head.weight": torch.ones(10, 64), "head.bias": torch.ones(10)}
    torch.save(backbone.state_dict() | classifier, tmp_path / "timm.pth")
    for source in (f"timm:local-dir:{tmp_path}/hub", str(tmp_path / "timm.pth")):
        ours = new()
        assert (
            load_pretrained(ours, source) == f"begins with {source}: backbone; new: cls_head, reference_head, centers"
        )
        assert same(ours.student.backbone, backbone)
    assert load_backbone(f"timm:local-dir:{tmp_path}/hub").heads == 1


def test_another_network_is_refused_with_the_difference(tmp_path):
    def refused(config: Config, source: object) -> str:
        with pytest.raises(UserError) as told:
            load_pretrained(new(config), str(source))
        assert "\n" not in str(told.value)
        return str(told.value)

    theirs = trained()
    source = published(theirs, "densedino", tmp_path / "dense.pth")
    other = small(prototypes=6)
    other.model.width, other.model.depth, other.model.patch = 32, 3, 16
    assert refused(other, source) == (
        f"{source} does not fit this model (model.width: 64 there, 32 here; model.patch: 8 there, 16 here; "
        "head.prototypes: 5 there, 6 here; model.depth: 2 there, 3 here; patches of the largest view: 16 there, 4 here)"
    )
    save_backbone(tmp_path / "b.safetensors", theirs.teacher.backbone, {"heads": 2, "attention": "all_query"})
    assert "(model.heads: 2 there, 1 here; reference.attention: all_query there, patches+self here)" in refused(
        small(), tmp_path / "b.safetensors"
    )
    state = theirs.teacher.state_dict()
    torch.save({n: t for n, t in state.items() if n != "backbone.norm.bias"}, tmp_path / "less.pth")
    assert refused(small(), tmp_path / "less.pth") == f"{tmp_path}/less.pth, backbone: 'norm.bias' is missing"
    torch.save({n: t for n, t in state.items() if "backbone" not in n}, tmp_path / "heads.pth")
    assert "heads.pth, backbone: 'blocks.0.attn.proj.bias' is missing (and" in refused(small(), tmp_path / "heads.pth")
    state["cls_head.last_layer.weight_g"] = 2 * state["cls_head.last_layer.weight_g"]
    torch.save(state, tmp_path / "gains.pth")
    assert "gains of their own; head.norm_last_layer=false" in refused(small(), tmp_path / "gains.pth")
    assert "no such file, did you mean" in refused(small(), tmp_path / "dens.pth")
    assert "did you mean 'vit_tiny_patch16_224" in refused(small(), "timm:vit_tinny_patch16_224")
    assert "timm:resnet18d.none" in refused(small(), "timm:resnet18d.none")


def test_a_run_begins_with_another_and_resume_wins(tiny_config, tmp_path):
    """The program: a run begins with another's weights, says so, and goes on without them once it has a checkpoint."""
    source = tmp_path / "backbone.safetensors"
    save_backbone(source, trained(load_config(tiny_config)).teacher.backbone, {})
    nowhere = run_program("train.py", tiny_config, f"model.init={source}x", expect=2).stderr
    assert "backbone.safetensorsx: no such file, did you mean" in nowhere
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]  # nothing stands in the way of the right word

    words = ["optim.epochs=1", "optim.warmup_epochs=0", f"model.init={source}", "optim.lr=1e-12", "optim.min_lr=0"]
    told = run_program("train.py", tiny_config, *words).stdout
    assert f"begins with {source}: backbone; new: cls_head, reference_head, centers" in told
    given, found = load_file(source), latest_valid(tmp_path / "run" / "checkpoints")
    assert found
    assert all((found.tensors()[f"student.backbone.{n}"] - t).abs().max() < 1e-9 for n, t in given.items())
    untrained = load_backbone(tmp_path / "run", untrained=True).state_dict()
    assert all(torch.equal(untrained[n], t) for n, t in given.items())  # what the run began with

    source.unlink()
    (tmp_path / "run" / "backbone.safetensors").unlink()  # or the run is finished, and says only that
    assert "resumed at step 5" in run_program("train.py", tiny_config, *words).stdout
