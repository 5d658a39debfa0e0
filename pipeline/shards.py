"""A folder of shards, here or at an address: its manifest and index; and the Plan: which samples make global step i.

    folder/
      shard-000000.tar ...   WebDataset tars: <key>.jpg, <key>.cls where there is a class
      manifest.json          format, source, classes, per shard: name, samples, bytes, sha256
      index.npy              one INDEX record per sample, shard by shard in the manifest's order; loads by memory map

A *sample id* is a row of the index. Nothing here decodes a picture, and nothing is ever extracted from a tar: a sample
is `size` bytes at `offset` of its shard.
"""

import json
import math
import mmap
import os
import re
import stat
import threading
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipeline.decode import DecodeError, check_header, read_header
from pipeline.random import hash64, permute
from pipeline.remote.cache import Remote, is_address
from runtime.config import Speed
from runtime.errors import UserError

FORMAT = 1
INDEX = np.dtype(
    [
        ("shard", "<u4"),  # position in the manifest's list of shards
        ("offset", "<u8"),  # of the photo's first byte in the tar
        ("size", "<u4"),  # bytes of the photo
        ("height", "<u2"),  # as stored: no reader turns a photo, whatever its EXIF says
        ("width", "<u2"),
        ("label", "<i4"),  # position in the manifest's classes; -1: none
        ("crc32", "<u4"),  # of the photo's bytes: damage is what differs from this, whatever a decoder thinks
    ]
)
NEAR = 10  # replacements of a damaged sample that are looked for in its own shard; then in all of them
ATTEMPTS = 100  # replacements tried in all: a set with so many damaged samples in a row is no set


