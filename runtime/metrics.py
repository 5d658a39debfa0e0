"""Metrics of a run: metrics.jsonl, its loggers and the live screen; the versions it was made with; its profile."""

import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from runtime.distributed import DistributedContext
    from runtime.loggers import Loggers

PACKAGES = (
    "torch",
    "torchvision",
    "simplejpeg",
    "pillow",
    "timm",
    "webdataset",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "numpy",
)

IMAGES_OF = "images/"  # before the name of a source of a mixture: its images since the run began
COLLAPSE_ROWS = 5  # rows of metrics in a row with an entropy at 0 or log K: then the teacher has collapsed
PRINT_SECONDS = 10  # between two lines where there is no live screen
UNKNOWN_TIME = "-:--"
# what a line says of each metric; all metrics are in metrics.jsonl
LINE: dict[str, Callable[[float], str]] = {
    "loss": lambda loss: f"loss {loss:.4g}",
    "images_per_second": lambda speed: f"{_short(speed)} images/s",
    "data_wait_percent": lambda percent: f"data wait {percent:.1f} %",
}
# of these a line is printed whenever they occur
RARE: dict[str, Callable[[float], str]] = {
    "skipped_steps": lambda steps: f"{steps:.0f} steps skipped, not finite",
}
# what the line of a measurement says; it is printed when the measurement is done
MEASURED: dict[str, Callable[[float], str]] = {
    "knn_top1": lambda percent: f"k-NN {percent:.1f} %",
    "points_reference_small": lambda percent: f"points on small things {percent:.1f} %",
    "linear_seg_miou": lambda percent: f"linear segmentation {percent:.1f} % mIoU",
}


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Append one JSON object as a line."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; none if there is no file. Lines that are not JSON objects (cut off when a process
    was killed) are skipped."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def is_collapsed(entropy: float, highest: float) -> bool:
    """Whether an entropy of the teacher's probabilities is at 0 or at its highest value, log of the number of prototypes."""
    return entropy <= 0.01 * highest or entropy >= 0.999 * highest


def versions() -> dict[str, str]:
    """Versions of Python, the machine, packages and this checkout."""
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


def environment(context: "DistributedContext", reader: str) -> dict[str, str]:
    """What a checkpoint says of its run's environment: processes, precision, device, reader, versions."""
    return {
        "world size": str(context.world_size), "precision": str(context.dtype).removeprefix("torch."),
        "device": context.device.type, "reader": reader, **versions(),
    }  # fmt: skip


def command_line() -> str:
    """The command that started this process."""
    return " ".join([Path(sys.executable).name, *sys.argv])


def profile(folder: Path) -> Any:
    """A started torch profiler; call its `step` after every step.

    It records steps 10 to 12 into folder/trace.json (chrome://tracing, Perfetto) and folder/table.txt: the 15 operations
    with the most time of their own.
    """
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


