"""Tables of results, without torch: results.json of one run, measures.json of several networks.

Both files keep percentages. A table of measures has one row per measure and one column per network, or per group of
seeds.
"""

import json
import re
import statistics
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from eval.provenance import png_text
from eval.target import MEASURES

RESULT_ROWS = {  # of results.json
    "knn_top1": "k-NN top-1, [CLS]",
    "knn_top1_patches": "k-NN top-1, mean of the patch tokens",
    "miou": "mIoU, linear classifier on patch tokens",
}
RESULT_COLUMNS = ("trained", "untrained", "raw pixels", "chance")  # "untrained" may have started from weights
MEASURE_ROWS = {  # of measures.json
    "knn_top1": "k-NN top-1, [CLS]",
    "knn_top1_patches": "k-NN top-1, mean of the patch tokens",
    "linear_top1": "linear top-1, best probe",
    "linear_seg_miou": "linear segmentation mIoU, last epoch",
    "linear_seg_miou_best": "linear segmentation mIoU, best epoch",
    "cluster_seg_miou_500": "500 clusters, mIoU",
    "cluster_seg_miou": "one cluster per class, mIoU",
    "retrieval_seg_miou": "segmentation by retrieval, mIoU",
    "retrieval_seg_miou_few": "segmentation by retrieval from 1/128 of the scenes, mIoU",
    "points_reference_large": "reference token at a point on a large thing, k-NN",
    "points_patch_large": "patch token at a point on a large thing, k-NN",
    "points_reference_small": "reference token at a point on a small thing, k-NN",
    "points_patch_small": "patch token at a point on a small thing, k-NN",
}

NOT_YET = "not yet"  # a measure that was not taken; what cannot be measured has no row

Results = dict[str, Any]  # the object of results.json or measures.json
Row = tuple[str, list[str], int | None]  # (label, one cell per column, index of the best cell)


def read_object(path: Path) -> Results:
    """The object in a .json file; empty if the file is missing, cut off, or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else {}
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


# ---------------------------------------------------------------------------------------------------------- results.json


def result_columns(results: Results) -> list[str]:
    """The headings of results.json's table: the weights that the run started from, if they were not random, by name."""
    return [f"start: {results['start']}" if results.get("start") and c == "untrained" else c for c in RESULT_COLUMNS]


def result_rows(results: Results) -> list[tuple[str, list[str]]]:
    """(label, cells of RESULT_COLUMNS) of results.json. What could not be measured has no row. Chance is the most frequent
    class of the train set, given to every photo or pixel.

    Raises KeyError, TypeError or AttributeError if the results are of another version.
    """
    rows = []
    for key, label in RESULT_ROWS.items():
        others = (results[name].get(key) for name in ("untrained", "pixels", "chance"))
        values = (results[key], *others)
        if any(value is not None for value in values):
            rows.append((label, ["–" if value is None else f"{value:.2f}" for value in values]))
    return rows


def result_notes(results: Results) -> list[str]:
    """What results.json says besides its table: what cannot be measured and why, a limit, and the effective rank."""
    skipped = results.get("skipped")
    notes = [f"{what} cannot be measured: {why}" for what, why in (skipped or {}).items()]
    if limit := (results.get("asked") or {}).get("limit"):
        notes.append(f"k-NN with at most {limit:,} photos of each set (--limit {limit}), not with all")
    rank, untrained = results.get("effective_rank"), (results.get("untrained") or {}).get("effective_rank")
    if rank is not None and untrained is not None:
        of = results["settings"]["effective_rank"]
        before = f"at the start ({results['start']})" if results.get("start") else "untrained"
        notes.append(
            f"Effective rank of [CLS]: {rank:.1f} trained, {untrained:.1f} {before}, of at most "
            f"{min(of['width'], of['photos'] - 1)} ({of['photos']} photos; 0 is a collapse)"
        )
    return notes


def result_table(results: Results, title: str) -> Table | None:
    """results.json for the terminal; None if no row was measured. Raises as `result_rows`."""
    rows = result_rows(results)
    if not rows:
        return None
    table = Table(title=escape(title), title_justify="left")
    table.add_column("%")
    for heading in result_columns(results):
        table.add_column(escape(heading), justify="right")
    for label, cells in rows:
        table.add_row(escape(label), *cells)
    return table


# --------------------------------------------------------------------------------------------------------- measures.json


def mean_over_seeds(networks: dict[str, Results]) -> dict[str, Results]:
    """Networks whose names differ only in a number at the end, as one: the mean of each measure that all of them have;
    "of": how many they are, "spread": lowest and highest."""
    groups: dict[str, list[Results]] = {}
    for name, measures in networks.items():
        groups.setdefault(re.sub(r"(?<=\D)[-_.]?\d+(?=(, (untrained|start: .*))?$)", "", name), []).append(measures)
    means: dict[str, Results] = {}
    for name, group in groups.items():
        if len(group) == 1:
            means[name] = group[0]
            continue
        values = {key: [measures[key] for measures in group if key in measures] for key in MEASURE_ROWS}
        values = {key: scores for key, scores in values.items() if len(scores) == len(group)}
        mean = {key: statistics.fmean(scores) for key, scores in values.items()}
        spread = {key: (min(scores), max(scores)) for key, scores in values.items()}
        means[name] = {"of": len(group), **mean, "spread": spread}
    return means


