"""Windows and points: containment, overlap, flips, and the published distributions."""

import zlib

import numpy as np
import pytest

from pipeline.draws import hash64
from pipeline.geometry import draw_points, draw_windows, overlap, points_in_views

ALL = [(0.25, 1.0)] * 4
MULTICROP = [(0.4, 1.0)] * 2 + [(0.05, 0.4)] * 4


def unflipped(windows: np.ndarray) -> np.ndarray:
    w = windows.astype(np.int64).copy()
    w[..., [0, 2]] = np.sort(w[..., [0, 2]], -1)
    return w


def sizes(n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.integers(40, 700, n), rng.integers(40, 700, n)


@pytest.mark.parametrize("scale", [ALL, MULTICROP])
@pytest.mark.parametrize("min_overlap", [0.01, 0.1])
def test_windows_are_inside_and_overlap(scale, min_overlap):
    height, width = sizes(3000)
    windows = draw_windows(hash64(0, np.arange(3000)), height, width, scale=scale, min_overlap=min_overlap)
    w = unflipped(windows)
    assert (w[..., :2] >= 0).all()
    assert (w[..., 2] <= width[:, None]).all()
    assert (w[..., 3] <= height[:, None]).all()
    assert (w[..., 2] > w[..., 0]).all()
    assert (w[..., 3] > w[..., 1]).all()
    area = height * width
    assert (overlap(w[:, 0], w[:, 1]) > 2 * min_overlap * area).all()
    for v in range(2, len(scale)):
        for t in range(2):
            assert (overlap(w[:, t], w[:, v]) > min_overlap * area).all()
    flips = (windows[..., 0] > windows[..., 2]).mean(0)
    assert (np.abs(flips - 0.5) < 4 * 0.5 / np.sqrt(3000)).all()


def test_fallback_keeps_the_bound():
    """With no redraw allowed that could ever succeed, the fallback still shares enough."""
    height, width = sizes(500)
    windows = draw_windows(
        hash64(1, np.arange(500)), height, width, scale=[(0.3, 0.31)] * 4, min_overlap=0.12, redraws=1
    )
    w = unflipped(windows)
    area = height * width
    assert (overlap(w[:, 0], w[:, 1]) > 0.24 * area).all()
    assert all((overlap(w[:, t], w[:, v]) > 0.12 * area).all() for t in range(2) for v in (2, 3))


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (2, 3), (16, 4000)])
def test_odd_photos(shape):
    height, width = np.full(200, shape[0]), np.full(200, shape[1])
    w = unflipped(draw_windows(hash64(2, np.arange(200)), height, width, scale=ALL))
    assert (w[..., 2:] > w[..., :2]).all()
    assert (w[..., 2] <= shape[1]).all()
    assert (w[..., 3] <= shape[0]).all()
    assert (overlap(w[:, 0], w[:, 1]) > 0.02 * shape[0] * shape[1]).all()


def test_min_overlap_zero_asks_for_nothing():
    height, width = np.full(4000, 100), np.full(4000, 100)
    w = unflipped(draw_windows(hash64(0, np.arange(4000)), height, width, scale=[(0.05, 0.1)] * 3, min_overlap=0.0))
    assert (overlap(w[:, 0], w[:, 1]) == 0).mean() > 0.2


def test_draws_depend_on_the_key_alone():
    height, width = sizes(64)
    key = hash64(0, 0, np.arange(64))
    together = draw_windows(key, height, width, scale=ALL)
    alone = np.concatenate(
        [draw_windows(key[i : i + 1], height[i : i + 1], width[i : i + 1], scale=ALL) for i in range(64)]
    )
    assert np.array_equal(together, alone)
    assert not np.array_equal(together, draw_windows(hash64(0, 1, np.arange(64)), height, width, scale=ALL))


def test_a_point_is_the_same_place_in_both_views():
    """Back from both views' coordinates to the source: one pixel position, inside both windows; flips included."""
    height, width = sizes(500)
    key = hash64(3, np.arange(500))
    windows = draw_windows(key, height, width, scale=MULTICROP)
    points = draw_points(key, windows, 5).astype(np.float64)  # [B,T,V,M,2,2]
    assert points.shape == (500, 2, 6, 5, 2, 2)
    assert points.min() >= -1e-6
    assert points.max() <= 1 + 1e-6
    start, end = windows[..., :2].astype(float), windows[..., 2:].astype(float)
    span = end - start
    from_teacher = start[:, :2, None, None] + points[..., 0, :] * span[:, :2, None, None]
    from_student = start[:, None, :, None] + points[..., 1, :] * span[:, None, :, None]
    assert np.abs(from_teacher - from_student).max() < 1e-3
    u = (from_teacher[:, 0, 0] - np.minimum(start, end)[:, 0, None]) / np.abs(span[:, 0, None])
    assert abs(u.mean() - 0.5) < 0.02  # a self pair's points are uniform over its own window


def furthest_from_independent(*columns: np.ndarray) -> float:
    """The largest |correlation| of any two of the columns [n]; for 4,000 rows chance alone gives each about 0.016."""
    return float(np.abs(np.corrcoef(columns) - np.eye(len(columns))).max())


