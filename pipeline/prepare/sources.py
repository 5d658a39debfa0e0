"""The photos of a source: a folder, a tar, or ImageNet's own tars. Names, offsets and sizes; no photo is decoded here.

A file with a photo's ending is a photo; what is wrong with it, the decoder says later. Any other file is judged by its
first bytes. Nothing is extracted or unpickled: a photo is `size` bytes at `offset` of a file. Devices, fifos, sparse
members, names that lead outside (`../x`), hidden files and the folders of file systems are skipped; so are links,
unless they are to be followed (walk.py). Whatever is skipped is counted and listed.

A tar or a folder of tars (ILSVRC2012_img_train.tar) has one tar per class (class_tars.py). For all other sources classes.py
says which photos have a class.
"""

import hashlib
import os
import re
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pipeline.prepare import class_tars
from pipeline.prepare.archives import AGAIN, fault, first_archive, unpack_outer
from pipeline.prepare.classes import describe_classes, label_photos, refuse_devkit
from pipeline.prepare.kinds import ARCHIVE, HEAD, is_palette_png
from pipeline.prepare.layout import make_command, word
from pipeline.prepare.names import ENDINGS, ending, has_photo_ending, printable
from pipeline.prepare.skipped import FOLLOW, Skipped, convert_command, counts, joined_tars, source_warnings
from pipeline.prepare.tar import Member, members
from pipeline.prepare.walk import photos_in_folder, photos_in_tar
from pipeline.shards import plural
from runtime.errors import UserError, suggest

LABEL_FILES = (".txt", ".csv", ".tsv", ".json", ".mat", ".xml")
MAX_LABEL_FILES = 5
MASK_SAMPLE = 3  # photos of a folder whose headers are read to tell masks from photos
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
    skipped: Skipped
    warnings: list[str] = field(default_factory=list)  # about the folders
    broken: list[dict] = field(default_factory=list)  # rows of rejected.jsonl: tars that were left out

    def digest(self) -> str:
        """sha256 of names, sizes and labels: equal for the same photos as a folder and as a tar."""
        sha = hashlib.sha256()
        for p in self.photos:
            sha.update(f"{p.name}\0{p.size} {p.label}\n".encode("utf-8", "surrogateescape"))
        return sha.hexdigest()

    def describe(self, src: Path, dst: Path) -> list[str]:
        """Lines for the user before the work begins: classes, what is skipped, warnings. src, dst: as they were given."""
        lines = []
        if self.classes:
            lines.append(describe_classes(self.classes, Counter(p.label for p in self.photos)))
        odd = (p.name for p in self.photos if not has_photo_ending(p.name))
        if endings := Counter(ending(name) or "no ending" for name in odd):
            lines.append(f"by their first bytes, not by their ending: {counts(endings)}")
        if self.skipped.listed:
            lines.append(f"skipped {counts(self.skipped.counts)}; {dst}/skipped.jsonl lists them")
        lines += joined_tars(self.skipped)
        in_tars = any(p.tar for p in self.photos)
        warnings = (*self.warnings, *source_warnings(self.skipped, {p.name for p in self.photos}, src, in_tars))
        return lines + [f"warning: {warning}" for warning in warnings]


def list_photos(
    src: Path,
    labels: str = "auto",
    devkit: Path | None = None,
    *,
    follow_links: bool = False,
    skip_broken: bool = False,
    dst: str = "DST",
) -> SourceIndex:
    """The photos of a folder, a tar, or a folder or tar of tars. `labels`: auto, yes, no (see classes.py). skip_broken: of
    several tars, leave out those that cannot be read. dst: the shards' folder, for messages.

    Raises UserError if there are none, or if the source holds several splits; OSError if it cannot be read.
    """
    if not src.exists():
        known = os.listdir(src.parent) if src.parent.is_dir() else []
        raise UserError(f"{src}: no such folder or tar{suggest(src.name, known)}")
    skipped = Skipped()
    if src.is_dir():
        tars: list[str] = []
        found = sorted(photos_in_folder(src, follow_links, tars, skipped))
        if not found and (len(tars) > 1 or (tars and labels == "yes")):
            refuse_devkit(src, devkit)
            return _index_of(src, class_tars.in_folder(src, tars, labels, dst, skip_broken, skipped), skipped)
        for name in tars:
            skipped.add_file(name, ARCHIVE)
        skipped.listed.sort(key=lambda row: row["source"])  # file systems list names in any order
    elif src.is_file():
        with src.open("rb") as tar:
            found, inner = _photos_in_tar(tar, src, skipped)
            if inner:
                refuse_devkit(src, devkit)
                return _index_of(src, class_tars.in_tar(src, inner, labels, dst, skip_broken, skipped), skipped)
        found.sort()
    else:
        raise UserError(f"{src}: neither a folder nor a tar")
    if not found:
        raise UserError(_no_photos(src, skipped))
    found = _without_duplicates(found, skipped)
    labeled = label_photos(src, [name for name, _, _ in found], labels, devkit, dst)
    photos = [Photo(*place, label) for place, label in zip(found, labeled.label_of, strict=True)]
    warnings = [*labeled.warnings, *_warn_of_masks(src, photos, labeled.below, dst)]
    if labels == "auto":
        warnings += _warn_of_samples(src, [p.name for p in photos], skipped, dst)
        warnings += [] if labeled.classes else _warn_of_labels(src, skipped)
    return SourceIndex(photos, [printable(c) for c in labeled.classes], labeled.summary, skipped, warnings)


