"""F11: a process, a reading process or the loader hangs or dies. The watch sees it within run.step_timeout, tells who and
where, dumps the stacks and ends the job; nothing of it is left."""

import os
import signal
import time

import pytest

from tests.faults.program import Program, gone, has_dali, hurt, steps

pytestmark = pytest.mark.fault("F11")

TIMEOUT = 3  # seconds
WORDS = (f"run.step_timeout={TIMEOUT}", "optim.epochs=4000", "run.checkpoint_every=10")


def down(program: Program, family, since: float, within: float) -> str:
    """What the program told on stderr; it ended with code 1, in time, and left nothing behind."""
    code, _, err = program.end()
    assert code == 1, err
    assert time.monotonic() - since < within
    assert gone(family)
    return err


def test_a_process_stands_still(tiny_config, tmp_path):
    program = Program(tiny_config, *WORDS, f"run.folder={tmp_path / 'run'}", processes=2)
    program.reach(15)
    family, stopped = program.family(), program.trainer(1)
    os.kill(stopped, signal.SIGSTOP)
    since = time.monotonic()
    err = down(
        program, family, since, TIMEOUT + 2 + 30 + 15
    )  # to see it, to look around, torchrun's patience, and to end
    assert f"error: {TIMEOUT} s in step " in err
    assert "(run.step_timeout); process 1 is silent or gone, last heard of in step" in err
    assert "the newest checkpoint stands; stacks:" in err
    assert "train.py" in err.partition("stacks:")[2]


def signalled(tiny_config, tmp_path, number: int, *words: str) -> str:
    """What a run told whose reading process got a signal at step 5 or later."""
    program = Program(tiny_config, *WORDS, f"run.folder={tmp_path / 'run'}", "speed.workers=1", *words)
    program.reach(5)
    family, readers = program.family(), program.readers()
    assert readers
    for reader in readers:
        os.kill(reader, number)
    return down(program, family, time.monotonic(), TIMEOUT + 10)


@pytest.mark.fast
def test_a_reading_process_is_killed(tiny_config, tmp_path):
    """WebDataset's loader raises then; DALI, which would wait for ever, only where it is installed."""
    for reader in ("wds", "dali") if has_dali() else ("wds",):
        folder = tmp_path / reader
        err = signalled(tiny_config, folder, signal.SIGKILL, f"speed.reader={reader}", "run.step_timeout=60")
        assert "error: a reading process ended unasked" in err
        assert "Traceback" not in err


def test_a_reading_process_stands_still(tiny_config, tmp_path):
    err = signalled(tiny_config, tmp_path, signal.SIGSTOP)
    step = steps(tmp_path / "run")
    assert f"error: {TIMEOUT} s waiting for the batch of step {step} (run.step_timeout); the newest" in err
    assert "loader.py" in err.partition("stacks:")[2]


def test_the_loader_stalls(tiny_config, tmp_path):
    """As a file system does that answers no more."""
    stall = """
from pipeline.readers import webdataset
fetch = webdataset.BatchBuilder.fetch
def stalled_fetch(self, step):
    while step == 7:
        time.sleep(1)
    return fetch(self, step)
webdataset.BatchBuilder.fetch = stalled_fetch
"""
    program = Program(tiny_config, *WORDS, f"run.folder={tmp_path / 'run'}", script=hurt(tmp_path, before=stall))
    program.reach(5)
    err = down(program, program.family(), time.monotonic(), TIMEOUT + 10)
    assert f"error: {TIMEOUT} s waiting for the batch of step 7 (run.step_timeout)" in err
    assert "in stalled_fetch" in err.partition("stacks:")[2]  # the stacks say where
