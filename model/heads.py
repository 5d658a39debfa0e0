"""Projection heads onto prototypes. DINO (Caron et al. 2021), appendix C; the paper uses the same for reference tokens.

Letters: D width, K prototypes.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.init import trunc_normal_


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
        layers: list[nn.Module] = []
        for inputs in (width, hidden):
            layers.append(nn.Linear(inputs, hidden))
            if norm == "batch":
                layers.append(BatchNorm(hidden, track_running_stats=False))
            layers.append(nn.GELU())
        layers.append(nn.Linear(hidden, bottleneck))
        self.mlp = nn.Sequential(*layers)
        self.last_layer = Prototypes(bottleneck, prototypes, norm_last_layer)
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.mlp(tokens.flatten(0, -2)), dim=-1).unflatten(0, tokens.shape[:-1])

    def logits(self, tokens: Tensor) -> Tensor:
        z = self(tokens)
        return F.linear(z, self.last_layer().to(z.dtype))


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm over the tokens [n,D] of all processes, as many in each. Without running statistics it always uses those of
    the batch.

    Not nn.SyncBatchNorm: it works on a GPU only, and a run should compute the same on any device.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(x)
        wide = x.to(self.weight.dtype)
        mean, variance = _over_processes(wide.mean(0), wide.var(0, correction=0))
        return ((wide - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias).to(x.dtype)


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
