"""timm's ViT that takes points: images and points in; [CLS], patches and reference tokens out.

The parameters are timm's VisionTransformer's, by name and meaning, so a backbone file of ours is a timm file.
Letters: n images, N patches, D width, R reference tokens of an image, H heads.
"""

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.init import trunc_normal_

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
        self._initialise()

    def _initialise(self) -> None:
        """Published initialisation: normal(0.02) for tokens, positions and matrices; torch's own for the patch filter."""
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(  # type: ignore[override]
        self, images: Tensor, points: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """images [n,3,h,w] normalised, h and w multiples of the patch; points [n,R,2], (x, y) in each view's [0,1] frame.

        Returns, after the final norm: [CLS] [n,D], patches [n,N,D], reference tokens [n,R,D] (None without points).
        """
        grid_side = self.image_size // self.patch
        grid = self.pos_embed[0, 1:].unflatten(0, (grid_side, grid_side))  # [g,g,D]
        patches = self.patch_embed.proj(images)  # [n,D,h/p,w/p]
        h, w = patches.shape[-2:]
        patches = patches.flatten(2).transpose(1, 2)  # [n,N,D]
        patches = patches + resize_grid(grid, h, w).flatten(0, 1)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(patches), -1, -1)
        tokens = [cls, patches]
        references = 0
        if points is not None:
            references = points.shape[1]
            # the token's content is its position; always read from the grid itself, whatever the view's size
            tokens.append(point_embedding(grid, points, self.border))
        x = torch.cat(tokens, 1)  # [n,1+N+R,D]
        for block in self.blocks:
            x = self._block(block, x, references)
        x = self.norm(x)
        image = x.shape[1] - references
        return x[:, 0], x[:, 1:image], x[:, image:] if references else None

    def _block(self, block: Any, x: Tensor, references: int) -> Tensor:
        """timm's block with our attention; a sample's drop path covers all its tokens alike."""
        n, length, width = x.shape
        qkv = block.attn.qkv(block.norm1(x)).view(n, length, 3, block.attn.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [n,H,1+N+R,d] each
        read = attend(q, k, v, references, self.attention).transpose(1, 2).reshape(n, length, width)
        x = x + block.drop_path1(block.attn.proj(read))
        return x + block.drop_path2(block.mlp(block.norm2(x)))


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
