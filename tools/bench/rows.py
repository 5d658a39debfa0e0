"""What all benchmarks share: medians with their range, the machine's name, and printing and recording rows."""

import os
import platform
import statistics
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from runtime.metrics import append_jsonl, versions

if TYPE_CHECKING:
    import torch


def cpu_name() -> str:
    """The processor and the number of its cores."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else ():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()} x {os.cpu_count()}"
    return f"{platform.processor()} x {os.cpu_count()}"


def device_name(device: "torch.device") -> str:
    """The GPU's name, or the processor's."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def median_and_range(name: str, values: Sequence[float]) -> dict[str, Any]:
    """{name: median, name_spread: [minimum, maximum]}, rounded to 3 decimals."""
    return {name: round(statistics.median(values), 3), f"{name}_spread": [round(min(values), 3), round(max(values), 3)]}


def make_table(title: str, columns: Sequence[str], left: int = 0) -> Table:
    """A table whose first `left` columns are aligned left, the others right. Underscores in the names become spaces."""
    table = Table(title=title)
    for i, name in enumerate(columns):
        table.add_column(name.replace("_", " "), justify="left" if i < left else "right", overflow="fold")
    return table


def report_rows(table: Table, rows: list[dict[str, Any]], out: Path | None) -> None:
    """Print the table; append the rows, with versions and date, to `out` as JSON lines."""
    console = Console()
    if not console.is_terminal:  # a file has no width, so the table is not cut
        console.width = 160
    console.print(table)
    if out:
        environment = {"versions": versions(), "date": date.today().isoformat()}
        for row in rows:
            append_jsonl(out, row | environment)
        print(f"{len(rows)} rows appended to {out}")
