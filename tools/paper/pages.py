"""A table's results: collected from its runs, printed, and written as JSON, Markdown and a picture."""

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table as Printed

from eval.tables import MEASURE_ROWS, measure_of, read_object
from runtime.errors import UserError, plural
from runtime.files import atomic_path, refusal, write_atomic
from runtime.metrics import read_jsonl, versions
from tools.paper.runs import Run, Scale, Selection
from tools.paper.tables import FIGURES, Row, Table

Results = dict[str, Any]  # the object of <table>-<scale>.json: docs/reference/formats.md
AUTHOR = "python -m tools.paper"
MARK = f"<!-- written by `{AUTHOR}`: changes in this file are lost -->"  # first line of a page
NONE = "–"
WIDTH = 160  # letters of a table that no terminal shows


# ---------------------------------------------------------------------------------------------------------- collecting


def collect(table: Table, selection: Selection, scale: Scale) -> Results:
    """The results of a table, as far as its runs have been measured."""
    runs = {row.name: selection.of_row[table.name, row.name] for row in table.rows}
    values = {name: {run.seed: _figures(run, scale) for run in own} for name, own in runs.items()}
    taken = {key for own in values.values() for column in own.values() for key in column}
    # a run may be of other tables too, and measured for them
    shown = [key for key in FIGURES if key in taken and measure_of(key) in table.measures]
    rows = []
    for row in table.rows:
        entry: Results = {"name": row.name, "label": row.label, "config": row.config or scale.config}
        entry |= {
            "words": list(row.words),
            "weights": row.weights,
            "start": row.start,
            "x": row.x,
            "paper": dict(row.paper),
        }
        entry["runs"] = [_describe(run, values[row.name][run.seed]) for run in runs[row.name]]
        entry["figures"] = {key: _spread(x) for key in FIGURES if (x := _of(values[row.name], key))}
        if row.baseline in runs:
            baseline = table.row(row.baseline)
            differences = {key: _difference(key, row, baseline, values) for key in FIGURES}
            entry |= {"baseline": row.baseline, "differences": {k: d for k, d in differences.items() if d}}
        rows.append(entry)
    all_runs = [run for row in rows for run in row["runs"]]
    return {
        "written_by": AUTHOR, "table": table.name, "scale": scale.name, "title": table.title, "source": table.source,
        "axis": table.axis, "config": scale.config, "words": scale.words, "scenes": scale.scenes,
        "figures": {key: MEASURE_ROWS[key] for key in shown},
        "left_out": selection.left_out.get(table.name, []), "rows": rows,
        "hours": round(sum(run["train_seconds"] + run["measure_seconds"] for run in all_runs) / 3600, 2),
        "complete": all(not run.missing(scale.scenes) for own in runs.values() for run in own),
        "versions": versions(), "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def _figures(run: Run, scale: Scale) -> dict[str, Any]:
    """Its measures; not those of reference tokens, if it was trained without them."""
    column = run.figures(scale.scenes)
    without = run.config is not None and not run.config.points
    return {key: x for key, x in column.items() if not (without and key.startswith("points_reference"))}


def _describe(run: Run, column: dict[str, Any]) -> Results:
    return {
        "seed": run.seed, "run": run.name, "steps": run.trained_steps(), "weights": column.get("weights"),
        "train_seconds": round(run.train_seconds(), 1),
        "measure_seconds": round(sum(s for key, s in column.items() if key.endswith("_seconds")), 1),
        "code": sorted({str(row["git"]) for row in read_jsonl(run.folder / "versions.jsonl") if "git" in row}),
        "figures": {key: column[key] for key in MEASURE_ROWS if key in column},
    }  # fmt: skip


def _of(columns: dict[int | None, dict[str, Any]], key: str) -> dict[int | None, float]:
    return {seed: column[key] for seed, column in columns.items() if key in column}


def _spread(values: dict[int | None, float]) -> Results:
    numbers = list(values.values())
    return {"mean": fmean(numbers), "low": min(numbers), "high": max(numbers), "of": len(numbers)}


def _difference(key: str, row: Row, baseline: Row, values: dict[str, dict[int | None, dict[str, Any]]]) -> Results:
    """The difference of a figure to the baseline's, seed by seed; {} if one of them has none."""
    assert row.baseline is not None
    own, other = _of(values[row.name], key), _of(values[row.baseline], key)
    if not own or not other:
        return {}
    paired = {seed: own[seed] - other[seed] for seed in own if seed in other}
    difference = _spread(paired or {None: fmean(own.values()) - fmean(other.values())})
    sign = row.sign(key, baseline)
    if sign:
        signs = [d * sign > 0 for d in paired.values()]
        difference |= {"expected": sign, "as_expected": difference["mean"] * sign > 0, "agreeing": sum(signs)}
    if key in row.paper and key in baseline.paper:
        difference["paper"] = row.paper[key] - baseline.paper[key]
    return difference


# ------------------------------------------------------------------------------------------------------ text of a table


def compared(results: Results) -> list[str]:
    """The figures that the paper has, or of which a sign is expected."""
    rows = results["rows"]
    expected = {k for row in rows for k, d in row.get("differences", {}).items() if "expected" in d or "paper" in d}
    return [key for key in results["figures"] if key in expected or any(key in row["paper"] for row in rows)]


def overview(results: Results) -> list[list[str]]:
    """Heading and rows: every figure of every row, mean (least – most)."""
    lines = [["%", *(FIGURES[key] for key in results["figures"])]]
    for row in results["rows"]:
        lines.append([row["label"], *(_number(row["figures"].get(key)) for key in results["figures"])])
    return lines


def comparison(results: Results, key: str) -> tuple[str, list[list[str]]]:
    """(title, heading and rows): a figure of the paper beside ours, and the differences to the rows' baselines."""
    labels = {row["name"]: row["label"] for row in results["rows"]}
    baselines = {row["baseline"] for row in results["rows"] if row.get("baseline")}
    several = len(baselines) > 1
    against = "the row named" if several else "".join(labels[name] for name in baselines)
    title = f"{results['figures'][key]}{f'; difference to {against}' if against else ''}"
    lines = [["%", "paper", "ours", "compared with", "paper", "ours", "sign as expected"]]
    for row in results["rows"]:
        difference = row.get("differences", {}).get(key, {})
        paper = f"{row['paper'][key]:.1f}" if key in row["paper"] else NONE
        between = f"{difference['paper']:+.1f}" if "paper" in difference else NONE
        against = labels[row["baseline"]] if row.get("baseline") else NONE
        ours = _number(row["figures"].get(key))
        lines.append([row["label"], paper, ours, against, between, _number(difference, "+"), _verdict(difference)])
    return title, lines if several else [line[:3] + line[4:] for line in lines]


def _number(spread: Results | None, sign: str = "") -> str:
    """A mean and its range; `sign` "+" writes the sign of numbers above 0 too."""
    if not spread:
        return NONE
    mean, low, high = (f"{round(spread[name], 1) + 0.0:{sign}.1f}" for name in ("mean", "low", "high"))
    return mean if spread["of"] == 1 else f"{mean} ({low} – {high})"


def _verdict(difference: Results) -> str:
    if "expected" not in difference:
        return NONE
    wanted = "+" if difference["expected"] > 0 else "−"
    seeds = f" ({difference['agreeing']} of {difference['of']} seeds)" if difference["of"] > 1 else ""
    return f"{wanted} {'yes' if difference['as_expected'] else 'NO'}{seeds}"


def markdown(results: Results, picture: str) -> str:
    def lines(cells: list[list[str]]) -> list[str]:
        rows = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in cells]
        return [rows[0], f"|---|{'---:|' * (len(cells[0]) - 1)}", *rows[1:], ""]

    seeds = max(len(row["runs"]) for row in results["rows"])
    words = f" with `{' '.join(results['words'])}`" if results["words"] else ""
    text = [MARK, f"# {results['title']}", "", results["source"], ""]
    hours = f"{results['hours']:.1f} hours of training and measuring"
    text += [f"Here: `{results['config']}`{words}, {plural(seeds, 'seed')}, {hours}.", ""]
    text += ["Figures are percent: mean (least – most) over seeds; differences are taken seed by seed.", ""]
    missing = "not every run has been trained and measured" if results["figures"] else "nothing has been measured yet"
    text += [] if results["complete"] else [f"**Not complete**: {missing}.", ""]
    text += [f"Left out: {row}" for row in results["left_out"]] + [""] * bool(results["left_out"])
    text += lines(overview(results))
    if results["figures"]:
        legend = "; ".join(f"{FIGURES[key]}: {label}" for key, label in results["figures"].items())
        text += [f"{legend}.", "", f"![{results['title']}]({picture})", ""]
    for key in compared(results):
        title, cells = comparison(results, key)
        text += [f"## {title}", "", *lines(cells)]
    git = sorted({code for row in results["rows"] for run in row["runs"] for code in run["code"]})
    versions = f"commit {', '.join(git) or 'unknown'}, torch {results['versions'].get('torch', 'unknown')}"
    text.append(f"Trained with {versions}; {results['time'][:10]}.")
    return "\n".join(text) + "\n"


