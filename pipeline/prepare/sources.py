"""The photos of a source: a folder, a tar, or ImageNet's own tars. Names, offsets and sizes; no photo is decoded here.

Nothing is extracted, unpickled or followed: a photo is `size` bytes at `offset` of a file. Links, devices, fifos, sparse
members and names that lead outside (`/x`, `../x`) are skipped and counted.

A tar of tars (ILSVRC2012_img_train.tar) has one inner tar per class. The inner tars are read where they are. For all other
sources classes.py says which photos have a class.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pipeline.prepare.classes import label_photos, refuse_devkit
from pipeline.prepare.names import ENDINGS, is_photo, printable
from pipeline.prepare.tar import Member, members
from runtime.errors import UserError, suggest


class Photo(NamedTuple):
    """Where one photo is: a file of its own below SRC, or `size` bytes at `offset` of SRC, which is a tar."""

    name: str  # below SRC; undecodable bytes as surrogates
    offset: int
    size: int
    label: int  # position in the classes; -1: none


@dataclass
class SourceIndex:
    """All photos of a source, sorted by name, and how the source was interpreted."""

    photos: list[Photo]
    classes: list[str]
    summary: str  # one line: how the classes were chosen
    skipped: Counter[str]  # by kind

    def digest(self) -> str:
        """sha256 of names, sizes and labels: equal for the same photos as a folder and as a tar."""
        sha = hashlib.sha256()
        for p in self.photos:
            sha.update(f"{p.name}\0{p.size} {p.label}\n".encode("utf-8", "surrogateescape"))
        return sha.hexdigest()


def list_photos(src: Path, labels: str = "auto", devkit: Path | None = None) -> SourceIndex:
    """The photos of a folder or a tar. `labels`: auto, yes, no (see classes.py).

    Raises UserError if there are none, OSError if the source cannot be read.
    """
    if not src.exists():
        known = os.listdir(src.parent) if src.parent.is_dir() else []
        raise UserError(f"{src}: no such folder or tar{suggest(src.name, known)}")
    skipped: Counter[str] = Counter()
    if src.is_dir():
        found = sorted(_photos_in_folder(src, skipped))
    elif src.is_file():
        with src.open("rb") as tar:
            found, inner = _photos_in_tar(tar, src, skipped)
            if inner:
                refuse_devkit(src, devkit)
                return _tar_of_tars(tar, src, inner, labels, skipped)
        found.sort()
    else:
        raise UserError(f"{src}: neither a folder nor a tar")
    if not found:
        raise UserError(_no_photos(src, skipped))
    found = _without_duplicates(found, skipped)
    label_of, classes, summary = label_photos(src, [name for name, _, _ in found], labels, devkit)
    photos = [Photo(*place, label) for place, label in zip(found, label_of, strict=True)]
    return SourceIndex(photos, [printable(c) for c in classes], summary, skipped)


class Unreadable(Exception):
    """The source does not give a photo's bytes. The photo may be intact, so the next run makes its shard again."""


class Source:
    """Bytes of photos below a folder or inside a tar, by offset; no link is followed."""

    def __init__(self, src: Path):
        self.fd = os.open(src, os.O_RDONLY)
        self.is_folder = src.is_dir()

    def read(self, photo: Photo, at_most: int) -> bytes:
        """The photo's bytes. Raises ValueError for none or more than `at_most`, Unreadable if they cannot be read."""
        if not 0 < photo.size <= at_most:
            raise ValueError("empty" if photo.size == 0 else f"{photo.size} bytes, more than --max-pixels can need")
        try:
            if self.is_folder:
                fd = os.open(photo.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=self.fd)
                try:
                    data = os.read(fd, photo.size + 1)
                finally:
                    os.close(fd)
            else:
                data = os.pread(self.fd, photo.size, photo.offset)
        except OSError as error:
            raise Unreadable(f"cannot be read: {error.strerror}") from None
        if len(data) != photo.size:
            raise Unreadable("has changed since it was listed")
        return data

    def close(self) -> None:
        os.close(self.fd)


