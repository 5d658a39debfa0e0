"""A run in one page: RUN/report.html, a single file without scripts that needs no server and no network.

    python -m eval html RUN

Shows what the run folder has, and leaves out what is not there yet: results (results.json, measures.json,
evaluations.jsonl), curves (metrics.jsonl), pictures (pictures/*.png), configuration and versions. Curves and pictures are
embedded, and the page's security policy forbids it to load anything else. It follows the reader's light or dark mode.
Imports neither torch nor matplotlib.
"""

import base64
import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from eval.curves import curve
from eval.tables import measure_columns, measure_rows, read_object, result_rows
from runtime.config import Config, load_config
from runtime.errors import UserError
from runtime.files import write_atomic
from runtime.metrics import read_jsonl

MAX_COLUMNS = 6  # evaluations of a kind side by side, the newest

LEARNING: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Losses", "nats", ("loss", "cls_loss", "reference_loss")),
    ("Entropy of the teacher's probabilities", "nats", ("teacher_entropy",)),
    ("k-NN top-1 while training", "% of photos not trained on", ("knn_top1",)),
    ("Learning rate", "", ("lr",)),
)
SPEED = (
    ("Throughput", "images per second", ("images_per_second",)),
    ("Data wait", "% of the time", ("data_wait_percent", "slowest_data_wait_percent")),
)
CAPTIONS = {
    "views": "The trainer's input: windows, views, and the points that they share",
    "attention": "Attention of [CLS] in the last block, head by head",
    "points": "Attention of reference tokens in the last block, at some points",
    "pca": "Principal components of patch tokens as colors, shared by all images",
    "similarity": "Similarity of one patch to all patches",
    "segmentation": "Segmentation by a linear classifier on patch tokens, beside the ground truth",
    "misalignment": "How often two views hold different objects",
}

STYLE = """
:root { color-scheme: light dark; --text: #1c2024; --dim: #5b646d; --page: #ffffff; --line: #d8dde2; --c0: #0072b2 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e7ea; --dim: #9aa4ae; --page: #15181b; --line: #343a41; --c0: #4aa8e0 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; margin: .5rem 0 0 }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--line) }
p { margin: .25rem 0 } .dim, figcaption, th { color: var(--dim) }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem }
.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)) }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .75rem; margin: 1rem 0 }
.tiles div { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .75rem }
.tiles b { display: block; font-size: 1.25rem }
figure { margin: 0 } figcaption { font-size: .875rem } figure svg { width: 100%; height: auto; display: block }
img { max-width: 100%; height: auto; display: block; background: #fff; border-radius: .25rem }
.scroll { overflow-x: auto; margin-top: .5rem }
table { border-collapse: collapse; font-size: .875rem; overflow-wrap: normal }
td, th { padding: .2rem .75rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
pre { font-size: .8rem; white-space: pre-wrap; margin: .5rem 0 } summary { cursor: pointer }
"""
# nothing is loaded from anywhere, whatever a name or a value in the run may contain
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def read_metrics(run: Path) -> list[dict[str, float]]:
    """Rows of metrics.jsonl by step. If steps were run again after a crash, their last rows count."""
    rows = [row for row in read_jsonl(run / "metrics.jsonl") if isinstance(row.get("step"), int)]
    return [row for _, row in sorted({row["step"]: row for row in rows}.items())]


# ------------------------------------------------------------------------------------------------------------ HTML parts


def number(value: Any) -> str:
    """A value in a table."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    return str(value) if isinstance(value, int) else f"{value:.2f}" if 0.1 <= abs(value) < 1000 else f"{value:.4g}"


def is_number(value: Any) -> bool:
    """Whether a cell is a number, nothing, or a number with its spread."""
    return value is None or isinstance(value, int | float) or bool(re.fullmatch(r"[\d.]+ \(.*\)", str(value)))


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table with a heading; columns of numbers are aligned to the right."""
    rows = [list(row) for row in rows]
    numeric = [n > 0 and all(is_number(row[n]) for row in rows) for n in range(len(head))]

    def line(tag: str, row: Sequence[Any]) -> str:
        kinds = (' class="n"' if right else "" for right in numeric)
        return "".join(f"<{tag}{k}>{escape(number(v))}</{tag}>" for k, v in zip(kinds, row, strict=True))

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{line("th", head)}</tr>{body}</table></div>'


