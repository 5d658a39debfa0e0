"""Draw the attention of [CLS] in one block, head by head, over the image (figure 6 of the DenseDINO paper).

    python -m tools.show attention NETWORK [IMAGE | FOLDER ...] [--compare NETWORK ...]
        [--block N] [--out FILE] [--images 4] [--size PIXELS] [--skip-existing]

A cell is one patch; the more opaque it is, the more weight it has. Every map is scaled to its own largest weight. The
number above a map is the share of the weight on the patches; the rest stays on [CLS] itself.

H heads · R reference tokens · N = h*w patches · d width of a head.
"""

import argparse
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from eval.attention import attention_weights
from model.vit import ViT
from runtime.errors import UserError
from tools.show.figures import COLORS, TEXT, Networks, figure_grid, figure_title, grayscale, require_vits
from tools.show.photos import Photo, input_size, normalized, resize_to_patches

LEGEND = "the yellower a patch, the more attention it gets; each map by its own largest"
YELLOW = ListedColormap([COLORS[6]])  # distinct from gray for color-blind readers too; a map is all in its opacity


def attention(
    network: ViT, picture: Tensor, points: Tensor | None = None, block: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attention weights on the patches in one block: of [CLS] [H,N] and of the reference tokens at `points` [H,R,N].

    picture uint8 [3,h*p,w*p]; points [R,2] in the picture's [0,1] frame; block: see `attention_weights`.
    """
    images = normalized(picture, network)
    cls, references = attention_weights(network, images, None if points is None else points[None].to(images), block)
    return cls[0].cpu(), references[0].cpu()


def overlay(axes: Axes, picture: Tensor, heat: Tensor, title: str) -> None:
    """Draw a map [h,w] over the picture in gray: the larger a weight, the more opaque the cell."""
    height, width = picture.shape[1:]
    axes.imshow(grayscale(picture), cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0))
    opacity = (heat / heat.max()).numpy()
    axes.imshow(opacity, cmap=YELLOW, vmin=0, vmax=1, alpha=0.75 * opacity, extent=(0, width, height, 0))
    axes.set_title(title, fontsize=TEXT)


def block_name(networks: Sequence[tuple[str, ViT]], block: int | None) -> str:
    """The block's name in a title. Raises UserError if a network has no such block."""
    for title, network in networks:
        if block is not None and not 1 <= block <= len(network.blocks):
            raise UserError(f"--block {block}: {title} has blocks 1 to {len(network.blocks)}")
    return "the last block" if block is None else f"block {block}"


def draw(networks: Networks, photos: list[Photo], args: argparse.Namespace) -> Figure:
    """A row for each image and network: the image, one map for each head, and the mean of the heads."""
    vits = require_vits(networks, "a picture of attention")
    heads = max(network.heads for _, network in vits)
    rows = [(photo, name, network) for photo in photos for name, network in vits]
    title = figure_title(vits, f"Attention of [CLS] in {block_name(vits, args.block)}") + f"\n{LEGEND}"
    figure, grid = figure_grid(len(rows), heads + 2, title, photos)
    for (photo, name, network), row in zip(rows, grid, strict=True):
        picture = resize_to_patches(photo.picture, input_size(network, args), network.patch)
        weights, _ = attention(network, picture, block=args.block)
        maps = weights.unflatten(1, (picture.shape[1] // network.patch, -1))  # [H,h,w]
        row[0].imshow(picture.permute(1, 2, 0).numpy())
        row[0].set_title(f"{name}\n{photo.name}" if len(networks) > 1 else photo.name, fontsize=TEXT)
        titles = [*(f"head {head + 1}" for head in range(len(maps))), "mean"]
        for axes, map_title, heat in zip(row[1:], titles, [*maps, maps.mean(0)], strict=False):
            overlay(axes, picture, heat, f"{map_title} · {100 * heat.sum():.0f} % on patches")
    return figure
