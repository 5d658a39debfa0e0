"""Paint what reference tokens look at: for some points, the attention of the token placed there, in a block (the last one).

    python -m tools.show.points NETWORK [IMAGE | FOLDER ...] [--points X,Y ...] [--block N]
        [--compare NETWORK ...] [--out FILE] [--images 4] [--size PIXELS] [--skip-existing]

A reference token is a place and nothing else (paper section 3.2); what it makes of the image is what it attends to. A
cell is one patch, the more opaque the more weight, mean over the heads; every map is scaled to its own largest weight. The
number over it is the share that falls on the patches. Points are shares of width and height; without --points, scenes
with masks are asked in the middle of their largest things, photos at regular places.
Networks, images and places: tools/show/figures.py.
"""

import argparse

import torch
from matplotlib.figure import Figure

from runtime.errors import run_cli
from tools.show import attention as attention_tool
from tools.show.attention import LEGEND, attention, check_block, lay_over
from tools.show.figures import (
    TEXT,
    Networks,
    Photo,
    mark,
    parse_points,
    points_of,
    sheet,
    show,
    side,
    titled,
    whole_picture,
)

POINTS = 4


def draw(networks: Networks, photos: list[Photo], args: argparse.Namespace) -> Figure:
    """A row for each image and network: the image with its points, then one map for each point."""
    given = parse_points(args.points)
    points = [points_of(photo, POINTS) if given is None else given for photo in photos]
    rows = [
        (photo, at, title, network) for photo, at in zip(photos, points, strict=True) for title, network in networks
    ]
    title = titled(networks, f"Attention of reference tokens in {check_block(networks, args.block)}, mean over heads")
    title += f"\n{LEGEND}"
    figure, table = sheet(len(rows), 1 + max(len(at) for at in points), title, photos)
    for (photo, at, name, network), row in zip(rows, table, strict=True):
        picture = whole_picture(photo.picture, side(network, args), network.patch)
        high, wide = picture.shape[1:]
        _, weights = attention(network, picture, torch.from_numpy(at), args.block)
        maps = weights.mean(0).unflatten(1, (high // network.patch, -1))  # [R,h,w]
        row[0].imshow(picture.permute(1, 2, 0).numpy(), extent=(0, wide, high, 0))
        row[0].set_title(f"{name}\n{photo.name}" if len(networks) > 1 else photo.name, fontsize=TEXT)
        for n, (axes, heat, (x, y)) in enumerate(zip(row[1:], maps, at, strict=False), 1):
            lay_over(axes, picture, heat, f"point {n} · {100 * heat.sum():.0f} % on patches")
            for where in (row[0], axes):
                mark(where, x * wide, y * high, n)
    return figure


def words(parser: argparse.ArgumentParser) -> None:
    attention_tool.words(parser)
    parser.add_argument("--points", nargs="+", metavar="X,Y", help="where, as shares of the photo's width and height")


def main(argv: list[str] | None = None) -> None:
    show("points", __doc__, draw, words, argv=argv)


if __name__ == "__main__":
    run_cli(main)
