"""A run in one page: RUN/report.html, a single file that asks for no server, no network and no script.

    python -m eval.html RUN

What there is in the run folder is shown, what is not there yet is left out: figures (results.json, measures.json,
evaluations.jsonl), curves (metrics.jsonl), pictures (pictures/*.png), configuration and versions. Curves are drawings
within the page, pictures are carried in it, and the page forbids itself to load anything else. It follows the reader's
choice of light or dark.
"""

import argparse
import base64
import io
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from eval.compare import columns_of, rows_of
from eval.report import table_of
from runtime.config import Config, load_config
from runtime.errors import UserError, run_cli
from runtime.metrics import read_jsonl

POINTS = 400  # of a curve: more are drawn as means, with their range behind them
INK = "#010203"  # stands for the page's own ink in a drawing, light or dark
COLORS = ("#0072b2", "#e69f00", "#009e73", "#d55e00")  # Okabe & Ito's; line styles tell them apart too
STYLES = ("-", "--", ":", "-.")
KEPT = 6  # evaluations of a kind side by side, the newest

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
    "views": "What the trainer sees: windows, views, and the points that they share",
    "attention": "Attention of [CLS] in the last block, head by head",
    "points": "Attention of reference tokens in the last block, at some points",
    "pca": "Principal components of patch tokens as colors, shared by all images",
    "similarity": "Likeness of one patch to all patches",
    "segmentation": "Segmentation by a linear map on patch tokens, beside the truth",
    "misalignment": "How often two views hold different objects",
}

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --dim: #5b646d; --paper: #ffffff; --line: #d8dde2; --c0: #0072b2 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ea; --dim: #9aa4ae; --paper: #15181b; --line: #343a41; --c0: #4aa8e0 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--paper); color: var(--ink);
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
# nothing is loaded from anywhere, whatever a name or a figure of the run may contain
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


# ------------------------------------------------------------------------------------------------------ what was written


def read_object(path: Path) -> dict[str, Any]:
    """The object of a .json file; empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def metrics_of(run: Path) -> list[dict[str, float]]:
    """Rows of metrics.jsonl by step. Steps that were run again after a crash count as they went the last time."""
    rows = [row for row in read_jsonl(run / "metrics.jsonl") if isinstance(row.get("step"), int)]
    return [row for _, row in sorted({row["step"]: row for row in rows}.items())]


# -------------------------------------------------------------------------------------------------------------- drawing


def thinned(x: NDArray, y: NDArray) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """(x, mean, lowest, highest) of at most POINTS pieces of a curve."""
    pieces = np.array_split(np.arange(len(x)), min(len(x), POINTS))
    mean, low, high = (np.array([f(y[piece]) for piece in pieces]) for f in (np.mean, np.min, np.max))
    return np.array([x[piece[-1]] for piece in pieces]), mean, low, high


def curve(
    rows: list[dict[str, float]], title: str, unit: str, names: Sequence[str], ceiling: float | None = None
) -> str:
    """A drawing (svg) of some metrics over epochs; '' where none of them was recorded. ceiling: a line that says how high
    it could get."""
    names = [name for name in names if any(isinstance(row.get(name), int | float) for row in rows)]
    if not names:
        return ""
    ink: Any = dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "text.color"), INK)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9, **ink}):
        figure = Figure(figsize=(4.6, 2.5), layout="constrained")
        axes = figure.subplots()
        for n, name in enumerate(names):
            seen = [
                (row.get("epoch", row["step"]), row[name]) for row in rows if isinstance(row.get(name), int | float)
            ]
            x, mean, low, high = thinned(*np.array(seen, float).T)
            if len(seen) > len(x):
                axes.fill_between(x, low, high, color=COLORS[n], alpha=0.2, lw=0)
            few: Any = dict(marker="o", ms=3) if len(x) <= 30 else {}
            axes.plot(x, mean, STYLES[n], color=COLORS[n], lw=1.6, label=name.replace("_", " "), **few)
        if ceiling is not None:
            axes.axhline(ceiling, color=INK, lw=0.8, ls=(0, (1, 3)), label=f"{ceiling:.1f}: all prototypes alike")
        if len(names) > 1 or ceiling is not None:
            axes.legend(frameon=False)
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("epochs" if "epoch" in rows[0] else "steps")
        axes.set_ylabel(unit)
        axes.spines[["top", "right"]].set_visible(False)
        written = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    drawing = written.getvalue()
    drawing = drawing[drawing.index("<svg") :].replace(INK, "currentColor").replace(COLORS[0], "var(--c0)")
    label = escape(f"{title}: {', '.join(names)}", quote=True)
    return drawing.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


# ----------------------------------------------------------------------------------------------------------------- html


def number(value: Any) -> str:
    """A value as a table tells it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    return str(value) if isinstance(value, int) else f"{value:.2f}" if 0.1 <= abs(value) < 1000 else f"{value:.4g}"


