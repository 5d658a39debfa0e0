"""F13: SIGTERM, SIGUSR1, Ctrl-C twice. The run saves within the grace period and exits with the signal's code; Ctrl-C twice
ends it at once, without saving. The same command resumes, with the result of an undisturbed run."""

import os
import signal
import time

import pytest

from tests.conftest import write_config
from tests.faults.program import Program, equal, final, gone, log, steps

pytestmark = pytest.mark.fault("F13")

GRACE = 25  # run.grace
STEPS = 100
LONG = ("optim.epochs=20", "run.checkpoint_every=1000")


@pytest.fixture(scope="module")
def whole(tiny_shards, tmp_path_factory):
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    config = write_config(folder / "tiny.yaml", tiny_shards, folder)
    code, _, err = Program(config, *LONG, f"run.folder={folder}").end()
    assert code == 0, err
    return folder


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_saved_and_resumed(tiny_config, tmp_path, whole, number, code):
    """One process, with the signal to the whole group, as schedulers do; two processes, with the signal to torchrun."""
    words = [*LONG, f"run.folder={tmp_path / 'run'}", "speed.workers=1"]
    program = Program(tiny_config, *words)
    program.reach(10)
    family, since = program.family(), time.monotonic()
    os.killpg(program.process.pid, number)
    ended, out, err = program.end()
    assert ended == code, err
    assert time.monotonic() - since < GRACE
    at = steps(tmp_path / "run")
    assert 10 <= at < STEPS
    assert f"stopped and saved at step {at}; the same command resumes from there" in out
    assert gone(family)
    ended, out, err = Program(tiny_config, *words).end()
    assert ended == 0, err
    assert f"resumed at step {at}" in out
    assert log(tmp_path / "run") == log(whole)
    assert equal(final(tmp_path / "run"), final(whole))

    words = [*LONG, f"run.folder={tmp_path / 'two'}"]
    signals = ["--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"]
    program = Program(tiny_config, *words, processes=2, options=signals)
    program.reach(10)
    family, since = program.family(), time.monotonic()
    program.process.send_signal(number)
    ended, out, err = program.end()
    assert ended != 0
    assert time.monotonic() - since < GRACE
    at = steps(tmp_path / "two")
    assert f"stopped and saved at step {at}; the same command resumes from there" in out, err
    assert gone(family)


@pytest.mark.fast
def test_twice_ctrl_c(tiny_config, tmp_path, whole):
    words = [*LONG, f"run.folder={tmp_path / 'run'}", "run.checkpoint_every=4", "speed.workers=1"]
    program = Program(tiny_config, *words)
    program.reach(10)
    family, since = program.family(), time.monotonic()
    os.killpg(program.process.pid, signal.SIGINT)
    time.sleep(0.01)
    os.killpg(program.process.pid, signal.SIGINT)
    ended, out, err = program.end()
    assert ended == 130
    assert time.monotonic() - since < GRACE
    assert "stopped by Ctrl-C" in err or "stopped and saved" in out
    assert "Traceback" not in err
    assert gone(family)
    ended, out, err = Program(tiny_config, *words).end()
    assert ended == 0, err
    assert "resumed at step" in out
    assert log(tmp_path / "run") == log(whole)
    assert equal(final(tmp_path / "run"), final(whole))
