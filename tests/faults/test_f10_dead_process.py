"""F10: one of two processes is killed, raises, or leaves with code 0. The job is down within ten seconds and names it; with
`--max-restarts=1` torchrun begins again at the newest checkpoint, and the end is that of a run left alone."""

import time

import pytest

from tests.faults.program import Program, equal, final, gone, hurt, log

pytestmark = pytest.mark.fault("F10")

DEATHS = {  # what process 1 does at step 12; what is told of it
    "killed": ("os.kill(os.getpid(), 9)", ("Signal 9 (SIGKILL)", "rank      : 1")),
    "raises": ('raise ValueError("something broke")', ("ValueError: something broke", "rank      : 1")),
    "leaves": ("os._exit(0)", ("error: process 1 is silent or gone, last heard of", "Connection")),
}


@pytest.mark.parametrize("how", DEATHS)
def test_a_process_dies(tiny_config, tmp_path, how):
    death, told = DEATHS[how]
    at = tmp_path / "died"  # written just before
    what = f"if step == 12 and rank == 1 and restarts == 0: open({str(at)!r}, 'w').close(); {death}"
    script = hurt(tmp_path, what)

    program = Program(tiny_config, f"run.folder={tmp_path / 'run'}", processes=2, script=script)
    program.reach(5)
    family = program.family()
    code, out, err = program.end()
    down = time.time() - at.stat().st_mtime
    assert code == 1
    assert down < 10
    assert all(words in err for words in told), err
    assert gone(family)

    words = ["run.checkpoint_every=5", "run.keep_checkpoints=9"]
    restarted, whole = tmp_path / "restarted", tmp_path / "whole"
    code, out, err = Program(
        tiny_config, *words, f"run.folder={restarted}", processes=2, script=script, options=["--max-restarts=1"]
    ).end()
    assert code == 0, err
    assert "resumed at step 10" in out
    code, _, err = Program(tiny_config, *words, f"run.folder={whole}", processes=2).end()
    assert code == 0, err
    assert log(restarted) == log(whole)
    assert equal(final(restarted), final(whole))
