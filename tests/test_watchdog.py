"""A run that is watched: one in a folder, stopped in time or not at all, its files without a step told twice, its collapse
and its neighbors told."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
from conftest import run_program

from runtime import metrics, watchdog
from runtime.errors import UserError
from runtime.metrics import read_jsonl
from tests.faults.program import Program, gone, hurt, log, steps


def test_one_run_in_a_folder(tiny_config, tmp_path):
    run = f"run.folder={tmp_path / 'run'}"
    first = Program(tiny_config, run, "optim.epochs=4000")
    first.reach(2)
    refused = run_program("train.py", tiny_config, run, "optim.epochs=4000", expect=2).stderr
    assert refused.startswith(f"error: {tmp_path / 'run'}: process {first.process.pid} on ")
    assert "RUN=another/folder starts another run beside it" in refused
    assert refused.count("\n") == 1
    run_program("train.py", tiny_config, run, "--dry-run", "optim.epochs=4000")  # that only looks
    first.kill()  # whatever way it ends, the folder is free
    first.end()
    run_program(
        "train.py", tiny_config, run, "optim.epochs=1", "optim.warmup_epochs=0", expect=2
    )  # another run, as ever
    second = Program(tiny_config, run, "optim.epochs=4000")
    second.reach(2)
    second.kill()
    second.end()


def test_a_lock_is_for_one_process(tmp_path):
    program = "import sys; from pathlib import Path; from runtime import watch; held = watchdog.lock(Path(sys.argv[1]))"
    held = watchdog.lock(tmp_path)
    assert held
    told = run_program("-c", program, tmp_path, expect=1).stderr
    assert f"process {os.getpid()} on " in told
    held.close()
    run_program("-c", program, tmp_path)
    with pytest.raises(UserError, match="nothing can be written there"):
        watchdog.lock(tmp_path / ".lock" / "folder")


def test_ctrl_c_while_the_loader_stalls_saves_at_once(tiny_config, tmp_path):
    """A single process need not wait for a batch that may never come."""
    stall = """