def is_figure(value: Any) -> bool:
    """Whether a cell is a number, nothing, or a number with its spread."""
    return value is None or isinstance(value, int | float) or bool(re.fullmatch(r"[\d.]+ \(.*\)", str(value)))


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """The first column tells what; columns of figures stand to the right."""
    rows = [list(row) for row in rows]
    figures = [n > 0 and all(is_figure(row[n]) for row in rows) for n in range(len(head))]

    def line(tag: str, row: Sequence[Any]) -> str:
        kinds = (' class="n"' if right else "" for right in figures)
        return "".join(f"<{tag}{k}>{escape(number(v))}</{tag}>" for k, v in zip(kinds, row, strict=True))

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{line("th", head)}</tr>{body}</table></div>'


def side_by_side(rows: list[dict[str, Any]], heads: list[str], what: str = "") -> str:
    """Rows of a .jsonl file as columns, the newest KEPT of them: one line for each key."""
    rows, heads = rows[-KEPT:], heads[-KEPT:]
    keys = dict.fromkeys(key for row in rows for key in row)
    return table([what, *heads], ([key, *(row.get(key) for row in rows)] for key in keys)) if rows else ""


def section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def figure_of(inside: str, caption: str) -> str:
    return f"<figure>{inside}<figcaption>{escape(caption)}</figcaption></figure>" if inside else ""


def grid(figures: Iterable[str], kind: str = "grid") -> str:
    together = "".join(figures)
    return f'<div class="{kind}">{together}</div>' if together else ""


def tiles_of(rows: list[dict[str, float]], config: Config, results: dict[str, Any]) -> str:
    """The run in a handful of figures."""
    tiles: list[tuple[str, str]] = []
    if rows:
        last = rows[-1]
        if last.get("epoch"):
            tiles.append((f"{last['epoch']:.4g} of {config.optim.epochs:g}", f"epochs, {last['step']:,} steps"))
        tiles += [
            (number(last.get(name)), word) for name, word in (("loss", "loss"), ("teacher_entropy", "teacher entropy"))
        ]
        fast = [row["images_per_second"] for row in rows if row.get("images_per_second")]
        if fast:
            steps = np.diff([0, *(row["step"] for row in rows if row.get("images_per_second"))])
            hours = float((steps * config.optim.global_batch_size / np.array(fast)).sum()) / 3600
            tiles += [(f"{median(fast):,.0f}", "images a second, median")]
            tiles += [(f"{60 * hours:.0f} min" if hours < 2 else f"{hours:.1f} h", "of training")]
        waits = [row["data_wait_percent"] for row in rows if "data_wait_percent" in row]
        if waits:
            tiles.append((f"{median(waits):.2g} %", "of the time waiting for data, median"))
    for name, word in (("knn_top1", "k-NN top-1, %"), ("miou", "mIoU of a linear map, %")):
        if isinstance(results.get(name), int | float):
            tiles.append((f"{results[name]:.1f}", word))
    return "".join(f"<div><b>{escape(value)}</b>{escape(word)}</div>" for value, word in tiles)


def results_of(results: dict[str, Any]) -> str:
    """results.json as eval.report shows it."""
    try:
        made = table_of(results, "")
    except (KeyError, TypeError, AttributeError):  # of another version
        return ""
    columns = [[_figure(str(cell)) for cell in column.cells] for column in made.columns]
    words = table([str(column.header) for column in made.columns], zip(*columns, strict=True))
    return f'{words}<p class="dim">results.json, {escape(str(results.get("time", "")))}</p>'


def _figure(cell: str) -> str | float | None:
    """A cell of a rich table: a number, nothing, or words without rich's own escapes."""
    try:
        return None if cell == "–" else float(cell)
    except ValueError:
        return cell.replace("\\[", "[")


def flat(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"last": {"miou": 1}} -> {"last miou": 1}; lists are left out."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key} ")
        elif not isinstance(value, list):
            found[prefix + key] = value
    return found


