"""The contract of a method of pretraining: what any of them must do to be trained by train.py."""

import pytest
import torch
from conftest import run_program

from model.methods import METHODS, build
from runtime import config as configs
from runtime.config import load_config
from runtime.schedule import StepValues
from tests.faults.program import Program, equal, final, log, steps

EVERY = [*METHODS, "tests.byol:BYOL"]
WORDS = ["model.drop_path=0", "optim.epochs=1", "optim.warmup_epochs=0", "speed.precision=float64", "run.log_every=1"]


def test_the_config_knows_every_method():
    assert set(configs.METHODS) == set(METHODS)


@pytest.fixture(params=EVERY)
def method(request) -> str:
    return f"method={request.param}"


def test_names_and_state(method, tiny_config):
    """What learns asks for a gradient, nothing else does; a state dict holds all; building twice gives the same."""
    config = load_config(tiny_config, [method])
    torch.manual_seed(0)
    first = build(config)
    torch.manual_seed(0)
    second = build(config)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    learning = {n for n, p in first.named_parameters() if p.requires_grad}
    assert learning
    assert all(n.startswith("student.") for n in learning)
    grouped = [p for group in first.parameter_groups() for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in first.student.parameters() if p.requires_grad}
    assert len(grouped) == len(learning)
    assert any(first.backbone is module for module in first.modules())
    units = first.compile_units()
    assert len({id(unit) for unit in units}) == len(units)


def test_a_step_that_was_not_applied_changes_nothing(method, tiny_config):
    method = build(load_config(tiny_config, [method]))
    for p in method.student.parameters():
        p.data += 0.1  # a student that has moved
    before = {n: t.clone() for n, t in method.state_dict().items()}
    statistics = [torch.ones_like(center) for center in getattr(method, "centers", list)()]
    at = StepValues(teacher_momentum=0.5)
    method.before_step(at)
    method.after_step(statistics, at, torch.tensor(0.0))
    assert all(torch.equal(t, before[n]) for n, t in method.state_dict().items())
    method.after_step(statistics, at, torch.tensor(1.0))
    assert not all(torch.equal(t, before[n]) for n, t in method.state_dict().items())


def test_resumes_bit_for_bit(method, tiny_config, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    code, out, err = Program(tiny_config, method, f"run.folder={whole}").end()
    assert code == 0, f"{out}\n{err}"
    program = Program(tiny_config, method, f"run.folder={cut}")
    program.reach(9)
    program.kill()
    program.end()
    assert steps(cut) < 20
    code, out, err = Program(tiny_config, method, f"run.folder={cut}").end()
    assert code == 0, f"{out}\n{err}"
    assert "resumed at step 7" in out or "resumed at step 14" in out
    assert equal(final(whole), final(cut))
    assert log(whole)["losses"] == log(cut)["losses"]


def test_pieces_and_processes_agree_with_one(method, tiny_config, tmp_path):
    """The same batches in two pieces, and on two processes: the same weights to 1e-9."""
    runs = {"one": ([], 1), "pieces": (["speed.grad_accum_steps=2"], 1), "two": ([], 2)}
    for name, (words, processes) in runs.items():
        words = [method, *WORDS, *words, f"run.folder={tmp_path / name}"]
        code, out, err = Program(tiny_config, *words, processes=processes).end()
        assert code == 0, f"{out}\n{err}"
    one = final(tmp_path / "one")
    for other in ("pieces", "two"):
        theirs = final(tmp_path / other)
        assert theirs.keys() == one.keys()
        for name, t in one.items():
            assert (theirs[name] - t).abs().max() <= 1e-9 * max(1.0, float(t.abs().max())), (other, name)


def test_a_method_that_is_not_there(tiny_config):
    said = run_program("train.py", tiny_config, "method=tests.byol:BYOl", expect=2).stderr
    assert said == "error: method: tests.byol:BYOl is not found (module 'tests.byol' has no attribute 'BYOl')\n"


def test_is_exported_and_evaluated(method, tiny_config, tmp_path):
    run_program("train.py", tiny_config, method, "optim.epochs=1", "optim.warmup_epochs=0")
    assert "top-1" in run_program("-m", "eval.knn", tmp_path / "run").stdout
    assert "top-1" in run_program("-m", "eval.knn", tmp_path / "run", "--untrained").stdout
