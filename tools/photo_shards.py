"""Shards of a folder of photos that was given in the place of shards: made once, into the cache, and found again.

    ~/.cache/densedino/shards/photos-<hash of its path>-<hash of its photos>

`$XDG_CACHE_HOME` moves the cache. The second hash is of the photos' names, sizes and times of change, so a changed folder
has other shards, in another folder. Nothing is deleted here: the line about the change has the command.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from shlex import quote

from pipeline.prepare.archives import list_tars
from pipeline.prepare.skipped import Skipped
from pipeline.prepare.sources.walk import photos_in_folder
from pipeline.remote.cache import default_cache
from pipeline.shards import has_photos
from runtime.errors import UserError, plural

HASH = 8  # letters


def is_photo_folder(text: str) -> bool:
    """Whether a path is a folder of photos, and not of shards, of tars, or of folders of shards."""
    folder = Path(text)
    if not folder.is_dir() or (folder / "manifest.json").exists() or list_tars(folder):
        return False
    return not any(folder.glob("*/manifest.json")) and has_photos(folder)


def shards_of(variable: str, text: str, make: bool) -> str:
    """The folder of the shards of these photos, which are made first if they are not there. variable: SHARDS or VAL, which
    is this folder. Raises UserError if they would have to be made and `make` is not set. If the program that makes them
    fails, exits with its code."""
    photos = Path(text).resolve()
    files = _files(photos)
    cache = default_cache() / "shards"
    name = f"{photos.name}-{_hash([str(photos)])}"
    folder = cache / f"{name}-{_hash(files)}"
    what = f"{variable}={text}: {plural(len(files), 'photo')}"
    if (folder / "manifest.json").exists():
        print(f"{what}, whose shards are in {folder}", flush=True)
        return str(folder)
    command = f"`make shards SRC={quote(str(photos))} DST={quote(str(folder))}`"
    if not make:
        raise UserError(f"{what}, and no shards of them yet; {command} makes them, and so does training")
    older = sorted(path for path in cache.glob(f"{name}-{'[0-9a-f]' * HASH}") if path != folder)
    if older:
        named = " ".join(quote(str(path)) for path in older)
        print(
            f"{variable}={text} has changed since its shards were made; `rm -r {named}` deletes the old ones",
            flush=True,
        )
    print(f"{what}, whose shards are made first, once, in {folder} ({command})", flush=True)
    done = subprocess.run([sys.executable, "-m", "tools.make_shards", "make", str(photos), str(folder)], check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return str(folder)


def _files(photos: Path) -> list[str]:
    """A line for each photo: name, size, time of change."""
    try:
        names = sorted(name for name, _, _ in photos_in_folder(photos, False, [], Skipped()))
        found = [(name, os.stat(photos / name)) for name in names]
    except OSError as error:
        raise UserError(f"{error.filename or photos}: cannot be read: {error.strerror}") from None
    return [f"{name}\0{about.st_size} {about.st_mtime_ns}" for name, about in found]


def _hash(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()[:HASH]
