"""MoCo-v3 (Chen, Xie & He 2021): each view's prediction has to find the key of the other view of its image among the keys of
the batch. The authors' own form of MoCo for ViTs.

Letters: B images, E width of the backbone, d width of queries and keys.
"""

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from model.heads import BatchNorm
from model.losses.info_nce import contrast_in_batch, unit
from model.methods.base import StepOutput
from model.methods.mocov2 import MomentumContrast
from model.methods.student_teacher import Network
from model.vit import Tokens, build_vit
from runtime.config import Config
from runtime.distributed import gather_rows, rank_and_size


class MoCoV3Network(Network):
    """The encoder: a backbone and a projector of three layers (section 4.3). That of the queries has a predictor too."""

    predictor: nn.Module

    def __init__(self, config: Config, drop_path: float):
        super().__init__()
        self.backbone = build_vit(config, drop_path)
        hidden, d = config.head.hidden, config.head.bottleneck
        self.projector = normed_mlp(self.backbone.width, hidden, hidden, d)


def normed_mlp(*widths: int) -> nn.Sequential:
    """Linear maps without bias, each with BatchNorm, and a ReLU between two; the last BatchNorm is not affine."""
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise(widths), 2):
        last = i == len(widths)
        layers.append(nn.Linear(inputs, outputs, bias=False))
        layers.append(BatchNorm(outputs, affine=not last, track_running_stats=False))
        layers += [] if last else [nn.ReLU()]
    return nn.Sequential(*layers)


class MoCoV3(MomentumContrast):
    """Algorithm 1: ctr(q1, k2) + ctr(q2, k1). BatchNorm sees one view at a time, as published."""

    student: MoCoV3Network
    key: MoCoV3Network
    accumulates = False
    query_views = key_views = slice(0, 2)

    def __init__(self, config: Config):
        super().__init__(config, partial(MoCoV3Network, config))
        d = config.head.bottleneck
        self.student.predictor = normed_mlp(d, config.head.hidden, d)

    def compare(self, query: Tokens, key: Tokens) -> StepOutput:
        student = self.student
        q1, q2 = (unit(student.predictor(student.projector(x))) for x in self.feature(query).chunk(2))  # [B,d]
        with torch.no_grad():
            k1, k2 = (unit(self.key.projector(x)) for x in self.feature(key).chunk(2))
        return StepOutput(self.ctr(q1, k2) + self.ctr(q2, k1), {}, [])

    def ctr(self, q: Tensor, k: Tensor) -> Tensor:
        """2 tau times the loss of the queries among the keys of all processes."""
        (rank, processes), tau = rank_and_size(), self.settings.temperature
        # of this process's keys among those of all (gather_rows)
        places = rank + processes * torch.arange(len(k), device=k.device)
        return 2 * tau * contrast_in_batch(q, gather_rows(k), places, tau)
