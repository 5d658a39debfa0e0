"""Points of photos, from a file: which tokens `python -m eval embed --points FILE` reads. Imports no torch.

    photo,x,y                           CSV: a point a line, (x, y) as shares of the photo's width and height
    {"a.jpg": [[0.5, 0.25], ...], ...}  JSON: the same

P points.
"""

import csv
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.errors import UserError, suggest

HEADER = ["photo", "x", "y"]
NAMES_COMPARED = 10_000  # with a name that is not known: more take seconds


class PointList(NamedTuple):
    """In the order of the file."""

    rows: NDArray[np.int64]  # [P], each point's photo
    xy: NDArray[np.float64]  # [P,2]


def read_points(file: Path, names: Sequence[str]) -> PointList:
    """The points of photos with these names. Raises UserError for a file that is not as above, an unknown photo, or a point
    outside its photo."""
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: points cannot be read ({getattr(error, 'strerror', None) or 'no text'})") from None
    row_of = {name: row for row, name in reversed(list(enumerate(names)))}  # of a name given twice the first
    rows, xy = list[int](), list[list[float]]()
    for where, name, point in _from_json(file, text) if file.suffix == ".json" else _from_csv(file, text):
        if name not in row_of:
            raise UserError(f"{where}: no photo '{name}'{suggest(name, names[:NAMES_COMPARED])}")
        try:
            x, y = (float(number) for number in point)
        except (TypeError, ValueError):
            raise UserError(f"{where}: a point is two numbers x, y; this is {point}") from None
        if not (math.isfinite(x) and math.isfinite(y) and min(x, y) >= 0 and max(x, y) <= 1):
            raise UserError(
                f"{where}: point ({x:g}, {y:g}): x and y are shares of the photo's width and height, 0 to 1, not pixels"
            )
        rows.append(row_of[name])
        xy.append([x, y])
    if not rows:
        raise UserError(f"{file}: no points")
    return PointList(np.array(rows, np.int64), np.array(xy, np.float64))


def _from_csv(file: Path, text: str) -> Iterator[tuple[str, str, list[str]]]:
    """(where, photo, [x, y]) of each line."""
    lines = csv.reader(text.splitlines())
    if (header := next(lines, [])) != HEADER:
        raise UserError(f"{file}:1: the first line must be {','.join(HEADER)}; this is {','.join(header)}")
    for line in lines:
        if line:
            yield f"{file}:{lines.line_num}", line[0], line[1:]


def _from_json(file: Path, text: str) -> Iterator[tuple[str, str, Iterable[Any]]]:
    try:
        photos = json.loads(text)
    except ValueError as error:
        raise UserError(f"{file}: not JSON: {error}") from None
    if not isinstance(photos, dict) or not all(isinstance(points, list) for points in photos.values()):
        raise UserError(f'{file}: expected {{"photo": [[x, y], ...], ...}}')
    for name, points in photos.items():
        for point in points:
            yield f"{file}: {name}", name, point
