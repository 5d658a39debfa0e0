"""The classes of the painted scenes: a shape, and a texture of its own.

Lengths are in units: a picture is 48 units wide, whatever its size in pixels.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Field = Callable[[Floats, Floats], Floats]  # (x, y) -> a value at each point


# -------------------------------------------------------------------------------------------------------------- shapes
# (x, y) -> approximate distance to the outline, negative inside, in any scale: SCALES gives all shapes one area


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


# ------------------------------------------------------------------------------------------------------------ textures
# (x, y in units) -> positive in one tone, negative in the other; about 1 in the middle of a tone


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


def rings(x: Floats, y: Floats) -> Floats:
    return _wave(np.hypot(x, y), 4.6)


def _zigzag(x: Floats, y: Floats) -> Floats:
    turn = y * np.float32(1 / 8)
    return 1.5 * _wave(x + 8 * np.abs(turn - np.round(turn)), 5.0)


def _grid(x: Floats, y: Floats) -> Floats:
    """Thin lines in both directions."""
    return 2 * np.maximum(_wave(x, 4.0), _wave(y, 4.0)) - np.float32(1.2)


def _bricks(x: Floats, y: Floats) -> Floats:
    """Rows of bricks, every other one shifted by half a brick."""
    row = np.floor(y * np.float32(1 / 5))
    return 2 * np.maximum(_wave(y - np.float32(1.25), 5.0), _wave(x + np.float32(5) * row, 10.0) ** 3) - 1


def _blobs(x: Floats, y: Floats) -> Floats:
    """Waves in four directions: blobs without a direction."""
    angles = np.arange(4) * np.pi / 4 + 0.3
    waves = [_wave(x * np.float32(np.cos(a)) + y * np.float32(np.sin(a)), 8.0 + 0.9 * i) for i, a in enumerate(angles)]
    return np.add.reduce(waves)


CLASSES: dict[str, tuple[Field, Field]] = {
    "striped disc": (_disc, _stripes),
    "checked square": (_polygon(4), _checks),
    "dotted triangle": (_polygon(3), _dots),
    "ringed hexagon": (_polygon(6), rings),
    "zigzag star": (_star, _zigzag),
    "gridded cross": (_cross, _grid),
    "bricked crescent": (_crescent, _bricks),
    "blotted egg": (_egg, _blobs),
}


def scale_of(shape: Field) -> float:
    """The factor that gives a shape the area of a disc of diameter 1."""
    x, y = np.meshgrid(np.linspace(-3, 3, 600, dtype=np.float32), np.linspace(-3, 3, 600, dtype=np.float32))
    return float(np.sqrt(np.pi / 4 / (36 * (shape(x, y) < 0).mean())))


SCALES = np.array([scale_of(shape) for shape, _ in CLASSES.values()], np.float32)
