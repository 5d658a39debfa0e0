"""A folder of shards, on this machine or at an address: its manifest, its index, and the bytes of a sample.

    folder/
      shard-000000.tar ...   WebDataset tars: <key>.jpg, <key>.cls where there is a class
      manifest.json          format, source, classes, per shard: name, samples, bytes, sha256
      index.npy              one INDEX record per sample, shard by shard in the manifest's order; memory-mapped
      sources.txt            what each sample was made from: a line per sample in the same order, its key, a tab, the photo's
                             name; the first line has the folder or tar of these names

A *sample id* is a row of the index. Nothing here decodes an image, and nothing is ever extracted from a tar: a sample is
`size` bytes at `offset` of its shard.
"""

import contextlib
import itertools
import json
import math
import mmap
import os
import re
import shlex
import stat
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipeline.decode import DecodeError, check_header, decode_array, read_header
from pipeline.remote import Prefetcher, Remote, is_address
from runtime.config import Speed
from runtime.errors import UserError, plural, suggest_path

FORMAT = 1
INDEX = np.dtype(
    [
        ("shard", "<u4"),  # position in the manifest's list of shards
        ("offset", "<u8"),  # of the photo's first byte in the tar
        ("size", "<u4"),  # bytes of the photo
        ("height", "<u2"),  # as stored: no reader rotates a photo, whatever its EXIF says
        ("width", "<u2"),
        ("label", "<i4"),  # position in the manifest's classes; -1: none
        ("crc32", "<u4"),  # of the photo's bytes: other bytes are damaged, even if a decoder accepts them
    ]
)
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SOURCES, ORIGIN = "sources.txt", "source"  # ORIGIN: the key of its first line
MAX_OPEN_FILES = 256
READS_PER_PAGE_RELEASE = 65_536


