"""Variants of the locality prior, which are no part of the trainer: methods for trials.

    python train.py configs/demo.yaml method=tools.paper.variants:ByHead

The table `variants` (tools/paper/tables.py) trains them. All start from `reference.locality`, the width σ in patches.

H heads · R reference tokens of an image · N patches · T teacher views · V views · M points of a pair.
"""

from typing import Any

import torch
from torch import Tensor, nn

from model.methods.densedino import DenseDINO
from model.methods.student_teacher import STUDENT, TEACHER
from model.vit import ViT
from runtime.config import TEACHERS, Config
from runtime.schedule import StepValues


class _VariantViT(ViT):
    """A ViT whose prior differs from block to block or from head to head."""

    def factor(self, block: int) -> Tensor | float:
        """What the bias of a block is multiplied by: (σ / its own σ)², [1,H,1,1] or a number; 0: no prior."""
        return 1.0

    def _block(self, block, x, shapes, query_shapes, scales, biases):
        if biases is not None:
            index = next(i for i, each in enumerate(self.blocks) if each is block)
            biases = [bias * self.factor(index) for bias in biases]
        return super()._block(block, x, shapes, query_shapes, scales, biases)


def _become(network: ViT, variant: type[_VariantViT]) -> None:
    """Make a ViT one of a variant: the same tensors, other methods."""
    network.__class__ = variant


class _Variant(DenseDINO):
    vit: type[_VariantViT]

    def __init__(self, config: Config):
        super().__init__(config)
        for network in (self.student, self.teacher):
            _become(network.backbone, self.vit)


class _SpreadViT(_VariantViT):
    def factor(self, block: int) -> Tensor | float:
        spread = 2.0 ** torch.linspace(1, -1, self.heads, device=self.pos_embed.device)  # σ from half to twice
        return spread.square().view(1, -1, 1, 1)


class ByHead(_Variant):
    """A fixed spread over the heads: from σ / 2 to 2 σ, evenly in the logarithm."""

    vit = _SpreadViT


class _LearnedViT(_VariantViT):
    log_precision: nn.Parameter  # [blocks,H]

    def factor(self, block: int) -> Tensor | float:
        return self.log_precision[block].exp().view(1, -1, 1, 1)


class Learned(_Variant):
    """σ of each block and head is learned, from σ on; the teacher's follows by EMA."""

    vit = _LearnedViT

    def __init__(self, config: Config):
        super().__init__(config)
        for network in (self.student, self.teacher):
            backbone = network.backbone
            backbone.log_precision = nn.Parameter(torch.zeros(len(backbone.blocks), backbone.heads))
        self.teacher.requires_grad_(False)


class _FirstViT(_VariantViT):
    def factor(self, block: int) -> Tensor | float:
        return 1.0 if block == 0 else 0.0


class FirstBlock(_Variant):
    """The prior in the first block only."""

    vit = _FirstViT


class _LastViT(_VariantViT):
    def factor(self, block: int) -> Tensor | float:
        return 1.0 if block == len(self.blocks) - 1 else 0.0


class LastBlock(_Variant):
    """The prior in the last block only."""

    vit = _LastViT


class _AnnealedViT(_VariantViT):
    strength = 1.0

    def factor(self, block: int) -> Tensor | float:
        return self.strength


class Annealed(_Variant):
    """From σ to no prior over the training: 1/σ² falls as 1 - momentum of the teacher does, which is a cosine to 0."""

    vit = _AnnealedViT

    def __init__(self, config: Config):
        super().__init__(config)
        self.first = 1 - config.optim.teacher_momentum

    def before_step(self, at: StepValues) -> None:
        for network in (self.student, self.teacher):
            backbone: Any = network.backbone
            backbone.strength = (1 - at.teacher_momentum) / self.first


class _ShareViT(_VariantViT):
    zoom: Tensor | None = None  # [n], share of the photo's side that a view covers, over the mean share

    def _block(self, block, x, shapes, query_shapes, scales, biases):
        if biases is not None and self.zoom is not None:
            ends = torch.tensor([len(bias) for bias in biases]).cumsum(0).tolist()
            starts = [0, *ends[:-1]]
            zooms = [self.zoom[a:b].square().view(-1, 1, 1, 1) for a, b in zip(starts, ends, strict=True)]
            biases = [bias * zoom for bias, zoom in zip(biases, zooms, strict=True)]
        return super()._block(block, x, shapes, query_shapes, scales, biases)


class ShareOfImage(_Variant):
    """Distance in the photo instead of in the view: a patch of a small window is a small part of the photo, so more patches
    are near. σ holds for a window of the photo's mean size."""

    vit = _ShareViT

    def encode_views(self, network, batch, role, pairs=()):
        x0, y0, x1, y1 = batch.windows.unbind(-1)  # [B,V]
        side = ((x1 - x0).abs() * (y1 - y0).abs()).to(torch.float32).sqrt()  # pixels
        zoom = side / side.mean()
        views = TEACHERS if role == TEACHER else self.views
        network.backbone.zoom = zoom[:, :views].T.flatten()  # one size of views: all are one pass of the backbone
        out = super().encode_views(network, batch, role, pairs)
        network.backbone.zoom = None
        return out


class CenteredTargets(DenseDINO):
    """The teacher's tokens of an image, less their mean over its own points: what is the same at all points is no target."""

    def encode_views(self, network, batch, role, pairs=()):
        cls, tokens = super().encode_views(network, batch, role, pairs)
        if role == STUDENT:
            return cls, tokens
        mean = torch.stack(list(tokens.values())).mean((0, 2))[:, None]  # [B,1,D]
        return cls, {pair: token - mean for pair, token in tokens.items()}


class SineCosine(DenseDINO):
    """Positions start as 2-D sines and cosines (temperature 100, standard deviation 0.5) instead of normal(0.02)."""

    def __init__(self, config: Config):
        super().__init__(config)
        for network in (self.student, self.teacher):
            vit = network.backbone
            side, quarter = vit.image_size // vit.patch, vit.width // 4
            at = torch.arange(side)[:, None] * 100 ** -(torch.arange(quarter) / quarter)  # [side,D/4]
            waves = torch.cat([at.sin(), at.cos()], 1)  # [side,D/2]
            grid = torch.cat([waves.repeat(side, 1), waves.repeat_interleave(side, 0)], 1)  # columns, then rows
            vit.pos_embed.data[0, 1:] = 0.5 * grid / grid.std()
