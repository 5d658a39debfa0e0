"""Paint a small labeled set of scenes that minutes on a CPU can learn something from.

    python -m tools.make_scenes DST [--train 3000] [--val 1000] [--size 48] [--seed 0]

A scene is one salient object and one or two small distractors of other classes on a patchwork ground. A class is a shape
with a texture of its own, in two complementary hues that it shares with one other class and that change places at random:
the colors narrow the class down to two, shape and texture decide. Place, size (by area) and turn are drawn alike for all
classes, and every ground has all hues in it, because whatever is constant within a picture and unrelated to the class is
learned in its stead (../shared/facts/learning-on-two-cores.md). A scene is a pure function of (seed, split, number, size).

    DST/JPEGImages/<id>.jpg  SegmentationClass/<id>.png  ImageSets/Segmentation/{train,val}.txt    Pascal VOC's layout
    DST/train/<class>/<id>.jpg  val/<class>/<id>.jpg                    the same files, by the salient object's class
    DST/classes.txt                                                     names, ground first
    DST/scenes.json                                                     the settings, written last: the set is whole

Lengths are in units: a picture is 48 units wide, whatever its size in pixels.
P pictures · S size in pixels · O objects in a scene.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track

from pipeline.random import uniform
from runtime.errors import UserError, run_cli

VERSION = 1  # of what is painted: another number, another set
UNITS = 48.0
OBJECTS = 3  # the salient one, a distractor, and one more in half of the scenes
CHUNK = 50  # pictures painted at once, whatever the number of processes
DIAMETER = ((0.42, 0.60), (0.16, 0.25), (0.16, 0.25))  # of each object, as a share of the side
MARGIN = (0.3, 0.1, 0.1)  # least distance of each object's center from the picture's edge, as a share of the side
CELLS = 14  # patches of a ground

Floats = NDArray[np.float32]
Field = Callable[[Floats, Floats], Floats]


# ------------------------------------------------------------------------------------------------ shapes
# (x, y) -> about the distance to the outline, negative inside; the scale is free, `_SCALES` brings all to one area.


def _polygon(sides: int) -> Field:
    def distance(x: Floats, y: Floats) -> Floats:
        angles = 2 * np.pi * np.arange(sides) / sides
        return np.maximum.reduce([x * np.float32(np.cos(a)) + y * np.float32(np.sin(a)) for a in angles]) - 1

    return distance


def _disc(x: Floats, y: Floats) -> Floats:
    return np.hypot(x, y) - 1


def _star(x: Floats, y: Floats) -> Floats:
    """Five points: the angle is folded into half a point, whose edge is one straight line."""
    turn = np.arctan2(y, x) * np.float32(5 / (2 * np.pi))
    angle = np.abs(turn - np.round(turn)) * np.float32(2 * np.pi / 5)
    radius, edge = np.hypot(x, y), np.float32(1.05)  # radians between a point's axis and its edge's normal
    return radius * np.cos(angle - edge) - np.float32(0.5)


def _cross(x: Floats, y: Floats) -> Floats:
    x, y = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(x - 1, y - 0.36), np.maximum(x - 0.36, y - 1)).astype(np.float32)


def _crescent(x: Floats, y: Floats) -> Floats:
    return np.maximum(np.hypot(x, y) - 1, np.float32(0.72) - np.hypot(x - np.float32(0.6), y))


def _egg(x: Floats, y: Floats) -> Floats:
    """An ellipse, one end slimmer."""
    return (np.hypot(x, y * (np.float32(1.5) + np.float32(0.3) * x)) - 1) * np.float32(0.8)


# ------------------------------------------------------------------------------------------------ textures
# (x, y in units) -> positive in one tone, negative in the other; of the order of 1 half a tone away from the border.


def _wave(x: Floats, period: float) -> Floats:
    return np.sin(x * np.float32(2 * np.pi / period))


def _stripes(x: Floats, y: Floats) -> Floats:
    return 1.5 * _wave(x, 4.0)


def _checks(x: Floats, y: Floats) -> Floats:
    return 3 * _wave(x, 8.0) * _wave(y, 8.0)


def _dots(x: Floats, y: Floats) -> Floats:
    """Round dots on a triangular lattice."""
    a, b = x * np.float32(0.5), y * np.float32(0.75**0.5)
    return (
        _wave(x + np.float32(1.2), 4.8)
        + _wave(b - a + np.float32(1.2), 4.8)
        - _wave(a + b - np.float32(1.2), 4.8)
        - 0.7
    )


def _rings(x: Floats, y: Floats) -> Floats:
    return _wave(np.hypot(x, y), 4.6)


def _zigzag(x: Floats, y: Floats) -> Floats:
    turn = y * np.float32(1 / 8)
    return 1.5 * _wave(x + 8 * np.abs(turn - np.round(turn)), 5.0)


def _grid(x: Floats, y: Floats) -> Floats:
    """Thin lines both ways."""
    return 2 * np.maximum(_wave(x, 4.0), _wave(y, 4.0)) - np.float32(1.2)


def _bricks(x: Floats, y: Floats) -> Floats:
    """Courses, every other one shifted by half a brick."""
    course = np.floor(y * np.float32(1 / 5))
    return 2 * np.maximum(_wave(y - np.float32(1.25), 5.0), _wave(x + np.float32(5) * course, 10.0) ** 3) - 1


def _blots(x: Floats, y: Floats) -> Floats:
    """Waves in four directions: blots without a direction of their own."""
    angles = np.arange(4) * np.pi / 4 + 0.3
    waves = [_wave(x * np.float32(np.cos(a)) + y * np.float32(np.sin(a)), 8.0 + 0.9 * i) for i, a in enumerate(angles)]
    return np.add.reduce(waves)


CLASSES: dict[str, tuple[Field, Field]] = {
    "striped disc": (_disc, _stripes),
    "checked square": (_polygon(4), _checks),
    "dotted triangle": (_polygon(3), _dots),
    "ringed hexagon": (_polygon(6), _rings),
    "zigzag star": (_star, _zigzag),
    "gridded cross": (_cross, _grid),
    "bricked crescent": (_crescent, _bricks),
    "blotted egg": (_egg, _blots),
}


def _scale(shape: Field) -> float:
    """How much larger than one a shape must be drawn to have the area of a disc of diameter 1."""
    x, y = np.meshgrid(np.linspace(-3, 3, 600, dtype=np.float32), np.linspace(-3, 3, 600, dtype=np.float32))
    return float(np.sqrt(np.pi / 4 / (36 * (shape(x, y) < 0).mean())))


_SCALES = np.array([_scale(shape) for shape, _ in CLASSES.values()], np.float32)


# ------------------------------------------------------------------------------------------------ a scene


def hue(turn: NDArray[np.floating]) -> Floats:
    """A color of full saturation for each turn of the hue wheel: [..., 3] in [0, 1]; its channels' mean is 1/2."""
    thirds = np.array([0, 1 / 3, 2 / 3], np.float32)
    return (0.5 + 0.5 * np.cos(2 * np.pi * (turn[..., None].astype(np.float32) - thirds))).astype(np.float32)


