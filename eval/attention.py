"""Attention weights of a ViT: what [CLS] and reference tokens take from the patches. Letters: n images, N patches, H heads,
R reference tokens of an image, d width of a head."""

from typing import Any

import torch
from torch import Tensor

from model.reference import locality_bias
from model.vit import ViT


@torch.no_grad()
def attention_weights(
    network: ViT, images: Tensor, points: Tensor | None = None, block: int | None = None
) -> tuple[Tensor, Tensor]:
    """Weights on the patches in one block: of [CLS] [n,H,N] and of the reference tokens at `points` [n,H,R,N].

    images: normalized, [n,3,h*p,w*p]; points [n,R,2]: (x, y) in the images' [0,1] frame; block counts from 1, by default the
    last one. What a row lacks to 1 is on the other tokens that its mode may attend to (`model/reference.py`): itself, [CLS],
    registers, or other reference tokens.
    """
    captured: list[Tensor] = []
    chosen: Any = network.blocks[block - 1 if block else -1]
    hook = chosen.attn.qkv.register_forward_hook(lambda module, inputs, qkv: captured.append(qkv))
    try:
        network(images, points)
    finally:
        hook.remove()
    n, references = len(images), 0 if points is None else points.shape[1]
    h, w = (side // network.patch for side in images.shape[2:])
    prefix = network.architecture.prefix  # [CLS] and registers
    image = prefix + h * w
    # the rows are all images' own tokens, then all their reference tokens
    of_images, of_references = captured[0].to(network.pos_embed.dtype).split([n * image, n * references])
    tokens = torch.cat([of_images.view(n, image, -1), of_references.view(n, references, of_images.shape[1])], 1)
    q, k, _ = tokens.unflatten(-1, (3, network.heads, -1)).permute(2, 0, 3, 1, 4)  # [n,H,P+N+R,d] each
    q, k = chosen.attn.q_norm(q), chosen.attn.k_norm(k)
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    if points is not None and network.locality is not None:
        scores[:, :, image:, prefix:image] += locality_bias(points, h, w, network.locality).to(scores)
    allowed = torch.zeros(image + references, image + references, dtype=torch.bool)  # [query, key]
    allowed[:, :image] = True
    if network.attention == "none":
        allowed[:] = True
    else:
        allowed[image:, 0 if network.attention != "patches+cls" else 1 : prefix] = False
        if network.attention in ("patches+self", "all_query"):
            allowed.fill_diagonal_(True)
    weights = scores.masked_fill(~allowed.to(scores.device), -torch.inf).softmax(-1)
    return weights[:, :, 0, prefix:image], weights[:, :, image:, prefix:image]


def distance_from_points(weights: Tensor, points: Tensor, h: int, w: int) -> Tensor:
    """Mean distance of attention from its point, in patches: [...,R].

    weights [...,R,N], of any sum; points [...,R,2]: (x, y) in the images' [0,1] frame.
    """
    x = torch.arange(w, device=weights.device) + 0.5
    y = torch.arange(h, device=weights.device) + 0.5
    dx, dy = points[..., 0, None] * w - x.repeat(h), points[..., 1, None] * h - y.repeat_interleave(w)
    return (weights * torch.hypot(dx, dy)).sum(-1) / weights.sum(-1)
