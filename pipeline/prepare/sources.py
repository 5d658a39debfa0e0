"""What photos there are: in a folder, in a tar, in ImageNet's own tars. Names, places and sizes; no photo is opened here.

Nothing is extracted, unpickled or followed: a photo is `size` bytes at `offset` of a file. Links, devices, fifos, sparse
members and names that lead out (`/x`, `../x`) are passed over and counted.

Which photos have a class (`labels="auto"`):
  folder           The folders directly in SRC are the classes if all photos lie below them and there are at least two.
                   Where SRC holds nothing but one folder called train, val, test..., its folders are looked at instead.
                   Else there are no classes.
  tar              The same; a folder that all its members share (`imagenette/...`) is passed through first.
  tar of tars      ILSVRC2012_img_train.tar: every inner tar is a class. Read where it lies, nothing is unpacked.
  ILSVRC2012_val   Photos by that name, in a tar or a folder, with the devkit's ground truth; classes are the sorted synsets,
                   as for the training photos. Without the devkit: no classes.
"yes" insists on classes (one folder is enough), "no" wants none.
"""

import fnmatch
import hashlib
import io
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from runtime.errors import UserError, suggest

ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")
SPLITS = {"train", "training", "val", "valid", "validation", "test"}
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
BLOCK = 512
HEADER_AT_MOST = 1 << 20  # bytes of a long name or PAX header; real ones have a few hundred


class Photo(NamedTuple):
    """Where one photo lies: a file of its own below SRC, or `size` bytes at `offset` of SRC, which is a tar."""

    name: str  # below SRC; undecodable bytes as surrogates
    offset: int
    size: int
    label: int  # position in the classes; -1: none


@dataclass
class SourceIndex:
    """All photos of a source, sorted by name, and how they were understood."""

    photos: list[Photo]
    classes: list[str]
    told: str  # one line: what was taken for what
    skipped: Counter[str]  # what was passed over, by kind

    def digest(self) -> str:
        """sha256 of names, sizes and labels: the same photos as a folder and as a tar have the same."""
        sha = hashlib.sha256()
        for p in self.photos:
            sha.update(f"{p.name}\0{p.size} {p.label}\n".encode("utf-8", "surrogateescape"))
        return sha.hexdigest()


def list_photos(src: Path, labels: str = "auto", devkit: Path | None = None) -> SourceIndex:
    """The photos of a folder or a tar. `labels`: auto, yes, no (see above).

    Raises UserError where there are none, OSError where the source cannot be read.
    """
    if not src.exists():
        known = os.listdir(src.parent) if src.parent.is_dir() else []
        raise UserError(f"{src}: no such folder or tar{suggest(src.name, known)}")
    skipped: Counter[str] = Counter()
    if src.is_dir():
        found = sorted(_in_folder(src, skipped))
    elif src.is_file():
        with src.open("rb") as tar:
            found, inner = _in_tar(tar, src, skipped)
            if inner:
                _refuse_devkit(src, devkit)
                return _tar_of_tars(tar, src, inner, labels, skipped)
        found.sort()
    else:
        raise UserError(f"{src}: neither a folder nor a tar")
    if not found:
        raise UserError(_nothing_here(src, skipped))
    found = _without_duplicates(found, skipped)
    names = [name for name, _, _ in found]
    shared = "" if src.is_dir() else _shared_folder(names)
    if fnmatch.fnmatch(names[0], "ILSVRC2012_val_*") and not any("/" in name for name in names):
        label_of, classes, told = _validation(src, names, labels, devkit)
    else:
        _refuse_devkit(src, devkit)
        label_of, classes, told = _folders_as_classes(
            src, shared, [name.removeprefix(shared) for name in names], labels
        )
    photos = [Photo(*place, label) for place, label in zip(found, label_of, strict=True)]
    return SourceIndex(photos, [shown(c) for c in classes], told, skipped)


class Unread(Exception):
    """The source does not give a photo's bytes: not the photo's fault, so its shard is tried again by the next run."""


