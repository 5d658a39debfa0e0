"""Samples of a tar of another program: which members belong together, and which of them is the photo.

Members with the same key are a sample, wherever they are in the tar: all photos may come first and all labels after them.
The key is WebDataset's, the name up to the first dot, with two additions. Parts that are no plain words (`2-000`, `5`)
belong to the key: `v1.2-000.jpg` is the photo of `v1.2-000`, and `7.seg.png` the member `seg.png` of `7`. So do words that
differ from member to member, where an ending would occur with other keys: `cat.a.jpg`, `cat.b.jpg`, `cat.c.jpg` are three
photos. The user can name the ending of the photos (`seg.png`).
"""

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import BinaryIO

from pipeline.prepare.kinds import HEAD, PICTURES, kind_of
from pipeline.prepare.names import is_hidden
from pipeline.prepare.skipped import DUPLICATES, LONE_LABELS, NO_PHOTO, Skipped
from pipeline.prepare.tar import Member
from pipeline.prepare.tars.labels import LABEL_ENDINGS

PHOTO_ENDINGS = ("jpg", "jpeg", "png", "webp")


@dataclass
class Sample:
    """The members of one sample by role: `photo`, or the ending. tar: as in Member, of the one that was added last."""

    key: str
    tar: int
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


def split_keys(names: Iterable[str], photo: str | None = None) -> list[tuple[str, str]]:
    """`split_key` of all members of a tar, whose endings show which words belong to the key.

    They do where a key has no member without such a word, and at least three words that no other key has.
    """
    names = list(names)
    found = [split_key(name, photo) for name in names]
    if photo:
        return found
    words: dict[str, set[str]] = {}
    for key, ending in found:
        words.setdefault(key, set()).add(ending.rpartition(".")[0])
    keys_with = Counter(word for of_key in words.values() for word in of_key)
    longer = {key for key, w in words.items() if "" not in w and len(w) > 2 and all(keys_with[word] == 1 for word in w)}
    return [
        (name.rpartition(".")[0], ending.rpartition(".")[2]) if key in longer else (key, ending)
        for name, (key, ending) in zip(names, found, strict=True)
    ]


def group(
    tar: BinaryIO, found: Iterable[Member], skipped: Skipped, where: str, photo: str | None, endings: Counter[str]
) -> list[Sample]:
    """The samples that have a photo, in the order of their photos; all else is counted in `skipped`, and the endings of all
    members in `endings`. where: the tar's name. photo: the ending of the photos (`input.jpg`); None: PHOTO_ENDINGS.

    A key that comes again after other keys, with a photo that it already has, is another sample: joined tars number their
    samples alike. Beside each other they are duplicates, and the first one counts. A sample of one of the joined tars takes
    members of another one (photos in one, labels in the other) unless that brings its own photo, or what may be one.
    """
    photo_endings = (photo,) if photo else PHOTO_ENDINGS
    usable: list[Member] = []
    for m in found:
        if m.skip:
            skipped.add(f"{where}/{m.name}", m.skip, "not read from a tar")
        elif is_hidden(m.name.rpartition("/")[2]):
            skipped.add(f"{where}/{m.name}", "hidden files", "its name begins with a dot")
        else:
            usable.append(m)
    split = split_keys((m.name for m in usable), photo)
    endings.update(ending for _, ending in split)
    roles = ["photo" if ending in photo_endings else ending for _, ending in split]
    own: dict[tuple[int, str], set[str]] = {}  # what each of the joined tars brings for a key, but for labels
    for m, (key, _), role in zip(usable, split, roles, strict=True):
        if role not in LABEL_ENDINGS:
            own.setdefault((m.tar, key), set()).add(role)
    open_samples: dict[str, list[Sample]] = {}
    samples: list[Sample] = []
    last: Sample | None = None
    for m, (key, _), role in zip(usable, split, roles, strict=True):
        if last is None or last.key != key or last.tar != m.tar:
            known = open_samples.setdefault(key, [])
            brought = own.get((m.tar, key), set())
            is_open = (s for s in known if role not in s.parts and (s.tar == m.tar or not brought & s.parts.keys()))
            last = next(is_open, None)
            if last is None:
                last = Sample(key, m.tar)
                known.append(last)
                samples.append(last)
        if role in last.parts and role in ("photo", *LABEL_ENDINGS):
            skipped.add(f"{where}/{m.name}", DUPLICATES, f"{last.parts[role].name} comes before it")
        last.parts.setdefault(role, m)
        last.tar = m.tar
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
        kind = NO_PHOTO if others else LONE_LABELS
        skipped.add(f"{where}/{sample.key}", kind, f"its members: {endings}")
    return "photo" in sample.parts
