"""The photos of one source or several: the one place that says what a source is. No photo is decoded here.

    a folder                      walk.py: photos, with folders as classes; or one tar per class (class_tars.py)
    a folder of shards            shards.py
    Parquet, Arrow                parquet.py: a file, or a folder of them
    a tar, ImageNet's own tars    walk.py; compressed by gzip, xz, zstd or bzip2: unpack.py
    a zip                         zips.py
    a table                       tables.py: CSV, JSON, text: the path of each photo, and perhaps its label

A file with a photo's ending is a photo; what is wrong with it, the decoder says later. Any other file is judged by its
first bytes. Nothing is unpickled. Devices, fifos, sparse members, names that lead outside (`../x`), hidden files and the
folders of file systems are skipped; so are links, unless they are to be followed. Whatever is skipped is counted and listed.

Where a source does not say itself which class its photos have, classes.py does, by the folders' names.
"""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pipeline.prepare.archives import AGAIN, READ, fault, stream_kind
from pipeline.prepare.kinds import ARCHIVE, HEAD, PHOTOS, PICTURES, kind_of
from pipeline.prepare.names import CONVERTED_ENDINGS, ending, has_photo_ending, matches, printable
from pipeline.prepare.skipped import Skipped, counts
from pipeline.prepare.sources import class_tars, tables
from pipeline.prepare.sources.classes import describe_classes, label_photos, refuse_devkit
from pipeline.prepare.sources.parquet import ENDINGS, MAGIC, list_parquet
from pipeline.prepare.sources.photos import Ask, Listing, Photo, Root, SourceIndex
from pipeline.prepare.sources.shards import list_shards
from pipeline.prepare.sources.unpack import unpack_tar
from pipeline.prepare.sources.walk import photos_in_folder, photos_in_tar, without_duplicates
from pipeline.prepare.sources.zips import list_zip
from pipeline.prepare.tar import Member, members
from pipeline.prepare.warnings import (
    joined_tars,
    no_photos,
    source_warnings,
    warn_of_labels,
    warn_of_masks,
    warn_of_samples,
)
from runtime.errors import UserError, plural, suggest

AUTO = Ask()


def list_photos(sources: Sequence[Path], ask: Ask = AUTO) -> SourceIndex:
    """All photos of these sources, with their classes. Raises UserError if one has none, or holds several splits; OSError
    if one cannot be read."""
    _refuse_overlap(sources)
    skipped, listings, roots = Skipped(), list[Listing](), list[Root]()
    by_table, by_folders = ask.label_file or ask.listed, False
    for src in sources:
        if not src.exists():
            known = os.listdir(src.parent) if src.parent.is_dir() else []
            raise UserError(f"{src}: no such folder or file{suggest(src.name, known)}")
        own = Skipped()
        listing = list_source(src, ask, own)
        roots.append(Root(src, ask.follow_links or listing.classes is not None or tables.is_table(src)))
        if not listing.photos:
            raise UserError(no_photos(src, own, ask.dst))
        if not listing.matched:
            _choose(src, listing, ask)
        if listing.classes is None or by_table:
            by_folders = True
            _label(roots[-1], listing, ask, own, "no" if by_table else ask.labels)
        if ask.labels == "yes" and not listing.classes and not by_table:
            raise UserError(f"--labels yes: {src} has no classes: {listing.summary}")
        listings.append(listing)
        skipped.update(own if len(sources) == 1 else _below(own, src))
    if not by_folders:  # else label_photos has refused a devkit for other photos
        refuse_devkit(sources[0], ask.devkit)
    index = _merge(listings, roots, skipped)
    if by_table:
        _label_by_table(index, ask)
    if ask.class_names:
        if not index.classes:
            raise UserError(f"--class-names {ask.class_names}: the photos have no classes: {index.summary}")
        index.classes = tables.name_classes(ask.class_names, index.classes)
    return index


def list_source(src: Path, ask: Ask, skipped: Skipped) -> Listing:
    """The photos of one source, by what it is. `skipped` gets all else."""
    if src.is_dir():
        return list_shards(src, ask) if (src / "manifest.json").is_file() else _list_folder(src, ask, skipped)
    if not src.is_file():
        raise UserError(f"{src}: neither a folder nor a file")
    kind = stream_kind(src)
    if kind == "zip":
        return list_zip(src, ask, skipped)
    if kind in READ:
        return _list_tar(src, unpack_tar(src, kind, ask.work), ask, skipped)
    with src.open("rb") as file:
        head = file.read(HEAD)
    if head.startswith(MAGIC) or src.suffix == ".arrow":
        return list_parquet(src, [""], ask, skipped)
    if tables.is_table(src):
        return _list_table(src, skipped)
    if (kind := kind_of(head, src.name)) in PHOTOS + PICTURES:
        raise UserError(f"{src}: one picture ({kind}); give the folder that it is in: {src.parent}")
    return _list_tar(src, src, ask, skipped)


