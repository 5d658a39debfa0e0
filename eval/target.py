"""What is evaluated: a network, the data that belongs to its run, and where the results are recorded.

Imports no torch, so that a wrong path is reported at once: `EvalTarget.network` and `PhotoSets.at_size` load it.
"""

import json
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eval.provenance import known_weights
from pipeline.mixture import AnyShards, open_training
from pipeline.order import held_out
from pipeline.remote import is_address
from pipeline.shards import Shards
from runtime.command import again
from runtime.config import MIN_TEMPERATURE, TIMM, Config, Eval, flatten, is_path, load_config, missing
from runtime.errors import UserError, plural, suggest, suggest_path
from runtime.metrics import append_jsonl

if TYPE_CHECKING:
    from eval.datasets import LabeledPhotos
    from model.backbone import Backbone

KINDS = ("cls", "patches", "pixels")  # features of a photo: [CLS], mean of the patch tokens, raw pixels
MEMORY_SIZE = 1_024_000  # tokens of the memory bank in segmentation by retrieval: 1.6 GB for ViT-S
PROTOCOLS = ("densedino", "leopart")  # of linear segmentation
MEASURES = ("knn", "linear", "linear_seg", "cluster_seg", "retrieval_seg", "points")  # evaluations that `compare` runs


@dataclass(frozen=True)
class PhotoSets:
    """The photos of k-NN and linear classification: shards and sample ids [n] to train on and to test on."""

    train: AnyShards
    train_ids: NDArray[np.int64]
    val: AnyShards
    val_ids: NDArray[np.int64]

    def at_size(self, size: int) -> "tuple[LabeledPhotos, LabeledPhotos]":
        """(train, validation) photos of `size` pixels a side, both with the train set's labels."""
        from eval.datasets import LabeledPhotos

        train = LabeledPhotos(self.train, size, self.train_ids)
        return train, LabeledPhotos(self.val, size, self.val_ids, classes=self.train.classes)


class NothingToTestOn(UserError):
    """All photos are in the train set."""


