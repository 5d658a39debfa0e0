"""Projection heads onto prototypes: DINO's (Caron et al. 2021, appendix C), which the paper uses for reference tokens too,
and that of online clustering (SwAV, Caron et al. 2020; Leopart, Ziegler & Asano 2022).

Letters: D width, d bottleneck, K prototypes, n tokens.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.init import trunc_normal_

from runtime.config import Head


class ProjectionHead(nn.Module):
    """[..., D] -> three-layer MLP -> unit sphere [..., bottleneck]. `logits` continues to the K prototypes: [..., K].

    norm "batch": BatchNorm after both hidden layers (an option of published DINO). norm_last_layer: the gain of the weight
    norm is fixed at 1 (DINO's norm_last_layer).
    """

    def __init__(
        self,
        width: int,
        *,
        hidden: int,
        bottleneck: int,
        prototypes: int,
        norm: str = "none",
        norm_last_layer: bool = True,
    ):
        super().__init__()
        self.mlp = new_mlp(width, hidden, bottleneck, norm=norm)
        self.last_layer = Prototypes(bottleneck, prototypes, norm_last_layer)
        initialize(self.mlp)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.mlp(tokens.flatten(0, -2)), dim=-1).unflatten(0, tokens.shape[:-1])

    def logits(self, tokens: Tensor) -> Tensor:
        z = self(tokens)
        return F.linear(z, self.last_layer().to(z.dtype))


class ClusterHead(nn.Module):
    """[..., D] -> MLP -> unit sphere [..., d], and K prototypes on the same sphere.

    The prototypes are a plain matrix whose rows are scaled to unit length after each step. This is no weight norm: the
    optimizer sees the gradient with its radial part (SwAV's and Leopart's published code, which scale before each step).
    """

    def __init__(self, width: int, head: Head):
        super().__init__()
        self.mlp = new_mlp(
            width, head.hidden, head.bottleneck, layers=head.layers, activation=head.activation, norm=head.norm
        )
        self.last_layer = nn.Linear(head.bottleneck, head.prototypes, bias=False)
        self.draw_weights()

    def draw_weights(self) -> None:
        """Draw all weights, from torch's generator."""
        initialize(self)
        self.normalize_prototypes()

    @property
    def prototypes(self) -> Tensor:
        """[K,d]"""
        return self.last_layer.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Unit vectors in float32 or more: they enter Sinkhorn and the queue."""
        z = self.mlp(tokens.flatten(0, -2))
        z = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1)
        return z.unflatten(0, tokens.shape[:-1])

    def scores(self, z: Tensor) -> Tensor:
        """Cosines with the prototypes: [..., d] -> [..., K]. On a GPU they are rounded as TF32 rounds; see `cosines`."""
        with torch.autocast(z.device.type, enabled=False):
            return F.linear(z, self.prototypes)

    @torch.no_grad()
    def normalize_prototypes(self, applied: Tensor | None = None) -> None:
        """Scale each prototype to unit length. applied: 0-dim, 0 if nothing may change."""
        unit = F.normalize(self.prototypes, dim=1)
        self.prototypes.copy_(unit if applied is None else torch.where(applied > 0, unit, self.prototypes))


@torch.no_grad()
def cosines(z: Tensor, prototypes: Tensor) -> Tensor:
    """Unit vectors [..., n, d] and prototypes [..., K, d] -> [..., n, K], not rounded: neither autocast nor TF32 applies to
    a product in float64. Targets are made of these; bfloat16 would move them by up to 0.004."""
    return (z.double() @ prototypes.double().transpose(-1, -2)).to(z.dtype)


def new_mlp(
    width: int, hidden: int, bottleneck: int, *, layers: int = 3, activation: str = "gelu", norm: str = "none"
) -> nn.Sequential:
    """Linear maps D -> hidden (-> hidden ...) -> d with the activation between them; norm "batch": BatchNorm before it."""
    parts: list[nn.Module] = []
    for inputs in [width, *[hidden] * (layers - 2)]:
        parts.append(nn.Linear(inputs, hidden))
        if norm == "batch":
            parts.append(BatchNorm(hidden, track_running_stats=False))
        parts.append({"gelu": nn.GELU, "relu": nn.ReLU}[activation]())
    return nn.Sequential(*parts, nn.Linear(hidden, bottleneck))


def initialize(module: nn.Module) -> None:
    """Published initialization of heads: normal(0.02) for matrices, 0 for biases."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm over the tokens [n,D] of all processes, as many in each. Without running statistics it always uses those of
    the batch.

    Not nn.SyncBatchNorm: it works on a GPU only, and a run should compute the same on any device.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, variance = _over_processes(wide.mean(0), wide.var(0, correction=0))
        normed = (wide - mean) * (variance + self.eps).rsqrt()
        return (normed * self.weight + self.bias if self.affine else normed).to(x.dtype)


@torch.compiler.disable
def _over_processes(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [D] over the tokens of all processes, from those over each one's own; with gradients."""
    world_size = dist.get_world_size()
    mean_of_all = _Sum.apply(mean) / world_size
    return mean_of_all, _Sum.apply(variance + (mean - mean_of_all).square()) / world_size


class _Sum(torch.autograd.Function):
    """The sum of a tensor over all processes: each process's loss depends on every process's tensor, so gradients are summed
    too. torch's own differentiable reduction is deprecated since 2.15."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)


class Prototypes(nn.Module):
    """The weight [K,bottleneck] of a linear map without bias, weight-normed: weight_g [K,1] times the unit rows of weight_v
    (Salimans & Kingma 2016, eq. 2). Training never calls it: the losses use weight_v and weight_g directly."""

    def __init__(self, bottleneck: int, prototypes: int, norm_last_layer: bool):
        super().__init__()
        bound = bottleneck**-0.5
        self.weight_v = nn.Parameter(torch.empty(prototypes, bottleneck).uniform_(-bound, bound))
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1), requires_grad=not norm_last_layer)

    def forward(self) -> Tensor:
        return self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True))