class Shards:
    """Manifest, index and bytes of one folder, or of one address (s3://, https://: see pipeline/remote; `speed` names its
    cache).

    max_missing: the share of all samples that may be lost because their shards are missing or truncated; 0: no shard may
    differ from the manifest in its size. `missing_summary` is one line on what is lost, empty if nothing is. None skips this
    check: for worker processes, and for tools that check by themselves. Remote shards are checked
    when they are downloaded. Raises UserError if the folder has no valid manifest or index, or if more than `max_missing` is
    lost.
    """

    weights = None  # of the sources of a Mixture
    incomparable = ""  # why the labels of several sources are not comparable

    def __init__(self, folder: str | Path | Remote, speed: Speed | None = None, max_missing: float | None = 0.0):
        if isinstance(folder, str) and is_address(folder):
            folder = Remote(folder, speed)
        self._remote = folder if isinstance(folder, Remote) else None
        self._prefetcher = Prefetcher(self._remote) if self._remote else None
        self.is_remote = self._remote is not None
        local = folder.folder if isinstance(folder, Remote) else Path(folder)
        self.folder: Path | str = self._remote.address if self._remote else local
        self.manifest = self._read_manifest(local)
        self.shards: list[dict] = self.manifest["shards"]
        self.classes: list[str] = self.manifest["classes"]
        self.counts = np.array([s["samples"] for s in self.shards], np.int64)  # [S]
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])  # [S+1] first sample id of each shard
        try:
            # A plain ndarray over the map: the same pages, without memmap's cost at every look-up
            mapped = np.load(local / "index.npy", mmap_mode="r", allow_pickle=False)
            self.index, self._map = np.asarray(mapped), getattr(mapped, "_mmap", None)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.folder}/index.npy: {error}; `make index DST={_word(self.folder)}` writes it again"
            ) from None
        if self.index.dtype != INDEX or len(self.index) != self.starts[-1]:
            raise UserError(
                f"{self.folder}: the index holds {len(self.index)} samples, the manifest {self.starts[-1]}; "
                f"`make index DST={_word(self.folder)}` writes both again"
            )
        self._actual_bytes: dict[int, int] = {}  # of each shard whose size differs from the manifest's; missing: -1
        check = max_missing is not None and self._remote is None
        self.missing_summary = self._check_sizes(local, max_missing or 0.0) if check else ""
        self._files: dict[int, BinaryIO] = {}
        self._lock = threading.Lock()
        self._reads = 0

    def __len__(self) -> int:
        return len(self.index)

    @property
    def parts(self) -> "list[Shards]":
        """The sources that these shards consist of: one. A Mixture has several."""
        return [self]

    def folder_of(self, sample: int) -> Path | str:
        """The folder or address that a sample is in."""
        return self.folder

    def records(self, ids: np.ndarray) -> np.ndarray:
        """INDEX records [n] of samples [n]."""
        return self.index[ids]

    def labels(self, ids: np.ndarray | None = None) -> np.ndarray:
        """Labels of samples [n], of all without `ids`; -1: none."""
        return self.index["label"] if ids is None else self.index["label"][ids]

    def __reduce__(self):  # another process of this machine maps the index by itself, and looks at no shard again
        found = {"_actual_bytes": self._actual_bytes, "missing_summary": self.missing_summary}
        return Shards, (self._remote or self.folder, None, None), found

    def _read_manifest(self, local: Path) -> dict:
        """The manifest of a folder on this machine. Raises UserError if it is missing or not a manifest of shards."""
        path = local / "manifest.json"
        if not path.is_file():
            raise UserError(f"{self.folder}: {_no_manifest(local)}")
        try:
            manifest = json.loads(path.read_text())
            if manifest["format"] != FORMAT:
                raise UserError(
                    f"{self.folder}/manifest.json: format {manifest['format']}, but this program reads format {FORMAT}; "
                    "make the shards again"
                )
            shards = manifest["shards"]
            np.array([s["samples"] for s in shards], np.int64)
            bad = [s["name"] for s in shards if s["name"] in ("", ".", "..") or {"/", "\0"} & {*s["name"]}]
            if bad or any(s["bytes"] < 0 or s["samples"] < 0 for s in shards):
                raise ValueError(f"'{bad[0]}' is not the name of a shard" if bad else "negative numbers")
            _ = manifest["classes"]
        except (ValueError, KeyError, TypeError, OverflowError, OSError) as error:
            raise UserError(f"{self.folder}/manifest.json: not a manifest of shards ({error!r})") from None
        return manifest

    def _check_sizes(self, folder: Path, max_missing: float) -> str:
        """One line on the shards that are missing or differ in size from the manifest. Raises UserError if more than
        `max_missing` of all samples are lost."""
        problems, lost = [], 0
        for i, shard in enumerate(self.shards):
            path = folder / shard["name"]
            try:
                found = path.stat()
                actual = found.st_size if stat.S_ISREG(found.st_mode) else -1
                what = f"has {plural(actual, 'byte')}" if actual >= 0 else "is not a file"
            except OSError as error:
                actual, what = -1, "is missing" if isinstance(error, FileNotFoundError) else f"{error.strerror}"
            if actual == shard["bytes"]:
                continue
            self._actual_bytes[i] = actual
            records = self.index[self.starts[i] : self.starts[i + 1]]
            beyond = np.flatnonzero((records["offset"] + records["size"]).astype(np.int64) > actual)
            lost += len(beyond)
            loss = describe_loss(beyond, records, int(self.starts[i]))
            problems.append(f"{path}: {what}, the manifest says {plural(shard['bytes'], 'byte')}: {loss}")
        if not problems:
            return ""
        more = f"; and {plural(len(problems) - 3, 'more shard')}" if len(problems) > 3 else ""
        line = f"{'; '.join(problems[:3])}{more}; {lost} of all {plural(len(self), 'sample')} are lost"
        if lost > max_missing * len(self) or max_missing == 0:
            share = math.ceil(1000 * max(lost, 1) / len(self)) / 1000
            raise UserError(
                f"{line}; copy or make these shards again (`make verify DST={_word(folder)}` checks every byte), or train "
                f"without the lost samples: data.max_missing={share:g}"
            )
        return line

    def is_lost(self, sample: int) -> bool:
        """Whether a sample was beyond the end of its shard when the folder was opened."""
        record = self.index[sample]
        actual = self._actual_bytes.get(int(record["shard"]))
        return actual is not None and int(record["offset"]) + int(record["size"]) > actual

    def read(self, sample: int) -> bytes:
        """The photo's bytes as they are in the shard, valid or not (see `validation_error`); fewer bytes if they cannot be
        read. Thread-safe."""
        self._reads += 1
        if self._reads % READS_PER_PAGE_RELEASE == 0:
            self.release_pages()
        record = self.index[sample]
        try:
            file = self._file(int(record["shard"]))
            return os.pread(file.fileno(), int(record["size"]), int(record["offset"]))
        except OSError:  # missing, or a disk error: for the reader the sample is damaged
            return b""

    def prefetch(
        self, current: list[int], upcoming: list[int], distinct_ranks: int, others: Sequence[int] = ()
    ) -> None:
        """Download shards in the background, if they are remote. current: the shards that this process reads now; upcoming:
        those that it reads next; distinct_ranks: processes that read other shards than this one; others: bytes that each
        other source of a mixture needs in the cache now. See Plan.prefetch."""
        if self._prefetcher is not None:
            self._prefetcher.request(self.shards, current, upcoming, distinct_ranks, others)

    def release_pages(self) -> None:
        """Release the resident pages of the index; they stay in the kernel's cache and come back on access. Without this, an
        epoch over 100 M samples would end with all 2.8 GB of their index resident."""
        if self._map is not None and hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def is_valid(self, sample: int, photo: bytes) -> bool:
        """Whether these are the bytes that the index was written for, and a photo of the indexed size."""
        return not self.validation_error(sample, photo)

    def validation_error(self, sample: int, photo: bytes) -> str:
        """What is wrong with a photo's bytes, empty if nothing is. Every reader checks this before it decodes (30 µs for
        110 kB)."""
        record = self.index[sample]
        if len(photo) != record["size"]:
            return f"only {len(photo)} of its {record['size']} bytes could be read"
        if zlib.crc32(photo) != record["crc32"]:
            return "its bytes are not those that were indexed (crc32)"
        size, height, width = read_header(photo), int(record["height"]), int(record["width"])
        if size is None:
            return "it is not a JPEG, PNG or WebP"
        if size != (height, width):
            return f"its header says {size[0]} x {size[1]} pixels, the index {height} x {width}"
        try:
            check_header(photo)
        except DecodeError as error:
            return str(error)
        return ""

    def describe(self, sample: int) -> dict[str, str | int]:
        """Where a damaged sample is and what is wrong with it, for damaged.jsonl: shard, first byte, source, why."""
        record = self.index[sample]
        photo = self.read(sample)
        why = self.validation_error(sample, photo)
        try:
            if not why:  # what the index says of it is right, so its pixels are not
                decode_array(photo)
                why = "nothing is wrong with it now: the disk failed for a moment"
        except DecodeError as error:
            why = f"the decoder refuses it: {error}"
        shard = self.shards[int(record["shard"])]["name"]
        return {"shard": shard, "byte": int(record["offset"]), "source": self.source(sample), "why": why}

    def source(self, sample: int) -> str:
        """Where a user finds what a sample was made from: the photo, by sources.txt, or else `shard/member`, which is what
        tars of other programs have. "" if neither can be read. Of remote shards only the second."""
        shard, row = int(self.index["shard"][sample]), sample - int(self.starts[self.index["shard"][sample]])
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, StopIteration):
            if self._remote is None:
                with open(Path(self.folder) / SOURCES, "rb") as lines:
                    origin = next(lines)
                    lines.seek(len(origin) + self.shards[shard]["sources"])  # where the shard's lines begin
                    line = next(itertools.islice(lines, row, None))
                return "/".join(text.decode().rstrip("\n").partition("\t")[2] for text in (origin, line))
        with contextlib.suppress(OSError, UserError):
            header = os.pread(self._file(shard).fileno(), 512, max(0, int(self.index["offset"][sample]) - 512))
            if name := member_name(header):
                return f"{self.shards[shard]['name']}/{name}"
        return ""

    def sources(self) -> list[str]:
        """`source` of every sample, without the folder in the first line of sources.txt, which is read once. Of remote
        shards `shard/byte`: no shard is downloaded for it."""
        if self._remote:
            shards, offsets = self.index["shard"].tolist(), self.index["offset"].tolist()
            return [f"{self.shards[shard]['name']}/{at}" for shard, at in zip(shards, offsets, strict=True)]
        with contextlib.suppress(OSError, ValueError):
            lines = (Path(self.folder) / SOURCES).read_text("utf-8").rstrip("\n").split("\n")[1:]
            if len(lines) == len(self):
                return [line.partition("\t")[2] for line in lines]
        return [self.source(sample) for sample in range(len(self))]

    def _file(self, shard: int) -> BinaryIO:
        file = self._files.get(shard)
        if file is None:
            with self._lock:
                if len(self._files) >= MAX_OPEN_FILES:  # a file that another thread reads stays open until it is done
                    self._files.pop(next(iter(self._files)))
                if self._remote is None:
                    file = open(Path(self.folder) / self.shards[shard]["name"], "rb", buffering=0)  # noqa: SIM115
                else:  # close what the cache has evicted: its disk space is free only then
                    for old in [i for i, f in self._files.items() if os.fstat(f.fileno()).st_nlink == 0]:
                        del self._files[old]
                    file = self._remote.open(self.shards[shard])
                self._files[shard] = file
        return file


