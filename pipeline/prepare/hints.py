"""What may be wrong with a source of photos, in a line each, with the next step."""

import re
from contextlib import closing, suppress
from pathlib import Path
from shlex import quote

from pipeline.prepare.archives import READ, STREAM_ENDINGS, compressed_tars, first_archive, stream_kind, unpack_outer
from pipeline.prepare.kinds import is_palette_png
from pipeline.prepare.layout import make_command, word
from pipeline.prepare.names import ENDINGS, printable, splits_among
from pipeline.prepare.reading import Reader, Unreadable
from pipeline.prepare.record import Photo, Root
from pipeline.prepare.skipped import FOLLOW, Skipped, convert_command
from pipeline.prepare.tables import is_table
from runtime.errors import plural

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