class Unreadable(Exception):
    """The source does not give a photo's bytes. The photo may be intact, so the next run makes its shard again."""


class Source:
    """Bytes of photos below a folder or inside a tar, by offset. A photo that is a link is read only with `follow_links`."""

    def __init__(self, src: Path, follow_links: bool = False):
        self.fd = os.open(src, os.O_RDONLY)
        self.is_folder = src.is_dir()
        self.flags = os.O_RDONLY | os.O_NONBLOCK | (0 if follow_links else os.O_NOFOLLOW)
        self.tars: dict[str, int] = {}  # open tars of a folder of tars

    def read(self, photo: Photo, at_most: int) -> bytes:
        """The photo's bytes. Raises ValueError for none or more than `at_most`, Unreadable if they cannot be read."""
        if not 0 < photo.size <= at_most:
            raise ValueError("empty" if photo.size == 0 else f"{photo.size} bytes, more than --max-pixels can need")
        data = self._read(photo, photo.size + (self.is_folder and not photo.tar))  # a file may have grown
        if len(data) != photo.size:
            raise Unreadable("has changed since it was listed")
        return data

    def head(self, photo: Photo) -> bytes:
        """Its first bytes, as many as `kind_of` needs. Raises Unreadable if they cannot be read."""
        return self._read(photo, min(photo.size, HEAD))

    def _read(self, photo: Photo, size: int) -> bytes:
        try:
            if photo.tar or not self.is_folder:
                return os.pread(self._tar(photo.tar) if photo.tar else self.fd, size, photo.offset)
            fd = os.open(photo.name, self.flags, dir_fd=self.fd)
            try:
                return os.read(fd, size)
            finally:
                os.close(fd)
        except OSError as error:
            raise Unreadable(f"cannot be read: {error.strerror}") from None

    def _tar(self, name: str) -> int:
        if name not in self.tars:
            if len(self.tars) >= MAX_OPEN_TARS:
                os.close(self.tars.pop(next(iter(self.tars))))
            self.tars[name] = os.open(name, self.flags, dir_fd=self.fd)
        return self.tars[name]

    def close(self) -> None:
        for fd in (self.fd, *self.tars.values()):
            os.close(fd)


def _photos_in_tar(tar: BinaryIO, src: Path, skipped: Skipped) -> tuple[list[tuple[str, int, int]], list[Member]]:
    """(name, offset, size) of a tar's photos; or, if it holds tars and no photos, its inner tars."""
    size = os.fstat(tar.fileno()).st_size
    if why := fault(src):
        raise UserError(f"{src}: {why}")
    inner: list[Member] = []
    try:
        inside = members(tar, 0, size, str(src), skipped.joints(src.name))
        found = [(m.name, m.offset, m.size) for m in photos_in_tar(tar, inside, inner, skipped)]
    except UserError as error:
        raise UserError(f"{error}; {AGAIN}") from None
    if found:
        for m in inner:
            skipped.add_file(m.name, ARCHIVE)
        inner = []
    return found, inner


def _index_of(src: Path, tars: class_tars.ClassTars, skipped: Skipped) -> SourceIndex:
    if not tars.photos:
        raise UserError(_no_photos(src, skipped))
    photos = [Photo(*p) for p in tars.photos]
    return SourceIndex(photos, tars.classes, tars.summary, skipped, broken=tars.broken)


def _without_duplicates(found: list[tuple[str, int, int]], skipped: Skipped) -> list[tuple[str, int, int]]:
    """Sorted photos, of equal names only the first: a tar can hold a name twice."""
    unique: list[tuple[str, int, int]] = []
    for place in found:
        if unique and place[0] == unique[-1][0]:
            skipped.add(place[0], "duplicate names", "the tar holds another member of this name before it")
        else:
            unique.append(place)
    return unique