class Shards:
    """Manifest, index and bytes of one folder, or of one address (s3://, https://: see remote.py; `speed` says where its
    cache lies).

    Raises UserError where the folder is no shard folder, or where a share of the samples above `max_missing` lay in shards that
    are gone or cut (0: where any shard has another size than the manifest says). `missing_summary` is a line on what is borne,
    empty if there is nothing. max_missing=None does not look: for worker processes, and tools that look for themselves; an
    address is not looked at either, its shards are checked as they come.
    """

    def __init__(self, folder: str | Path | Remote, speed: Speed | None = None, max_missing: float | None = 0.0):
        if isinstance(folder, str) and is_address(folder):
            folder = Remote(folder, speed)
        self._remote = folder if isinstance(folder, Remote) else None
        here = folder.folder if isinstance(folder, Remote) else Path(folder)
        self.folder: Path | str = self._remote.address if self._remote else here
        manifest = here / "manifest.json"
        if not manifest.is_file():
            hint = ""
            if here.is_dir() and any(here.glob("*.tar")):
                hint = f"; these tars were made elsewhere? `make index DST={here}` writes one"
            elif here.is_dir():
                hint = f"; `make shards SRC=photos/ DST={here}` makes shards of a folder of photos"
            elif re.search(r"[*?\[{]|\.tar$", str(here)):
                hint = f"; give the folder that they lie in{'' if here.parent == Path() else f': {here.parent}'}"
            raise UserError(f"{self.folder}: no shards here (no manifest.json){hint}")
        try:
            self.manifest = json.loads(manifest.read_text())
            if self.manifest["format"] != FORMAT:
                told = f"format {self.manifest['format']}, this program reads format {FORMAT}"
                raise UserError(f"{self.folder}/manifest.json: {told}; make the shards again")
            self.shards: list[dict] = self.manifest["shards"]
            self.classes: list[str] = self.manifest["classes"]
            self.counts = np.array([s["samples"] for s in self.shards], np.int64)  # [S]
            odd = [s["name"] for s in self.shards if s["name"] in ("", ".", "..") or {"/", "\0"} & {*s["name"]}]
            if odd or any(s["bytes"] < 0 or s["samples"] < 0 for s in self.shards):
                raise ValueError(f"'{odd[0]}' is no name of a shard" if odd else "numbers below 0")
        except (ValueError, KeyError, TypeError, OverflowError, OSError) as error:
            raise UserError(f"{self.folder}/manifest.json: not a manifest of shards ({error!r})") from None
        try:
            # a plain ndarray over the map: the same pages, without memmap's cost at every look-up
            mapped = np.load(here / "index.npy", mmap_mode="r", allow_pickle=False)
            self.index, self._map = np.asarray(mapped), getattr(mapped, "_mmap", None)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.folder}/index.npy: {error}; `make index DST={self.folder}` writes it again"
            ) from None
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])  # [S+1] first sample id of each shard
        if self.index.dtype != INDEX or len(self.index) != self.starts[-1]:
            raise UserError(
                f"{self.folder}: the index holds {len(self.index)} samples, the manifest {self.starts[-1]}; "
                f"`make index DST={self.folder}` writes both again"
            )
        self._there: dict[int, int] = {}  # bytes of each shard that is gone or of another size than the manifest says
        look = max_missing is not None and self._remote is None  # what comes from far is checked as it comes
        self.missing_summary = self._look_for_loss(here, max_missing or 0.0) if look else ""
        self._files: dict[int, BinaryIO] = {}
        self._lock = threading.Lock()
        self._looks = 0

    def __len__(self) -> int:
        return len(self.index)

    def __reduce__(self):  # a worker process opens the folder anew
        return Shards, (self._remote or self.folder, None, None)

    def _look_for_loss(self, folder: Path, max_missing: float) -> str:
        """A line on shards that are gone or of another size than the manifest says. Raises UserError beyond `max_missing`."""
        told, lost = [], 0
        for i, shard in enumerate(self.shards):
            path = folder / shard["name"]
            try:
                found = path.stat()
                there = found.st_size if stat.S_ISREG(found.st_mode) else -1
                what = f"has {there} bytes" if there >= 0 else "is no file"
            except OSError as error:
                there, what = -1, "is missing" if isinstance(error, FileNotFoundError) else f"{error.strerror}"
            if there == shard["bytes"]:
                continue
            self._there[i] = there
            rows = self.index[self.starts[i] : self.starts[i + 1]]
            gone = np.flatnonzero((rows["offset"] + rows["size"]).astype(np.int64) > there)
            first = f", from sample {self.starts[i] + gone[0]} (byte {rows['offset'][gone[0]]}) on" if len(gone) else ""
            lost += len(gone)
            told.append(
                f"{path}: {what}, the manifest says {shard['bytes']} bytes: {len(gone)} of its {len(rows)} samples are "
                f"lost{first}"
            )
        if not told:
            return ""
        several = f"; and {len(told) - 3} more shards" if len(told) > 3 else ""
        line = f"{'; '.join(told[:3])}{several}; in all {lost} of {len(self)} samples are lost"
        if lost > max_missing * len(self) or max_missing == 0:
            share = math.ceil(1000 * max(lost, 1) / len(self)) / 1000
            raise UserError(
                f"{line}; copy or make these shards again (`make verify DST={self.folder}` looks at every byte), or train "
                f"without what is lost: data.max_missing={share:g}"
            )
        return line

    def is_lost(self, sample: int) -> bool:
        """Whether a sample was beyond the end of its shard when the folder was opened."""
        record = self.index[sample]
        there = self._there.get(int(record["shard"]))
        return there is not None and int(record["offset"]) + int(record["size"]) > there

    def read(self, sample: int) -> bytes:
        """The photo's bytes as they stand in the shard, sound or not (see `fault`); fewer where they cannot be read.
        Thread-safe."""
        self._looks += 1
        if self._looks % 65_536 == 0:
            self.forget_pages()
        record = self.index[sample]
        try:
            file = self._file(int(record["shard"]))
            return os.pread(file.fileno(), int(record["size"]), int(record["offset"]))
        except OSError:  # gone, or the disk's: the sample is damaged, whatever the reason
            return b""

    def prefetch(self, plan: "Plan", step: int, rank: int = 0, world: int = 1) -> None:
        """Let the shards of this rank's next steps come, where they come from far. Raises UserError where the cache is too
        small for them."""
        if self._remote is not None:
            self._remote.prefetch(self.shards, *plan.shards_ahead(step, rank, world), math.gcd(plan.lanes, world))

    def forget_pages(self) -> None:
        """Give back the index's pages that were looked at; they stay in the kernel's cache, and come back when asked for.
        Otherwise an epoch over 100 M samples would end with all 2.8 GB of their index resident."""
        if self._map is not None and hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def is_valid(self, sample: int, photo: bytes) -> bool:
        """Whether these are the bytes that the index was written for, and a photo of the size that it says (see `fault`)."""
        return not self.fault(sample, photo)

    def fault(self, sample: int, photo: bytes) -> str:
        """What is wrong with a photo's bytes, empty if nothing is; no decoder sees them before (30 µs for 110 kB)."""
        record = self.index[sample]
        if len(photo) != record["size"]:
            return f"only {len(photo)} of its {record['size']} bytes could be read"
        if zlib.crc32(photo) != record["crc32"]:
            return "its bytes are not those that were indexed (crc32)"
        size, height, width = read_header(photo), int(record["height"]), int(record["width"])
        if size is None:
            return "it is no JPEG, PNG or WebP"
        if size != (height, width):
            return f"its header promises {size[0]} x {size[1]} pixels, the index {height} x {width}"
        try:
            check_header(photo)
        except DecodeError as error:
            return str(error)
        return ""

    def describe(self, sample: int) -> dict[str, str | int]:
        """Where a damaged sample lies and what is wrong with it, for people: shard, first byte, why."""
        record = self.index[sample]
        why = self.fault(sample, self.read(sample)) or "a decoder refuses it, or the disk failed for a moment"
        return {"shard": self.shards[int(record["shard"])]["name"], "byte": int(record["offset"]), "why": why}

    def _file(self, shard: int) -> BinaryIO:
        file = self._files.get(shard)
        if file is None:
            with self._lock:
                if len(self._files) >= 256:  # lanes walk on; a file being read stays open until its reader lets go
                    self._files.pop(next(iter(self._files)))
                if self._remote is None:
                    file = open(Path(self.folder) / self.shards[shard]["name"], "rb", buffering=0)  # noqa: SIM115
                else:  # what the cache has unlinked since goes from the disk when nobody has it open
                    for old in [i for i, f in self._files.items() if os.fstat(f.fileno()).st_nlink == 0]:
                        del self._files[old]
                    file = self._remote.open(self.shards[shard])
                self._files[shard] = file
        return file


