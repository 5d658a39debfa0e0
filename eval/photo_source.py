"""The photos that features are made of: files of a folder or of a list, or the samples of shards. Imports no torch.

Files are read as `make shards` reads them: any of its formats, turned upright, over white; shards as they are stored. So
both are the photo that a person sees.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from eval.target import open_shards
from pipeline.decode import MAX_PIXELS, DecodeError, decode_array, read_header
from pipeline.prepare.kinds import unread_reason
from pipeline.prepare.names import printable
from pipeline.prepare.photo import seen_pixels
from pipeline.prepare.skipped import Skipped, counts
from pipeline.prepare.sources.walk import photos_in_folder
from pipeline.remote import is_address
from pipeline.shards import Shards
from runtime.config import Config
from runtime.errors import UserError, suggest_path


class PhotoSource(Protocol):
    """names: one a photo, in the order of the features' rows. note: what of the source is not among them."""

    names: list[str]
    note: str

    def pixels(self, row: int) -> NDArray[np.uint8]:
        """A photo, [H,W,3], RGB. Raises DecodeError with the reason if it is damaged."""
        raise NotImplementedError

    def digest(self) -> str:
        """A hash that changes with the photos."""
        raise NotImplementedError


class FilePhotos:
    """Files below a folder. names: paths below it, or absolute ones."""

    def __init__(self, folder: Path, names: Sequence[str], sizes: Sequence[int], note: str = ""):
        self.folder, self.paths, self.sizes, self.note = folder, list(names), list(sizes), note
        self.names = [printable(name) for name in names]

    def pixels(self, row: int) -> NDArray[np.uint8]:
        try:
            data = (self.folder / self.paths[row]).read_bytes()
        except OSError as error:
            raise DecodeError(f"cannot be read: {error.strerror}") from None
        if why := unread_reason(data, self.names[row]):
            raise DecodeError(why)
        size = read_header(data)
        if size and size[0] * size[1] > MAX_PIXELS:
            raise DecodeError(f"{size[0]} x {size[1]} pixels are more than are read ({MAX_PIXELS:,})")
        return seen_pixels(data)

    def digest(self) -> str:
        rows = zip(self.sizes, self.names, strict=True)
        return hashlib.sha256("\n".join(f"{size} {name}" for size, name in rows).encode()).hexdigest()


class ShardPhotos:
    """All samples of shards, in the order of their index."""

    note = ""

    def __init__(self, shards: Shards):
        self.shards, self.names = shards, shards.sources()

    def pixels(self, row: int) -> NDArray[np.uint8]:
        photo = self.shards.read(row)
        if why := self.shards.validation_error(row, photo):
            raise DecodeError(why)
        return decode_array(photo)

    def digest(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.shards.index).data).hexdigest()  # with each photo's crc32


def open_photo_source(source: str, config: Config | None = None) -> PhotoSource:
    """The photos of a folder, of a list (a file with a path a line, relative to the list's folder), or of shards (a folder
    or an address, with the cache of a run's config). Raises UserError if there are none."""
    path = Path(source)
    if is_address(source) or (path / "manifest.json").is_file():
        found: PhotoSource = ShardPhotos(open_shards(source, config))
    elif path.is_dir():
        found = _photos_below(path)
    elif path.is_file():
        found = _photos_of_list(path)
    else:
        raise UserError(f"{source}: no such folder of photos, shards, or list of photos{suggest_path(source)}")
    if not found.names:
        raise UserError(f"{source}: no photos")
    return found


def _photos_below(folder: Path) -> FilePhotos:
    if (folder / "JPEGImages").is_dir():  # its masks are pictures too
        raise UserError(f"{folder}: in Pascal VOC's layout; name its photos: {folder / 'JPEGImages'}")
    tars, skipped = list[str](), Skipped()
    try:
        photos = sorted((name, size) for name, _, size in photos_in_folder(folder, False, tars, skipped))
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be read ({error.strerror})") from None
    if not photos and tars:
        open_shards(folder)  # says what tars without a manifest need
    left_out = skipped.counts
    left_out["tars"] += len(tars)
    return FilePhotos(folder, [n for n, _ in photos], [s for _, s in photos], counts(+left_out) if +left_out else "")


def _photos_of_list(file: Path) -> FilePhotos:
    try:
        lines = file.read_text("utf-8").splitlines()
    except UnicodeDecodeError:
        kind = "a tar; name the folder of the shards" if file.suffix == ".tar" else "no text"
        raise UserError(f"{file}: a list of photos has a path a line; this is {kind}") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    names, sizes = list[str](), list[int]()
    for number, line in enumerate(lines, 1):
        if not (name := line.strip()):
            continue
        path = file.parent / name
        if not path.is_file():
            raise UserError(f"{file}:{number}: {name}: no such file in {file.parent}{suggest_path(path)}")
        names.append(name)
        sizes.append(path.stat().st_size)
    return FilePhotos(file.parent, names, sizes)
