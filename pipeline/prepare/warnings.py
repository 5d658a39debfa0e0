"""What may be wrong with a source of photos, or with tars of another program: a line each, with the next step."""

import re
from collections import Counter
from collections.abc import Collection
from contextlib import closing, suppress
from pathlib import Path
from shlex import quote

from pipeline.prepare.archives import (
    READ,
    STREAM_ENDINGS,
    compressed_tars,
    first_archive,
    stream_kind,
    unpack,
    unpack_outer,
)
from pipeline.prepare.kinds import ARCHIVE, INSTALL, is_palette_png
from pipeline.prepare.names import ENDINGS, printable, split_order, splits_among
from pipeline.prepare.skipped import (
    BAD_LABELS,
    DUPLICATES,
    LABEL_LIKE,
    LONE_LABELS,
    NO_PHOTO,
    READ_BEFORE,
    Skipped,
    counts,
)
from pipeline.prepare.sources.layout import make_command, word
from pipeline.prepare.sources.photos import Photo, Root
from pipeline.prepare.sources.reading import Reader, Unreadable
from pipeline.prepare.sources.tables import is_table
from pipeline.shards import PHOTO_SUFFIXES
from runtime.errors import plural

MAX_UNSAID = 0.01  # share of pictures, labels or keys that may be skipped without a warning
SHOWN = 3  # archives in a line
FOLLOW = "ARGS=--follow-links reads what links point to"
LABELS_ARE = "a label is a number or a name, in .cls, .json (key cls, label or class) or .txt"
LABEL_FILES = (".txt", ".csv", ".tsv", ".json", ".mat", ".xml")
MAX_LABEL_FILES = 5
MASK_SAMPLE = 3  # photos of a folder whose headers are read to tell masks from photos