class EvalTarget:
    """The network at a path, and what its run knows: the photos it was trained on and those it never saw.

    path: a run folder, a checkpoint (folder or file), a backbone file or timm:NAME. `run` and `config` are None if
    the path is in no run folder. Raises UserError if nothing is at `path`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        from_timm = str(path).startswith(TIMM)
        if not from_timm and not self.path.exists():
            raise UserError(f"{path}: no such run, checkpoint or backbone file{suggest_path(path)}")
        folders = [] if from_timm else [self.path, *self.path.absolute().parents[:3]]
        self.run = next((folder for folder in folders if (folder / "config.yaml").is_file()), None)
        self.config: Config | None = load_config(self.run / "config.yaml", []) if self.run else None
        self.settings = self.config.eval if self.config else Eval()
        self._names_given = False  # eval.ignore_classes may name classes of the run's own sets only

    @property
    def start(self) -> str | None:
        """The name of the weights that the run started from (model.init); None if they were random or there is no run."""
        init = self.config.model.init if self.config else None
        return init and (init if init.startswith(TIMM) else Path(init).name)

    def check_untrained(self, untrained: bool) -> None:
        """Raises UserError if the untrained network is wanted of something that is no run."""
        if untrained and self.run is None:
            raise UserError(f"{self.path}: --untrained needs a run folder, and this path is in none")

    def ignore_classes(self, names: Sequence[str] | None) -> None:
        """Leave the photos of these classes out of both sets, instead of those of the run's eval.ignore_classes."""
        if names:
            self.settings = replace(self.settings, ignore_classes=list(names))
            self._names_given = True

    def place(self, key: str) -> str | None:
        """The path or address that a key of the run's config names ("data.val"); None if there is none.

        Raises UserError if it is a folder that does not exist (any more).
        """
        value = flatten(self.config)[key] if self.config else None
        self._check_place(key, value)
        return value

    def _check_place(self, key: str, value: str | None) -> None:
        if is_path(value) and (problem := missing(value)):
            raise UserError(f"{self.run}/config.yaml: {key}: {value}: {problem}; if it was moved, correct {key} there")

    def network(self, untrained: bool = False) -> "Backbone":
        """The teacher's backbone, frozen, on the best device; `untrained`: the run's network at step 0. Prints what of a
        file's tensors is not used."""
        from model.weights import load_backbone
        from runtime import distributed

        self.check_untrained(untrained)
        device = distributed.best_device()
        network = load_backbone(self.run if untrained and self.run else self.path, untrained=untrained)
        if network.note:
            print(network.note)
        if self.config:
            network.precision = distributed.choose_precision(self.config.speed.precision, device)
        return network.to(device).eval().requires_grad_(False)

    def photo_sets(
        self, train: str | None = None, val: str | None = None, limit: int | None = None
    ) -> PhotoSets | None:
        """The shards and samples of the train and the validation set; None if the shards have no classes.

        train: shards, by default the run's training shards without the samples it holds out. val: shards, by default
        the run's `data.val`, else the samples it holds out. limit: at most this many of each, evenly spaced. Photos of
        `eval.ignore_classes` are left out.
        Raises UserError if a set is missing, and if the validation set has a class that the train set lacks;
        NothingToTestOn if no photo is left to test on.
        """
        train_shards = open_shards(train, self.config) if train else self.training_shards()
        if train_shards is None:
            raise UserError(
                f"{self.path}: in no run folder; name the shards to train on (--train) and to test on (--val)"
            )
        held_out = self._held_out(train_shards)
        train_ids = np.setdiff1d(np.arange(len(train_shards)), held_out)
        val = val or self.place("data.val")
        val_shards: AnyShards
        if val is not None and not is_part(val, train_shards):
            val_shards = open_shards(val, self.config)
            val_ids = np.arange(len(val_shards))
        elif len(held_out):
            val_shards, val_ids = train_shards, held_out
        else:
            raise NothingToTestOn(
                f"{train_shards.folder}: all photos are in the train set, none is left to test on; name other shards with "
                "--val"
            )
        if not train_shards.classes or not val_shards.classes:
            return None
        ignored = self.settings.ignore_classes
        if self._names_given:
            check_ignored(train_shards, val_shards, ignored)
        check_classes(train_shards, val_shards, ignored)
        train_ids, val_ids = without(train_shards, train_ids, ignored), without(val_shards, val_ids, ignored)
        return PhotoSets(train_shards, subsample(train_ids, limit), val_shards, subsample(val_ids, limit))

    def photos(
        self, size: int, train: str | None = None, val: str | None = None, limit: int | None = None
    ) -> "tuple[LabeledPhotos, LabeledPhotos] | None":
        """`photo_sets` as data sets of photos of `size` pixels a side: (train, validation)."""
        sets = self.photo_sets(train, val, limit)
        return sets.at_size(size) if sets else None

    def scenes_folder(self, data: str | None) -> str:
        """`data`, or the run's `eval.voc`. Raises UserError if there is neither."""
        folder = data or self.place("eval.voc")
        if folder is None:
            raise UserError(
                "no scenes: name a folder in Pascal VOC's layout with --data, or eval.voc in the run's config"
            )
        return folder

    def training_shards(self) -> AnyShards | None:
        """The shards that the run was trained on, of one source or several; None if there is no run, or if its config names
        none. Raises UserError as `place` and `Shards`."""
        if self.config is None or not self.config.data.sources:
            return None
        for source in self.config.data.sources:
            self._check_place("data.shards", source.path)
        return open_training(self.config)

    def why_unlabeled(self) -> str:
        """Why the run's photos have no classes that k-NN could measure."""
        shards = self.training_shards()
        return (shards.incomparable if shards else "") or "these shards have no classes"

    def _held_out(self, shards: AnyShards) -> NDArray[np.int64]:
        """The samples of these shards that training held out (as train.py does), also of one source of several; none if it
        had other shards to test on."""
        c = self.config
        trained = [source.path for source in c.data.sources] if c else []
        known = all(any(same_folder(path, part.folder) for path in trained) for part in shards.parts)
        if c is None or c.data.val or not known:
            return np.empty(0, np.int64)
        return held_out(shards, seed=c.seed, holdout=c.data.holdout)

    def title(self, untrained: bool) -> str:
        """The network in the heading of a table."""
        return f"{self.path}, untrained" if untrained else str(self.path)

    def describe_photos(self, train: "LabeledPhotos", val: "LabeledPhotos") -> dict[str, Any]:
        """The photos of a measure, for its record."""
        sets = dict(bank=str(train.shards.folder), val=str(val.shards.folder), photos=len(train), queries=len(val))
        ignored = self.settings.ignore_classes
        return sets | ({"ignored_classes": ignored} if ignored else {})

    def record(self, what: str, **results: Any) -> str:
        """Append a line to the run's evaluations.jsonl; returns the message for the user."""
        if self.run is None:
            return f"not recorded: {self.path} is in no run folder"
        weights = {"step": 0} if results.get("untrained") else known_weights(self.path)
        time = datetime.now(UTC).isoformat(timespec="seconds")
        line = {"time": time, "what": what, "network": str(self.path), "weights": weights}
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
    palette: str | None = None  # file with the classes of their masks' colors
    limit: int | None = None
    seeds: int = 5
    workers: int | None = None
    size: int | None = None  # side of photos and scenes, pixels; by default each network's own