def _warn_of_masks(src: Path, photos: list[Photo], below: str, dst: str) -> list[str]:
    """A warning if a folder's photos are palette PNGs, as masks are. The headers of some photos of each folder are read.

    below: the folder below SRC that was looked at for classes.
    """
    by_folder: dict[str, list[Photo]] = {}
    for photo in photos:
        by_folder.setdefault(photo.name.rpartition("/")[0], []).append(photo)
    masks = []
    with closing(Source(src, follow_links=True)) as source:  # whatever was listed may be read
        for folder, inside in by_folder.items():
            sample = inside[:: max(1, len(inside) // MASK_SAMPLE)][:MASK_SAMPLE]
            if all(p.name.lower().endswith(".png") for p in sample) and all(_is_mask(source, p) for p in sample):
                masks.append(folder)
    if not masks:
        return []
    count = len(by_folder[masks[0]])
    like = "files like masks, not photos (palette PNGs)" if count > 1 else "file like a mask, not a photo (palette PNG)"
    more = f" (and {plural(len(masks) - 1, 'more folder')})" if len(masks) > 1 else ""
    top = [f.removeprefix(below).partition("/")[0] for f in masks]
    others = sorted({f.removeprefix(below).partition("/")[0] for f in by_folder} - {*top, ""})
    right = make_command(src, below + others[0], f"{dst}-{others[0]}") if others else "SRC=the folder of the photos"
    where = printable(f"{src}/{masks[0]}".rstrip("/"))
    return [f"{where} holds {count:,} {like}{more}; if they are masks, take the photos alone: {right}"]


def _is_mask(source: Source, photo: Photo) -> bool:
    try:
        return is_palette_png(source.head(photo))
    except Unreadable:
        return False


def _warn_of_samples(src: Path, photos: list[str], skipped: Skipped, dst: str) -> list[str]:
    """A warning if photos have a label beside them (x.jpg, x.cls): WebDataset samples, whose labels `index` reads."""
    labels = {row["source"].removesuffix(".cls") for row in skipped.listed if row["kind"] == ".cls files"}
    first = next((name for name in photos if printable(name.rpartition(".")[0]) in labels), "") if labels else ""
    if not first:
        return []
    how = f"`make index DST={word(str(src.parent))}` uses the tars there as they are, with their labels"
    if src.is_dir():
        new = word(f"{dst}-labeled")
        tar = f"tar --sort=name -cf {word(f'{dst}-labeled/shard-000000.tar')} -C {word(str(src))} ."
        how = f"`mkdir -p {new} && {tar} && make index DST={new}` packs them with their labels"
    return [
        f"{src} holds WebDataset samples ({printable(first)} with {printable(first.rpartition('.')[0])}.cls), whose labels "
        f"are not read here; {how}"
    ]


def _warn_of_labels(src: Path, skipped: Skipped) -> list[str]:
    """A warning if a file may hold the labels of photos that get none: `val_annotations.txt`, `imagelabels.mat`."""
    names = [row["source"] for row in skipped.listed if row["source"].lower().endswith(LABEL_FILES)]
    names = [name for name in names if re.search("label|annot|class|truth", name.rpartition("/")[2].lower())]
    if not names or len(names) > MAX_LABEL_FILES:  # more are not of all photos, but of one each
        return []
    return [
        f"{src}/{names[0]} may hold labels, which are not read; for classes, put the photos of each into a folder of its own"
    ]


def _no_photos(src: Path, skipped: Skipped) -> str:
    others = ", ".join(f"{n} {kind}" for kind, n in sorted(skipped.counts.items()))
    hint = f"; photos end in {' '.join(ENDINGS)}, or begin with the bytes of one"
    if pictures := skipped.pictures():
        hint = f"; {convert_command(pictures, src)}"
    elif skipped.counts["links"] and src.is_dir():
        hint = f"; links are not followed: {FOLLOW}"
    elif skipped.archives() and not src.is_dir():
        hint = f"; {unpack_outer(src)}"
    elif src.is_dir() and (archive := first_archive(src)):
        hint = archive
    elif system := next((row["source"] for row in skipped.listed if row["kind"] == "system folders"), ""):
        hint = f"; {system} is not looked into, but SRC={word(f'{src}/{system}'.rstrip('/'))} takes its photos"
    elif src.is_dir() and any(src.glob("*.tar")):
        hint = f"; give one of its tars, or run `make index DST={word(str(src))}` if they are shards already"
    return f"{src}: no photos here (found: {others or 'nothing'}){hint}"
