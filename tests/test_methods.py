"""The contract of a pretraining method: what each must do to be trained by train.py."""

import numpy as np
import pytest
import torch
from conftest import losses_of, run_processes, run_program

from model.methods import METHODS, Method, build
from model.weights import load_pretrained
from pipeline.batch import Batch, draw, size_groups
from runtime.checkpoint import save_backbone
from runtime.config import Config, load_config
from runtime.distributed import alone
from runtime.methods import accumulates, evaluated, load_class, uses_points
from runtime.notes import notes
from runtime.schedule import Optimizer, StepValues, make_schedules
from tests.faults.program import Program, equal, final, log, steps
from train import train_step

EVERY = [*METHODS, "tests.byol:BYOL"]  # the last is outside the registry, as a user's class is
TWO_VIEWS = "data.views=[{count: 2, size: 32, scale: [0.4, 1.0], teacher: true, blur: [1.0, 0.1]}]"
NEEDS = {  # what a method needs of the tiny config
    "densecl": [TWO_VIEWS, "contrast.queue=48", "contrast.feature=mean"],
    "mocov2": [TWO_VIEWS, "contrast.queue=48"],
    "mocov3": [TWO_VIEWS],
}
WORDS = ["model.drop_path=0", "optim.epochs=1", "optim.warmup_epochs=0", "speed.precision=float64", "run.log_every=1"]


@pytest.mark.parametrize("name", [*EVERY, "tests.byol:PointBYOL"])
def test_registry_equals_the_class(name):
    cls = load_class(name)
    assert issubclass(cls, Method)
    assert (uses_points(name), accumulates(name), evaluated(name)) == (cls.uses_points, cls.accumulates, cls.evaluated)


def batch_of(config: Config, images: int = 3) -> Batch:
    ids, sides = torch.arange(images), np.full(images, 40)
    views = [torch.randn(g.stop - g.start, images, 3, size, size) for size, g in size_groups(config)]
    return Batch(0, ids, ids, views, **draw(config, 0, ids.numpy(), sides, sides + 10).tensors())


@pytest.mark.parametrize("name", ["densedino", "tests.byol:PointBYOL"])
def test_a_method_gets_the_points_that_it_uses(name, tiny_config):
    """A class outside this repository, too."""
    config = load_config(tiny_config, [f"method={name}"])
    batch, method = batch_of(config), build(config)
    assert config.points == batch.view_points.shape[3] == 2
    metrics, _ = losses_of(method, batch)
    metrics["loss"].backward()
    assert metrics["loss"].isfinite()
    assert method.student.backbone.pos_embed.grad.any()
    assert draw(load_config(tiny_config, ["method=dino"]), 0, *np.full((3, 1), 40)).view_points.shape[3] == 0