class Source:
    """Bytes of photos below a folder or inside a tar, by offset, no link followed."""

    def __init__(self, src: Path):
        self.fd = os.open(src, os.O_RDONLY)
        self.is_folder = src.is_dir()

    def read(self, photo: Photo, at_most: int) -> bytes:
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
            raise Unread(f"cannot be read: {error.strerror}") from None
        if len(data) != photo.size:
            raise Unread("has changed since it was listed")
        return data

    def close(self) -> None:
        os.close(self.fd)


def shown(name: str) -> str:
    """A name fit for a line of text and for UTF-8: control characters and undecodable bytes are spelled out."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_photo(name: str) -> bool:
    base = name.rpartition("/")[2]
    return base.lower().endswith(ENDINGS) and not base.startswith(".")  # ._x.jpg: what macOS leaves beside a photo


# ---- folders


def _in_folder(src: Path, skipped: Counter[str]) -> Iterator[tuple[str, int, int]]:
    """(name, 0, size) of every photo below a folder, links not followed."""
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


# ---- tars


class Member(NamedTuple):
    """One entry of a tar: `size` bytes at `offset` of the file that holds the tar."""

    name: str
    offset: int
    size: int
    skip: str  # why it is passed over ("links", ...); empty for an ordinary file


def members(tar: BinaryIO, start: int, end: int, where: str) -> Iterator[Member]:
    """Members of the tar in bytes [start, end) of a file, from their headers alone (USTAR, GNU, PAX); no folders.

    Not `tarfile`: it ends without a word at a header that is cut or damaged, and believes negative sizes.
    Raises UserError, naming the byte, where the tar is cut, damaged, or no tar.
    """
    at = start
    name, size, skip = "", -1, ""  # what extension headers say of the member that follows
    while True:
        header = os.pread(tar.fileno(), BLOCK, at) if at + BLOCK <= end else b""
        if len(header) < BLOCK:
            raise UserError(f"{where}: cut at byte {at}: the tar has no end (two empty blocks of 512 bytes)")
        if header.count(0) == BLOCK:
            return
        try:
            if _number(header[148:156]) != sum(header[:148]) + 8 * ord(" ") + sum(header[156:]):
                raise ValueError
            here = _number(header[124:136])
        except ValueError:
            raise UserError(f"{where}: byte {at} is no tar header: damaged, cut, or no tar") from None
        kind, data = header[156:157], at + BLOCK
        if kind in b"xLKg":
            after = _whole(data, here, end, where)
            text = os.pread(tar.fileno(), here, data) if here <= HEADER_AT_MOST else b""
            if here > HEADER_AT_MOST:
                skip = "huge headers"
            elif kind == b"L":
                name = text.split(b"\0")[0].decode("utf-8", "surrogateescape")
            elif kind == b"x":
                try:
                    name, size, skip = _pax(text, name, size, skip)
                except ValueError:
                    raise UserError(f"{where}: the PAX header at byte {at} is damaged") from None
            at = after
            continue
        if kind == b"S":  # GNU sparse: a chain of blocks with the map stands before the data
            more = header[482]
            while more:
                more, data = os.pread(tar.fileno(), BLOCK, data).ljust(BLOCK, b"\0")[504], data + BLOCK
            skip = skip or "sparse members"
        elif kind in b"12":
            skip, here = skip or "links", 0
        elif kind in b"346":
            skip, here = skip or "special files", 0
        elif kind not in b"\x00075":
            skip = skip or "special files"
        name = name or _ustar_name(header)
        size = 0 if kind in b"123456" else here if size < 0 else size
        after = _whole(data, size, end, where)
        if kind != b"5" and not name.endswith("/"):
            name = name.removeprefix("./")
            if name.startswith("/") or ".." in name.split("/"):
                skip = skip or "unsafe names"
            yield Member(name, data, size, skip)
        at, name, size, skip = after, "", -1, ""


def _whole(data: int, size: int, end: int, where: str) -> int:
    """Where the next header stands, once it is known that all `size` bytes at `data` are there."""
    if data + size > end:
        raise UserError(
            f"{where}: cut: the member at byte {data - BLOCK} has {size} bytes, only {end - data} are there"
        )
    return data + size + -size % BLOCK


def _number(field: bytes) -> int:
    """A number of a header: octal digits, or binary where the first byte is 0x80. ValueError if neither."""
    value = int.from_bytes(field[1:], "big") if field[0] == 0x80 else int(field.split(b"\0")[0].strip() or b"0", 8)
    if value < 0:
        raise ValueError(value)
    return value


def _ustar_name(header: bytes) -> str:
    name = header[:100].split(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0")[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _pax(text: bytes, name: str, size: int, skip: str) -> tuple[str, int, str]:
    """(name, size, skip) after the records `<length> <key>=<value>\\n` of a PAX header. ValueError if damaged."""
    at = 0
    while at < len(text):
        space = text.index(b" ", at, at + 20)
        end = at + int(text[at:space])
        if not space < end <= len(text):
            raise ValueError(end)
        key, _, value = text[space + 1 : end - 1].partition(b"=")
        if key == b"path":
            name = value.decode("utf-8", "surrogateescape")
        elif key == b"size":
            size = int(value)
            if size < 0:
                raise ValueError(size)
        elif key.startswith(b"GNU.sparse"):
            skip = "sparse members"
        at = end
    return name, size, skip


def _in_tar(tar: BinaryIO, src: Path, skipped: Counter[str]) -> tuple[list[tuple[str, int, int]], list[Member]]:
    """(name, offset, size) of a tar's photos; or, if it holds tars and nothing else, those."""
    size = os.fstat(tar.fileno()).st_size
    if tar.read(2) == b"\x1f\x8b":
        raise UserError(f"{src}: compressed, so no photo can be read where it lies; `gunzip -k {src}` first")
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
        raise UserError(_nothing_here(src, skipped))
    photos = [Photo(*p) for p in sorted(places)]
    classes = [] if labels == "no" else [shown(m.name[:-4]) for m in inner]
    return SourceIndex(photos, classes, f"a tar of {len(inner)} tars, read where they lie: one class each", skipped)