def objects(seed: int, split: str, number: NDArray[np.int64]) -> dict[str, NDArray]:
    """What stands where: arrays [P, O], the salient object first; lengths in units, turn in radians.

    The distractors take the first of a few places that is clear of the objects before them, or the clearest.
    """
    draw = uniform(seed, split, number, "objects", shape=(OBJECTS, 3))  # [P, O, (diameter, turn, present)]
    # classes all different: the k-th object takes a class that the objects before it left
    kind = np.argsort(uniform(seed, split, number, "classes", shape=(len(CLASSES),)), axis=1)[:, :OBJECTS]
    low, high = np.array(DIAMETER).T
    diameter = UNITS * (low + (high - low) * draw[..., 0])
    present = np.stack([np.ones(len(number), bool), np.ones(len(number), bool), draw[:, 2, 2] < 0.5], 1)

    place = uniform(seed, split, number, "places", shape=(OBJECTS, 24, 2))  # [P, O, tries, (x, y)]
    margin = np.array(MARGIN)[:, None, None]
    place = UNITS * (margin + (1 - 2 * margin) * place)
    at = place[:, :, 0].copy()  # [P, O, 2]
    for o in range(1, OBJECTS):
        away = np.linalg.norm(place[:, o, :, None] - at[:, None, :o], axis=-1)  # [P, tries, o]
        gap = (away - diameter[:, None, :o] / 2).min(-1) - diameter[:, o, None] / 2
        best = np.where((gap > 1.5).any(1), (gap > 1.5).argmax(1), gap.argmax(1))
        at[:, o] = place[np.arange(len(number)), o, best]
    return {"kind": kind, "diameter": diameter, "turn": 2 * np.pi * draw[..., 1], "at": at, "present": present}


