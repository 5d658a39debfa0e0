"""Projection heads onto prototypes. DINO (Caron et al. 2021), appendix C; the paper uses the same for reference tokens.

Letters: D width, K prototypes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.init import trunc_normal_


class ProjectionHead(nn.Module):
    """[..., D] -> three-layer MLP -> unit sphere [..., bottleneck]. `logits` continues to the K prototypes: [..., K].

    norm "batch": BatchNorm after both hidden layers, over all tokens given (an option of published DINO); it always uses
    the statistics of the batch. norm_last_layer: the gain of the weight norm is fixed at 1 (DINO's norm_last_layer).
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
                layers.append(nn.BatchNorm1d(hidden, track_running_stats=False))
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
