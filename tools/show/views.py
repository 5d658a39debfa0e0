"""Paint what the trainer sees: images with their windows, and the views with the reference points that they share.

    python -m tools.show.views RUN [--skip-existing]                       the photos and the recipe of a run
    python -m tools.show.views SHARDS [--config configs/demo.yaml]      any folder of shards under any recipe
        [--out FILE] [--images 4 | --samples ID ...] [--epoch 0]

A run's picture goes to RUN/pictures/views.png, another one to views.png. Nothing is drawn for the occasion: windows,
points and colors of a sample are a pure function of (seed, epoch, sample id), and these are the trainer's own.

A color is a view. A reference point belongs to a pair (teacher view t, other view v): its shape tells t, its color v,
its number which of the pair's M points it is; it stands in the image and in both views.
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

from eval.datasets import open_shards
from eval.target import spread
from pipeline.augment.recipe import MEAN, STD, apply_color
from pipeline.batch import Draws, draw, size_groups
from pipeline.decode import DecodeError, decode
from pipeline.readers.webdataset import cut
from pipeline.shards import Shards
from runtime.config import TEACHERS, Config, load_config
from runtime.errors import UserError, run_cli
from tools.show.figures import COLORS, DARK, place, save

SHAPES = ("o", "s")  # of the points of a pair, by its teacher view
CELL = 2.6  # inches


def color_of(view: int) -> str:
    return COLORS[view % len(COLORS)]


def sound_samples(shards: Shards, wanted: list[int] | None, count: int) -> list[tuple[int, Tensor]]:
    """(sample id, photo uint8 [3,H,W]): those asked for, or `count` evenly spread; damaged ones are passed over."""
    found: list[tuple[int, Tensor]] = []
    for sample in wanted or spread(np.arange(len(shards)), count).tolist():
        if not 0 <= sample < len(shards):
            raise UserError(f"--samples {sample}: {shards.folder} holds samples 0 to {len(shards) - 1}")
        photo = shards.read(sample)
        if shards.is_valid(sample, photo):
            try:
                found.append((sample, decode(photo)))
            except DecodeError:  # the trainer passes such a photo over too
                continue
    if not found:
        raise UserError(f"{shards.folder}: none of these samples is sound; `make verify DST={shards.folder}`")
    return found


def views_of(config: Config, photo: Tensor, draws: Draws, i: int) -> list[NDArray[np.float32]]:
    """The V views [size,size,3] of image i of the draws, its colors applied, in [0,1]."""
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (MEAN, STD))
    views: list[NDArray[np.float32]] = []
    for size, group in size_groups(config):
        cuts = torch.stack([cut(photo, window, size) for window in draws.windows[i, group]])  # [Vg,S,S,3]
        colored = apply_color(cuts[None], torch.from_numpy(draws.color[i : i + 1, group]))[:, 0]  # [Vg,3,S,S]
        views += list((colored * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy())
    return views


def mark(axes: Axes, places: NDArray, teacher: int, view: int, size: float) -> None:
    """The M points of a pair: places [M,2] in the axes' own pixels."""
    for j, (x, y) in enumerate(places):
        color = color_of(view)
        ink = "white" if color in DARK else "black"
        axes.plot(x, y, SHAPES[teacher], ms=size, mfc=color, mec="black", mew=0.7, clip_on=False, zorder=3)
        axes.text(x, y, str(j + 1), ha="center", va="center_baseline", fontsize=0.65 * size, color=ink, zorder=4)


def frame(axes: Axes, color: str) -> None:
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(edgecolor=color, linewidth=2.5)


