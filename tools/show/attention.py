"""Draw the attention of [CLS] in one block, head by head, over the image (figure 6 of the DenseDINO paper).

    python -m tools.show attention NETWORK [IMAGE | FOLDER ...] [--compare NETWORK ...]
        [--block N] [--out FILE] [--images 4] [--size PIXELS] [--skip-existing]

A cell is one patch; the more opaque it is, the more weight it has. Every map is scaled to its own largest weight. The
number above a map is the share of the weight on the patches; the rest stays on [CLS] itself.

H heads · R reference tokens · N = h*w patches · d width of a head.
"""

import argparse
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from model.reference import locality_bias
from model.vit import ViT
from runtime.errors import UserError
from tools.show.figures import COLORS, TEXT, Networks, figure_grid, figure_title, grayscale
from tools.show.photos import Photo, input_size, normalized, resize_to_patches

LEGEND = "the yellower a patch, the more attention it gets; each map by its own largest"
YELLOW = ListedColormap([COLORS[6]])  # distinct from gray for color-blind readers too; a map is all in its opacity


@torch.no_grad()
def attention(
    network: ViT, picture: Tensor, points: Tensor | None = None, block: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attention weights on the patches in one block: of [CLS] [H,N] and of the reference tokens at `points` [H,R,N].

    picture uint8 [3,h*p,w*p]; points [R,2] in the picture's [0,1] frame; block counts from 1, by default the last one.
    What a row lacks to 1 is on the other tokens that its mode may attend to (`model/reference.py`): itself, [CLS], or
    other reference tokens.
    """
    captured: list[Tensor] = []
    chosen: Any = network.blocks[block - 1 if block else -1]
    hook = chosen.attn.qkv.register_forward_hook(lambda module, inputs, qkv: captured.append(qkv))
    try:
        images = normalized(picture, network)
        network(images, None if points is None else points[None].to(images))
    finally:
        hook.remove()
    q, k, _ = captured[0].unflatten(-1, (3, network.heads, -1)).permute(1, 2, 0, 3)  # [H,1+N+R,d] each
    scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    references = 0 if points is None else len(points)
    tokens = scores.shape[-1]
    image = tokens - references
    allowed = torch.zeros(tokens, tokens, dtype=torch.bool)  # [query, key]; few tokens, so a mask is affordable
    allowed[:, :image] = True
    if network.attention == "none":
        allowed[:] = True
    elif network.attention != "patches+cls":
        allowed[image:, 0] = False
        if network.attention in ("patches+self", "all_query"):
            allowed.fill_diagonal_(True)
    if points is not None and network.locality is not None:
        h, w = (side // network.patch for side in picture.shape[1:])
        scores[:, image:, 1:image] += locality_bias(points[None], h, w, network.locality)[0].to(scores)
    weights = scores.masked_fill(~allowed.to(scores.device), -torch.inf).softmax(-1).cpu()
    return weights[:, 0, 1:image], weights[:, image:, 1:image]


def overlay(axes: Axes, picture: Tensor, heat: Tensor, title: str) -> None:
    """Draw a map [h,w] over the picture in gray: the larger a weight, the more opaque the cell."""
    height, width = picture.shape[1:]
    axes.imshow(grayscale(picture), cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0))
    opacity = (heat / heat.max()).numpy()
    axes.imshow(opacity, cmap=YELLOW, vmin=0, vmax=1, alpha=0.75 * opacity, extent=(0, width, height, 0))
    axes.set_title(title, fontsize=TEXT)


def block_name(networks: Networks, block: int | None) -> str:
    """The block's name in a title. Raises UserError if a network has no such block."""
    for title, network in networks:
        if block is not None and not 1 <= block <= len(network.blocks):
            raise UserError(f"--block {block}: {title} has blocks 1 to {len(network.blocks)}")
    return "the last block" if block is None else f"block {block}"


def draw(networks: Networks, photos: list[Photo], args: argparse.Namespace) -> Figure:
    """A row for each image and network: the image, one map for each head, and the mean of the heads."""
    heads = max(network.heads for _, network in networks)
    rows = [(photo, name, network) for photo in photos for name, network in networks]
    title = figure_title(networks, f"Attention of [CLS] in {block_name(networks, args.block)}") + f"\n{LEGEND}"
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
