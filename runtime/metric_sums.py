"""What happened since the last row of metrics: summed on the device step by step, read all at once."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime import distributed
from runtime.distributed import DistributedContext


@dataclass
class Seen:
    """The steps since the last reading, of all processes together."""

    steps: int
    seconds: float
    means: dict[str, float]  # of the steps that were applied
    skipped: int  # steps that were not finite
    not_finite_in_a_row: int  # of them, those at the end
    stop: bool  # whether any process was asked to stop
    damaged: int  # damaged samples of one epoch
    waits: list[float]  # seconds of data wait of each process

    def metrics(self, images: int, lr: float, processes: DistributedContext, flops: int | None) -> dict[str, float]:
        """A row of metrics. images: of a step; flops: of one image, None where they were not counted."""
        speed = self.steps * images / self.seconds
        row = self.means | {
            "lr": float(lr),
            "images_per_second": speed,
            "data_wait_percent": 100 * sum(self.waits) / len(self.waits) / self.seconds,
            "peak_memory_mb": distributed.peak_memory(processes.device),
        }
        if processes.world > 1:
            row["slowest_data_wait_percent"] = 100 * max(self.waits) / self.seconds
        if self.skipped:
            row["skipped_steps"] = self.skipped
        return row | processes.arithmetic(flops, speed)


class MetricSums:
    """Sums over steps. start: steps done before."""

    def __init__(self, start: int):
        self._since, self._begun = start, time.perf_counter()
        self._sums: dict[str, Tensor] = {}
        self._skipped: Tensor | None = None  # [2]: since the last reading, in a row

    def add(self, metrics: dict[str, Tensor]) -> None:
        """A step's metrics, as `train_step` returns them. The host waits for nothing."""
        applied = metrics.pop("step_applied")
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0) + torch.where(applied > 0, value, 0)
        if self._skipped is None:
            self._skipped = torch.zeros(2, device=applied.device)
        self._skipped = (self._skipped + 1 - applied) * torch.stack([torch.ones_like(applied), 1 - applied])

    def read(self, processes: DistributedContext, stopping: bool, damaged: int, waited: float, done: int) -> Seen:
        """All processes read together, in one reduction. stopping, damaged, waited: this process's; done: steps."""
        assert self._skipped is not None
        steps, waits = done - self._since, [0.0] * processes.world
        waits[processes.rank] = waited * processes.world
        own = torch.tensor([float(stopping), float(damaged), *waits], device=processes.device)
        means = torch.stack([total / (steps - self._skipped[0]) for total in self._sums.values()])
        read = processes.mean([own, means, self._skipped.to(means.dtype)])
        (stop, damage, *waits), values, (skipped, in_a_row) = (t.tolist() for t in read)
        now = time.perf_counter()
        seen = Seen(
            steps, now - self._begun, dict(zip(self._sums, values, strict=True)), int(skipped), int(in_a_row),
            stop > 0, round(damage * processes.world), waits,
        )  # fmt: skip
        self._sums, self._since, self._begun = {}, done, now
        self._skipped[0] = 0
        return seen

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not counted."""
        begun = time.perf_counter()
        yield
        self._begun += time.perf_counter() - begun