def picture(config: Config, shards: Shards, samples: list[tuple[int, Tensor]], epoch: int) -> Figure:
    """One row for each image: the image with its windows, then its V views."""
    ids = np.array([sample for sample, _ in samples])
    height, width = (np.array([photo.shape[side] for _, photo in samples]) for side in (1, 2))
    draws = draw(config, epoch, ids, height, width)
    count = len(config.views)
    pairs = [(t, v) for t in range(TEACHERS) for v in range(count) if t != v] if config.points else []

    figure = Figure(figsize=(CELL * (count + 1), (CELL + 0.3) * len(samples) + 1.0), layout="constrained")
    table = figure.subplots(len(samples), count + 1, squeeze=False)
    for i, (sample, photo) in enumerate(samples):
        whole, *cells = table[i]
        h, w = photo.shape[1:]
        # edge to edge, as the geometry counts: pixel 0 reaches from 0 to 1
        whole.imshow(photo.permute(1, 2, 0).numpy(), extent=(0, w, h, 0))
        whole.set_axis_off()
        whole.set(xlim=(-0.02 * w, 1.02 * w), ylim=(1.02 * h, -0.02 * h))
        whole.set_title(f"sample {sample}, {w} × {h}", fontsize=9)
        for v, (axes, view) in enumerate(zip(cells, views_of(config, photo, draws, i), strict=True)):
            x0, y0, x1, y1 = draws.windows[i, v].tolist()
            window = Rectangle((min(x0, x1), y0), abs(x1 - x0), y1 - y0, fill=False, ec=color_of(v), lw=2)
            window.set_linestyle("-" if v < TEACHERS else "--")
            whole.add_patch(window)
            size = len(view)
            axes.imshow(view, extent=(0, size, size, 0))
            axes.set(xlim=(0, size), ylim=(size, 0))
            axes.set_title(f"view {v + 1}{', flipped' if x0 > x1 else ''}, {size} px", fontsize=9)
            frame(axes, color_of(v))
        for t, v in pairs:
            points = draws.view_points[i, t, v].astype(np.float64)  # [M,2(teacher,student),2]
            start, end = np.split(draws.windows[i, t].astype(np.float64), 2)
            mark(whole, start + points[:, 0] * (end - start), t, v, 8)
            mark(cells[t], points[:, 0] * config.views[t].size, t, v, 9)
            mark(cells[v], points[:, 1] * config.views[v].size, t, v, 9)

    legend = []
    for v in range(count):
        who, line = ("teacher and student", "-") if v < TEACHERS else ("student", "--")
        legend.append(Line2D([], [], color=color_of(v), lw=2.5, ls=line, label=f"view {v + 1} ({who})"))
    for t in range(TEACHERS if pairs else 0):
        what = f"point that teacher view {t + 1} shares\nwith the view of the point's color"
        legend.append(Line2D([], [], marker=SHAPES[t], ls="", ms=9, mfc="white", mec="black", label=what))
    figure.legend(handles=legend, loc="outside lower center", ncols=min(3, 1 + count // 2), fontsize=8, frameon=False)
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m tools.show.views", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("source", help="a run folder, or a folder or an address of shards")
    parser.add_argument("--config", type=Path, help="the recipe of the views, for a folder of shards")
    parser.add_argument("--out", type=Path, help="the picture (default: RUN/pictures/views.png or views.png)")
    parser.add_argument("--images", type=int, default=4, help="so many, evenly spread (default 4)")
    parser.add_argument("--samples", type=int, nargs="+", help="these sample ids instead")
    parser.add_argument("--epoch", type=int, default=0, help="the epoch whose draws are shown (default 0)")
    parser.add_argument("--skip-existing", action="store_true", help="leave a picture that is there alone")
    args = parser.parse_args(argv)

    for name, least in (("images", 1), ("epoch", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name}: at least {least}, this is {getattr(args, name)}")
    run = Path(args.source)
    is_run = (run / "config.yaml").is_file()
    if is_run and args.config:
        raise UserError(f"{args.source} is a run with a config of its own; --config is for a folder of shards")
    out = place("views", run if is_run else None, args.out)
    if args.skip_existing and out.is_file():
        print(f"{out}: already there")
        return
    recipe = run / "config.yaml" if is_run else args.config
    config = load_config(recipe) if recipe else Config()
    folder = config.data.shards if is_run else args.source
    if folder is None:
        raise UserError(f"{recipe}: data.shards names no folder")
    shards = open_shards(folder, config)
    save(picture(config, shards, sound_samples(shards, args.samples, args.images), args.epoch), out, dpi=130)
    print(f"views written to {out}")


if __name__ == "__main__":
    run_cli(main)
