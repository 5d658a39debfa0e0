"""One tar per class: in a folder (n01440764.tar, n01443537.tar, ...), or in a tar, as ImageNet's training tar.

The tars are read where they are. A folder of tars can also hold shards of another program; those are refused here, with the
command that uses them.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

from pipeline.prepare.archives import AGAIN, compressed_tars, describe_archive, fault, inner_fault, unpack_tars
from pipeline.prepare.kinds import ARCHIVE
from pipeline.prepare.names import printable, splits_among
from pipeline.prepare.skipped import Skipped
from pipeline.prepare.sources.layout import make_command, word
from pipeline.prepare.sources.photos import Listing, Photo
from pipeline.prepare.sources.walk import photos_in_tar
from pipeline.prepare.tar import Member, members
from pipeline.prepare.tars.labels import LABEL_ENDINGS
from pipeline.prepare.tars.samples import split_key
from runtime.errors import UserError, plural

LEAVE_OUT = "or leave such tars out with ARGS=--skip-broken"


class ClassTar(NamedTuple):
    """A tar in bytes [start, end) of a file. `end` None: up to the end of the file."""

    name: str  # below SRC: train/n01440764.tar
    path: Path  # the file
    start: int
    end: int | None

    @property
    def label(self) -> str:
        return self.name.rpartition("/")[2].removesuffix(".tar")


def in_tar(src: Path, inner: list[Member], labels: str, dst: str, skip_broken: bool, skipped: Skipped) -> Listing:
    """The photos of a tar of tars. Raises UserError if they are not one class each, or if a tar is damaged and `skip_broken`
    is not set. dst: the shards' folder, for messages."""
    first = {m.name: m for m in reversed(inner)}  # of equal names the first
    tars = [ClassTar(m.name, src, m.offset, m.offset + m.size) for m in sorted(first.values())]
    _refuse_parts(src, tars, labels, dst)
    return _read_all(src, tars, labels, skip_broken, skipped, f"a tar of {len(tars)} tars")


def in_folder(src: Path, names: list[str], labels: str, dst: str, skip_broken: bool, skipped: Skipped) -> Listing:
    """As `in_tar`, of a folder of tars with these names below SRC."""
    tars = [ClassTar(name, src / name, 0, None) for name in sorted(names)]
    _refuse_parts(src, tars, labels, dst)
    index = f"`make index DST={word(str(tars[0].path.parent))}`"
    if labels == "auto" and _is_numbered([t.label for t in tars]):
        raise UserError(
            f"{src}: {len(tars)} tars numbered in a row ({tars[0].name} to {tars[-1].name}): if they are WebDataset shards, "
            f"{index} uses them as they are; if each is a class, say so with ARGS='--labels yes'"
        )
    if not skip_broken and (compressed := compressed_tars(tars[0].path.parent)):  # each would be a class
        more = f" ({plural(len(compressed), 'such file')}: `{unpack_tars(compressed)}`)" if compressed[1:] else ""
        raise UserError(f"{compressed[0][0]}: {describe_archive(compressed[0][0])}{more}; {LEAVE_OUT}")
    return _read_all(src, tars, labels, skip_broken, skipped, f"a folder of {len(tars)} tars")


def _read_all(src: Path, tars: list[ClassTar], labels: str, skip_broken: bool, skipped: Skipped, what: str) -> Listing:
    photos: list[Photo] = []
    broken: list[dict] = []
    for label, tar in enumerate(tars):
        try:
            found, inside = _read(tar, skipped)
        except (UserError, OSError) as error:
            reason = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
            if not skip_broken:
                where = f"{src}: {tar.name}" if tar.path == src else str(tar.path)
                raise UserError(f"{where}: {reason}; {LEAVE_OUT}") from None
            broken.append({"source": printable(tar.name), "reason": reason})
            continue
        if tar.path != src:
            _refuse_shard(tar, found, inside)
        file = "" if tar.path == src else tar.name
        for m in found:
            place = f"{tar.name}/{m.name}"
            photos.append(
                Photo(f"{tar.label}/{m.name}", m.offset, m.size, label if labels != "no" else -1, file, shown=place)
            )
    classes = [] if labels == "no" else [printable(tar.label) for tar in tars]
    summary = f"{what}, {'no classes' if labels == 'no' else 'one class each'}"
    return Listing(sorted(photos), summary, classes, broken=broken)


def _read(tar: ClassTar, skipped: Skipped) -> tuple[list[Member], list[Member]]:
    """(photos, all members) of a class's tar; what is no photo is counted. Raises UserError if it is broken."""
    if why := fault(tar.path) if tar.end is None else inner_fault(tar.path, tar.start, tar.end):
        raise UserError(why)
    with tar.path.open("rb") as file:
        end = os.fstat(file.fileno()).st_size if tar.end is None else tar.end
        try:
            found = list(members(file, tar.start, end, "", skipped.joints(tar.name)))
        except UserError as error:
            raise UserError(f"{error}; {AGAIN}".removeprefix(": ")) from None
        inner: list[Member] = []
        photos = list(photos_in_tar(file, found, inner, skipped, f"{tar.name}/"))
    for m in inner:
        skipped.add_file(f"{tar.name}/{m.name}", ARCHIVE)
    return photos, found


def _refuse_shard(tar: ClassTar, photos: list[Member], inside: list[Member]) -> None:
    """Raise UserError if a tar has labels or texts beside photos of the same key: a shard of another program."""
    keys = {split_key(m.name)[0]: m.name for m in photos}
    for m in inside:
        key, ending = split_key(m.name)
        if ending in LABEL_ENDINGS and key in keys:
            raise UserError(
                f"{tar.path}: holds samples ({printable(keys[key])} with {printable(m.name)}): a WebDataset shard, not a "
                f"class of photos; `make index DST={word(str(tar.path.parent))}` uses such tars as they are"
            )


def _refuse_parts(src: Path, tars: list[ClassTar], labels: str, dst: str) -> None:
    """Raise UserError for tars in several folders, and for tars of several splits: train.tar beside val.tar."""
    folders = sorted({tar.name.rpartition("/")[0] for tar in tars})
    if len(folders) > 1:
        named = " and ".join(printable(f"{folder}/") if folder else "directly in it" for folder in folders[:3])
        splits = splits_among(folders)
        one = next(iter(splits.values()))[0] if splits else folders[-1]
        raise UserError(
            f"{src} holds tars in several places ({named}): give one of them: {make_command(src, one, dst)}"
        )
    splits = splits_among(tar.name for tar in tars) if labels == "auto" else {}
    if splits:
        found = [
            printable(names[0]) + (f" and {len(names) - 1} more" if names[1:] else "") for names in splits.values()
        ]
        how = f"make shards of one of them: {make_command(src, next(iter(splits.values()))[0], dst)}"
        if src.is_dir() and any(len(names) > 1 for names in splits.values()):
            index = f"`make index DST={word(str(tars[0].path.parent))}`"
            how = f"if they are WebDataset shards, {index} says how to separate them"
        raise UserError(f"{src} holds several splits: {', '.join(found)}: parts of a data set, not classes; {how}")


def _is_numbered(labels: list[str]) -> bool:
    """Whether these are names as shards have them: 00000, 00001, ... or shard-0-of-9, shard-1-of-9, ..."""
    found = [re.fullmatch(r"(.*?)(\d+)(-of-\d+)?", label) for label in labels]
    numbers = sorted(int(match[2]) for match in found if match)
    if len(numbers) < max(2, len(labels)) or len({match[1] for match in found if match}) > 1:
        return False
    return numbers[0] <= 1 and numbers == list(range(numbers[0], numbers[0] + len(numbers)))