class Plan:
    """Which samples make global step i: a pure function of (seed, step), for any number of processes.

    An epoch permutes the shards and the samples inside each, lays them end to end and cuts the sequence into `lanes`
    equal lanes; position p of the epoch belongs to lane p mod `lanes`. A lane walks along `mix` shards' worth of
    samples at a time, permuted inside. So an epoch covers every sample once (less than one global batch is left over,
    others each time), a rank that takes whole lanes reads long runs of few shards, and nothing as long as the data set
    is listed.

    batch: images of a global step, all ranks together. holdout: share of each shard's samples that no step ever sees,
    the same in all epochs (`held_out`).
    """

    def __init__(self, shards: Shards, *, batch: int, seed: int, holdout: float = 0.0, lanes: int = 64, mix: int = 4):
        self.seed, self.batch, self.lanes = seed, batch, lanes
        self._starts, self._counts = shards.starts, shards.counts
        self._kept_out = np.round(holdout * shards.counts).astype(np.int64)  # [S]
        self._trained = shards.counts - self._kept_out  # [S]
        self.samples = int(self._trained.sum())
        self.steps_per_epoch = self.samples // batch
        if self.steps_per_epoch == 0:
            raise UserError(
                f"{shards.folder}: {self.samples} samples to train on (of {len(shards)}) are fewer than one "
                f"global batch of {batch}; take a smaller optim.global_batch_size or more photos"
            )
        self._sums = np.cumsum(self._trained)  # [S]
        self._run = max(1, mix * self.samples // max(1, int((self._trained > 0).sum())))
        self._orders: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def samples_of(self, step: int, rank: int = 0, world: int = 1) -> NDArray[np.int64]:
        """Sample ids of this rank's slice of a global step: [batch / world]. `world` divides `batch`."""
        epoch, within = divmod(step, self.steps_per_epoch)
        position = within * self.batch + np.arange(rank, self.batch, world)
        lane, slot = position % self.lanes, position // self.lanes
        run = slot // self._run
        start, size = self._run_of(lane, run)
        key = hash64(self.seed, epoch, "run", lane, run)
        return self._sample_at(epoch, start + permute(slot % self._run, size, key))

    def _run_of(self, lane: NDArray[np.int64], run: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(place in the epoch's sequence, samples) of runs of lanes. The lanes are equal; the first (samples mod lanes)
        are one longer."""
        length, longer = divmod(self.samples, self.lanes)
        start = lane * length + np.minimum(lane, longer)
        return start + run * self._run, np.minimum(self._run, length + (lane < longer) - run * self._run)

    def _order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(the epoch's order of the shards, where each ends in its sequence)."""
        if epoch not in self._orders:
            order = np.argsort(hash64(self.seed, epoch, "shard", np.arange(len(self._counts))), kind="stable")
            if len(self._orders) > 1:  # this epoch and the next
                self._orders.pop(next(iter(self._orders)))
            self._orders[epoch] = order, np.cumsum(self._trained[order])
        return self._orders[epoch]

    def held_out(self) -> NDArray[np.int64]:
        """Sample ids that no step sees, in order."""
        shard = np.repeat(np.arange(len(self._counts)), self._kept_out)
        within = np.arange(len(shard)) - np.repeat(np.cumsum(self._kept_out) - self._kept_out, self._kept_out)
        return np.sort(self._place(shard, within))

    def replacement(self, sample: int, step: int, attempt: int) -> int:
        """The sample read instead of a damaged one, whichever process asks: of the same shard, which a node has at hand,
        and after NEAR attempts of any."""
        draw = int(hash64(self.seed, self.epoch(step), "replacement", sample, attempt))
        if attempt <= NEAR:
            shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
            within = draw % int(self._trained[shard])
        else:
            at = draw % self.samples
            shard = int(np.searchsorted(self._sums, at, side="right"))
            within = at - int(self._sums[shard] - self._trained[shard])
        return int(self._place(np.array([shard]), np.array([self._kept_out[shard] + within]))[0])

    def sound(self, shards: Shards, sample: int, step: int, first: int = 0) -> tuple[int, bytes]:
        """(sample read, its bytes): the planned sample, or the first undamaged of its replacements.

        first: the attempt to begin with (0: the sample itself). Raises UserError after ATTEMPTS of them.
        """
        row = sample
        for attempt in range(first, ATTEMPTS):
            row = self.replacement(sample, step, attempt) if attempt else sample
            photo = shards.read(row)
            if shards.is_valid(row, photo):
                return row, photo
        raise UserError(
            f"{shards.folder}: {ATTEMPTS} samples in a row are damaged, the last in {{shard}} at byte {{byte}}: {{why}}; "
            "`make verify DST={folder}` looks at all".format(folder=shards.folder, **shards.describe(row))
        )

    def shards_ahead(self, step: int, rank: int = 0, world: int = 1) -> tuple[list[int], list[int]]:
        """(shards that this rank reads in the runs in which its lanes stand at a step, those of the runs that follow),
        in the order in which they are read. Ranks r and r + gcd(lanes, world) walk the same lanes."""
        epoch, within = divmod(step, self.steps_per_epoch)
        share, round_ = math.gcd(self.lanes, world), self.lanes * self._run  # samples of one run of all lanes
        lane = np.arange(rank % share, self.lanes, share)
        first, last = within * self.batch // round_, ((within + 1) * self.batch - 1) // round_
        now = [shard for run in range(first, last + 1) for shard in self._shards_of(epoch, lane, run)]
        follows = (epoch, last + 1) if (last + 1) * round_ < self.samples else (epoch + 1, 0)
        return list(dict.fromkeys(now)), self._shards_of(follows[0], lane, follows[1])

    def _shards_of(self, epoch: int, lane: NDArray[np.int64], run: int) -> list[int]:
        """Shards of one run of each of these lanes, the lanes in turn; each once."""
        order, ends = self._order(epoch)
        start, size = self._run_of(lane, np.full_like(lane, run))
        first, last = (np.searchsorted(ends, at, side="right") for at in (start, start + size - 1))
        turn = first[None] + np.arange(1 + max(0, int((last - first).max())))[:, None]
        return list(dict.fromkeys(order[turn[(turn <= last) & (size > 0)]].tolist()))

    def _sample_at(self, epoch: int, at: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample ids at places of the epoch's sequence."""
        order, ends = self._order(epoch)
        turn = np.searchsorted(ends, at, side="right")
        shard = order[turn]
        within = at - (ends[turn] - self._trained[shard])
        within = permute(within, self._trained[shard], hash64(self.seed, epoch, "sample", shard))
        return self._place(shard, self._kept_out[shard] + within)

    def _place(self, shard: NDArray[np.int64], within: NDArray[np.int64]) -> NDArray[np.int64]:
        """A fixed permutation of each shard decides who is held out: its first `_kept_out[shard]` places."""
        return self._starts[shard] + permute(within, self._counts[shard], hash64(self.seed, "holdout", shard))
