"""Teacher probabilities (centre, temperature) and the cross-entropy of both losses. Paper eq. 1-4.

Letters: T teacher views, V views, K prototypes, k some of them, r some things (images or points), d dimensions of the sphere
that they lie on.
"""

from typing import Any

import torch
from torch import Tensor, nn

from model.heads import Prototypes


class CrossEntropy(nn.Module):
    """Eq. 2 or eq. 3 as a mean over its terms, without ever holding all logits.

    terms [T,V]: 1 where (t, v) is a term of the loss, else 0. rows: things at a time; columns: prototypes at a time
    (default: as many as stay in a CPU's cache, all on a GPU).
    """

    terms: Tensor

    def __init__(self, terms: Tensor, student_temperature: float, rows: int = 256, columns: int | None = None):
        super().__init__()
        self.register_buffer("terms", terms, persistent=False)
        self.student_temperature, self.rows, self.columns = student_temperature, rows, columns
        self.exponentials, self.difference, self.through_the_norm = Exponentials(), Difference(), ThroughTheNorm()

    def parts(self) -> list[nn.Module]:
        """What lies between the matrix products: many passes over memory, unless they are compiled into a few."""
        return [self.exponentials, self.difference, self.through_the_norm]

    def forward(
        self, student: Tensor, prototypes: Prototypes, teacher: Tensor, teacher_prototypes: Prototypes, center: Tensor,
        teacher_temperature: Tensor | float, moving: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """student [V,n,d], teacher [T,n,d]: unit vectors of the same n things in each view; center [K]; moving [d]: the mean
        of the unit vectors whose logits move the centre.

            for t, v in terms:  for i in range(n):
                p = softmax((teacher[t,i] @ teacher_prototypes().T - center) / teacher_temperature)
                loss += -sum_k p[k] * log_softmax(student[v,i] @ prototypes().T / student_temperature)[k] / (terms.sum() * n)

        Returns (loss, mean entropy of p in nats, teacher_prototypes() @ moving [K]); the gradient reaches student and
        prototypes.
        """
        return _CrossEntropy.apply(
            self, student, prototypes.weight_v, prototypes.weight_g, teacher, teacher_prototypes.weight_v,
            teacher_prototypes.weight_g, center, teacher_temperature, moving,
        )  # fmt: skip


class _CrossEntropy(torch.autograd.Function):
    """Some rows at a time: logits, both softmaxes, the loss, and at once the gradient of the student's side, which is
    (sum_t terms * q - sum_t terms * p) / tau_s. So logits live for a moment, and backward has nothing left to compute.

    Within some rows, some prototypes at a time, twice: first the logits, their exponentials (against the largest of the
    block) and the sums that loss and entropy need, then, with the sums over all K known, the gradient. So each exponential
    is computed once, and what lies between two products is a few megabytes, and stays in a CPU's cache. Prototypes stand
    in rows, [K,r]: a CPU's product takes half as long again the other way round (docs/benchmarks.md).
    """

    @staticmethod
    def forward(ctx: Any, how: CrossEntropy, student, v, g, teacher, v_t, g_t, center, tau_t, moving):
        dtype, columns = v.dtype, how.columns or (4096 if v.device.type == "cpu" else len(v))
        if torch.is_autocast_enabled(v.device.type):
            dtype = torch.get_autocast_dtype(v.device.type)
        with torch.autocast(v.device.type, enabled=False):
            exact = torch.promote_types(dtype, torch.float32)
            v, g, tau_s, terms = v.detach(), g.detach(), how.student_temperature, how.terms.to(exact)
            of_each = terms.sum(0).unsqueeze(-1)  # [V,1] terms of each student view
            n = student.shape[1]
            scale = 1 / (tau_s * terms.sum() * n)
            shifts = (center / tau_t).to(exact).neg().view(-1, 1, 1).split(columns)
            some: list[tuple[_Some, _Some]] = []  # prototypes of student and teacher
            means: list[Tensor] = []  # of the teacher's logits
            d_student, d_v, d_g = (torch.empty_like(t) for t in (student, v, g))
            loss, entropy = torch.zeros(2, dtype=exact, device=v.device).unbind()
            for at in range(0, n, how.rows):
                z, z_t = student[:, at : at + how.rows], teacher[:, at : at + how.rows]  # [V,r,d], [T,r,d]
                of_s, of_t = z.shape[:2], z_t.shape[:2]
                z_t, z_s = ((x / tau).to(dtype).flatten(0, 1) for x, tau in ((z_t, tau_t), (z, tau_s)))
                z = z.to(dtype).flatten(0, 1)
                kept, found = [], []
                for i, shift in enumerate(shifts):
                    if at == 0:  # not before: what the norms have read is still in the cache
                        k = slice(i * columns, (i + 1) * columns)
                        some.append((_Some(v[k], g[k], dtype), _Some(v_t[k], g_t[k], dtype)))
                        means.append(some[i][1].gain.flatten() * (v_t[k] @ moving))
                    mine, theirs = some[i]
                    t = torch.mm(theirs.w, z_t.T).unflatten(1, of_t)  # [k,T,r]
                    s = torch.mm(mine.w, z_s.T).unflatten(1, of_s)  # [k,V,r]
                    e_t, e_s, *sums = how.exponentials(t, s, shift, theirs.gain, mine.gain, terms)
                    kept.append((e_t, e_s))
                    found.append(sums)
                most_t, sum_t, with_t, with_s, most_s, sum_s = (
                    torch.stack(parts) for parts in zip(*found, strict=True)
                )
                norm_t = (most_t + sum_t.log()).logsumexp(0)  # [T,r]
                norm_s = (most_s + sum_s.log()).logsumexp(0)  # [V,r]
                part_t, part_s = (most_t - norm_t).exp(), (most_s - norm_s).exp()  # what makes exp(...) probabilities
                entropy += norm_t.sum() - (part_t * with_t).sum()
                loss += (of_each * norm_s).sum() - (part_t * with_s).sum()
                part_t, part_s = part_t * scale, part_s * of_each * scale
                d_z = torch.zeros(z.shape, dtype=exact, device=v.device)
                for (mine, _), exps, of_p, of_q, d_v_k, d_g_k in zip(
                    some, kept, part_t, part_s, d_v.split(columns), d_g.split(columns), strict=True
                ):
                    d = how.difference(*exps, of_p, of_q, terms).flatten(1)
                    d_z += d.T @ mine.w
                    if dtype == d_v.dtype:
                        d_v_k.addmm_(d, z, beta=0 if at == 0 else 1)
                    else:
                        gradient = d @ z
                        d_v_k.copy_(gradient if at == 0 else d_v_k + gradient)
                    if at + how.rows >= n:
                        how.through_the_norm(d_v_k, d_g_k, mine.v, mine.norm, mine.gain)
                d_student[:, at : at + how.rows] = d_z.unflatten(0, of_s)
        ctx.save_for_backward(d_student, d_v, d_g)
        loss, entropy = loss / (terms.sum() * n), entropy / (teacher.shape[0] * n)
        mean_logits = torch.cat(means)
        ctx.mark_non_differentiable(entropy, mean_logits)
        return loss, entropy, mean_logits

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad = grads[0]  # the loss's
        d_student, d_v, d_g = ctx.saved_tensors  # in place: autograd refuses a second pass
        return None, grad * d_student, d_v.mul_(grad), grad * d_g, *[None] * 6


class _Some:
    """Some prototypes g v / |v| of a network, never made: products are with v, and g / |v| is a gain of their rows."""

    def __init__(self, v: Tensor, g: Tensor, dtype: torch.dtype):
        self.v, self.w = v, v.to(dtype)  # [k,d]
        self.norm = torch.linalg.vector_norm(v, dim=1, keepdim=True)  # [k,1]
        self.gain = (g / self.norm).unsqueeze(-1)  # [k,1,1]


class Exponentials(nn.Module):
    """From products to exponentials of logits, and their sums over some prototypes."""

    def forward(
        self, t: Tensor, s: Tensor, shift: Tensor, gain_t: Tensor, gain: Tensor, terms: Tensor
    ) -> tuple[Tensor, ...]:
        """t [k,T,r], s [k,V,r]: products with v, over their temperatures; gain_t, gain [k,1,1] make logits of them; shift
        [k,1,1]: minus the centre, over the temperature.

        Returns exp(t - most_t) and exp(s - most_s), each times the student's gain (so the gradient wants them), in the dtype
        of the products; then [T,r] each: most_t, and the sums of exp(t - most_t), of t exp(t - most_t) and of the term's s
        exp(t - most_t); [V,r] each: most_s, and the sum of exp(s - most_s).
        """
        dtype = t.dtype
        t, s = torch.addcmul(shift, t, gain_t), s * gain
        most_t, most_s = t.amax(0), s.amax(0)
        e_t = (t - most_t).exp_()
        mixed = s if terms.numel() == 1 else torch.einsum("tv,kvr->ktr", terms, s)
        sums_t = e_t.sum(0), t.mul_(e_t).sum(0), torch.mul(mixed, e_t, out=t).sum(0)
        e_s = s.sub_(most_s).exp_()
        sum_s = e_s.sum(0)
        e_t, e_s = (torch.mul(e, gain, out=torch.empty_like(e, dtype=dtype)) for e in (e_t, e_s))
        return e_t, e_s, most_t, *sums_t, most_s, sum_s


class Difference(nn.Module):
    """The gradient of the logits, sum_t terms * (q - p), times the student's gain."""

    def forward(self, e_t: Tensor, e_s: Tensor, part_t: Tensor, part_s: Tensor, terms: Tensor) -> Tensor:
        """e_t [k,T,r], e_s [k,V,r]: what Exponentials gave; part_t [T,r], part_s [V,r]: what makes them probabilities, and
        weighs them -> [k,V,r]."""
        d = e_s * part_s
        if terms.numel() == 1:  # nothing to mix: each point has one teacher
            d = d.addcmul_(e_t, part_t, value=-1)
        else:
            d -= torch.einsum("tv,ktr->kvr", terms, e_t * part_t)
        return d.to(e_s.dtype)


class ThroughTheNorm(nn.Module):
    """The weight norm's backward pass (Salimans & Kingma 2016, eq. 3), in place."""

    def forward(self, d: Tensor, d_g: Tensor, v: Tensor, norm: Tensor, gain: Tensor) -> None:
        """d [k,d]: gain times the gradient of the prototypes, becomes that of v; d_g [k,1] is written. norm [k,1] of v."""
        along = (d * v).sum(1, keepdim=True) / norm
        d_g.copy_(along / gain.squeeze(-1))
        d.addcmul_(v, along / norm, value=-1)
