"""F01: kill -9 of all processes at a random step, 20 times, then the same command again: bit-equal to an undisturbed run.

All state (weights, moments, centers), the log of samples and the losses of every step are equal. Only the steps after the
newest checkpoint are lost: one interval, and another if the disk was behind.
"""

import numpy as np
import pytest

from tests.conftest import write_config
from tests.faults.program import Program, equal, final, gone, log, steps

STEPS, EVERY = 40, 3
WORDS = ("optim.epochs=8", f"run.checkpoint_every={EVERY}")


@pytest.fixture(scope="module")
def undisturbed(tiny_shards, tmp_path_factory):
    """(config, log, state) of an undisturbed run, for a number of processes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = write_config(folder / "tiny.yaml", tiny_shards, folder / "run")
    done = {}

    def run(processes: int):
        if processes not in done:
            whole = folder / f"whole-{processes}"
            code, _, err = Program(config, *WORDS, f"run.folder={whole}", processes=processes).end()
            assert code == 0, err
            done[processes] = config, log(whole), final(whole)
        return done[processes]

    return run


@pytest.mark.fault("F01")
@pytest.mark.parametrize("seed", [pytest.param(n, marks=pytest.mark.fast if n == 0 else ()) for n in range(20)])
def test_a_killed_run_resumes_exactly(undisturbed, tmp_path, seed):
    """The last five seeds use two processes; every other seed a data worker."""
    processes = 2 if seed >= 15 else 1
    config, expected_log, expected_state = undisturbed(processes)
    words = [*WORDS, f"run.folder={tmp_path / 'run'}", f"speed.workers={seed % 2}"]
    program = Program(config, *words, processes=processes)
    program.reach(int(np.random.default_rng(seed).integers(1, STEPS - 10)))
    family = program.family()
    program.kill()
    code, _, _ = program.end()
    assert code == -9
    assert gone(family)
    reached = steps(tmp_path / "run")
    assert reached < STEPS

    code, out, err = Program(config, *words, processes=processes).end()
    assert code == 0, err
    begun = next(line for line in out.splitlines() if line.startswith(("resumed at step", "a new run")))
    at = int(begun.split()[3]) if begun.startswith("resumed") else 0
    assert at >= reached - 2 * EVERY
    assert log(tmp_path / "run") == expected_log
    assert equal(final(tmp_path / "run"), expected_state)
    seen = [i for row in log(tmp_path / "run")["samples.jsonl"] for i in row["samples"]]
    assert len(seen) == STEPS * 16 // processes
