"""A folder of shards: its manifest and index; and the Plan: which samples make global step i.

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
import stat
import threading
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipeline.draws import hash64, permute
from pipeline.header import MAX_PIXELS, size_of
from runtime.mistake import Mistake

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
    """Manifest, index and bytes of one folder.

    Raises Mistake where the folder is no shard folder, or where a share of the samples above `max_lost` lay in shards that
    are gone or cut (0: where any shard has another size than the manifest says). `told_lost` is a line on what is borne,
    empty if there is nothing. max_lost=None does not look: for worker processes, and tools that look for themselves.
    """

    def __init__(self, folder: str | Path, max_lost: float | None = 0.0):
        self.folder = Path(folder)
        manifest = self.folder / "manifest.json"
        if not manifest.is_file():
            hint = ""
            if self.folder.is_dir() and any(self.folder.glob("*.tar")):
                hint = f"; these tars were made elsewhere? `make index DST={self.folder}` writes one"
            elif self.folder.is_dir():
                hint = f"; `make shards SRC=photos/ DST={self.folder}` makes shards of a folder of photos"
            raise Mistake(f"{self.folder}: no shards here (no manifest.json){hint}")
        try:
            self.manifest = json.loads(manifest.read_text())
            if self.manifest["format"] != FORMAT:
                told = f"format {self.manifest['format']}, this program reads format {FORMAT}"
                raise Mistake(f"{manifest}: {told}; make the shards again")
            self.shards: list[dict] = self.manifest["shards"]
            self.classes: list[str] = self.manifest["classes"]
            self.counts = np.array([s["samples"] for s in self.shards], np.int64)  # [S]
            odd = [s["name"] for s in self.shards if s["name"] in ("", ".", "..") or {"/", "\0"} & {*s["name"]}]
            if odd or any(s["bytes"] < 0 or s["samples"] < 0 for s in self.shards):
                raise ValueError(odd[0] if odd else "numbers below 0")
        except (ValueError, KeyError, TypeError, OverflowError, OSError) as error:
            raise Mistake(f"{manifest}: not a manifest of shards ({error!r})") from None
        try:
            # a plain ndarray over the map: the same pages, without memmap's cost at every look-up
            mapped = np.load(self.folder / "index.npy", mmap_mode="r", allow_pickle=False)
            self.index, self._map = np.asarray(mapped), getattr(mapped, "_mmap", None)
        except (OSError, ValueError) as error:
            raise Mistake(f"{self.folder}/index.npy: {error}; `make index DST={self.folder}` writes it again") from None
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])  # [S+1] first sample id of each shard
        if self.index.dtype != INDEX or len(self.index) != self.starts[-1]:
            raise Mistake(
                f"{self.folder}: the index holds {len(self.index)} samples, the manifest {self.starts[-1]}; "
                f"`make index DST={self.folder}` writes both again"
            )
        self._there: dict[int, int] = {}  # bytes of each shard that is gone or of another size than the manifest says
        self.told_lost = "" if max_lost is None else self._look_for_loss(max_lost)
        self._files: dict[int, BinaryIO] = {}
        self._lock = threading.Lock()
        self._looks = 0

    def __len__(self) -> int:
        return len(self.index)

    def __reduce__(self):  # a worker process opens the folder anew
        return Shards, (self.folder, None)

    def _look_for_loss(self, max_lost: float) -> str:
        """A line on shards that are gone or of another size than the manifest says. Raises Mistake beyond `max_lost`."""
        told, lost = [], 0
        for i, shard in enumerate(self.shards):
            path = self.folder / shard["name"]
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
        if lost > max_lost * len(self) or max_lost == 0:
            share = math.ceil(1000 * max(lost, 1) / len(self)) / 1000
            raise Mistake(
                f"{line}; copy or make these shards again (`make verify DST={self.folder}` looks at every byte), or train "
                f"without what is lost: data.max_lost={share:g}"
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

    def forget_pages(self) -> None:
        """Give back the index's pages that were looked at; they stay in the kernel's cache, and come back when asked for.
        Otherwise an epoch over 100 M samples would end with all 2.8 GB of their index resident."""
        if self._map is not None and hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def is_sound(self, sample: int, photo: bytes) -> bool:
        """Whether these are the bytes that the index was written for, and a photo of the size that it says (see `fault`)."""
        return not self.fault(sample, photo)

    def fault(self, sample: int, photo: bytes) -> str:
        """What is wrong with a photo's bytes, empty if nothing is; no decoder sees them before (30 µs for 110 kB)."""
        record = self.index[sample]
        if len(photo) != record["size"]:
            return f"only {len(photo)} of its {record['size']} bytes could be read"
        if zlib.crc32(photo) != record["crc32"]:
            return "its bytes are not those that were indexed (crc32)"
        size, height, width = size_of(photo), int(record["height"]), int(record["width"])
        if size is None:
            return "it is no JPEG, PNG or WebP"
        if size != (height, width):
            return f"its header promises {size[0]} x {size[1]} pixels, the index {height} x {width}"
        if height * width > MAX_PIXELS:
            return f"{height} x {width} pixels are more than a reader takes ({MAX_PIXELS:,})"
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
                file = self._files[shard] = open(self.folder / self.shards[shard]["name"], "rb", buffering=0)  # noqa: SIM115
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
            raise Mistake(
                f"{shards.folder}: {self.samples} samples to train on (of {len(shards)}) are fewer than one "
                f"global batch of {batch}; take a smaller optim.batch or more photos"
            )
        self._sums = np.cumsum(self._trained)  # [S]
        self._run = max(1, mix * self.samples // max(1, int((self._trained > 0).sum())))
        self._epoch_of_order = -1

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def samples_of(self, step: int, rank: int = 0, world: int = 1) -> NDArray[np.int64]:
        """Sample ids of this rank's slice of a global step: [batch / world]. `world` divides `batch`."""
        epoch, within = divmod(step, self.steps_per_epoch)
        position = within * self.batch + np.arange(rank, self.batch, world)
        lane, slot = position % self.lanes, position // self.lanes
        # equal lanes of the epoch's sequence; the first (samples mod lanes) are one longer
        length, longer = divmod(self.samples, self.lanes)
        start = lane * length + np.minimum(lane, longer)
        length_of = length + (lane < longer)
        run = slot // self._run
        size = np.minimum(self._run, length_of - run * self._run)
        key = hash64(self.seed, epoch, "run", lane, run)
        return self._sample_at(epoch, start + run * self._run + permute(slot % self._run, size, key))

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

        first: the attempt to begin with (0: the sample itself). Raises Mistake after ATTEMPTS of them.
        """
        row = sample
        for attempt in range(first, ATTEMPTS):
            row = self.replacement(sample, step, attempt) if attempt else sample
            photo = shards.read(row)
            if shards.is_sound(row, photo):
                return row, photo
        raise Mistake(
            f"{shards.folder}: {ATTEMPTS} samples in a row are damaged, the last in {{shard}} at byte {{byte}}: {{why}}; "
            "`make verify DST={folder}` looks at all".format(folder=shards.folder, **shards.describe(row))
        )

    def _sample_at(self, epoch: int, at: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample ids at places of the epoch's sequence."""
        if epoch != self._epoch_of_order:
            self._order = np.argsort(hash64(self.seed, epoch, "shard", np.arange(len(self._counts))), kind="stable")
            self._ends = np.cumsum(self._trained[self._order])
            self._epoch_of_order = epoch
        turn = np.searchsorted(self._ends, at, side="right")
        shard = self._order[turn]
        within = at - (self._ends[turn] - self._trained[shard])
        within = permute(within, self._trained[shard], hash64(self.seed, epoch, "sample", shard))
        return self._place(shard, self._kept_out[shard] + within)

    def _place(self, shard: NDArray[np.int64], within: NDArray[np.int64]) -> NDArray[np.int64]:
        """A fixed permutation of each shard decides who is held out: its first `_kept_out[shard]` places."""
        return self._starts[shard] + permute(within, self._counts[shard], hash64(self.seed, "holdout", shard))