from pipeline.readers import webdataset
fetch = webdataset.BatchBuilder.fetch
webdataset.BatchBuilder.fetch = lambda self, step: time.sleep(3600) if step == 7 else fetch(self, step)
"""
    program = Program(tiny_config, f"run.folder={tmp_path / 'run'}", script=hurt(tmp_path, before=stall))
    program.reach(7)
    time.sleep(0.5)
    begun = time.monotonic()
    program.process.send_signal(signal.SIGINT)
    code, out, err = program.end()
    assert code == 130, err
    assert "stopped and saved at step 7" in out
    assert time.monotonic() - begun < 20


def test_a_step_longer_than_the_grace_ends_unsaved(tiny_config, tmp_path):
    slow = hurt(tmp_path, "time.sleep(3600 * (step == 9))")
    words = ["run.grace=2", "run.checkpoint_every=5", "speed.workers=1", f"run.folder={tmp_path / 'run'}"]
    program = Program(tiny_config, *words, script=slow)
    program.reach(9)
    family = program.family()
    os.killpg(program.process.pid, signal.SIGTERM)
    code, _, err = program.end()
    assert code == 143
    assert (
        "error: stopped unsaved: still in step 9 2 s after the signal (run.grace); the newest checkpoint stands" in err
    )
    assert gone(family)
    assert "resumed at step 5" in run_program("train.py", tiny_config, *words).stdout


def test_no_step_is_told_twice(tiny_config, tmp_path):
    """A crash past the last checkpoint: metrics, samples and damage of the steps that are made again are taken back."""
    run = tmp_path / "run"
    words = [f"run.folder={run}", "run.checkpoint_every=7"]
    program = Program(tiny_config, *words, script=hurt(tmp_path, "if step == 12: os._exit(3)"))
    code, _, err = program.end()
    assert code == 3, err
    assert steps(run) == 12
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "lo')  # a line that the crash cut
    metrics.append_jsonl(run / "damaged.jsonl", {"step": 6, "planned": 1, "read": 2})
    metrics.append_jsonl(run / "damaged-1.jsonl", {"step": 7, "planned": 3, "read": 4})
    code, out, err = Program(tiny_config, *words, "data.max_corrupt=0.1").end()
    assert code == 0, err
    assert "resumed at step 7" in out
    told = log(run)
    assert [row[0] for row in told["losses"]] == [*range(1, 21)]
    assert [row["step"] for row in told["samples.jsonl"]] == [*range(20)]
    assert read_jsonl(run / "damaged.jsonl") == [{"step": 6, "planned": 1, "read": 2}]
    assert read_jsonl(run / "damaged-1.jsonl") == []


def test_damage_is_counted_over_a_restart(tiny_config, tmp_path):
    """The budget is an epoch's, not a start's: 88 samples, of which one was damaged before."""
    run = tmp_path / "run"
    words = [f"run.folder={run}", "run.checkpoint_every=7", "data.max_corrupt=0.005"]
    program = Program(tiny_config, *words, script=hurt(tmp_path, "if step == 8: os._exit(3)"))
    assert program.end()[0] == 3
    metrics.append_jsonl(run / "damaged.jsonl", {"step": 6, "planned": 1, "read": 2})
    told = run_program("train.py", tiny_config, *words, expect=2).stderr
    assert "1 of 88 samples are damaged in one epoch, more than data.max_corrupt: 0.005" in told


@pytest.mark.parametrize(("entropy", "told"), [(1e-4, True), (5.2983, True), (3.0, False)])
def test_a_collapse_is_told_once(tmp_path, capsys, entropy, told):
    """log 200 = 5.2983."""
    screen = metrics.Record(tmp_path, 100, SimpleNamespace(steps_per_epoch=10), 0, prototypes=200)
    for step in range(1, 4):
        screen.metrics(step, {"teacher_entropy": entropy})
    assert "collapsed" not in capsys.readouterr().out  # a moment is none
    for step in range(4, 30):
        screen.metrics(step, {"teacher_entropy": entropy})
    screen.close()
    said = capsys.readouterr().out
    assert said.count("warning: the teacher has collapsed: at step 5 its probabilities have an entropy of") == told


def test_neighbors_while_training(tiny_config, tmp_path):
    """eval.every: the same run, with a figure more; two processes tell the same figure."""
    words = ["eval.every=2", "optim.epochs=4", "model.drop_path=0.1"]
    runs = {}
    for name, extra, processes in (("without", ["eval.every=0"], 1), ("with", [], 1), ("two", [], 2)):
        code, _, err = Program(
            tiny_config, *words, *extra, f"run.folder={tmp_path / name}", processes=processes
        ).end()  # fmt: skip
        assert code == 0, err
        runs[name] = log(tmp_path / name), read_jsonl(tmp_path / name / "metrics.jsonl")
    assert runs["with"][0] == runs["without"][0]
    asked = [row["step"] for row in runs["with"][1] if "knn_top1" in row]
    assert asked == [row["step"] for row in runs["two"][1] if "knn_top1" in row] == [10, 20]
    assert all(0 <= row["knn_top1"] <= 100 for row in runs["two"][1] if "knn_top1" in row)
    assert not any("knn_top1" in row for row in runs["without"][1])


def test_restarts_need_a_store_of_their_own(tiny_config):
    env = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "0"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    told = run_program(*launcher, "train.py", tiny_config, expect=1, env=env).stderr
    assert "error: --max-restarts: torchrun keeps the addresses of processes that died" in told
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in told


def test_out_of_memory_is_told_with_what_takes_less(tiny_config, tmp_path):
    script = hurt(tmp_path, "if step == 9: torch.empty(10**15)", before="import torch")
    code, _, err = Program(tiny_config, "run.checkpoint_every=5", f"run.folder={tmp_path / 'run'}", script=script).end()
    assert code == 1
    assert "error: out of memory in step 9, " in err
    assert (
        "speed.grad_accum_steps=2 holds half as many images at a time, speed.activation_checkpointing=true takes less for each"
        in err
    )
    assert "Traceback" not in err
