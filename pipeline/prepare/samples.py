"""Samples of a tar of another program: which members belong together, and which of them is the photo.

Members with the same key are a sample, wherever they are in the tar: all photos may come first and all labels after them.
The key is WebDataset's, the name up to the first dot, with one addition: parts that are no plain words (`2-000`, `5`) belong
to the key. So `v1.2-000.jpg` is the photo of `v1.2-000`, and `7.seg.png` the member `seg.png` of `7`. The user can name the
ending of the photos (`seg.png`).
"""

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import BinaryIO

from pipeline.prepare.kinds import HEAD, PICTURES, kind_of
from pipeline.prepare.labels import LABEL_ENDINGS
from pipeline.prepare.names import is_hidden
from pipeline.prepare.skipped import DUPLICATES, NO_PHOTO, Skipped
from pipeline.prepare.tar import Member

PHOTO_ENDINGS = ("jpg", "jpeg", "png", "webp")


@dataclass
class Sample:
    """The members of one sample by role: `photo`, or the ending."""

    key: str
    parts: dict[str, Member] = field(default_factory=dict)


def split_key(name: str, photo: str | None = None) -> tuple[str, str]:
    """(key, ending without its dot) of a member: `a/v1.2-000.jpg` -> (`a/v1.2-000`, `jpg`). photo: an ending that is not cut
    anywhere (`left-eye.jpg`)."""
    folder, slash, base = name.rpartition("/")
    parts = base.split(".")
    first = 1
    for i, part in enumerate(parts[1:-1], 1):
        if not re.fullmatch(r"[A-Za-z_]+\d?", part):
            first = i + 1
    if photo and base.lower().endswith(f".{photo}"):
        first = min(first, len(parts) - 1 - photo.count("."))
    return folder + slash + ".".join(parts[:first]), ".".join(parts[first:]).lower()


def group(
    tar: BinaryIO, found: Iterable[Member], skipped: Skipped, where: str, photo: str | None, endings: Counter[str]
) -> list[Sample]:
    """The samples that have a photo, in the order of their photos; all else is counted in `skipped`, and the endings of all
    members in `endings`. where: the tar's name. photo: the ending of the photos (`input.jpg`); None: PHOTO_ENDINGS.

    A key that comes again after other keys, with a photo that it already has, is another sample: joined tars number their
    samples alike. Beside each other they are duplicates, and the first one counts.
    """
    photo_endings = (photo,) if photo else PHOTO_ENDINGS
    open_samples: dict[str, list[Sample]] = {}
    samples: list[Sample] = []
    last: Sample | None = None
    for m in found:
        base = m.name.rpartition("/")[2]
        if m.skip:
            skipped.add(f"{where}/{m.name}", m.skip, "not read from a tar")
            continue
        if is_hidden(base):
            skipped.add(f"{where}/{m.name}", "hidden files", "its name begins with a dot")
            continue
        key, ending = split_key(m.name, photo)
        endings[ending] += 1
        role = "photo" if ending in photo_endings else ending
        if last is None or last.key != key:
            known = open_samples.setdefault(key, [])
            last = next((s for s in known if role not in s.parts), None)
            if last is None:
                last = Sample(key)
                known.append(last)
                samples.append(last)
        if role in last.parts and role in ("photo", *LABEL_ENDINGS):
            skipped.add(f"{where}/{m.name}", DUPLICATES, f"{last.parts[role].name} comes before it")
        last.parts.setdefault(role, m)
    with_photo = [s for s in samples if _choose_photo(tar, s, skipped, where, by_bytes=not photo)]
    return sorted(with_photo, key=lambda s: s.parts["photo"].offset)


def _choose_photo(tar: BinaryIO, sample: Sample, skipped: Skipped, where: str, by_bytes: bool) -> bool:
    """Whether the sample has a photo. by_bytes: one picture among members of other endings is the photo, by its first
    bytes."""
    others = {e: m for e, m in sample.parts.items() if e not in ("photo", *LABEL_ENDINGS)}
    kinds = {}
    for ending, m in others.items():
        if "photo" not in sample.parts and "." not in ending:
            kinds[ending] = kind_of(os.pread(tar.fileno(), min(m.size, HEAD), m.offset), m.name)
    readable = [e for e, kind in kinds.items() if kind in ("JPEG", "PNG", "WebP")]
    if by_bytes and len(readable) == 1:
        sample.parts["photo"] = others.pop(readable[0])
    for ending, m in others.items():
        if kinds.get(ending, "") in (*PICTURES, "GIF", "TIFF", "BMP"):
            skipped.add_file(f"{where}/{m.name}", kinds[ending])
        else:  # what a sample holds beside photo and label is no loss: it is counted only
            skipped.counts[f".{ending} files" if ending else "files without ending"] += 1
    if "photo" not in sample.parts:
        endings = ", ".join(f".{e}" if e else "no ending" for e in sample.parts)
        skipped.add(f"{where}/{sample.key}", NO_PHOTO, f"its members: {endings}")
    return "photo" in sample.parts
