"""Paint scenes: four things of like size on a patchwork background, three of the scene's class and one of another.

A scene is a pure function of (seed, split, number, size). Lengths are in units: a picture is 48 units wide, whatever its
size in pixels.

P pictures · S size in pixels · p pictures among the P with the same class.
"""

import numpy as np
from numpy.typing import NDArray

from pipeline.random import uniform
from tools.scenes.classes import CLASSES, SCALES, Floats, rings

UNITS = 48.0
THINGS = 4  # of a scene: those of its class first, then one of another class
DIAMETER = (0.36, 0.46)  # range, as a share of the side
CELLS = 14  # patches of a background
# what differs between things of one class
PERIOD = (1.04, 1.5)  # of the texture, times that in classes.py
CONTRAST = (0.7, 1.15)
LIGHT = 0.15  # range of the mean lightness
SHADE = 0.03  # range of the hue; classes are 1/16 apart
NOISE = 0.04  # standard deviation in each pixel and channel


def hue(turn: NDArray[np.floating]) -> Floats:
    """A fully saturated color for each turn of the hue wheel: [...] -> [...,3] in [0,1]; the mean of its channels is 1/2."""
    thirds = np.array([0, 1 / 3, 2 / 3], np.float32)
    return (0.5 + 0.5 * np.cos(2 * np.pi * (turn[..., None].astype(np.float32) - thirds))).astype(np.float32)


