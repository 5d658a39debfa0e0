"""Teacher probabilities (centre, temperature) and the cross-entropy of both losses. Paper eq. 1-4.

Letters: T teacher views, V views, K prototypes, d dimensions of the sphere that they lie on.
"""

import torch
from torch import Tensor


def cross_entropy(
    student: Tensor, prototypes: Tensor, teacher: Tensor, teacher_prototypes: Tensor, center: Tensor,
    student_temperature: float, teacher_temperature: Tensor | float, pairs: Tensor, rows: int = 256,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Eq. 2 and eq. 3 as means over their terms, without ever holding all logits.

    student [V,n,d], teacher [T,n,d]: unit vectors of the same n things (images, or points) in each view; prototypes,
    teacher_prototypes [K,d]; center [K]; pairs [T,V]: 1 where (t, v) is a term, else 0. `rows`: things at a time.

        for t, v in pairs:  for i in range(n):
            p = softmax((teacher[t,i] @ teacher_prototypes.T - center) / tau_t)
            loss += -sum_k p[k] * log_softmax(student[v,i] @ prototypes.T / tau_s)[k]  / (pairs.sum() * n)

    Returns (loss, mean entropy of p in nats); the gradient reaches student and prototypes.
    """
    loss, entropy = _CrossEntropy.apply(
        student, prototypes, teacher, teacher_prototypes, center, student_temperature, teacher_temperature, pairs, rows
    )
    return loss, entropy


class _CrossEntropy(torch.autograd.Function):
    """Some rows at a time: logits, both softmaxes, the loss, and at once the gradient of the student's side, which is
    (sum_t pairs * q - sum_t pairs * p) / tau_s. So logits live for a moment, and backward has nothing left to compute."""

    @staticmethod
    def forward(ctx, student, prototypes, teacher, teacher_prototypes, center, tau_s, tau_t, pairs, rows):
        dtype = prototypes.dtype
        if torch.is_autocast_enabled(student.device.type):
            dtype = torch.get_autocast_dtype(student.device.type)
        with torch.autocast(student.device.type, enabled=False):
            w, w_t = prototypes.detach().to(dtype), teacher_prototypes.to(dtype)
            exact = torch.promote_types(dtype, torch.float32)
            pairs = pairs.to(exact)
            weight = pairs.sum(0).view(-1, 1, 1)  # [V,1,1] terms of each student view
            n = student.shape[1]
            terms = pairs.sum() * n
            d_student = torch.empty_like(student)
            d_prototypes = torch.zeros_like(prototypes)
            loss, entropy = torch.zeros((), dtype=exact, device=w.device), torch.zeros((), dtype=exact, device=w.device)
            for at in range(0, n, rows):
                t = teacher[:, at : at + rows].to(dtype) @ w_t.T  # [T,r,K]
                t = t.to(exact).sub_(center).div_(tau_t)
                norm = t.logsumexp(-1, keepdim=True)
                p = (t - norm).exp_()
                entropy += (norm.squeeze(-1) - (p * t).sum(-1)).sum()
                del t
                z = student[:, at : at + rows].to(dtype)
                s = (z @ w.T).to(exact).div_(tau_s)  # [V,r,K]
                p = torch.einsum("tv,trk->vrk", pairs, p) if p.shape[0] > 1 else p
                norm = s.logsumexp(-1, keepdim=True)
                loss += (weight.squeeze(-1) * norm.squeeze(-1)).sum() - (p * s).sum()
                d = s.sub_(norm).exp_().mul_(weight).sub_(p).div_(tau_s * terms).to(dtype)
                d_student[:, at : at + rows] = d @ w
                d_prototypes += d.flatten(0, 1).T @ z.flatten(0, 1)
        ctx.save_for_backward(d_student, d_prototypes)
        return loss / terms, entropy / (teacher.shape[0] * n)

    @staticmethod
    def backward(ctx, grad, _):
        d_student, d_prototypes = ctx.saved_tensors
        return (grad * d_student, grad * d_prototypes, *[None] * 7)
