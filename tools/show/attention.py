"""Paint what [CLS] looks at: its attention in a block, the last one, head by head, over the image (paper figure 6).

    python -m tools.show.attention NETWORK [IMAGE | FOLDER ...] [--compare NETWORK ...]
        [--block N] [--out FILE] [--images 4] [--size PIXELS] [--skip-existing]

A cell is one patch, the more opaque the more weight; every map is scaled to its own largest weight. The number over it is
the share that falls on the patches, the rest [CLS] keeps to itself. Networks, images and places: tools/show/figures.py.
H heads · R reference tokens · N = hw patches · d = D/H.
"""

import argparse
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from model.vit import ViT
from runtime.errors import UserError, run_cli
from tools.show.figures import (
    COLORS,
    TEXT,
    Networks,
    Photo,
    normalized,
    shade,
    sheet,
    show,
    side,
    titled,
    whole_picture,
)

LEGEND = "the yellower a patch, the more attention it gets; each map by its own largest"
YELLOW = ListedColormap([COLORS[6]])  # stands out from gray for every eye; a map is all in its opacity


@torch.no_grad()
def attention(
    network: ViT, picture: Tensor, points: Tensor | None = None, block: int | None = None
) -> tuple[Tensor, Tensor]:
    """Weights on the patches in a block (from 1; the last one), of [CLS] [H,N] and of reference tokens at points [H,R,N].

    picture uint8 [3,h*p,w*p]; points [R,2] in the picture's [0,1] frame. What a row lacks to 1 the token gives to what else
    its mode lets it see (`reference.attend`): itself, [CLS], or other reference tokens.
    """
    seen: list[Tensor] = []
    asked: Any = network.blocks[block - 1 if block else -1]
    hook = asked.attn.qkv.register_forward_hook(lambda module, given, qkv: seen.append(qkv))
    try:
        images = normalized(picture, network)
        network(images, None if points is None else points[None].to(images))
    finally:
        hook.remove()
    q, k, _ = seen[0].unflatten(-1, (3, network.heads, -1)).permute(1, 2, 0, 3)  # [H,1+N+R,d] each
    scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    references = 0 if points is None else len(points)
    tokens = scores.shape[-1]
    image = tokens - references
    may = torch.zeros(tokens, tokens, dtype=torch.bool)  # who may see whom: a few tokens, so a mask will do
    may[:, :image] = True
    if network.attention == "none":
        may[:] = True
    elif network.attention != "patches+cls":
        may[image:, 0] = False
        if network.attention in ("patches+self", "all_query"):
            may.fill_diagonal_(True)
    weights = scores.masked_fill(~may.to(scores.device), -torch.inf).softmax(-1).cpu()
    return weights[:, 0, 1:image], weights[:, image:, 1:image]


def lay_over(axes: Axes, picture: Tensor, heat: Tensor, title: str) -> None:
    """A map [h,w] over the picture in gray, the more opaque the more weight."""
    high, wide = picture.shape[1:]
    axes.imshow(shade(picture), cmap="gray", vmin=0, vmax=1, extent=(0, wide, high, 0))
    strength = (heat / heat.max()).numpy()
    axes.imshow(strength, cmap=YELLOW, vmin=0, vmax=1, alpha=0.75 * strength, extent=(0, wide, high, 0))
    axes.set_title(title, fontsize=TEXT)


def check_block(networks: Networks, block: int | None) -> str:
    """How a title names the block. Raises UserError where a network has no such block."""
    for title, network in networks:
        if block is not None and not 1 <= block <= len(network.blocks):
            raise UserError(f"--block {block}: {title} has blocks 1 to {len(network.blocks)}")
    return "the last block" if block is None else f"block {block}"


def words(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--block", type=int, help="which block, from 1 (default: the last)")


def draw(networks: Networks, photos: list[Photo], args: argparse.Namespace) -> Figure:
    """A row for each image and network: the image, then one map for each head, then their mean."""
    heads = max(network.heads for _, network in networks)
    rows = [(photo, name, network) for photo in photos for name, network in networks]
    title = titled(networks, f"Attention of [CLS] in {check_block(networks, args.block)}") + f"\n{LEGEND}"
    figure, table = sheet(len(rows), heads + 2, title, photos)
    for (photo, name, network), row in zip(rows, table, strict=True):
        picture = whole_picture(photo.picture, side(network, args), network.patch)
        weights, _ = attention(network, picture, block=args.block)
        maps = weights.unflatten(1, (picture.shape[1] // network.patch, -1))  # [H,h,w]
        row[0].imshow(picture.permute(1, 2, 0).numpy())
        row[0].set_title(f"{name}\n{photo.name}" if len(networks) > 1 else photo.name, fontsize=TEXT)
        named = [*(f"head {head + 1}" for head in range(len(maps))), "mean"]
        for axes, what, heat in zip(row[1:], named, [*maps, maps.mean(0)], strict=False):
            lay_over(axes, picture, heat, f"{what} · {100 * heat.sum():.0f} % on patches")
    return figure


def main(argv: list[str] | None = None) -> None:
    show("attention", __doc__, draw, words, argv=argv)


if __name__ == "__main__":
    run_cli(main)