def _list_folder(src: Path, ask: Ask, skipped: Skipped) -> Listing:
    tars: list[str] = []
    found = [Photo(*place) for place in photos_in_folder(src, ask.follow_links, tars, skipped)]
    if not found and (len(tars) > 1 or (tars and ask.labels == "yes")):
        return class_tars.in_folder(src, tars, ask.labels, ask.dst, ask.skip_broken, skipped)
    skipped.listed.sort(key=lambda row: row["source"])  # file systems list names in any order
    if not found and not tars:
        files = [row["source"] for row in skipped.listed if row["kind"] in [f"{e} files" for e in ENDINGS]]
        if files:
            skipped.remove(files)
            return list_parquet(src, files, ask, skipped)
    for name in tars:
        skipped.add_file(name, ARCHIVE)
    skipped.listed.sort(key=lambda row: row["source"])
    return Listing(sorted(found))


def _list_tar(src: Path, tar: Path, ask: Ask, skipped: Skipped) -> Listing:
    """The photos of a tar; or, if it holds tars and no photos, of those. tar: the file that is read, SRC or unpacked."""
    if why := fault(tar):
        raise UserError(f"{src}: {why}")
    inner: list[Member] = []
    with tar.open("rb") as file:
        try:
            inside = members(file, 0, os.fstat(file.fileno()).st_size, str(src), skipped.joints(src.name))
            found = [Photo(m.name, m.offset, m.size) for m in photos_in_tar(file, inside, inner, skipped)]
        except UserError as error:
            raise UserError(f"{error}; {AGAIN}") from None
    if inner and not found:
        listing = class_tars.in_tar(tar, inner, ask.labels, ask.dst, ask.skip_broken, skipped)
    else:
        for m in inner:
            skipped.add_file(m.name, ARCHIVE)
        listing = Listing(sorted(found))
    if tar != src:
        listing.photos = [photo._replace(file=str(tar)) for photo in listing.photos]
    return listing


def _list_table(src: Path, skipped: Skipped) -> Listing:
    """The photos that a table names, below its folder; with its labels, if it has any."""
    rows = tables.read_table(src)
    photos = []
    for row in rows:
        path = src.parent / row.photo
        if not path.is_file():
            near = suggest(path.name, os.listdir(path.parent) if path.parent.is_dir() else [])
            header = "" if near or row.line > 1 else "; if this line names the columns, call them path and label"
            raise UserError(f"{src}:{row.line}: {printable(row.photo)}: no such file in {src.parent}{near}{header}")
        photos.append(Photo(row.photo, 0, path.stat().st_size, file=str(path.absolute())))
    label_of, classes = tables.classes_of([row.label for row in rows])
    photos = [photo._replace(label=label) for photo, label in zip(photos, label_of, strict=True)]
    summary = f"photos of a table, {plural(len(classes), 'class')}"
    # a list of paths alone has the classes of their folders
    return Listing(sorted(photos), summary, classes or None, str(src.parent))


def _refuse_overlap(sources: Sequence[Path]) -> None:
    for i, src in enumerate(sources):
        for other in sources[:i]:
            if src == other:
                raise UserError(f"{src} is given twice")
            if other.is_dir() and src.is_dir() and (src.is_relative_to(other) or other.is_relative_to(src)):
                raise UserError(f"{max(src, other)} is inside {min(src, other)}: its photos would be read twice")


def _choose(src: Path, listing: Listing, ask: Ask) -> None:
    """Only the photos that match the pattern. Raises UserError if none does."""
    found = [p for p in listing.photos if matches(p.name, ask.match)]
    if not found:
        first = printable(listing.photos[0].name)
        raise UserError(
            f"{src}: none of its {plural(len(listing.photos), 'photo')} matches {ask.match!r}; the first is {first}"
        )
    listing.photos = found


def _label(root: Root, listing: Listing, ask: Ask, skipped: Skipped, labels: str) -> None:
    """Labels by the names of folders, and warnings about them."""
    src = root.path
    listing.photos = without_duplicates(listing.photos, skipped)
    names = [p.name for p in listing.photos]
    labeled = label_photos(src, names, labels, ask.devkit, ask.dst)
    listing.photos = [p._replace(label=label) for p, label in zip(listing.photos, labeled.label_of, strict=True)]
    listing.classes = [printable(c) for c in labeled.classes]
    listing.summary = labeled.summary
    listing.warnings += [*labeled.warnings, *warn_of_masks(root, listing.photos, labeled.below, ask.dst)]
    if labels == "auto":
        listing.warnings += warn_of_samples(src, names, skipped, ask.dst)
        listing.warnings += [] if labeled.classes else warn_of_labels(src, skipped)


def _below(skipped: Skipped, src: Path) -> Skipped:
    """With the source's name before the names: there are several sources."""
    listed = [row | {"source": f"{printable(src.name)}/{row['source']}"} for row in skipped.listed]
    return Skipped(skipped.counts, listed, skipped.joined)


