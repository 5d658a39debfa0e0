"""Windows that overlap enough, and the reference points that two views share. NumPy only: no pixels, no torch.

Letters: B images, V views, T teacher views (the first of the V), M points of a pair.
A *window* is four integers (x0, y0, x1, y1) in pixels of the source, edge to edge, signed: x0 > x1 means that the view is
flipped. So one formula, the paper's (p - start) / (end - start), gives a point's place in any view, flips included.
"""

import numpy as np
from numpy.typing import NDArray

from pipeline.random import hash64, uniform

_TRIES = 10  # shapes tried for one window before the whole image is taken, as torchvision's RandomResizedCrop does


def random_windows(
    key: NDArray[np.uint64], height: NDArray, width: NDArray, scale: tuple[float, float], aspect: tuple[float, float]
) -> NDArray[np.int64]:
    """Random resized windows, unflipped [B,4]: area uniform in `scale` of the image, aspect log-uniform, position uniform.

    key, height, width: [B]. The distribution is that of torchvision's RandomResizedCrop.
    """
    u = uniform(key, shape=(2 * _TRIES + 2,))  # [B, 22]
    h, w = height.astype(np.float64)[:, None], width.astype(np.float64)[:, None]
    area = (scale[0] + u[:, :_TRIES] * (scale[1] - scale[0])) * h * w
    log = np.log(aspect)
    ratio = np.exp(log[0] + u[:, _TRIES : 2 * _TRIES] * (log[1] - log[0]))
    tried_w, tried_h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))  # [B, tries]
    fits = (tried_w > 0) & (tried_w <= w) & (tried_h > 0) & (tried_h <= h)
    first = np.argmax(fits, axis=1)[:, None]
    wide = np.take_along_axis(tried_w, first, 1)[:, 0]
    high = np.take_along_axis(tried_h, first, 1)[:, 0]
    x = np.floor(u[:, -2] * (width - wide + 1))
    y = np.floor(u[:, -1] * (height - high + 1))

    none = ~fits.any(axis=1)  # then the largest centered window of an allowed aspect
    if none.any():
        hh, ww = height[none].astype(np.float64), width[none].astype(np.float64)
        wide[none] = np.maximum(1, np.minimum(ww, np.rint(hh * aspect[1])))
        high[none] = np.maximum(1, np.minimum(hh, np.rint(ww / aspect[0])))
        x[none], y[none] = (ww - wide[none]) // 2, (hh - high[none]) // 2
    return np.stack([x, y, x + wide, y + high], axis=1).astype(np.int64)


def overlap(a: NDArray, b: NDArray) -> NDArray[np.int64]:
    """Shared area in pixels of unflipped windows a, b [..., 4] -> [...]."""
    start = np.maximum(a[..., :2], b[..., :2])
    end = np.minimum(a[..., 2:], b[..., 2:])
    return np.clip(end - start, 0, None).prod(axis=-1)


def draw_windows(
    key: NDArray[np.uint64],
    height: NDArray,
    width: NDArray,
    *,
    scale: list[tuple[float, float]],
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
    teachers: int = 2,
    min_overlap: float = 0.01,
    flip: float = 0.5,
    redraws: int = 100,
) -> NDArray[np.int32]:
    """Windows of all views [B,V,4], signed.

    key [B]: hash of (seed, epoch, sample id); height, width [B]: pixels; scale: for each view. A view is redrawn until
    it shares more than `min_overlap` of the image with every teacher view before it, a teacher view more than twice that;
    earlier views are kept. Official code: the same without a limit of redraws (main_dino.py:610). After `redraws` draws
    a second teacher view takes the first one's window, any other view the overlap of both teacher views; both
    satisfy the condition. min_overlap 0: no condition.
    """
    height, width = np.asarray(height, np.int64), np.asarray(width, np.int64)
    windows = np.empty((len(key), len(scale), 4), np.int64)
    bound = min_overlap * height * width
    for v in range(len(scale)):
        need = bound * (2 if v < teachers else 1)
        todo = np.arange(len(key))
        for attempt in range(redraws):
            drawn = random_windows(hash64(key[todo], "window", v, attempt), height[todo], width[todo], scale[v], aspect)
            earlier = windows[todo, : min(v, teachers)]
            enough = (overlap(drawn[:, None], earlier) > need[todo, None]).all(axis=1) | (min_overlap == 0)
            windows[todo[enough], v] = drawn[enough]
            todo = todo[~enough]
            if not len(todo):
                break
        else:
            common = windows[todo, : min(v, teachers)]
            windows[todo, v] = np.concatenate([common[..., :2].max(axis=1), common[..., 2:].min(axis=1)], axis=1)
        if v == 0:
            # a sliver of a very long photo cannot overlap a second view enough: then the view is the whole photo
            small = (windows[:, 0, 2:] - windows[:, 0, :2]).prod(axis=1) <= 2 * bound
            windows[small, 0] = np.stack([0 * width, 0 * height, width, height], axis=1)[small]
    flipped = uniform(key, "flip", shape=(len(scale),)) < flip  # [B,V]
    windows[flipped] = windows[flipped][:, [2, 1, 0, 3]]
    return windows.astype(np.int32)


def points_in_views(windows: NDArray, u: NDArray, teachers: int = 2) -> NDArray[np.float32]:
    """The reference points of every ordered pair (t, v), in both views' own coordinates.

    windows [B,V,4] signed; u [B,T,V,M,2] in [0,1): the point's position (x, y) in the overlap of windows t and v.
    Returns [B,T,V,M,2(teacher,student),2(x,y)]: 0 is the view's left or top edge, 1 its right or bottom edge
    (paper section 3.2). float64 inside, float32 out. Self pairs t = v are included; their points are in the whole window.
    """
    windows = windows.astype(np.float64)
    start, end = windows[..., :2], windows[..., 2:]  # [B,V,2]
    low, high = np.minimum(start, end), np.maximum(start, end)
    low = np.maximum(low[:, :teachers, None], low[:, None])  # [B,T,V,2] the overlap of each pair
    high = np.minimum(high[:, :teachers, None], high[:, None])
    p = low[:, :, :, None] + u * (high - low)[:, :, :, None]  # [B,T,V,M,2] in image pixels

    def in_view(a: NDArray, b: NDArray) -> NDArray:
        return (p - a) / (b - a)

    teacher = in_view(start[:, :teachers, None, None], end[:, :teachers, None, None])
    student = in_view(start[:, None, :, None], end[:, None, :, None])
    return np.stack([teacher, student], axis=-2).astype(np.float32)


def draw_points(key: NDArray[np.uint64], windows: NDArray, points: int, teachers: int = 2) -> NDArray[np.float32]:
    """M points for each ordered pair, uniform in the overlap: [B,T,V,M,2,2], see `points_in_views`."""
    u = uniform(key, "points", shape=(teachers, windows.shape[1], points, 2))
    return points_in_views(windows, u, teachers)
