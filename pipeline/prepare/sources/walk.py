"""The photos below a folder and in a tar; and the tars there, which may be classes.

In a folder, links are followed only on request: each real folder is read once, so no circle is endless.
"""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from pipeline.prepare.kinds import HEAD, is_photo, kind_of
from pipeline.prepare.names import folder_to_skip, has_photo_ending, is_hidden, printable, skipped_folder
from pipeline.prepare.skipped import READ_BEFORE, Skipped
from pipeline.prepare.sources.photos import Photo
from pipeline.prepare.tar import Member


def photos_in_tar(
    tar: BinaryIO, found: Iterable[Member], tars: list[Member], skipped: Skipped, where: str = ""
) -> Iterator[Member]:
    """The photos among members. Inner tars are added to `tars`, all else to `skipped`, with `where` before their names."""
    folders = set[str]()  # those that were counted
    for m in found:
        name = where + m.name
        folder, why = skipped_folder(m.name)
        if m.skip:
            skipped.add(name, m.skip, "not read from a tar")
        elif folder:
            if folder not in folders:
                folders.add(folder)
                skipped.add(where + folder, why, "not looked into")
        elif is_hidden(m.name.rpartition("/")[2]):
            skipped.add(name, "hidden files", "its name begins with a dot")
        elif has_photo_ending(m.name):
            yield m
        else:
            kind = kind_of(os.pread(tar.fileno(), min(m.size, HEAD), m.offset), m.name)
            if is_photo(kind):
                yield m
            elif m.name.endswith(".tar"):
                tars.append(m)
            else:
                skipped.add_file(name, kind)


def without_duplicates(found: list[Photo], skipped: Skipped) -> list[Photo]:
    """Sorted photos, of equal names only the first: a tar or zip can hold a name twice."""
    unique: list[Photo] = []
    for photo in found:
        if unique and photo.name == unique[-1].name:
            skipped.add(photo.name, "duplicate names", "the source holds another member of this name before it")
        else:
            unique.append(photo)
    return unique


def photos_in_folder(
    src: Path, follow_links: bool, tars: list[str], skipped: Skipped
) -> Iterator[tuple[str, int, int]]:
    """(name, 0, size) of every photo below a folder. A photo behind a link has the link's name. The names of tars are added
    to `tars`, whatever they hold; all else to `skipped`.

    Folders come before links, and links in the order of their names, so a folder that can be reached in two ways has the
    same name on every machine. Raises OSError if a folder cannot be read.
    """
    real = {_identity(src / "")} if follow_links else set()
    todo, links = [""], list[str]()
    while todo or links:
        if not todo:
            links.sort(reverse=True)
            todo += _follow(src, links.pop(), real, skipped)
            continue
        below = todo.pop()
        for entry in os.scandir(src / below):
            name = below + entry.name
            is_link = entry.is_symlink()
            if is_link and not follow_links:
                skipped.add(name, "links", "links are not followed without --follow-links")
            elif is_link and not os.path.exists(entry.path):
                skipped.add(
                    name, "broken links", f"what it points to does not exist: {printable(os.readlink(entry.path))}"
                )
            elif entry.is_dir():
                if why := folder_to_skip(entry.name):
                    skipped.add(name + "/", why, "not looked into")
                elif is_link:
                    links.append(name + "/")
                elif not follow_links:
                    todo.append(name + "/")
                else:
                    todo += _new(src, name + "/", real, skipped)
            elif not entry.is_file():
                skipped.add(name, "special files", "neither a file nor a folder")
            elif is_hidden(entry.name):
                skipped.add(name, "hidden files", "its name begins with a dot")
            elif has_photo_ending(name) or _begins_as_photo(entry.path, name, tars, skipped):
                yield name, 0, entry.stat().st_size


def _begins_as_photo(path: str, name: str, tars: list[str], skipped: Skipped) -> bool:
    """Whether a file's first bytes are a photo's; otherwise it is a tar, or counted."""
    is_tar = name.endswith(".tar")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            kind = kind_of(os.read(fd, HEAD), name)
        finally:
            os.close(fd)
    except OSError as error:
        kind = ""
        if not is_tar:  # of a tar, class_tars.py says it
            skipped.add(name, "unreadable files", f"cannot be opened: {error.strerror}")
            return False
    if is_photo(kind):
        return True
    if is_tar:
        tars.append(name)
    else:
        skipped.add_file(name, kind)
    return False


def _follow(src: Path, link: str, real: set[tuple[int, int]], skipped: Skipped) -> list[str]:
    """The folder behind a link, to be read, unless it holds SRC or the link, or was read before."""
    target = (src / link).resolve()
    if src.is_relative_to(target) or (src / link).parent.resolve().is_relative_to(target):
        skipped.add(link, "links in a circle", "points to a folder that holds it")
        return []
    return _new(src, link, real, skipped)


def _new(src: Path, folder: str, real: set[tuple[int, int]], skipped: Skipped) -> list[str]:
    """The folder, unless it was read before under another name."""
    identity = _identity(src / folder)
    if identity in real:
        skipped.add(folder, READ_BEFORE, "read under another name")
        return []
    real.add(identity)
    return [folder]


def _identity(folder: Path) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino
