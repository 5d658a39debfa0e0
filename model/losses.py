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

    Within some rows, some prototypes at a time, twice: first the logits, their exponentials (against the largest of the
    block) and the sums that loss and entropy need, then, with the sums over all K known, the gradient. So each exponential
    is computed once, and what lies between two products is a few megabytes, and stays in a CPU's cache. Prototypes stand
    in rows, [K,r]: a CPU's product takes half as long again the other way round (docs/benchmarks.md).
    """

    @staticmethod
    def forward(ctx, student, prototypes, teacher, teacher_prototypes, center, tau_s, tau_t, pairs, rows, columns):
        dtype = prototypes.dtype
        if torch.is_autocast_enabled(student.device.type):
            dtype = torch.get_autocast_dtype(student.device.type)
        with torch.autocast(student.device.type, enabled=False):
            exact = torch.promote_types(dtype, torch.float32)
            w, w_t = prototypes.detach().to(dtype), teacher_prototypes.to(dtype)
            shift = (center / tau_t).to(exact).view(-1, 1, 1)
            pairs = pairs.to(exact)
            one = pairs.numel() == 1  # nothing to mix: each point has one teacher
            weight = pairs.sum(0).unsqueeze(-1)  # [V,1] terms of each student view
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
                of_t, of_s = z_t.shape[:2], z.shape[:2]
                z_s, z = (z / tau_s).to(dtype).flatten(0, 1), z.to(dtype).flatten(0, 1)
                exp_t, exp_s = z.new_empty(len(w), *of_t), z.new_empty(len(w), *of_s)  # [K,T,r], [K,V,r]
                found = []  # of each block, [T,r] or [V,r]: what `told` unpacks
                for k in blocks:
                    t = torch.mm(w_t[k], z_t.flatten(0, 1).T).unflatten(1, of_t) - shift[k]  # exact: so is the shift
                    s = torch.mm(w[k], z_s.T).unflatten(1, of_s).to(exact)
                    most_t, most_s = t.amax(0), s.amax(0)
                    e_t = (t - most_t).exp_()
                    mixed = s if one else torch.einsum("tv,kvr->ktr", pairs, s)
                    sums_t = e_t.sum(0), t.mul_(e_t).sum(0), torch.mul(mixed, e_t, out=t).sum(0)
                    exp_t[k], exp_s[k] = e_t, s.sub_(most_s).exp_()
                    found.append((most_t, *sums_t, most_s, s.sum(0)))
                most_t, sum_t, with_t, with_s, most_s, sum_s = (
                    torch.stack(parts) for parts in zip(*found, strict=True)
                )
                norm_t = (most_t + sum_t.log()).logsumexp(0)  # [T,r]
                norm_s = (most_s + sum_s.log()).logsumexp(0)  # [V,r]
                part_t, part_s = (most_t - norm_t).exp(), (most_s - norm_s).exp()  # what makes exp(...) probabilities
                entropy += norm_t.sum() - (part_t * with_t).sum()
                loss += (weight * norm_s).sum() - (part_t * with_s).sum()
                part_t, part_s = part_t * scale, part_s * weight * scale
                d_z = torch.zeros(z.shape, dtype=exact, device=w.device)
                for k, of_p, of_q in zip(blocks, part_t, part_s, strict=True):
                    d = exp_s[k] * of_q
                    if one:
                        d = d.addcmul_(exp_t[k], of_p, value=-1)
                    else:
                        d -= torch.einsum("tv,ktr->kvr", pairs, exp_t[k] * of_p)
                    d = d.to(dtype).flatten(1)
                    d_z += d.T @ w[k]
                    if dtype == d_prototypes.dtype:
                        d_prototypes[k].addmm_(d, z, beta=0 if at == 0 else 1)
                    else:
                        gradient = d @ z
                        d_prototypes[k] = gradient if at == 0 else d_prototypes[k] + gradient
                d_student[:, at : at + rows] = d_z.unflatten(0, of_s)
        ctx.save_for_backward(d_student, d_prototypes)
        return loss / terms, entropy / (teacher.shape[0] * n)

    @staticmethod
    def backward(ctx, grad, _):
        d_student, d_prototypes = ctx.saved_tensors
        return (grad * d_student, d_prototypes.mul_(grad), *[None] * 8)  # in place: autograd refuses a second pass
