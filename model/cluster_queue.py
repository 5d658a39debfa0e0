"""The queue of online clustering: embeddings of earlier steps that balance the assignments of a small batch (SwAV, Caron et
al. 2020, section 3.1; Leopart).

Letters: T teacher views, L rows of a view's queue, l rows of one process's share, n new rows, d width, K prototypes.
"""

import torch
from torch import Tensor, nn

from model.heads import cosines
from runtime.distributed import rank_and_size


class ClusterQueue(nn.Module):
    """The newest L rows of each teacher view, newest first: the rows of all processes, equal in each of them.

    Zero at first. It is used as soon as it is full.
    """

    rows: Tensor  # [T,L,d]

    def __init__(self, views: int, length: int, width: int):
        super().__init__()
        self.register_buffer("rows", torch.zeros(views, length, width))

    def scores(self, prototypes: Tensor) -> Tensor:
        """Cosines [T,l,K] of this process's share of the rows with prototypes [K,d]. The shares are equal and disjoint, so
        Sinkhorn's sums over processes contain each row once. -inf until the queue is full: such rows take no part."""
        rank, processes = rank_and_size()
        share = self.rows.unflatten(1, (processes, -1))[:, rank]
        full = self.rows[:, -1:].any(2, keepdim=True)  # [T,1,1]
        return cosines(share, prototypes).masked_fill(~full, -torch.inf)

    @torch.no_grad()
    def push(self, new: Tensor, applied: Tensor) -> None:
        """Put rows [T,n,d] in front; the oldest fall out. new: the same in each process. applied: 0-dim, 0 if nothing may
        change."""
        pushed = torch.cat([new.to(self.rows.dtype), self.rows], 1)[:, : self.rows.shape[1]]
        self.rows.copy_(torch.where(applied > 0, pushed, self.rows))