def ground(seed: int, split: str, number: NDArray[np.int64], x: Floats, y: Floats) -> Floats:
    """A patchwork of soft-edged cells, each of its own hue and lightness, with grain: [P, S, S, 3] in [0, 1].

    Every picture has all hues and all lightnesses, and the same mean and spread: no ground stands out.
    """
    draw = uniform(seed, split, number, "ground", shape=(CELLS, 5)).astype(np.float32)
    draw = draw[:, :, None, None]  # [P, cells, 1, 1, (x, y, hue, lightness, size)]
    cell = np.arange(CELLS, dtype=np.float32)[:, None, None]
    turn = (draw[..., 2] + cell) / CELLS
    light = (draw[..., 3] + cell * 5 % CELLS) / CELLS
    color = np.float32(0.3) * hue(turn) + np.float32(0.4) * light[..., None]
    total, weights = np.float32(0), np.float32(1e-30)
    for c in range(CELLS):
        away = np.hypot(x - 52 * draw[:, c, ..., 0] + 2, y - 52 * draw[:, c, ..., 1] + 2) - 6 * draw[:, c, ..., 4]
        weight = np.exp(-away)[..., None]
        total, weights = total + weight * color[:, c], weights + weight
    total = total / weights
    total = (total - total.mean((1, 2), keepdims=True)) / total.std((1, 2), keepdims=True)
    grain = uniform(seed, split, number, "grain", shape=(*x.shape[-2:], 1)).astype(np.float32)
    return np.float32(0.5) + np.float32(0.12) * total + np.float32(0.04) * (grain - np.float32(0.5))


