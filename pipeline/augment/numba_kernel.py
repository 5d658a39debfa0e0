"""The color recipe (recipe.py) as compiled loops for the CPU: view by view, in the CPU's cache.

tests/test_augment.py requires the same values as `recipe.apply_color`, which is used if numba is missing (`available`).
The loops are over one-dimensional arrays, so that LLVM vectorizes them. docs/lab/2026-11.md says what was slow: two indices
in an innermost loop, a slice assigned to a slice, one array for input and output, reading what the line before has stored.
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
_0, _1, _2, _3, _4, _6 = (np.float32(i) for i in (0, 1, 2, 3, 4, 6))


@njit(**_fast)
def _blend_to(r, g, b, target, f):
    """x f + target (1 - f), clamped to [0, 1]; target: one number for all pixels."""
    add = target * (_1 - f)
    for i in range(r.size):
        r[i] = min(max(r[i] * f + add, _0), _1)
        g[i] = min(max(g[i] * f + add, _0), _1)
        b[i] = min(max(b[i] * f + add, _0), _1)


@njit(**_fast)
def _contrast(r, g, b, f):
    total = 0.0
    for i in range(r.size):
        total += _R * r[i] + _G * g[i] + _B * b[i]
    _blend_to(r, g, b, np.float32(total / r.size), f)


@njit(**_fast)
def _saturation(r, g, b, f):
    for i in range(r.size):
        add = (_R * r[i] + _G * g[i] + _B * b[i]) * (_1 - f)
        r[i] = min(max(r[i] * f + add, _0), _1)
        g[i] = min(max(g[i] * f + add, _0), _1)
        b[i] = min(max(b[i] * f + add, _0), _1)


@njit(**_fast)
def _hue(rs, gs, bs, turns):
    """recipe._shift_hue, with one remainder for the three channels: their forms are written for a hue in [0, 6)."""
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
        h = h + shift  # in sixths of a turn
        h = h - _6 * np.floor(h * np.float32(1 / 6))
        rs[i] = value - chroma * min(max(_2 - abs(h - _3), _0), _1)
        gs[i] = value - chroma * min(max(abs(h - _2) - _1, _0), _1)
        bs[i] = value - chroma * min(max(abs(h - _4) - _1, _0), _1)


@njit(**_fast)
def _load(source, r, g, b):
    """source uint8 [3n] -> planes [n] in [0, 1]."""
    over = np.float32(1 / 255)
    for i in range(r.size):
        r[i] = np.float32(source[3 * i]) * over
        g[i] = np.float32(source[3 * i + 1]) * over
        b[i] = np.float32(source[3 * i + 2]) * over


@njit(**_fast)
def _finish(plane, out, solarize, mean, std):
    """Solarization if it is drawn, and normalization: pixels of one plane -> out, which is other memory."""
    scale, shift = _1 / std, -mean / std
    if solarize > 0:
        edge = np.float32(127.5 / 255)
        for i in range(plane.size):
            p = _1 - plane[i] if plane[i] > edge else plane[i]
            out[i] = p * scale + shift
    else:
        for i in range(plane.size):
            out[i] = plane[i] * scale + shift


@njit(**_fast)
def _taps(sigma):
    """A normal distribution's weights at 0, 1 ... RADIUS pixels from the middle; all 2 RADIUS + 1 = 13 add up to 1."""
    t = np.empty(RADIUS + 1, np.float32)
    total = 0.0
    for j in range(RADIUS + 1):
        e = np.exp(-0.5 * (j / sigma) ** 2)
        total += e if j == 0 else 2 * e
        t[j] = e
    for j in range(RADIUS + 1):
        t[j] = t[j] / np.float32(total)
    return t


