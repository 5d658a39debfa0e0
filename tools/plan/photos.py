"""What is known of some photos before they are trained on: how many, how large, and what reading them costs.

From an index of shards, from the headers of a sample of a folder or tar, or assumed from their number alone.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.decode import read_header
from pipeline.prepare.skipped import Skipped
from pipeline.prepare.sources.walk import photos_in_folder, photos_in_tar
from pipeline.prepare.tar import members
from pipeline.shards import Shards
from runtime.config import Config
from runtime.errors import UserError, plural, suggest_path

SAMPLE = 400  # photos whose headers are read
HEADER = 1 << 16  # bytes of one: EXIF with a preview fits
MEGAPIXELS, BYTES = 0.19, 110_000  # of ImageNet's mean photo: what is assumed without photos
# measured, one core of an AMD EPYC with AVX-512, 2026-11-29 (docs/benchmarks.md, "Photos of other sizes")
MS_PER_MEGAPIXEL, MS_PER_MB = 1.7, 8.1  # of decoding a JPEG: least squares over 0.19, 1.9 and 12 megapixels
MS_PER_VIEW = 0.3  # of a view of 224: cut, resized and colored
RESIZE_MS_PER_MEGAPIXEL = 14  # of `make shards --resize-short`: decoded, resized, encoded, decoded again
RESIZED_BYTES_PER_PIXEL = 0.35  # of a JPEG of quality 90 that `make shards --resize-short 448` wrote
WORTH = 0.3  # the share of a photo's time from which --resize-short pays: our choice
SHARD_MB = 256  # the default of `make shards`


class Photos(NamedTuple):
    """So many photos of a mean size. sides [n,2]: height and width of a sample; empty: assumed, not measured."""

    images: int
    megapixels: float
    bytes: float  # of one
    sides: np.ndarray
    source: str
    shards: int = 0  # that there are; 0: they are not made yet

    @property
    def decode_ms(self) -> float:
        """Milliseconds of one core to decode one."""
        return MS_PER_MEGAPIXEL * self.megapixels + MS_PER_MB * self.bytes / 1e6

    def resized(self, short: int) -> "Photos":
        """The same photos after `make shards --resize-short`."""
        if not len(self.sides):
            return self
        factor = np.minimum(1, short / self.sides.min(1))  # [n]
        pixels = self.sides.prod(1) * factor**2
        smaller = factor < 1
        old = self.bytes * self.sides.prod(1) / max(1.0, self.sides.prod(1).mean())  # bytes in proportion
        size = np.where(smaller, RESIZED_BYTES_PER_PIXEL * pixels, old)
        return self._replace(megapixels=float(pixels.mean() / 1e6), bytes=float(size.mean()))


def assumed(images: int) -> Photos:
    """So many photos of ImageNet's size."""
    return Photos(images, MEGAPIXELS, BYTES, np.empty((0, 2)), "which is ImageNet's mean: yours are not known")


def of_shards(place: str) -> Photos:
    """The photos of a folder of shards, or of an address. Raises UserError."""
    shards = Shards(place, None, None)
    if not len(shards):
        raise UserError(f"SHARDS={place}: no samples")
    rows = shards.index[np.linspace(0, len(shards) - 1, min(len(shards), 100_000)).astype(int)]
    sides = np.stack([rows["height"], rows["width"]], 1).astype(float)  # [n,2]
    pixels, size = sides.prod(1).mean() / 1e6, float(rows["size"].mean())
    return Photos(len(shards), pixels, size, sides, "the mean of the index", len(shards.shards))


def of_source(place: str) -> Photos:
    """The photos of a folder or a tar, from the headers of a sample. Raises UserError."""
    path = Path(place)
    if not path.exists():
        raise UserError(f"SRC={place}: no such folder or tar{suggest_path(place)}")
    found = list(_photos(path))
    if not found:
        raise UserError(f"SRC={place}: no photos; `make shards SRC={place} DST=…` says what lies there")
    chosen = [found[int(i)] for i in np.linspace(0, len(found) - 1, min(len(found), SAMPLE))]
    heads = [read_header(_head(file, offset)) for file, offset, _ in chosen]
    read = [(size, n) for size, (*_, n) in zip(heads, chosen, strict=True) if size and all(size)]
    total = sum(n for *_, n in found)
    if not read:
        raise UserError(
            f"SRC={place}: {len(found):,} photos, and none of {len(chosen)} is a JPEG, PNG or WebP with a size in its header"
        )
    sides = np.array([size for size, _ in read], float)
    source = f"the mean of {plural(len(read), 'header')}"
    if len(read) < len(chosen):
        source += f" ({len(chosen) - len(read)} are no JPEG, PNG or WebP, or damaged)"
    return Photos(len(found), sides.prod(1).mean() / 1e6, total / len(found), sides, source)


