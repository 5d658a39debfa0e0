"""What the end of a run needs, opened before its first step: photos and classes of k-NN, scenes, the files it writes.

Training takes hours or days, and the report comes after it. Whatever would stop the report stops the run here, in the first
seconds and before torch is loaded; what the report can do without is printed.
"""

import os
from pathlib import Path

from eval.masks import check_scenes
from eval.target import check_classes, check_ignored, is_part, open_shards
from pipeline.mixture import AnyShards
from pipeline.plan import Plan
from runtime.config import Config, is_path, missing
from runtime.errors import UserError
from runtime.files import refusal

FILES = (
    "backbone.safetensors", "config.yaml", "metrics.jsonl", "versions.jsonl", "results.json", "report.html", "loggers.json",
)  # fmt: skip
FOLDERS = ("checkpoints", "measuring", "tensorboard", "pictures")


def check(config: Config, shards: AnyShards, plan: Plan, folder: Path, resuming: bool) -> list[str]:
    """Messages on what the report of a run will lack, empty ones among them.

    shards, plan: what it trains on. folder: the run's. resuming: whether there is a checkpoint, so that model.init is only
    needed for the untrained network of the report. Raises UserError for what would stop the report. Writes nothing.
    """
    check_writable(folder)
    if config.eval.voc:
        check_scenes(config.eval.voc, palette_option=False)
    return [check_weights(config.model.init, resuming), check_photos(config, shards, plan)]


def check_writable(folder: Path) -> None:
    """Raises UserError if the run folder, or what a run writes in it, cannot be written to."""
    if reason := refusal(folder):
        raise UserError(f"{folder}: cannot write there ({reason}); name another folder with RUN=another/folder")
    for inside in (folder / name for name in FOLDERS):
        if reason := refusal(inside):
            what = "checkpoint" if inside.name == "checkpoints" else "file"
            raise UserError(f"{inside}: no {what} can be written ({reason.removeprefix(f'{inside}: ')})")
    for file in (folder / name for name in FILES):
        if file.is_dir() or (file.exists() and not os.access(file, os.W_OK)):
            reason = "it is a folder" if file.is_dir() else "Permission denied"
            raise UserError(f"{file}: the run cannot write this file ({reason}); move it away")


def check_weights(init: str | None, resuming: bool) -> str:
    """A message if model.init is needed for the report only and does not exist. Raises UserError if a new run needs it."""
    problem = missing(init, "file or folder") if is_path(init) else ""
    if problem and not resuming:
        raise UserError(f"model.init: {init}: {problem}")
    return f"the report will have no untrained network: model.init: {init}: {problem}" if problem else ""


def check_photos(config: Config, shards: AnyShards, plan: Plan) -> str:
    """A message if the report will have no k-NN. Raises UserError as `why_no_knn`, and if `eval.every` names k-NN."""
    reason = why_no_knn(config, shards, plan)
    if reason and config.eval.names_measures and "knn" in config.eval.measures:
        raise UserError(f"eval.every.knn: no k-NN is possible: {reason}; eval.every.knn=0 trains without it")
    return reason and f"the report will have no k-NN: {reason}"


def why_no_knn(config: Config, shards: AnyShards, plan: Plan) -> str:
    """Why k-NN cannot be measured on photos that no step sees; "" if it can. Raises UserError if `data.val` cannot be
    opened, or if it has classes that the training shards lack."""
    val: AnyShards = shards
    if config.data.val and not is_part(config.data.val, shards):
        val = open_shards(config.data.val, config)
    elif config.data.val or not len(plan.held_out()):
        return "all photos are trained on; data.val=FOLDER names others to test on"
    if not shards.classes or not val.classes:
        return shards.incomparable or f"{(val if shards.classes else shards).folder} has no classes"
    check_ignored(shards, val, config.eval.ignore_classes)
    check_classes(shards, val, config.eval.ignore_classes, training=True)
    return ""


def is_measurable(config: Config, shards: AnyShards, plan: Plan) -> bool:
    """Whether the report can have a figure that needs labels: k-NN, or segmentation."""
    try:
        return bool(config.eval.voc) or not check_photos(config, shards, plan)
    except UserError:  # the validation shards are gone since the run began
        return False


def check_scene_size(config: Config) -> None:
    """Raises UserError if the scenes of `eval.voc` will not divide into whole patches. Imports torch."""
    from eval.datasets import scene_sizes

    size, _ = scene_sizes(config.image_size)
    if config.eval.voc and size % config.model.patch:
        raise UserError(
            f"eval.voc: scenes are measured at {size} pixels, which are not whole patches of model.patch: "
            f"{config.model.patch}; eval.voc=null trains without them"
        )