@njit(**_fast)
def _blur_down(plane, lines, w, t):
    """plane [h+2 RADIUS+1, w] -> lines [h+1, w+2 RADIUS], without their first and last RADIUS columns.

    Two lines at once, which share 12 of their 14 pixels: half the loads. Of an odd h, the last line is no part of the view.
    """
    t0, t1, t2, t3, t4, t5, t6 = t[0], t[1], t[2], t[3], t[4], t[5], t[6]
    wide = w + 2 * RADIUS
    for y in range(0, lines.size // wide - 1, 2):
        s = plane[y * w : (y + 2 * RADIUS + 2) * w]
        upper, lower = lines[y * wide + RADIUS : (y + 1) * wide], lines[(y + 1) * wide + RADIUS : (y + 2) * wide]
        for i in range(w):
            s0, s1, s2, s3, s4, s5, s6 = (
                s[i], s[i + w], s[i + 2 * w], s[i + 3 * w], s[i + 4 * w], s[i + 5 * w], s[i + 6 * w],
            )  # fmt: skip
            s7, s8, s9, s10, s11, s12, s13 = (
                s[i + 7 * w], s[i + 8 * w], s[i + 9 * w], s[i + 10 * w], s[i + 11 * w], s[i + 12 * w], s[i + 13 * w],
            )  # fmt: skip
            upper[i] = (
                t0 * s6 + t1 * (s5 + s7) + t2 * (s4 + s8) + t3 * (s3 + s9) + t4 * (s2 + s10) + t5 * (s1 + s11)
                + t6 * (s0 + s12)
            )  # fmt: skip
            lower[i] = (
                t0 * s7 + t1 * (s6 + s8) + t2 * (s5 + s9) + t3 * (s4 + s10) + t4 * (s3 + s11) + t5 * (s2 + s12)
                + t6 * (s1 + s13)
            )  # fmt: skip


@njit(**_fast)
def _blur_across(line, out, t):
    """line [w+2 RADIUS] -> out [w]."""
    t0, t1, t2, t3, t4, t5, t6 = t[0], t[1], t[2], t[3], t[4], t[5], t[6]
    for i in range(out.size):
        out[i] = (
            t0 * line[i + 6] + t1 * (line[i + 5] + line[i + 7]) + t2 * (line[i + 4] + line[i + 8])
            + t3 * (line[i + 3] + line[i + 9]) + t4 * (line[i + 2] + line[i + 10])
            + t5 * (line[i + 1] + line[i + 11]) + t6 * (line[i] + line[i + 12])
        )  # fmt: skip


@njit(**_fast)
def _blur(plane, out, lines, h, w, t, solarize, mean, std):
    """Separable Gaussian, edges replicated, and `_finish`: plane [h+2 RADIUS+1, w], of which the h rows from RADIUS on are
    pixels -> out [h, w]. What is in plane is lost."""
    wide, first, last = w + 2 * RADIUS, RADIUS * w, (RADIUS + h - 1) * w
    for j in range(RADIUS):
        for i in range(w):
            plane[j * w + i] = plane[first + i]
            plane[last + (j + 1) * w + i] = plane[last + i]
    _blur_down(plane, lines, w, t)
    for y in range(h):
        line = lines[y * wide : (y + 1) * wide]
        for j in range(RADIUS):
            line[j] = line[RADIUS]
            line[RADIUS + w + j] = line[RADIUS + w - 1]
    row = plane[:w]
    for y in range(h):
        _blur_across(lines[y * wide : (y + 1) * wide], row, t)
        _finish(row, out[y * w : (y + 1) * w], solarize, mean, std)


@njit(**_fast)
def _view(source, d, out, x, lines, orders, mean, std):
    """One view: source uint8 [H,W,3], its draws d [8] -> out float32 [3,H*W]. Scratch memory: x [3, (H+2 RADIUS+1)*W], which
    has room for the rows that a blur needs above and below, and lines [(H+1)*(W+2 RADIUS)]."""
    h, w = source.shape[:2]
    first, last = RADIUS * w, (RADIUS + h) * w
    r, g, b = x[0, first:last], x[1, first:last], x[2, first:last]
    _load(source.reshape(source.size), r, g, b)
    for o in orders[int(d[ORDER])]:
        if o == 0 and d[BRIGHTNESS] != 1:
            _blend_to(r, g, b, _0, d[BRIGHTNESS])
        elif o == 1 and d[CONTRAST] != 1:
            _contrast(r, g, b, d[CONTRAST])
        elif o == 2 and d[SATURATION] != 1:
            _saturation(r, g, b, d[SATURATION])
        elif o == 3 and d[HUE] != 0:
            _hue(r, g, b, d[HUE])
    if d[GRAY] > 0:
        _saturation(r, g, b, _0)
    for c in range(3):
        if d[SIGMA] > 0:
            _blur(x[c], out[c], lines, h, w, _taps(d[SIGMA]), d[SOLARIZE], mean[c], std[c])
        else:
            _finish(x[c, first:last], out[c], d[SOLARIZE], mean[c], std[c])


@njit(**_fast)
def _views(views, draws, out, x, lines, orders, mean, std):
    for b in range(views.shape[0]):
        for v in range(views.shape[1]):
            _view(views[b, v], draws[b, v], out[v, b], x, lines, orders, mean, std)


def apply_color(views: Tensor, draws: Tensor, dtype: torch.dtype = torch.float32, pixels: Pixels = IMAGENET) -> Tensor:
    """As recipe.apply_color: uint8 [B,V,H,W,3] and draws [B,V,8] on the CPU -> [V,B,C,H,W], normalized, in `dtype`."""
    b, v, h, w, _ = views.shape
    assert draws.shape == (b, v, COLUMNS)  # numba reads out of bounds without an error
    if pixels.channels == 1:  # not in the loop: any change in it changes the rounding of all views (fastmath)
        colors = apply_color(views, draws, pixels=Pixels((0, 0, 0), (1, 1, 1)))
        return ((luma(colors.unbind(2)) - pixels.mean[0]) / pixels.std[0]).to(dtype)[:, :, None]
    out = torch.empty(v, b, 3, h, w)
    x = np.empty((3, (h + 2 * RADIUS + 1) * w), np.float32)
    lines = np.empty((h + 1) * (w + 2 * RADIUS), np.float32)
    flat = out.view(v, b, 3, h * w).numpy()
    mean, std = (np.array(values, np.float32) for values in pixels)
    _views(views.contiguous().numpy(), draws.contiguous().numpy(), flat, x, lines, _ORDERS, mean, std)
    return out.to(dtype)