def test_area_aspect_and_place_of_a_window_are_draws_of_their_own():
    """DINO, main_dino.py: torchvision's RandomResizedCrop, whose get_params draws the area, the logarithm of the aspect,
    the top and the left one after the other. So no two of them go together, within a view or from view to view; and each
    sixteenth of the possible places gets its sixteenth of the windows."""
    n, side = 4000, np.full(4000, 1000)
    w = unflipped(draw_windows(hash64(11, np.arange(n)), side, side, scale=[(0.25, 0.5)] * 2, min_overlap=0.0))
    wide, high = (w[..., 2:] - w[..., :2]).transpose(2, 0, 1).astype(np.float64)  # no shape of this scale is rejected
    x, y = w[..., 0] / (1000 - wide), w[..., 1] / (1000 - high)
    assert furthest_from_independent(*(wide * high).T, *np.log(wide / high).T, *x.T, *y.T) < 0.1
    for v in range(2):
        counts = np.histogram2d(x[:, v], y[:, v], bins=4, range=[(0, 1), (0, 1)])[0]
        assert counts.min() > 0.7 * n / 16  # five deviations of the count below it
        assert counts.max() < 1.3 * n / 16


def test_x_and_y_of_a_point_are_draws_of_their_own():
    """DenseDINO, paper section 3.2: M points are sampled in the overlap of two views. They lie all over it, not on a
    diagonal, and one says nothing of the next."""
    windows = np.tile(np.array([[0, 0, 80, 60], [40, 20, 120, 140]]), (4000, 1, 1))  # they share [40, 80] x [20, 60]
    points = draw_points(hash64(12, np.arange(4000)), windows, 2)[:, 0, 1, :, 0].astype(np.float64)  # [B,M,2]
    x, y = points[..., 0], points[..., 1]
    np.testing.assert_allclose([x.min(), x.max(), y.min(), y.max()], [1 / 2, 1, 1 / 3, 1], atol=0.005)
    assert furthest_from_independent(*x.T, *y.T) < 0.1


def test_a_flip_mirrors_the_point():
    u = np.array([0.25, 0.5]).reshape(1, 1, 1, 1, 2).repeat(2, 1).repeat(2, 2)
    plain = np.array([[[0, 0, 100, 50], [0, 0, 100, 50]]])
    flipped = np.array([[[0, 0, 100, 50], [100, 0, 0, 50]]])
    a, b = points_in_views(plain, u), points_in_views(flipped, u)
    assert a[0, 0, 1, 0].tolist() == [[0.25, 0.5], [0.25, 0.5]]
    assert b[0, 0, 1, 0].tolist() == [[0.25, 0.5], [0.75, 0.5]]


def ks(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sample Kolmogorov-Smirnov distance."""
    at = np.concatenate([a, b])
    both = [np.searchsorted(np.sort(x), at, side="right") / len(x) for x in (a, b)]
    return float(np.abs(both[0] - both[1]).max())


@pytest.mark.parametrize("case", ["s025_V4", "s025_V6", "s04_V4", "s04_V6", "dino_default_V10"])
def test_published_distributions(case, oracle, request):
    """Area, aspect, centres and overlaps of 2,000 images beside the published sampler's."""
    raw = oracle("d_geometry_raw")
    wh = raw["image_sizes_wh"].numpy().astype(np.int64)
    theirs = raw[f"{case}.boxes_xyxy"].numpy().astype(np.int64)
    views = theirs.shape[1]
    scale = {"s025": [(0.25, 1.0)] * views, "s04": [(0.4, 1.0)] * views}.get(
        case.split("_")[0], [(0.4, 1.0)] * 2 + [(0.05, 0.4)] * (views - 2)
    )
    seed = zlib.crc32(request.node.name.encode())  # not chosen
    windows = draw_windows(hash64(seed, np.arange(len(wh))), wh[:, 1], wh[:, 0], scale=scale)
    ours = unflipped(windows)

    def measures(w: np.ndarray) -> dict[str, np.ndarray]:
        side = w[..., 2:] - w[..., :2]
        image = wh[:, None]
        found = {
            "area": side.prod(-1) / image.prod(-1),
            "aspect": np.log(side[..., 0] / side[..., 1]),
            "x": (w[..., 0] + w[..., 2]) / 2 / image[..., 0],
            "y": (w[..., 1] + w[..., 3]) / 2 / image[..., 1],
        }
        out = {f"{name}, view {v}": x[:, v] for name, x in found.items() for v in range(views)}
        for t in range(2):
            for v in range(t + 1, views):
                out[f"overlap {t},{v}"] = overlap(w[:, t], w[:, v]) / wh.prod(-1)
        return out

    a, b = measures(ours), measures(theirs)
    for name in a:
        assert ks(a[name], b[name]) <= 0.06, name
    flips = (windows[..., 0] > windows[..., 2]).mean(0)
    assert (np.abs(flips - 0.5) < 3.5 * 0.5 / np.sqrt(len(wh))).all()
