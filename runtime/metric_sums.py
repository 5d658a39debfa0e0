"""Metrics between two rows of the log: summed on the device step by step, read in one reduction."""

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime import distributed
from runtime.distributed import DistributedContext


@dataclass
class Interval:
    """The steps since the last reading, of all processes together."""

    steps: int
    seconds: float
    means: dict[str, float]  # over the steps that were applied
    skipped: int  # steps that were not finite
    nonfinite_in_a_row: int  # of them, those at the end
    stop: bool  # whether any process received a stop signal
    corrupt: int  # corrupt samples of one epoch
    data_waits: list[float]  # seconds of each process
    forwards: list[float]  # the same of its forward passes

    def row(self, batch_size: int, lr: float, context: DistributedContext, flops: int | None) -> dict[str, float]:
        """A row of metrics. batch_size: of all processes; flops: of one image, None if they were not counted."""
        images_per_second = self.steps * batch_size / self.seconds
        row = self.means | {
            "lr": float(lr),
            "images_per_second": images_per_second,
            "data_wait_percent": 100 * sum(self.data_waits) / len(self.data_waits) / self.seconds,
            "peak_memory_mb": distributed.peak_memory(context.device),
        }
        if context.world_size > 1:
            row["slowest_data_wait_percent"] = 100 * max(self.data_waits) / self.seconds
            # what a process needs before it can wait for others; the lower median: of two processes, the faster one
            own = [wait + forward for wait, forward in zip(self.data_waits, self.forwards, strict=True)]
            if (typical := statistics.median_low(own)) > 0:
                row["slowest_rank"] = own.index(max(own))
                row["slowest_rank_percent"] = 100 * (max(own) / typical - 1)
        if self.skipped:
            row["skipped_steps"] = self.skipped
        return row | context.throughput_metrics(flops, images_per_second)


class MetricSums:
    """Sums over steps. start: steps done before."""

    def __init__(self, start: int):
        self._last_log_step, self._last_log_time = start, time.perf_counter()
        self._sums: dict[str, Tensor] = {}
        self._skipped: Tensor | None = None  # [2]: since the last reading, in a row

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Add a step's metrics, as `train_step` returns them. The host does not wait for the device."""
        applied = metrics.pop("step_applied")
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0) + torch.where(applied > 0, value, 0)
        if self._skipped is None:
            self._skipped = torch.zeros(2, device=applied.device)
        self._skipped = (self._skipped + 1 - applied) * torch.stack([torch.ones_like(applied), 1 - applied])

    def read(
        self, context: DistributedContext, stop: bool, corrupt: int, data_wait: float, forward: float, done: int
    ) -> Interval:  # fmt: skip
        """Read and reset, all processes together. stop, corrupt, data_wait, forward: this process's; done: steps."""
        assert self._skipped is not None
        world_size = context.world_size
        steps = done - self._last_log_step
        times = [0.0] * 2 * world_size  # the data wait of each process, then its forward
        times[context.rank], times[world_size + context.rank] = data_wait * world_size, forward * world_size
        own = torch.tensor([float(stop), float(corrupt), *times], device=context.device)
        means = torch.stack([total / (steps - self._skipped[0]) for total in self._sums.values()])
        reduced = context.all_reduce_mean([own, means, self._skipped.to(means.dtype)])
        (stops, corrupts, *times), values, (skipped, in_a_row) = (t.tolist() for t in reduced)
        now = time.perf_counter()
        interval = Interval(
            steps, now - self._last_log_time, dict(zip(self._sums, values, strict=True)), int(skipped), int(in_a_row),
            stops > 0, round(corrupts * world_size), times[:world_size], times[world_size:],
        )  # fmt: skip
        self._sums, self._last_log_step, self._last_log_time = {}, done, now
        self._skipped[0] = 0
        return interval

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside the block is not counted."""
        begun = time.perf_counter()
        yield
        self._last_log_time += time.perf_counter() - begun