def paint(seed: int, split: str, number: NDArray[np.int64], size: int) -> tuple[NDArray, NDArray, NDArray]:
    """Scenes `number` [P] of a split: pictures uint8 [P, S, S, 3], masks uint8 [P, S, S], salient classes [P] from 1."""
    pixel = np.float32(UNITS / size)
    x, y = np.meshgrid(*[(np.arange(size, dtype=np.float32) + np.float32(0.5)) * pixel] * 2)
    picture = ground(seed, split, number, x, y)
    mask = np.zeros(picture.shape[:3], np.uint8)
    scene = objects(seed, split, number)
    look = uniform(seed, split, number, "look", shape=(OBJECTS, 5)).astype(np.float32)
    for o in reversed(range(OBJECTS)):  # the salient object last: nothing covers it
        for k, (shape, texture) in enumerate(CLASSES.values()):
            (p,) = np.nonzero((scene["kind"][:, o] == k) & scene["present"][:, o])
            if not len(p):
                continue
            phase, stretch, shade, swap, lie = (look[p, o, i][:, None, None] for i in range(5))
            at = scene["at"][p, o].astype(np.float32)[:, :, None, None]
            dx, dy = x - at[:, 0], y - at[:, 1]  # [p, S, S] units from the object's middle
            u, v = _turned(dx, dy, scene["turn"][p, o][:, None, None])
            scale = scene["diameter"][p, o].astype(np.float32)[:, None, None] * _SCALES[k]
            inside = np.clip(np.float32(0.5) - shape(u / scale, v / scale) * scale / pixel, 0, 1)[..., None]

            u, v = _turned(dx, dy, 2 * np.pi * lie)  # the texture lies as it likes on the shape
            stretch = np.float32(0.9) + np.float32(0.2) * stretch
            shift = 8 * phase * (texture is not _rings)  # rings keep their middle
            tone = np.clip(np.float32(0.5) + texture(u * stretch + shift, v * stretch + shift * np.float32(0.7)), 0, 1)
            tone = np.where(swap < 0.5, tone, 1 - tone)[..., None]
            turn = np.float32((k // 2) / 8 + 1 / 16) + np.float32(0.06) * (shade - np.float32(0.5))
            light = np.float32(0.72) + np.float32(0.56) * (hue(turn) - np.float32(0.5))
            dark = np.float32(0.18) + np.float32(0.32) * (hue(turn + np.float32(0.5)) - np.float32(0.5))
            picture[p] += inside * (tone * light + (1 - tone) * dark - picture[p])
            mask[p] = np.where(inside[..., 0] > 0.5, np.uint8(k + 1), mask[p])
    return np.round(255 * np.clip(picture, 0, 1)).astype(np.uint8), mask, scene["kind"][:, 0] + 1


def _turned(dx: Floats, dy: Floats, angle: NDArray) -> tuple[Floats, Floats]:
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    return cos * dx + sin * dy, cos * dy - sin * dx


# ------------------------------------------------------------------------------------------------ to disk


def voc_palette() -> list[int]:
    """Pascal VOC's colors: the bits of a class number, dealt out to red, green and blue."""
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
        drawn = Image.fromarray(mask, "P")
        drawn.putpalette(palette)
        drawn.save(folder / "SegmentationClass" / f"{name}.png")
        os.link(photo, folder / split / names[kind - 1] / photo.name)
    return len(numbers)


def make(folder: Path, *, train: int, val: int, size: int, seed: int) -> None:
    """The whole set, beside `folder` until it is whole. Raises UserError where `folder` holds something else."""
    settings = {"version": VERSION, "train": train, "val": val, "size": size, "seed": seed}
    told = folder / "scenes.json"
    if told.is_file():
        before = json.loads(told.read_text())
        if before == settings:
            print(f"{folder}: {train} + {val} scenes, already painted")
            return
        changed = ", ".join(
            f"{k} {before.get(k)} there, {settings[k]} now" for k in settings if before.get(k) != settings[k]
        )
        raise UserError(f"{folder} holds other scenes ({changed}); name another folder, or remove it")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty and holds no scenes; name another folder")
    begun = time.monotonic()
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
            shown = track(pool.imap(job, chunks), f"painting {split}", len(chunks), disable=not Console().is_terminal)
            assert sum(shown) == count
            (work / "ImageSets/Segmentation" / f"{split}.txt").write_text(
                "".join(f"{split}_{n:06d}\n" for n in range(count))
            )
    (work / "classes.txt").write_text("\n".join(["ground", *CLASSES]) + "\n")
    (work / "scenes.json").write_text(json.dumps(settings) + "\n")
    if folder.exists():
        folder.rmdir()
    os.replace(work, folder)  # a folder that is there is whole
    print(f"{folder}: {train} + {val} scenes of {size} px painted in {time.monotonic() - begun:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("dst", type=Path)
    parser.add_argument("--train", type=int, default=3000, help="scenes to train on")
    parser.add_argument("--val", type=int, default=1000, help="scenes to evaluate on")
    parser.add_argument("--size", type=int, default=48, help="pixels a side")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name, least in (("train", 1), ("val", 1), ("size", 16), ("seed", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name}: at least {least}, this is {getattr(args, name)}")
    make(args.dst, train=args.train, val=args.val, size=args.size, seed=args.seed)


if __name__ == "__main__":
    run_cli(main)
