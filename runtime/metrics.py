"""The record: the run's folder with its config, versions, git state, metrics.jsonl and TensorBoard; and the live screen."""

import json
import math
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from runtime.config import Config, dump_config
from runtime.errors import UserError

PACKAGES = (
    "torch",
    "torchvision",
    "torchcodec",
    "timm",
    "webdataset",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "numpy",
)

COLLAPSED = 5  # rows of metrics


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """One JSON object as one more line."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, none where there is no file; a line that is none (cut off where a process was
    killed) is passed over."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def truncate_logs(folder: Path, start: int) -> list[dict[str, Any]]:
    """A run's files as they stood after `start` steps: what they tell of later ones is taken back, for these are made again.

    Returns the rows of damaged.jsonl (of all processes) that stay.
    """
    _rewind(folder / "metrics.jsonl", start + 1)  # its rows count steps done
    for path in folder.glob("samples*.jsonl"):
        _rewind(path, start)
    return [row for path in folder.glob("damaged*.jsonl") for row in _rewind(path, start)]


def _rewind(path: Path, end: int) -> list[dict[str, Any]]:
    told = read_jsonl(path)
    kept = [row for row in told if row["step"] < end]
    if path.is_file() and (len(kept) < len(told) or not path.read_bytes().endswith(b"\n")):
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(temporary, path)
    return kept


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def profile(folder: Path) -> Any:
    """A profiler to be stepped after every step: of the steps 10 to 12 it writes folder/trace.json (chrome://tracing,
    Perfetto) and folder/table.txt, the 15 operations that took the most time of their own."""
    import torch
    from torch.profiler import ProfilerActivity

    gpu = torch.cuda.is_available()

    def write(profiler: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json"))
        by = "self_device_time_total" if gpu else "self_cpu_time_total"
        (folder / "table.txt").write_text(profiler.key_averages().table(sort_by=by, row_limit=15))

    profiler = torch.profiler.profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])],
        schedule=torch.profiler.schedule(wait=9, warmup=1, active=3, repeat=1),
        on_trace_ready=write,
    )
    profiler.start()
    return profiler


def versions() -> dict[str, str]:
    """What this run is made with."""
    found = {"python": platform.python_version(), "machine": f"{platform.machine()} {platform.system()}"}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    here = Path(__file__).parent
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
    )
    found["git"] = git.stdout.strip() or "no git checkout"
    return found


class Damage:
    """CorruptCheckpoint samples of this process, by epoch (of all processes: those of before the start), and the samples that it saw;
    written to damaged.jsonl and samples.jsonl (process r: damaged-r.jsonl, samples-r.jsonl).

    shards, plan: the pipeline's Shards and Plan. rank 0 takes the run's files up where they were after `start` steps.
    """

    def __init__(self, folder: Path, shards: Any, plan: Any, start: int, rank: int):
        self.folder, self.shards, self.plan = folder, shards, plan
        self._own = f"-{rank}" if rank else ""
        self._by_epoch: Counter[int] = Counter()
        self._seen: list[tuple[int, Any]] = []
        for row in truncate_logs(folder, start) if rank == 0 else ():
            self._count(row["step"], row["planned"])

    def saw(self, step: int, ids: Any) -> None:
        """The samples of a step, int64 [B] on any device; written later."""
        self._seen.append((step, ids))

    def write(self, damaged: list[tuple[int, int, int]]) -> None:
        """What the loader found damaged, (step, planned sample, sample read) each, and the samples seen."""
        for step, planned, read in damaged:
            row = {"step": step, "planned": planned, "read": read, **self.shards.describe(planned)}
            append_jsonl(self.folder / f"damaged{self._own}.jsonl", row)
            self._count(step, planned)
        for step, ids in self._seen:
            append_jsonl(self.folder / f"samples{self._own}.jsonl", {"step": step, "samples": ids.tolist()})
        self._seen.clear()

    def most(self) -> int:
        """CorruptCheckpoint samples of the worst epoch."""
        return max(self._by_epoch.values(), default=0)

    def check(self, damaged: int, allowed: float) -> None:
        """Raise UserError where so many samples of all processes are more than this share of an epoch."""
        if damaged > allowed * self.plan.samples:
            raise UserError(
                f"{damaged} of {self.plan.samples} samples are damaged in one epoch, more than "
                f"data.max_corrupt: {allowed:g}; {self.folder}/damaged.jsonl lists them"
            )

    def _count(self, step: int, planned: int) -> None:
        self._by_epoch[self.plan.epoch(step)] += not self.shards.is_lost(planned)  # data.max_missing bears the others


class Record:
    """Metrics of a run to metrics.jsonl, TensorBoard and the screen. Made by the first process only.

    A teacher whose probabilities stay at the ends of their entropy (0: one prototype each time; log of `prototypes`: all
    alike) has collapsed, and that is told.
    """

    def __init__(self, folder: Path, steps: int, plan: Any, start: int, prototypes: int):
        from torch.utils.tensorboard import SummaryWriter  # heavy, and only needed here

        self.folder, self.steps, self.steps_per_epoch = folder, steps, plan.steps_per_epoch
        self._most, self._collapsed = math.log(prototypes), 0  # nats; beats in a row
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        self._console = Console()
        self._live = self._console.is_terminal
        self._told = -1e9
        self._progress = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps ·"),
            TimeElapsedColumn(), TextColumn("gone ·"), TimeRemainingColumn(), TextColumn("left"), console=self._console,
        )  # fmt: skip
        self._task = self._progress.add_task(folder.name, total=steps, completed=start)
        self._screen = Live(self._progress, console=self._console, refresh_per_second=4) if self._live else None
        if self._screen:
            self._screen.start()
        self._begun, self._first = time.monotonic(), start

    def begin(self, config: str, versions: dict[str, str]) -> None:
        """The run's config.yaml, and a line of versions.jsonl for this start."""
        (self.folder / "config.yaml").write_text(config)
        append_jsonl(self.folder / "versions.jsonl", {"step": self._first, "command": program(), **versions})

    def write_replay(self, done: int, in_a_row: int, plan: Any, config: Config) -> None:
        """replay.json: the steps that were not finite, up to `done`, with their samples; and say so."""
        lost = range(done - in_a_row, done)
        content = {"steps": list(lost), "ids": {i: plan.samples_of(i).tolist() for i in lost}}
        write_json(self.folder / "replay.json", content | {"config": dump_config(config)})
        print(
            f"error: loss or gradient was not finite for {in_a_row} steps in a row, up to step "
            f"{done - 1} (run.max_nonfinite_steps: {config.run.max_nonfinite_steps}); nothing has moved since, the last "
            f"checkpoint stands; {self.folder}/replay.json names the steps and their samples",
            file=sys.stderr,
        )

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """What is known after `step` steps."""
        row = {"step": step, "epoch": round(step / self.steps_per_epoch, 4), **values}
        append_jsonl(self.folder / "metrics.jsonl", row)
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._progress.update(self._task, completed=step)
        if self._screen:
            self._screen.update(Group(self._progress, self._table(row)))
        elif time.monotonic() - self._told > 10 or step == self.steps:
            self._told = time.monotonic()
            self._console.print(self._line(row), highlight=False, soft_wrap=True)

        share = values.get("teacher_entropy", math.nan) / self._most
        self._collapsed = self._collapsed + 1 if share <= 0.01 or share >= 0.999 else 0
        if self._collapsed == COLLAPSED:
            self.say(
                f"warning: the teacher has collapsed: at step {step} its probabilities have an entropy of "
                f"{values['teacher_entropy']:.3g}, as near one of its ends, 0 and log K = {self._most:.3g}, as in the "
                f"{COLLAPSED - 1} rows before; nothing is learned there (a lower loss.teacher_temperature sharpens, a higher "
                "one flattens)"
            )

    def say(self, line: str) -> None:
        """A line above the live screen."""
        self._console.print(line, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._screen:
            self._screen.stop()
        self._board.close()

    def _table(self, row: dict[str, float]) -> Table:
        table = Table.grid(padding=(0, 2))
        shown = [
            f"[dim]{name.replace('_', ' ')}[/dim] {_short(value)}" for name, value in row.items() if name != "step"
        ]
        for i in range(0, len(shown), 4):
            table.add_row(*shown[i : i + 4])
        return table

    def _line(self, row: dict[str, float]) -> str:
        done = int(row["step"]) - self._first
        gone = time.monotonic() - self._begun
        left = gone / max(1, done) * (self.steps - int(row["step"]))
        shown = " · ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in row.items() if name != "step")
        return f"step {int(row['step'])}/{self.steps} · {_time(left)} left · {shown}"


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.4g}"


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def program() -> str:
    """The command that started this process, to be told again."""
    return " ".join([Path(sys.executable).name, *sys.argv])
