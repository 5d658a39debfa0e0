"""Draw the trainer's input: images with their windows, and the views with the reference points that they share.

    python -m tools.show views RUN [--skip-existing]                       the photos and views of a run
    python -m tools.show views SHARDS [--config configs/demo.yaml]         any folder of shards with the views of any config
        [--out FILE] [--images 4 | --samples ID ...] [--epoch 0]

A run's picture goes to RUN/pictures/views.png, others to views.png. Windows, points and colors of a sample are a pure
function of (seed, epoch, sample id), so these are the views that the trainer used.

A color is a view. A reference point belongs to a pair (teacher view t, other view v): its shape is t, its color is v, and
its number is its place among the pair's M points. It is drawn in the image and in both views.

V views, the first T of them the teacher's · M points of a pair.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor

from eval.provenance import Weights
from eval.target import subsample
from pipeline.augment.recipe import apply_color
from pipeline.batch import Draws, draw, size_groups
from pipeline.decode import DecodeError, decode
from pipeline.mixture import AnyShards
from pipeline.readers.worker import crop_resize
from runtime.config import TEACHERS, Config
from runtime.errors import UserError
from tools.show.figures import COLORS, DARK, save

SHAPES = ("o", "s")  # of a pair's points, by the teacher view
CELL = 2.6  # inches


def color_of(view: int) -> str:
    return COLORS[view % len(COLORS)]


def valid_samples(shards: AnyShards, sample_ids: list[int] | None, count: int) -> list[tuple[int, Tensor]]:
    """(sample id, photo uint8 [3,H,W]) of the given samples, or of `count` evenly spaced ones, without corrupt photos.

    Raises UserError for an id that the shards do not have, and if all photos are corrupt.
    """
    samples: list[tuple[int, Tensor]] = []
    for sample in sample_ids or subsample(np.arange(len(shards)), count).tolist():
        if not 0 <= sample < len(shards):
            raise UserError(f"--samples {sample}: {shards.folder} holds samples 0 to {len(shards) - 1}")
        photo = shards.read(sample)
        if shards.is_valid(sample, photo):
            try:
                samples.append((sample, decode(photo)))
            except DecodeError:  # the trainer leaves such a photo out too
                continue
    if not samples:
        raise UserError(
            f"{shards.folder}: all of these samples are corrupt; "
            f"`make verify DST={shards.folder_of(sample)}` lists the damage"
        )
    return samples


def render_views(config: Config, photo: Tensor, draws: Draws, i: int) -> list[NDArray[np.float32]]:
    """The V views [size,size,3] in [0,1] of image i of the draws, with the color augmentation."""
    mean, std = (torch.tensor(c).view(-1, 1, 1) for c in config.pixels)
    views: list[NDArray[np.float32]] = []
    for size, group in size_groups(config):
        crops = torch.stack(
            [
                crop_resize(photo, window, size, interpolation=config.data.interpolation)
                for window in draws.windows[i, group]
            ]
        )  # [Vg,S,S,3]
        draws_of_views = torch.from_numpy(draws.color[i : i + 1, group])
        colored = apply_color(crops[None], draws_of_views, pixels=config.pixels)[:, 0]  # [Vg,C,S,S]
        shown = (colored * std + mean).clamp(0, 1).expand(-1, 3, -1, -1)  # one channel: gray
        views += list(shown.permute(0, 2, 3, 1).numpy())
    return views


def mark_points(axes: Axes, xy: NDArray, teacher: int, view: int, size: float) -> None:
    """Draw the M points of a pair at xy [M,2], in the pixels of the axes."""
    for j, (x, y) in enumerate(xy):
        color = color_of(view)
        ink = "white" if color in DARK else "black"
        axes.plot(x, y, SHAPES[teacher], ms=size, mfc=color, mec="black", mew=0.7, clip_on=False, zorder=3)
        axes.text(x, y, str(j + 1), ha="center", va="center_baseline", fontsize=0.65 * size, color=ink, zorder=4)


def draw_frame(axes: Axes, color: str) -> None:
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(edgecolor=color, linewidth=2.5)


def make_figure(config: Config, samples: list[tuple[int, Tensor]], epoch: int) -> Figure:
    """A row for each image: the image with its windows, and its V views."""
    ids = np.array([sample for sample, _ in samples])
    height, width = (np.array([photo.shape[side] for _, photo in samples]) for side in (1, 2))
    draws = draw(config, epoch, ids, height, width)
    count = len(config.views)
    pairs = [(t, v) for t in range(TEACHERS) for v in range(count) if t != v] if config.points else []

    figure = Figure(figsize=(CELL * (count + 1), (CELL + 0.3) * len(samples) + 1.0), layout="constrained")
    grid = figure.subplots(len(samples), count + 1, squeeze=False)
    for i, (sample, photo) in enumerate(samples):
        image_axes, *view_axes = grid[i]
        _draw_image(image_axes, sample, photo)
        views = render_views(config, photo, draws, i)
        for v, (axes, view) in enumerate(zip(view_axes, views, strict=True)):
            x0, y0, x1, y1 = draws.windows[i, v].tolist()
            window = Rectangle((min(x0, x1), y0), abs(x1 - x0), y1 - y0, fill=False, ec=color_of(v), lw=2)
            window.set_linestyle("-" if v < TEACHERS else "--")
            image_axes.add_patch(window)
            size = len(view)
            axes.imshow(view, extent=(0, size, size, 0))
            axes.set(xlim=(0, size), ylim=(size, 0))
            axes.set_title(f"view {v + 1}{', flipped' if x0 > x1 else ''}, {size} px", fontsize=9)
            draw_frame(axes, color_of(v))
        for t, v in pairs:
            points = draws.view_points[i, t, v].astype(np.float64)  # [M,2(teacher,student),2]
            start, end = np.split(draws.windows[i, t].astype(np.float64), 2)
            mark_points(image_axes, start + points[:, 0] * (end - start), t, v, 8)
            mark_points(view_axes[t], points[:, 0] * config.views[t].size, t, v, 9)
            mark_points(view_axes[v], points[:, 1] * config.views[v].size, t, v, 9)
    _draw_legend(figure, count, bool(pairs))
    return figure


def _draw_image(axes: Axes, sample: int, photo: Tensor) -> None:
    height, width = photo.shape[1:]
    # windows are in pixel edges: pixel 0 reaches from 0 to 1
    axes.imshow(photo.permute(1, 2, 0).numpy(), extent=(0, width, height, 0))
    axes.set_axis_off()
    axes.set(xlim=(-0.02 * width, 1.02 * width), ylim=(1.02 * height, -0.02 * height))
    axes.set_title(f"sample {sample}, {width} × {height}", fontsize=9)


def _draw_legend(figure: Figure, views: int, with_points: bool) -> None:
    legend = []
    for v in range(views):
        networks, line = ("teacher and student", "-") if v < TEACHERS else ("student", "--")
        legend.append(Line2D([], [], color=color_of(v), lw=2.5, ls=line, label=f"view {v + 1} ({networks})"))
    for t in range(TEACHERS if with_points else 0):
        label = f"point that teacher view {t + 1} shares\nwith the view of the point's color"
        legend.append(Line2D([], [], marker=SHAPES[t], ls="", ms=9, mfc="white", mec="black", label=label))
    figure.legend(handles=legend, loc="outside lower center", ncols=min(3, 1 + views // 2), fontsize=8, frameon=False)


def show(shards: AnyShards, config: Config, args: argparse.Namespace, weights: list[Weights], out: Path) -> None:
    """Draw some samples of the shards and write the figure to `out`. weights: of the run whose config it is, if any."""
    save(make_figure(config, valid_samples(shards, args.samples, args.images), args.epoch), out, weights, dpi=130)
    print(f"views written to {out}")
