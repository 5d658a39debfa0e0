"""A point becomes a token; who may attend to whom. Paper section 3.2.

Letters: n images (views), N patches, D width, R reference tokens of an image, H heads, d = D/H.
Tokens stand in the order [CLS], patches, reference tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MODES = ("none", "patches+cls", "patches", "patches+self", "all_query")


def _cubic(t: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -3/4, as torch's bicubic resize and grid_sample use it."""
    a = -0.75
    t = t.abs()
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return torch.where(t <= 1, near, torch.where(t < 2, far, torch.zeros_like(t)))


def _reading_weights(position: Tensor, cells: int, border: str) -> Tensor:
    """What each of `cells` cells counts for readings at relative positions [...] -> [..., cells].

    A cell's centre is at (i + 1/2) / cells: positions are edge to edge. zeros: outside the grid there is nothing, so within
    half a cell of the edge the weights sum to less than 1 (published). border: outside lies the outermost cell again.
    """
    at = position.unsqueeze(-1) * cells - 0.5
    if border == "zeros":
        return _cubic(at - torch.arange(cells, device=at.device, dtype=at.dtype))
    # the four cells around the reading, those outside counted for the outermost
    first = at.floor() - 1 + torch.arange(4, device=at.device, dtype=at.dtype)
    weights = torch.zeros(*position.shape, cells, device=at.device, dtype=at.dtype)
    return weights.scatter_add(-1, first.clamp(0, cells - 1).long(), _cubic(at - first))


def point_embedding(grid: Tensor, points: Tensor, border: str = "zeros") -> Tensor:
    """The point position embedding: the position grid read at points, bicubic.

    grid [h,w,D]: the patches' position embedding; points [n,R,2]: (x, y) in the view's own [0,1] frame -> [n,R,D].
    A dense reading, weights [R,h] x [R,w] times the grid: the backward pass is a matrix product too, without atomic
    additions, so it is the same on every run.
    """
    h, w, _ = grid.shape
    with torch.no_grad():
        points = points.to(grid.dtype)
        across = _reading_weights(points[..., 0], w, border)  # [n,R,w]
        down = _reading_weights(points[..., 1], h, border)  # [n,R,h]
        weights = (down.unsqueeze(-1) * across.unsqueeze(-2)).flatten(-2)  # [n,R,h*w]
    with torch.autocast(grid.device.type, enabled=False):  # a position is not to be rounded
        return weights @ grid.flatten(0, 1)


def resize_grid(grid: Tensor, h: int, w: int) -> Tensor:
    """The position grid [gh,gw,D] for h x w patches, bicubic as DINO does it: the sampling scale is (h + 0.1) / gh, edges
    clamped (published code, VT:189). The grid's own size is returned untouched."""
    gh, gw, _ = grid.shape
    if (gh, gw) == (h, w):
        return grid
    scale = ((h + 0.1) / gh, (w + 0.1) / gw)
    resized = F.interpolate(grid.permute(2, 0, 1)[None], scale_factor=scale, mode="bicubic")
    return resized[0].permute(1, 2, 0)


def attend(q: Tensor, k: Tensor, v: Tensor, references: int, mode: str) -> Tensor:
    """Attention of n images' tokens: q, k, v [n,H,1+N+R,d], the last R of them reference tokens -> [n,H,1+N+R,d].

    patches+cls    [CLS] and patches attend to each other; reference tokens attend to them, unseen by all (the paper)
    patches        reference tokens attend to the patches only
    patches+self   reference tokens attend to the patches and to themselves (the published command's mask)
    none           everybody attends to everybody
    all_query      patches attend to patches; [CLS] and each reference token to the patches and to itself

    What nobody may see is left out of the keys: no mask is built. Equal to the masked form (tests/test_reference.py).
    """
    image = q.shape[2] - references  # 1 + N
    if mode == "none":
        return F.scaled_dot_product_attention(q, k, v)
    if mode == "patches+cls":
        return F.scaled_dot_product_attention(q, k[:, :, :image], v[:, :, :image])
    if mode == "all_query":
        patches = F.scaled_dot_product_attention(q[:, :, 1:image], k[:, :, 1:image], v[:, :, 1:image])
        asking = [torch.cat([t[:, :, :1], t[:, :, image:]], 2) for t in (q, k, v)]
        alone = _patches_and_self(asking, k[:, :, 1:image], v[:, :, 1:image])
        return torch.cat([alone[:, :, :1], patches, alone[:, :, 1:]], 2)
    seen = F.scaled_dot_product_attention(q[:, :, :image], k[:, :, :image], v[:, :, :image])
    if references == 0:
        return seen
    asking = [t[:, :, image:] for t in (q, k, v)]
    patch_k, patch_v = k[:, :, 1:image], v[:, :, 1:image]
    if mode == "patches":
        read = F.scaled_dot_product_attention(asking[0], patch_k, patch_v)
    else:
        read = _patches_and_self(asking, patch_k, patch_v)
    return torch.cat([seen, read], 2)


def _patches_and_self(asking: list[Tensor], patch_k: Tensor, patch_v: Tensor) -> Tensor:
    """Tokens with q, k, v [n,H,R,d] attend to the patches [n,H,N,d] and to themselves: a few rows of plain attention."""
    q, k, v = asking
    scale = q.shape[-1] ** -0.5
    to_patches = (q * scale) @ patch_k.transpose(-2, -1)  # [n,H,R,N]
    to_self = (q * scale * k).sum(-1, keepdim=True)  # [n,H,R,1]
    weights = torch.cat([to_patches, to_self], -1).softmax(-1)
    return weights[..., :-1] @ patch_v + weights[..., -1:] * v
