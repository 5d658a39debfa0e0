"""Watching a run: one run in a folder, stop signals, no step twice in the logs, reports of a collapse and of k-NN."""

import os
import signal
import time

import pytest
from conftest import run_program

from runtime import metrics, watchdog
from runtime.errors import UserError
from runtime.metrics import read_jsonl
from tests.faults.program import Program, gone, log, steps, with_fault


def test_one_run_in_a_folder(tiny_config, tmp_path):
    run = f"run.folder={tmp_path / 'run'}"
    first = Program(tiny_config, run, "optim.epochs=4000")
    first.reach(2)
    refused = run_program("train.py", tiny_config, run, "optim.epochs=4000", expect=2).stderr
    assert refused.startswith(f"error: {tmp_path / 'run'}: process {first.process.pid} on ")
    assert "trains there; start another run with RUN=another/folder" in refused
    assert refused.count("\n") == 1
    run_program("train.py", tiny_config, run, "--dry-run", "optim.epochs=4000")  # takes no lock
    first.kill()  # however it exits, the folder is free
    first.end()
    run_program(
        "train.py", tiny_config, run, "optim.epochs=1", "optim.warmup_epochs=0", expect=2
    )  # refused as another run
    second = Program(tiny_config, run, "optim.epochs=4000")
    second.reach(2)
    second.kill()
    second.end()


def test_a_lock_is_for_one_process(tmp_path):
    program = (
        "import sys; from pathlib import Path; from runtime import watchdog; held = watchdog.lock(Path(sys.argv[1]))"
    )
    held = watchdog.lock(tmp_path)
    assert held
    stderr = run_program("-c", program, tmp_path, expect=1).stderr
    assert f"process {os.getpid()} on " in stderr
    held.close()
    run_program("-c", program, tmp_path)
    with pytest.raises(UserError, match="cannot write there"):
        watchdog.lock(tmp_path / ".lock" / "folder")


def test_ctrl_c_while_the_loader_stalls_saves_at_once(tiny_config, tmp_path):
    """A single process does not wait for a batch that may never arrive."""
    stall = """
from pipeline.readers.worker import BatchBuilder
fetch = BatchBuilder.fetch
BatchBuilder.fetch = lambda self, step: time.sleep(3600) if step == 7 else fetch(self, step)
"""
    program = Program(tiny_config, f"run.folder={tmp_path / 'run'}", script=with_fault(tmp_path, setup=stall))
    program.reach(7)
    time.sleep(0.5)
    begun = time.monotonic()
    program.process.send_signal(signal.SIGINT)
    code, out, err = program.end()
    assert code == 130, err
    assert "stopped and saved at step 7" in out
    assert time.monotonic() - begun < 20


def test_a_step_longer_than_the_grace_period_ends_without_saving(tiny_config, tmp_path):
    slow = with_fault(tmp_path, "time.sleep(3600 * (step == 9))")
    words = ["run.grace=2", "run.checkpoint_every=5", "speed.workers=1", f"run.folder={tmp_path / 'run'}"]
    program = Program(tiny_config, *words, script=slow)
    program.reach(9)
    family = program.family()
    os.killpg(program.process.pid, signal.SIGTERM)
    code, _, err = program.end()
    assert code == 143
    assert "error: stopped, and nothing was saved: still in step 9 2 s after the signal (run.grace)" in err
    assert "(run.grace); the newest checkpoint is kept" in err
    assert gone(family)
    assert "resumed at step 5" in run_program("train.py", tiny_config, *words).stdout


def test_no_step_is_logged_twice(tiny_config, tmp_path):
    """A crash after the last checkpoint: rows of the steps that are made again are removed from all logs."""
    run = tmp_path / "run"
    words = [f"run.folder={run}", "run.checkpoint_every=7"]
    program = Program(tiny_config, *words, script=with_fault(tmp_path, "if step == 12: os._exit(3)"))
    code, _, err = program.end()
    assert code == 3, err
    assert steps(run) == 12
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "lo')  # a line cut off by the crash
    metrics.append_jsonl(run / "damaged.jsonl", {"step": 6, "planned": 1, "read": 2})
    metrics.append_jsonl(run / "damaged-1.jsonl", {"step": 7, "planned": 3, "read": 4})
    code, out, err = Program(tiny_config, *words, "data.max_corrupt=0.1").end()
    assert code == 0, err
    assert "resumed at step 7" in out
    logged = log(run)
    assert [row[0] for row in logged["losses"]] == [*range(1, 21)]
    assert [row["step"] for row in logged["samples.jsonl"]] == [*range(20)]
    assert read_jsonl(run / "damaged.jsonl") == [{"step": 6, "planned": 1, "read": 2}]
    assert read_jsonl(run / "damaged-1.jsonl") == []


def test_corrupt_samples_are_counted_across_restarts(tiny_config, tmp_path):
    """The limit is for an epoch, not for a start: one of 88 samples was damaged before the restart."""
    run = tmp_path / "run"
    words = [f"run.folder={run}", "run.checkpoint_every=7", "data.max_corrupt=0"]
    program = Program(tiny_config, *words, script=with_fault(tmp_path, "if step == 8: os._exit(3)"))
    assert program.end()[0] == 3
    metrics.append_jsonl(run / "damaged.jsonl", {"step": 6, "planned": 1, "read": 2})
    stderr = run_program("train.py", tiny_config, *words, expect=2).stderr
    assert "1 of 88 samples are damaged in one epoch, more than data.max_corrupt: 0;" in stderr


@pytest.mark.parametrize(("entropy", "warned"), [(1e-4, True), (5.2983, True), (3.0, False)])
def test_a_collapse_is_reported_once(tmp_path, capsys, entropy, warned):
    """log 200 = 5.2983."""
    logger = metrics.MetricLogger(tmp_path, 100, 10, 0, prototypes=200)
    for step in range(1, 4):
        logger.write(step, {"teacher_entropy": entropy})
    assert "collapsed" not in capsys.readouterr().out  # not after a few rows
    for step in range(4, 30):
        logger.write(step, {"teacher_entropy": entropy})
    logger.close()
    stdout = capsys.readouterr().out
    assert stdout.count("warning: the teacher has collapsed: at step 5 its probabilities have an entropy of") == warned


@pytest.mark.slow
def test_restarts_need_a_store_of_their_own(tiny_config):
    env = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "0"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    stderr = run_program(*launcher, "train.py", tiny_config, expect=1, env=env).stderr
    assert "error: --max-restarts: torchrun keeps the addresses of processes that exited" in stderr
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in stderr


def test_out_of_memory_is_reported_with_remedies(tiny_config, tmp_path):
    script = with_fault(tmp_path, "if step == 9: torch.empty(10**15)", setup="import torch")
    code, _, err = Program(tiny_config, "run.checkpoint_every=5", f"run.folder={tmp_path / 'run'}", script=script).end()
    assert code == 1
    assert "error: out of memory in step 9, " in err
    assert "speed.grad_accum_steps=2 holds half as many images at a time, " in err
    assert "speed.activation_checkpointing=true needs less for each" in err
    assert "Traceback" not in err