def measure_columns(results: Results) -> dict[str, Results]:
    """The columns of the table by name: the means over seeds if there are any, else the networks."""
    return results.get("means") or results["networks"]


def measure_of(key: str) -> str:
    """The measure that gives a figure: 'linear_seg' for 'linear_seg_miou_best'."""
    return max((measure for measure in MEASURES if key.startswith(measure)), key=len)


def measure_rows(results: Results) -> list[Row]:
    """A row for each figure that at least one column has, or that is still to be measured."""
    columns = list(measure_columns(results).values())
    expected = set(results.get("measures", ())) - set(results.get("skipped", {}))
    rows: list[Row] = []
    for key, label in MEASURE_ROWS.items():
        values = [column.get(key) for column in columns]
        known = [value for value in values if value is not None]
        everywhere = all(_is_done(column, measure_of(key)) for column in results["networks"].values())
        if not known and (measure_of(key) not in expected or everywhere):
            continue
        missing = ["–" if _is_done(column, measure_of(key)) else NOT_YET for column in columns]
        cells = [none if value is None else f"{value:.2f}" for value, none in zip(values, missing, strict=True)]
        for i, column in enumerate(columns):
            if key in column.get("spread", {}):
                low, high = column["spread"][key]
                cells[i] += f" ({low:.1f} – {high:.1f})"
        rows.append((label, cells, values.index(max(known)) if len(known) > 1 else None))
    return rows


def _is_done(column: Results, measure: str) -> bool:
    """Whether the measure was taken, though it may lack some figures, or cannot be taken of this network."""
    return f"{measure}_seconds" in column or measure in column.get("skipped", {})


def measure_notes(results: Results) -> list[str]:
    """What measures.json says besides its table: which measures cannot be taken, and why."""
    reasons: dict[str, list[str]] = {}
    for measure, why in results.get("skipped", {}).items():
        reasons.setdefault(why, []).append(measure)
    for name, column in results.get("networks", {}).items():
        for measure, why in column.get("skipped", {}).items():
            if measure in results.get("measures", ()) and measure not in results.get("skipped", {}):
                reasons.setdefault(f"{name}: {why}", []).append(measure)
    return [f"{', '.join(measures)} cannot be measured: {why}" for why, measures in reasons.items()]


def measure_table(results: Results) -> Table:
    """measures.json for the terminal; the best value of a row is bold."""
    table = Table(title="frozen features, %", title_justify="left")
    table.add_column("%")
    for name in measure_columns(results):
        table.add_column(escape(name), justify="right")
    for label, cells, best in measure_rows(results):
        table.add_row(escape(label), *(f"[bold]{c}[/bold]" if i == best else c for i, c in enumerate(cells)))
    return table


def measure_markdown(results: Results) -> str:
    """measures.json as a Markdown table; the best value of a row is bold."""
    names = list(measure_columns(results))
    lines = [f"| % | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for label, cells, best in measure_rows(results):
        lines.append(f"| {label} | {' | '.join(f'**{c}**' if i == best else c for i, c in enumerate(cells))} |")
    return "\n".join([*lines, *(f"\n{note}" for note in measure_notes(results))]) + "\n"


def render_table(results: Results, file: Path) -> None:
    """measures.json as a picture; the best value of a row is bold."""
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

    rows, names = measure_rows(results), list(measure_columns(results))
    longest = [max(len(name), *(len(cells[i]) for _, cells, _ in rows)) for i, name in enumerate(names)]
    widths = [max(len(label) for label, _, _ in rows), *(max(8, n) for n in longest)]  # letters
    figure = Figure(figsize=(0.095 * sum(widths) + 0.35 * len(widths), 0.34 * (len(rows) + 1) + 0.2), dpi=150)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    shares = [(width + 3) / sum(w + 3 for w in widths) for width in widths]
    text = [[label, *cells] for label, cells, _ in rows]
    table = axes.table(text, colLabels=["%", *names], colWidths=shares, bbox=Bbox.from_bounds(0.01, 0.02, 0.98, 0.96))
    table.auto_set_font_size(False)
    table.set_fontsize(10)
    for (row, column), cell in table.get_celld().items():
        cell.visible_edges = "B" if row else "T" + "B"
        cell.set_edgecolor("#444444" if row in (0, len(rows)) else "#cccccc")
        cell.set_text_props(ha="left" if column == 0 else "right")
        if row == 0 or (column and rows[row - 1][2] == column - 1):
            cell.set_text_props(weight="bold")
    stamps = [column["weights"] for column in results["networks"].values() if "weights" in column]
    figure.savefig(file, metadata=png_text(stamps))
