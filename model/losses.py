"""Teacher probabilities (centre, temperature) and the cross-entropy of both losses. Paper eq. 1-4.

Letters: T teacher views, V views, K prototypes, d dimensions of the sphere that they lie on.
"""

import torch
from torch import Tensor


def cross_entropy(
    student: Tensor, prototypes: Tensor, teacher: Tensor, teacher_prototypes: Tensor, center: Tensor,
    student_temperature: float, teacher_temperature: Tensor | float, pairs: Tensor, rows: int = 256,
    columns: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Eq. 2 and eq. 3 as means over their terms, without ever holding all logits.

    student [V,n,d], teacher [T,n,d]: unit vectors of the same n things (images, or points) in each view; prototypes,
    teacher_prototypes [K,d]; center [K]; pairs [T,V]: 1 where (t, v) is a term, else 0. `rows`: things at a time;
    `columns`: prototypes at a time (default: as many as stay in a CPU's cache, all on a GPU).

        for t, v in pairs:  for i in range(n):
            p = softmax((teacher[t,i] @ teacher_prototypes.T - center) / tau_t)
            loss += -sum_k p[k] * log_softmax(student[v,i] @ prototypes.T / tau_s)[k]  / (pairs.sum() * n)

    Returns (loss, mean entropy of p in nats); the gradient reaches student and prototypes.
    """
    if columns is None:
        columns = 4096 if student.device.type == "cpu" else len(prototypes)
    loss, entropy = _CrossEntropy.apply(
        student, prototypes, teacher, teacher_prototypes, center, student_temperature, teacher_temperature, pairs,
        rows, columns,
    )  # fmt: skip
    return loss, entropy


class _CrossEntropy(torch.autograd.Function):
    """Some rows at a time: logits, both softmaxes, the loss, and at once the gradient of the student's side, which is
    (sum_t pairs * q - sum_t pairs * p) / tau_s. So logits live for a moment, and backward has nothing left to compute.

    Within some rows, some columns at a time, twice: first logits and their log-sum-exp, then, with the sum over all K
    known, probabilities and gradient. What lies between two products is a few megabytes, and stays in a CPU's cache.
    """

    @staticmethod
    def forward(ctx, student, prototypes, teacher, teacher_prototypes, center, tau_s, tau_t, pairs, rows, columns):
        dtype = prototypes.dtype
        if torch.is_autocast_enabled(student.device.type):
            dtype = torch.get_autocast_dtype(student.device.type)
        with torch.autocast(student.device.type, enabled=False):
            exact = torch.promote_types(dtype, torch.float32)
            w, w_t = prototypes.detach().to(dtype), teacher_prototypes.to(dtype)
            shift = (center / tau_t).to(exact)
            pairs = pairs.to(exact)
            weight = pairs.sum(0).view(-1, 1, 1)  # [V,1,1] terms of each student view
            n = student.shape[1]
            terms = pairs.sum() * n
            scale = 1 / (tau_s * terms)
            blocks = [slice(at, at + columns) for at in range(0, len(w), columns)]
            d_student = torch.empty_like(student)
            d_prototypes = torch.empty_like(prototypes)
            loss, entropy = torch.zeros(2, dtype=exact, device=w.device).unbind()
            for at in range(0, n, rows):
                z_t = (teacher[:, at : at + rows] / tau_t).to(dtype)  # [T,r,d]
                z = student[:, at : at + rows]  # [V,r,d]
                z_s, z = (z / tau_s).to(dtype).flatten(0, 1), z.to(dtype).flatten(0, 1)
                t_raw = z_t.new_empty(*z_t.shape[:2], len(w))  # [T,r,K]
                s_raw = z_t.new_empty(len(weight), z_t.shape[1], len(w))  # [V,r,K]
                norms_t, norms_s = [], []
                for k in blocks:
                    torch.mm(z_t.flatten(0, 1), w_t[k].T, out=t_raw.flatten(0, 1)[:, k])
                    torch.mm(z_s, w[k].T, out=s_raw.flatten(0, 1)[:, k])
                    norms_t.append((t_raw[..., k] - shift[k]).logsumexp(-1))  # exact: so is the shift
                    norms_s.append(s_raw[..., k].to(exact).logsumexp(-1))
                norm_t = torch.stack(norms_t).logsumexp(0).unsqueeze(-1)  # [T,r,1]
                norm_s = torch.stack(norms_s).logsumexp(0).unsqueeze(-1)  # [V,r,1]
                entropy += norm_t.sum()
                loss += (weight * norm_s).sum()
                d_z = torch.zeros(z.shape, dtype=exact, device=w.device)
                for k in blocks:
                    t = t_raw[..., k] - shift[k]
                    p = (t - norm_t).exp_()
                    entropy -= torch.dot(p.flatten(), t.flatten())
                    p = torch.einsum("tv,trk->vrk", pairs, p) if pairs.numel() > 1 else p
                    s = s_raw[..., k].to(exact)
                    loss -= torch.dot(p.flatten(), s.flatten())
                    d = (s - norm_s).exp_()
                    d = (d.mul_(weight) if pairs.numel() > 1 else d).sub_(p).mul_(scale).to(dtype).flatten(0, 1)
                    d_z += d @ w[k]
                    if dtype == d_prototypes.dtype:
                        d_prototypes[k].addmm_(d.T, z, beta=0 if at == 0 else 1)
                    else:
                        gradient = d.T @ z
                        d_prototypes[k] = gradient if at == 0 else d_prototypes[k] + gradient
                d_student[:, at : at + rows] = d_z.unflatten(0, student[:, at : at + rows].shape[:2])
        ctx.save_for_backward(d_student, d_prototypes)
        return loss / terms, entropy / (teacher.shape[0] * n)

    @staticmethod
    def backward(ctx, grad, _):
        d_student, d_prototypes = ctx.saved_tensors
        return (grad * d_student, d_prototypes.mul_(grad), *[None] * 8)  # in place: autograd refuses a second pass
