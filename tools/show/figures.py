"""What all pictures of networks share: loading the networks and photos, a grid of images, colors, and writing the file.

NETWORK is a run folder, a checkpoint or a backbone file; --compare puts other networks below it, as figure 6 of the
DenseDINO paper puts DenseDINO below DINO. Which photos: tools/show/photos.py. Command line: tools/show/__main__.py.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from eval.features import check_size
from eval.provenance import Weights, png_text
from eval.target import EvalTarget
from model.backbone import Backbone
from model.vit import ViT, require_vit
from runtime.errors import UserError
from runtime.files import atomic_path
from tools.show.photos import Photo, find_photos, input_size

# Okabe & Ito 2008, colors that color-blind readers can distinguish; without black, the color of the text
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442")
DARK = (COLORS[0], COLORS[4])  # numbers on these are white
CELL = 1.9  # inches of an image's side
TEXT = 8  # points: about 29 letters above an image, and still legible if a page shows the figure at half its size
MAX_PATCHES = 128  # along the shorter side: attention among more takes gigabytes, and the cells become invisible
Networks = Sequence[tuple[str, Backbone]]  # each with its title


def run_tool(
    draw: Callable[[Networks, Any, argparse.Namespace], Figure],
    targets: list[EvalTarget],
    weights: list[Weights],
    args: argparse.Namespace,
    out: Path,
) -> None:
    """Load the networks and the photos, draw the figure, write it to `out`. Raises UserError if --size does not fit.

    weights: of each target. `draw` gets the photos as a list; that of neighbors, which has many, as an iterator.
    """
    many = args.tool == "neighbors"
    found = find_photos(args.photos, targets[0], args.images, getattr(args, "palette", None), scattered=not many)
    photos = found if many else list(found)
    networks = [("/".join(target.path.absolute().parts[-2:]), target.network()) for target in targets]
    for _, network in networks:
        size = input_size(network, args)
        check_size(network, size)
        if size > MAX_PATCHES * network.patch:
            raise UserError(f"--size {args.size}: at most {MAX_PATCHES} patches, {MAX_PATCHES * network.patch} pixels")
    save(draw(networks, photos, args), out, weights)
    print(f"{args.tool} written to {out}")


def require_vits(networks: Networks, what: str) -> list[tuple[str, ViT]]:
    """The networks, if all are ViTs. Raises UserError for another one. what: the picture that needs it."""
    return [(title, require_vit(network, title, what)) for title, network in networks]


def figure_grid(rows: int, columns: int, title: str, photos: list[Photo], cell: float = CELL) -> tuple[Figure, NDArray]:
    """A figure of rows x columns axes without ticks, in the shape of these photos: (figure, axes [rows,columns])."""
    tallest = max(photo.picture.shape[1] / photo.picture.shape[2] for photo in photos)
    height = cell * min(max(tallest, 0.4), 2.0)
    figure = Figure(figsize=(cell * columns, (height + 0.25) * rows + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=TEXT + 1)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    return figure, grid


def figure_title(networks: Networks, title: str) -> str:
    """The title of a figure. It names a single network; several are named in their rows."""
    return f"{title} · {networks[0][0]}" if len(networks) == 1 else title


def grayscale(picture: Tensor) -> NDArray[np.float32]:
    """The picture in dark grays, as the background of an overlay: uint8 [3,h,w] -> [h,w] in [0,1]."""
    return (0.6 * picture.float().mean(0) / 255).numpy()


def mark_point(axes: Axes, x: float, y: float, number: int, size: float = 9) -> None:
    """A numbered point, in its number's color."""
    color = COLORS[(number - 1) % len(COLORS)]
    axes.plot(x, y, "o", ms=size, mfc=color, mec="white", mew=0.9, clip_on=False, zorder=3)
    ink = "white" if color in DARK else "black"
    axes.text(x, y, str(number), ha="center", va="center_baseline", fontsize=0.7 * size, color=ink, zorder=4)


def save(figure: Figure, out: Path, weights: list[Weights], dpi: int = 150) -> None:
    """Write a PNG atomically, with the weights that it was drawn from in a text chunk. Raises UserError if it cannot be
    written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(out) as draft:
            figure.savefig(draft, dpi=dpi, format="png", metadata=png_text(weights))
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}") from None
