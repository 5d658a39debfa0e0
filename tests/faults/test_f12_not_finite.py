"""F12: a loss or gradient that is not finite. No process applies the step, no bit of the state changes, the step is counted.
After run.max_nonfinite_steps in a row the run stops, writes a replay file and keeps the last checkpoint."""

import json

import pytest

from runtime.checkpoint import latest_valid, open_checkpoint
from runtime.metrics import read_jsonl
from tests.faults.program import Program, equal, final, with_fault

pytestmark = pytest.mark.fault("F12")

FAULTS = {  # the fault of step 7; how many processes
    "NaN loss": ('if step == 7: log["loss"] = log["loss"] * float("nan")', 1),
    "inf loss": ('if step == 7: log["loss"] = log["loss"] + float("inf")', 1),
    "inf gradient": (
        'if step == 7: log["loss"].register_hook(lambda g: g * float("inf"))', 1
    ),
    "NaN on one process": ('if step == 7 and rank == 1: log["loss"] = log["loss"] * float("nan")', 2),
}  # fmt: skip


def state(folder, step: int):
    return open_checkpoint(folder / "checkpoints" / f"checkpoint-{step:08d}.safetensors").tensors()


@pytest.mark.parametrize("kind", FAULTS)
def test_a_step_is_skipped(tiny_config, tmp_path, kind):
    fault, processes = FAULTS[kind]
    run = tmp_path / "run"
    words = ["run.checkpoint_every=1", "run.keep_checkpoints=99", "optim.epochs=2", f"run.folder={run}"]
    code, out, err = Program(tiny_config, *words, processes=processes, script=with_fault(tmp_path, fault)).end()
    assert code == 0, err
    assert "finished: 10 steps" in out
    before, after, next_one = (state(run, n) for n in (7, 8, 9))
    assert equal(before, after)  # student, teacher, centers, moments and their count
    assert not equal(after, next_one)
    rows = {row["step"]: row for row in read_jsonl(run / "metrics.jsonl")}
    assert [step for step, row in rows.items() if "skipped_steps" in row] == [8]
    assert rows[8]["skipped_steps"] == 1
    assert all(row["loss"] > 0 and row["gradient_norm"] > 0 for step, row in rows.items() if step != 8)


@pytest.mark.fast
def test_too_many_in_a_row_stop_the_run(tiny_config, tmp_path):
    run, words = tmp_path / "run", ["run.max_nonfinite_steps=3", "run.checkpoint_every=7"]
    fault = 'if step >= 7: log["loss"] = log["loss"] * float("nan")'
    code, _, err = Program(tiny_config, *words, f"run.folder={run}", script=with_fault(tmp_path, fault)).end()
    assert code == 1
    assert (
        "error: loss or gradient was not finite for 3 steps in a row, up to step 9 (run.max_nonfinite_steps: 3)" in err
    )
    assert f"the last checkpoint is kept; {run}/replay.json lists the steps and their samples" in err
    assert "Traceback" not in err
    replay = json.loads((run / "replay.json").read_text())
    assert replay["steps"] == [7, 8, 9]
    seen = {str(row["step"]): row["samples"] for row in read_jsonl(run / "samples.jsonl")}
    assert replay["ids"] == {str(step): seen[str(step)] for step in replay["steps"]}
    assert "max_nonfinite_steps: 3" in replay["config"]
    found = latest_valid(run / "checkpoints")
    assert found
    assert found.step == 7
    whole = tmp_path / "whole"
    code, _, err = Program(tiny_config, *words, f"run.folder={whole}", "run.keep_checkpoints=9").end()
    assert code == 0, err
    assert equal(final(run), state(whole, 7))
