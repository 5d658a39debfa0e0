"""A Mixture: the shards of several folders or addresses, read as one data set.

A sample id is a row of the sources' indexes laid end to end, in the order in which the config names them. Nothing is
copied: each source keeps its own index, its own open files and its own cache.

S sources · n samples.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.remote import is_address
from pipeline.shards import Shards
from runtime.config import Config

NO_CLASS = -1  # label of a sample without a class


class Mixture:
    """Several sources, by the interface of Shards. parts: the sources. weights: their shares of the images, up to a factor
    [S]; None: every sample counts the same.

    Classes are known by their names: those of the same name in two sources are one class. If a source has classes, but none
    that the others have, it is unknown whether they mean the same things; then the mixture has no classes, and
    `incomparable` says why.
    """

    def __init__(self, parts: Sequence[Shards], weights: Sequence[float] | None = None):
        self.parts, self.weights = list(parts), list(weights) if weights else None
        self.folder = ", ".join(str(part.folder) for part in self.parts)
        self.names = short_names([str(part.folder) for part in self.parts])
        self.firsts = np.cumsum([0, *map(len, self.parts)])  # [S+1] first sample id of each source
        self.is_remote = any(part.is_remote for part in self.parts)
        self.missing_summary = "; ".join(part.missing_summary for part in self.parts if part.missing_summary)
        self.incomparable = _incomparable(self.parts)
        names = [name for part in self.parts for name in part.classes]
        self.classes: list[str] = [] if self.incomparable else list(dict.fromkeys(names))
        label = {name: i for i, name in enumerate(self.classes)}
        # [classes of the source + 1] each: the label here of a label there; the last one is that of NO_CLASS
        self._label_of = [
            np.array([*(label.get(name, NO_CLASS) for name in part.classes), NO_CLASS], np.int32) for part in self.parts
        ]

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def __reduce__(self):
        return Mixture, (self.parts, self.weights)

    @property
    def manifest(self) -> dict:
        """What readers ask of a manifest: the largest photo of all sources."""
        photos = [part.manifest.get("photos", {}) for part in self.parts]
        return {"photos": {key: max(p.get(key, 0) for p in photos) for key in ("max_width", "max_height")}}

    def records(self, ids: NDArray[np.int64]) -> NDArray:
        """Index records [n] of samples; `shard` and `label` in them are those of the sample's own source."""
        source = self._source_of(ids)
        found = np.empty(len(ids), self.parts[0].index.dtype)
        for s, part in enumerate(self.parts):
            mine = source == s
            found[mine] = part.records(ids[mine] - self.firsts[s])
        return found

    def labels(self, ids: NDArray[np.int64] | None = None) -> NDArray[np.int32]:
        """Labels [n] of samples, of all without `ids`; NO_CLASS: none."""
        if ids is None:
            return np.concatenate([of[part.labels()] for of, part in zip(self._label_of, self.parts, strict=True)])
        source = self._source_of(ids)
        found = np.full(len(ids), NO_CLASS, np.int32)
        for s, part in enumerate(self.parts):
            mine = source == s
            found[mine] = self._label_of[s][part.labels(ids[mine] - self.firsts[s])]
        return found

    def read(self, sample: int) -> bytes:
        part, own = self._locate(sample)
        return part.read(own)

    def is_valid(self, sample: int, photo: bytes) -> bool:
        part, own = self._locate(sample)
        return part.is_valid(own, photo)

    def validation_error(self, sample: int, photo: bytes) -> str:
        part, own = self._locate(sample)
        return part.validation_error(own, photo)

    def is_lost(self, sample: int) -> bool:
        part, own = self._locate(sample)
        return part.is_lost(own)

    def describe(self, sample: int) -> dict[str, str | int]:
        """As Shards.describe, and the folder of the shard."""
        part, own = self._locate(sample)
        return {"folder": str(part.folder), **part.describe(own)}

    def folder_of(self, sample: int) -> Path | str:
        return self._locate(sample)[0].folder

    def release_pages(self) -> None:
        for part in self.parts:
            part.release_pages()

    def _locate(self, sample: int) -> tuple[Shards, int]:
        """(the source of a sample, the sample's id in it)."""
        source = int(np.searchsorted(self.firsts, sample, side="right")) - 1
        return self.parts[source], sample - int(self.firsts[source])

    def _source_of(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self.firsts, ids, side="right") - 1


AnyShards = Shards | Mixture


def open_training(config: Config, check: bool = True) -> AnyShards:
    """What `data.shards` names: one folder or address, or several. check: whether missing shards are looked for. Raises
    UserError as Shards."""
    missing = config.data.max_missing if check else None
    parts = [Shards(source.path, config.speed, missing) for source in config.data.sources]
    if len(parts) == 1:
        return parts[0]
    weights = [source.weight for source in config.data.sources if source.weight is not None]
    return Mixture(parts, weights or None)


def short_names(folders: Sequence[str]) -> list[str]:
    """A name for each source: as many of the last parts of its path as tell them apart."""
    paths = [folder.rstrip("/").split("/") for folder in map(_without_scheme, folders)]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-length:]) for path in paths]
        if len({*names}) == len(names):
            return names
    return list(folders)


def _without_scheme(folder: str) -> str:
    return folder.partition("://")[2] if is_address(folder) else folder


def _incomparable(parts: Sequence[Shards]) -> str:
    """Why the classes of sources cannot be compared; "" if they can: each source that has classes shares one with those
    before it."""
    labeled = [part for part in parts if part.classes]
    groups: list[tuple[Shards, set[str]]] = []  # sources connected by common names: (the first one, all names)
    for part in labeled:
        connected = [group for group in groups if group[1] & {*part.classes}]
        first = connected[0][0] if connected else part
        names = functools.reduce(set.union, (group[1] for group in connected), {*part.classes})
        groups = [group for group in groups if group not in connected] + [(first, names)]
    if len(groups) < 2:
        return ""
    (a, _), (b, _) = groups[:2]
    return (
        f"the labels of {a.folder} ('{a.classes[0]}', ...) and of {b.folder} ('{b.classes[0]}', ...) are not comparable, "
        "they have no class name in common; "
        f"`python -m eval knn RUN --train {a.folder}` measures on one source"
    )