def _shared_folder(names: list[str]) -> str:
    """The folder that all names begin with and that is not the only one there is: `imagenette/`, or nothing."""
    top = names[0].partition("/")[0] + "/"
    return top if all(n.startswith(top) for n in names) and any(n.count("/") > 1 for n in names) else ""


def _without_duplicates(found: list[tuple[str, int, int]], skipped: Counter[str]) -> list[tuple[str, int, int]]:
    """Sorted photos, of equal names only the first: a tar can hold a name twice."""
    kept = [f for f, before in zip(found, [("", 0, 0), *found], strict=False) if f[0] != before[0]]
    if len(kept) < len(found):
        skipped["names twice"] += len(found) - len(kept)
    return kept


def _nothing_here(src: Path, skipped: Counter[str]) -> str:
    others = ", ".join(f"{n} {kind}" for kind, n in sorted(skipped.items()))
    hint = f"; photos end in {' '.join(ENDINGS)}"
    if skipped["links"]:
        hint = "; links are not followed: give the folder they lead to"
    elif src.is_dir() and any(src.glob("*.tar")):
        hint = f"; give one of its tars, or `make index DST={src}` if they are shards already"
    return f"{src}: no photos here (found: {others or 'nothing at all'}){hint}"


# ---- classes


def _folders_as_classes(src: Path, shared: str, names: list[str], labels: str) -> tuple[list[int], list[str], str]:
    """Label per photo, classes, and a line that says what was taken for what; names below SRC/`shared`."""
    where = f"{src}/{shared}".rstrip("/")
    folder_of = [name.partition("/")[0] if "/" in name else "" for name in names]
    folders = sorted(set(folder_of))
    if labels != "no" and len(folders) == 1 and folders[0] in SPLITS and all(n.count("/") > 1 for n in names):
        where = f"{where}/{folders[0]}"
        folder_of = [name.split("/", 2)[1] for name in names]
        folders = sorted(set(folder_of))
    if labels == "auto" and len(folders) > 1 and set(folders) <= SPLITS:
        one = f"give one of them ({src}/{folders[0]})" if src.is_dir() else "make shards of one of them"
        raise UserError(f"{where} holds {' and '.join(folders)}: {one}, or --labels no to take all without classes")
    direct = "" in folders
    if labels == "yes" and direct:
        stray = shown(names[folder_of.index("")])
        raise UserError(
            f"--labels yes: {stray} lies directly in {where}; every photo must lie in the folder of its class"
        )
    if labels == "yes" or (labels == "auto" and not direct and len(folders) > 1):
        position = {folder: i for i, folder in enumerate(folders)}
        told = f"{len(folders)} classes: the folders in {where} (--labels no for none)"
        return [position[folder] for folder in folder_of], folders, told
    why = "as asked" if labels == "no" else "photos lie directly in it" if direct else "all lie in one folder"
    return [-1] * len(names), [], f"no classes in {where}: {why} (--labels yes: one class per folder)"


