"""Every measure of every network, side by side: one command, one table.

    python -m eval compare NETWORK [NETWORK ...] [--data VOC_FOLDER] [--train SHARDS] [--val SHARDS] [--untrained]
        [--measures knn,linear,linear_seg,cluster_seg,retrieval_seg] [--limit N] [--seeds 5] [--aggregate-seeds]
        [--out FOLDER] [--skip-existing]

A network is a run folder, a checkpoint, a backbone file, weights of DINO, DenseDINO, Leopart, MoCo-v3 or timm, or
timm:NAME. All are measured on the same photos and scenes: the named ones, else those of the first run among the networks
(photos it was not trained on). Each is measured at the size it was trained for; eval/<measure>.py describes the protocol.

Writes measures.json (after every measure, so that an interruption loses only one), measures.md and measures.png.
Imports no torch until the arguments, the networks' paths and the data are checked.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from eval.tables import MEASURE_ROWS, mean_over_seeds, measure_markdown, measure_rows, measure_table, render_table
from eval.target import MEASURES, EvalSpec, EvalTarget, best_device
from eval.voc import default_train_split, read_split
from runtime.errors import UserError
from runtime.files import refusal, write_atomic

if TYPE_CHECKING:
    from model.vit import ViT

ON_PHOTOS = {"knn", "linear"}  # the other measures are taken on scenes


def run(
    paths: Sequence[str],
    *,
    measures: Sequence[str] = MEASURES,
    train: str | None = None,
    val: str | None = None,
    data: str | None = None,
    untrained: bool = False,
    limit: int | None = None,
    seeds: int = 5,
    aggregate_seeds: bool = False,
    skip_existing: bool = False,
    out: Path | None = None,
    workers: int | None = None,
    ignore_class: Sequence[str] | None = None,
) -> int:
    """The program: measure, write, print. The options: `python -m eval compare`.

    Raises UserError before anything is measured if a network, a data set or the output folder cannot be used.
    """
    start = time.perf_counter()
    names = [str(Path(path)) for path in paths]  # runs/demo/ is runs/demo
    if len(set(names)) < len(names):
        raise UserError(f"{max(names, key=names.count)}: given more than once; name each network once")
    targets = [EvalTarget(path) for path in paths]
    source = next((target for target in targets if target.run), targets[0])
    source.ignore_classes(ignore_class)
    spec = EvalSpec(source, train, val, data or source.place("eval.voc"), limit, seeds, workers)
    measures = check_data(spec, measures)
    folder = out or source.run or Path("evaluation")
    check_writable(folder)

    networks, columns = load_networks(list(paths), targets, untrained)
    if spec.data is not None and set(measures) - ON_PHOTOS:
        from eval.datasets import voc_splits

        voc_splits(spec.data, 448)  # are all images and masks there?
    settings = asdict(source.settings)  # its `limit` belongs to k-NN while training and is overwritten
    settings |= dict(bank=train, val=val, data=spec.data, limit=limit, seeds=seeds)
    settings |= {"source": str(source.path)}
    results: dict[str, Any] = {"networks": columns, "settings": settings}
    if skip_existing:
        files = [target.path for target in targets if target.path.is_file()]
        for target in targets:
            files += (target.run / "checkpoints").glob("*.safetensors") if target.run else ()
        reuse_measures(folder, columns, settings, max((file.stat().st_mtime for file in files), default=0.0))

    def write_results() -> None:
        results["time"] = datetime.now(UTC).isoformat(timespec="seconds")
        results["seconds"] = round(time.perf_counter() - start, 1)
        if aggregate_seeds:
            results["means"] = mean_over_seeds(columns)
        write(folder, results)

    measure_networks(networks, columns, spec, measures, write_results)
    if not measure_rows(results):
        print("nothing was measured")
        return 0
    Console().print(measure_table(results))
    print(f"written to {folder}/measures.json, .md and .png")
    return 0


def check_data(spec: EvalSpec, measures: Sequence[str]) -> list[str]:
    """The measures that the data allows; prints which are skipped. Raises UserError if a data set cannot be used."""
    if ON_PHOTOS & set(measures):
        if not spec.source.run and not spec.train:
            if spec.val:
                raise UserError("--val without --train: name the shards to train on, too")
            measures = [measure for measure in measures if measure not in ON_PHOTOS]
            print(
                "k-NN and linear classification skipped: no photos "
                "(--train SHARDS --val SHARDS, or a run among the networks)"
            )
        else:
            spec.source.photo_sets(spec.train, spec.val, spec.limit)
    if spec.data is not None and set(measures) - ON_PHOTOS:
        for split in (default_train_split(spec.data), "val"):
            read_split(spec.data, split)
    return list(measures)


def check_writable(folder: Path) -> None:
    """Raises UserError if files cannot be written to the folder, or if it cannot be made."""
    if reason := refusal(folder):
        raise UserError(f"--out {folder}: nothing can be written there ({reason})")


def load_networks(
    paths: list[str], targets: list[EvalTarget], untrained: bool
) -> tuple[dict[str, "ViT"], dict[str, dict[str, Any]]]:
    """({name: network on the CPU}, {name: its column of measures.json}): every file is read before anything is measured."""
    from eval.datasets import scene_sizes
    from eval.features import check_size

    networks: dict[str, ViT] = {}
    columns: dict[str, dict[str, Any]] = {}
    for label, target in zip(short_names(paths), targets, strict=True):
        for at_start in (False, True) if untrained and target.run else (False,):
            name = f"{label}, untrained" if at_start else label
            network = target.network(at_start).cpu()
            twin = next((n for n in networks if same_weights(networks[n], network)), None) if at_start else None
            if twin:  # two methods with the same seed are initialized alike
                print(f"{name}: the same network as {twin}")
                continue
            networks[name] = network
            size, _ = scene_sizes(network.image_size)
            check_size(network, size)
            columns[name] = {"path": str(target.path), "untrained": at_start, "image_size": network.image_size}
    return networks, columns


def measure_networks(
    networks: dict[str, "ViT"],
    columns: dict[str, dict[str, Any]],
    spec: EvalSpec,
    measures: Sequence[str],
    write_results: Callable[[], None],
) -> None:
    """Add each measure that is missing to each column, and write the results after each."""
    from eval.measures import MEASURES, SKIP_REASONS

    skipped: set[str] = set()
    for name, network in networks.items():
        column = columns[name]
        network.to(best_device())
        for measure in measures:
            if f"{measure}_seconds" in column:
                continue
            start = time.perf_counter()
            values = MEASURES[measure](network, spec)
            if values is None:
                if SKIP_REASONS[measure] not in skipped:
                    print(f"{measure} skipped: {SKIP_REASONS[measure]}")
                    skipped.add(SKIP_REASONS[measure])
                continue
            spread = column.get("spread", {}) | values.pop("spread", {})
            column |= values | {"spread": spread, f"{measure}_seconds": round(time.perf_counter() - start, 1)}
            write_results()
            message = "  ".join(f"{MEASURE_ROWS[key]} {values[key]:.2f}" for key in MEASURE_ROWS if key in values)
            print(f"{name}: {message}  ({column[f'{measure}_seconds']:.0f} s)", flush=True)
        network.cpu()


def write(folder: Path, results: dict[str, Any]) -> None:
    """Write measures.json (atomically), and measures.md and .png if there is anything to show."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "measures.json", json.dumps(results, indent=1) + "\n")
    if measure_rows(results):
        (folder / "measures.md").write_text(measure_markdown(results))
        render_table(results, folder / "measures.png")


def reuse_measures(folder: Path, columns: dict[str, dict[str, Any]], settings: dict[str, Any], changed: float) -> None:
    """Add the measures of measures.json to the columns of the same networks, if it was written with the same settings and
    after `changed`, the time of the networks' newest file (seconds since 1970)."""
    file = folder / "measures.json"
    if not file.is_file() or file.stat().st_mtime < changed:
        return
    try:
        before = json.loads(file.read_text())
        same = before["settings"] == json.loads(json.dumps(settings))
        for name, column in before["networks"].items() if same else ():
            if name in columns and columns[name].items() <= column.items():
                columns[name] |= column
    except (ValueError, KeyError, TypeError, AttributeError):  # cut off, or of another version: measure again
        return


def same_weights(one: "ViT", other: "ViT") -> bool:
    """Whether two networks have the same weights."""
    import torch

    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def short_names(paths: list[str]) -> list[str]:
    """A name for each network: the last part of its path if that is unique, else the path."""
    short = [path if path.startswith("timm:") else Path(path).stem or path for path in paths]
    return [name if short.count(name) == 1 else path for name, path in zip(short, paths, strict=True)]
