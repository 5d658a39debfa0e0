"""Online clustering, what SwAV and Leopart share: a network whose head has prototypes, and balanced assignments to them.

Letters: T teacher views, n samples of a view on this process, l rows of its share of a view's queue, d bottleneck of the
head, K prototypes.
"""

from typing import Any

import torch
from torch import Tensor

from model.cluster_queue import ClusterQueue
from model.heads import ClusterHead, cosines
from model.losses.sinkhorn import sinkhorn
from model.methods.student_teacher import Network
from model.vit import build_vit
from runtime.config import TEACHERS, Clustering, Config
from runtime.schedule import decay_groups


class ClusterNetwork(Network):
    """A backbone, and a head with prototypes."""

    head: ClusterHead

    def __init__(self, config: Config, drop_path: float):
        super().__init__()
        self.backbone = build_vit(config, drop_path)
        self.head = ClusterHead(self.backbone.width, config.head)

    def groups(self, lr_factor: float) -> list[dict[str, Any]]:
        """The optimizer's groups. lr_factor: of the head's learning rate."""
        return decay_groups(self.backbone) + decay_groups(self.head, lr_factor)


def new_queue(config: Config) -> ClusterQueue | None:
    """The queue of a config, None if it has no rows."""
    length = config.clustering.queue
    return ClusterQueue(TEACHERS, length, config.head.bottleneck) if length else None


@torch.no_grad()
def assign(
    z: Tensor, prototypes: Tensor, queue: ClusterQueue | None, queue_prototypes: Tensor, settings: Clustering
) -> Tensor:
    """Assignments q [T,n,K] of unit vectors z [T,n,d] to prototypes [K,d], balanced in each view over the samples and queue
    rows of all processes. The queue's rows are compared with prototypes of their own."""
    scores = cosines(z, prototypes)
    queued = scores[:, :0] if queue is None else queue.scores(queue_prototypes)  # [T,l,K]
    q = sinkhorn(torch.cat([queued, scores], 1), settings.epsilon, settings.iterations)
    return q[:, queued.shape[1] :]


def mean_entropy(q: Tensor) -> Tensor:
    """Mean entropy of assignments [...,K], in nats: ln K if all are uniform, which is collapse."""
    return torch.special.entr(q).sum(-1).mean()
