"""Shards as a source: their photos, names, labels and classes, to be shuffled and split again."""

from pathlib import Path

from pipeline.prepare.sources.photos import Ask, Listing, Photo
from pipeline.shards import ORIGIN, SOURCES, Shards
from runtime.errors import plural


def list_shards(src: Path, ask: Ask) -> Listing:
    """The samples of a folder of shards. Raises UserError if a shard is missing."""
    shards = Shards(src)
    names = [shard["name"] for shard in shards.shards]
    rows = zip(shards.sources(), shards.index.tolist(), strict=True)
    photos = [
        Photo(source, offset, size, -1 if ask.labels == "no" else label, names[shard], crc=crc)
        for source, (shard, offset, size, _, _, label, crc) in rows
    ]
    classes = [] if ask.labels == "no" else shards.classes
    summary = f"{plural(len(shards.shards), 'shard')}: names are kept, {plural(len(classes), 'class')}"
    return Listing(sorted(photos), summary, classes, _origin(src))


def _origin(src: Path) -> str:
    """Where the photos of the shards were: the first line of sources.txt; "" without one."""
    try:
        with (src / SOURCES).open("rb") as lines:
            key, _, origin = lines.readline().decode().rstrip("\n").partition("\t")
    except (OSError, UnicodeDecodeError):
        return ""
    return origin if key == ORIGIN else ""
