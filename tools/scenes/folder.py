"""Write the painted scenes as a folder in Pascal VOC's layout, atomically and in parallel."""

import json
import multiprocessing
import os
import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from runtime.errors import UserError
from tools.scenes.classes import CLASSES
from tools.scenes.paint import paint

VERSION = 2  # of the pictures' content: another number is another data set
CHUNK = 50  # pictures painted at once, whatever the number of processes


def voc_palette() -> list[int]:
    """Pascal VOC's colors: the bits of a class number, distributed over red, green and blue."""
    colors = np.zeros((256, 3), int)
    for bit in range(8):
        digit = np.arange(256) >> (3 * (bit % 3)) if bit < 3 else np.zeros(256, int)
        for channel in range(3):
            colors[:, channel] |= ((digit >> channel) & 1) << (7 - bit)
    return colors.ravel().tolist()


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
        os.link(photo, folder / split / names[kind - 1] / photo.name)
    return len(numbers)


def make_scenes(folder: Path, *, train: int, val: int, size: int, seed: int) -> None:
    """Write the whole set, under another name until it is complete.

    A folder that holds the same scenes is kept. Raises UserError if it holds anything else, or if it cannot be written.
    """
    settings = {"version": VERSION, "train": train, "val": val, "size": size, "seed": seed}
    if _is_complete(folder, settings):
        print(f"{folder}: {train} + {val} scenes, already painted")
        return
    start = time.monotonic()
    work = folder.with_name(f".{folder.name}.painting")
    shutil.rmtree(work, ignore_errors=True)
    try:
        for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
            (work / name).mkdir(parents=True)
        for split in ("train", "val"):
            for kind in CLASSES:
                (work / split / kind).mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from None
    with multiprocessing.get_context("spawn").Pool(min(8, os.cpu_count() or 1)) as pool:
        for split, count in (("train", train), ("val", val)):
            chunks = [range(i, min(i + CHUNK, count)) for i in range(0, count, CHUNK)]
            job = partial(write_chunk, folder=work, seed=seed, split=split, size=size)
            painted = track(pool.imap(job, chunks), f"painting {split}", len(chunks), disable=not Console().is_terminal)
            assert sum(painted) == count
            ids = "".join(f"{split}_{n:06d}\n" for n in range(count))
            (work / "ImageSets/Segmentation" / f"{split}.txt").write_text(ids)
    (work / "classes.txt").write_text("\n".join(["ground", *CLASSES]) + "\n")
    (work / "scenes.json").write_text(json.dumps(settings) + "\n")
    if folder.exists():
        folder.rmdir()
    os.replace(work, folder)  # a folder that exists is complete
    print(f"{folder}: {train} + {val} scenes of {size} px painted in {time.monotonic() - start:.0f} s")


def _is_complete(folder: Path, settings: dict[str, int]) -> bool:
    """Whether the folder holds the scenes of these settings. Raises UserError if it holds anything else."""
    file = folder / "scenes.json"
    if file.is_file():
        saved = json.loads(file.read_text())
        if saved == settings:
            return True
        changes = (f"{k} {saved.get(k)} saved, {v} given" for k, v in settings.items() if saved.get(k) != v)
        raise UserError(f"{folder} holds other scenes ({', '.join(changes)}); name another folder, or remove it")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty and holds no scenes; name another folder")
    return False
