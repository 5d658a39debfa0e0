"""Paint scenes: a salient object and one or two small distractors on a patchwork background.

A scene is a pure function of (seed, split, number, size). Lengths are in units: a picture is 48 units wide, whatever its
size in pixels.

P pictures · S size in pixels · O objects in a scene · p pictures among the P with the same class.
"""

import numpy as np
from numpy.typing import NDArray

from pipeline.random import uniform
from tools.scenes.classes import CLASSES, SCALES, Floats, rings

UNITS = 48.0
OBJECTS = 3  # the salient one, a distractor, and another one in half of the scenes
DIAMETER = ((0.42, 0.60), (0.16, 0.25), (0.16, 0.25))  # range for each object, as a share of the side
MARGIN = (0.3, 0.1, 0.1)  # minimum distance of each object's center from the picture's edge, as a share of the side
CELLS = 14  # patches of a background


def hue(turn: NDArray[np.floating]) -> Floats:
    """A fully saturated color for each turn of the hue wheel: [...] -> [...,3] in [0,1]; the mean of its channels is 1/2."""
    thirds = np.array([0, 1 / 3, 2 / 3], np.float32)
    return (0.5 + 0.5 * np.cos(2 * np.pi * (turn[..., None].astype(np.float32) - thirds))).astype(np.float32)


def draw_objects(seed: int, split: str, number: NDArray[np.int64]) -> dict[str, NDArray]:
    """Class, diameter, angle, center and presence of each object: arrays [P,O] (center [P,O,2]), the salient object first;
    lengths in units, angles in radians.

    A distractor takes the first of 24 random centers that does not overlap the objects before it, or the best of them.
    """
    draw = uniform(seed, split, number, "objects", shape=(OBJECTS, 3))  # [P,O,(diameter, angle, present)]
    # the classes are all different: the k-th object takes one that the objects before it did not
    kind = np.argsort(uniform(seed, split, number, "classes", shape=(len(CLASSES),)), axis=1)[:, :OBJECTS]
    low, high = np.array(DIAMETER).T
    diameter = UNITS * (low + (high - low) * draw[..., 0])
    present = np.stack([np.ones(len(number), bool), np.ones(len(number), bool), draw[:, 2, 2] < 0.5], 1)

    candidates = uniform(seed, split, number, "places", shape=(OBJECTS, 24, 2))  # [P,O,tries,(x, y)]
    margin = np.array(MARGIN)[:, None, None]
    candidates = UNITS * (margin + (1 - 2 * margin) * candidates)
    center = candidates[:, :, 0].copy()  # [P,O,2]
    for o in range(1, OBJECTS):
        distance = np.linalg.norm(candidates[:, o, :, None] - center[:, None, :o], axis=-1)  # [P,tries,o]
        gap = (distance - diameter[:, None, :o] / 2).min(-1) - diameter[:, o, None] / 2
        best = np.where((gap > 1.5).any(1), (gap > 1.5).argmax(1), gap.argmax(1))
        center[:, o] = candidates[np.arange(len(number)), o, best]
    return {"kind": kind, "diameter": diameter, "angle": 2 * np.pi * draw[..., 1], "center": center, "present": present}


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
    grain = uniform(seed, split, number, "grain", shape=(*x.shape[-2:], 1)).astype(np.float32)
    return np.float32(0.5) + np.float32(0.12) * total + np.float32(0.04) * (grain - np.float32(0.5))


def paint(seed: int, split: str, number: NDArray[np.int64], size: int) -> tuple[NDArray, NDArray, NDArray]:
    """Scenes `number` [P] of a split: pictures uint8 [P,S,S,3], masks uint8 [P,S,S], salient classes [P] from 1."""
    pixel = np.float32(UNITS / size)
    x, y = np.meshgrid(*[(np.arange(size, dtype=np.float32) + np.float32(0.5)) * pixel] * 2)
    picture = paint_background(seed, split, number, x, y)
    mask = np.zeros(picture.shape[:3], np.uint8)
    scene = draw_objects(seed, split, number)
    look = uniform(seed, split, number, "look", shape=(OBJECTS, 5)).astype(np.float32)
    for o in reversed(range(OBJECTS)):  # the salient object last, so that nothing covers it
        for k, (shape, texture) in enumerate(CLASSES.values()):
            (p,) = np.nonzero((scene["kind"][:, o] == k) & scene["present"][:, o])
            if not len(p):
                continue
            phase, stretch, shade, swap, direction = (look[p, o, i][:, None, None] for i in range(5))
            center = scene["center"][p, o].astype(np.float32)[:, :, None, None]
            dx, dy = x - center[:, 0], y - center[:, 1]  # [p,S,S] units from the object's center
            u, v = _rotate(dx, dy, scene["angle"][p, o][:, None, None])
            scale = scene["diameter"][p, o].astype(np.float32)[:, None, None] * SCALES[k]
            inside = np.clip(np.float32(0.5) - shape(u / scale, v / scale) * scale / pixel, 0, 1)[..., None]

            u, v = _rotate(dx, dy, 2 * np.pi * direction)  # the texture's direction is independent of the shape's
            stretch = np.float32(0.9) + np.float32(0.2) * stretch
            shift = 8 * phase * (texture is not rings)  # rings stay concentric
            tone = np.clip(np.float32(0.5) + texture(u * stretch + shift, v * stretch + shift * np.float32(0.7)), 0, 1)
            tone = np.where(swap < 0.5, tone, 1 - tone)[..., None]
            turn = np.float32((k // 2) / 8 + 1 / 16) + np.float32(0.06) * (shade - np.float32(0.5))
            light = np.float32(0.72) + np.float32(0.56) * (hue(turn) - np.float32(0.5))
            dark = np.float32(0.18) + np.float32(0.32) * (hue(turn + np.float32(0.5)) - np.float32(0.5))
            picture[p] += inside * (tone * light + (1 - tone) * dark - picture[p])
            mask[p] = np.where(inside[..., 0] > 0.5, np.uint8(k + 1), mask[p])
    return np.round(255 * np.clip(picture, 0, 1)).astype(np.uint8), mask, scene["kind"][:, 0] + 1


def _rotate(dx: Floats, dy: Floats, angle: NDArray) -> tuple[Floats, Floats]:
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    return cos * dx + sin * dy, cos * dy - sin * dx