def _merge(listings: list[Listing], roots: list[Root], skipped: Skipped) -> SourceIndex:
    """All sources as one: equal names of classes are one class; names of photos begin below the folder of all."""
    first = listings[0]
    origins = [listing.origin or str(root.path) for listing, root in zip(listings, roots, strict=True)]
    if len(listings) == 1:
        return SourceIndex(
            first.photos, first.classes or [], first.summary, skipped, roots, origins[0], first.warnings, first.broken
        )
    origin = os.path.commonpath(origins)
    roots = [root._replace(prefix=f"{os.path.relpath(o, origin)}/") for root, o in zip(roots, origins, strict=True)]
    lists = [listing.classes or [] for listing in listings]
    classes = lists[0] if all(c == lists[0] for c in lists) else sorted({name for c in lists for name in c})
    position = {name: i for i, name in enumerate(classes)}
    photos = []
    for i, listing in enumerate(listings):
        to = [position[name] for name in lists[i]]
        photos += [p._replace(root=i, label=to[p.label] if p.label >= 0 else -1) for p in listing.photos]
    parts = [
        f"{root.path} ({plural(len(listing.photos), 'photo')}; {listing.summary})"
        for root, listing in zip(roots, listings, strict=True)
    ]
    warnings = [warning for listing in listings for warning in listing.warnings]
    if classes and not all(lists):
        without = [str(root.path) for root, c in zip(roots, lists, strict=True) if not c]
        warnings.append(f"the photos of {', '.join(without)} have no class, those of the other sources have")
    broken = [row for listing in listings for row in listing.broken]
    return SourceIndex(photos, classes, "; ".join(parts), skipped, roots, origin, warnings, broken)


def _label_by_table(index: SourceIndex, ask: Ask) -> None:
    """Labels from a table; with a list, only its photos."""
    path = ask.label_file or ask.listed
    assert path is not None
    names, sources = _names_and_sources(index)
    if ask.listed:
        listed = tables.read_table(ask.listed)
        found = tables.match(listed, names, sources)
        tables.refuse_missing(ask.listed, listed, found, names, all_rows=True)
        index.photos = [p for p, row in zip(index.photos, found.row_of, strict=True) if row]
        names, sources = _names_and_sources(index)
    rows = tables.read_table(path)
    found = tables.match(rows, names, sources)
    tables.refuse_missing(path, rows, found, names, all_rows=False)
    if ask.label_file and all(row.label is None for row in rows):
        raise UserError(f"{path}: no labels in it; a table has columns `path,label`, or a path and a label a line")
    label_of, classes = tables.classes_of([row.label if row else None for row in found.row_of])
    if ask.labels == "no":
        label_of, classes = [-1] * len(names), []
    without = label_of.count(-1) if classes else 0
    if ask.labels == "yes" and (without or not classes):
        raise UserError(f"--labels yes: {plural(without or len(names), 'photo')} without a label in {path}")
    if without:
        first = printable(names[label_of.index(-1)])
        index.warnings.append(f"{plural(without, 'photo')} without a label in {path} ({first} first)")
    if found.unused and ask.label_file:
        first = printable(found.unused[0].photo)
        index.warnings.append(f"{plural(len(found.unused), 'line')} of {path} without a photo ({first} first)")
    index.photos = [p._replace(label=label) for p, label in zip(index.photos, label_of, strict=True)]
    index.classes = classes
    index.summary = f"{plural(len(classes), 'class')} from {path}"


def _names_and_sources(index: SourceIndex) -> tuple[list[str], list[Path]]:
    return [p.name for p in index.photos], [index.roots[p.root].path for p in index.photos]


def describe(index: SourceIndex, dst: Path) -> list[str]:
    """Lines for the user before the work begins: classes, what is converted or skipped, warnings. dst: as it was given."""
    lines = []
    if index.classes:
        lines.append(describe_classes(index.classes, Counter(p.label for p in index.photos)))
    in_shards = {
        i for i, root in enumerate(index.roots) if (root.path / "manifest.json").is_file()
    }  # JPEG, whatever their name
    apart = [p for p in index.photos if p.root not in in_shards and not has_photo_ending(p.name)]
    endings = Counter(ending(p.name) or "no ending" for p in apart)
    converted = Counter({e: n for e, n in endings.items() if e in CONVERTED_ENDINGS})
    if converted:
        lines.append(f"to be converted to JPEG: {counts(converted)}")
    if odd := endings - converted:
        lines.append(f"by their first bytes, not by their ending: {counts(odd)}")
    if index.skipped.listed:
        lines.append(f"skipped {counts(index.skipped.counts)}, to be listed in {dst}/skipped.jsonl")
    lines += joined_tars(index.skipped)
    in_tars = any(p.file for p in index.photos)
    names = {p.name for p in index.photos}
    src = index.roots[0].path
    warnings = (*index.warnings, *source_warnings(index.skipped, names, src, in_tars or len(index.roots) > 1))
    return lines + [f"warning: {warning}" for warning in warnings]
