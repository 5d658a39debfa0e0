"""The color recipe (recipe.py) as one compiled loop for the CPU: view by view, in the CPU's cache.

tests/test_augment.py requires the same values as `recipe.apply_color`, which is used if numba is missing (`available`).
The loops are written out over flat planes so that LLVM vectorizes them.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.augment.recipe import (
    BRIGHTNESS,
    COLUMNS,
    CONTRAST,
    GRAY,
    HUE,
    ORDER,
    ORDERS,
    RADIUS,
    SATURATION,
    SIGMA,
    SOLARIZE,
    luma,
)  # fmt: skip
from runtime.pixels import IMAGENET, Pixels

try:
    from numba import njit

    available = True
except ImportError:  # then nothing below is called
    available = False

    def njit(**_):  # type: ignore[no-redef]
        return lambda f: f


_fast: Any = {"nogil": True, "fastmath": True, "cache": True, "error_model": "numpy"}
_ORDERS = np.array(ORDERS, np.int64)
_R, _G, _B = np.float32(0.299), np.float32(0.587), np.float32(0.114)
_0, _1, _2, _4, _6 = (np.float32(i) for i in (0, 1, 2, 4, 6))


@njit(**_fast)
def _blend_to(x, target, f):
    """x f + target (1 - f), clamped to [0, 1]; x [3,n], target: one number for all pixels."""
    add = target * (_1 - f)
    for c in range(3):
        plane = x[c]
        for i in range(plane.size):
            plane[i] = min(max(plane[i] * f + add, _0), _1)


@njit(**_fast)
def _contrast(x, f):
    r, g, b = x[0], x[1], x[2]
    total = 0.0
    for i in range(r.size):
        total += _R * r[i] + _G * g[i] + _B * b[i]
    _blend_to(x, np.float32(total / r.size), f)


@njit(**_fast)
def _saturation(x, f):
    r, g, b = x[0], x[1], x[2]
    for i in range(r.size):
        add = (_R * r[i] + _G * g[i] + _B * b[i]) * (_1 - f)
        r[i] = min(max(r[i] * f + add, _0), _1)
        g[i] = min(max(g[i] * f + add, _0), _1)
        b[i] = min(max(b[i] * f + add, _0), _1)


@njit(**_fast)
def _hue(x, turns):
    """recipe._shift_hue: in sixths of a turn, one closed form for all sectors."""
    rs, gs, bs = x[0], x[1], x[2]
    shift = _6 * turns
    for i in range(rs.size):
        r, g, b = rs[i], gs[i], bs[i]
        value, low = max(r, max(g, b)), min(r, min(g, b))
        chroma = value - low
        safe = chroma if chroma > _0 else _1
        over = _1 / safe
        h = (r - g) * over + _4
        h = (b - r) * over + _2 if value == g else h
        h = (g - b) * over if value == r else h
        h = h + shift
        k = h + np.float32(5)
        k = k - _6 * np.floor(k * np.float32(1 / 6))
        rs[i] = value - chroma * min(max(min(k, _4 - k), _0), _1)
        k = h + np.float32(3)
        k = k - _6 * np.floor(k * np.float32(1 / 6))
        gs[i] = value - chroma * min(max(min(k, _4 - k), _0), _1)
        k = h + _1
        k = k - _6 * np.floor(k * np.float32(1 / 6))
        bs[i] = value - chroma * min(max(min(k, _4 - k), _0), _1)


@njit(**_fast)
def _blur(x, h, w, sigma, padded):
    """Separable Gaussian over a window of 2 RADIUS + 1 = 13 pixels, edges replicated, in place; `padded` is scratch memory.

    The 13 taps are written out: LLVM then keeps a line's sum in registers instead of in memory.
    """
    t = np.empty(RADIUS + 1, np.float32)
    total = 0.0
    for j in range(RADIUS + 1):
        e = np.exp(-0.5 * (j / sigma) ** 2)
        total += e if j == 0 else 2 * e
        t[j] = e
    for j in range(RADIUS + 1):
        t[j] = t[j] / np.float32(total)
    t0, t1, t2, t3, t4, t5, t6 = t[0], t[1], t[2], t[3], t[4], t[5], t[6]
    down = padded[: (h + 2 * RADIUS) * w].reshape(h + 2 * RADIUS, w)
    line = padded[(h + 2 * RADIUS) * w :]
    for c in range(3):
        plane = x[c].reshape(h, w)
        for y in range(h + 2 * RADIUS):
            down[y, :] = plane[min(max(y - RADIUS, 0), h - 1)]
        for y in range(h):
            m0, m1, m2, m3, m4, m5, m6 = (
                down[y], down[y + 1], down[y + 2], down[y + 3], down[y + 4], down[y + 5], down[y + 6],
            )  # fmt: skip
            m7, m8, m9, m10, m11, m12 = down[y + 7], down[y + 8], down[y + 9], down[y + 10], down[y + 11], down[y + 12]
            for i in range(w):
                line[RADIUS + i] = (
                    t0 * m6[i] + t1 * (m5[i] + m7[i]) + t2 * (m4[i] + m8[i]) + t3 * (m3[i] + m9[i])
                    + t4 * (m2[i] + m10[i]) + t5 * (m1[i] + m11[i]) + t6 * (m0[i] + m12[i])
                )  # fmt: skip
            for j in range(RADIUS):
                line[j] = line[RADIUS]
                line[RADIUS + w + j] = line[RADIUS + w - 1]
            out = plane[y]
            for i in range(w):
                out[i] = (
                    t0 * line[i + 6] + t1 * (line[i + 5] + line[i + 7]) + t2 * (line[i + 4] + line[i + 8])
                    + t3 * (line[i + 3] + line[i + 9]) + t4 * (line[i + 2] + line[i + 10])
                    + t5 * (line[i + 1] + line[i + 11]) + t6 * (line[i] + line[i + 12])
                )  # fmt: skip


@njit(**_fast)
def _view(source, d, out, x, padded, orders, mean, std):
    """One view: source uint8 [H,W,3], its draws d [8] -> out float32 [3,H*W]; x [3,H*W] and `padded` are scratch memory."""
    h, w = source.shape[:2]
    flat = source.reshape(h * w, 3)
    over = np.float32(1 / 255)
    for i in range(h * w):
        x[0, i] = np.float32(flat[i, 0]) * over
        x[1, i] = np.float32(flat[i, 1]) * over
        x[2, i] = np.float32(flat[i, 2]) * over
    for o in orders[int(d[ORDER])]:
        if o == 0 and d[BRIGHTNESS] != 1:
            _blend_to(x, _0, d[BRIGHTNESS])
        elif o == 1 and d[CONTRAST] != 1:
            _contrast(x, d[CONTRAST])
        elif o == 2 and d[SATURATION] != 1:
            _saturation(x, d[SATURATION])
        elif o == 3 and d[HUE] != 0:
            _hue(x, d[HUE])
    if d[GRAY] > 0:
        _saturation(x, _0)
    if d[SIGMA] > 0:
        _blur(x, h, w, d[SIGMA], padded)
    inverted = d[SOLARIZE] > 0
    edge = np.float32(127.5 / 255)
    for c in range(3):
        scale, shift = _1 / std[c], -mean[c] / std[c]
        plane, to = x[c], out[c]
        if inverted:
            for i in range(plane.size):
                p = _1 - plane[i] if plane[i] > edge else plane[i]
                to[i] = p * scale + shift
        else:
            for i in range(plane.size):
                to[i] = plane[i] * scale + shift


@njit(**_fast)
def _views(views, draws, out, x, padded, orders, mean, std):
    for b in range(views.shape[0]):
        for v in range(views.shape[1]):
            _view(views[b, v], draws[b, v], out[v, b], x, padded, orders, mean, std)


def apply_color(views: Tensor, draws: Tensor, dtype: torch.dtype = torch.float32, pixels: Pixels = IMAGENET) -> Tensor:
    """As recipe.apply_color: uint8 [B,V,H,W,3] and draws [B,V,8] on the CPU -> [V,B,C,H,W], normalized, in `dtype`."""
    b, v, h, w, _ = views.shape
    assert draws.shape == (b, v, COLUMNS)  # numba reads out of bounds without an error
    if pixels.channels == 1:  # not in the loop: any change in it changes the rounding of all views (fastmath)
        colors = apply_color(views, draws, pixels=Pixels((0, 0, 0), (1, 1, 1)))
        return ((luma(colors.unbind(2)) - pixels.mean[0]) / pixels.std[0]).to(dtype)[:, :, None]
    out = torch.empty(v, b, 3, h, w)
    x, padded = np.empty((3, h * w), np.float32), np.empty((h + 2 * RADIUS) * w + w + 2 * RADIUS, np.float32)
    flat = out.view(v, b, 3, h * w).numpy()
    mean, std = (np.array(values, np.float32) for values in pixels)
    _views(views.contiguous().numpy(), draws.contiguous().numpy(), flat, x, padded, _ORDERS, mean, std)
    return out.to(dtype)
