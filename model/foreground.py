"""The foreground of an image, from what [CLS] attends to: Leopart (Ziegler & Asano 2022, section 3.2).

Letters: n images, H heads, g patches of a side, N = g*g patches.
"""

import torch
from torch import Tensor

from runtime.config import BLUR_RADIUS

SHARE = 0.6  # of the attention that lies on the foreground
SIGMA = 0.6  # of the blur, in patches


@torch.no_grad()
def foreground(attention: Tensor) -> Tensor:
    """Attention of [CLS] on the patches [n,H,N] -> bool [n,g,g].

    Mean over the heads, blur, then the largest values that together hold SHARE of the sum. Components of at most two patches
    (of eight neighbors each) are left out. All products are in float64: TF32 would move the threshold.
    """
    n, _, patches = attention.shape
    g = round(patches**0.5)
    mean = attention.double().mean(1).view(n, g, g)
    blur = _blur(g, mean.device)
    values, order = (blur @ mean @ blur.T).flatten(1).sort(dim=1, stable=True)
    # not torch.cumsum: on a GPU its order of additions may differ from run to run
    up_to = values @ torch.ones(patches, patches, dtype=values.dtype, device=values.device).triu()
    mask = torch.empty_like(values).scatter_(1, order, (up_to > (1 - SHARE) * up_to[:, -1:]).to(values.dtype))
    return without_small_components(mask.view(n, g, g) > 0)


def without_small_components(mask: Tensor) -> Tensor:
    """A mask [n,g,g] without its 8-connected components of one or two patches. These are the patches that neither have two
    neighbors in the mask nor touch a patch that has: no component is searched."""
    near = _near(mask.shape[-1], mask.device)

    def count(patches: Tensor) -> Tensor:
        """How many of each patch and its neighbors are in a mask."""
        return near @ patches.to(near.dtype) @ near

    inner = mask & (count(mask) >= 3)  # itself and two neighbors
    return mask & (count(inner) >= 1)


def _near(g: int, device: torch.device) -> Tensor:
    """[g,g]: 1 where two rows (or columns) of patches are the same or adjacent."""
    i = torch.arange(g, device=device)
    return ((i[:, None] - i).abs() <= 1).double()


def _blur(g: int, device: torch.device) -> Tensor:
    """[g,g]: one axis of a Gaussian blur of 2 * BLUR_RADIUS + 1 taps with reflected borders."""
    i, taps = torch.arange(g, device=device), torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=device)
    weights = (-0.5 * (taps.double() / SIGMA).square()).exp()
    source = (i[:, None] + taps).abs()
    source = (g - 1) - ((g - 1) - source).abs()  # [g,taps]
    return torch.zeros(g, g, dtype=weights.dtype, device=device).scatter_add_(
        1, source, (weights / weights.sum()).expand(g, -1)
    )
