"""What a run logs while it trains: metrics, corrupt samples, samples seen; and the checks that end a run that went wrong."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor

from runtime.config import Config, dump_run_config
from runtime.distributed import DistributedContext, precision_note
from runtime.errors import RunError, UserError
from runtime.files import write_atomic
from runtime.loggers import Loggers
from runtime.metric_sums import Interval, MetricSums
from runtime.metrics import IMAGES_OF, MetricLogger, append_jsonl, command_line, read_jsonl, versions
from runtime.summary import describe


class RunLog:
    """The log of a run. Every process has one; process 0 writes the run's own files and the screen.

    shards, plan: the pipeline's Shards and Plan. steps: of the whole run. start: steps done before; what the files of the
    folder say of later steps is removed. flops: of one image, None if they were not counted.
    """

    metric_sums: MetricSums

    def __init__(
        self, folder: Path, config: Config, shards: Any, plan: Any, steps: int, start: int, context: DistributedContext,
        flops: int | None,
    ):  # fmt: skip
        self.folder, self.config, self.plan, self.start = folder, config, plan, start
        self.context, self.flops, self.notes = context, flops, list[str]()
        self.names = shards.names if len(shards.parts) > 1 else []
        rows = read_jsonl(folder / "metrics.jsonl") if context.is_main else []
        self.samples = CorruptSamples(folder, shards, plan, start, context.rank)
        self.logger: MetricLogger | None = None
        if context.is_main:
            last, kept = max((row["step"] for row in rows), default=0), [row for row in rows if row["step"] <= start]
            loggers = Loggers(folder, config, start, last, kept)
            self.notes = loggers.notes
            self.logger = MetricLogger(folder, steps, plan.steps_per_epoch, start, config.head.prototypes, loggers)
            write_atomic(folder / "config.yaml", dump_run_config(config))
            row = {"step": start, "command": command_line(), **versions(), **_sources(shards, plan)}
            append_jsonl(folder / "versions.jsonl", row)

    def start_steps(self, checkpoint: Path | None, messages: list[str], compiled: str = "") -> None:
        """Print what is trained, on what, and the messages that are not empty; start the clock of the first step.

        checkpoint: the one from which the run resumes. compiled: what `compile_parts` says; it stays on the live screen
        until the first step is done.
        """
        context = self.context
        self.log(describe(self.config, self.plan, context.world_size, str(context.device), str(context.dtype)))
        self.log(f"resumed at step {self.start} from {checkpoint}" if checkpoint else f"a new run in {self.folder}")
        for message in [*messages, *self.notes, compiled, precision_note(context, self.config.speed.precision)]:
            if message:
                self.log(message)
        if self.logger:
            self.logger.begin(compiled)
        self.metric_sums = MetricSums(self.start)

    def log(self, message: str) -> None:
        """Print a message, on process 0 only."""
        if self.logger:
            self.logger.log(message)

    def add(self, step: int, ids: Any, metrics: dict[str, Tensor]) -> None:
        """Add a step: its samples (int64 [B] on any device) and its metrics, as `train_step` returns them. The host does not
        wait for the device."""
        self.metric_sums.add(metrics)
        if self.logger and step == self.start:
            self.logger.first_step_done()
        if self.config.run.log_samples:
            self.samples.add_seen(step, ids)

    def flush(self, corrupt: list[tuple[int, int, int]]) -> None:
        """Write the samples of the steps so far. corrupt: see `CorruptSamples.flush_logs`."""
        self.samples.flush_logs(corrupt)

    def read(
        self, done: int, stop: bool, corrupt: list[tuple[int, int, int]], data_wait: float, forward: float
    ) -> Interval:  # fmt: skip
        """The steps since the last reading, up to `done`, of all processes together: here the host waits for the device.

        stop: whether this process received a stop signal. corrupt: see `CorruptSamples.flush_logs`. data_wait, forward:
        seconds (`Loader.waited`, `ForwardTime.read`).
        """
        self.flush(corrupt)
        return self.metric_sums.read(self.context, stop, self.samples.most(), data_wait, forward, done)

    def write(self, done: int, interval: Interval, lr: float, extra: dict[str, float]) -> None:
        """Write a row of metrics after `done` steps.

        Raises RunError after run.max_nonfinite_steps in a row, UserError if more than data.max_corrupt of the samples of an
        epoch are corrupt.
        """
        row = interval.row(self.config.optim.global_batch_size, lr, self.context, self.flops) | extra
        row |= {f"{IMAGES_OF}{name}": n for name, n in zip(self.names, self.plan.images_before(done), strict=False)}
        if self.logger:
            self.logger.write(done, row)
        if interval.nonfinite_in_a_row >= self.config.run.max_nonfinite_steps:
            raise self._nonfinite(done, interval.nonfinite_in_a_row)
        self.samples.check(interval.corrupt, self.config.data.max_corrupt)

    def write_measured(self, step: int, values: dict[str, float]) -> None:
        """Write a row of measures of the weights after `step` steps, which were made a while ago."""
        if self.logger:
            self.logger.write_measured(step, values)

    def close(self) -> None:
        if self.logger:
            self.logger.close()

    def _nonfinite(self, done: int, in_a_row: int) -> RunError:
        """Write replay.json: the steps that were not finite, up to `done`, and their samples."""
        steps = range(done - in_a_row, done)
        if self.context.is_main:
            ids = {i: self.plan.samples_of(i).tolist() for i in steps}
            replay = {"steps": list(steps), "ids": ids, "config": dump_run_config(self.config)}
            write_atomic(self.folder / "replay.json", json.dumps(replay, indent=1) + "\n")
        return RunError(
            f"loss or gradient was not finite for {in_a_row} steps in a row, up to step {done - 1} "
            f"(run.max_nonfinite_steps: {self.config.run.max_nonfinite_steps}); no weight has changed since, the last "
            f"checkpoint is kept; {self.folder}/replay.json lists the steps and their samples"
        )


def _sources(shards: Any, plan: Any) -> dict[str, list[dict[str, Any]]]:
    """What versions.jsonl says of the sources of a mixture; nothing of one source."""
    if len(shards.parts) == 1:
        return {}
    rows = zip(shards.names, shards.parts, plan.orders, plan.quotas, strict=True)
    return {
        "sources": [
            {"name": name, "folder": str(part.folder), "samples": order.samples, "share": quota / sum(plan.quotas)}
            for name, part, order, quota in rows
        ]
    }


class CorruptSamples:
    """Counts corrupt samples by epoch, and writes damaged.jsonl and samples.jsonl (process r: damaged-r.jsonl,
    samples-r.jsonl).

    Counted are this process's samples; process 0 also counts those of all processes before `start`.
    """

    def __init__(self, folder: Path, shards: Any, plan: Any, start: int, rank: int):
        self.folder, self.shards, self.plan = folder, shards, plan
        self._suffix = f"-{rank}" if rank else ""
        self._by_epoch: Counter[int] = Counter()
        self._seen: list[tuple[int, Any]] = []
        for row in truncate_logs(folder, start) if rank == 0 else ():
            self._count(row["step"], row["planned"])

    def add_seen(self, step: int, ids: Any) -> None:
        """The samples of a step, int64 [B] on any device; `flush_logs` writes them."""
        self._seen.append((step, ids))

    def flush_logs(self, corrupt: list[tuple[int, int, int]]) -> None:
        """Write the samples seen, and the corrupt ones: (step, planned sample, sample read instead) each."""
        for step, planned, read in corrupt:
            row = {"step": step, "planned": planned, "read": read, **self.shards.describe(planned)}
            append_jsonl(self.folder / f"damaged{self._suffix}.jsonl", row)
            self._count(step, planned)
        for step, ids in self._seen:
            append_jsonl(self.folder / f"samples{self._suffix}.jsonl", {"step": step, "samples": ids.tolist()})
        self._seen.clear()

    def most(self) -> int:
        """Corrupt samples of the epoch that has the most."""
        return max(self._by_epoch.values(), default=0)

    def check(self, corrupt: int, allowed: float) -> None:
        """Raise UserError if this many samples, of all processes, are more than a share `allowed` of an epoch, rounded up:
        one damaged photo does not stop the training of a small set."""
        if corrupt > math.ceil(allowed * self.plan.samples):
            raise UserError(
                f"{corrupt} of {self.plan.samples} samples are damaged in one epoch, more than data.max_corrupt: "
                f"{allowed:g}; {self.folder}/damaged.jsonl lists them; make these shards again, or train without them: "
                f"data.max_corrupt={math.ceil(1000 * corrupt / self.plan.samples) / 1000:g}"
            )

    def _count(self, step: int, planned: int) -> None:
        # samples of missing shards count against data.max_missing instead
        self._by_epoch[self.plan.epoch(step)] += not self.shards.is_lost(planned)


def truncate_logs(folder: Path, start: int) -> list[dict[str, Any]]:
    """Remove rows of steps from `start` on from a run's logs: these steps are made again.

    Returns the rows of damaged.jsonl (of all processes) that are kept.
    """
    _truncate(folder / "metrics.jsonl", start + 1)  # its rows count steps done
    for path in folder.glob("samples*.jsonl"):
        _truncate(path, start)
    return [row for path in folder.glob("damaged*.jsonl") for row in _truncate(path, start)]


def _truncate(path: Path, end: int) -> list[dict[str, Any]]:
    rows = read_jsonl(path)
    kept = [row for row in rows if row["step"] < end]
    if path.is_file() and (len(kept) < len(rows) or not path.read_bytes().endswith(b"\n")):
        write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))
    return kept
