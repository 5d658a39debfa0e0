"""Projection heads onto prototypes. DINO (Caron et al. 2021), appendix C; the paper uses the same for points.

Letters: D width, K prototypes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.init import trunc_normal_


class ProjectionHead(nn.Module):
    """[..., D] -> three-layer MLP -> unit sphere [..., bottleneck]; `logits` goes on to cosines with K prototypes [..., K].

    norm "batch": BatchNorm after both hidden layers, over all tokens given (an option of published DINO); its statistics
    are always the batch's own. unit_prototypes: the weight norm's gain stays 1 (DINO's norm_last_layer).
    """

    def __init__(
        self,
        width: int,
        *,
        hidden: int,
        bottleneck: int,
        prototypes: int,
        norm: str = "none",
        unit_prototypes: bool = True,
    ):
        super().__init__()
        layers: list[nn.Module] = []
        for inner in (width, hidden):
            layers.append(nn.Linear(inner, hidden))
            if norm == "batch":
                layers.append(nn.BatchNorm1d(hidden, track_running_stats=False))
            layers.append(nn.GELU())
        layers.append(nn.Linear(hidden, bottleneck))
        self.mlp = nn.Sequential(*layers)
        self.last_layer = Prototypes(bottleneck, prototypes, unit_prototypes)
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.mlp(tokens.flatten(0, -2)), dim=-1).unflatten(0, tokens.shape[:-1])

    def logits(self, tokens: Tensor) -> Tensor:
        z = self(tokens)
        return F.linear(z, self.last_layer().to(z.dtype))


class Prototypes(nn.Module):
    """Rows of a linear map without bias, weight-normed [K,bottleneck]: weight_g [K,1] times unit rows of weight_v."""

    def __init__(self, inner: int, prototypes: int, unit: bool):
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(prototypes, inner).uniform_(-(inner**-0.5), inner**-0.5))
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1), requires_grad=not unit)

    def forward(self) -> Tensor:
        return _WeightNorm.apply(self.weight_v, self.weight_g)


class _WeightNorm(torch.autograd.Function):
    """g v / |v|, row by row (Salimans & Kingma 2016, eq. 2 and 3), some rows at a time: the backward pass of separate
    operations reads and writes the [K,bottleneck] matrix eight times over, this one once."""

    ROWS = 4096  # at a time: a few megabytes, a CPU's cache

    @staticmethod
    def forward(ctx, v: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(v, g)
        w = torch.empty_like(v)
        for out, rows, gains in zip(*(t.split(_WeightNorm._rows(v)) for t in (w, v, g)), strict=True):
            torch.mul(rows, gains / rows.norm(dim=1, keepdim=True), out=out)
        return w

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        v, g = ctx.saved_tensors
        d_v = torch.empty_like(v)
        d_g = torch.empty_like(g)
        for out, out_g, d, rows, gains in zip(
            *(t.split(_WeightNorm._rows(v)) for t in (d_v, d_g, grad, v, g)), strict=True
        ):
            norm = rows.norm(dim=1, keepdim=True)
            unit = rows / norm
            along = (unit * d).sum(1, keepdim=True)
            out_g.copy_(along)
            torch.mul(torch.addcmul(d, unit, along, value=-1), gains / norm, out=out)
        return d_v, d_g if ctx.needs_input_grad[1] else None

    @staticmethod
    def _rows(v: Tensor) -> int:
        return _WeightNorm.ROWS if v.device.type == "cpu" else len(v)
