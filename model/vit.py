"""timm's ViT that takes points: images and points in; [CLS], patches and reference tokens out.

The parameters are timm's VisionTransformer's, by name and meaning, so a backbone file of ours is a timm file.
Letters: n images, N patches, D width, R reference tokens of an image, H heads.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.init import trunc_normal_
from torch.utils.checkpoint import checkpoint

from model.reference import attend, point_embedding, resize_grid
from runtime.config import Model

ARCHS = {"vit_tiny": (192, 12, 3), "vit_small": (384, 12, 6), "vit_base": (768, 12, 12)}  # width, depth, heads


class ViT(VisionTransformer):
    """A pre-norm ViT (DeiT's) whose forward pass also takes reference points.

    image_size: side of the images that the position grid is made for; other sizes resize it (`resize_grid`).
    attention, border: see `reference.attend`, `reference.point_embedding`.
    """

    cls_token: nn.Parameter  # [1,1,D]; optional in timm's class
    pos_embed: nn.Parameter  # [1,1+N,D]
    patch_embed: Any  # timm's PatchEmbed

    def __init__(
        self, *, width: int, depth: int, heads: int, patch: int, image_size: int, drop_path: float = 0.0,
        attention: str = "patches+self", border: str = "zeros",
    ):  # fmt: skip
        super().__init__(
            img_size=image_size, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads, num_classes=0,
            drop_path_rate=drop_path, weight_init="skip",
        )  # fmt: skip
        self.patch, self.width, self.heads, self.image_size = patch, width, heads, image_size
        self.attention, self.border = attention, border
        self.precision: torch.dtype | None = None  # of the products when it is evaluated; None: the device's best
        self.recompute = False  # activation checkpointing: blocks are computed again in the backward pass
        self._initialize()

    def _initialize(self) -> None:
        """Published initialization: normal(0.02) for tokens, positions and matrices; torch's own for the patch filter."""
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(  # type: ignore[override]
        self, images: Tensor, points: Tensor | list[Tensor] | None = None, patches_too: bool = True
    ) -> tuple[Tensor, Tensor | None, Any]:
        """images [n,3,h,w] normalized, h and w multiples of the patch; points [n,R,2], (x, y) in each view's [0,1] frame,
        or a list of them for consecutive runs of the images from the first on, [n_i,R_i,2] each.

        Returns, after the final norm: [CLS] [n,D], patches [n,N,D], reference tokens [n,R,D] (None without points; a list
        where points are one). patches_too=False (training, where patch tokens enter no loss): the last block works for
        the other tokens only, for which patches are keys and values; None is returned for them.
        """
        grid_side = self.image_size // self.patch
        grid = self.pos_embed[0, 1:].unflatten(0, (grid_side, grid_side))  # [g,g,D]
        pixels, filters, width = F.pixel_unshuffle(images, self.patch), self.patch_embed.proj, self.width
        n, _, h, w = pixels.shape  # [n,3*p*p,h/p,w/p]
        # a product instead of the convolution that it is, which takes up to four times as long when compiled for a CPU
        patches = F.linear(pixels.flatten(2).transpose(1, 2), filters.weight.flatten(1), filters.bias)  # [n,N,D]
        patches = patches + resize_grid(grid, h, w).flatten(0, 1)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(n, -1, -1)
        runs = points if isinstance(points, list) else [] if points is None else [points]
        # the token's content is its position; always read from the grid itself, whatever the view's size
        references = [point_embedding(grid, p, self.border) for p in runs]  # [n_i,R_i,D]
        # all tokens in one matrix: the image's [n,1+N], then each run's; every linear map is one product
        x = concat([torch.cat([cls, patches], 1).flatten(0, 1), *(r.flatten(0, 1) for r in references)])
        shapes = [(n, 1 + h * w), *((len(r), r.shape[1]) for r in references)]
        of_block = partial(checkpoint, self._block, use_reentrant=False) if self.recompute else self._block
        for block in self.blocks[:-1] if not patches_too else self.blocks:
            x = of_block(block, x, shapes, shapes)
        if not patches_too:
            asking = [(n, 1), *shapes[1:]]
            x, shapes = of_block(self.blocks[-1], x, shapes, asking), asking
        x = self.norm(x)
        image, *seen = (t.view(*shape, width) for t, shape in zip(split(x, shapes), shapes, strict=True))
        of_points = seen if isinstance(points, list) else seen[0] if seen else None
        return image[:, 0], image[:, 1:] if patches_too else None, of_points

    def _block(self, block: Any, x: Tensor, shapes: list[tuple[int, int]], asking: list[tuple[int, int]]) -> Tensor:
        """timm's block with our attention: tokens x [all, D], in parts of the given shapes (images, tokens of each).

        asking: the shapes of those that the block works for; all, or of the image [CLS] alone.
        """
        width, heads = x.shape[-1], block.attn.num_heads
        normed, qkv = block.norm1(x), block.attn.qkv
        if asking == shapes:
            keyed = split(qkv(normed), shapes)
            image, *references = (
                t.view(*shape, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind()
                for t, shape in zip(keyed, shapes, strict=True)
            )
        else:  # q for those who ask, k and v for all
            x, asked = _without_patches(x, shapes), _without_patches(normed, shapes)
            weight, bias = qkv.weight, qkv.bias
            q_parts = split(F.linear(asked, weight[:width], bias[:width]), asking)
            kv_parts = split(F.linear(normed, weight[width:], bias[width:]), shapes)
            image, *references = (
                (
                    q.view(*a, heads, -1).transpose(1, 2),
                    *kv.view(*shape, 2, heads, -1).permute(2, 0, 3, 1, 4).unbind(),
                )
                for q, kv, a, shape in zip(q_parts, kv_parts, asking, shapes, strict=True)
            )
        read = attend(image, references, self.attention)
        flat = concat([t.transpose(1, 2).reshape(-1, width) for t in read])
        x = _add(x, block.attn.proj(flat), block.drop_path1, asking)
        return _add(x, block.mlp(block.norm2(x)), block.drop_path2, asking)


def split(x: Tensor, shapes: list[tuple[int, int]]) -> tuple[Tensor, ...]:
    """Rows of x, part by part."""
    return x.split([n * tokens for n, tokens in shapes])


def concat(parts: list[Tensor]) -> Tensor:
    """Rows of all parts in one matrix. A single part is one: torch would copy it all the same."""
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _without_patches(x: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
    """Of all tokens, [CLS] and the reference tokens."""
    image, *references = split(x, shapes)
    return concat([image.view(*shapes[0], -1)[:, 0], *references])


def _add(x: Tensor, branch: Tensor, drop_path: nn.Module, shapes: list[tuple[int, int]]) -> Tensor:
    """x + branch, with drop path (Huang et al. 2016): a sample's draw covers all its tokens alike."""
    probability = getattr(drop_path, "drop_prob", 0.0) or 0.0
    if not probability or not drop_path.training:
        return x + branch
    n = shapes[0][0]
    kept = branch.new_empty(n, dtype=x.dtype).bernoulli_(1 - probability) / (1 - probability)  # [n]
    first, factors = 0, [kept.repeat_interleave(shapes[0][1])]
    for run, tokens in shapes[1:]:
        factors.append(kept[first : first + run].repeat_interleave(tokens))
        first += run
    return torch.addcmul(x, branch.to(x.dtype), torch.cat(factors)[:, None])


def build_vit(model: Model, image_size: int, attention: str, border: str, drop_path: float) -> ViT:
    """The ViT that a config's `model` names."""
    if model.arch == "custom":
        width, depth, heads = model.width or 0, model.depth or 0, model.heads or 0  # runtime/config.py asked for them
    else:
        width, depth, heads = ARCHS[model.arch]
    return ViT(
        width=width, depth=depth, heads=heads, patch=model.patch, image_size=image_size, drop_path=drop_path,
        attention=attention, border=border,
    )  # fmt: skip