def _photos(path: Path) -> Iterator[tuple[Path, int, int]]:
    """(file, offset, bytes) of every photo of a folder or tar, in the order of their names."""
    try:
        if path.is_dir():
            for name, offset, size in sorted(photos_in_folder(path, False, [], Skipped())):
                yield path / name, offset, size
        else:
            with path.open("rb") as tar:
                for member in photos_in_tar(tar, members(tar, 0, path.stat().st_size, str(path)), [], Skipped()):
                    yield path, member.offset, member.size
    except (OSError, ValueError) as error:
        raise UserError(f"SRC={path}: {error}") from None


def _head(file: Path, offset: int) -> bytes:
    try:
        with file.open("rb") as f:
            return os.pread(f.fileno(), HEADER, offset)
    except OSError:
        return b""


def short_side(config: Config) -> int:
    """The shortest side of a photo from which no window is enlarged: that of the smallest window of any view, over 32."""
    longest = max(group.size / math.sqrt(group.scale[0]) for group in config.data.views)
    return math.ceil(longest / 32) * 32


def describe(photos: Photos, config: Config, images_per_second: float | None, shard_mb: float) -> list[tuple[str, str]]:
    """(label, text) on disk, shards, decoding, and whether `--resize-short` pays. images_per_second: of the step, over all
    devices."""
    total, views = photos.images * photos.bytes, MS_PER_VIEW * _views_of_224(config)
    size = f"{photos.megapixels:.2g} megapixels and {photos.bytes / 1000:,.0f} kB each, {photos.source}"
    made = f"{plural(max(1, math.ceil(total / (shard_mb * 1e6))), 'shard')} of at most {shard_mb:g} MB"
    return [
        ("photos", size),
        ("disk", f"{_gb(total)} in {plural(photos.shards, 'shard') if photos.shards else made}"),
        ("decoding", _decoding(photos.decode_ms, views, images_per_second)),
        ("", _resizing(photos, short_side(config), views, images_per_second)),
    ]


def _decoding(decode: float, views: float, images_per_second: float | None) -> str:
    """decode, views: milliseconds of a core for the JPEG of a photo, and for its views."""
    ms = decode + views
    rate = f"{ms:.1f} ms of a core for a photo ({decode:.1f} for its JPEG): {1000 / ms:,.0f} photos/s"
    if images_per_second is None:
        return rate
    cores = max(1, math.ceil(images_per_second * ms / 1000))
    return f"{rate}, so {plural(cores, 'core')} for {images_per_second:,.0f} images/s"


def _resizing(photos: Photos, short: int, views: float, images_per_second: float | None) -> str:
    smaller = photos.resized(short)
    saved = photos.decode_ms - smaller.decode_ms
    if not len(photos.sides):
        return (
            "SRC=photos/ or SHARDS=folder reads the sizes of yours: those of 12 megapixels take 30 to 40 times as long"
        )
    share = saved / (photos.decode_ms + views)
    if share < WORTH:
        return f"--resize-short {short} would save {max(0.0, 100 * share):.0f} %: it does not pay"
    once = RESIZE_MS_PER_MEGAPIXEL * photos.megapixels / 1000 * photos.images / 60
    then = f"{_gb(photos.images * smaller.bytes)}, {_decoding(smaller.decode_ms, views, images_per_second)}"
    core = plural(max(1, round(once)), "minute")
    return f"`make shards … ARGS='--resize-short {short} --quality 90'` pays, {core} of a core once: then {then}"


def _views_of_224(config: Config) -> float:
    return sum((view.size / 224) ** 2 for view in config.views)


def _gb(size: float) -> str:
    return (
        f"{size / 1e9:,.1f} GB"
        if 1e8 <= size < 1e11
        else f"{size / 1e6:,.0f} MB"
        if size < 1e8
        else f"{size / 1e9:,.0f} GB"
    )
