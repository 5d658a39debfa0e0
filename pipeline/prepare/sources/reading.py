"""The bytes of photos, of any source: by offset in a file, or a file as a whole. Nothing is extracted to a disk here."""

import os
import zlib
from collections.abc import Sequence

from pipeline.prepare.kinds import HEAD
from pipeline.prepare.sources.photos import Photo, Root

MAX_OPEN_FILES = 128  # of files that hold photos, by each process


class Unreadable(Exception):
    """The source does not give a photo's bytes. The photo may be intact, so the next run makes its shard again."""


class Reader:
    """Bytes of the photos of these sources. A photo that is a link is read only if its source follows links."""

    def __init__(self, roots: Sequence[Root]):
        self.roots = [os.open(root.path, os.O_RDONLY) for root in roots]
        self.flags = [os.O_RDONLY | os.O_NONBLOCK | (0 if root.follow_links else os.O_NOFOLLOW) for root in roots]
        self.is_folder = [root.path.is_dir() for root in roots]
        self.prefixes = [root.prefix for root in roots]
        self.files: dict[tuple[int, str], int] = {}  # those that hold many photos and are open

    def place(self, photo: Photo) -> str:
        """Where a user finds it, below the folder that holds all sources."""
        return self.prefixes[photo.root] + photo.place

    def read(self, photo: Photo, at_most: int) -> bytes:
        """The photo's bytes. Raises ValueError for none, more than `at_most` or damaged ones, Unreadable if they cannot be
        read."""
        if not 0 < photo.size <= at_most or photo.packed > at_most:
            raise ValueError("empty" if photo.size == 0 else f"{photo.size} bytes, more than --max-pixels can need")
        is_own_file = self.is_folder[photo.root] and not photo.file
        stored = self._read(photo, (photo.packed or photo.size) + is_own_file)  # a file may have grown
        data = _inflate(stored, photo.size) if photo.packed and len(stored) == photo.packed else stored
        if len(data) != photo.size:
            raise Unreadable("has changed since it was listed")
        if photo.crc is not None and zlib.crc32(data) != photo.crc:
            raise ValueError("damaged: its bytes do not have the checksum (crc32) that its source says")
        return data

    def head(self, photo: Photo) -> bytes:
        """Its first bytes, as many as `kind_of` needs. Raises Unreadable if they cannot be read."""
        if not photo.packed:
            return self._read(photo, min(photo.size, HEAD))
        try:
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(self._read(photo, min(photo.packed, 2 * HEAD)), HEAD)
        except zlib.error as error:
            raise Unreadable(f"damaged: {error}") from None

    def _read(self, photo: Photo, size: int) -> bytes:
        root = self.roots[photo.root]
        try:
            if photo.file:
                return os.pread(self._file(photo.root, photo.file), size, photo.offset)
            if not self.is_folder[photo.root]:
                return os.pread(root, size, photo.offset)
            fd = os.open(photo.name, self.flags[photo.root], dir_fd=root)
            try:
                return os.read(fd, size)
            finally:
                os.close(fd)
        except OSError as error:
            raise Unreadable(f"cannot be read: {error.strerror}") from None

    def _file(self, root: int, name: str) -> int:
        if (root, name) not in self.files:
            if len(self.files) >= MAX_OPEN_FILES:
                os.close(self.files.pop(next(iter(self.files))))
            self.files[root, name] = os.open(name, self.flags[root], dir_fd=self.roots[root])
        return self.files[root, name]

    def close(self) -> None:
        for fd in (*self.roots, *self.files.values()):
            os.close(fd)


def _inflate(data: bytes, size: int) -> bytes:
    """`size` bytes, deflated as in a zip. Raises ValueError if they are not exactly these: no more are ever made."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        found = inflater.decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(f"damaged: {error}") from None
    if len(found) != size or not inflater.eof:
        raise ValueError(
            f"damaged: the zip says {size} bytes, and it unpacks to {'more' if len(found) > size else len(found)}"
        )
    return found
