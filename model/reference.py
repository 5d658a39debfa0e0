"""Reference tokens: a point becomes a token, and which tokens attend to which. Paper section 3.2.

Letters: n images (views), N patches, D width, R reference tokens of an image, H heads, d = D/H, P tokens in front of the
patches: [CLS] and the registers, if the ViT has some.
Token order: [CLS], registers, patches, reference tokens.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MODES = ("none", "patches+cls", "patches", "patches+self", "all_query")


def _cubic(t: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -3/4, as in torch's bicubic resize and grid_sample."""
    a = -0.75
    t = t.abs()
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return torch.where(t <= 1, near, torch.where(t < 2, far, torch.zeros_like(t)))


def _bicubic_weights(position: Tensor, cells: int, border: str) -> Tensor:
    """Interpolation weights of `cells` cells at relative positions [...] -> [..., cells].

    The center of cell i is at (i + 1/2) / cells: positions run from edge to edge. border "zeros": the grid is zero outside,
    so within half a cell of the edge the weights sum to less than 1 (published code). "border": the outermost cell repeats
    outside.
    """
    at = position.unsqueeze(-1) * cells - 0.5
    if border == "zeros":
        return _cubic(at - torch.arange(cells, device=at.device, dtype=at.dtype))
    # the four cells around the position; the weight of one outside the grid goes to the outermost cell
    neighbors = at.floor() - 1 + torch.arange(4, device=at.device, dtype=at.dtype)
    weights = torch.zeros(*position.shape, cells, device=at.device, dtype=at.dtype)
    return weights.scatter_add(-1, neighbors.clamp(0, cells - 1).long(), _cubic(at - neighbors))


def point_embedding(grid: Tensor, points: Tensor, border: str = "zeros") -> Tensor:
    """The point position embedding: bicubic interpolation of the position grid at points.

    grid [h,w,D]: the position embedding of the patches. points [n,R,2]: (x, y) in the view's own [0,1] frame. Returns
    [n,R,D]. Computed as dense weights [R,h*w] times the grid: the backward pass is a matrix product too, without atomic
    additions, so it is deterministic.
    """
    h, w, _ = grid.shape
    with torch.no_grad():
        points = points.to(grid.dtype)
        weights_x = _bicubic_weights(points[..., 0], w, border)  # [n,R,w]
        weights_y = _bicubic_weights(points[..., 1], h, border)  # [n,R,h]
        weights = (weights_y.unsqueeze(-1) * weights_x.unsqueeze(-2)).flatten(-2)  # [n,R,h*w]
    # positions must not be rounded: neither autocast nor TF32 applies to a product in float64, forward or backward
    return (weights.double() @ grid.flatten(0, 1).double()).to(grid.dtype)


def locality_bias(points: Tensor, h: int, w: int, sigma: float) -> Tensor:
    """A Gaussian prior on what a reference token attends to, as a bias of its attention's logits.

    points [n,R,2]: (x, y) in the view's [0,1] frame -> [n,1,R,h*w], the same for all heads: -||point - center of the
    patch||^2 / (2 sigma^2), in patches. No part of the paper, which names it as future work (section 5); sigma -> inf is the
    published method.
    """
    at = points.double()
    columns, rows = (torch.arange(cells, device=at.device) + 0.5 for cells in (w, h))
    dx, dy = at[..., :1] * w - columns, at[..., 1:] * h - rows  # [n,R,w], [n,R,h]
    squared = dy.square().unsqueeze(-1) + dx.square().unsqueeze(-2)
    return (squared / (-2 * sigma**2)).flatten(-2).unsqueeze(1)


def resize_grid(grid: Tensor, h: int, w: int) -> Tensor:
    """The position grid [gh,gw,D] for h x w patches -> [h,w,D], bicubic as in DINO: the sampling scale is (h + 0.1) / gh,
    edges are clamped (published code, VT:189). A grid of the right size is returned unchanged."""
    gh, gw, _ = grid.shape
    if torch.compiler.is_exporting():  # there h and w may have no values yet
        return _resize_in_graph(grid, h, w)
    if (gh, gw) == (h, w):
        return grid
    scale = ((h + 0.1) / gh, (w + 0.1) / gw)
    resized = F.interpolate(grid.permute(2, 0, 1)[None], scale_factor=scale, mode="bicubic")
    return resized[0].permute(1, 2, 0)


