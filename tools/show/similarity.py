"""Draw the cosine similarity of one point's patch token to every patch of its own photo and of the others.

    python -m tools.show similarity NETWORK [IMAGE | FOLDER ...] [--points X,Y] [--compare NETWORK ...]
        [--out FILE] [--images 4] [--size PIXELS] [--skip-existing]

Each row has one query point, the cross; the columns are the photos named above them. All maps have the same scale of
colors. The point is a share of width and height, the same in each photo; by default it is the center of the largest object
in scenes with masks, else of the photo. Photos are shown at twice the size that the network was trained for, as the
published segmentation does.

h, w patches of a photo's height and width · D width.
"""

import argparse

import torch.nn.functional as F
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from runtime.errors import UserError
from tools.show.figures import COLORS, TEXT, Networks, figure_grid, figure_title
from tools.show.photos import Photo, input_size, parse_points, patch_tokens, query_points, resize_to_patches


def draw(networks: Networks, photos: list[Photo], args: argparse.Namespace) -> Figure:
    """The photos in the first row; then for each query photo and network a row: the query photo, and its similarity to
    every photo's patches."""
    given = parse_points(args.points)
    if given is not None and len(given) > 1:
        raise UserError(f"--points {' '.join(args.points)}: give one point, the same in each photo")
    queries = [query_points(photo, 1)[0] if given is None else given[0] for photo in photos]
    title = figure_title(networks, "Cosine similarity of one patch (the cross) to all patches")
    figure, grid = figure_grid(1 + len(photos) * len(networks), 1 + len(photos), title, photos)
    for axes, photo in zip(grid[0, 1:], photos, strict=True):
        axes.imshow(photo.picture.permute(1, 2, 0).numpy())
        axes.set_title(photo.name, fontsize=TEXT)

    rows: list[
        tuple[NDArray, int, list[Tensor]]
    ] = []  # axes, the query photo's number, similarities [h,w] to each photo
    for n, (name, network) in enumerate(networks):
        pictures = [resize_to_patches(photo.picture, input_size(network, args), network.patch) for photo in photos]
        tokens = [F.normalize(patch_tokens(network, picture), dim=-1) for picture in pictures]  # [h,w,D] each
        for i, (x, y) in enumerate(queries):
            row = grid[1 + i * len(networks) + n]
            query = tokens[i][int(y * tokens[i].shape[0]), int(x * tokens[i].shape[1])]  # [D]
            row[0].set_title(f"query, {name}" if len(networks) > 1 else "query", fontsize=TEXT)
            rows.append((row, i, [keys @ query for keys in tokens]))

    lowest = min(float(cosines.min()) for *_, similarities in rows for cosines in similarities)
    colors = ScalarMappable(Normalize(lowest, 1), "cividis")
    for row, i, similarities in rows:
        x, y = queries[i]
        for j, (axes, photo) in enumerate(zip(row, [photos[i], *photos], strict=True)):
            height, width = photo.picture.shape[1:]
            extent = (0, width, height, 0)
            if j == 0:
                axes.imshow(photo.picture.permute(1, 2, 0).numpy(), extent=extent)
            else:
                axes.imshow(similarities[j - 1].numpy(), cmap=colors.cmap, norm=colors.norm, extent=extent)
            if j in (0, i + 1):
                axes.plot(x * width, y * height, "P", ms=9, mfc=COLORS[4], mec="white", mew=1.0, zorder=3)
    bar = figure.colorbar(colors, ax=grid, location="bottom", shrink=0.5, aspect=40, pad=0.01)
    bar.set_label("cosine of the two patch tokens", fontsize=TEXT)
    bar.ax.tick_params(labelsize=TEXT)
    return figure