def test_a_vit_with_registers_is_trained(tiny_config):
    """Every tensor has a gradient; without positions of [CLS], there are no two parts to clip."""
    words = ["model.arch=vit_small_patch14_reg4_dinov2", "model.width=48", "model.depth=2", "model.heads=3"]
    views = (
        "data.views=[{count: 2, size: 56, scale: [0.4, 1.0], teacher: true}, {count: 2, size: 28, scale: [0.1, 0.4]}]"
    )
    config = load_config(tiny_config, ["method=densedino", "reference.locality=1", views, "model.patch=14", *words])
    batch, method = batch_of(config), build(config)
    assert method.student.backbone.architecture.registers == 4
    assert method.backbone.pos_embed.shape == (1, 16, 48)  # 56 / 14 patches a side, none of [CLS] and registers
    metrics, _ = losses_of(method, batch)
    metrics["loss"].backward()
    without = [
        n for n, p in method.student.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert not without
    clipped = Optimizer(method.student, 3.0, split_positions=method.clip_positions_apart)._clipped()
    assert len(clipped) == sum(p.grad is not None for p in method.student.parameters())  # its positions are one tensor


@pytest.fixture(params=EVERY)
def method(request) -> list[str]:
    """The words that train a method with the tiny config."""
    return [f"method={request.param}", *NEEDS.get(request.param, [])]


def test_names_and_state(method, tiny_config):
    """Only what learns has a gradient; a state dict contains all state; building twice gives the same."""
    config = load_config(tiny_config, method)
    torch.manual_seed(0)
    first = build(config)
    torch.manual_seed(0)
    second = build(config)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    trained = {n for n, p in first.named_parameters() if p.requires_grad}
    assert trained
    assert all(n.startswith("student.") for n in trained)
    grouped = [p for group in first.parameter_groups() for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in first.student.parameters() if p.requires_grad}
    assert len(grouped) == len(trained)
    assert any(first.backbone is module for module in first.modules())
    assert first.networks()["student"] is first.student
    assert all(first.get_submodule(role) is network for role, network in first.networks().items())
    units = first.compile_units()
    assert len({id(unit) for unit in units}) == len(units)


def test_a_skipped_step_changes_nothing(method, tiny_config):
    config = load_config(tiny_config, method)
    method, at = build(config), StepValues(teacher_momentum=0.5)
    for p in method.student.parameters():
        p.data += 0.1  # a student that has learned
    before = {n: t.clone() for n, t in method.state_dict().items()}
    method.before_step(at)
    statistics = method(batch_of(config), at).statistics
    method.after_step(statistics, at, torch.tensor(0.0))
    assert all(torch.equal(t, before[n]) for n, t in method.state_dict().items())
    method.after_step(statistics, at, torch.tensor(1.0))
    changed = {n for n, t in method.state_dict().items() if not torch.equal(t, before[n])}
    assert changed or all(
        n.startswith("student.") for n in before
    )  # a method without a teacher may have nothing to change


def test_resumes_bit_equal(method, tiny_config, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code, out, err = Program(tiny_config, *method, f"run.folder={whole}").end()
    assert code == 0, f"{out}\n{err}"
    program = Program(tiny_config, *method, f"run.folder={cut}")
    program.reach(9)
    program.kill()
    program.end()
    assert steps(cut) < 20
    code, out, err = Program(tiny_config, *method, f"run.folder={cut}").end()
    assert code == 0, f"{out}\n{err}"
    assert "resumed at step 7" in out or "resumed at step 14" in out
    assert equal(final(whole), final(cut))
    assert log(whole)["losses"] == log(cut)["losses"]


def test_accumulation_and_processes_equal_one_process(method, tiny_config, tmp_path):
    """The same batches in two accumulated parts, and on two processes, give the same weights to 1e-9. A method that needs
    the batch as a whole refuses parts."""
    runs = {"one": ([], 1), "accumulated": (["speed.grad_accum_steps=2"], 1), "two": ([], 2)}
    if not accumulates(method[0].removeprefix("method=")):
        words, _ = runs.pop("accumulated")
        assert "speed.grad_accum_steps: " in run_program("train.py", tiny_config, *method, *words, expect=2).stderr
    for name, (words, processes) in runs.items():
        words = [*method, *WORDS, *words, f"run.folder={tmp_path / name}"]
        run_processes("train.py", tiny_config, *words, processes=processes)
    one = final(tmp_path / "one")
    for other in runs.keys() - {"one"}:
        theirs = final(tmp_path / other)
        assert theirs.keys() == one.keys()
        for name, t in one.items():
            assert (theirs[name] - t).abs().max() <= 1e-9 * max(1.0, float(t.abs().max())), (other, name)


def test_missing_method(tiny_config):
    message = run_program("train.py", tiny_config, "method=tests.byol:BYOl", expect=2).stderr
    assert message == "error: method: tests.byol:BYOl is not found (module 'tests.byol' has no attribute 'BYOl')\n"


def test_export_and_evaluation(method, tiny_config, tmp_path):
    run_program("train.py", tiny_config, *method, "optim.epochs=1", "optim.warmup_epochs=0")
    assert "top-1" in run_program("-m", "eval", "knn", tmp_path / "run").stdout
    assert "top-1" in run_program("-m", "eval", "knn", tmp_path / "run", "--untrained").stdout


def test_starts_from_pretrained_weights(method, tiny_config, tmp_path):
    """model.init loads the backbone into each network of any method, and lists the rest as new."""
    config = load_config(tiny_config, method)
    source, ours = build(config).backbone, build(config)
    save_backbone(tmp_path / "backbone.safetensors", source, {"heads": 2})
    message = load_pretrained(ours, str(tmp_path / "backbone.safetensors"))
    for network in ours.networks().values():
        assert torch.equal(network.backbone.pos_embed, source.pos_embed)
    new = [name for name, _ in ours.student.named_children() if name != "backbone"]
    assert message.endswith("; new: " + ", ".join(new + ["centers"] * hasattr(ours, "cls_center")))


OTHER_VALUES = {  # of every key that some methods use and others do not, unlike those of the tiny config
    "reference.points": 3, "reference.attention": "patches", "reference.locality": 1, "reference.border": "border",
    "reference.views": "teacher", "reference.center": "published", "head.hidden": 17, "head.bottleneck": 9,
    "head.prototypes": 20, "head.layers": 4, "head.activation": "relu", "head.norm": "batch",
    "head.norm_last_layer": "false", "head.shared": "true", "loss.alpha": 0.3, "loss.cls_views": "teacher",
    "loss.student_temperature": 0.3, "loss.teacher_temperature": "[0.02,0.09]", "loss.teacher_temperature_warmup": 3,
    "loss.center_momentum": 0.5, "clustering.epsilon": 0.3, "clustering.iterations": 1, "clustering.queue": 48,
    "clustering.queue_start_epochs": 2, "clustering.mask": "all", "clustering.feature": "mean",
    "clustering.head_lr_factor": 4, "contrast.queue": 96, "contrast.temperature": 0.7, "contrast.feature": "cls",
    "contrast.dense_weight": 0.1,
}  # fmt: skip


def test_the_registry_names_the_keys_that_a_method_uses(tiny_config):
    """A key changes the weights after two steps, or their shapes, where it is named, and nothing elsewhere."""
    always = ["model.drop_path=0", "loss.teacher_temperature=[0.04,0.07]"]
    always += ["loss.teacher_temperature_warmup=2", "contrast.feature=mean", "optim.freeze_last_layer_epochs=0"]

    def state(*words: str) -> dict[str, torch.Tensor]:
        config = load_config(tiny_config, words)
        torch.manual_seed(0)
        method = build(config)
        optimizer, schedules = Optimizer.of(method, config.optim), make_schedules(config, 2)
        for step in range(2, 4):  # after the learning rate's first step, which is 0
            torch.manual_seed(step)
            batch, at = batch_of(config, 4), schedules.at(step)
            train_step(batch, method, method, optimizer, at, alone())
        return method.state_dict()

    for name, entry in METHODS.items():
        words = [f"method={name}", *NEEDS.get(name, []), *always]
        usual = state(*words)
        for key, value in OTHER_VALUES.items():
            changed = state(*words, f"{key}={value}")
            same = {n: t.shape for n, t in usual.items()} == {n: t.shape for n, t in changed.items()} and all(
                torch.equal(t, changed[n]) for n, t in usual.items()
            )
            assert same == (key not in entry.keys), (name, key)


def test_a_key_of_another_method_is_noted(tiny_config):
    def notes_of(*words: str) -> str:
        return "\n".join(notes(load_config(tiny_config, words), 100, words))

    note = "reference.locality changes nothing: method: dino does not use it (those that do: densedino)"
    assert note in notes_of("method=dino", "reference.locality=1")
    assert note in notes_of("method=dino", "reference={locality: 1}")
    assert "those that do: leopart, swav" in notes_of("clustering.queue=16")
    for words in (["reference.locality=1"], ["method=dino", "reference.locality=null"], ["method=dino"]):
        assert "changes nothing" not in notes_of(*words)
    assert "changes nothing" not in notes_of("method=tests.byol:BYOL", "reference.locality=1")  # it may use any key
