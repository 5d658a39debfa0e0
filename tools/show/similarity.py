"""Paint what a patch is like: the cosine similarity of one point's patch token to every patch, of its photo and of others.

    python -m tools.show.similarity NETWORK [IMAGE | FOLDER ...] [--points X,Y] [--compare NETWORK ...]
        [--out FILE] [--images 4] [--size PIXELS] [--skip-existing]

A row asks about one point, the cross; the photos above its columns answer. One scale of colors for the whole sheet. The
point is a share of width and height, the same in each photo; without --points, the middle of the largest thing where masks
tell of things, else of the photo. Photos are shown at twice the size that the network was made for, as the published
segmentation shows them. Networks, images and places: tools/show/figures.py.
h, w patches of a photo's height and width · D width.
"""

import argparse

import torch.nn.functional as F
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from runtime.errors import UserError, run_cli
from tools.show.figures import (
    COLORS,
    TEXT,
    Networks,
    Photo,
    parse_points,
    patch_tokens,
    points_of,
    sheet,
    show,
    side,
    titled,
    whole_picture,
)


def draw(networks: Networks, photos: list[Photo], args: argparse.Namespace) -> Figure:
    """The photos above; then for each network a row for each point: its photo, and its likeness to every photo's patches."""
    given = parse_points(args.points)
    if given is not None and len(given) > 1:
        raise UserError(f"--points {' '.join(args.points)}: one point, the same in each photo")
    asked = [points_of(photo, 1)[0] if given is None else given[0] for photo in photos]
    title = titled(networks, "Likeness of one patch (the cross) to all patches")
    figure, table = sheet(1 + len(photos) * len(networks), 1 + len(photos), title, photos)
    for axes, photo in zip(table[0, 1:], photos, strict=True):
        axes.imshow(photo.picture.permute(1, 2, 0).numpy())
        axes.set_title(photo.name, fontsize=TEXT)

    rows: list[tuple[NDArray, int, list[Tensor]]] = []  # axes, the photo that asks, the answers [h,w] of each photo
    for n, (name, network) in enumerate(networks):
        pictures = [whole_picture(photo.picture, side(network, args), network.patch) for photo in photos]
        maps = [F.normalize(patch_tokens(network, picture), dim=-1) for picture in pictures]  # [h,w,D] each
        for i, (x, y) in enumerate(asked):
            row = table[1 + i * len(networks) + n]
            query = maps[i][int(y * maps[i].shape[0]), int(x * maps[i].shape[1])]  # [D]
            row[0].set_title(f"asked by {name}" if len(networks) > 1 else "asked", fontsize=TEXT)
            rows.append((row, i, [other @ query for other in maps]))

    lowest = min(float(answer.min()) for *_, answers in rows for answer in answers)
    colors = ScalarMappable(Normalize(lowest, 1), "cividis")
    for row, i, answers in rows:
        x, y = asked[i]
        for j, (axes, photo) in enumerate(zip(row, [photos[i], *photos], strict=True)):
            high, wide = photo.picture.shape[1:]
            if j == 0:
                axes.imshow(photo.picture.permute(1, 2, 0).numpy(), extent=(0, wide, high, 0))
            else:
                axes.imshow(answers[j - 1].numpy(), cmap=colors.cmap, norm=colors.norm, extent=(0, wide, high, 0))
            if j in (0, i + 1):
                axes.plot(x * wide, y * high, "P", ms=9, mfc=COLORS[4], mec="white", mew=1.0, zorder=3)
    bar = figure.colorbar(colors, ax=table, location="bottom", shrink=0.5, aspect=40, pad=0.01)
    bar.set_label("cosine of the two patch tokens", fontsize=TEXT)
    bar.ax.tick_params(labelsize=TEXT)
    return figure


def words(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--points", nargs="+", metavar="X,Y", help="where, as shares of the photo's width and height")


def main(argv: list[str] | None = None) -> None:
    show("similarity", __doc__, draw, words, times=2, argv=argv)


if __name__ == "__main__":
    run_cli(main)