def _photos_in_folder(src: Path, skipped: Counter[str]) -> Iterator[tuple[str, int, int]]:
    """(name, 0, size) of every photo below a folder; links are not followed."""
    todo = [""]
    while todo:
        below = todo.pop()
        for entry in os.scandir(src / below):
            name = below + entry.name
            if entry.is_symlink():
                skipped["links"] += 1
            elif entry.is_dir(follow_symlinks=False):
                if entry.name.startswith("."):
                    skipped["hidden folders"] += 1
                else:
                    todo.append(name + "/")
            elif not entry.is_file(follow_symlinks=False):
                skipped["special files"] += 1
            elif not is_photo(name):
                skipped["not photos"] += 1
            else:
                yield name, 0, entry.stat(follow_symlinks=False).st_size


def _photos_in_tar(tar: BinaryIO, src: Path, skipped: Counter[str]) -> tuple[list[tuple[str, int, int]], list[Member]]:
    """(name, offset, size) of a tar's photos; or, if it holds tars and no photos, its inner tars."""
    size = os.fstat(tar.fileno()).st_size
    if tar.read(2) == b"\x1f\x8b":
        raise UserError(f"{src}: compressed, and photos are read at their offset; run `gunzip -k {src}` first")
    if size == 0:
        raise UserError(f"{src}: empty (0 bytes)")
    found, inner = [], []
    for m in members(tar, 0, size, str(src)):
        if m.skip:
            skipped[m.skip] += 1
        elif is_photo(m.name):
            found.append((m.name, m.offset, m.size))
        elif m.name.endswith(".tar") and "/" not in m.name:
            inner.append(m)
        else:
            skipped["not photos"] += 1
    if found and inner:
        skipped["not photos"] += len(inner)
        inner = []
    return found, inner


def _tar_of_tars(tar: BinaryIO, src: Path, inner: list[Member], labels: str, skipped: Counter[str]) -> SourceIndex:
    """ImageNet's training tar: one inner tar per class."""
    inner = sorted({m.name: m for m in reversed(inner)}.values())  # of equal names the first
    places = []
    for label, outer in enumerate(inner):
        for m in members(tar, outer.offset, outer.offset + outer.size, f"{src}: {outer.name}"):
            if m.skip or not is_photo(m.name):
                skipped[m.skip or "not photos"] += 1
            else:
                places.append((f"{outer.name[:-4]}/{m.name}", m.offset, m.size, label if labels != "no" else -1))
    if not places:
        raise UserError(_no_photos(src, skipped))
    photos = [Photo(*p) for p in sorted(places)]
    classes = [] if labels == "no" else [printable(m.name[:-4]) for m in inner]
    return SourceIndex(photos, classes, f"a tar of {len(inner)} tars, one class each", skipped)


def _without_duplicates(found: list[tuple[str, int, int]], skipped: Counter[str]) -> list[tuple[str, int, int]]:
    """Sorted photos, of equal names only the first: a tar can hold a name twice."""
    unique = [f for f, before in zip(found, [("", 0, 0), *found], strict=False) if f[0] != before[0]]
    if len(unique) < len(found):
        skipped["duplicate names"] += len(found) - len(unique)
    return unique


def _no_photos(src: Path, skipped: Counter[str]) -> str:
    others = ", ".join(f"{n} {kind}" for kind, n in sorted(skipped.items()))
    hint = f"; photos end in {' '.join(ENDINGS)}"
    if skipped["links"]:
        hint = "; links are not followed: give the folder that they point to"
    elif src.is_dir() and any(src.glob("*.tar")):
        hint = f"; give one of its tars, or run `make index DST={src}` if they are shards already"
    return f"{src}: no photos here (found: {others or 'nothing'}){hint}"
