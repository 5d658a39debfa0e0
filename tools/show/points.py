"""Draw the attention of reference tokens placed at some points, in one block.

    python -m tools.show points NETWORK [IMAGE | FOLDER ...] [--points X,Y ...] [--block N]
        [--compare NETWORK ...] [--out FILE] [--images 4] [--size PIXELS] [--skip-existing]

A reference token starts as a position only (DenseDINO paper, section 3.2); its features come from what it attends to.
A cell is one patch; the more opaque it is, the more weight it has, averaged over the heads. Every map is scaled to its
own largest weight. The numbers above a map are the share of the weight on the patches, and the mean distance of that
weight from the point. Points are shares of width and height; by default they are the centers of the largest objects in
scenes with masks, and a regular pattern in photos.
"""

import argparse

import torch
from matplotlib.figure import Figure

from eval.attention import distance_from_points
from tools.show.attention import LEGEND, attention, block_name, overlay
from tools.show.figures import TEXT, Networks, figure_grid, figure_title, mark_point, require_vits
from tools.show.photos import Photo, input_size, parse_points, query_points, resize_to_patches

POINTS = 4


def draw(networks: Networks, photos: list[Photo], args: argparse.Namespace) -> Figure:
    """A row for each image and network: the image with its points, and one map for each point."""
    vits = require_vits(networks, "a picture of reference tokens")
    given = parse_points(args.points)
    points = [query_points(photo, POINTS) if given is None else given for photo in photos]
    rows = [(photo, xy, name, network) for photo, xy in zip(photos, points, strict=True) for name, network in vits]
    block = block_name(vits, args.block)
    title = figure_title(networks, f"Attention of reference tokens in {block}, mean over heads") + f"\n{LEGEND}"
    figure, grid = figure_grid(len(rows), 1 + max(len(xy) for xy in points), title, photos)
    for (photo, xy, name, network), row in zip(rows, grid, strict=True):
        picture = resize_to_patches(photo.picture, input_size(network, args), network.patch)
        height, width = picture.shape[1:]
        _, weights = attention(network, picture, torch.from_numpy(xy), args.block)
        h, w = height // network.patch, width // network.patch
        maps = weights.mean(0).unflatten(1, (h, w))  # [R,h,w]
        distances = distance_from_points(weights.mean(0), torch.from_numpy(xy), h, w)
        row[0].imshow(picture.permute(1, 2, 0).numpy(), extent=(0, width, height, 0))
        row[0].set_title(f"{name}\n{photo.name}" if len(networks) > 1 else photo.name, fontsize=TEXT)
        for n, (axes, heat, distance, (x, y)) in enumerate(zip(row[1:], maps, distances, xy, strict=False), 1):
            overlay(
                axes, picture, heat, f"point {n} · {100 * heat.sum():.0f} % on patches\n{distance:.1f} patches away"
            )
            for target in (row[0], axes):
                mark_point(target, x * width, y * height, n)
    return figure