class MetricLogger:
    """Writes a run's metrics to metrics.jsonl, to `run.loggers` and to the screen. Only process 0 has one.

    Warns once if the teacher has collapsed: the entropy of its probabilities stays at 0 (the same prototype for every
    image) or at log `prototypes` (all prototypes alike).

    The time left is that of the steps after the first one, which compiles: `begin` before it, `first_step_done` after it.

    steps: of the whole run. start: steps done before. loggers: where the rows go besides.
    """

    def __init__(
        self, folder: Path, steps: int, steps_per_epoch: int, start: int, prototypes: int,
        loggers: "Loggers | None" = None,
    ):  # fmt: skip
        self.folder, self.steps, self.steps_per_epoch = folder, steps, steps_per_epoch
        self._max_entropy, self._collapsed_rows = math.log(prototypes), 0  # nats
        self._loggers, self._done = loggers, start
        self._console = Console()
        self._last_print = -1e9
        self._progress = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps ·"),
            TimeElapsedColumn(), TextColumn("elapsed · {task.fields[left]} left"),
            console=self._console,
        )  # fmt: skip
        # the elapsed time, and nothing else, is rich's: its estimate forgets steps that are slower than half a minute
        self._task = self._progress.add_task(escape(folder.name), total=steps, completed=start, left=UNKNOWN_TIME)
        live = self._console.is_terminal
        self._screen = Live(self._progress, console=self._console, refresh_per_second=4) if live else None
        if self._screen:
            self._screen.start()
        self._started, self._counted_from = time.monotonic(), start  # the steps that the time left is reckoned from

    def begin(self, note: str) -> None:
        """The first step begins. note: what it does besides, under the bar of the live screen until the step is done."""
        self._started = time.monotonic()
        if self._screen and note:
            self._screen.update(Group(self._progress, Text(note)))

    def first_step_done(self) -> None:
        """From here on time is counted. Says how long the step took, if that was long enough to wonder."""
        took, self._started = time.monotonic() - self._started, time.monotonic()
        self._counted_from += 1
        if self._screen:
            self._screen.update(self._progress)
        if took > PRINT_SECONDS:
            self.log(f"the first step took {_time(took)}; the time left does not count it")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log the values after `step` steps."""
        row = self._record(step, values)
        self._done = step
        self._progress.update(self._task, completed=step, left=self._left(step))
        if self._screen:
            self._screen.update(Group(self._progress, self._table(row)))
        elif time.monotonic() - self._last_print > PRINT_SECONDS or step == self.steps or RARE.keys() & values:
            self._last_print = time.monotonic()
            self.log(self._line(step, values))
        if "teacher_entropy" in values:
            self._check_collapse(step, values["teacher_entropy"])

    def write_measured(self, step: int, values: dict[str, float]) -> None:
        """Log what was measured of the weights after `step` steps; later rows may be written already."""
        self._record(step, values)
        self.log(" · ".join([f"measured at step {step}", *(MEASURED[n](values[n]) for n in MEASURED if n in values)]))

    def _record(self, step: int, values: dict[str, float]) -> dict[str, float]:
        row = {"step": step, "epoch": round(step / self.steps_per_epoch, 4), **values}
        append_jsonl(self.folder / "metrics.jsonl", row)
        for message in self._loggers.write(row) if self._loggers else ():
            self.log(message)
        return row

    def log(self, message: str) -> None:
        """Print a line, above the live screen if there is one."""
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._screen:
            self._screen.stop()
        for message in self._loggers.close(finished=self._done == self.steps) if self._loggers else ():
            self.log(message)

    def _check_collapse(self, step: int, entropy: float) -> None:
        self._collapsed_rows = self._collapsed_rows + 1 if is_collapsed(entropy, self._max_entropy) else 0
        if self._collapsed_rows == COLLAPSE_ROWS:
            self.log(
                f"warning: the teacher has collapsed: at step {step} its probabilities have an entropy of {entropy:.3g}, "
                f"close to 0 or log K = {self._max_entropy:.3g}, as in the {COLLAPSE_ROWS - 1} rows before; the student "
                "learns nothing from it (a lower loss.teacher_temperature sharpens, a higher one flattens)"
            )

    def _table(self, row: dict[str, float]) -> Table:
        table = Table.grid(padding=(0, 2))
        cells = [
            f"[dim]{name.replace('_', ' ')}[/dim] {_short(value)}" for name, value in row.items() if name != "step"
        ]
        for i in range(0, len(cells), 4):
            table.add_row(*cells[i : i + 4])
        return table

    def _line(self, step: int, values: dict[str, float]) -> str:
        """A line for a file: step, time left, loss, speed, data wait; and what is rare."""
        cells = [text(values[name]) for name, text in (LINE | RARE).items() if name in values]
        return " · ".join([f"step {step}/{self.steps}", f"{self._left(step)} left", *cells])

    def _left(self, step: int) -> str:
        done = step - self._counted_from
        if done < 1:
            return UNKNOWN_TIME
        return _time((time.monotonic() - self._started) / done * (self.steps - step))


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.4g}"


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
