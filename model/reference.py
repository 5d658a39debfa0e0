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

    A cell's center is at (i + 1/2) / cells: positions are edge to edge. zeros: outside the grid there is nothing, so within
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
    # A position is not to be rounded: neither autocast nor TF32 touch a product in float64, forward or backward
    return (weights.double() @ grid.flatten(0, 1).double()).to(grid.dtype)


def resize_grid(grid: Tensor, h: int, w: int) -> Tensor:
    """The position grid [gh,gw,D] for h x w patches, bicubic as DINO does it: the sampling scale is (h + 0.1) / gh, edges
    clamped (published code, VT:189). The grid's own size is returned untouched."""
    gh, gw, _ = grid.shape
    if (gh, gw) == (h, w):
        return grid
    scale = ((h + 0.1) / gh, (w + 0.1) / gw)
    resized = F.interpolate(grid.permute(2, 0, 1)[None], scale_factor=scale, mode="bicubic")
    return resized[0].permute(1, 2, 0)


Heads = tuple[Tensor, ...]  # q, k, v of some tokens, each [n,H,tokens,d]


def attend(image: Heads, references: list[Heads], mode: str) -> list[Tensor]:
    """Attention of n images' [CLS] and patches (q, k, v [n,H,1+N,d]) and of their reference tokens.

    references: q, k, v [n_i,H,R_i,d] for consecutive runs of the images, from the first on; images after the last run have
    no reference tokens.
    Returns what was read: by the images' tokens [n,H,1+N,d], in one piece or some images after the others, then by each
    run's reference tokens [n_i,H,R_i,d]. The image's q may be [CLS]'s alone [n,H,1,d] (the last block of training, where
    nobody asks for the patches).

    patches+cls    [CLS] and patches attend to each other; reference tokens attend to them, unseen by all (the paper)
    patches        reference tokens attend to the patches only
    patches+self   reference tokens attend to the patches and to themselves (the published command's mask)
    none           everybody attends to everybody
    all_query      patches attend to patches; [CLS] and each reference token to the patches and to itself

    What nobody may see is left out of the keys: no mask is built. Equal to the masked form (tests/test_reference.py).
    """
    q, k, v = image
    runs = [(a, k_run, v_run) for a, k_run, v_run in zip(references, *_in_runs(k, v, references), strict=True)]
    if mode == "none":
        return full_attention(q, runs) if runs else [attention(q, k, v)]
    patch_k, patch_v = k[:, :, 1:], v[:, :, 1:]
    if mode == "all_query":
        cls = attention(q[:, :, :1], k, v)
        read = torch.cat([cls, attention(q[:, :, 1:], patch_k, patch_v)], 2) if q.shape[2] > 1 else cls
    elif mode == "patches+self" and runs and _is_plain(q):
        return fused_reference_attention(q, k, v, runs)
    else:
        read = attention(q, k, v)
    if mode == "patches+cls":
        return [read, *(attention(a[0], k_run, v_run) for a, k_run, v_run in runs)]
    if mode == "patches":
        return [read, *(attention(a[0], k_run[:, :, 1:], v_run[:, :, 1:]) for a, k_run, v_run in runs)]
    return [read, *(_patches_and_self(a[0][:, :, :0], a, k_run, v_run)[1] for a, k_run, v_run in runs)]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, in the form that is fastest where it runs. [n,H,a,d] x [n,H,b,d] -> [n,H,a,d].

    Measured beforehand, never at start-up (docs/benchmarks.md, "Attention's form"): the fused form everywhere, but on a
    CPU in bfloat16, where the plain one takes 0.4 of its time.
    """
    if not _is_plain(q):
        return F.scaled_dot_product_attention(q, k, v)
    return apply_weights(_scores(q, k).softmax(-1), v)


def _is_plain(q: Tensor) -> bool:
    return q.device.type == "cpu" and q.dtype == torch.bfloat16


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q k^T / sqrt(d), [n,H,a,d] x [n,H,b,d] -> [n,H,a,b]."""
    nothing, scale = q.new_zeros(1, 1, 1), q.shape[-1] ** -0.5
    scores = torch.baddbmm(nothing, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), beta=0, alpha=scale)
    return scores.unflatten(0, q.shape[:2])


def apply_weights(weights: Tensor, v: Tensor) -> Tensor:
    """[n,H,a,b] x [n,H,b,d] -> [n,H,a,d]."""
    return torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).unflatten(0, v.shape[:2])


def _in_runs(k: Tensor, v: Tensor, references: list[Heads]) -> list[tuple[Tensor, ...]]:
    """Keys and values of the images of each run."""
    sizes = [len(q) for q, _, _ in references]
    return [t[: sum(sizes)].split(sizes) if sizes else () for t in (k, v)]


def full_attention(q: Tensor, runs: list[tuple[Heads, Tensor, Tensor]]) -> list[Tensor]:
    """Image and reference tokens in one attention, run by run."""
    images, others, first = [], [], 0
    for (q_ref, k_ref, v_ref), k_run, v_run in runs:
        asking = q[first : first + len(q_ref)]
        first += len(q_ref)
        keys, values = torch.cat([k_run, k_ref], 2), torch.cat([v_run, v_ref], 2)
        read = attention(torch.cat([asking, q_ref], 2), keys, values)
        images.append(read[:, :, : asking.shape[2]])
        others.append(read[:, :, asking.shape[2] :])
    return images + others


def fused_reference_attention(
    q: Tensor, k: Tensor, v: Tensor, runs: list[tuple[Heads, Tensor, Tensor]]
) -> list[Tensor]:
    """attend's patches+self where attention is plain: what an image's own tokens and its reference tokens ask are rows of
    one product, instead of two small products of their own beside it (docs/benchmarks.md, "The references' attention")."""
    images, others, first = [], [], 0
    for asking, k_run, v_run in runs:
        read, of_references = _patches_and_self(q[first : first + len(k_run)], asking, k_run, v_run)
        first += len(k_run)
        images.append(read)
        others.append(of_references)
    if first < len(q):
        images.append(attention(q[first:], k[first:], v[first:]))
    return images + others


def _patches_and_self(of_image: Tensor, asking: Heads, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Plain attention of a few tokens with q, k, v [n,H,R,d] to the patches and to themselves.

    k, v [n,H,1+N,d] are the image's whole, as its own attention takes them: in the place of [CLS], which is not seen,
    stand a token's own key and value. of_image [n,H,a,d], a may be 0: queries that go along and attend to all of k.
    Returns what those read [n,H,a,d], and these [n,H,R,d].
    """
    q, own_k, own_v = asking
    parts = [of_image.shape[2], q.shape[2]]
    many, few = _scores(torch.cat([of_image, q], 2), k).split(parts, 2)
    to_self = (q * own_k).sum(-1, keepdim=True) * q.shape[-1] ** -0.5  # [n,H,R,1]
    few = torch.cat([to_self, few[..., 1:]], -1).softmax(-1)
    weights = torch.cat([many.softmax(-1), F.pad(few[..., 1:], (1, 0))], 2)
    read, of_patches = apply_weights(weights, v).split(parts, 2)
    return read, of_patches + few[..., :1] * own_v
