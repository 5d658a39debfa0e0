"""A run in one page: RUN/report.html, a single file without scripts that needs no server and no network.

    python -m eval html RUN

Shows what the run folder has, and leaves out what is not there yet: results (results.json, measures.json,
evaluations.jsonl), curves (metrics.jsonl), pictures (pictures/*.png), configuration and versions. Curves and pictures are
embedded, and the page's security policy forbids it to load anything else. It follows the reader's light or dark mode.
The page carries the step and the hash of the run's weights, and names what it shows that is of others. What can be said
without labels is said of every run: whether the teacher has collapsed, and the effective rank of its features.
Imports neither torch nor matplotlib.
"""

import math
from collections import Counter
from collections.abc import Iterable
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from eval.curves import curve
from eval.html_parts import document, figure, grid, note, number, paragraphs, picture, section, side_by_side, table
from eval.provenance import Weights, html_meta, known_weights, png_weights
from eval.tables import (
    measure_columns,
    measure_notes,
    measure_rows,
    read_object,
    result_columns,
    result_notes,
    result_rows,
)
from runtime.config import Config, load_config
from runtime.errors import UserError, suggest_path
from runtime.files import write_atomic
from runtime.metrics import COLLAPSE_ROWS, IMAGES_OF, is_collapsed, read_jsonl

LEARNING: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Losses", "nats", ("loss", "cls_loss", "reference_loss")),
    ("Entropy of the teacher's probabilities", "nats", ("teacher_entropy",)),
    ("k-NN top-1 while training", "% of photos not trained on", ("knn_top1",)),
    (
        "Points on small things: k-NN top-1 while training",
        "% of points",
        ("points_reference_small", "points_patch_small", "points_cls_small"),
    ),
    ("Linear segmentation while training", "% mIoU, of a part of the scenes", ("linear_seg_miou",)),
    ("Effective rank of the features", "directions, of one view of a batch", ("effective_rank",)),
    ("Learning rate", "", ("lr",)),
)
SPEED = (
    ("Throughput", "images per second", ("images_per_second",)),
    ("Data wait", "% of the time", ("data_wait_percent", "slowest_data_wait_percent")),
    ("Slowest process", "% more time for data and forward pass than the median process", ("slowest_rank_percent",)),
)
CAPTIONS = {
    "views": "The trainer's input: windows, views, and the points that they share",
    "attention": "Attention of [CLS] in the last block, head by head",
    "points": "Attention of reference tokens in the last block, at some points",
    "pca": "Principal components of patch tokens as colors, shared by all images",
    "similarity": "Similarity of one patch to all patches",
    "neighbors": "Photos, each beside those that the network finds most similar to it",
    "segmentation": "Segmentation by a linear classifier on patch tokens, beside the ground truth",
    "misalignment": "How often two views hold different objects",
}


def read_metrics(run: Path) -> list[dict[str, float]]:
    """Rows of metrics.jsonl by step. What was measured of a step's weights has a later row, which is joined with the step's.
    If steps were run again after a crash, their last values count."""
    by_step: dict[int, dict[str, float]] = {}
    for row in read_jsonl(run / "metrics.jsonl"):
        if isinstance(row.get("step"), int):
            by_step.setdefault(row["step"], {}).update(row)
    return [row for _, row in sorted(by_step.items())]


def newest(rows: list[dict[str, float]]) -> dict[str, float]:
    """The last value of every metric; not all rows have all."""
    return {name: value for row in rows for name, value in row.items()}


# ------------------------------------------------------------------------------------------------------------- sections


def tiles(rows: list[dict[str, float]], config: Config, results: dict[str, Any]) -> str:
    """The run in a handful of numbers."""
    shown: list[tuple[str, str]] = []
    if rows:
        last = newest(rows)
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


def results_section(run: Path, results: dict[str, Any], current: Weights | None) -> str:
    """results.json as `python -m eval report` prints it. current: the run's weights."""
    command = f"`make eval RUN={run}`"
    if not results:
        return note(f"not evaluated yet: {command}") if current else ""
    try:
        rows = [[label, *map(_value, cells)] for label, cells in result_rows(results)]
        notes = result_notes(results)
    except (KeyError, TypeError, AttributeError):  # of another version
        return note(f"results.json was written by another version: {command} writes it again")
    shown = table(["%", *result_columns(results)], rows) if rows else ""
    stale = note(f"results.json is {age(results.get('weights'), current)}: {command}") if current else ""
    stale = stale if results.get("weights") != current else ""
    time = f'<p class="dim">results.json, {escape(str(results.get("time", "")))}</p>'
    return stale + shown + paragraphs(notes) + time


def age(weights: Weights | None, current: Weights) -> str:
    """Of which network a file is, if it is not of the current one."""
    step = (weights or {}).get("step")
    other = (
        "of an unknown network" if weights is None else f"of step {step}" if step is not None else "of another network"
    )
    return f"{other}, the run is at step {current['step']}"


def without_labels(rows: list[dict[str, float]], config: Config) -> str:
    """What the metrics say of any run: whether the teacher has collapsed."""
    entropies = [row["teacher_entropy"] for row in rows if isinstance(row.get("teacher_entropy"), int | float)]
    if not entropies:
        return ""
    highest = math.log(config.head.prototypes)
    last = entropies[-COLLAPSE_ROWS:]
    if all(is_collapsed(entropy, highest) for entropy in last):
        return note(
            f"Collapse check: the teacher has collapsed. Its probabilities have an entropy of {last[-1]:.3g} nats, close to "
            f"0 or to log K = {highest:.3g}; docs/troubleshooting.md says what helps"
        )
    return paragraphs(
        [
            f"Collapse check: passed. The teacher's probabilities have an entropy of {last[-1]:.3g} nats; 0 or "
            f"log K = {highest:.3g} would be a collapse."
        ]
    )


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
    notes = paragraphs(measure_notes(measures))
    return table(["%", *map(str, measure_columns(measures))], rows) + notes + caption + fold


