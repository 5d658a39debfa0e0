"""F03: a full disk, a limit on file sizes, a folder that becomes read-only, during a run that already has a checkpoint.

The run ends with a message and exit code 2, the older checkpoint is kept, and the same command resumes once there is space.
"""

import os
import re
import resource
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from conftest import run_program

from runtime.checkpoint import latest_valid
from tests.fork_server import Forked

EVERY = 20  # steps: writing takes a small part of the time between two checkpoints
STATE = "head.prototypes=6000"  # 3.4 MB
WORDS = (STATE, "optim.epochs=2000", "optim.warmup_epochs=0", f"run.checkpoint_every={EVERY}", "run.log_every=1")


def mount(folder: Path, *options: str) -> None:
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no mount here: {done.stderr.strip()}")


def saved(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*.safetensors"))


class Run:
    """A running train.py that has just written its first checkpoint."""

    def __init__(self, config: Path, folder: Path):
        self.checkpoints = folder / "checkpoints"
        self.process = Forked(["train.py", str(config), f"run.folder={folder}", *WORDS])
        until = time.monotonic() + 120
        while not saved(self.checkpoints) and self.process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        assert saved(self.checkpoints), self.process.communicate()

    def error(self) -> str:
        """Wait for it to fail: its message about the checkpoint that it could not write. The previous one is valid."""
        try:
            _, stderr = self.process.communicate(timeout=120)
        finally:
            self.process.kill()
        assert self.process.returncode == 2
        assert "Traceback" not in stderr
        assert not list(self.checkpoints.glob(".*"))
        found = latest_valid(self.checkpoints)
        assert found
        step = found.step
        assert step >= EVERY
        assert f"error: {self.checkpoints}/checkpoint-{step + EVERY:08d}.safetensors: not written: " in stderr
        needed = re.search(r"; ([\d,]+) bytes needed, ([\d,]+) free; (checkpoint-\d+\.safetensors) is kept", stderr)
        assert needed, stderr
        assert needed[3] == found.path.name
        assert abs(int(needed[1].replace(",", "")) - found.path.stat().st_size) < 100
        self.free, self.step = int(needed[2].replace(",", "")), step
        return stderr


@pytest.mark.fault("F03")
def test_a_full_disk(tiny_config, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount(disk, "-t", "tmpfs", "-o", "size=64m", "tmpfs")
    try:
        run = Run(tiny_config, disk / "run")
        with open(disk / "ballast", "wb") as ballast:  # leaves two megabytes, so that metrics can be written
            os.posix_fallocate(ballast.fileno(), 0, shutil.disk_usage(disk).free - 2_000_000)
        assert "not written: No space left on device" in run.error()
        assert run.free < 3_400_000
        (disk / "ballast").unlink()
        last = [f"optim.epochs={run.step / 5 + 0.4}", "--allow-change=optim.epochs"]  # two steps more
        stdout = run_program("train.py", tiny_config, f"run.folder={disk / 'run'}", *WORDS, *last).stdout
        assert f"resumed at step {run.step} from" in stdout
        assert f"finished: {run.step + 2} steps" in stdout
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=False)


@pytest.mark.fault("F03")
def test_a_limit_on_file_sizes(tiny_config, tmp_path):
    run = Run(tiny_config, tmp_path / "run")
    limit = 1_000_000
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    assert "not written: File too large (ulimit -f)" in run.error()


@pytest.mark.fault("F03")
def test_a_folder_becomes_read_only(tiny_config, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    mount(checkpoints, "-t", "tmpfs", "-o", "size=64m", "tmpfs")
    try:
        run = Run(tiny_config, tmp_path / "run")
        while subprocess.run(
            ["mount", "-o", "remount,ro", str(checkpoints)], capture_output=True, check=False
        ).returncode:
            assert run.process.poll() is None  # busy: a checkpoint is being written
        assert "not written: Read-only file system" in run.error()
        # a folder that is read-only from the start is reported before anything is computed
        stderr = run_program("train.py", tiny_config, f"run.folder={tmp_path / 'run'}", *WORDS, expect=2).stderr
        assert stderr == f"error: {checkpoints}: no checkpoint can be written (Read-only file system)\n"
    finally:
        subprocess.run(["umount", "--lazy", str(checkpoints)], check=False)