def _resize_in_graph(grid: Tensor, h: int, w: int) -> Tensor:
    """`resize_grid` for any h and w in one graph: products with the weights of the cells."""
    gh, gw, _ = grid.shape
    rows, columns = (torch.arange(n, device=grid.device, dtype=torch.float64) for n in (h, w))
    tall, wide = rows[-1] + 1, columns[-1] + 1
    more = 0.1 * ((tall != gh) | (wide != gw))  # a grid of the right size is not resized
    weights_y = _bicubic_weights((rows + 0.5) / (tall + more), gh, "border").to(grid.dtype)  # [h,gh]
    weights_x = _bicubic_weights((columns + 0.5) / (wide + more), gw, "border").to(grid.dtype)  # [w,gw]
    return torch.einsum("yg,xk,gkd->yxd", weights_y, weights_x, grid)


QKV = tuple[Tensor, ...]  # q, k, v of some tokens, each [n,H,tokens,d]


class Group(NamedTuple):
    """Consecutive images with equally many reference tokens."""

    tokens: QKV  # of the reference tokens
    k: Tensor  # [n_i,H,P+N,d] of the images' own tokens
    v: Tensor
    bias: Tensor | None  # [n_i,1,R_i,N], or H for 1


def attend(
    image: QKV, references: list[QKV], mode: str, biases: list[Tensor] | None = None, prefix: int = 1
) -> list[Tensor]:
    """Attention of n images' own tokens (q, k, v [n,H,P+N,d]; prefix: P) and of their reference tokens.

    references: q, k, v [n_i,H,R_i,d] for consecutive groups of images, starting at the first image. Images after the last
    group have no reference tokens. biases [n_i,1,R_i,N] or [n_i,H,R_i,N]: of each group, added to the logits of its
    reference tokens over the patches (`locality_bias`); only in the modes whose name begins with "patches".
    Returns the outputs: of the image tokens [n,H,P+N,d], whole or split into consecutive images, then of each group's
    reference tokens [n_i,H,R_i,d]. The image's q may be that of [CLS] alone, [n,H,1,d] (last block, if no patch tokens are
    wanted).

    patches+cls    [CLS] and patches attend to each other; reference tokens attend to both, and no token to them (the paper)
    patches        reference tokens attend to the patches only
    patches+self   reference tokens attend to the patches and to themselves (the published command's mask)
    none           every token attends to every token
    all_query      patches attend to patches; [CLS] and each reference token attend to the patches and to themselves

    Registers (Darcet et al. 2024) are no part of these methods: [CLS], registers and patches attend to each other as in
    timm, and a reference token attends to registers in mode none only. In all_query registers count as patches for the
    image's own tokens: only [CLS] is left out of the keys of others.

    Tokens that no query may attend to are left out of the keys: no mask is built. Equal to the masked form
    (tests/test_reference.py).
    """
    q, k, v = image
    each_bias = [None] * len(references) if biases is None else [b.to(q.dtype) for b in biases]
    groups = [Group(*group) for group in zip(references, *_split_groups(k, v, references), each_bias, strict=True)]
    if mode == "none":
        return full_attention(q, groups) if groups else [attention(q, k, v)]
    if mode == "all_query":
        cls = attention(q[:, :, :1], k, v)
        out = torch.cat([cls, attention(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:])], 2) if q.shape[2] > 1 else cls
    elif mode == "patches+self" and groups and _use_unfused(q):
        return fused_reference_attention(q, k, v, groups, prefix)
    else:
        out = attention(q, k, v)
    if mode == "patches+cls":  # no bias for [CLS]
        padded = [None if g.bias is None else F.pad(g.bias, (1, 0)) for g in groups]
        keys = [(_without_registers(g.k, prefix), _without_registers(g.v, prefix)) for g in groups]
        return [out, *(attention(g.tokens[0], *kv, b) for g, kv, b in zip(groups, keys, padded, strict=True))]
    if mode == "patches":
        return [out, *(attention(g.tokens[0], g.k[:, :, prefix:], g.v[:, :, prefix:], g.bias) for g in groups)]
    return [out, *(_patches_and_self(g.tokens[0][:, :, :0], g, prefix)[1] for g in groups)]


