"""What is evaluated: a network, the data that belongs to its run, and where the results are recorded.

Imports no torch, so that a wrong path is reported at once: `EvalTarget.network` and `PhotoSets.at_size` load it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eval.voc import IMAGE_SUFFIXES
from pipeline.plan import Plan
from pipeline.remote import is_address
from pipeline.shards import Shards
from runtime.config import Config, Eval, load_config
from runtime.errors import UserError, suggest
from runtime.metrics import append_jsonl

if TYPE_CHECKING:
    import torch

    from eval.datasets import LabeledPhotos
    from model.vit import ViT

TIMM = "timm:"  # before a model's name; the same as in model.weights, which loads torch
KINDS = ("cls", "patches", "pixels")  # features of a photo: [CLS], mean of the patch tokens, raw pixels
MEMORY_SIZE = 1_024_000  # tokens of the memory bank in segmentation by retrieval: 1.6 GB for ViT-S
PROTOCOLS = ("densedino", "leopart")  # of linear segmentation
MEASURES = ("knn", "linear", "linear_seg", "cluster_seg", "retrieval_seg")  # evaluations that `compare` runs


@dataclass(frozen=True)
class PhotoSets:
    """The photos of k-NN and linear classification: shards and sample ids [n] to train on and to test on."""

    train: Shards
    train_ids: NDArray[np.int64]
    val: Shards
    val_ids: NDArray[np.int64]

    def at_size(self, size: int) -> "tuple[LabeledPhotos, LabeledPhotos]":
        """(train, validation) photos of `size` pixels a side, both with the train set's labels."""
        from eval.datasets import LabeledPhotos

        train = LabeledPhotos(self.train, size, self.train_ids)
        return train, LabeledPhotos(self.val, size, self.val_ids, classes=self.train.classes)


class EvalTarget:
    """The network at a path, and what its run knows: the photos it was trained on and those it never saw.

    path: a run folder, a checkpoint (folder or file), a backbone file or timm:NAME. `run` and `config` are None if
    the path is in no run folder. Raises UserError if nothing is at `path`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        from_timm = str(path).startswith(TIMM)
        if not from_timm and not self.path.exists():
            siblings = self.path.parent.iterdir() if self.path.parent.is_dir() else ()
            raise UserError(f"{path}: no such run, checkpoint or backbone file{suggest(str(path), map(str, siblings))}")
        folders = [] if from_timm else [self.path, *self.path.absolute().parents[:3]]
        self.run = next((folder for folder in folders if (folder / "config.yaml").is_file()), None)
        self.config: Config | None = load_config(self.run / "config.yaml", []) if self.run else None
        self.settings = self.config.eval if self.config else Eval()

    def check_untrained(self, untrained: bool) -> None:
        """Raises UserError if the untrained network is wanted of something that is no run."""
        if untrained and self.run is None:
            raise UserError(f"{self.path}: --untrained needs a run folder, and this path is in none")

    def network(self, untrained: bool = False) -> "ViT":
        """The teacher's backbone, frozen, on the best device; `untrained`: the run's network at step 0."""
        from model.weights import load_backbone
        from runtime import distributed

        self.check_untrained(untrained)
        device = best_device()
        network = load_backbone(self.run if untrained and self.run else self.path, untrained=untrained)
        if self.config:
            network.precision = distributed.choose_precision(self.config.speed.precision, device)
        return network.to(device).eval().requires_grad_(False)

    def photo_sets(
        self, train: str | None = None, val: str | None = None, limit: int | None = None
    ) -> PhotoSets | None:
        """The shards and samples of the train and the validation set; None if the shards have no classes.

        train: shards, by default the run's training shards without the samples it holds out. val: shards, by default
        the run's `data.val`, else the samples it holds out. limit: at most this many of each, evenly spaced.
        Raises UserError if a set is missing or empty.
        """
        data = self.config.data if self.config else None
        train = train or (data.shards if data else None)
        if train is None:
            raise UserError(
                f"{self.path}: in no run folder; name the shards to train on (--train) and to test on (--val)"
            )
        train_shards = open_shards(train, self.config)
        held_out = self._held_out(train_shards)
        train_ids = np.setdiff1d(np.arange(len(train_shards)), held_out)
        val = val or (data.val if data else None)
        if val is not None and not same_folder(val, train):
            val_shards = open_shards(val, self.config)
            val_ids = np.arange(len(val_shards))
        elif len(held_out):
            val_shards, val_ids = train_shards, held_out
        else:
            raise UserError(
                f"{train}: all photos are in the train set, none is left to test on; name other shards with --val"
            )
        if not train_shards.classes or not val_shards.classes:
            return None
        return PhotoSets(train_shards, subsample(train_ids, limit), val_shards, subsample(val_ids, limit))

    def photos(
        self, size: int, train: str | None = None, val: str | None = None, limit: int | None = None
    ) -> "tuple[LabeledPhotos, LabeledPhotos] | None":
        """`photo_sets` as data sets of photos of `size` pixels a side: (train, validation)."""
        sets = self.photo_sets(train, val, limit)
        return sets.at_size(size) if sets else None

    def scenes_folder(self, data: str | None) -> str:
        """`data`, or the run's `eval.voc`. Raises UserError if there is neither."""
        if data is None and self.settings.voc is None:
            raise UserError(
                "no scenes: name a folder in Pascal VOC's layout with --data, or eval.voc in the run's config"
            )
        return data or str(self.settings.voc)

    def _held_out(self, shards: Shards) -> NDArray[np.int64]:
        """The samples of these shards that training held out (as train.py does); none if it had other shards to test on."""
        c = self.config
        if c is None or c.data.val or c.data.shards is None or not same_folder(c.data.shards, shards.folder):
            return np.empty(0, np.int64)
        return Plan(shards, batch=c.optim.global_batch_size, seed=c.seed, holdout=c.data.holdout).held_out()

    def record(self, what: str, **results: Any) -> str:
        """Append a line to the run's evaluations.jsonl; returns the message for the user."""
        if self.run is None:
            return f"not recorded: {self.path} is in no run folder"
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "what": what, "network": str(self.path)}
        file = self.run / "evaluations.jsonl"
        append_jsonl(file, line | results)
        return f"recorded in {file}"


