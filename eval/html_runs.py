"""The curves of several runs in one page: curves.html, a single file like a run's report.html.

    python -m eval html RUN RUN ... [--out FILE]

What differs in their configs, their newest figures, and every metric as one chart with a curve for each run. The x axis is
in epochs where all runs have them, so runs of other batch sizes or more photos are comparable. A run that is still training
is shown as far as it is.
Imports neither torch nor matplotlib.
"""

import math
import os
from html import escape
from pathlib import Path
from typing import Any

from eval import html
from eval.curves import Rows, chart
from eval.html import LEARNING, SPEED, newest, read_metrics
from eval.html_parts import document, figure, grid, section, table
from eval.tables import read_object
from runtime.config import flatten, load_config
from runtime.errors import UserError, suggest_path
from runtime.files import write_atomic

META = '<meta name="generator" content="densedino eval html">'  # in a page of ours, which may be written again
RESULTS = (("knn_top1", "k-NN top-1, %"), ("miou", "mIoU of a linear classifier, %"))  # of results.json
LAST = ("loss", "teacher_entropy", "images_per_second", "data_wait_percent")  # of the last row of metrics


def labels(runs: list[Path]) -> dict[str, Path]:
    """{label: run}: the folders' names, or as much of their paths as tells them apart. Raises UserError."""
    for n, run in enumerate(runs):
        if not (run / "config.yaml").is_file():
            raise UserError(f"{run}: not a run folder (no config.yaml){suggest_path(run)}")
        if run.resolve() in [other.resolve() for other in runs[:n]]:
            raise UserError(f"{run}: the same run twice")
    parts = [run.absolute().parts for run in runs]
    count = next(n for n in range(1, max(map(len, parts)) + 1) if len({p[-n:] for p in parts}) == len(runs))
    return {"/".join(p[-count:]): run for p, run in zip(parts, runs, strict=True)}


def differences(runs: dict[str, Path]) -> list[list[Any]]:
    """[key, a value for each run] of what differs in their configs."""
    configs = [flatten(load_config(run / "config.yaml")) for run in runs.values()]
    keys = dict.fromkeys(key for config in configs for key in config if key != "run.folder")
    rows = [[key, *(config.get(key) for config in configs)] for key in keys]
    return [row for row in rows if any(value != row[1] for value in row[2:])]


def figures(runs: dict[str, Path], metrics: dict[str, Rows]) -> list[list[Any]]:
    """[what, a figure for each run]: steps, the last metrics, the results if there are any."""
    last: list[dict[str, Any]] = [newest(rows) for rows in metrics.values()]
    results = [read_object(run / "results.json") for run in runs.values()]
    rows = [["epochs", *(row.get("epoch") for row in last)], ["steps", *(row.get("step") for row in last)]]
    rows += [[name.replace("_", " "), *(row.get(name) for row in last)] for name in LAST]
    rows += [[label, *(result.get(name) for result in results)] for name, label in RESULTS]
    return [row for row in rows if any(value is not None for value in row[1:])]


def charts(runs: dict[str, Path], metrics: dict[str, Rows]) -> str:
    """Every metric that a run has recorded, those that the page of a run knows first and in its order."""
    units = {name: (title, unit) for title, unit, names in (*LEARNING, *SPEED) for name in names}
    recorded = dict.fromkeys(name for rows in metrics.values() for row in rows for name in row)
    names = [*(name for name in units if name in recorded), *(name for name in recorded if name not in units)]
    highest = {math.log(load_config(run / "config.yaml").head.prototypes) for run in runs.values()}
    ceilings = {"teacher_entropy": highest.pop()} if len(highest) == 1 else {}
    shown = []
    for name in names:
        if name not in ("step", "epoch"):
            title, unit = name.replace("_", " "), units.get(name, ("", ""))[1]
            drawn = chart({label: (rows, name) for label, rows in metrics.items()}, title, unit, ceilings.get(name))
            shown.append(figure(drawn, title))
    return grid(shown)


def page(runs: list[Path]) -> str:
    """The whole page. Raises UserError if one of them is not a run folder."""
    named = labels(runs)
    metrics = {label: read_metrics(run) for label, run in named.items()}
    differing = differences(named)
    title = ", ".join(named)
    body = [
        f"<h1>{escape(title)}</h1>",
        section("Newest figures", table(["", *named], figures(named, metrics))),
        section("Curves", charts(named, metrics) or "<p>No metrics yet.</p>"),
        section("What differs", table(["config.yaml", *named], differing) if differing else "<p>No value differs.</p>"),
    ]
    return document(title, "".join(body), META)


def run(runs: list[Path], out: Path | None) -> int:
    """The program: write the page of several runs, or of one (html.py). Raises UserError for what is not a run folder, and
    before another file is overwritten."""
    if len(runs) == 1:
        if out:
            raise UserError(f"--out {out}: the page of one run is RUN/report.html; --out is for several runs")
        return html.run(runs[0])
    out = out or Path(os.path.commonpath([run.absolute().parent for run in runs]), "curves.html")
    if out.is_dir() or (out.exists() and META not in out.read_text(encoding="utf-8", errors="replace")[:1000]):
        raise UserError(f"{out}: exists, and is no page of this program; --out FILE names another file")
    text = page(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, text)
    print(f"{len(runs)} runs in one page: {out}")
    return 0