def _refuse_devkit(src: Path, devkit: Path | None) -> None:
    if devkit:
        raise UserError(f"--devkit: {src} does not hold ImageNet's validation photos (ILSVRC2012_val_*.JPEG)")


def _validation(src: Path, names: list[str], labels: str, devkit: Path | None) -> tuple[list[int], list[str], str]:
    """ImageNet's validation photos: line k of the devkit's ground truth is the class of ILSVRC2012_val_<k>.JPEG."""
    beside = src.parent / DEVKIT
    if labels == "no" or (devkit is None and labels == "auto" and not beside.is_file()):
        why = "as asked" if labels == "no" else f"no {DEVKIT} beside it (--devkit FILE brings their classes)"
        return [-1] * len(names), [], f"ImageNet's validation photos without classes: {why}"
    devkit = devkit or beside
    truth, synsets = _read_devkit(devkit)
    classes = sorted(synsets.values())
    position = {synset: i for i, synset in enumerate(classes)}
    label_of = []
    for name in names:
        match = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", name)
        if not match or not 1 <= int(match[1]) <= len(truth):
            raise UserError(f"{src}: {shown(name)} is none of the {len(truth)} validation photos that {devkit} knows")
        label_of.append(position[synsets[truth[int(match[1]) - 1]]])
    return label_of, classes, f"ImageNet's validation photos: {len(classes)} classes from {devkit.name}"


def _read_devkit(devkit: Path) -> tuple[list[int], dict[int, str]]:
    """(ILSVRC2012 id of every validation photo, synset of every id that has no children: the 1000 classes)."""
    try:
        from scipy.io import loadmat  # only here: meta.mat is the one file that says which synset an id is
    except ImportError:
        raise UserError(f"reading {devkit.name} needs scipy: `pip install scipy`, or --labels no") from None
    wanted = {"validation_ground_truth.txt": b"", "meta.mat": b""}
    try:
        with tarfile.open(devkit, "r:gz") as tar:
            for m in tar:
                for ending in wanted:
                    if m.isreg() and m.name.endswith(ending) and m.size < 1 << 26:
                        wanted[ending] = tar.extractfile(m).read()  # type: ignore[union-attr]  # a regular file
        synsets = loadmat(io.BytesIO(wanted["meta.mat"]), squeeze_me=True)["synsets"]
        leaves = synsets[synsets["num_children"] == 0]
        ids = {int(i): str(wnid) for i, wnid in zip(leaves["ILSVRC2012_ID"], leaves["WNID"], strict=True)}
        truth = [int(line) for line in wanted["validation_ground_truth.txt"].split()]
        if not truth or not set(truth) <= set(ids):
            raise ValueError("the ground truth names ids without a synset")
    except FileNotFoundError:
        raise UserError(f"{devkit}: no such file; --devkit takes ImageNet's {DEVKIT}") from None
    except Exception as error:  # whatever tarfile, zlib and loadmat say of a file that is something else
        raise UserError(f"{devkit}: not ImageNet's {DEVKIT}: {error}") from None
    return truth, ids