def show(results: Results) -> None:
    """Print the figures that the paper has, then all."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    print(f"\n{results['title']}\n{results['source']}")
    for row in results["left_out"]:
        print(f"left out: {row}")
    for key in compared(results):
        _print(console, *comparison(results, key))
    _print(console, "all figures", overview(results))


def _print(console: Console, title: str, cells: list[list[str]]) -> None:
    table = Printed(title=escape(title), title_justify="left")
    for i, heading in enumerate(cells[0]):
        table.add_column(escape(heading), justify="right" if i else "left")
    for row in cells[1:]:
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)


# --------------------------------------------------------------------------------------------------------------- files


def names(table: str, scale: str, folder: Path) -> list[Path]:
    return [folder / f"{table}-{scale}{ending}" for ending in (".json", ".md", ".png")]


def check_writable(tables: Sequence[Table], scale: str, folder: Path) -> None:
    """Raises UserError if a table cannot be written, or if a file of its name was not written by this program."""
    if reason := refusal(folder):
        raise UserError(f"--out {folder}: nothing can be written there ({reason})")
    for path in (path for table in tables for path in names(table.name, scale, folder)):
        if path.exists() and not _is_ours(path):
            raise UserError(
                f"{path}: this file was not written by `{AUTHOR}`, so it is not replaced; move it, or name another --out"
            )


def _is_ours(path: Path) -> bool:
    if not path.is_file():
        return False
    if path.suffix == ".json":
        return read_object(path).get("written_by") == AUTHOR
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8", errors="replace").startswith(MARK)
    from PIL import Image

    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return picture.info.get("Software") == AUTHOR
    except (OSError, SyntaxError):
        return False


def write(results: Results, folder: Path) -> None:
    """Write the table's three files; without a figure there is no picture."""
    data, page, picture = names(results["table"], results["scale"], folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(data, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    write_atomic(page, markdown(results, picture.name))
    if results["figures"]:
        draw(results, picture)


def draw(results: Results, file: Path) -> None:
    """A panel for each figure: seeds as dots, their mean as a bar or a line, the paper's figure as a diamond."""
    from matplotlib.figure import Figure

    rows, keys = results["rows"], list(results["figures"])
    curves = bool(results["axis"]) and all(row["x"] is not None for row in rows)
    across = min(4, len(keys))
    down = ceil(len(keys) / across)
    height = 2.6 if curves else 1.0 + 0.3 * len(rows)
    figure = Figure(figsize=(3.1 * across + 1.4, height * down + 0.5), dpi=130, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    for i, key in enumerate(keys):
        axes = panels[i // across][i % across]
        places = [row["x"] for row in rows] if curves else list(range(len(rows)))
        for place, row in zip(places, rows, strict=True):
            seeds = [run["figures"][key] for run in row["runs"] if key in run["figures"]]
            ticks = ([place] * len(seeds), seeds) if curves else (seeds, [place] * len(seeds))
            axes.plot(*ticks, "o", color="#0072b2", alpha=0.6, markersize=4, label="seeds" if row is rows[0] else "")
            if seeds and not curves:
                axes.plot([fmean(seeds)], [place], "|", color="black", markersize=13)
            if key in row["paper"]:
                point = (place, row["paper"][key]) if curves else (row["paper"][key], place)
                axes.plot(*point, "D", color="#d55e00", fillstyle="none", markersize=6)
        if curves:
            mean = [(row["x"], row["figures"][key]["mean"]) for row in rows if key in row["figures"]]
            axes.plot(*zip(*mean, strict=True), color="black", linewidth=1)
            axes.set_xscale("log", base=2)
            axes.set_xticks(places, [f"{x:g}" for x in places])
            axes.set_xlabel(results["axis"], fontsize=8)
        else:
            axes.set_yticks(places, [row["label"] for row in rows] if i % across == 0 else [""] * len(rows))
            axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_title(_two_lines(results["figures"][key]), fontsize=8, loc="left")
        axes.tick_params(labelsize=8)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    for empty in panels.flat[len(keys) :]:
        empty.axis("off")
    paper = any(key in row["paper"] for row in rows for key in keys)
    mark = "line: mean" if curves else "bar: mean"
    title = f"{results['title']}, %.  Dots: seeds, {mark}{', diamond: the paper' if paper else ''}"
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    with atomic_path(file) as draft:
        figure.savefig(draft, format="png", metadata={"Software": AUTHOR})


def _two_lines(text: str) -> str:
    """A long title in two lines, broken at the blank nearest to its middle."""
    if len(text) < 30:
        return text
    blanks = [i for i, letter in enumerate(text) if letter == " "]
    middle = min(blanks, key=lambda i: abs(i - len(text) / 2))
    return f"{text[:middle]}\n{text[middle + 1 :]}"
