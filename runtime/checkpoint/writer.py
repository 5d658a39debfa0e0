"""Checkpoints written in the background while the run trains."""

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.checkpoint.format import FORMAT, list_checkpoints, open_checkpoint, save_tensors, training_state
from runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn, optim


class HostCopies:
    """Copies of a state in host memory, made while the device waits and read while it computes. The memory is used again by
    the next copy: new pages, or pinned ones, cost more than the copy itself."""

    def __init__(self) -> None:
        self._copies: dict[str, Tensor] = {}

    def __call__(self, state: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        import torch

        for name, t in state.items():
            if name not in self._copies:
                self._copies[name] = torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda)
            self._copies[name].copy_(t, non_blocking=True)
        if any(t.is_cuda for t in state.values()):
            torch.cuda.current_stream().synchronize()
        return {name: self._copies[name] for name in state}


class Writer:
    """Writes a run's checkpoints in the background. Only process 0 has one.

    `save` copies the state off the device, which is all that a step waits for; a thread writes it. There is one write at a
    time: the next `save` waits for the previous one. The error of a write is raised by the next call: a UserError with the
    path, the bytes needed and the bytes free. Older checkpoints are kept.

    folder: of the checkpoints. keep: how many valid ones to keep. config, data, environment: see `Checkpoint`.
    Raises UserError if the folder cannot be written to.
    """

    def __init__(self, folder: Path, keep: int, config: str, data: dict[str, Any], environment: dict[str, str]):
        self.folder, self.keep = folder, keep
        self._header = {"config": config, "data": json.dumps(data), "environment": json.dumps(environment)}
        self._copies = HostCopies()
        self._valid: set[Path] = set()  # written by this process, or read and found valid
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(".checkpoint-*.tmp"):  # of a process that was killed during a write
                leftover.unlink()
            probe = folder / ".checkpoint-probe.tmp"  # fail now, not after the first thousand steps
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"{folder}: no checkpoint can be written ({error.strerror})") from None
        if len(list_checkpoints(folder)) > keep:  # killed before it pruned
            self._prune()

    def save(self, step: int, model: "nn.Module", adamw: "optim.Optimizer") -> None:
        """Copy the state after `step` steps, and write it while the next steps run."""
        self.finish()
        copies = self._copies(training_state(model, adamw))
        self._thread = threading.Thread(target=self._write, args=(step, copies), name="checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raise the error of the last write, if there was one."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Wait for the last write to end."""
        if self._thread:
            self._thread.join()

    def finish(self) -> None:
        """`wait`, then `check`: afterward the last checkpoint is on the disk."""
        self.wait()
        self.check()

    def _write(self, step: int, state: "dict[str, Tensor]") -> None:
        path = self.folder / f"checkpoint-{step:08d}.safetensors"
        try:
            for name, t in state.items():
                if t.is_floating_point() and not np.isfinite(t.numpy()).all():
                    raise UserError(
                        f"'{name}' is not finite at step {step}: no checkpoint is written, the previous one is kept"
                    )
            try:
                save_tensors(path, state, {"format": str(FORMAT), "step": str(step)} | self._header)
            except UserError as error:
                newest = next(iter(list_checkpoints(self.folder)), None)
                kept = f"{newest.name} is kept" if newest else "there is no checkpoint yet"
                raise UserError(f"{error}; {kept}") from None
            self._valid.add(path)
            self._prune()
        except BaseException as error:  # raised in the training thread by `check`
            self._error = error

    def _prune(self) -> None:
        """Remove what is older than the newest `keep` valid checkpoints: a corrupt one does not displace a valid one."""
        valid = 0
        for path in list_checkpoints(self.folder):
            if valid == self.keep:
                path.unlink(missing_ok=True)
            elif path in self._valid or _is_valid(path):
                self._valid.add(path)
                valid += 1


def _is_valid(path: Path) -> bool:
    try:
        open_checkpoint(path)
    except UserError:
        return False
    return True
