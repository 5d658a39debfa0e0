"""Which pixels the weights of a file were trained with; and patch filters that take others and give the same tokens.

(p - mean) / std of one network is an affine map, channel by channel, of that of another. A patch filter absorbs it exactly.
Letters: D width, C channels, p patch size.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from model.weights.fit import fit_channels
from runtime.errors import UserError
from runtime.pixels import IMAGENET, Pixels

SAME = 1e-6  # statistics that differ by less are the same, written by another program


def pixels_of(about: Mapping[str, Any], channels: int, source: str) -> Pixels | None:
    """The pixels that weights of so many channels take, by the metadata of their file, else by their family, else
    ImageNet's; None where nothing is known. Raises UserError if the metadata cannot be true.
    """
    given = {name: about[name] for name in ("mean", "std") if about.get(name) is not None}
    if len(given) < 2:
        family = about.get("pixels")
        known = family if isinstance(family, Pixels) else IMAGENET
        return known if known.channels == channels else None
    found = []
    for name, values in given.items():
        values = values if isinstance(values, list | tuple) else [values]
        values = [*values] * channels if len(values) == 1 else values
        numbers = all(isinstance(v, int | float) and 0 <= v <= 1 for v in values)
        if len(values) != channels or not numbers or (name == "std" and not all(values)):
            raise UserError(
                f"{source}: {name}: expected {channels} numbers from 0 to 1, found {str(about[name])[:100]}"
            )
        found.append(tuple(map(float, values)))
    return Pixels(*found)


def take_pixels(
    filters: Tensor, bias: Tensor | None, theirs: Pixels | None, ours: Pixels, source: str
) -> tuple[Tensor, Tensor | None, list[str]]:
    """(patch filters [D,C,p,p] and bias [D] of a network that takes `ours`, what was changed, for the log).

    theirs: what the given filters take; None: not known, taken to be ours. For one channel the filters of three are added
    up: the tokens are those of a gray photo. Raises UserError if the means differ and there is no bias that could make up
    for it.
    """
    had, changed = filters.shape[1], []
    if had < ours.channels:
        filters, line = fit_channels(filters, ours.channels)
        changed.append(line)
        theirs = theirs.repeated(ours.channels) if had == 1 and theirs else None
    wanted = ours.repeated(filters.shape[1]) if ours.channels == 1 else ours
    if theirs and theirs.channels == wanted.channels and different(theirs, wanted):
        if bias is None and different(theirs._replace(std=wanted.std), wanted):
            raise UserError(
                f"{source}: it was trained with the mean {list(theirs.mean)}, data.mean is {list(ours.mean)}, and its patch "
                f"filter has no bias that could make up for it; set data.mean={_word(theirs.mean)} "
                f"data.std={_word(theirs.std)}"
            )
        filters, bias = _absorb(filters, bias, theirs, wanted)
        changed.append(
            f"its pixels have the mean {_word(theirs.mean)} and std {_word(theirs.std)}: its patch filters are changed to "
            "take those of data.mean and data.std"
        )
    if filters.shape[1] > ours.channels:
        filters, line = fit_channels(filters, ours.channels)
        changed.append(line)
    return filters, bias, changed


def different(a: Pixels, b: Pixels) -> bool:
    """Whether statistics of equally many channels are not the same."""
    return any(abs(x - y) > SAME for x, y in zip((*a.mean, *a.std), (*b.mean, *b.std), strict=True))


def _absorb(filters: Tensor, bias: Tensor | None, theirs: Pixels, ours: Pixels) -> tuple[Tensor, Tensor | None]:
    """For a pixel x: (x - m') / s' = (s / s') (x - m) / s + (m - m') / s', where m', s' are theirs and m, s ours."""
    (mean, std), (own_mean, own_std) = (
        (torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in pixels) for pixels in (theirs, ours)
    )
    exact = filters.double()
    if bias is not None:
        bias = (bias.double() + (exact * ((own_mean - mean) / std)).sum((1, 2, 3))).to(bias.dtype)
    return (exact * (own_std / std)).to(filters.dtype), bias


def _word(values: tuple[float, ...]) -> str:
    return "[" + ",".join(f"{value:.9g}" for value in values) + "]"
