"""The colour recipe of each view: its draws (NumPy), and their application to a batch on the device (torch).

DINO's recipe (Caron et al. 2021, as in BYOL): with probability p a jitter of brightness, contrast, saturation and hue, in
a random order; grey; Gaussian blur; solarisation; ImageNet's mean and deviation. One definition serves both readers.
Letters: B images, V views, H x W pixels.
"""

import itertools
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pipeline.draws import uniform
from runtime.config import Data, Views

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
ORDERS = list(itertools.permutations(range(4)))  # of brightness, contrast, saturation, hue
# columns of the draws; 1, 1, 1, 0, 0, 0, 0 changes nothing
ORDER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GREY, SIGMA, SOLARIZE = range(8)
RADIUS = 6  # of the blur's window, pixels: three times the largest sigma


def draw_colour(key: NDArray[np.uint64], data: Data, views: list[Views]) -> NDArray[np.float32]:
    """Draws for every view [B,V,8]: order (0..23), brightness, contrast, saturation (factors), hue (turns), grey (0 or 1),
    sigma (pixels; 0: no blur), solarise (0 or 1). key [B]: hash of (seed, epoch, sample id)."""
    u = uniform(key, "colour", shape=(len(views), 10))  # [B,V,10]
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
        u[..., 6] < data.grey,
        np.where(u[..., 7] < blur, 0.1 + 1.9 * u[..., 8], 0.0),
        u[..., 9] < solarize,
    ]
    return np.stack(columns, axis=-1).astype(np.float32)


@cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """ORDERS, MEAN and STD on the device, made once: a copy from the host at every step would make it wait."""
    mean, std = (torch.tensor(c, device=device).view(1, 3, 1, 1) for c in (MEAN, STD))
    return torch.tensor(ORDERS, device=device), mean, std


def _grey(x: Tensor) -> Tensor:
    """ITU-R 601 luma of [n,3,H,W] -> [n,1,H,W]."""
    return 0.299 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]


def _turn_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Hue of [n,3,H,W] in [0,1] turned by `turns` [n,1,1,1] (1: once round), through HSV as Pillow and torchvision do."""
    r, g, b = x[:, 0:1], x[:, 1:2], x[:, 2:3]
    value, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = value - low
    safe = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    hue = torch.where(
        value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    )  # in sixths of a turn
    hue = hue + 6 * turns

    def channel(shift: float) -> Tensor:  # one closed form for all six sectors (Smith 1978, as in CSS Color 4)
        k = torch.remainder(shift + hue, 6)
        return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)

    return torch.cat([channel(5), channel(3), channel(1)], 1)


def _blend(x: Tensor, which: Tensor, draws: Tensor) -> Tensor:
    """One of brightness (0), contrast (1), saturation (2) for each image; 3 leaves it as it is. x [n,3,H,W], which [n]."""
    grey = _grey(x)
    target = torch.where((which == 2).view(-1, 1, 1, 1), grey, torch.zeros_like(grey))
    mean = grey.mean((1, 2, 3), keepdim=True)
    target = torch.where((which == 1).view(-1, 1, 1, 1), mean, target)
    factors = torch.cat([draws[:, BRIGHTNESS : SATURATION + 1], torch.ones_like(draws[:, :1])], 1)
    f = factors.gather(1, which[:, None]).view(-1, 1, 1, 1)
    return (x * f + target * (1 - f)).clamp(0, 1)


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of [n,3,H,W] with sigma [n] pixels, edges extended; sigma 0: as it is."""
    offsets = torch.arange(-RADIUS, RADIUS + 1, device=x.device, dtype=x.dtype)
    taps = torch.exp(-0.5 * (offsets / sigma.clamp(min=1e-2)[:, None]) ** 2)  # sigma 0 leaves the middle tap alone
    taps = taps / taps.sum(1, keepdim=True)  # [n, 13]
    h, w = x.shape[-2:]
    padded = F.pad(x, (RADIUS,) * 4, mode="replicate")
    rows = sum(padded[..., i : i + h, :] * taps[:, i].view(-1, 1, 1, 1) for i in range(2 * RADIUS + 1))
    return sum(rows[..., i : i + w] * taps[:, i].view(-1, 1, 1, 1) for i in range(2 * RADIUS + 1))  # type: ignore


def apply_colour(views: Tensor, draws: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Views of one size as the network takes them.

    views uint8 [B,V,H,W,3] and draws [B,V,8] on the device -> [V,B,3,H,W], normalised, in `dtype`.
    """
    b, v, h, w, _ = views.shape
    x = views.permute(1, 0, 4, 2, 3).reshape(v * b, 3, h, w).float() / 255
    draws = draws.transpose(0, 1).reshape(v * b, -1)
    # hue is the one costly operation: it is done once, the three blends before and after it as the order says
    orders, mean, std = _constants(x.device)
    order = orders[draws[:, ORDER].long()]  # [n,4]
    hue_at = (order == 3).long().argmax(1)
    nothing = torch.full_like(hue_at, 3)
    for place in range(3):
        x = _blend(x, torch.where(place < hue_at, order[:, place], nothing), draws)
    x = _turn_hue(x, draws[:, HUE].view(-1, 1, 1, 1))
    for place in range(1, 4):
        x = _blend(x, torch.where(place > hue_at, order[:, place], nothing), draws)
    grey = draws[:, GREY].view(-1, 1, 1, 1)
    x = torch.where(grey > 0, _grey(x), x)
    x = _blur(x, draws[:, SIGMA])
    solarize = draws[:, SOLARIZE].view(-1, 1, 1, 1)
    x = torch.where((solarize > 0) & (x > 127.5 / 255), 1 - x, x)  # Pillow's 128 and above, between grey levels
    return ((x - mean) / std).to(dtype).view(v, b, 3, h, w)
