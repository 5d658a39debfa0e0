"""Every measure of every network, side by side: one command, one table.

    python -m eval compare NETWORK [NETWORK ...] [--data VOC_FOLDER] [--train SHARDS] [--val SHARDS]
        [--untrained | --only-untrained | --only-trained] [--limit N] [--seeds 5] [--aggregate-seeds] [--size N]
        [--measures knn,linear,linear_seg,cluster_seg,retrieval_seg,points] [--out FOLDER] [--skip-existing]

A network is a run folder, a checkpoint, a backbone file, weights of DINO, DenseDINO, Leopart, SwAV, MoCo, DenseCL or timm
(ViT or ResNet-50), or timm:NAME. All are measured on the same photos and scenes: the named ones, else those of the first run
among the networks (photos it was not trained on). Each is measured at the size it was trained for, or all at --size;
eval/<measure>.py describes the protocol. A run that started from weights (model.init) has a column of these beside its own.

Writes measures.json (after every measure, so that an interruption loses only one), measures.md and measures.png. Each
network's column carries the step and the hash of its weights; --skip-existing keeps the measures of these weights only.
Every network is read, and every timm:NAME looked up, before anything is measured. Imports no torch until the arguments, the
networks' paths and the data are checked.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from eval.masks import check_scenes
from eval.provenance import Weights, weights_of
from eval.tables import (
    MEASURE_ROWS,
    mean_over_seeds,
    measure_markdown,
    measure_notes,
    measure_rows,
    measure_table,
    read_object,
    render_table,
)
from eval.target import MEASURES, EvalSpec, EvalTarget
from runtime.config import TIMM
from runtime.errors import UserError
from runtime.files import refusal, write_atomic

if TYPE_CHECKING:
    from model.backbone import Backbone

ON_PHOTOS = {"knn", "linear"}  # the other measures are taken on scenes
NO_PHOTOS = "no photos (--train SHARDS --val SHARDS, or a run among the networks)"
NO_CLASSES = "these shards have no classes"
NO_SCENES = "no scenes to segment (--data FOLDER, or eval.voc in the config)"


def run(
    paths: Sequence[str],
    *,
    measures: Sequence[str] = MEASURES,
    train: str | None = None,
    val: str | None = None,
    data: str | None = None,
    palette: str | None = None,
    untrained: bool = False,
    only_untrained: bool = False,
    only_trained: bool = False,
    limit: int | None = None,
    size: int | None = None,
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
    weights = [weights_of(target.path) for target in targets]
    source.ignore_classes(ignore_class)
    spec = EvalSpec(source, train, val, data or source.place("eval.voc"), palette, limit, seeds, workers, size)
    skipped = check_data(spec, measures)
    folder = out or source.run or Path("evaluation")
    check_writable(folder)

    stages = (True,) if only_untrained else (False, True) if untrained else (False,)
    networks, columns = load_networks(list(paths), targets, weights, stages, size, starts=not only_trained)
    settings = asdict(source.settings)  # its `limit` belongs to k-NN while training and is overwritten
    settings |= dict(bank=train, val=val, data=spec.data, palette=palette, limit=limit, seeds=seeds)
    settings |= {"source": str(source.path)} | ({"size": size} if size else {})
    results: dict[str, Any] = {"networks": columns, "measures": measures, "skipped": skipped, "settings": settings}
    if skip_existing:
        reuse_measures(folder, columns, settings)

    def write_results() -> None:
        results["time"] = datetime.now(UTC).isoformat(timespec="seconds")
        results["seconds"] = round(time.perf_counter() - start, 1)
        if aggregate_seeds:
            results["means"] = mean_over_seeds(columns)
        write(folder, results)

    wanted = [m for m in measures if m not in skipped and any(m not in c.get("skipped", {}) for c in columns.values())]
    measure_networks(networks, columns, spec, wanted, write_results)
    if wanted:
        write_results()  # those that were kept too
        Console().print(measure_table(results))
    for note in measure_notes(results):
        print(note)
    if not wanted:
        print("nothing was measured")
        return 0
    print(f"written to {folder}/measures.json, .md and .png")
    return 0


def check_data(spec: EvalSpec, measures: Sequence[str]) -> dict[str, str]:
    """The measures that the data does not allow, and why. Raises UserError if a data set cannot be used."""
    skipped: dict[str, str] = {}
    on_photos = [measure for measure in measures if measure in ON_PHOTOS]
    on_scenes = [measure for measure in measures if measure not in ON_PHOTOS]
    if on_photos:
        if not spec.source.run and not spec.train:
            if spec.val:
                raise UserError("--val without --train: name the shards to train on, too")
            skipped |= dict.fromkeys(on_photos, NO_PHOTOS)
        elif spec.source.photo_sets(spec.train, spec.val, spec.limit) is None:
            skipped |= dict.fromkeys(on_photos, NO_CLASSES)
    if on_scenes and spec.data is None:
        skipped |= dict.fromkeys(on_scenes, NO_SCENES)
    elif on_scenes and spec.data is not None:
        check_scenes(spec.data, palette_file=spec.palette)
    return skipped


def check_writable(folder: Path) -> None:
    """Raises UserError if files cannot be written to the folder, or if it cannot be made."""
    if reason := refusal(folder):
        raise UserError(f"--out {folder}: nothing can be written there ({reason})")


def load_networks(
    paths: list[str],
    targets: list[EvalTarget],
    weights: list[Weights],
    stages: Sequence[bool],
    size: int | None,
    starts: bool,
) -> tuple[dict[str, "Backbone"], dict[str, dict[str, Any]]]:
    """({name: network on the CPU}, {name: its column of measures.json}): every file is read before anything is measured, and
    names of timm's come first, because a network connection may be missing. stages: of each run, the network before training
    (True), after it (False), or both. starts: also the weights that a run started from, if they are still there."""
    from eval.datasets import scene_sizes
    from eval.features import check_size
    from eval.measures import NEEDS_VIT
    from model.vit import ViT
    from model.weights.timm_hub import check_timm

    for path in paths:
        if path.startswith(TIMM):
            check_timm(path.removeprefix(TIMM))
    networks: dict[str, Backbone] = {}
    columns: dict[str, dict[str, Any]] = {}
    for label, target, stamp in zip(short_names(paths), targets, weights, strict=True):
        if False not in stages:
            target.check_untrained(True)
        by_itself = starts and target.start is not None and True not in stages
        for at_start in (*stages, *[True] * by_itself) if target.run else (False,):
            before = f"start: {target.start}" if target.start else "untrained"
            name = f"{label}, {before}" if at_start else label
            try:
                network = target.network(at_start).cpu()
            except UserError as error:
                if not (at_start and by_itself):
                    raise
                print(f"{name}: left out, the weights cannot be loaded ({error})")
                continue
            twin = next((n for n in networks if same_weights(networks[n], network)), None) if at_start else None
            if twin:  # two methods with the same seed are initialized alike
                print(f"{name}: the same network as {twin}")
                continue
            networks[name] = network
            check_size(network, scene_sizes(network.image_size, size)[0])
            columns[name] = {"path": str(target.path), "untrained": at_start, "image_size": size or network.image_size}
            if not isinstance(network, ViT):
                columns[name]["skipped"] = dict(NEEDS_VIT)
            columns[name]["weights"] = {"step": 0, "sha256": hash_of(network)} if at_start else stamp
    return networks, columns


def measure_networks(
    networks: dict[str, "Backbone"],
    columns: dict[str, dict[str, Any]],
    spec: EvalSpec,
    measures: Sequence[str],
    write_results: Callable[[], None],
) -> None:
    """Add each measure that is missing to each column, and write the results after each. Prints where it is."""
    from eval.measures import MEASURES
    from runtime.distributed import best_device

    missing = [
        (n, m)
        for n in networks
        for m in measures
        if f"{m}_seconds" not in columns[n] and m not in columns[n].get("skipped", {})
    ]
    for name, network in networks.items():
        column = columns[name]
        network.to(best_device())
        for measure in measures:
            if (name, measure) not in missing:
                continue
            start = time.perf_counter()
            print(f"{missing.index((name, measure)) + 1} of {len(missing)}: {measure} of {name} …", flush=True)
            values = MEASURES[measure](network, spec)
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


def reuse_measures(folder: Path, columns: dict[str, dict[str, Any]], settings: dict[str, Any]) -> None:
    """Add the measures of measures.json to the columns of the same weights, if it was written with the same settings."""
    before = read_object(folder / "measures.json")
    try:
        same = before["settings"] == json.loads(json.dumps(settings))
        for name, column in before["networks"].items() if same else ():
            if name in columns and columns[name].items() <= column.items():
                columns[name] |= column
    except (KeyError, TypeError, AttributeError):  # cut off, or of another version: measure again
        return


def same_weights(one: "Backbone", other: "Backbone") -> bool:
    """Whether two networks have the same weights."""
    import torch

    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def hash_of(network: "Backbone") -> str:
    """sha256 over a network's tensors in the order of their names: of one that is in no file."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def short_names(paths: list[str]) -> list[str]:
    """A name for each network: the last part of its path if that is unique, else the path."""
    short = [path if path.startswith(TIMM) else Path(path).stem or path for path in paths]
    return [name if short.count(name) == 1 else path for name, path in zip(short, paths, strict=True)]
