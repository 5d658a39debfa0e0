"""F36: many processes. Another number of processes at each resume, a run folder that only process 0 can see, a slow network,
a cut one, a slow process. The samples of every step stay those of the plan; messages and logs name who is at fault."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from runtime.checkpoint import latest_valid
from runtime.metrics import read_jsonl
from tests.conftest import ROOT, run_program
from tests.faults.program import Program, equal, final, log, steps
from tests.machines import two_machines

pytestmark = pytest.mark.fault("F36")

BATCH = "optim.global_batch_size=12"  # of 4 processes, and of 3


def samples(folder: Path) -> dict[int, list[list[int]]]:
    """The samples of each process by step, in order of rank."""
    found: dict[int, list[list[int]]] = {}
    for rank in range(4):
        for row in read_jsonl(folder / f"samples{f'-{rank}' if rank else ''}.jsonl"):
            found.setdefault(row["step"], []).append(row["samples"])
    return found


def stop(program: Program, at: int) -> None:
    program.reach(at)
    os.kill(program.trainer(0), signal.SIGUSR1)
    program.end()


def test_four_three_four_processes(tiny_config, tmp_path):
    """Every sample of every step is the plan's, in its order, with 4, then 3, then 4 processes."""
    words = [BATCH, "optim.epochs=3", f"run.folder={tmp_path / 'run'}", "run.step_timeout=60"]
    stop(Program(tiny_config, *words, processes=4), at=3)
    stop(Program(tiny_config, *words, processes=3), at=steps(tmp_path / "run") + 3)
    last = Program(tiny_config, *words, processes=4)
    code, out, err = last.end()
    assert code == 0, err
    assert "world size: saved 3, current 4" in out
    whole = [BATCH, "optim.epochs=3", f"run.folder={tmp_path / 'whole'}"]
    assert Program(tiny_config, *whole).end()[0] == 0
    seen, planned = samples(tmp_path / "run"), samples(tmp_path / "whole")
    assert seen.keys() == planned.keys()
    assert {len(shares) for shares in seen.values()} == {3, 4}
    for step, shares in seen.items():
        dealt = [sample for row in zip(*shares, strict=True) for sample in row]  # dealt in turn
        assert [dealt] == planned[step], step


def test_only_process_0_sees_the_run_folder(tiny_config, tmp_path):
    """The second process has another folder, with a damaged checkpoint of another step: it resumes as process 0 does."""
    words = ["optim.epochs=3", "run.checkpoint_every=5"]
    first = Program(tiny_config, *words, f"run.folder={tmp_path / 'run'}", processes=2)
    stop(first, at=8)
    step = latest_valid(tmp_path / "run" / "checkpoints").step
    shutil.copytree(tmp_path / "run", tmp_path / "theirs")
    damaged = latest_valid(tmp_path / "theirs" / "checkpoints").path
    damaged.rename(damaged.with_name("checkpoint-00000014.safetensors")).write_bytes(b"damaged")
    theirs = tmp_path / "theirs.py"  # train.py, whose process 1 has another run.folder
    theirs.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "import train\n"
        "if os.environ['RANK'] == '1':\n    sys.argv = [word.replace('/run', '/theirs') for word in sys.argv]\n"
        "train.run_cli(train.main)\n"
    )
    code, out, err = Program(tiny_config, *words, f"run.folder={tmp_path / 'run'}", processes=2, script=theirs).end()
    assert code == 0, err
    assert f"resumed at step {step}" in out
    assert "skipped" not in out + err
    code, _, err = Program(tiny_config, *words, f"run.folder={tmp_path / 'whole'}", processes=2).end()
    assert code == 0, err
    assert equal(final(tmp_path / "run"), final(tmp_path / "whole"))


def test_an_error_is_told_once(tiny_config, tmp_path):
    """Weights that do not fit: process 0 reads them and says why; the others end without a word of their own."""
    run_program("train.py", tiny_config, "optim.epochs=1", "optim.warmup_epochs=0", f"run.folder={tmp_path / 'a'}")
    other = ["model.width=36", f"model.init={tmp_path / 'a'}", f"run.folder={tmp_path / 'b'}"]
    code, _, err = Program(tiny_config, *other, processes=2).end()
    assert code == 1  # torchrun's
    assert err.count("error: ") == 1, err
    assert "does not fit this model (model.width: 24 saved, 36 current" in err


def test_a_slow_network(tiny_config, tmp_path):
    """A delay of 10 ms and a loss of 1 % (netem), or 20 Mbit/s where the kernel has no netem: no bit of the run changes."""
    words = ["optim.epochs=1", "optim.warmup_epochs=0"]
    logged = ["run.log_every=1", "run.log_samples=true"]
    with two_machines() as machines:
        machines.slow_cable(1)
        started = machines.start(str(tiny_config), *words, *logged, f"run.folder={tmp_path / 'slow'}")
        for process in started:
            _, err = process.communicate(timeout=400)
            assert process.returncode == 0, err
    code, _, err = Program(tiny_config, *words, f"run.folder={tmp_path / 'fast'}", processes=2).end()
    assert code == 0, err
    assert log(tmp_path / "slow") == log(tmp_path / "fast")
    assert equal(final(tmp_path / "slow"), final(tmp_path / "fast"))


def test_a_cut_network(tiny_config, tmp_path):
    """The watchdog of the machine that hosts the job names the process and the machine that are gone."""
    words = [str(tiny_config), "optim.epochs=4000", "run.log_every=1", "run.step_timeout=5"]
    with two_machines() as machines:
        started = machines.start(*words, f"run.folder={tmp_path / 'run'}")
        until = time.monotonic() + 300
        while steps(tmp_path / "run") < 5 and time.monotonic() < until:
            time.sleep(0.1)
        machines.cut_cable(1)
        _, err = started[0].communicate(timeout=300)
    assert started[0].returncode == 1
    assert "process 1 on node1 is silent or gone, last heard of in step" in err
    assert "the newest checkpoint is kept" in err


def test_the_slowest_process_is_in_the_log_and_on_the_page(tiny_config, tmp_path):
    """Process 1 is stopped and continued in turns: it is the slowest rank, although all have the same images/s."""
    program = Program(tiny_config, "optim.epochs=20", f"run.folder={tmp_path / 'run'}", processes=2)
    program.reach(10)
    slow = program.trainer(1)
    ending = threading.Event()

    def hinder() -> None:
        while not ending.wait(0.004):
            for number in (signal.SIGSTOP, signal.SIGCONT):
                try:
                    os.kill(slow, number)
                except ProcessLookupError:
                    return
                time.sleep(0.02)

    thread = threading.Thread(target=hinder)
    thread.start()
    try:
        code, _, err = program.end(300)
    finally:
        ending.set()
        thread.join()
    assert code == 0, err
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")[20:]
    slowest = [row["slowest_rank"] for row in rows]
    assert slowest.count(1) > 0.6 * len(slowest)
    assert all(row["slowest_rank_percent"] >= 0 for row in rows)
    run_program("-m", "eval", "html", tmp_path / "run")
    assert "Process 1 was the slowest in" in (tmp_path / "run" / "report.html").read_text()
