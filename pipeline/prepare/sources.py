"""The photos of a source: a folder, a tar, or ImageNet's own tars. Names, offsets and sizes; no photo is decoded here.

Nothing is extracted, unpickled or followed: a photo is `size` bytes at `offset` of a file. Links, devices, fifos, sparse
members and names that lead outside (`/x`, `../x`) are skipped and counted.

A tar or a folder of tars has one tar per class (class_tars.py). For all other sources classes.py says which photos have a
class.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pipeline.prepare import class_tars
from pipeline.prepare.archives import describe_archive, first_archive
from pipeline.prepare.classes import label_photos, refuse_devkit
from pipeline.prepare.names import ENDINGS, is_photo, printable
from pipeline.prepare.tar import Member, members
from runtime.errors import UserError, suggest

MAX_OPEN_TARS = 128  # of a folder of tars, by each process


class Photo(NamedTuple):
    """Where one photo is: a file of its own below SRC, or `size` bytes at `offset` of a tar, SRC or one below it."""

    name: str  # below SRC; undecodable bytes as surrogates
    offset: int
    size: int
    label: int  # position in the classes; -1: none
    tar: str = ""  # below SRC, if it is a folder of tars

    @property
    def place(self) -> str:
        """Where a user finds it below SRC: its name, or tar/member."""
        member = self.name[len(self.tar.rpartition("/")[2]) - len(".tar") :]
        return printable(self.tar + member if self.tar else self.name)


@dataclass
class SourceIndex:
    """All photos of a source, sorted by name, and how the source was interpreted."""

    photos: list[Photo]
    classes: list[str]
    summary: str  # one line: how the classes were chosen
    skipped: Counter[str]  # by kind
    broken: list[dict] = field(default_factory=list)  # rows of rejected.jsonl: tars that were left out

    def digest(self) -> str:
        """sha256 of names, sizes and labels: equal for the same photos as a folder and as a tar."""
        sha = hashlib.sha256()
        for p in self.photos:
            sha.update(f"{p.name}\0{p.size} {p.label}\n".encode("utf-8", "surrogateescape"))
        return sha.hexdigest()


def list_photos(src: Path, labels: str = "auto", devkit: Path | None = None, skip_broken: bool = False) -> SourceIndex:
    """The photos of a folder, a tar, or a folder or tar of tars. `labels`: auto, yes, no (see classes.py). skip_broken: of
    several tars, leave out those that cannot be read.

    Raises UserError if there are none, OSError if the source cannot be read.
    """
    if not src.exists():
        known = os.listdir(src.parent) if src.parent.is_dir() else []
        raise UserError(f"{src}: no such folder or tar{suggest(src.name, known)}")
    skipped: Counter[str] = Counter()
    if src.is_dir():
        tars: list[str] = []
        found = sorted(_photos_in_folder(src, skipped, tars))
        if not found and (len(tars) > 1 or (tars and labels == "yes")):
            refuse_devkit(src, devkit)
            return _index_of(src, class_tars.in_folder(src, tars, labels, skip_broken, skipped), skipped)
        if tars:
            skipped["not photos"] += len(tars)
    elif src.is_file():
        with src.open("rb") as tar:
            found, inner = _photos_in_tar(tar, src, skipped)
            if inner:
                refuse_devkit(src, devkit)
                return _index_of(src, class_tars.in_tar(src, inner, labels, skip_broken, skipped), skipped)
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
        self.tars: dict[str, int] = {}  # open tars of a folder of tars

    def read(self, photo: Photo, at_most: int) -> bytes:
        """The photo's bytes. Raises ValueError for none or more than `at_most`, Unreadable if they cannot be read."""
        if not 0 < photo.size <= at_most:
            raise ValueError("empty" if photo.size == 0 else f"{photo.size} bytes, more than --max-pixels can need")
        try:
            if photo.tar:
                data = os.pread(self._tar(photo.tar), photo.size, photo.offset)
            elif self.is_folder:
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

    def _tar(self, name: str) -> int:
        if name not in self.tars:
            if len(self.tars) >= MAX_OPEN_TARS:
                os.close(self.tars.pop(next(iter(self.tars))))
            self.tars[name] = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self.fd)
        return self.tars[name]

    def close(self) -> None:
        for fd in (self.fd, *self.tars.values()):
            os.close(fd)


def _photos_in_folder(src: Path, skipped: Counter[str], tars: list[str]) -> Iterator[tuple[str, int, int]]:
    """(name, 0, size) of every photo below a folder; links are not followed. The names of tars are added to `tars`."""
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
            elif name.endswith(".tar"):
                tars.append(name)
            elif not is_photo(name):
                skipped["not photos"] += 1
            else:
                yield name, 0, entry.stat(follow_symlinks=False).st_size


def _photos_in_tar(tar: BinaryIO, src: Path, skipped: Counter[str]) -> tuple[list[tuple[str, int, int]], list[Member]]:
    """(name, offset, size) of a tar's photos; or, if it holds tars and no photos, its inner tars."""
    size = os.fstat(tar.fileno()).st_size
    if archive := describe_archive(src):
        raise UserError(f"{src}: {archive}")
    if size == 0:
        raise UserError(f"{src}: empty (0 bytes)")
    found, inner = [], []
    for m in members(tar, 0, size, str(src)):
        if m.skip:
            skipped[m.skip] += 1
        elif is_photo(m.name):
            found.append((m.name, m.offset, m.size))
        elif m.name.endswith(".tar"):
            inner.append(m)
        else:
            skipped["not photos"] += 1
    if found and inner:
        skipped["not photos"] += len(inner)
        inner = []
    return found, inner


def _index_of(src: Path, tars: class_tars.ClassTars, skipped: Counter[str]) -> SourceIndex:
    if not tars.photos:
        raise UserError(_no_photos(src, skipped))
    return SourceIndex([Photo(*p) for p in tars.photos], tars.classes, tars.summary, skipped, tars.broken)


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
    elif src.is_dir() and (archive := first_archive(src)):
        hint = archive
    elif src.is_dir() and any(src.glob("*.tar")):
        hint = f"; give one of its tars, or run `make index DST={src}` if they are shards already"
    return f"{src}: no photos here (found: {others or 'nothing'}){hint}"
