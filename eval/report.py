"""The main results of a run: the trained teacher, the same network before training, raw pixels without a network, and
chance: the answer that needs no picture.

    python -m eval report RUN [--data FOLDER] [--palette FILE] [--ignore-class NAME] [--limit N] [--workers N]
        [--skip-existing]

k-NN (eval/knn.py) on [CLS], on the mean of the patch tokens and on raw pixels; linear segmentation (eval/linear_seg.py)
on a folder in Pascal VOC's layout; without labels, the effective rank of [CLS] (eval/unlabeled.py). Prints one table and
writes RUN/results.json, with the step and the hash of the network. Imports no torch until the arguments and the data are
checked, and not at all with --skip-existing if the results are of this network and of these settings.
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from eval.masks import IGNORE, check_scenes, count_pixels
from eval.provenance import weights_of
from eval.tables import read_object, result_notes, result_table
from eval.target import EvalTarget, NothingToTestOn, PhotoSets
from runtime.errors import UserError
from runtime.files import write_atomic

if TYPE_CHECKING:
    from eval.datasets import VocSegmentation
    from model.backbone import Backbone

MAX_PIXEL_PHOTOS = 100_000  # in the train set, to compare raw pixels: 12 kB each

Scores = dict[str, dict[str, float | None]]  # {"trained" | "untrained" | "pixels" | "chance": {measure: percent}}


def run(
    path: str,
    *,
    data: str | None = None,
    palette: str | None = None,
    limit: int | None = None,
    workers: int | None = None,
    skip_existing: bool = False,
    ignore_class: Sequence[str] | None = None,
) -> int:
    """The program: measure, print, write results.json. The options: `python -m eval report`.

    Raises UserError if `path` is no run folder, or if its data cannot be used.
    """
    start = time.perf_counter()
    target = EvalTarget(path)
    if target.run is None:
        raise UserError(
            f"{path}: not a run folder (no config.yaml); for other networks use `python -m eval compare {path}`"
        )
    file = target.run / "results.json"
    weights = weights_of(target.path)
    target.ignore_classes(ignore_class)
    asked = settings_of(target, data, palette, limit)
    before = read_object(file)
    if skip_existing and before.get("weights") == weights:
        if before.get("asked") == asked:
            show(before, str(target.path))
            print(f"from {file}, of step {weights['step']}")
            return 0
        print(f"{file} is measured again: {difference(before.get('asked'), asked)}")
    results = measure(target, data or target.place("eval.voc"), palette, limit, workers)
    results |= {
        "start": target.start,
        "network": str(target.path),
        "weights": weights,
        "asked": asked,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - start, 1),
    }
    write_atomic(file, json.dumps(results, indent=1) + "\n")
    show(results, str(target.path))
    print(f"written to {file}")
    return 0


def settings_of(target: EvalTarget, data: str | None, palette: str | None, limit: int | None) -> dict[str, Any]:
    """What decides the results of a network: results.json keeps it, and is current only if it is the same."""
    config, settings = target.config, target.settings
    assert config is not None
    scenes = data or settings.voc
    return {
        "limit": limit,
        "data": os.path.abspath(scenes) if scenes else None,
        "palette": os.path.abspath(palette) if palette else None,
        "val": config.data.val,
        "ignore_classes": list(settings.ignore_classes),
        "k": settings.k,
        "temperature": settings.temperature,
        "seg_epochs": settings.seg_epochs,
        "seg_lr": settings.seg_lr,
    }


def difference(before: Any, asked: dict[str, Any]) -> str:
    """In words, which settings of results.json are not those asked for."""
    if not isinstance(before, dict):
        return "it does not say with which settings it was made"
    changed = [name for name in asked if before.get(name) != asked[name]]
    return ", ".join(f"{name} was {_word(before.get(name))}, now {_word(asked[name])}" for name in changed)


def _word(value: Any) -> str:
    return "none" if value in (None, []) else str(value)


def show(results: dict[str, Any], title: str) -> None:
    """Print results.json: the table, if there is anything in it, and the notes."""
    if table := result_table(results, title):
        Console().print(table)
    for note in result_notes(results):
        print(note)


def measure(
    target: EvalTarget,
    voc: str | None,
    palette: str | None = None,
    limit: int | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """The content of results.json: percentages, None for what cannot be measured, with the reasons.

    Raises UserError if the photos or the scenes cannot be used.
    """
    try:
        sets = target.photo_sets(limit=limit)
        reason = target.why_unlabeled()
    except NothingToTestOn as error:
        sets, reason = None, str(error)
    if voc is not None:
        check_scenes(voc, palette_file=palette)
    networks = {"trained": target.network()}
    try:
        networks["untrained"] = target.network(untrained=True)
    except UserError as error:  # the weights that it started from (model.init) are gone
        print(f"the untrained network is skipped: {error}")
    scores: Scores = {n: dict.fromkeys(("knn_top1", "knn_top1_patches", "miou")) for n in ("trained", "untrained")}
    scores |= {"pixels": {"knn_top1": None}, "chance": {}}
    settings: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    _measure_rank(networks, target, scores, settings)
    if sets is None:
        skipped["k-NN"] = reason
    else:
        settings["knn"] = _measure_knn(networks, target, sets, workers, scores)
    if voc is None:
        skipped["mIoU"] = "no scenes to segment (--data FOLDER, or eval.voc in the config)"
    else:
        settings["segmentation"] = _measure_segmentation(networks, target, voc, palette, workers, scores)
    trained = scores.pop("trained")
    return {**trained, **scores, "skipped": skipped, "settings": settings}


def _measure_rank(
    networks: dict[str, "Backbone"], target: EvalTarget, scores: Scores, settings: dict[str, Any]
) -> None:
    """Add the effective rank of [CLS] to the scores, and what it is of to the settings."""
    from eval.unlabeled import rank_of_photos

    shards = target.training_shards()
    if shards is None:
        return
    for name, network in networks.items():
        scores[name]["effective_rank"], photos = rank_of_photos(network, shards)
        settings["effective_rank"] = {"photos": photos, "width": network.width}


def _measure_knn(
    networks: dict[str, "Backbone"], target: EvalTarget, sets: PhotoSets, workers: int | None, scores: Scores
) -> dict[str, Any]:
    """Add k-NN to the scores; returns its settings."""
    from eval.features import default_workers
    from eval.knn import photo_knn

    train, val = sets.at_size(networks["trained"].image_size)
    vote: dict[str, Any] = dict(k=target.settings.k, temperature=target.settings.temperature)
    workers = default_workers(len(train), workers)
    kinds = {"trained": ("cls", "patches", "pixels"), "untrained": ("cls", "patches")}  # pixels: read once
    if len(train) > MAX_PIXEL_PHOTOS:
        print(f"k-NN on raw pixels skipped: more than {MAX_PIXEL_PHOTOS:,} photos")
        kinds["trained"] = kinds["untrained"]
    for name, network in networks.items():
        top = photo_knn(network, train, val, kinds[name], **vote, workers=workers, progress=True)
        scores[name] |= {"knn_top1": top["cls"][0], "knn_top1_patches": top["patches"][0]}
        if "pixels" in top:
            scores["pixels"]["knn_top1"] = top["pixels"][0]
    scores["chance"] |= dict.fromkeys(("knn_top1", "knn_top1_patches"), most_frequent_class(sets))
    return target.describe_photos(train, val) | dict(classes=len(train.classes), size=train.size) | vote


def _measure_segmentation(
    networks: dict[str, "Backbone"],
    target: EvalTarget,
    voc: str,
    palette: str | None,
    workers: int | None,
    scores: Scores,
) -> dict[str, Any]:
    """Add linear segmentation to the scores; returns its settings."""
    from eval.features import check_size, default_workers
    from eval.linear_seg import Protocol, fit, scenes_of

    trained = networks["trained"]
    protocol = Protocol.for_views(trained.image_size)
    protocol = replace(protocol, epochs=target.settings.seg_epochs, lr=target.settings.seg_lr)
    check_size(trained, protocol.size)
    train, val = scenes_of(voc, protocol, None, "val", palette=palette)
    workers = default_workers(len(train) * protocol.reads, workers)
    for name, network in networks.items():
        history = fit(network, train, val, protocol, workers=workers, progress=True)
        scores[name] |= {"miou": history[-1].miou, "miou_present": history[-1].miou_present}
        scores[name] |= {"miou_best": max(epoch.miou for epoch in history)}
    scores["chance"]["miou"] = most_frequent_label(train, val)
    data = dict(data=str(voc), train_split=train.split, scenes=len(train), val_scenes=len(val))
    return data | dict(classes=train.classes) | asdict(protocol)


def most_frequent_class(sets: PhotoSets) -> float | None:
    """Top-1 in percent of the train set's most frequent class, given to every photo; None if no photo has a class."""
    (known, known_ids), (asked, asked_ids) = (sets.train, sets.train_ids), (sets.val, sets.val_ids)
    labels, asked_labels = known.labels(known_ids), asked.labels(asked_ids)  # -1: without a class
    if not (labels >= 0).any() or not (asked_labels >= 0).any():
        return None
    name = known.classes[np.bincount(labels[labels >= 0]).argmax()]
    return 100 * float(np.mean([asked.classes[label] == name for label in asked_labels if label >= 0]))


def most_frequent_label(train: "VocSegmentation", val: "VocSegmentation") -> float:
    """mIoU in percent of the train scenes' most frequent label, given to every pixel: one class has an IoU, the others 0."""
    label = count_pixels(train.masks, train.palette)[:, :IGNORE].sum(0).argmax()
    pixels = count_pixels(val.masks, val.palette)[:, :IGNORE].sum(0)
    return 100 * float(pixels[label] / pixels.sum() / val.classes)