def warn_of_masks(root: Root, photos: list[Photo], below: str, dst: str) -> list[str]:
    """A warning if a folder's photos are palette PNGs, as masks are. The headers of some photos of each folder are read.

    below: the folder below SRC that was looked at for classes.
    """
    src = root.path
    by_folder: dict[str, list[Photo]] = {}
    for photo in photos:
        by_folder.setdefault(photo.name.rpartition("/")[0], []).append(photo)
    masks = list[str]()
    with closing(Reader([root._replace(follow_links=True)])) as source:  # whatever was listed may be read
        for folder, inside in by_folder.items():
            sample = inside[:: max(1, len(inside) // MASK_SAMPLE)][:MASK_SAMPLE]
            if all(p.name.lower().endswith(".png") for p in sample) and all(_is_mask(source, p) for p in sample):
                masks.append(folder)
    if not masks:
        return []
    count = len(by_folder[masks[0]])
    like = "files like masks, not photos (palette PNGs)" if count > 1 else "file like a mask, not a photo (palette PNG)"
    more = f" (and {plural(len(masks) - 1, 'more folder')})" if len(masks) > 1 else ""
    top = [f.removeprefix(below).partition("/")[0] for f in masks]
    others = sorted({f.removeprefix(below).partition("/")[0] for f in by_folder} - {*top, ""})
    right = make_command(src, below + others[0], f"{dst}-{others[0]}") if others else "SRC=the folder of the photos"
    where = printable(f"{src}/{masks[0]}".rstrip("/"))
    return [f"{where} holds {count:,} {like}{more}; if they are masks, take the photos alone: {right}"]


def _is_mask(source: Reader, photo: Photo) -> bool:
    try:
        return is_palette_png(source.head(photo))
    except Unreadable:
        return False


def warn_of_samples(src: Path, photos: list[str], skipped: Skipped, dst: str) -> list[str]:
    """A warning if photos have a label beside them (x.jpg, x.cls): WebDataset samples, whose labels `index` reads."""
    labels = {row["source"].removesuffix(".cls") for row in skipped.listed if row["kind"] == ".cls files"}
    first = next((name for name in photos if printable(name.rpartition(".")[0]) in labels), "") if labels else ""
    if not first:
        return []
    how = f"`make index DST={word(str(src.parent))}` uses the tars there as they are, with their labels"
    if src.is_dir():
        new = word(f"{dst}-labeled")
        tar = f"tar --sort=name -cf {word(f'{dst}-labeled/shard-000000.tar')} -C {word(str(src))} ."
        how = f"`mkdir -p {new} && {tar} && make index DST={new}` packs them with their labels"
    return [
        f"{src} holds WebDataset samples ({printable(first)} with {printable(first.rpartition('.')[0])}.cls), whose labels "
        f"are not read here; {how}"
    ]


def warn_of_labels(src: Path, skipped: Skipped) -> list[str]:
    """A warning if a file may hold the labels of photos that get none: `val_annotations.txt`, `imagelabels.mat`."""
    names = [row["source"] for row in skipped.listed if row["source"].lower().endswith(LABEL_FILES)]
    names = [name for name in names if re.search("label|annot|class|truth|metadata", name.rpartition("/")[2].lower())]
    if not names or len(names) > MAX_LABEL_FILES:  # more are not of all photos, but of one each
        return []
    table = f"if it is a table of photos and labels, ARGS={word(f'--label-file {src}/{names[0]}')} reads it; or "
    return [
        f"{src}/{names[0]} may hold labels, which are not read; {table if src.is_dir() and is_table(Path(names[0])) else ''}"
        "for classes, put the photos of each into a folder of its own"
    ]


def no_photos(src: Path, skipped: Skipped, dst: str) -> str:
    """The message for a source without photos: what it holds instead, and what helps."""
    others = ", ".join(f"{n} {kind}" for kind, n in sorted(skipped.counts.items()))
    hint = f"; photos end in {' '.join(ENDINGS)}, or begin with the bytes of one"
    if pictures := skipped.pictures():
        hint = f"; {convert_command(pictures, src)}"
    elif skipped.counts["links"] and src.is_dir():
        hint = f"; links are not followed: {FOLLOW}"
    elif skipped.archives() and not src.is_dir():
        hint = f"; {unpack_outer(src)}"
    elif src.is_dir() and len(compressed_tars(src)) < 2 and (archives := _archives(src)):
        sources = word(" ".join(archives)) if len(archives) > 1 else archives[0]
        hint = f"; its archives can be SRC: `make shards SRC={sources} DST={word(dst)}`"
    elif src.is_dir() and (archive := first_archive(src)):
        hint = archive
    elif system := next((row["source"] for row in skipped.listed if row["kind"] == "system folders"), ""):
        hint = f"; {system} is not looked into, but SRC={word(f'{src}/{system}'.rstrip('/'))} takes its photos"
    elif src.is_dir() and any(src.glob("*.tar")):
        hint = f"; give one of its tars, or run `make index DST={word(str(src))}` if they are shards already"
    return f"{src}: no photos here (found: {others or 'nothing'}){hint}"


def _archives(folder: Path) -> list[str]:
    """The archives directly in a folder that can be a source, as words of SRC; of several splits those of the first."""
    found = []
    for path in sorted(folder.iterdir()):
        name = path.name.lower()
        with suppress(OSError):
            is_tar = name.endswith(STREAM_ENDINGS) and (
                ".tar." in name or name.endswith((".tgz", ".txz", ".tzst", ".tbz2"))
            )
            if path.is_file() and (is_tar or name.endswith(".zip")) and stream_kind(path) in READ:
                found.append(path.name)
    splits = splits_among(name.partition(".")[0] for name in found)
    first = next(iter(splits.values()), None)
    return [quote(f"{folder}/{name}") for name in found if not first or name.partition(".")[0] in first]


# ---------------------------------------------------------------------------------------------- what was skipped


def is_many(skipped: int, kept: int) -> bool:
    """Whether so many skipped ones need a warning."""
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
    """Warnings about tars of other programs with so many samples, and labels that were read. photo: as in
    `tars.samples.group`."""
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