def _without_registers(t: Tensor, prefix: int) -> Tensor:
    """[n,H,P+N,d] -> [n,H,1+N,d]."""
    return t if prefix == 1 else torch.cat([t[:, :, :1], t[:, :, prefix:]], 2)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v with the fastest implementation for the device. [n,H,a,d] x [n,H,b,d] -> [n,H,a,d].
    bias: [n,1,a,b].

    The choice was measured beforehand (docs/lab/2026-11.md, "Attention's form"), not at start-up: torch's fused attention
    everywhere except on a CPU in bfloat16, where the unfused one takes 0.4 of its time.
    """
    if not _use_unfused(q):
        return F.scaled_dot_product_attention(q, k, v, bias)
    scores = _scores(q, k)
    return apply_weights((scores if bias is None else scores + bias).softmax(-1), v)


def _use_unfused(q: Tensor) -> bool:
    return q.device.type == "cpu" and q.dtype == torch.bfloat16


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q k^T / sqrt(d), [n,H,a,d] x [n,H,b,d] -> [n,H,a,b]."""
    unused, scale = q.new_zeros(1, 1, 1), q.shape[-1] ** -0.5
    scores = torch.baddbmm(unused, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), beta=0, alpha=scale)
    return scores.unflatten(0, q.shape[:2])


def apply_weights(weights: Tensor, v: Tensor) -> Tensor:
    """[n,H,a,b] x [n,H,b,d] -> [n,H,a,d]."""
    return torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).unflatten(0, v.shape[:2])


def _split_groups(k: Tensor, v: Tensor, references: list[QKV]) -> list[tuple[Tensor, ...]]:
    """Keys and values of each group's images."""
    sizes = [len(q) for q, _, _ in references]
    return [t[: sum(sizes)].split(sizes) if sizes else () for t in (k, v)]


def full_attention(q: Tensor, groups: list[Group]) -> list[Tensor]:
    """Image and reference tokens in one attention, group by group."""
    images, references, first = [], [], 0
    for (q_ref, k_ref, v_ref), k_i, v_i, _ in groups:
        q_image = q[first : first + len(q_ref)]
        first += len(q_ref)
        keys, values = torch.cat([k_i, k_ref], 2), torch.cat([v_i, v_ref], 2)
        out = attention(torch.cat([q_image, q_ref], 2), keys, values)
        images.append(out[:, :, : q_image.shape[2]])
        references.append(out[:, :, q_image.shape[2] :])
    return images + references


def fused_reference_attention(q: Tensor, k: Tensor, v: Tensor, groups: list[Group], prefix: int) -> list[Tensor]:
    """Mode patches+self of `attend` where attention is unfused: the queries of an image's own tokens and of its reference
    tokens are rows of one product, instead of two extra small products (docs/lab/2026-11.md, "The references' attention").
    """
    images, references, first = [], [], 0
    for group in groups:
        out, out_ref = _patches_and_self(q[first : first + len(group.k)], group, prefix)
        first += len(group.k)
        images.append(out)
        references.append(out_ref)
    if first < len(q):
        images.append(attention(q[first:], k[first:], v[first:]))
    return images + references


def _patches_and_self(q_image: Tensor, group: Group, prefix: int) -> tuple[Tensor, Tensor]:
    """Unfused attention of a group's reference tokens to the patches and to themselves.

    Reference tokens may not attend to [CLS] and registers: one column, of the token's own key and value, replaces theirs.
    q_image [n,H,a,d], a may be 0: queries that attend to all of k in the same product.
    Returns the outputs of q_image [n,H,a,d] and of the reference tokens [n,H,R,d].
    """
    (q, k_self, v_self), k, v, bias = group
    counts = [q_image.shape[2], q.shape[2]]
    scores_image, scores = _scores(torch.cat([q_image, q], 2), k).split(counts, 2)
    score_self = (q * k_self).sum(-1, keepdim=True) * q.shape[-1] ** -0.5  # [n,H,R,1]
    scores = scores[..., prefix:] if bias is None else scores[..., prefix:] + bias
    probabilities = torch.cat([score_self, scores], -1).softmax(-1)
    weights = torch.cat([scores_image.softmax(-1), F.pad(probabilities[..., 1:], (prefix, 0))], 2)
    out, out_patches = apply_weights(weights, v).split(counts, 2)
    return out, out_patches + probabilities[..., :1] * v_self
