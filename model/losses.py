"""Teacher probabilities (centre, temperature) and the two cross-entropies. Paper eq. 1-4.

Letters: T teacher views, V views, B images, P pairs (t, v), M points of a pair, K prototypes.
"""

import torch
from torch import Tensor


def _exact(logits: Tensor) -> Tensor:
    """Logits in at least float32, whatever the network computes in."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def teacher_probabilities(logits: Tensor, center: Tensor, temperature: Tensor | float) -> Tensor:
    """P_t = softmax((logits - centre) / tau_t), [..., K] in float32 or wider; centre [K] (DINO, section 3.1)."""
    return ((_exact(logits) - center) / temperature).softmax(-1)


def cls_loss(teacher: Tensor, student: Tensor, pairs: list[tuple[int, int]], temperature: float) -> Tensor:
    """Eq. 2 as a mean over its terms.

    teacher [T,B,K] probabilities, student [V,B,K] logits:

        for t, v in pairs:  for b in range(B):
            loss += -sum_k teacher[t,b,k] * log_softmax(student[v,b] / tau_s)[k]  / (len(pairs) * B)
    """
    log_p = torch.log_softmax(_exact(student) / temperature, -1)
    agreement = torch.einsum("tbk,vbk->tv", teacher, log_p) / teacher.shape[1]  # [T,V]
    return -torch.stack([agreement[t, v] for t, v in pairs]).mean()


def reference_loss(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """Eq. 3 as a mean over its terms.

    teacher [P,B,M,K] probabilities of the points of each pair, student [P,B,M,K] logits of the same points:

        for p, b, m:  loss += -sum_k teacher[p,b,m,k] * log_softmax(student[p,b,m] / tau_s)[k]  / (P * B * M)
    """
    return -(teacher * torch.log_softmax(_exact(student) / temperature, -1)).sum(-1).mean()


def entropy(probabilities: Tensor) -> Tensor:
    """Mean entropy of [..., K] in nats: log K says that the teacher tells nothing apart, 0 that all is one prototype."""
    return torch.special.entr(probabilities).sum(-1).mean()
