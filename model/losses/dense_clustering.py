"""Leopart's loss (Ziegler & Asano 2022, section 3.1): what the teacher assigns a place of an image to, the student predicts
from another view of the place.

Letters: B images of this process, V views, Vg views of one size, T teacher views, g x g patches of a teacher view, h x h of
any view, K prototypes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from model.alignment import Overlaps
from runtime.distributed import rank_and_size, sum_over_processes

# A bin counts if all that it reads is in the mask. Its weights sum to 1 only up to rounding: with the published >= 1, 0.4 %
# of these bins are lost, others in each kernel and precision
FULL = 1 - 1e-4


def dense_clustering(
    scores: Sequence[Tensor], targets: Tensor, mask: Tensor, windows: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """scores: for each size of views [Vg,B,h,h,K], the student's cosines. targets [T,B,g,g,K]: the teacher's assignments.
    mask [T,B,g,g]: where the loss is taken. windows [B,V,4].

        for t in range(T):  for v in range(V), v != t:
            q, p = targets[t] and scores[v], each read in the overlap of the windows of t and v
            loss += mean of -sum_k q[k] log_softmax(p / temperature)[k] over the bins that lie in the mask / (T * (V - 1))

    The mean is over the images of all processes together (published: of each process). A pair without such a bin adds 0.
    Returns (the loss; the loss of each pair [T,V], 0 for t = v; the number of its bins [T,V]).
    """
    overlaps = Overlaps(windows, len(targets))
    with torch.autocast(targets.device.type, enabled=False):
        # in float64: TF32 would round the sums of weights
        teacher = torch.cat([targets, mask.to(targets.dtype)[..., None]], -1).double()
        q, full = overlaps.read_teachers(teacher).to(targets.dtype).split([targets.shape[-1], 1], -1)
        full = (full[..., 0] >= FULL).to(targets.dtype)  # [B,T,V,BINS,BINS]
        teachers, views = full.shape[1:3]
        full = full * (1 - torch.eye(teachers, views, dtype=full.dtype, device=full.device))[..., None, None]
        sums, first = [], 0
        for of_size in scores:
            these = slice(first, first + len(of_size))
            first = these.stop
            log_p = F.log_softmax(overlaps.read_views(of_size, these) / temperature, -1)  # [B,T,Vg,BINS,BINS,K]
            cross_entropy = -(q[:, :, these].to(log_p.dtype) * log_p).sum(-1)
            sums.append((full[:, :, these] * cross_entropy).sum((0, 3, 4)))  # [T,Vg]
    bins = sum_over_processes(full.sum((0, 3, 4)))
    # the gradients of all processes are averaged, so each has as many times its part as there are processes
    pair_loss = torch.cat(sums, 1) * rank_and_size()[1] / bins.clamp(min=1)
    return pair_loss.sum() / (teachers * (views - 1)), pair_loss.detach(), bins
