"""A ViT's tensors for another position grid, another patch size or another number of channels, by timm's functions.

Letters: D width, N patches, p patch size, C channels.
"""

import math
from collections.abc import Mapping

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import adapt_input_conv
from torch import Tensor

from runtime.errors import UserError

POSITIONS, FILTERS = "backbone.pos_embed", "backbone.patch_embed.proj.weight"  # [1,N or 1+N,D], [D,C,p,p]


def fit(tensors: dict[str, Tensor], own: Mapping[str, Tensor], grid: int, source: str) -> tuple[dict[str, Tensor], str]:
    """(a network's tensors with the positions and patch filters that a ViT needs, what was changed, for the log).

    own: the ViT's tensors. grid: patches on a side of its position grid. Raises UserError if the positions of the file are
    not those of a square.
    """
    positions, filters = tensors.get(POSITIONS), tensors.get(FILTERS)
    if positions is None or filters is None or positions.ndim != 3 or filters.ndim != 4:
        return tensors, ""  # load_strictly says what is wrong
    changed = []
    tokens = own[POSITIONS].shape[1] - grid * grid  # that are no patches: [CLS], or none
    side = math.isqrt(max(0, positions.shape[1] - tokens))
    if side < 1 or side * side + tokens != positions.shape[1]:
        raise UserError(
            f"{source}: {positions.shape[1]} positions, expected {tokens} and a square number for the patches"
        )
    if side != grid:
        positions = resample_abs_pos_embed(positions, [grid, grid], [side, side], num_prefix_tokens=tokens)
        changed.append(f"its {side} x {side} positions resampled to {grid} x {grid} (bicubic)")
    if filters.shape[1] != own[FILTERS].shape[1]:
        filters, line = fit_channels(filters, own[FILTERS].shape[1])
        changed.append(line)
    patch = own[FILTERS].shape[-1]
    if filters.shape[-1] != patch:
        changed.append(f"its patches of {filters.shape[-1]} pixels resampled to {patch} (bicubic)")
        filters = resample_patch_embed(filters, [patch, patch])
    return tensors | {POSITIONS: positions, FILTERS: filters}, ", ".join(changed)


def fit_channels(filters: Tensor, channels: int) -> tuple[Tensor, str]:
    """(patch filters for another number of channels, what was changed): their sum for one, else repeated and scaled."""
    had = filters.shape[1]
    how = (
        "added up"
        if channels == 1
        else f"repeated, times {had}/{channels}"
        if channels > had
        else f"the first, times {had}/{channels}"
    )
    with torch.no_grad():
        return adapt_input_conv(
            channels, filters, base_chans=had
        ), f"its filters of {had} channels fitted to {channels} ({how})"
