"""timm's ViT that also takes points. In: images and points. Out: [CLS], patch tokens and reference tokens.

The parameters have the names and meaning of timm's VisionTransformer, so timm loads a backbone file of ours.
Letters: n images, N patches, D width, R reference tokens of an image, H heads, P tokens in front of the patches ([CLS] and
registers).
"""

from collections.abc import Collection
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.init import trunc_normal_
from torch.utils.checkpoint import checkpoint

from model.architecture import ROTARY, Architecture, architecture
from model.backbone import Backbone, Tokens
from model.reference import attend, locality_bias, point_embedding, resize_grid
from model.rotary import Rotary
from runtime.config import Config
from runtime.errors import UserError
from runtime.pixels import Pixels, usual

# What each image's attention and MLP branch is multiplied by, [n] each: 0, or 1 / (1 - rate). None: nothing is dropped
Scales = tuple[Tensor | None, Tensor | None]


class ViT(VisionTransformer, Backbone):
    """A ViT whose forward pass also takes reference points. By default DeiT's pre-norm ViT.

    image_size: side of the images that the position grid is made for; it is resized for others (`resize_grid`).
    attention, border, locality: see `reference.attend`, `reference.point_embedding`, `reference.locality_bias`.
    pixels: what it takes of a photo; by default what is usual.
    options: those of `Architecture`; width, depth, heads and patch are needed.
    """

    cls_token: nn.Parameter  # [1,1,D]; optional in timm's class
    pos_embed: nn.Parameter  # [1,P+N,D], or [1,N,D]
    patch_embed: Any  # timm's PatchEmbed

    def __init__(
        self, *, image_size: int, drop_path: float = 0.0, attention: str = "patches+self", border: str = "zeros",
        locality: float | None = None, pixels: Pixels | None = None, **options: Any,
    ):  # fmt: skip
        a = Architecture(**options)
        super().__init__(
            img_size=image_size, num_classes=0, drop_path_rate=drop_path, weight_init="skip", **a.for_timm(),
            **a.modules(),
        )  # fmt: skip
        self.architecture, self.pixels = a, pixels or usual(a.channels)
        self.patch, self.width, self.heads, self.image_size = a.patch, a.width, a.heads, image_size
        self.front_positions = a.prefix * a.class_position  # how many of pos_embed are not the patches'
        self.attention, self.border, self.locality = attention, border, locality
        self.activation_checkpointing = False  # compute each block again in the backward pass
        self._initialize()

    def _initialize(self) -> None:
        """Published initialization: normal(0.02) for tokens, positions and matrices; torch's own for the patch filter.
        Registers as DINOv2's: nearly 0."""
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.reg_token is not None:
            nn.init.normal_(self.reg_token, std=1e-6)

    def forward(  # type: ignore[override]
        self,
        images: Tensor,
        points: Tensor | list[Tensor] | None = None,
        want: Collection[str] = ("cls", "patches"),
        drop: Tensor | None = None,
    ) -> Tokens:
        """images [n,C,h,w] normalized, h and w multiples of the patch size. points [n,R,2]: (x, y) in each view's [0,1]
        frame, or a list of them for consecutive groups of images, starting at the first image, [n_i,R_i,2] each.

        want: "cls", and perhaps "patches" and "attention". Without "patches" (training, if no loss uses patch tokens) the
        last block computes outputs for [CLS] and reference tokens only; the patches are still its keys and values.
        Reference tokens are returned if points are given.
        drop [n,depth,2]: numbers in [0, 1) that decide which branches drop path leaves out, in training (drop_path.draw);
        without them they come from torch's generator.
        """
        grid_side = self.image_size // self.patch
        prefix, own = self.architecture.prefix, self.front_positions
        grid = self.pos_embed[0, own:].unflatten(0, (grid_side, grid_side))  # [g,g,D]
        pixels, filters, width = F.pixel_unshuffle(images, self.patch), self.patch_embed.proj, self.width
        n, _, h, w = pixels.shape  # [n,C*p*p,h/p,w/p]
        # a matrix product equal to the convolution, which takes up to four times as long when compiled for a CPU
        patches = F.linear(pixels.flatten(2).transpose(1, 2), filters.weight.flatten(1), filters.bias)  # [n,N,D]
        patches = patches + resize_grid(grid, h, w).flatten(0, 1)
        front = self.cls_token if self.reg_token is None else torch.cat([self.cls_token, self.reg_token], 1)
        front = (front + self.pos_embed[:, :own] if own else front).expand(n, -1, -1)  # [n,P,D]
        groups = points if isinstance(points, list) else [] if points is None else [points]
        # a reference token's content is its position, always interpolated from the grid itself, whatever the view's size
        references = [point_embedding(grid, p, self.border) for p in groups]  # [n_i,R_i,D]
        sigma = self.locality
        biases = None if sigma is None else [locality_bias(p, h, w, sigma) for p in groups]
        # all tokens in one matrix: the images' [n,P+N], then each group's; each linear map is one product
        x = concat([torch.cat([front, patches], 1).flatten(0, 1), *(r.flatten(0, 1) for r in references)])
        x = self.norm_pre(x)
        shapes = [(n, prefix + h * w), *((len(r), r.shape[1]) for r in references)]
        branch_scales = self._drop_path(n, drop)
        run_block = self._block
        if self.activation_checkpointing:
            run_block = partial(checkpoint, self._block, use_reentrant=False)
        with_patches, attention = "patches" in want, None
        for i, block in enumerate(self.blocks):
            query_shapes = shapes
            if i == len(self.blocks) - 1:
                if "attention" in want:
                    attention = cls_attention(block, split(x, shapes)[0].view(n, -1, width), prefix)  # [n,H,N]
                if not with_patches:
                    query_shapes = [(n, 1), *shapes[1:]]
            x, shapes = run_block(block, x, shapes, query_shapes, branch_scales[i], biases), query_shapes
        x = self.norm(x)
        image, *outputs = (t.view(*shape, width) for t, shape in zip(split(x, shapes), shapes, strict=True))
        of_points = outputs if isinstance(points, list) else outputs[0] if outputs else None
        return Tokens(image[:, 0], image[:, prefix:] if with_patches else None, of_points, attention)

    def about(self) -> dict[str, Any]:
        names = ("heads", "attention", "border", "locality")
        return super().about() | self.architecture.not_in_tensors() | {name: getattr(self, name) for name in names}

    def _drop_path(self, n: int, draws: Tensor | None) -> list[Scales]:
        """For each block, what its two branches are multiplied by (Huang et al. 2016)."""
        rates = [getattr(block.drop_path1, "drop_prob", 0.0) * self.training for block in self.blocks]
        if not any(rates):
            return [(None, None)] * len(rates)
        if draws is None:
            draws = torch.rand(n, len(rates), 2, device=self.cls_token.device)
        dtype, scales = self.cls_token.dtype, list[Scales]()
        for i, rate in enumerate(rates):
            attention, mlp = (draws[:, i] >= rate).to(dtype).div(1 - rate).unbind(1)
            scales.append((attention, mlp) if rate else (None, None))
        return scales

    def _block(
        self, block: Any, x: Tensor, shapes: list[tuple[int, int]], query_shapes: list[tuple[int, int]],
        scales: Scales, biases: list[Tensor] | None,
    ) -> Tensor:  # fmt: skip
        """timm's block with our attention. x [all tokens, D]: parts of the given shapes (images, tokens of each).

        query_shapes: the shapes of the tokens that are computed: all, or of the images [CLS] alone. scales: of the
        two branches. biases: of the reference tokens' attention.
        """
        width, attn, heads = x.shape[-1], block.attn, block.attn.num_heads
        normed, qkv = block.norm1(x), attn.qkv
        if query_shapes == shapes:
            parts = split(qkv(normed), shapes)
            image, *references = (
                t.view(*shape, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind()
                for t, shape in zip(parts, shapes, strict=True)
            )
        else:  # q for the computed tokens, k and v for all
            x, queries = _without_patches(x, shapes), _without_patches(normed, shapes)
            q_parts = split(linear_rows(qkv, slice(width), queries), query_shapes)
            kv_parts = split(linear_rows(qkv, slice(width, None), normed), shapes)
            image, *references = (
                (
                    q.view(*q_shape, heads, -1).transpose(1, 2),
                    *kv.view(*shape, 2, heads, -1).permute(2, 0, 3, 1, 4).unbind(),
                )
                for q, kv, q_shape, shape in zip(q_parts, kv_parts, query_shapes, shapes, strict=True)
            )
        tokens: list[tuple[Tensor, ...]] = [  # autocast's norms give float32
            (attn.q_norm(q).to(v.dtype), attn.k_norm(k).to(v.dtype), v) for q, k, v in (image, *references)
        ]
        outputs = attend(tokens[0], tokens[1:], self.attention, biases, self.architecture.prefix)
        flat = concat([t.transpose(1, 2).reshape(-1, width) for t in outputs])
        x = _add_branch(x, block.ls1(attn.proj(attn.norm(flat))), scales[0], query_shapes)
        return _add_branch(x, block.ls2(block.mlp(block.norm2(x))), scales[1], query_shapes)


def cls_attention(block: Any, x: Tensor, prefix: int) -> Tensor:
    """What [CLS] takes from each patch in a block whose input is x [n,P+N,D]: [n,H,N]. The rest to 1 is on [CLS] itself, and
    on registers."""
    normed, attn, width = block.norm1(x), block.attn, x.shape[-1]
    q_and_k = (
        norm(linear_rows(attn.qkv, part, tokens).unflatten(-1, (attn.num_heads, -1)))
        for tokens, part, norm in (
            (normed[:, :1], slice(width), attn.q_norm),
            (normed, slice(width, 2 * width), attn.k_norm),
        )
    )
    q, k = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in q_and_k)  # [n,1,H,d], [n,P+N,H,d]
    return ((q * k).sum(-1) * q.shape[-1] ** -0.5).softmax(1)[:, prefix:].transpose(1, 2)


