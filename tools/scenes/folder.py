"""Write the painted scenes as a folder in Pascal VOC's layout, atomically and in parallel."""

import contextlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from runtime.cores import usable_cores
from runtime.errors import UserError
from runtime.files import try_lock
from tools.scenes.classes import CLASSES
from tools.scenes.paint import paint

VERSION = 2  # of the pictures' content: another number is another data set
CHUNK = 50  # pictures painted at once, whatever the number of processes, and fewer large ones
PIXELS = CHUNK * 256**2  # at most, of the pictures painted at once: their memory


def voc_palette() -> list[int]:
    """Pascal VOC's colors: the bits of a class number, distributed over red, green and blue."""
    colors = np.zeros((256, 3), int)
    for bit in range(8):
        digit = np.arange(256) >> (3 * (bit % 3)) if bit < 3 else np.zeros(256, int)
        for channel in range(3):
            colors[:, channel] |= ((digit >> channel) & 1) << (7 - bit)
    return colors.ravel().tolist()


def at_once(size: int) -> int:
    """How many pictures of a size are painted at once."""
    return max(1, min(CHUNK, PIXELS // size**2))


def write_chunk(numbers: range, *, folder: Path, seed: int, split: str, size: int) -> int:
    """Paint and write some scenes of a split; returns how many."""
    names, palette = list(CLASSES), voc_palette()
    pictures, masks, salient = paint(seed, split, np.array(numbers), size)
    for n, picture, mask, kind in zip(numbers, pictures, masks, salient, strict=True):
        name = f"{split}_{n:06d}"
        photo = folder / "JPEGImages" / f"{name}.jpg"
        Image.fromarray(picture).save(photo, quality=95, subsampling=0)
        label_image = Image.fromarray(mask, "P")
        label_image.putpalette(palette)
        label_image.save(folder / "SegmentationClass" / f"{name}.png")
        _same_file(photo, folder / split / names[kind - 1] / photo.name)
    return len(numbers)


def _same_file(photo: Path, name: Path) -> None:
    """Another name for a file: a link, or a copy on a disk that has no links (exFAT)."""
    try:
        os.link(photo, name)
    except OSError:
        shutil.copyfile(photo, name)


def make_scenes(folder: Path, *, train: int, val: int, size: int, seed: int) -> None:
    """Write the whole set, under another name until it is complete.

    A folder that holds the same scenes is kept. Raises UserError if it holds anything else, if it cannot be written, or if
    another process paints it.
    """
    settings = {"version": VERSION, "train": train, "val": val, "size": size, "seed": seed}
    if _is_complete(folder, settings):
        print(f"{folder}: {train} + {val} scenes, already painted")
        return
    start = time.monotonic()
    try:
        with _work_folder(folder) as work:
            _paint_all(work, train=train, val=val, size=size, seed=seed)
            (work / "scenes.json").write_text(json.dumps(settings) + "\n")
            os.replace(work, folder.resolve())  # a folder that is not empty is complete
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}") from None
    print(f"{folder}: {train} + {val} scenes of {size} px painted in {time.monotonic() - start:.0f} s")


@contextlib.contextmanager
def _work_folder(folder: Path) -> Iterator[Path]:
    """The folder beside it that is painted in, locked, with what a killed program left there removed. A link is followed.

    Raises UserError if another process paints, or if the finished set could not take the folder's place; OSError if nothing
    can be written.
    """
    place = folder.resolve()
    if Path.cwd().is_relative_to(place):
        raise UserError(f"{folder} is the folder you are in; name another one, such as {folder / 'scenes'}")
    if place.exists():  # and empty: made again at once, because a mount point cannot be replaced
        try:
            place.rmdir()
            place.mkdir()
        except OSError as error:
            raise UserError(f"{folder}: {error.strerror}; name a folder in it, such as {folder / 'scenes'}") from None
    work = place.with_name(f".{place.name}.painting")
    work.mkdir(parents=True, exist_ok=True)
    handle = os.open(work, os.O_RDONLY)
    try:
        if not try_lock(handle, work):
            raise UserError(f"{folder}: another process is painting it; wait until it ends")
        for old in work.iterdir():
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        yield work
    finally:
        os.close(handle)


def _paint_all(work: Path, *, train: int, val: int, size: int, seed: int) -> None:
    """All files but scenes.json."""
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (work / name).mkdir(parents=True)
    for split in ("train", "val"):
        for kind in CLASSES:
            (work / split / kind).mkdir(parents=True)
    step = at_once(size)
    with multiprocessing.get_context("spawn").Pool(min(8, usable_cores())) as pool:
        for split, count in (("train", train), ("val", val)):
            chunks = [range(i, min(i + step, count)) for i in range(0, count, step)]
            job = partial(write_chunk, folder=work, seed=seed, split=split, size=size)
            painted = track(pool.imap(job, chunks), f"painting {split}", len(chunks), disable=not Console().is_terminal)
            assert sum(painted) == count
            ids = "".join(f"{split}_{n:06d}\n" for n in range(count))
            (work / "ImageSets/Segmentation" / f"{split}.txt").write_text(ids)
    (work / "classes.txt").write_text("\n".join(["ground", *CLASSES]) + "\n")


def _is_complete(folder: Path, settings: dict[str, int]) -> bool:
    """Whether the folder holds the scenes of these settings. Raises UserError if it holds anything else."""
    file = folder / "scenes.json"
    if file.is_file():
        try:
            saved = json.loads(file.read_bytes())
        except ValueError:
            saved = None
        if saved == settings:
            return True
        if not isinstance(saved, dict):
            raise UserError(f"{file}: not the settings of painted scenes; name another folder, or remove {folder}")
        changes = (f"{k} {saved.get(k)} saved, {v} given" for k, v in settings.items() if saved.get(k) != v)
        raise UserError(f"{folder} holds other scenes ({', '.join(changes)}); name another folder, or remove it")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty and holds no scenes; name another folder")
    return False
