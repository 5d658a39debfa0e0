"""What a source holds and its shards will not: counted by kind and ending, listed by name, and warned of."""

import re
from collections import Counter
from collections.abc import Collection, Container
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote

from pipeline.prepare.archives import unpack
from pipeline.prepare.kinds import ARCHIVE, INSTALL, PICTURES
from pipeline.prepare.names import ending, printable, split_order
from pipeline.shards import PHOTO_SUFFIXES
from runtime.errors import plural

MAX_UNSAID = 0.01  # share of pictures, labels or keys that may be skipped without a warning
MAX_KINDS = 8  # in a line
SHOWN = 3  # archives in a line
FOLLOW = "ARGS=--follow-links reads what links point to"

READ_BEFORE = "folders read before"
BAD_LABELS, NO_PHOTO, DUPLICATES = "labels that cannot be read", "samples without a photo", "duplicates in a sample"
LONE_LABELS = "labels without a photo"
LABEL_LIKE = re.compile(
    "cls|class|label|target|categor|only a number", re.IGNORECASE
)  # a member or key that may be a label
LABELS_ARE = "a label is a number or a name, in .cls, .json (key cls, label or class) or .txt"


@dataclass
class Skipped:
    """counts: by kind (`links`) or by kind and ending (`HEIC .heic`, `.txt files`). listed: rows of skipped.jsonl,
    {"source": name, "kind": kind, "reason": why}. joined: of each tar, the bytes where another one begins behind it: what
    zeros have overwritten may look like that."""

    counts: Counter[str] = field(default_factory=Counter)
    listed: list[dict[str, str]] = field(default_factory=list)
    joined: dict[str, list[int]] = field(default_factory=dict)

    def add(self, name: str, kind: str, reason: str) -> None:
        """A file, link or folder that is skipped as a whole."""
        self.counts[kind] += 1
        self.listed.append({"source": printable(name), "kind": kind, "reason": reason})

    def add_file(self, name: str, kind: str) -> None:
        """A file that no photo is read from; `kind` is what `kind_of` says."""
        if kind:
            which = "may hold photos, but is not opened" if kind == ARCHIVE else f"{kind} is not read"
            self.add(name, f"{kind} {ending(name) or 'without ending'}", which)
        else:
            last = ending(name)
            self.add(name, f"{last} files" if last else "files without ending", "its first bytes are not a photo's")

    def remove(self, names: Collection[str]) -> None:
        """Files that were counted as skipped, and are a source of photos after all."""
        chosen = set(names)
        self.counts -= Counter(row["kind"] for row in self.listed if row["source"] in chosen)
        self.listed = [row for row in self.listed if row["source"] not in chosen]

    def joints(self, tar: str) -> list[int]:
        """The list in `joined` of a tar, to be filled."""
        return self.joined.setdefault(tar, [])

    def update(self, other: "Skipped") -> None:
        self.counts.update(other.counts)
        self.listed += other.listed
        self.joined |= other.joined

    def pictures(self, photos: Container[str] = ()) -> Counter[str]:
        """Counts of the pictures in formats that are not read, by kind and ending, but for those that `convert_command` has
        converted: `x.heic` beside `x.heic.jpg` among the photos."""
        found = (row for row in self.listed if row["kind"].startswith(PICTURES))
        return Counter(row["kind"] for row in found if f"{row['source']}.jpg" not in photos)

    def archives(self) -> Counter[str]:
        return Counter({kind: n for kind, n in self.counts.items() if kind.startswith(ARCHIVE)})


def counts(kinds: Counter[str]) -> str:
    """The total, and how many of each kind: 3 (links 2, .txt files 1)."""
    most = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))[:MAX_KINDS]
    by_kind = ", ".join(f"{kind} {n:,}" for kind, n in most)
    more = f", {len(kinds) - MAX_KINDS} more kinds" if len(kinds) > MAX_KINDS else ""
    return f"{kinds.total():,}" + (f" ({by_kind}{more})" if by_kind else "")


def joined_tars(skipped: Skipped) -> list[str]:
    """A line about the tars that hold several, if there are any."""
    joined = {tar: at for tar, at in skipped.joined.items() if at}
    if not joined:
        return []
    tar, at = next(iter(joined.items()))
    more = f" (and {plural(len(joined) - 1, 'more such tar')})" if len(joined) > 1 else ""
    return [
        f"{printable(tar)}: {len(at) + 1} tars behind each other, joined at byte {at[0]}{more}; if they were not joined by "
        "`cat`, zeros have overwritten a part: copy or download it again"
    ]


def is_many(skipped: int, kept: int) -> bool:
    return skipped > MAX_UNSAID * (skipped + kept)


