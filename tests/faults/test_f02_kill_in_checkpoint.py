"""F02: kill -9 at 50 random offsets inside a checkpoint write. The newest valid one loads each time; leftovers are removed.

The killed process runs the trainer's own Writer: this file as a program, which imports torch once and forks for each kill.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from runtime.checkpoint import Writer, latest_valid

ROOT = Path(__file__).parents[2]
HEADER = ("seed: 0\n", {"samples": 1, "shards": 1, "sha256": ""}, {"world size": "1"})  # config, data, environment
KEEP = 2


def write_one_after_another(folder: Path) -> None:
    """For each step read from stdin: fork a process that saves a state filled with that number, and waits to be killed."""
    torch.set_num_threads(1)
    model = nn.Sequential(*(nn.Linear(128, 128) for _ in range(48)))
    adamw = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 128)).sum().backward()
    adamw.step()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            for t in [*model.parameters(), *(t for s in adamw.state.values() for t in s.values())]:
                t.detach().fill_(int(line))
            writer = Writer(folder, KEEP, *HEADER)
            writer.save(int(line), model, adamw)
            writer.finish()
            signal.pause()
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


@pytest.fixture(scope="module")
def kill(tmp_path_factory):
    """kill(step, offset): a process writes that step's file, and is killed after so many bytes of it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    words = [sys.executable, "-m", "tests.faults.test_f02_kill_in_checkpoint", str(folder)]
    child = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin
    assert child.stdout

    def kill(step: int, offset: float) -> int:
        """Returns its exit code. An offset beyond the file's end kills it once the file has its final name."""
        final = folder / f"checkpoint-{step:08d}.safetensors"
        temporary = folder / f".{final.name}.tmp"
        child.stdin.write(f"{step}\n")
        child.stdin.flush()
        pid = int(child.stdout.readline())
        until = time.monotonic() + 30
        while not final.exists() and time.monotonic() < until:
            try:
                if temporary.stat().st_size > offset:
                    break
            except FileNotFoundError:
                continue
        os.kill(pid, signal.SIGKILL)
        return int(child.stdout.readline())

    kill.folder = folder
    kill.steps = iter(range(1, 1000))
    first = next(kill.steps)
    assert kill(first, float("inf")) == -signal.SIGKILL  # the checkpoint before the first kill
    kill.size = (folder / f"checkpoint-{first:08d}.safetensors").stat().st_size
    yield kill
    child.stdin.close()
    child.wait(timeout=30)


@pytest.mark.fault("F02")
@pytest.mark.parametrize("seed", [pytest.param(n, marks=pytest.mark.fast if n < 6 else ()) for n in range(50)])
def test_the_newest_valid_checkpoint_loads(kill, seed, capsys):
    before = latest_valid(kill.folder)
    assert before
    step = next(kill.steps)
    offset = np.random.default_rng(seed).uniform(-0.05, 1.05) * kill.size
    assert kill(step, offset) == -signal.SIGKILL

    left = list(kill.folder.glob(".*"))
    found = latest_valid(kill.folder)
    assert found
    assert found.step == (before.step if left else step)  # the one being written, or the previous one
    assert all((t == found.step).all() for t in found.tensors().values())
    assert "skipped" not in capsys.readouterr().out  # no partial file ever has a checkpoint's name

    Writer(kill.folder, KEEP, *HEADER)  # as a restart of the same command does
    assert list(kill.folder.glob(".*")) == []
    assert len(list(kill.folder.iterdir())) <= KEEP + 1  # one may have been killed before it pruned the oldest


def test_kills_reach_inside(kill):
    """Checks the fixture: of 20 kills at half the file, at least one leaves a partial file. A single kill may be late, after
    the last byte or the rename: the kernel does not say when it delivers a signal."""
    for _ in range(20):
        kill(next(kill.steps), kill.size / 2)
        sizes = [left.stat().st_size for left in kill.folder.glob(".*")]
        Writer(kill.folder, KEEP, *HEADER)
        if any(kill.size / 2 < size < kill.size for size in sizes):
            return
    pytest.fail("none of 20 kills was inside the write")


if __name__ == "__main__":
    write_one_after_another(Path(sys.argv[1]))