def pictures_section(folder: Path, current: Weights | None) -> str:
    """The pictures, first those with a caption, in the order of CAPTIONS. current: the run's weights."""
    order = {name: n for n, name in enumerate(CAPTIONS)}
    files = sorted(folder.glob("*.png"), key=lambda file: (order.get(file.stem, len(order)), file.name))
    parts = []
    for file in files:
        caption, drawn = CAPTIONS.get(file.stem, file.stem), png_weights(file)
        if current and drawn and current not in drawn:
            caption += f" ({age(drawn[0], current)})"
        parts.append(picture(file, caption))
    return grid(parts, "grid wide")  # wide, because they contain text


def metrics_sections(run: Path, rows: list[dict[str, float]], config: Config) -> str:
    """Learning, speed and all other metrics, as curves."""
    ceilings = {"Entropy of the teacher's probabilities": math.log(config.head.prototypes)}

    def curves(charts: Iterable[tuple[str, str, tuple[str, ...]]]) -> str:
        return grid(
            figure(curve(rows, title, unit, names, ceilings.get(title)), title) for title, unit, names in charts
        )

    speed = curves(SPEED) + slowest_process(rows)
    damaged = sum(len(read_jsonl(file)) for file in run.glob("damaged*.jsonl"))
    if damaged:
        speed += f"<p>{damaged:,} damaged samples were replaced by others (damaged.jsonl).</p>"
    known = {"step", "epoch", "slowest_rank", *(name for *_, names in (*LEARNING, *SPEED) for name in names)}
    others = dict.fromkeys(n for row in rows for n in row if n not in known and not n.startswith(IMAGES_OF))
    return (
        section("Learning", curves(LEARNING) or "<p>No metrics yet.</p>")
        + section("Speed", speed)
        + section("Other metrics", curves((name.replace("_", " "), "", (name,)) for name in others))
    )


def sources_section(versions: list[dict[str, Any]], rows: list[dict[str, float]]) -> str:
    """The sources of a mixture, and how many images the run took from each. versions: versions.jsonl, whose last row has the
    sources of today; rows: of metrics.jsonl."""
    sources = versions[-1].get("sources") if versions else None
    if not isinstance(sources, list):
        return ""
    last = newest(rows)
    lines = []
    for source in sources:
        seen = last.get(f"{IMAGES_OF}{source['name']}")
        each = None if seen is None else f"{seen / source['samples']:.3g}"
        lines.append([source["folder"], f"{source['samples']:,}", f"{100 * source['share']:.1f} %", seen, each])
    return table(["", "photos to train on", "share of the images", "images so far", "times each photo"], lines)


def slowest_process(rows: list[dict[str, float]]) -> str:
    """Which process was the slowest in most rows of a run of several."""
    slowest = Counter(int(row["slowest_rank"]) for row in rows if "slowest_rank" in row)
    if not slowest:
        return ""
    (rank, times), behind = (
        slowest.most_common(1)[0],
        [row["slowest_rank_percent"] for row in rows if "slowest_rank" in row],
    )
    return (
        f"<p>Process {rank} was the slowest in {times:,} of {slowest.total():,} rows. The slowest process needed "
        f"{median(behind):.0f} % more time for data and forward pass than the median process (median of the rows).</p>"
    )


# ------------------------------------------------------------------------------------------------------------- the page


def page(run: Path) -> str:
    """The whole page. Raises UserError if `run` is not a run folder."""
    file = run / "config.yaml"
    if not file.is_file():
        raise UserError(f"{run}: not a run folder (no config.yaml){suggest_path(run)}")
    config = load_config(file)
    rows, results, current = read_metrics(run), read_object(run / "results.json"), known_weights(run)
    views = " + ".join(f"{group.count}×{group.size}" for group in config.data.views)
    points = f", {config.points} points per pair" if config.points else ""
    batch = config.optim.global_batch_size
    summary = f"{config.method}: {config.model.arch}/{config.model.patch}, views {views}{points}, batch {batch}"
    learned = results_section(run, results, current) + without_labels(rows, config)
    learned += measures_section(read_object(run / "measures.json"))
    learned += evaluations_section(read_jsonl(run / "evaluations.jsonl"))
    versions = read_jsonl(run / "versions.jsonl")
    starts = [f"from step {row.pop('step', '?')}" for row in versions]
    yaml = f"<details><summary>config.yaml</summary><pre>{escape(file.read_text())}</pre></details>"
    body = [
        f'<h1>{escape("/".join(run.absolute().parts[-2:]))}</h1><p class="dim">{escape(summary)}</p>',
        f'<div class="tiles">{tiles(rows, config, results)}</div>',
        section("Results", learned),
        metrics_sections(run, rows, config),
        section("Sources of photos", sources_section(versions, rows)),
        section("Pictures", pictures_section(run / "pictures", current)),
        section("Configuration", yaml),
        section("Versions", side_by_side([flatten(row) for row in versions], starts)),
    ]
    return document(run.name, "".join(body), html_meta(current))


def run(path: Path) -> int:
    """The program: write RUN/report.html. Raises UserError if `path` is not a run folder."""
    out = path / "report.html"
    write_atomic(out, page(path))
    print(f"the run in one page: {out}")
    return 0
