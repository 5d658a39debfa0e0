"""Two views of an image read on one grid of bins in their overlap: RoIAlign (He et al. 2017, section 3) as a product with
two dense matrices. No atomic additions: the backward pass is deterministic.

Letters: B images, V views, T teacher views (the first of the V), h x w patches of a view, C channels of a map.
"""

import torch
from torch import Tensor

BINS = 7  # of a side of an overlap (Leopart)


class Overlaps:
    """The overlaps of each teacher view's window with each view's. windows [B,V,4]: signed, in source pixels."""

    def __init__(self, windows: Tensor, teachers: int):
        windows = windows.long()
        self.start, self.end = windows[..., :2], windows[..., 2:]  # [B,V,2(x,y)]
        low, high = torch.minimum(self.start, self.end), torch.maximum(self.start, self.end)
        self.low = torch.maximum(low[:, :teachers, None], low[:, None])  # [B,T,V,2]
        self.high = torch.minimum(high[:, :teachers, None], high[:, None])

    def read_teachers(self, maps: Tensor) -> Tensor:
        """Maps of the teacher views [T,B,h,w,C], each in its overlap with every view: [B,T,V,BINS,BINS,C]."""
        teachers = len(maps)
        start, end = self.start[:, :teachers, None], self.end[:, :teachers, None]
        return _read("t", maps, start, end, self.low, self.high)

    def read_views(self, maps: Tensor, views: slice) -> Tensor:
        """Maps of some views [Vg,B,h,w,C], each in its overlap with every teacher view: [B,T,Vg,BINS,BINS,C]."""
        start, end = self.start[:, None, views], self.end[:, None, views]
        return _read("v", maps, start, end, self.low[:, :, views], self.high[:, :, views])


def _read(owner: str, maps: Tensor, start: Tensor, end: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """owner: the letter of the maps' first axis, t or v. The bins' rows go from the top of the source, and columns from its
    left."""
    columns, rows = (
        axis_weights(start[..., axis], end[..., axis], low[..., axis], high[..., axis], patches).to(maps.dtype)
        for axis, patches in ((0, maps.shape[3]), (1, maps.shape[2]))
    )
    read = torch.einsum(f"btvix,{owner}byxc->btvyic", columns, maps)
    return torch.einsum("btvjy,btvyic->btvjic", rows, read)


def axis_weights(start: Tensor, end: Tensor, low: Tensor, high: Tensor, patches: int) -> Tensor:
    """The matrix that reads one axis of a view's map in an overlap: float64 [...,BINS,patches]. Its rows sum to 1.

    start, end [...]: of the view's window, in source pixels, signed (start > end: flipped; then it reads backward). low,
    high [...]: of the overlap.

        s = ceil(the overlap's side in patches / BINS)    samples of a bin, which is their mean
        sample m of bin j lies at (j + (m + 1/2) / s) / BINS of the overlap, and is linear between the centers of two patches
    """
    most = -(-patches // BINS)
    side, window = high - low, (end - start).abs()
    # in integers: RoIAlign's number of samples jumps at a side of exactly BINS patches
    samples = -(-side * patches).div(BINS * window, rounding_mode="floor")
    samples = samples.clamp(1, most).double()[..., None, None]  # [...,1,1]
    bins, m = (torch.arange(n, device=start.device) for n in (BINS, most))
    u = (bins[:, None] + (m + 0.5) / samples) / BINS  # [...,BINS,most]
    start, end, low, side = (x[..., None, None] for x in (start, end, low, side))
    at = ((low + u * side - start) / (end - start) * patches - 0.5).clamp(0, patches - 1)
    hat = 1 - (at[..., None] - torch.arange(patches, device=at.device)).abs()  # [...,BINS,most,patches]
    return (hat.clamp(min=0) * ((m < samples) / samples)[..., None]).sum(-2)