def require_choice(option: str, value: str, choices: Iterable[str]) -> str:
    """`value`, if it is among the choices. Raises UserError with the nearest one."""
    choices = tuple(choices)
    if value not in choices:
        raise UserError(f"{option} {value}: must be one of {', '.join(choices)}{suggest(value, choices)}")
    return value


def check_temperature(temperature: float) -> None:
    """Raises UserError if a vote of k-NN, exp(1 / temperature), would overflow float32."""
    if temperature < MIN_TEMPERATURE:
        raise UserError(f"temperature {temperature}: must be at least {MIN_TEMPERATURE:g}, or a vote overflows float32")


def open_shards(folder: str | Path, config: Config | None = None) -> Shards:
    """The shards in a folder or at an address, with the cache and the missing shards that a run's config allows.

    Raises UserError as `Shards`.
    """
    return Shards(folder, *((config.speed, config.data.max_missing) if config else ()))


def check_classes(train: AnyShards, val: AnyShards, ignored: Sequence[str] = (), *, training: bool = False) -> None:
    """Raises UserError for classes that only the validation set has, unless they are ignored. Classes without photos do not
    count. training: the command that leaves them out is train.py's."""
    present = np.unique(val.labels())
    names = {val.classes[label] for label in present[present >= 0].tolist()}
    for shards, classes in ((val, names), (train, set(train.classes))):
        if classes and classes <= {*ignored}:
            option = "eval.ignore_classes" if training else "--ignore-class (or eval.ignore_classes)"
            raise UserError(
                f"{shards.folder}: {option} leaves out all of its {len(classes)} classes, so no photo is left to measure; "
                "name fewer of them"
            )
    unknown = sorted(names - {*train.classes, *ignored})
    if not unknown:
        return
    shown = ", ".join(f"'{name}'" for name in unknown[:3]) + (f" and {len(unknown) - 3} more" if unknown[3:] else "")
    what = f"{val.folder}: {plural(len(unknown), 'class')} that {train.folder} does not have: {shown}"
    if len(unknown) == len(names):
        without = "; without data.val, a share of the training photos is held out (data.holdout)" if training else ""
        raise UserError(f"{what}; the two have no class in common: is this the right folder?{without}")
    near = suggest(unknown[0], train.classes) if len(unknown) == 1 else ""
    known = {*train.classes, *val.classes}
    unknown = [*(name for name in ignored if name in known), *unknown]  # the new list replaces the one given
    if training:
        plain = all(re.fullmatch(r"[A-Za-z_]\w+", name) and name not in ("true", "false", "null") for name in unknown)
        listed = f"[{','.join(unknown)}]" if plain else json.dumps(unknown, ensure_ascii=False)
        command = again(f"eval.ignore_classes={listed}")
    else:
        command = " ".join(f"--ignore-class {shlex.quote(name)}" for name in unknown)
    raise UserError(f"{what}{near}; to leave out their photos: `{command}`")


def check_ignored(train: AnyShards, val: AnyShards, ignored: Sequence[str]) -> None:
    """Raises UserError for a name to ignore that is a class of neither set."""
    known = {*train.classes, *val.classes}
    folders = val.folder if same_folder(train.folder, val.folder) else f"{train.folder} or {val.folder}"
    for name in ignored:
        if name not in known:
            raise UserError(
                f"'{name}' is to be left out, but no class of {folders} has this name{suggest(name, known)}"
            )


def without(shards: AnyShards, ids: NDArray[np.int64], ignored: Sequence[str]) -> NDArray[np.int64]:
    """The ids [n] of photos that are in none of the ignored classes."""
    labels = [label for label, name in enumerate(shards.classes) if name in ignored]
    return ids[~np.isin(shards.labels(ids), labels)] if labels else ids


def same_folder(a: str | Path, b: str | Path) -> bool:
    if is_address(a) or is_address(b):
        return str(a).rstrip("/") == str(b).rstrip("/")
    return Path(a).resolve() == Path(b).resolve()


def is_part(place: str | Path, shards: AnyShards) -> bool:
    """Whether a folder or address is that of these shards, or of one of their sources."""
    return any(same_folder(place, part.folder) for part in shards.parts)


def near_samples(shards: AnyShards, count: int) -> NDArray[np.int64]:
    """Ids of at most about `count` samples that few shards hold: the first ones of each source."""
    each = -(-count // len(shards.parts))
    firsts = np.cumsum([0, *map(len, shards.parts)])
    return np.concatenate(
        [first + np.arange(min(each, len(p))) for first, p in zip(firsts, shards.parts, strict=False)]
    )


def subsample(ids: NDArray[np.int64], limit: int | None) -> NDArray[np.int64]:
    """At most `limit` of the ids [n], evenly spaced: shards may be sorted by class."""
    if limit is None or limit >= len(ids):
        return ids
    return ids[np.arange(limit) * len(ids) // limit]
