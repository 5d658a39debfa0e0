"""F11: a process, a data worker or the loader hangs or dies. The watchdog detects it within run.step_timeout, reports
which process and where, dumps the stacks and ends the job; no process is left."""

import os
import signal
import time

import pytest

from tests.faults.program import Program, gone, has_dali, slowness, steps, with_fault

pytestmark = pytest.mark.fault("F11")

TIMEOUT = 3  # seconds
WORDS = (f"run.step_timeout={TIMEOUT}", "optim.epochs=4000", "run.checkpoint_every=10")


def wait_for_failure(program: Program, family, since: float, within: float) -> str:
    """The program's stderr. It exits with code 1, in time, and leaves no process."""
    code, _, err = program.end()
    assert code == 1, err
    assert time.monotonic() - since < within * slowness()
    assert gone(family)
    return err


def test_a_process_is_stopped(tiny_config, tmp_path):
    program = Program(tiny_config, *WORDS, f"run.folder={tmp_path / 'run'}", processes=2)
    program.reach(15)
    family, stopped = program.family(), program.trainer(1)
    os.kill(stopped, signal.SIGSTOP)
    since = time.monotonic()
    err = wait_for_failure(
        program, family, since, TIMEOUT + 2 + 30 + 15
    )  # to detect it, to ask the others, torchrun's grace period, to exit
    assert f"error: {TIMEOUT} s in step " in err
    assert "(run.step_timeout); process 1 is silent or gone, last heard of in step" in err
    assert "the newest checkpoint is kept; stacks:" in err
    assert "train.py" in err.partition("stacks:")[2]


def signalled(tiny_config, tmp_path, number: int, *words: str) -> str:
    """The stderr of a run whose data worker gets a signal at step 5 or later."""
    program = Program(tiny_config, *WORDS, f"run.folder={tmp_path / 'run'}", "speed.workers=1", *words)
    program.reach(5)
    family, workers = program.family(), program.data_workers()
    assert workers
    for worker in workers:
        os.kill(worker, number)
    return wait_for_failure(program, family, time.monotonic(), TIMEOUT + 10)


@pytest.mark.fast
def test_a_data_worker_is_killed(tiny_config, tmp_path):
    """WebDataset's loader raises then; DALI would wait for ever (tested only if it is installed)."""
    for reader in ("wds", "dali") if has_dali() else ("wds",):
        folder = tmp_path / reader
        err = signalled(tiny_config, folder, signal.SIGKILL, f"speed.reader={reader}", "run.step_timeout=60")
        assert "error: a data worker process exited unexpectedly" in err
        assert "Traceback" not in err


def test_a_data_worker_is_stopped(tiny_config, tmp_path):
    err = signalled(tiny_config, tmp_path, signal.SIGSTOP)
    step = steps(tmp_path / "run")
    assert f"error: {TIMEOUT} s waiting for the batch of step {step} (run.step_timeout); the newest" in err
    assert "loader.py" in err.partition("stacks:")[2]


def test_the_loader_stalls(tiny_config, tmp_path):
    """As if a file system does not respond."""
    stall = """
from pipeline.readers.worker import BatchBuilder
fetch = BatchBuilder.fetch
def stalled_fetch(self, step):
    while step == 7:
        time.sleep(1)
    return fetch(self, step)
BatchBuilder.fetch = stalled_fetch
"""
    program = Program(tiny_config, *WORDS, f"run.folder={tmp_path / 'run'}", script=with_fault(tmp_path, setup=stall))
    program.reach(5)
    err = wait_for_failure(program, program.family(), time.monotonic(), TIMEOUT + 10)
    assert f"error: {TIMEOUT} s waiting for the batch of step 7 (run.step_timeout)" in err
    assert "in stalled_fetch" in err.partition("stacks:")[2]  # the stacks show where
