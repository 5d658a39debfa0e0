"""The color recipe of each view: its draws (NumPy), and their application to a batch on the device (torch).

DINO's recipe (Caron et al. 2021, as in BYOL): with probability p a jitter of brightness, contrast, saturation and hue, in
a random order; gray; Gaussian blur; solarization; the mean and deviation of each channel. Both readers use it. For a network
of one channel the gray of the finished view is taken, before mean and deviation: the recipe is the same for every network.
numba_kernel.py is `apply_color` for a CPU.
Letters: B images, V views, C channels of the network, H x W pixels.
"""

import itertools
from functools import reduce

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.random import uniform
from runtime.config import Data, Views
from runtime.pixels import IMAGENET, Pixels

ORDERS = list(itertools.permutations(range(4)))  # of brightness, contrast, saturation, hue
# columns of the draws; any order and 1, 1, 1, 0, 0, 0, 0 change nothing
ORDER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY, SIGMA, SOLARIZE = range(8)
COLUMNS = 1 + SOLARIZE
RADIUS = 6  # of the blur's window, pixels: three times the largest sigma
MIN_SIGMA, MAX_SIGMA = 0.1, 2.0  # of the blur, pixels at the view's size


def draw_color(key: NDArray[np.uint64], data: Data, views: list[Views]) -> NDArray[np.float32]:
    """Draws for every view [B,V,8]: order (0..23), brightness, contrast, saturation (factors), hue (turns), gray (0 or 1),
    sigma (pixels; 0: no blur), solarize (0 or 1). key [B]: hash of (seed, epoch, sample id)."""
    u = uniform(key, "color", shape=(len(views), 10))  # [B,V,10]
    jitter = data.jitter
    jittered = u[..., 0] < jitter.probability

    def factor(column: int, strength: float) -> NDArray:
        low = max(0.0, 1 - strength)
        return np.where(jittered, low + u[..., column] * (1 + strength - low), 1.0)

    blur = np.array([v.blur[0] for v in views])
    solarize = np.array([v.solarize[0] for v in views])
    columns = [
        np.floor(u[..., 1] * len(ORDERS)),
        factor(2, jitter.brightness),
        factor(3, jitter.contrast),
        factor(4, jitter.saturation),
        np.where(jittered, (2 * u[..., 5] - 1) * jitter.hue, 0.0),
        u[..., 6] < data.grayscale,
        np.where(u[..., 7] < blur, MIN_SIGMA + (MAX_SIGMA - MIN_SIGMA) * u[..., 8], 0.0),
        u[..., 9] < solarize,
    ]
    return np.stack(columns, axis=-1).astype(np.float32)


Planes = tuple[Tensor, ...]  # red, green and blue, each [n,H,W] in [0,1]


def luma(x: Planes) -> Tensor:
    """The gray of ITU-R 601 -> [n,H,W]."""
    return 0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2]


def _shift_hue(x: Planes, turns: Tensor) -> Planes:
    """Hue shifted by `turns` [n,1,1] (1: a full turn), through HSV as in Pillow and torchvision."""
    r, g, b = x
    value, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = value - low
    safe = torch.where(chroma > 0, chroma, 1.0)
    hue = torch.where(
        value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    )  # in sixths of a turn
    hue = hue + 6 * turns

    def channel(shift: float) -> Tensor:  # one closed form for all six sectors (Smith 1978, as in CSS Color 4)
        k = shift + hue
        k = k - 6 * (k / 6).floor()
        return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)

    return channel(5), channel(3), channel(1)


def _blend(x: Planes, which: Tensor, draws: Tensor, mean: Tensor) -> Planes:
    """One of brightness (0), contrast (1), saturation (2) for each image; 3 changes nothing. which [n]; mean [n,1,1]: of
    the gray image, which contrast blends with."""
    factors = torch.cat([draws[:, BRIGHTNESS : SATURATION + 1], torch.ones_like(draws[:, :1])], 1)
    f = factors.gather(1, which[:, None]).view(-1, 1, 1)
    which = which.view(-1, 1, 1)
    target = torch.where(which == 2, luma(x), torch.where(which == 1, mean, 0.0)) * (1 - f)
    return tuple((channel * f + target).clamp(0, 1) for channel in x)


