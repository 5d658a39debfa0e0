"""F10: one of two processes is killed, raises, or exits with code 0. The job ends within ten seconds and names it; with
`--max-restarts=1` torchrun resumes from the newest checkpoint, and the result is that of an undisturbed run."""

import time

import pytest

from tests.faults.program import Program, equal, final, gone, log, slowness, with_fault

pytestmark = pytest.mark.fault("F10")

DEATHS = {  # what process 1 does at step 12; what stderr has
    "killed": ("os.kill(os.getpid(), 9)", ("Signal 9 (SIGKILL)", "rank      : 1")),
    "raises": ('raise ValueError("something broke")', ("ValueError: something broke", "rank      : 1")),
    "exits": ("os._exit(0)", ("error: process 1 is silent or gone, last heard of", "Connection")),
}


@pytest.mark.parametrize("kind", DEATHS)
def test_a_process_dies(tiny_config, tmp_path, kind):
    death, messages = DEATHS[kind]
    at = tmp_path / "died"  # written just before
    fault = f"if step == 12 and rank == 1 and restarts == 0: open({str(at)!r}, 'w').close(); {death}"
    script = with_fault(tmp_path, fault)

    program = Program(tiny_config, f"run.folder={tmp_path / 'run'}", processes=2, script=script)
    program.reach(5)
    family = program.family()
    code, out, err = program.end()
    seconds = time.time() - at.stat().st_mtime
    assert code == 1
    assert seconds < 10 * slowness()
    assert all(message in err for message in messages), err
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
