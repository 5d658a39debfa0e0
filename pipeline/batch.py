"""Batch: what the pipeline hands over; and the random draws that make one.

Letters: B images of this process, V views, Vg views of one size, T teacher views (the first of the V), M points of a pair, C
channels of the network.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.augment.recipe import draw_color
from pipeline.geometry import draw_points, draw_windows
from pipeline.mixture import AnyShards
from pipeline.random import hash64
from runtime.config import TEACHERS, Config


@dataclass
class Batch:
    """One process's images of a step.

    From a reader `views` are uint8 [B,Vg,H,W,3]; from the loader, colors applied, [Vg,B,C,H,W] normalized in the
    network's dtype, on the device.
    """

    step: int
    ids: Tensor  # int64 [B] planned sample ids: what the draws are keyed by
    rows: Tensor  # int64 [B] samples that were read: another one where the planned one is damaged
    views: list[Tensor]  # for each size
    windows: Tensor  # int32 [B,V,4] signed, source pixels
    view_points: Tensor  # float32 [B,T,V,M,2(teacher,student),2(x,y)]
    color: Tensor  # float32 [B,V,8], see augment.recipe.draw_color

    def map(self, f: Callable[[Tensor], Tensor]) -> "Batch":
        """The batch with f applied to every tensor."""
        tensors: dict[str, Any] = {x.name: getattr(self, x.name) for x in fields(self) if x.name != "step"}
        mapped: dict[str, Any] = {n: [f(t) for t in x] if isinstance(x, list) else f(x) for n, x in tensors.items()}
        return Batch(self.step, **mapped)

    def split(self, pieces: int) -> list["Batch"]:
        """`pieces` equal batches, for gradient accumulation; of a batch from the loader (views [Vg,B,...])."""
        size = len(self.ids) // pieces
        slices = [slice(i * size, (i + 1) * size) for i in range(pieces)]
        return [
            Batch(
                self.step, self.ids[c], self.rows[c], [v[:, c] for v in self.views],
                self.windows[c], self.view_points[c], self.color[c],
            )
            for c in slices
        ]  # fmt: skip


@dataclass
class Draws:
    """Everything random about a batch's pixels, as NumPy arrays; the Batch has fields of the same names."""

    windows: NDArray[np.int32]
    view_points: NDArray[np.float32]
    color: NDArray[np.float32]

    def tensors(self) -> dict[str, Tensor]:
        return {x.name: torch.from_numpy(getattr(self, x.name)) for x in fields(self)}


def draw(config: Config, epoch: int | NDArray, ids: NDArray, height: NDArray, width: NDArray) -> Draws:
    """Draws for images of the given ids and sizes [B]: a function of (seed, epoch, sample id) and the photo's size.
    epoch: of all images, or of each [B]."""
    key = hash64(config.seed, epoch, ids)
    views = config.views
    windows = draw_windows(
        key,
        height,
        width,
        scale=[v.scale for v in views],
        aspect=config.data.aspect,
        teachers=TEACHERS,
        min_overlap=config.data.min_overlap,
        flip=config.data.flip,
    )
    return Draws(windows, draw_points(key, windows, config.points, TEACHERS), draw_color(key, config.data, views))


def draw_for(config: Config, shards: AnyShards, passes: NDArray, ids: NDArray, rows: NDArray) -> Draws:
    """Draws of a step's images: keyed by the planned `ids` and their `passes` (`Plan.passes_of`), made for the sizes of the
    photos that are read (`rows`): each [B]."""
    photos = shards.records(rows)
    return draw(config, passes, ids, photos["height"], photos["width"])


def size_groups(config: Config) -> list[tuple[int, slice]]:
    """(size, slice of the V views) for each run of views of the same size, in the views' order."""
    groups: list[tuple[int, slice]] = []
    for i, view in enumerate(config.views):
        if groups and groups[-1][0] == view.size:
            groups[-1] = (view.size, slice(groups[-1][1].start, i + 1))
        else:
            groups.append((view.size, slice(i, i + 1)))
    return groups
