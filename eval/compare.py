"""Every measure of every network, side by side: one command, one table.

    python -m eval.compare NETWORK [NETWORK ...] [--data VOC_FOLDER] [--bank SHARDS] [--val SHARDS] [--untrained]
        [--measures knn,linear,linear_seg,cluster_seg,retrieval_seg] [--limit N] [--seeds 5] [--aggregate-seeds] [--out FOLDER]
        [--skip-existing]

A network is a run folder, a checkpoint, a backbone file, weights of DINO, DenseDINO, Leopart, MoCo-v3 or timm, or
timm:NAME. All are asked about the same photos and scenes: those named, else those of the first run among the networks
(what it never trained on). Each is measured at the size it was trained for; the programs of the measures' names tell of
their protocols.

--aggregate-seeds: runs of several seeds share a column, mean (least – most); they are told by their names, which differ in nothing but
a number at the end (runs/dino-0 runs/dino-1 runs/dino-2).

Writes measures.json (after every measure: what is measured is kept), measures.md and measures.png. --skip-existing: what
measures.json has of the same networks, asked in the same way, is not measured again, unless a run has gone on since.
"""

import argparse
import json
import os
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from eval import cluster_seg, linear, linear_seg, retrieval_seg
from eval.datasets import VocSegmentation, scene_sizes, voc_splits
from eval.features import check_size, default_workers
from eval.knn import photo_knn
from eval.target import EvalTarget, best_device
from model.vit import ViT
from runtime.errors import UserError, require_positive, run_cli, suggest

ROWS = {
    "knn_top1": "k-NN top-1, [CLS]",
    "knn_top1_patches": "k-NN top-1, mean of the patch tokens",
    "linear_top1": "linear top-1, best map",
    "linear_seg_miou": "linear segmentation mIoU, last epoch",
    "linear_seg_miou_best": "linear segmentation mIoU, best epoch",
    "cluster_seg_miou_500": "500 clusters, mIoU",
    "cluster_seg_miou": "a cluster for each class, mIoU",
    "retrieval_seg_miou": "segmentation by retrieval, mIoU",
    "retrieval_seg_miou_few": "segmentation by retrieval from 1/128 of the scenes, mIoU",
}


FEW = 128  # one in so many train scenes: with all labels, the nearest pixels may be answer enough (docs/results.md)


@dataclass
class EvalSpec:
    """What all networks are asked about, and how."""

    source: EvalTarget  # whose photos, scenes and settings these are
    bank: str | None = None
    val: str | None = None
    data: str | None = None  # scenes
    limit: int | None = None
    seeds: int = 5
    workers: int | None = None

    def reading(self, items: int) -> int:
        return default_workers(items) if self.workers is None else self.workers


def measure_knn(network: ViT, asked: EvalSpec) -> dict[str, Any] | None:
    photos = asked.source.photos(network.image_size, asked.bank, asked.val, asked.limit)
    if photos is None:
        return None
    bank, val = photos
    settings = asked.source.settings
    how: dict[str, Any] = dict(k=settings.k, temperature=settings.temperature, workers=asked.reading(len(bank)))
    top = photo_knn(network, bank, val, ("cls", "patches"), **how, show=True)
    return {"knn_top1": top["cls"][0], "knn_top1_patches": top["patches"][0]}


def measure_linear(network: ViT, asked: EvalSpec) -> dict[str, Any] | None:
    photos = asked.source.photos(network.image_size, asked.bank, asked.val, asked.limit)
    if photos is None:
        return None
    protocol = linear.Protocol.for_views(network.image_size)
    workers = asked.reading(len(photos[0]) * (protocol.epochs if protocol.augment else 1))
    best = linear.best_of(linear.fit(network, *photos, protocol, workers=workers, show=True))
    return {"linear_top1": best.top1, "linear_features": best.features, "linear_rate": best.rate}


def measure_linear_seg(network: ViT, asked: EvalSpec) -> dict[str, Any] | None:
    if asked.data is None:
        return None
    settings = asked.source.settings
    protocol = linear_seg.Protocol.for_views(network.image_size)
    protocol = replace(protocol, epochs=settings.seg_epochs, lr=settings.seg_lr)
    train, val = linear_seg.scenes_of(asked.data, protocol, None, "val")
    workers = asked.reading(len(train) * (protocol.epochs if protocol.augment else 1))
    history = linear_seg.fit(network, train, val, protocol, workers=workers, show=True)
    last, best = history[-1], linear_seg.best_of(history)
    figures = {"linear_seg_miou": last.miou, "linear_seg_miou_best": best.miou}
    return figures | {"linear_seg_miou_present": last.miou_present, "linear_seg_iou": last.iou}


