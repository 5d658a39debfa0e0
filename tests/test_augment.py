"""The color recipe: each operation beside torchvision's and Pillow's on the same draws, and the draws' distribution."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image, ImageFilter

from pipeline.augment import numba_kernel, recipe
from pipeline.augment.recipe import ORDERS, apply_color, draw_color
from pipeline.random import hash64
from runtime.config import Data, Views
from runtime.pixels import IMAGENET

PLAIN = (0, 1, 1, 1, 0, 0, 0, 0)


def pictures(n: int = 4, size: int = 40) -> torch.Tensor:
    """Smooth and textured colors, uint8 [n,3,size,size]."""
    torch.manual_seed(0)
    coarse = torch.nn.functional.interpolate(torch.rand(n, 3, 5, 5), (size, size), mode="bicubic").clamp(0, 1)
    return ((coarse * 0.8 + 0.2 * torch.rand(n, 3, size, size)) * 255).byte()


def colored(x: torch.Tensor, **columns: float) -> torch.Tensor:
    """apply_color with the given draws for every picture, back in gray levels [n,3,H,W]."""
    draws = list(PLAIN)
    for name, value in columns.items():
        draws[getattr(recipe, name.upper())] = value
    views = x.permute(0, 2, 3, 1)[:, None]
    out = apply_color(views, torch.tensor(draws).float().expand(len(x), 1, -1))[0]
    mean, std = (torch.tensor(c).view(1, 3, 1, 1) for c in IMAGENET)
    return (out * std + mean) * 255


def test_plain_draws_change_nothing():
    x = pictures()
    assert (colored(x) - x).abs().max() < 1e-3


@pytest.mark.parametrize("factor", [0.6, 0.9, 1.4])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_blends(name: str, factor: float):
    x = pictures()
    theirs = getattr(tv, f"adjust_{name}")(x.float() / 255, factor) * 255
    assert (colored(x, **{name: factor}) - theirs).abs().mean() < 1
    assert (colored(x, **{name: factor}) - x).abs().mean() > 1


@pytest.mark.parametrize("turn", [-0.1, 0.03, 0.1, 0.5])
def test_hue(turn: float):
    x = pictures()
    theirs = tv.adjust_hue(x.float() / 255, turn) * 255
    assert (colored(x, hue=turn) - theirs).abs().mean() < 0.1


def test_gray_and_solarize():
    x = pictures()
    gray = tv.rgb_to_grayscale(x.float(), num_output_channels=3)
    assert (colored(x, gray=1) - gray).abs().mean() < 0.1
    theirs = tv.solarize(x, 128).float()
    assert (colored(x, solarize=1) - theirs).abs().max() < 1e-2


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur(sigma: float):
    """Beside torchvision's exact Gaussian, and Pillow's, which stacks three box filters: its difference is stated."""
    x = pictures()
    ours = colored(x, sigma=sigma)
    exact = tv.gaussian_blur(torch.nn.functional.pad(x.float(), (9,) * 4, mode="replicate"), [13, 13], [sigma, sigma])
    assert (ours - exact[..., 9:-9, 9:-9]).abs().mean() < 0.1
    pillow = np.stack(
        [np.asarray(Image.fromarray(p.permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(sigma))) for p in x]
    )
    assert (
        np.abs(ours.permute(0, 2, 3, 1).numpy() - pillow).mean() < 1.0
    )  # measured: 0.00, 0.60, 0.58, 0.42 gray levels


@pytest.mark.parametrize("order", range(24))
def test_the_order_of_the_jitter(order: int):
    """Each of the 24 orders beside the same operations of torchvision one after the other."""
    x = pictures(2)
    factors = {"brightness": 1.3, "contrast": 0.7, "saturation": 1.2, "hue": 0.08}
    theirs = x.float() / 255
    for i in ORDERS[order]:
        name = list(factors)[i]
        theirs = getattr(tv, f"adjust_{name}")(theirs, factors[name])
    assert (colored(x, order=order, **factors) - theirs * 255).abs().mean() < 0.5


def test_each_picture_has_its_own_draws():
    x = pictures(3)
    draws = torch.tensor([PLAIN, (5, 1.2, 0.8, 1.1, 0.05, 0, 1.5, 0), (0, 1, 1, 1, 0, 1, 0, 1)]).float()[:, None]
    together = apply_color(x.permute(0, 2, 3, 1)[:, None], draws)[0]
    alone = [apply_color(x[i : i + 1].permute(0, 2, 3, 1)[:, None], draws[i : i + 1])[0] for i in range(3)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)


def test_views_keep_their_places():
    """[B,V,H,W,3] -> [V,B,3,H,W]."""
    x = pictures(6).view(3, 2, 3, 40, 40)
    out = apply_color(x.permute(0, 1, 3, 4, 2), torch.tensor(PLAIN).float().expand(3, 2, -1))
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in IMAGENET)
    for b, v in itertools.product(range(3), range(2)):
        assert torch.allclose(out[v, b], (x[b, v] / 255 - mean) / std, atol=1e-5)


def test_distribution_of_draws():
    """DINO's recipe: strengths, probabilities, and that what is not drawn changes nothing."""
    views = [Views(1, 224, blur=[1.0]), Views(1, 224, blur=[0.1], solarize=[0.2]), Views(1, 224, blur=[0.5])]
    n = 20_000
    d = draw_color(hash64(0, 0, np.arange(n)), Data(), views).astype(np.float64)
    assert d.shape == (n, 3, recipe.COLUMNS)

    def share(mask: np.ndarray, p: float) -> None:
        assert abs(mask.mean() - p) < 4 * np.sqrt(p * (1 - p) / mask.size) + 1e-9

    jittered = d[..., recipe.BRIGHTNESS] != 1
    share(jittered, 0.8)
    share(jittered.all(1), 0.8**3)  # views draw independently
    for column, low, high in ((1, 0.6, 1.4), (2, 0.6, 1.4), (3, 0.8, 1.2), (4, -0.1, 0.1)):
        x = d[..., column][jittered]
        assert low <= x.min() < low + 0.01 * (high - low) * 5
        assert high - 0.05 * (high - low) < x.max() <= high
        assert abs(x.mean() - (low + high) / 2) < 0.01 * (high - low)
        assert (d[..., column][~jittered] == (0 if column == recipe.HUE else 1)).all()
    orders = np.bincount(d[..., recipe.ORDER].astype(int).ravel(), minlength=24)
    assert len(orders) == 24
    assert orders.min() > 0.9 * orders.mean()
    share(d[..., recipe.GRAY] == 1, 0.2)
    for v, (blur, solarize) in enumerate([(1.0, 0.0), (0.1, 0.2), (0.5, 0.0)]):
        share(d[:, v, recipe.SIGMA] > 0, blur)
        share(d[:, v, recipe.SOLARIZE] == 1, solarize)
        sigma = d[:, v, recipe.SIGMA]
        assert sigma[sigma > 0].min() >= 0.1
        assert sigma.max() <= 2.0