@dataclass
class EvalSpec:
    """What `compare` asks of every network: the same data, the same settings."""

    source: EvalTarget  # its photos, scenes and settings are used
    train: str | None = None
    val: str | None = None
    data: str | None = None  # folder of scenes
    limit: int | None = None
    seeds: int = 5
    workers: int | None = None


def require_choice(option: str, value: str, choices: Iterable[str]) -> str:
    """`value`, if it is among the choices. Raises UserError with the nearest one."""
    choices = tuple(choices)
    if value not in choices:
        raise UserError(f"{option} {value}: must be one of {', '.join(choices)}{suggest(value, choices)}")
    return value


def check_temperature(temperature: float) -> None:
    """Raises UserError if a vote of k-NN, exp(1 / temperature), would overflow float32."""
    if temperature < 1 / 80:
        raise UserError(f"temperature {temperature}: must be at least 0.0125, or a vote overflows float32")


def best_device() -> "torch.device":
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def open_shards(folder: str | Path, config: Config | None = None) -> Shards:
    """The shards in a folder or at an address, with the cache and the missing shards that a run's config allows.

    Raises UserError; for a folder of photos, the message names the command that makes shards of them.
    """
    allowed = (config.speed, config.data.max_missing) if config else ()
    if is_address(folder):
        return Shards(folder, *allowed)
    folder = Path(folder)
    if folder.is_dir() and not (folder / "manifest.json").is_file() and not any(folder.glob("*.tar")):
        searched = [folder, *(d for d in sorted(folder.iterdir())[:20] if d.is_dir())]
        if any(file.suffix.lower() in IMAGE_SUFFIXES for place in searched for file in place.iterdir()):
            raise UserError(
                f"{folder}: photos, not shards; make shards of them with `make shards SRC={folder} DST={folder}-shards`"
            )
    return Shards(folder, *allowed)


def same_folder(a: str | Path, b: str | Path) -> bool:
    if is_address(a) or is_address(b):
        return str(a).rstrip("/") == str(b).rstrip("/")
    return Path(a).resolve() == Path(b).resolve()


def subsample(ids: NDArray[np.int64], limit: int | None) -> NDArray[np.int64]:
    """At most `limit` of the ids [n], evenly spaced: shards may be sorted by class."""
    if limit is None or limit >= len(ids):
        return ids
    return ids[np.arange(limit) * len(ids) // limit]