def _no_manifest(folder: Path) -> str:
    """What is in the place of a folder of shards, and the command that helps."""
    no_shards = "no shards here (no manifest.json)"
    if not folder.is_dir():
        if re.search(r"[*?\[{]|\.tar$", str(folder)):
            return f"{no_shards}; give the folder of the tars{'' if folder.parent == Path() else f': {folder.parent}'}"
        return f"{'not a folder' if folder.exists() else 'no such folder'}{suggest_path(folder)}"
    if any(path.suffix.lower() == ".tar" for path in folder.iterdir()):
        index = f"`make index DST={_word(folder)}` writes the manifest"
        return f"{no_shards}; if these tars were made by another program, {index}"
    made = [path.parent for path in itertools.islice(folder.glob("*/manifest.json"), 4)]
    if made:
        return f"{no_shards}, but in {' and '.join(sorted(map(str, made)))}: name one of them"
    if has_photos(folder):
        beside = folder.with_name(f"{folder.name}-shards") if folder.name else folder.absolute().with_name("shards")
        if (beside / "manifest.json").is_file():
            return f"photos, not shards, which seem to be in {beside}"
        return f"photos, not shards; `make shards SRC={_word(folder)} DST={_word(beside)}` makes shards of them"
    return f"{no_shards}; `make shards SRC=photos/ DST={_word(folder)}` makes shards from a folder of photos"


def _word(path: str | Path) -> str:
    return shlex.quote(str(path))


def has_photos(folder: Path) -> bool:
    """Whether a folder, or one inside it, holds photos: judged by some thousand names."""
    names = (name for _, _, files in os.walk(folder) for name in files)
    return any(name.lower().endswith(PHOTO_SUFFIXES) for name in itertools.islice(names, 5000))


def member_name(header: bytes) -> str:
    """The name in a USTAR header, printable; "" if this is no header."""
    name = header[:100].split(b"\0")[0].decode("utf-8", "backslashreplace")
    return name if header[257:262] == b"ustar" and name.isprintable() else ""


def describe_loss(beyond: np.ndarray, records: np.ndarray, first_id: int) -> str:
    """How many of a shard's samples are lost, and from which one on. beyond: rows of `records` (INDEX, the shard's samples)
    that lie beyond its end; first_id: sample id of the shard's first sample."""
    since = ""
    if len(beyond):
        since = f", from sample {first_id + beyond[0]} (byte {records['offset'][beyond[0]]}) on"
    return f"{len(beyond)} of its {plural(len(records), 'sample')} {'is' if len(beyond) == 1 else 'are'} lost{since}"
