"""Soft assignments of samples to prototypes that use all prototypes equally: Sinkhorn-Knopp (SwAV, Caron et al. 2020,
section 3.1; Cuturi 2013).

Letters: n samples of this process, K prototypes.
"""

import torch
from torch import Tensor

from runtime.distributed import sum_over_processes


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Assignments q [...,n,K] of scores [...,n,K], the cosines of this process's samples with the prototypes.

        q[i,k] = exp(scores[i,k] / epsilon)
        for each iteration:
            for k in range(K):  q[:,k] /= sum of q[:,k] over the samples of all processes    # prototypes get equal shares
            for i in range(n):  q[i,:] /= sum of q[i,:]                                      # a sample is assigned in full

    The published form gives each prototype 1/K and each sample 1/n of a total of 1: factors that the next division cancels.
    A sample whose scores are all -inf takes no part; its q is 0. No maximum is subtracted: cosines are at most 1, and
    exp(1 / epsilon) is far below float32's largest number for every epsilon that a config may have.
    """
    q = (scores / epsilon).exp()
    tiny = torch.finfo(q.dtype).tiny
    for _ in range(iterations):
        q = q / sum_over_processes(q.sum(-2, keepdim=True))
        q = q / q.sum(-1, keepdim=True).clamp(min=tiny)
    return q