def _jitter(x: Planes, order: Tensor, draws: Tensor, stop: Tensor | int, mean: Tensor) -> Planes:
    """The jitter in each image's order [n,4], up to position `stop` (exclusive). Hue is the costly operation: it is done
    once, and the three blends before or after it as the order says."""
    hue_at = (order == 3).long().argmax(1)
    nothing = torch.full_like(hue_at, 3)

    def blend(x: Planes, position: int, wanted: Tensor) -> Planes:
        return _blend(x, torch.where(wanted & (position < stop), order[:, position], nothing), draws, mean)

    for position in range(3):
        x = blend(x, position, position < hue_at)
    shifted = _shift_hue(x, draws[:, HUE].view(-1, 1, 1))
    reached = (hue_at < stop).view(-1, 1, 1)
    x = tuple(torch.where(reached, new, old) for new, old in zip(shifted, x, strict=True))
    for position in range(1, 4):
        x = blend(x, position, position > hue_at)
    return x


def _blur(x: Planes, sigma: Tensor) -> Planes:
    """Gaussian blur with sigma [n] pixels, edges replicated; sigma 0: unchanged."""
    offsets = torch.arange(-RADIUS, RADIUS + 1, device=sigma.device, dtype=sigma.dtype)
    weights = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-2)[:, None]) ** 2)  # sigma 0: only the middle tap remains
    taps = (weights / weights.sum(1, keepdim=True))[..., None, None].unbind(1)  # 13 of [n,1,1]

    def blur(plane: Tensor) -> Tensor:
        h, w = plane.shape[-2:]
        padded = F.pad(plane, (RADIUS,) * 4, mode="replicate")
        rows = reduce(torch.add, (padded[:, i : i + h] * tap for i, tap in enumerate(taps)))
        return reduce(torch.add, (rows[..., i : i + w] * tap for i, tap in enumerate(taps)))

    return tuple(blur(plane) for plane in x)


def apply_color(
    views: Tensor, draws: Tensor, dtype: torch.dtype = torch.float32, orders: Tensor | None = None,
    pixels: Pixels = IMAGENET,
) -> Tensor:  # fmt: skip
    """Views of one size as the network takes them.

    views uint8 [B,V,H,W,3] and draws [B,V,8] on the device -> [V,B,C,H,W], normalized, in `dtype`. orders: ORDERS on the
    device, which avoids a copy from the host at every step. pixels: what the network takes.
    """
    b, v, h, w, _ = views.shape
    red, green, blue = views.transpose(0, 1).reshape(v * b, h, w, 3).unbind(-1)
    x: Planes = (red / 255, green / 255, blue / 255)
    draws = draws.transpose(0, 1).reshape(v * b, -1)
    orders = torch.tensor(ORDERS, device=views.device) if orders is None else orders
    order = orders[draws[:, ORDER].long()]  # [n,4]
    # Only contrast needs the whole image: its mean gray. What comes before it is computed twice, first for that mean.
    # Compiled, each time reads the pixels once and writes nothing in between.
    contrast_at = (order == 1).long().argmax(1)
    before = _jitter(x, order, draws, contrast_at, torch.zeros_like(draws[:, :1, None]))
    x = _jitter(x, order, draws, 4, luma(before).mean((1, 2), keepdim=True))
    to_gray, inverted = (draws[:, column].view(-1, 1, 1) > 0 for column in (GRAY, SOLARIZE))
    gray = luma(x)
    x = _blur(tuple(torch.where(to_gray, gray, channel) for channel in x), draws[:, SIGMA])
    x = tuple(torch.where(inverted & (channel > 127.5 / 255), 1 - channel, channel) for channel in x)  # Pillow's 128 up
    if pixels.channels == 1:
        x = (luma(x),)
    planes = [((channel - mean) / std).to(dtype) for channel, mean, std in zip(x, *pixels, strict=True)]
    return torch.stack(planes, 1).view(v, b, pixels.channels, h, w)