def measure_cluster_seg(network: ViT, asked: EvalSpec) -> dict[str, Any] | None:
    if asked.data is None:
        return None
    size, map_size = scene_sizes(network.image_size)
    scenes = VocSegmentation(asked.data, "val", size)
    how: dict[str, Any] = dict(seeds=asked.seeds, workers=asked.reading(len(scenes)))
    many, few = cluster_seg.measure(network, scenes, map_size, [500, scenes.classes], **how, show=True)
    figures = {"cluster_seg_miou_500": many.miou, "cluster_seg_miou": few.miou}
    return figures | {"spread": {"cluster_seg_miou_500": many.spread, "cluster_seg_miou": few.spread}}


def measure_retrieval_seg(network: ViT, asked: EvalSpec) -> dict[str, Any] | None:
    if asked.data is None:
        return None
    train, val = voc_splits(asked.data, scene_sizes(network.image_size)[0])
    score = retrieval_seg.measure(network, train, val, workers=asked.reading(len(train)), show=True)
    few = train.few(max(1, len(train) // FEW))
    from_few = retrieval_seg.measure(network, few, val, workers=asked.reading(len(val)), show=True)
    figures = {"retrieval_seg_miou": score.miou, "retrieval_seg_miou_present": score.miou_present}
    figures |= {"retrieval_seg_miou_few": from_few.miou, "retrieval_seg_few": len(few)}
    return figures | {"retrieval_seg_iou": score.iou}


MEASURES: dict[str, Callable[[ViT, EvalSpec], dict[str, Any] | None]] = {
    "knn": measure_knn,
    "linear": measure_linear,
    "linear_seg": measure_linear_seg,
    "cluster_seg": measure_cluster_seg,
    "retrieval_seg": measure_retrieval_seg,
}
SKIP_REASONS = {
    "knn": "these shards have no classes",
    "linear": "these shards have no classes",
    "linear_seg": "no scenes to segment (--data FOLDER, or eval.voc in the config)",
}
SKIP_REASONS |= dict.fromkeys(("cluster_seg", "retrieval_seg"), SKIP_REASONS["linear_seg"])


# ------------------------------------------------------------------------------------------------------------ the table


def means_of(networks: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Networks whose names differ in nothing but a number at the end as one: the mean of each figure that all of them
    have; spread: least and most."""
    alike: dict[str, list[dict[str, Any]]] = {}
    for name, figures in networks.items():
        alike.setdefault(re.sub(r"(?<=\D)[-_.]?\d+(?=(, untrained)?$)", "", name), []).append(figures)
    means: dict[str, dict[str, Any]] = {}
    for name, several in alike.items():
        if len(several) == 1:
            means[name] = several[0]
            continue
        values = {key: [one[key] for one in several if key in one] for key in ROWS}
        values = {key: found for key, found in values.items() if len(found) == len(several)}
        mean = {key: statistics.fmean(found) for key, found in values.items()}
        spread = {key: (min(found), max(found)) for key, found in values.items()}
        means[name] = {"of": len(several), **mean, "spread": spread}
    return means


def columns_of(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The columns of the table by name: what --aggregate-seeds made of the networks, else the networks."""
    return results.get("means") or results["networks"]


def rows_of(results: dict[str, Any]) -> list[tuple[str, list[str], int | None]]:
    """(words, a cell for each column, which of them is the best) for each row that any column has a figure for."""
    columns = list(columns_of(results).values())
    rows = []
    for key, words in ROWS.items():
        values = [column.get(key) for column in columns]
        known = [value for value in values if value is not None]
        if not known:
            continue
        cells = ["–" if value is None else f"{value:.2f}" for value in values]
        for i, column in enumerate(columns):
            if key in column.get("spread", {}):
                low, high = column["spread"][key]
                cells[i] += f" ({low:.1f} – {high:.1f})"
        rows.append((words, cells, values.index(max(known)) if len(known) > 1 else None))
    return rows


def table_of(results: dict[str, Any]) -> Table:
    table = Table(title="frozen features, %", title_justify="left")
    table.add_column("%")
    for name in columns_of(results):
        table.add_column(escape(name), justify="right")
    for words, cells, best in rows_of(results):
        table.add_row(escape(words), *(f"[bold]{c}[/bold]" if i == best else c for i, c in enumerate(cells)))
    return table


def markdown_of(results: dict[str, Any]) -> str:
    names = list(columns_of(results))
    lines = [f"| % | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for words, cells, best in rows_of(results):
        lines.append(f"| {words} | {' | '.join(f'**{c}**' if i == best else c for i, c in enumerate(cells))} |")
    return "\n".join(lines) + "\n"


def paint(results: dict[str, Any], file: Path) -> None:
    """The table as a picture; the best of a row is bold."""
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

    rows, names = rows_of(results), list(columns_of(results))
    longest = [max(len(name), *(len(cells[i]) for _, cells, _ in rows)) for i, name in enumerate(names)]
    widths = [max(len(words) for words, _, _ in rows), *(max(8, n) for n in longest)]  # letters
    figure = Figure(figsize=(0.095 * sum(widths) + 0.35 * len(widths), 0.34 * (len(rows) + 1) + 0.2), dpi=150)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    shares = [(width + 3) / sum(w + 3 for w in widths) for width in widths]
    text = [[words, *cells] for words, cells, _ in rows]
    table = axes.table(text, colLabels=["%", *names], colWidths=shares, bbox=Bbox.from_bounds(0.01, 0.02, 0.98, 0.96))
    table.auto_set_font_size(False)
    table.set_fontsize(10)
    for (row, column), cell in table.get_celld().items():
        cell.visible_edges = "B" if row else "T" + "B"
        cell.set_edgecolor("#444444" if row in (0, len(rows)) else "#cccccc")
        cell.set_text_props(ha="left" if column == 0 else "right")
        if row == 0 or (column and rows[row - 1][2] == column - 1):
            cell.set_text_props(weight="bold")
    figure.savefig(file)


def write(folder: Path, results: dict[str, Any]) -> None:
    """measures.json, at every moment whole; measures.md and .png where there is a figure to show."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".measures.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(temporary, folder / "measures.json")
    if rows_of(results):
        (folder / "measures.md").write_text(markdown_of(results))
        paint(results, folder / "measures.png")


def measured_before(folder: Path, about: dict[str, dict[str, Any]], settings: dict[str, Any], changed: float) -> None:
    """Add to what is known `about` each network what measures.json says of it, where it was asked in the same way, and since
    the networks' files `changed`."""
    file = folder / "measures.json"
    if not file.is_file() or file.stat().st_mtime < changed:
        return
    try:
        before = json.loads(file.read_text())
        same = before["settings"] == json.loads(json.dumps(settings))
        for name, column in before["networks"].items() if same else ():
            if name in about and about[name].items() <= column.items():
                about[name] |= column
    except (ValueError, KeyError, TypeError, AttributeError):  # cut off, or of another version: measured again
        return


def alike(one: ViT, other: ViT) -> bool:
    """Whether two networks have the same weights."""
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def labels_of(paths: list[str]) -> list[str]:
    """A short name for each network: the last part of its path where that is no other's."""
    short = [path if path.startswith("timm:") else Path(path).stem or path for path in paths]
    return [name if short.count(name) == 1 else path for name, path in zip(short, paths, strict=True)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m eval.compare", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("networks", nargs="+", metavar="NETWORK", help="see above")
    parser.add_argument("--bank", help="shards that vote and are trained on (default: the first run's)")
    parser.add_argument("--val", help="shards asked about (default: the first run's data.val, else what it held out)")
    parser.add_argument("--data", help="scenes in Pascal VOC's layout (default: the first run's eval.voc)")
    parser.add_argument("--measures", help=f"some of {','.join(MEASURES)} (default: all)")
    parser.add_argument("--untrained", action="store_true", help="each run's network before training beside it")
    parser.add_argument("--limit", type=int, help="at most so many photos of each set, evenly spread")
    parser.add_argument("--seeds", type=int, default=5, help="of the clusters (default: 5)")
    parser.add_argument(
        "--aggregate-seeds", action="store_true", help="one column for runs whose names differ in a number (seeds)"
    )
    parser.add_argument("--skip-existing", action="store_true", help="measure only what was not")
    parser.add_argument("--out", type=Path, help="folder for the files (default: the first run's, else evaluation/)")
    parser.add_argument("--workers", type=int, help="reading processes (default: by the number of photos)")
    args = parser.parse_args(argv)

    began = time.perf_counter()
    chosen = args.measures.split(",") if args.measures else list(MEASURES)
    for word in chosen:
        if word not in MEASURES:
            raise UserError(f"--measures {word}: one of {', '.join(MEASURES)}{suggest(word, MEASURES)}")
    require_positive(args, "limit", "seeds")
    named = [str(Path(path)) for path in args.networks]  # runs/demo/ is runs/demo
    if len(set(named)) < len(named):
        raise UserError(f"{max(named, key=named.count)}: named twice")
    subjects = [EvalTarget(path) for path in args.networks]
    source = next((subject for subject in subjects if subject.run), subjects[0])
    data = args.data or source.settings.voc
    asked = EvalSpec(source, args.bank, args.val, data, args.limit, args.seeds, args.workers)
    if not source.run and not args.bank and {"knn", "linear"} & set(chosen):
        if args.val:
            raise UserError("--val without --bank: which shards vote, and are trained on?")
        chosen = [word for word in chosen if word not in ("knn", "linear")]
        print(
            "k-NN and linear classification skipped: no photos (--bank SHARDS --val SHARDS, or a run among the networks)"
        )
    networks: dict[str, ViT] = {}  # every file is read before anything is measured
    about: dict[str, dict[str, Any]] = {}
    for label, subject in zip(labels_of(args.networks), subjects, strict=True):
        for untrained in (False, True) if args.untrained and subject.run else (False,):
            name = f"{label}, untrained" if untrained else label
            network = subject.network(untrained).cpu()
            if untrained and (twin := next((n for n in networks if alike(networks[n], network)), None)):
                print(f"{name}: the same network as {twin}")  # two methods of one seed begin alike
                continue
            networks[name] = network
            size, _ = scene_sizes(networks[name].image_size)
            check_size(networks[name], size)
            about[name] = {"path": str(subject.path), "untrained": untrained, "image_size": networks[name].image_size}
    if data is not None and set(chosen) - {"knn", "linear"}:
        voc_splits(data, 448)
    folder = args.out or source.run or Path("evaluation")
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):  # told now, not after the first measure
        raise UserError(f"--out {folder}: {place} is no folder that can be written to")

    settings = asdict(source.settings)  # its `limit` is that of k-NN while training, and not asked here
    settings |= dict(bank=args.bank, val=args.val, data=data, limit=args.limit, seeds=args.seeds)
    settings |= {"source": str(source.path)}
    results: dict[str, Any] = {"networks": about, "settings": settings}
    if args.skip_existing:
        files = [subject.path for subject in subjects if subject.path.is_file()]
        for subject in subjects:
            files += (subject.run / "checkpoints").glob("*.safetensors") if subject.run else ()
        measured_before(folder, about, settings, max((file.stat().st_mtime for file in files), default=0.0))
    told: set[str] = set()
    for label, network in networks.items():
        column = about[label]
        network.to(best_device())
        for word in chosen:
            if f"{word}_seconds" in column:
                continue
            start = time.perf_counter()
            figures = MEASURES[word](network, asked)
            if figures is None:
                if SKIP_REASONS[word] not in told:
                    print(f"{word} skipped: {SKIP_REASONS[word]}")
                    told.add(SKIP_REASONS[word])
                continue
            spread = column.get("spread", {}) | figures.pop("spread", {})
            column |= figures | {"spread": spread, f"{word}_seconds": round(time.perf_counter() - start, 1)}
            results |= {"time": datetime.now(UTC).isoformat(timespec="seconds")}
            results |= {"seconds": round(time.perf_counter() - began, 1)}
            if args.aggregate_seeds:
                results |= {"means": means_of(about)}
            write(folder, results)
            shown = "  ".join(f"{ROWS[key]} {figures[key]:.2f}" for key in ROWS if key in figures)
            print(f"{label}: {shown}  ({column[f'{word}_seconds']:.0f} s)", flush=True)
        network.cpu()
    if not rows_of(results):
        print("nothing was measured")
        return 0
    Console().print(table_of(results))
    print(f"written to {folder}/measures.json, .md and .png")
    return 0


if __name__ == "__main__":
    run_cli(main)