def draw_things(seed: int, split: str, number: NDArray[np.int64]) -> dict[str, NDArray]:
    """Class, diameter, angle and center of each thing: arrays [P,THINGS] (center [P,THINGS,2]); lengths in units, angles in
    radians.

    Each thing lies in a quarter of its own, not in its middle, and the four together are turned by up to 45 degrees.
    """
    draw = uniform(seed, split, number, "things", shape=(THINGS, 4))  # [P,THINGS,(diameter, angle, x, y)]
    classes = np.argsort(uniform(seed, split, number, "classes", shape=(len(CLASSES),)), axis=1)[:, :2]
    kind = np.repeat(classes, (THINGS - 1, 1), axis=1)
    low, high = DIAMETER
    diameter = UNITS * (low + (high - low) * draw[..., 0])

    quarter = np.argsort(uniform(seed, split, number, "quarters", shape=(THINGS,)), axis=1)
    x, y = (UNITS * (q / 2 - 0.25) + 10 * (draw[..., 2 + i] - 0.5) for i, q in enumerate((quarter % 2, quarter // 2)))
    turn = (uniform(seed, split, number, "turn", shape=(1,)) - 0.5) * np.pi / 2
    cos, sin = np.cos(turn), np.sin(turn)
    center = UNITS / 2 + np.stack([cos * x - sin * y, sin * x + cos * y], -1)
    return {"kind": kind, "diameter": diameter, "angle": 2 * np.pi * draw[..., 1], "center": center}


def paint_background(seed: int, split: str, number: NDArray[np.int64], x: Floats, y: Floats) -> Floats:
    """A patchwork of soft-edged cells, each with its own hue and lightness, with grain: x, y [S,S] -> [P,S,S,3] in [0,1].

    Every picture has all hues and all lightnesses, and the same mean and standard deviation, so a background is no hint.
    """
    draw = uniform(seed, split, number, "ground", shape=(CELLS, 5)).astype(np.float32)
    draw = draw[:, :, None, None]  # [P,cells,1,1,(x, y, hue, lightness, size)]
    cell = np.arange(CELLS, dtype=np.float32)[:, None, None]
    turn = (draw[..., 2] + cell) / CELLS
    light = (draw[..., 3] + cell * 5 % CELLS) / CELLS
    color = np.float32(0.3) * hue(turn) + np.float32(0.4) * light[..., None]
    total, weights = np.float32(0), np.float32(1e-30)
    for c in range(CELLS):
        distance = np.hypot(x - 52 * draw[:, c, ..., 0] + 2, y - 52 * draw[:, c, ..., 1] + 2) - 6 * draw[:, c, ..., 4]
        weight = np.exp(-distance)[..., None]
        total, weights = total + weight * color[:, c], weights + weight
    total = total / weights
    total = (total - total.mean((1, 2), keepdims=True)) / total.std((1, 2), keepdims=True)
    return np.float32(0.5) + np.float32(0.12) * total


def paint(seed: int, split: str, number: NDArray[np.int64], size: int) -> tuple[NDArray, NDArray, NDArray]:
    """Scenes `number` [P] of a split: pictures uint8 [P,S,S,3], masks uint8 [P,S,S], the scenes' classes [P] from 1."""
    pixel = np.float32(UNITS / size)
    x, y = np.meshgrid(*[(np.arange(size, dtype=np.float32) + np.float32(0.5)) * pixel] * 2)
    picture = paint_background(seed, split, number, x, y)
    mask = np.zeros(picture.shape[:3], np.uint8)
    things = draw_things(seed, split, number)
    look = uniform(seed, split, number, "look", shape=(THINGS, 7)).astype(np.float32)
    for t in reversed(range(THINGS)):  # the first last, so that nothing covers it
        for k, (shape, texture) in enumerate(CLASSES.values()):
            (p,) = np.nonzero(things["kind"][:, t] == k)
            if not len(p):
                continue
            phase, period, shade, swap, direction, contrast, light = (look[p, t, i][:, None, None] for i in range(7))
            center = things["center"][p, t].astype(np.float32)[:, :, None, None]
            dx, dy = x - center[:, 0], y - center[:, 1]  # [p,S,S] units from the thing's center
            u, v = _rotate(dx, dy, things["angle"][p, t][:, None, None])
            scale = things["diameter"][p, t].astype(np.float32)[:, None, None] * SCALES[k]
            inside = np.clip(np.float32(0.5) - shape(u / scale, v / scale) * scale / pixel, 0, 1)[..., None]

            u, v = _rotate(dx, dy, 2 * np.pi * direction)  # the texture's direction is independent of the shape's
            stretch = np.float32(1 / PERIOD[1]) * np.float32(PERIOD[1] / PERIOD[0]) ** period
            shift = 8 * phase * (texture is not rings)  # rings stay concentric
            tone = np.clip(np.float32(0.5) + texture(u * stretch + shift, v * stretch + shift * np.float32(0.7)), 0, 1)
            tone = np.where(swap < 0.5, tone, 1 - tone)[..., None]
            color = tone * _tone(k, shade, 0.72, 0.56) + (1 - tone) * _tone(k + len(CLASSES), shade, 0.18, 0.32)
            strength = np.float32(CONTRAST[0]) + np.float32(CONTRAST[1] - CONTRAST[0]) * contrast[..., None]
            color = np.float32(0.45) + strength * (color - np.float32(0.45))
            color = color + np.float32(LIGHT) * (light[..., None] - np.float32(0.5))
            picture[p] += inside * (color - picture[p])
            mask[p] = np.where(inside[..., 0] > 0.5, np.uint8(k + 1), mask[p])
    noise = uniform(seed, split, number, "noise", shape=(size, size, 3)).astype(np.float32) - np.float32(0.5)
    picture += np.float32(NOISE * 12**0.5) * noise
    return np.round(255 * np.clip(picture, 0, 1)).astype(np.uint8), mask, things["kind"][:, 0] + 1


def _tone(k: int, shade: Floats, light: float, strength: float) -> Floats:
    """The color of a class's light tone (k < 8) or of its dark one (k + 8), which is opposite on the hue wheel."""
    turn = np.float32(k / (2 * len(CLASSES))) + np.float32(SHADE) * (shade - np.float32(0.5))
    return np.float32(light) + np.float32(strength) * (hue(turn) - np.float32(0.5))


def _rotate(dx: Floats, dy: Floats, angle: NDArray) -> tuple[Floats, Floats]:
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    return cos * dx + sin * dy, cos * dy - sin * dx
