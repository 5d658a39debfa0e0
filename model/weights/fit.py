"""A ViT's tensors for another position grid, another patch size or another number of channels, by timm's functions.
Other pixels: pixels.py.

Letters: D width, N patches, P tokens in front of them, p patch size, C channels.
"""

import math
from collections.abc import Mapping

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import adapt_input_conv
from torch import Tensor

POSITIONS, FILTERS = "backbone.pos_embed", "backbone.patch_embed.proj.weight"  # [1,N or P+N,D], [D,C,p,p]
BIAS = "backbone.patch_embed.proj.bias"  # [D]


def fit(tensors: dict[str, Tensor], own: Mapping[str, Tensor], grid: int) -> tuple[dict[str, Tensor], list[str]]:
    """(a network's tensors with the positions and patch filters that a ViT needs, what was changed, for the log).

    own: the ViT's tensors. grid: patches on a side of its position grid. The file's ViT is the same in all else.
    """
    positions, filters, changed = tensors[POSITIONS], tensors[FILTERS], list[str]()
    tokens = own[POSITIONS].shape[1] - grid * grid  # that are no patches: [CLS] and registers, or none
    side = math.isqrt(positions.shape[1] - tokens)
    if side != grid:
        positions = resample_abs_pos_embed(positions, [grid, grid], [side, side], num_prefix_tokens=tokens)
        changed.append(f"its {side} x {side} positions resampled to {grid} x {grid} (bicubic)")
    patch = own[FILTERS].shape[-1]
    if filters.shape[-1] != patch:
        changed.append(f"its patches of {filters.shape[-1]} pixels resampled to {patch} (bicubic)")
        filters = resample_patch_embed(filters, [patch, patch])
    return tensors | {POSITIONS: positions, FILTERS: filters}, changed


def fit_channels(filters: Tensor, channels: int) -> tuple[Tensor, str]:
    """(patch filters for another number of channels, what was changed): added up for one channel, else the first ones, again
    from the start if there are too few, scaled."""
    had = filters.shape[1]
    how = "added up" if channels == 1 else f"{'repeated' if channels > had else 'the first'}, times {had}/{channels}"
    with torch.no_grad():
        filters = adapt_input_conv(channels, filters, base_chans=had)
    return filters, f"its filters of {had} channels fitted to {channels} ({how})"