def evaluations_of(rows: list[dict[str, Any]]) -> str:
    """For each kind of evaluation, the newest side by side."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(str(row.get("what", "evaluation")), []).append(row)
    made = []
    for what, those in kinds.items():
        figures = [{k: v for k, v in flat(row).items() if k not in ("what", "time")} for row in those]
        body = side_by_side(figures, [str(row.get("time", "")) for row in those], what)
        made.append(f"<details><summary>{escape(what)}, {len(those)} measured</summary>{body}</details>")
    return "".join(made)


def measures_of(measures: dict[str, Any]) -> str:
    """measures.json: the table of eval.compare, and all else that it tells of the networks in a fold."""
    networks = measures.get("networks")
    if not isinstance(networks, dict) or not all(isinstance(about, dict) for about in networks.values()):
        return ""
    try:
        rows = [[words, *map(_figure, cells)] for words, cells, _ in rows_of(measures)]
    except (KeyError, TypeError, ValueError, AttributeError):  # of another version
        return ""
    if not rows:
        return ""
    abouts = [flat(about) for about in networks.values()]
    keys = dict.fromkeys(key for about in abouts for key in about)
    whole = table(["", *map(str, networks)], ([key, *(about.get(key) for about in abouts)] for key in keys))
    told = f'<p class="dim">measures.json, {escape(str(measures.get("time", "")))}</p>'
    fold = f"<details><summary>measures.json, {len(networks)} networks</summary>{whole}</details>"
    return table(["%", *map(str, columns_of(measures))], rows) + told + fold


def pictures_of(folder: Path) -> str:
    """The pictures, those that we know first and in our order."""
    order = {name: n for n, name in enumerate(CAPTIONS)}
    files = sorted(folder.glob("*.png"), key=lambda file: (order.get(file.stem, len(order)), file.name))
    made = []
    for file in files:
        caption = CAPTIONS.get(file.stem, file.stem)
        content = base64.b64encode(file.read_bytes()).decode()
        inside = f'<img alt="{escape(caption, quote=True)}" src="data:image/png;base64,{content}">'
        made.append(figure_of(inside, caption))
    return grid(made, "grid wide")  # there are letters in them


def page(run: Path) -> str:
    """The whole page. Raises UserError where `run` is no run folder."""
    file = run / "config.yaml"
    if not file.is_file():
        raise UserError(f"{run}: no run folder (no config.yaml)")
    config = load_config(file)
    rows, results = metrics_of(run), read_object(run / "results.json")
    groups = " + ".join(f"{g.count}×{g.size}" for g in config.data.views)
    points = f", {config.points} points a pair" if config.points else ""
    about = f"{config.method}: {config.model.arch}/{config.model.patch}, views {groups}{points}, batch {config.optim.global_batch_size}"
    ceilings = {"Entropy of the teacher's probabilities": math.log(config.head.prototypes)}

    def drawn(curves: Iterable[tuple[str, str, tuple[str, ...]]]) -> str:
        return grid(figure_of(curve(rows, *told, ceiling=ceilings.get(told[0])), told[0]) for told in curves)

    speed = drawn(SPEED)
    known = {"step", "epoch", *(name for *_, names in (*LEARNING, *SPEED) for name in names)}
    others = dict.fromkeys(name for row in rows for name in row if name not in known)
    more = drawn((name.replace("_", " "), "", (name,)) for name in others)
    damaged = sum(len(read_jsonl(found)) for found in run.glob("damaged*.jsonl"))
    if damaged:
        speed += f"<p>{damaged:,} damaged samples were met and replaced (damaged.jsonl).</p>"
    learned = results_of(results) + measures_of(read_object(run / "measures.json"))
    learned += evaluations_of(read_jsonl(run / "evaluations.jsonl"))
    versions = read_jsonl(run / "versions.jsonl")
    starts = [f"from step {row.pop('step', '?')}" for row in versions]
    body = [
        f'<h1>{escape("/".join(run.absolute().parts[-2:]))}</h1><p class="dim">{escape(about)}</p>',
        f'<div class="tiles">{tiles_of(rows, config, results)}</div>',
        section("What it has learned", learned),
        section("Learning", drawn(LEARNING) or "<p>No metrics yet.</p>"),
        section("Speed", speed),
        section("Other metrics", more),
        section("Pictures", pictures_of(run / "pictures")),
        section(
            "Configuration", f"<details><summary>config.yaml</summary><pre>{escape(file.read_text())}</pre></details>"
        ),
        section("Made with", side_by_side([flat(row) for row in versions], starts)),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(run.name)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m eval.html", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, help="a run folder")
    args = parser.parse_args(argv)
    out = args.run / "report.html"
    written = page(args.run)
    partial = out.with_name(f".{out.name}.partial")
    partial.write_text(written, encoding="utf-8")
    os.replace(partial, out)
    print(f"the run in one page: {out}")


if __name__ == "__main__":
    run_cli(main)