def linear_rows(linear: nn.Linear, rows: slice, x: Tensor) -> Tensor:
    """Some outputs of a linear map."""
    return F.linear(x, linear.weight[rows], None if linear.bias is None else linear.bias[rows])


def split(x: Tensor, shapes: list[tuple[int, int]]) -> tuple[Tensor, ...]:
    """Rows of x, part by part."""
    return x.split([n * tokens for n, tokens in shapes])


def concat(parts: list[Tensor]) -> Tensor:
    """Rows of all parts in one matrix. A single part is returned as it is: torch.cat would copy it."""
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _without_patches(x: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
    """Of all tokens, [CLS] and the reference tokens."""
    image, *references = split(x, shapes)
    return concat([image.view(*shapes[0], -1)[:, 0], *references])


def _add_branch(x: Tensor, branch: Tensor, scale: Tensor | None, shapes: list[tuple[int, int]]) -> Tensor:
    """x + branch, times the scale [n] of each image in all its tokens."""
    if scale is None:
        return x + branch
    first, scales = 0, [scale.repeat_interleave(shapes[0][1])]
    for images, tokens in shapes[1:]:
        scales.append(scale[first : first + images].repeat_interleave(tokens))
        first += images
    return torch.addcmul(x, branch.to(x.dtype), torch.cat(scales).to(x.dtype)[:, None])


def require_vit(network: Backbone, path: object, what: str) -> ViT:
    """The network, if it is a ViT. Raises UserError, with the reason, for another one. what: needs it."""
    if isinstance(network, Rotary):
        raise UserError(f"{path}: {what} needs a ViT that takes points: {ROTARY}")
    if not isinstance(network, ViT):
        raise UserError(f"{path} is a ResNet; {what} needs a ViT: a ResNet has no attention, [CLS] or reference tokens")
    return network


def build_vit(config: Config, drop_path: float) -> ViT:
    """The ViT of a config. Raises UserError if timm has none of this name."""
    reference, ours = config.reference, replace(architecture(config.model), channels=config.data.channels)
    return ViT(
        image_size=config.image_size, drop_path=drop_path, attention=reference.attention, border=reference.border,
        locality=reference.locality, pixels=config.pixels, **asdict(ours),
    )  # fmt: skip
