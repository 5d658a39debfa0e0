"""F28: the speed section, and the number of processes, change how fast a run is and not what it learns.

Every key of the section is walked, with drop path and with BatchNorm in the heads where the value allows it. Losses are
equal to rounding; a reader that decodes differently (by at most 2 of 255) and a coarser precision change them by as much.
"""

from dataclasses import fields

import numpy as np
import pytest
import torch
from conftest import run_processes, run_program, write_config

from model.drop_path import draw
from pipeline.random import uniform
from runtime.config import Speed
from tests.faults.program import Program, has_dali, log

pytestmark = pytest.mark.fault("F28")
fast = pytest.mark.fast

STEPS = ("optim.epochs=1", "optim.warmup_epochs=0", "run.checkpoint_every=2", "speed.precision=float64")
DROP, BATCH_NORM, DALI = "model.drop_path=0.3", "head.norm=batch", "speed.reader=dali"
EXACT = 1e-9

# key: [(value, the words of both runs, largest relative difference of the first step's losses, and of all losses)]
WALK = {
    "device": [("auto", (DROP, BATCH_NORM), EXACT, EXACT)],
    "precision": [
        ("float32", (DROP, BATCH_NORM), 1e-4, 0.05), ("auto", (DROP, BATCH_NORM), 1e-4, 0.05),
        ("bfloat16", (DROP, BATCH_NORM), 0.05, 0.5),
    ],
    "compile": [("true", (DROP, BATCH_NORM, "method=dino"), EXACT, EXACT)],
    "grad_accum_steps": [(2, (DROP,), EXACT, EXACT), (4, (DROP, "head.shared=true"), EXACT, EXACT)],
    "activation_checkpointing": [("true", (DROP, BATCH_NORM), EXACT, EXACT)],
    "reader": [("dali", (DROP, BATCH_NORM), 0.02, 0.3)],
    "workers": [(2, (DROP, BATCH_NORM), EXACT, EXACT)],
    "prefetch": [(5, (DROP, BATCH_NORM, "speed.workers=1"), EXACT, EXACT)],
    "dali_threads": [(1, (DALI,), EXACT, EXACT)],
    "hw_decoder_load": [(0.1, (DALI,), EXACT, EXACT)],
    "cache": [("elsewhere", (DROP,), EXACT, EXACT)],
    "cache_gb": [(1, (DROP,), EXACT, EXACT)],
    "read_timeout": [(5, (DROP,), EXACT, EXACT)],
}  # fmt: skip
FAST = ("grad_accum_steps",)
CASES = [
    pytest.param(key, *case, id=f"{key}={case[0]}", marks=[fast] * (key in FAST))
    for key, cases in WALK.items()
    for case in cases
]


def losses(config, folder, *words, processes=1) -> np.ndarray:
    """[steps, losses] of a run of five steps."""
    run_processes("train.py", config, *STEPS, f"run.folder={folder}", "run.log_every=1", *words, processes=processes)
    rows = [[x for x in row[:4] if x is not None] for row in log(folder)["losses"]]  # step and three losses
    assert len(rows) == 5
    return np.array(rows)


@pytest.fixture(scope="module")
def config(tiny_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("speed")
    return write_config(folder / "tiny.yaml", tiny_shards, folder / "run")


@pytest.fixture(scope="module")
def plain(config, tmp_path_factory):
    """The losses of a run with these words, trained once for all cases that compare with it."""
    made: dict[tuple[str, ...], np.ndarray] = {}
    folder = tmp_path_factory.mktemp("plain")

    def run(words: tuple[str, ...]) -> np.ndarray:
        if words not in made:
            made[words] = losses(config, folder / str(len(made)), *words)
        return made[words]

    return run


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float((np.abs(a - b) / np.abs(a)).max())


@pytest.mark.fast
def test_every_key_of_the_section_is_walked():
    assert {field.name for field in fields(Speed)} == set(WALK)


@pytest.mark.parametrize(("key", "value", "words", "first", "every"), CASES)
def test_a_value_changes_no_loss(key, value, words, first, every, config, plain, tmp_path):
    if (value == "dali" or DALI in words) and not has_dali():
        pytest.skip("DALI is not installed here")
    expected = plain(words)
    found = losses(config, tmp_path / "run", *words, f"speed.{key}={value}")
    assert difference(expected[0], found[0]) <= first
    assert difference(expected, found) <= every


@pytest.mark.fast
def test_two_processes_have_the_batch_statistics_of_one(config, plain, tmp_path):
    words = (DROP, BATCH_NORM)
    assert difference(plain(words), losses(config, tmp_path / "two", *words, processes=2)) <= EXACT


def test_resuming_on_two_processes(config, plain, tmp_path):
    """Two steps of one process, then the others of two."""
    words = (DROP, BATCH_NORM)
    program = Program(config, *STEPS, f"run.folder={tmp_path / 'run'}", *words)
    program.reach(2)
    program.kill()
    program.end()
    assert difference(plain(words), losses(config, tmp_path / "run", *words, processes=2)) <= EXACT


@pytest.mark.fast
def test_batch_statistics_of_pieces_are_refused(config):
    """A piece would have statistics of its own, so that another number of pieces trains another network."""
    done = run_program("train.py", config, BATCH_NORM, "speed.grad_accum_steps=2", expect=2)
    assert "speed.grad_accum_steps: 2 pieces of a step would each have their own batch statistics" in done.stderr
    assert "speed.activation_checkpointing: true" in done.stderr


@pytest.mark.fast
def test_drop_path_is_drawn_by_sample():
    """The hash is that of the pipeline, so an image's draws depend on nothing but seed, step and its sample id."""
    ids = np.array([0, 7, 1_000_003, 2**40 + 1])
    for seed, step in ((0, 0), (2**63 - 1, 12)):
        ours = draw(seed, step, torch.from_numpy(ids), (3, 5, 2))
        theirs = uniform(seed, "drop path", step, ids, shape=(3, 5, 2))
        assert np.abs(ours.numpy() - theirs).max() < 2.0**-24
        assert (ours.numpy() <= theirs).all()
        assert torch.equal(draw(seed, step, torch.from_numpy(ids[2:]), (3, 5, 2)), ours[2:])
    assert 0.4 < draw(0, 0, torch.arange(1000), (1,)).mean() < 0.6