@pytest.mark.parametrize("probability", [0.1, 0.5, 1.0])
def test_the_strength_of_a_blur_is_a_draw_of_its_own(probability: float):
    """DINO, utils.GaussianBlur: one random() says whether, then random.uniform(0.1, 2) how strong. So however rare the
    blur is, its sigma is uniform from 0.1 to 2: every fifth of that range has a fifth of the sigmas."""
    n = 20_000
    d = draw_color(hash64(3, np.arange(n)), Data(), [Views(1, 32, blur=[probability])])[:, 0, recipe.SIGMA]
    shares = np.histogram(d[d > 0], bins=5, range=(0.1, 2))[0] / (probability * n)
    assert np.abs(shares - 1 / 5).max() < 0.06  # their deviation is at most 0.01


def test_no_two_draws_of_a_view_go_together():
    """DINO, DataAugmentationDINO: torchvision's ColorJitter, RandomGrayscale, GaussianBlur and Solarization, each with
    random numbers of its own. The eight draws of a view are not correlated, nor with those of the next view."""
    data = Data()
    data.jitter.probability, data.grayscale = 1.0, 0.5  # what is always or never done would hide the others
    for blur in (0.5, 1.0):
        views = [Views(1, 32, blur=[blur], solarize=[0.5])] * 2
        d = draw_color(hash64(4, np.arange(10_000)), data, views).reshape(10_000, -1)
        others = np.corrcoef(d, rowvar=False) - np.eye(d.shape[1])
        assert np.abs(others).max() < 0.06  # six deviations


@pytest.mark.parametrize(
    "apply",
    [
        pytest.param(apply_color, id="torch"),
        pytest.param(
            numba_kernel.apply_color,
            id="numba",
            marks=pytest.mark.skipif(not numba_kernel.available, reason="numba is not installed"),
        ),
    ],
)
def test_a_blurred_view_is_solarized_after_it(apply: Callable[..., torch.Tensor]):
    """DINO, DataAugmentationDINO, second view: Compose([..., GaussianBlur(0.1), Solarization(0.2), normalize]).

    A black half beside a white one, blurred with sigma 1: s pixels away from the edge the dark side has the sum of the
    normal weights exp(-k^2 / 2) / sqrt(2 pi) for k >= s, which is 0.3005, 0.0586, 0.0046 and then nearly 0, the bright
    side 1 less that. Solarized then, both sides are the same; solarized first, all would be black.
    """
    picture = torch.zeros(1, 1, 16, 20, 3, dtype=torch.uint8)
    picture[..., 10:, :] = 255
    draws = torch.tensor(PLAIN).float()
    draws[recipe.SIGMA], draws[recipe.SOLARIZE] = 1, 1
    out = apply(picture, draws.view(1, 1, -1))[0, 0] * torch.tensor(IMAGENET.std).view(3, 1, 1) + torch.tensor(
        IMAGENET.mean
    ).view(3, 1, 1)
    dark = [0.0] * 6 + [0.0001, 0.0046, 0.0586, 0.3005]
    torch.testing.assert_close(out, torch.tensor(dark + dark[::-1]).expand(3, 16, 20), rtol=0, atol=1e-4)


@pytest.mark.skipif(not numba_kernel.available, reason="numba is not installed")
def test_the_cpu_form_is_equal():
    """The compiled loop beside the torch form, on the recipe's own draws: every order, blur and threshold."""
    views = [Views(1, 40, blur=[1.0]), Views(1, 40, blur=[0.1], solarize=[0.5]), Views(1, 40, blur=[0.5])]
    draws = torch.from_numpy(draw_color(hash64(0, np.arange(40)), Data(), views))
    pixels = pictures(120).view(40, 3, 3, 40, 40).permute(0, 1, 3, 4, 2).contiguous()
    ours, torchs = numba_kernel.apply_color(pixels, draws), apply_color(pixels, draws)
    assert ours.shape == torchs.shape == (3, 40, 3, 40, 40)
    # where a value lies within rounding of the solarize threshold the two may fall on either side of it
    assert ((ours - torchs).abs() > 1e-4).float().mean() < 1e-4
    odd = pixels[:2, :, :33, :21].contiguous()
    assert (numba_kernel.apply_color(odd, draws[:2]) - apply_color(odd, draws[:2])).abs().mean() < 1e-4