def side_by_side(rows: list[dict[str, Any]], heads: list[str], what: str = "") -> str:
    """Rows of a .jsonl file as columns, the newest MAX_COLUMNS of them: one line per key."""
    rows, heads = rows[-MAX_COLUMNS:], heads[-MAX_COLUMNS:]
    keys = dict.fromkeys(key for row in rows for key in row)
    return table([what, *heads], ([key, *(row.get(key) for row in rows)] for key in keys)) if rows else ""


def section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{escape(caption)}</figcaption></figure>" if content else ""


def grid(figures: Iterable[str], kind: str = "grid") -> str:
    content = "".join(figures)
    return f'<div class="{kind}">{content}</div>' if content else ""


# ------------------------------------------------------------------------------------------------------------- sections


def tiles(rows: list[dict[str, float]], config: Config, results: dict[str, Any]) -> str:
    """The run in a handful of numbers."""
    shown: list[tuple[str, str]] = []
    if rows:
        last = rows[-1]
        if last.get("epoch"):
            shown.append((f"{last['epoch']:.4g} of {config.optim.epochs:g}", f"epochs, {last['step']:,} steps"))
        metrics = (("loss", "loss"), ("teacher_entropy", "teacher entropy"))
        shown += [(number(last.get(name)), label) for name, label in metrics]
        speeds = [row["images_per_second"] for row in rows if row.get("images_per_second")]
        if speeds:
            steps = np.diff([0, *(row["step"] for row in rows if row.get("images_per_second"))])
            hours = float((steps * config.optim.global_batch_size / np.array(speeds)).sum()) / 3600
            shown += [(f"{median(speeds):,.0f}", "images per second, median")]
            shown += [(f"{60 * hours:.0f} min" if hours < 2 else f"{hours:.1f} h", "of training")]
        waits = [row["data_wait_percent"] for row in rows if "data_wait_percent" in row]
        if waits:
            shown.append((f"{median(waits):.2g} %", "of the time waiting for data, median"))
    for name, label in (("knn_top1", "k-NN top-1, %"), ("miou", "mIoU of a linear classifier, %")):
        if isinstance(results.get(name), int | float):
            shown.append((f"{results[name]:.1f}", label))
    return "".join(f"<div><b>{escape(value)}</b>{escape(label)}</div>" for value, label in shown)


def results_section(results: dict[str, Any]) -> str:
    """results.json as `python -m eval report` prints it."""
    try:
        rows = [[label, *map(_value, cells)] for label, cells in result_rows(results)]
    except (KeyError, TypeError, AttributeError):  # of another version
        return ""
    shown = table(["%", "trained", "untrained", "raw pixels"], rows)
    return f'{shown}<p class="dim">results.json, {escape(str(results.get("time", "")))}</p>'


def _value(cell: str) -> str | float | None:
    """A cell of a table: a number, None for '–', or text."""
    try:
        return None if cell == "–" else float(cell)
    except ValueError:
        return cell


def flatten(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"last": {"miou": 1}} -> {"last miou": 1}; lists are left out."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key} ")
        elif not isinstance(value, list):
            flat[prefix + key] = value
    return flat


