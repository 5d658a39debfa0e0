"""The real program, alone or under torchrun: started, followed, with faults injected, and inspected at the end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from pipeline.loader import choose_reader
from runtime.checkpoint import latest_valid
from runtime.errors import UserError
from runtime.metrics import read_jsonl
from tests.conftest import ROOT
from tests.fork_server import Forked

IMPORT_SECONDS = 2.7  # of torch on two Zen 3 cores, otherwise idle: median of five (2.3 to 3.2), 2026-11-29


def slowness() -> float:
    """How many times slower this machine is now than that of the promises, at least 1: by a known piece of work."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return max(1.0, (time.monotonic() - began) / IMPORT_SECONDS)


WITH_FAULT = """
import json, os, sys, time
sys.path.insert(0, {root!r})
import train
from model.methods.densedino import DenseDINO

rank, restarts = int(os.environ.get("RANK", 0)), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
original = DenseDINO.forward

def forward(self, batch, at):
    out = original(self, batch, at)
    log, means, step = {{"loss": out.loss, **out.metrics}}, out.statistics, batch.step
    {fault}
    out.loss = log.pop("loss")
    out.metrics = log
    return out

DenseDINO.forward = forward
{setup}
if __name__ == "__main__":  # data workers import this file
    train.run_cli(train.main)
"""


def with_fault(folder: Path, fault: str = "pass", setup: str = "") -> Path:
    """A script that is train.py with a fault: a line at the end of every forward pass, which sees step, rank, restarts,
    self, batch, log and means. setup: lines that run before training starts."""
    path = folder / "train_with_fault.py"
    path.write_text(WITH_FAULT.format(root=str(ROOT), fault=fault, setup=setup))
    return path


class Program:
    """train.py (or `script`) with a config and overrides, in `processes` processes, started at once.

    It logs every step and its samples, so that a run can be followed and compared step by step.
    """

    def __init__(self, config: Path, *words: object, processes: int = 1, script: Path | str = "train.py", options=()):
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            launcher += ["--monitor-interval=0.1", *options]
        fixed = ["run.log_every=1", "run.log_samples=true"]
        self.command = [*launcher, str(script), str(config), *fixed, *(str(word) for word in words)]
        self.folder = Path(next(w for w in map(str, words) if w.startswith("run.folder=")).removeprefix("run.folder="))
        self.begun = time.monotonic()
        self.process = Forked(self.command[1:], env=os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})

    def reach(self, step: int, limit: float = 120) -> None:
        """Wait until so many steps are logged."""
        until = time.monotonic() + limit
        while steps(self.folder) < step:
            if self.process.poll() is not None or time.monotonic() > until:
                out, err = self.process.communicate() if self.process.poll() is not None else ("", "too slow")
                raise AssertionError(f"the run did not reach step {step}\n{out}\n{err}")
            time.sleep(0.002)

    def end(self, limit: float = 120) -> tuple[int, str, str]:
        """Wait for it to exit: (exit code, stdout, stderr). AssertionError if it does not within `limit` seconds."""
        try:
            out, err = self.process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            self.kill()
            out, err = self.process.communicate()
            raise AssertionError(f"still running after {limit} s\n{out}\n{err}") from None
        return self.process.returncode, out, err

    def family(self) -> dict[int, str]:
        """{pid: its rank, or "" if it has none} of its process tree (Linux)."""
        parents = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
        found = {self.process.pid: ""}
        grown = True
        while grown:
            new = {pid: _rank(pid) for pid, parent in parents.items() if parent in found and pid not in found}
            grown = bool(new)
            found |= new
        return found

    def trainer(self, rank: int) -> int:
        """The pid of the trainer of this rank."""
        family = self.family()
        ranked = [pid for pid, r in family.items() if r == str(rank)]
        return min(ranked) if ranked else self.process.pid

    def data_workers(self) -> list[int]:
        """The pids of its data workers, whichever process forked them."""
        return [pid for pid in self.family() if _is_data_worker(pid)]

    def kill(self) -> None:
        """kill -9 of the whole process tree."""
        for pid in self.family():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def has_dali() -> bool:
    try:
        return choose_reader("dali", torch.device("cpu"))[0] == "dali"
    except UserError:
        return False


def gone(pids) -> bool:
    """Whether all these processes exit within ten seconds."""
    until = time.monotonic() + 10
    while any(_alive(pid) for pid in pids):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _rank(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return ""
    return next((w.removeprefix(b"RANK=").decode() for w in words if w.startswith(b"RANK=")), "")


def _is_data_worker(pid: int) -> bool:
    """Forked by the fork server (WebDataset) or spawned (DALI)."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
        parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
        server = b"forkserver" in words and b"forkserver" in Path(f"/proc/{parent}/cmdline").read_bytes()
        return server or b"spawn_main" in words
    except OSError:
        return False


def steps(folder: Path) -> int:
    """The last step in a run's log."""
    rows = read_jsonl(folder / "metrics.jsonl")
    return rows[-1]["step"] if rows else 0


def log(folder: Path) -> dict[str, list]:
    """What must be equal after an interruption: samples and losses, step by step."""
    names = ("step", "loss", "cls_loss", "reference_loss", "teacher_entropy", "gradient_norm", "lr")
    losses = {"losses": [[row.get(n) for n in names] for row in read_jsonl(folder / "metrics.jsonl")]}
    return losses | {path.name: read_jsonl(path) for path in sorted(folder.glob("samples*.jsonl"))}


def final(folder: Path) -> dict[str, Tensor]:
    """All state of the newest checkpoint."""
    found = latest_valid(folder / "checkpoints")
    assert found
    return found.tensors()


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all((a[n] == b[n]).all() for n in a)
