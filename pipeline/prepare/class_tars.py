"""One tar per class: in a folder (n01440764.tar, n01443537.tar, ...), or in a tar, as ImageNet's training tar.

The tars are read where they are. A folder of tars can also hold shards of another program; those are refused here, with the
command that uses them.
"""

import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from pipeline.prepare.archives import AGAIN, fault
from pipeline.prepare.classes import SPLITS
from pipeline.prepare.names import is_photo, printable
from pipeline.prepare.tar import Member, members
from runtime.errors import UserError

WEBDATASET = (".cls", ".json", ".txt")


class ClassTar(NamedTuple):
    """A tar in bytes [start, end) of a file. `end` None: up to the end of the file."""

    name: str  # below SRC: train/n01440764.tar
    path: Path  # the file
    start: int
    end: int | None

    @property
    def label(self) -> str:
        return self.name.rpartition("/")[2].removesuffix(".tar")


class ClassTars(NamedTuple):
    """photos: (name, offset, size, label, tar), sorted; tar is "" inside SRC itself, which is then the file."""

    photos: list[tuple[str, int, int, int, str]]
    classes: list[str]
    summary: str
    broken: list[dict]  # rows of rejected.jsonl: tars that were left out


def in_tar(src: Path, inner: list[Member], labels: str, skip_broken: bool, skipped: Counter[str]) -> ClassTars:
    """The photos of a tar of tars. Raises UserError if a tar is damaged, unless `skip_broken`."""
    first = {m.name: m for m in reversed(inner)}  # of equal names the first
    tars = [ClassTar(m.name, src, m.offset, m.offset + m.size) for m in sorted(first.values())]
    _refuse_several_folders(src, tars)
    return _read_all(src, tars, labels, skip_broken, skipped, f"a tar of {len(tars)} tars")


def in_folder(src: Path, names: list[str], labels: str, skip_broken: bool, skipped: Counter[str]) -> ClassTars:
    """The photos of a folder of tars, with these names below SRC. Raises UserError if they are not one class each, or if a
    tar is damaged and `skip_broken` is not set."""
    tars = [ClassTar(name, src / name, 0, None) for name in sorted(names)]
    _refuse_several_folders(src, tars)
    _refuse_splits(src, tars)
    index = f"`make index DST={tars[0].path.parent}`"
    if labels == "auto" and _is_numbered([t.label for t in tars]):
        raise UserError(
            f"{src}: {len(tars)} tars numbered in a row ({tars[0].name} to {tars[-1].name}): if they are WebDataset shards, "
            f"{index} uses them as they are; if each is a class, say so with ARGS='--labels yes'"
        )
    return _read_all(src, tars, labels, skip_broken, skipped, f"a folder of {len(tars)} tars")


def _read_all(
    src: Path, tars: list[ClassTar], labels: str, skip_broken: bool, skipped: Counter[str], what: str
) -> ClassTars:
    photos: list[tuple[str, int, int, int, str]] = []
    broken: list[dict] = []
    for label, tar in enumerate(tars):
        try:
            found, others = _read(tar)
        except (UserError, OSError) as error:
            reason = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
            if not skip_broken:
                where = f"{src}: {tar.name}" if tar.path == src else str(tar.path)
                raise UserError(f"{where}: {reason}; or leave such tars out with ARGS=--skip-broken") from None
            broken.append({"source": printable(tar.name), "reason": reason})
            continue
        if tar.path != src:
            _refuse_shards(tar, found, others)
        inside = "" if tar.path == src else tar.name
        photos += [(f"{tar.label}/{m.name}", m.offset, m.size, label if labels != "no" else -1, inside) for m in found]
        skipped.update(m.skip or "not photos" for m in others)
    classes = [] if labels == "no" else [printable(tar.label) for tar in tars]
    return ClassTars(sorted(photos), classes, f"{what}, {'no classes' if labels == 'no' else 'one class each'}", broken)


def _read(tar: ClassTar) -> tuple[list[Member], list[Member]]:
    """(photos, other members) of a class's tar. Raises UserError if it is broken."""
    if tar.end is None and (why := fault(tar.path)):
        raise UserError(why)
    photos: list[Member] = []
    others: list[Member] = []
    with tar.path.open("rb") as file:
        end = os.fstat(file.fileno()).st_size if tar.end is None else tar.end
        try:
            for m in members(file, tar.start, end, ""):
                (photos if not m.skip and is_photo(m.name) else others).append(m)
        except UserError as error:
            raise UserError(f"{error}; {AGAIN}".removeprefix(": ")) from None
    return photos, others


def _refuse_several_folders(src: Path, tars: list[ClassTar]) -> None:
    folders = sorted({tar.name.rpartition("/")[0] for tar in tars})
    if len(folders) > 1:
        named = " and ".join(printable(f"{folder}/") if folder else "directly in it" for folder in folders[:3])
        one = (
            f"give one of them (SRC={src}/{folders[-1]})" if src.is_dir() else "unpack it, and give one of the folders"
        )
        raise UserError(f"{src} holds tars in several places ({named}): {one}")


def _refuse_splits(src: Path, tars: list[ClassTar]) -> None:
    """train.tar beside val.tar, or ILSVRC2012_img_train.tar beside ILSVRC2012_img_val.tar: parts, not classes."""
    parts = [tar for tar in tars if SPLITS & set(re.split(r"[^a-z]+", tar.label.lower()))]
    if parts:
        named = ", ".join(printable(tar.name) for tar in parts[:3])
        raise UserError(
            f"{src} holds {named}: parts of a data set, not classes; give one of them (SRC={parts[0].path})"
        )


def _refuse_shards(tar: ClassTar, photos: list[Member], others: list[Member]) -> None:
    """Labels and texts beside photos of the same key: a shard of another program."""
    keys = {_key(m.name): m.name for m in photos}
    for m in others:
        if m.name.lower().endswith(WEBDATASET) and _key(m.name) in keys:
            raise UserError(
                f"{tar.path}: holds samples ({printable(keys[_key(m.name)])} with {printable(m.name)}): a WebDataset shard, "
                f"not a class of photos; `make index DST={tar.path.parent}` uses such tars as they are"
            )


def _key(name: str) -> str:
    """The name up to the first dot of its last part, which WebDataset calls the key."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _is_numbered(labels: list[str]) -> bool:
    """Whether these are names as shards have them: 00000, 00001, ... or shard-0-of-9, shard-1-of-9, ..."""
    found = [re.fullmatch(r"(.*?)(\d+)(-of-\d+)?", label) for label in labels]
    numbers = sorted(int(match[2]) for match in found if match)
    if len(numbers) < max(2, len(labels)) or len({match[1] for match in found if match}) > 1:
        return False
    return numbers[0] <= 1 and numbers == list(range(numbers[0], numbers[0] + len(numbers)))