def evaluations_section(rows: list[dict[str, Any]]) -> str:
    """evaluations.jsonl: for each kind of evaluation, the newest side by side."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(str(row.get("what", "evaluation")), []).append(row)
    parts = []
    for what, group in kinds.items():
        columns = [{k: v for k, v in flatten(row).items() if k not in ("what", "time")} for row in group]
        body = side_by_side(columns, [str(row.get("time", "")) for row in group], what)
        parts.append(f"<details><summary>{escape(what)}, {len(group)} measured</summary>{body}</details>")
    return "".join(parts)


def measures_section(measures: dict[str, Any]) -> str:
    """measures.json: the table of `python -m eval compare`, and everything else in it, folded."""
    networks = measures.get("networks")
    if not isinstance(networks, dict) or not all(isinstance(column, dict) for column in networks.values()):
        return ""
    try:
        rows = [[label, *map(_value, cells)] for label, cells, _ in measure_rows(measures)]
    except (KeyError, TypeError, ValueError, AttributeError):  # of another version
        return ""
    if not rows:
        return ""
    columns = [flatten(column) for column in networks.values()]
    keys = dict.fromkeys(key for column in columns for key in column)
    everything = table(["", *map(str, networks)], ([key, *(column.get(key) for column in columns)] for key in keys))
    caption = f'<p class="dim">measures.json, {escape(str(measures.get("time", "")))}</p>'
    fold = f"<details><summary>measures.json, {len(networks)} networks</summary>{everything}</details>"
    return table(["%", *map(str, measure_columns(measures))], rows) + caption + fold


def pictures_section(folder: Path) -> str:
    """The pictures, first those with a caption, in the order of CAPTIONS."""
    order = {name: n for n, name in enumerate(CAPTIONS)}
    files = sorted(folder.glob("*.png"), key=lambda file: (order.get(file.stem, len(order)), file.name))
    parts = []
    for file in files:
        caption = CAPTIONS.get(file.stem, file.stem)
        content = base64.b64encode(file.read_bytes()).decode()
        image = f'<img alt="{escape(caption, quote=True)}" src="data:image/png;base64,{content}">'
        parts.append(figure(image, caption))
    return grid(parts, "grid wide")  # wide, because they contain text


def metrics_sections(run: Path, rows: list[dict[str, float]], config: Config) -> str:
    """Learning, speed and all other metrics, as curves."""
    ceilings = {"Entropy of the teacher's probabilities": math.log(config.head.prototypes)}

    def curves(charts: Iterable[tuple[str, str, tuple[str, ...]]]) -> str:
        return grid(
            figure(curve(rows, title, unit, names, ceilings.get(title)), title) for title, unit, names in charts
        )

    speed = curves(SPEED)
    damaged = sum(len(read_jsonl(file)) for file in run.glob("damaged*.jsonl"))
    if damaged:
        speed += f"<p>{damaged:,} damaged samples were replaced by others (damaged.jsonl).</p>"
    known = {"step", "epoch", *(name for *_, names in (*LEARNING, *SPEED) for name in names)}
    others = dict.fromkeys(name for row in rows for name in row if name not in known)
    return (
        section("Learning", curves(LEARNING) or "<p>No metrics yet.</p>")
        + section("Speed", speed)
        + section("Other metrics", curves((name.replace("_", " "), "", (name,)) for name in others))
    )


# ------------------------------------------------------------------------------------------------------------- the page


def page(run: Path) -> str:
    """The whole page. Raises UserError if `run` is not a run folder."""
    file = run / "config.yaml"
    if not file.is_file():
        raise UserError(f"{run}: not a run folder (no config.yaml)")
    config = load_config(file)
    rows, results = read_metrics(run), read_object(run / "results.json")
    views = " + ".join(f"{group.count}×{group.size}" for group in config.data.views)
    points = f", {config.points} points per pair" if config.points else ""
    batch = config.optim.global_batch_size
    summary = f"{config.method}: {config.model.arch}/{config.model.patch}, views {views}{points}, batch {batch}"
    learned = results_section(results) + measures_section(read_object(run / "measures.json"))
    learned += evaluations_section(read_jsonl(run / "evaluations.jsonl"))
    versions = read_jsonl(run / "versions.jsonl")
    starts = [f"from step {row.pop('step', '?')}" for row in versions]
    yaml = f"<details><summary>config.yaml</summary><pre>{escape(file.read_text())}</pre></details>"
    body = [
        f'<h1>{escape("/".join(run.absolute().parts[-2:]))}</h1><p class="dim">{escape(summary)}</p>',
        f'<div class="tiles">{tiles(rows, config, results)}</div>',
        section("Results", learned),
        metrics_sections(run, rows, config),
        section("Pictures", pictures_section(run / "pictures")),
        section("Configuration", yaml),
        section("Versions", side_by_side([flatten(row) for row in versions], starts)),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(run.name)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def run(path: Path) -> int:
    """The program: write RUN/report.html. Raises UserError if `path` is not a run folder."""
    out = path / "report.html"
    write_atomic(out, page(path))
    print(f"the run in one page: {out}")
    return 0