def source_warnings(skipped: Skipped, photos: Collection[str], src: Path, in_tars: bool) -> list[str]:
    """Warnings about a source of which photos with these names are used, each with the next step. in_tars: SRC is a folder,
    and they are in its tars."""
    warnings = []
    pictures, archives = skipped.pictures(photos), skipped.archives()
    if is_many(pictures.total(), len(photos)):
        warnings.append(
            f"{pictures.total():,} of {pictures.total() + len(photos):,} pictures are in formats that are not read: "
            f"{counts(pictures)}; {convert_command(pictures, src, in_tars)}"
        )
    if links := skipped.counts["links"]:
        how = FOLLOW if src.is_dir() else "the tar does not hold what links point to"
        warnings.append(f"{plural(links, 'link')} {'is' if links == 1 else 'are'} not followed; {how}")
    if archives:
        warnings.append(f"{counts(archives)} not opened: {_unpack_first(skipped, src)}")
    if twice := [row["source"] for row in skipped.listed if row["kind"] == READ_BEFORE]:
        warnings.append(
            f"{plural(len(twice), 'folder')} read once, under another name that links reach: {twice[0]}"
            f"{', ...' if twice[1:] else ''} is no folder or class of its own"
        )
    if unreadable := skipped.counts["unreadable files"]:
        warnings.append(f"{plural(unreadable, 'file')} cannot be opened; `ls -l` shows their permissions")
    return warnings


def _unpack_first(skipped: Skipped, src: Path) -> str:
    """The archives' names, those of train first, and how to unpack the first one."""
    names = sorted((row["source"] for row in skipped.listed if row["kind"].startswith(ARCHIVE)), key=split_order)
    named = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if names[SHOWN:] else "")
    how = ""
    with suppress(OSError):  # inside a tar, or not readable
        how = unpack(src / names[0])
    return f"{named}; if they hold photos, unpack them first" + (f": {how}" if how else "")


def index_warnings(skipped: Skipped, samples: int, labels: int, photo: str | None) -> list[str]:
    """Warnings about tars of other programs with so many samples, and labels that were read. photo: as in samples.group."""
    warnings = []
    pictures = skipped.pictures().total()
    bad, keys, twice = (skipped.counts[kind] for kind in (BAD_LABELS, NO_PHOTO, DUPLICATES))
    if is_many(bad, labels):
        warnings.append(
            f"{bad:,} of {plural(bad + labels, 'label')} cannot be read, so their photos have no class; {LABELS_ARE}"
        )
    like = Counter({kind: n for kind, n in skipped.counts.items() if "files" in kind and LABEL_LIKE.search(kind)})
    if like and not labels:
        warnings.append(f"no labels were found; what looks like some is not read: {counts(like)}; {LABELS_ARE}")
    if is_many(lone := skipped.counts[LONE_LABELS], labels):
        first = next(row["source"] for row in skipped.listed if row["kind"] == LONE_LABELS)
        warnings.append(
            f"{plural(lone, 'label')} without a photo of the same key ({first} first): labels are found by the whole name "
            "before the ending, with its folder (a/0.jpg, a/0.cls); pack the tars again with equal names"
        )
    if is_many(keys, samples):
        ends = f"in .{photo}, by --photo" if photo else "in .jpg, .jpeg, .png or .webp"
        warnings.append(
            f"{keys:,} of {plural(keys + samples, 'key')} have no photo; a photo ends {ends}; ARGS='--photo KEY' takes "
            "another ending (skipped.jsonl lists those of each key)"
        )
    unused = Counter({k: n for k, n in skipped.counts.items() if k.removesuffix(" files").endswith(PHOTO_SUFFIXES)})
    if is_many(unused.total(), samples):
        warnings.append(
            f"{plural(unused.total(), 'picture')} not used, by ending: {counts(unused)}; a sample has one photo, and what "
            "else has its key (a mask, a second view) is left out; ARGS='--photo KEY' takes another ending"
        )
    if is_many(twice, samples):
        warnings.append(
            f"{plural(twice, 'member')} not used: their samples hold a photo or label of that kind before them"
        )
    if is_many(pictures, samples):
        warnings.append(
            f"{plural(pictures, 'picture')} in formats that are not read: {counts(skipped.pictures())}; convert them to "
            "JPEG and pack them again"
        )
    return warnings


def convert_command(pictures: Counter[str], src: Path, in_tars: bool = False) -> str:
    """How to convert these pictures to JPEG. Each JPEG is written beside its picture under a name of its own (`x.heic.jpg`),
    so that it replaces no file."""
    endings = {kind.rpartition(" ")[2] for kind in pictures}
    named = " -o ".join(f"-iname {quote(f'*{e}')}" for e in sorted(endings) if e.startswith("."))
    kinds = {kind for kind in INSTALL for found in pictures if found.startswith(kind)}
    install = "".join(f"{INSTALL[kind]}; or " for kind in sorted(kinds))
    if in_tars or not src.is_dir() or not named:
        return f"{install}convert them to JPEG first, for example with ImageMagick's `magick`"
    if " -o " in named:
        named = rf"\( {named} \)"
    return (
        rf"{install}convert them to JPEG, then make the shards into a new DST: `find {quote(str(src))} {named} "
        r"-exec magick {} -auto-orient -quality 95 {}.jpg \;`"
    )
