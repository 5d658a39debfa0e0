"""Contrastive losses: of MoCo and DenseCL among a queue of keys (InfoNCE, van den Oord et al. 2018; MoCo, eq. 1), of MoCo-v3
among the keys of the batch.

Letters: n rows of queries (images or patches), r rows of one chunk, d width, K keys of the queue, m keys of the batch.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def unit(x: Tensor) -> Tensor:
    """Rows of norm 1, in float32 at least: keys are kept and cosines are compared."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


class InfoNCE(nn.Module):
    """The mean over all queries. The logits, n x K, are never in memory at once.

    chunk: rows processed at a time (default: 256 on a CPU, 1,024 on a GPU).
    """

    def __init__(self, temperature: float, chunk: int | None = None):
        super().__init__()
        self.chunk, self.of_chunk = chunk, InfoNCEOfChunk(temperature)

    def compile_units(self) -> list[nn.Module]:
        """The operations on one chunk: many passes over its logits unless they are compiled into a few."""
        return [self.of_chunk]

    def forward(self, queries: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
        """queries [n,d], positives [n,d], negatives [K,d]: unit vectors. Only the queries get a gradient.

            for i in range(n):
                logits = [queries[i] @ positives[i], *(queries[i] @ key for key in negatives)] / temperature
                loss += -log_softmax(logits)[0] / n

        The products with the negatives are in the dtype of autocast, sums in that of the queries.
        """
        return _InfoNCE.apply(self, queries, positives, negatives)


class _InfoNCE(torch.autograd.Function):
    """Computes the loss and at once the queries' gradient, chunk by chunk: backward has nothing left to compute."""

    @staticmethod
    def forward(ctx: Any, spec: InfoNCE, queries: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
        device = queries.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else queries.dtype
        size = spec.chunk or (256 if device == "cpu" else 1024)
        with torch.autocast(device, enabled=False):
            keys = negatives.to(dtype)
            parts = [
                spec.of_chunk(q.detach(), k.detach(), keys)
                for q, k in zip(queries.split(size), positives.split(size), strict=True)
            ]
            sums, gradients = zip(*parts, strict=True)
            ctx.save_for_backward(torch.cat(gradients) / len(queries))
            return torch.stack(sums).sum() / len(queries)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return None, gradient * grads[0], None, None


class InfoNCEOfChunk(nn.Module):
    """The loss of a chunk of queries, and its gradient."""

    def __init__(self, temperature: float):
        super().__init__()
        self.temperature = temperature

    def forward(self, q: Tensor, k: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """q, k [r,d], keys [K,d] in the dtype of the products. Returns the sum of the rows' losses, and its gradient of
        q: with p the softmax, (sum of p[j] keys[j] + (p[positive] - 1) k) / temperature."""
        tau = self.temperature
        positive = (q * k).sum(1, keepdim=True) / tau  # [r,1]
        logits = (q.to(keys.dtype) @ keys.T).to(q.dtype) / tau  # [r,K]
        log_z = torch.logaddexp(logits.logsumexp(1, keepdim=True), positive)
        p = (logits - log_z).exp().to(keys.dtype)
        pull = ((positive - log_z).exp() - 1) * k
        return (log_z - positive).sum(), ((p @ keys).to(q.dtype) + pull) / tau


def contrast_in_batch(queries: Tensor, keys: Tensor, places: Tensor, temperature: float) -> Tensor:
    """queries [n,d], keys [m,d]: unit vectors. places [n]: which key is the query's own.

    for i in range(n):
        loss += -log_softmax(queries[i] @ keys.T / temperature)[places[i]] / n
    """
    with torch.autocast(queries.device.type, enabled=False):
        return F.cross_entropy(queries @ keys.T / temperature, places)
