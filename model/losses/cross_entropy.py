"""Teacher probabilities (center, temperature) and the cross-entropy of both losses. Paper eq. 1-4.

Letters: T teacher views, V views, K prototypes, k some of them, r some things (images or points), d dimensions of the sphere
that they lie on.
"""

from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from model.heads import Prototypes

GROUP = 64  # prototypes whose logits stay in a CPU core's own cache from one pass over them to the next


class CrossEntropy(nn.Module):
    """Eq. 2 or eq. 3 as a mean over its terms, without ever holding all logits.

    terms [T,V]: 1 where (t, v) is a term of the loss, else 0. weight: what it counts in the total (eq. 4). rows: things at
    a time (default: 256 on a CPU, 1,024 rows of student logits on a GPU); columns: prototypes at a time (default: as many as
    stay in a CPU's cache, all on a GPU).
    """

    terms: Tensor

    def __init__(
        self, terms: Tensor, student_temperature: float, weight: float = 1.0,
        rows: int | None = None, columns: int | None = None,
    ):  # fmt: skip
        super().__init__()
        self.register_buffer("terms", terms, persistent=False)
        self.student_temperature, self.weight = student_temperature, weight
        self.rows, self.columns = rows, columns
        self.read, self.exponentials, self.gradients = Read(), Exponentials(), Gradients()

    def parts(self) -> list[nn.Module]:
        """What is done with some prototypes: many passes over memory, unless they are compiled into a few."""
        return [self.read, self.exponentials, self.gradients]

    def forward(
        self, student: Tensor, prototypes: Prototypes, teacher: Tensor, teacher_prototypes: Prototypes, center: Tensor,
        teacher_temperature: Tensor | float, moving: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """student [V,n,d], teacher [T,n,d]: unit vectors of the same n things in each view; center [K]; moving [d]: the mean
        of the unit vectors whose logits move the center.

            for t, v in terms:  for i in range(n):
                p = softmax((teacher[t,i] @ teacher_prototypes().T - center) / teacher_temperature)
                loss += -sum_k p[k] * log_softmax(student[v,i] @ prototypes().T / student_temperature)[k] / (terms.sum() * n)

        Returns (weight * loss, whose gradient reaches student and prototypes; loss; mean entropy of p in nats;
        teacher_prototypes() @ moving [K]).
        """
        return _CrossEntropy.apply(
            self, student, prototypes.weight_v, prototypes.weight_g, teacher, teacher_prototypes.weight_v,
            teacher_prototypes.weight_g, center, teacher_temperature, moving,
        )  # fmt: skip


class _CrossEntropy(torch.autograd.Function):
    """Some rows at a time: logits, both softmaxes, the loss, and at once the gradient of the student's side, which is
    (sum_t terms * q - sum_t terms * p) / tau_s. So logits live for a moment, and backward has nothing left to compute.

    Within some rows, some prototypes at a time, twice: first the logits, their exponentials (against the largest of a
    group) and the sums that loss and entropy need, then, with the sums over all K known, the gradient. So each exponential
    is computed once, and what lies between two products is a few megabytes, and stays in a CPU's cache. Prototypes stand
    in rows, [K,r]: a CPU's product takes half as long again the other way round (docs/benchmarks.md).
    """

    @staticmethod
    def forward(ctx: Any, how: CrossEntropy, student, v, g, teacher, v_t, g_t, center, tau_t, moving):
        on_cpu = v.device.type == "cpu"
        dtype, columns = v.dtype, how.columns or (4096 if on_cpu else len(v))
        chunk = how.rows or (256 if on_cpu else max(1, 1024 // len(student)))
        if torch.is_autocast_enabled(v.device.type):
            dtype = torch.get_autocast_dtype(v.device.type)
        with torch.autocast(v.device.type, enabled=False):
            exact = torch.promote_types(dtype, torch.float32)
            v, g, tau_s, terms = v.detach(), g.detach(), how.student_temperature, how.terms.to(exact)
            of_each = terms.sum(0).unsqueeze(-1)  # [V,1] terms of each student view
            n = student.shape[1]
            scale = how.weight / (tau_s * terms.sum() * n)
            shifts = (center / tau_t).to(exact).neg().view(-1, 1, 1).split(columns)
            some: list[tuple[Any, ...]] = []  # what Read gives of some prototypes
            d_student, d_v = torch.empty_like(student), torch.empty_like(v)
            d_g = torch.empty_like(g) if ctx.needs_input_grad[3] else None
            parts_of_d_g = [None] * len(shifts) if d_g is None else d_g.split(columns)
            loss, entropy = torch.zeros(2, dtype=exact, device=v.device).unbind()
            for at in range(0, n, chunk):
                first, last = at == 0, at + chunk >= n
                z, z_t = student[:, at : at + chunk], teacher[:, at : at + chunk]  # [V,r,d], [T,r,d]
                z_t, z_s, z = ((x / tau).to(dtype) for x, tau in ((z_t, tau_t), (z, tau_s), (z, 1)))
                kept, found = [], []
                for i, shift in enumerate(shifts):
                    if first:  # not before: what is read is still in the cache
                        k = slice(i * columns, (i + 1) * columns)
                        some.append(how.read(v[k], g[k], v_t[k], g_t[k], moving, dtype))
                    w, _, gain, w_t, gain_t, _ = some[i]
                    e_t, e_s, *sums = how.exponentials(z_t, z_s, w_t, w, gain_t, gain, shift, terms)
                    kept.append((e_t, e_s))
                    if first and last:  # v is read once more anyway, and w made of it anew: keeping it costs more
                        some[i] = (None, *some[i][1:3], None, None, some[i][-1])
                    found.append(sums)
                most_t, sum_t, with_t, with_s, most_s, sum_s = (torch.cat(parts) for parts in zip(*found, strict=True))
                norm_t = (most_t + sum_t.log()).logsumexp(0)  # [groups,T,r] -> [T,r]
                norm_s = (most_s + sum_s.log()).logsumexp(0)  # [V,r]
                part_t, part_s = (most_t - norm_t).exp(), (most_s - norm_s).exp()  # what makes exp(...) probabilities
                entropy += norm_t.sum() - (part_t * with_t).sum()
                loss += (of_each * norm_s).sum() - (part_t * with_s).sum()
                part_t, part_s = part_t * scale, part_s * of_each * scale
                d_z = torch.zeros(z.shape, dtype=exact, device=v.device)
                groups = [len(e_t) for e_t, _ in kept]
                for (w, norm, gain, *_), exps, of_p, of_q, v_k, d_v_k, d_g_k in zip(
                    some, kept, part_t.split(groups), part_s.split(groups), v.split(columns), d_v.split(columns),
                    parts_of_d_g, strict=True,
                ):  # fmt: skip
                    how.gradients(*exps, of_p, of_q, terms, z, w, v_k, norm, gain, d_z, d_v_k, d_g_k, first, last)
                d_student[:, at : at + chunk] = d_z
        ctx.save_for_backward(d_student, d_v, d_g)
        loss, entropy = loss / (terms.sum() * n), entropy / (teacher.shape[0] * n)
        mean_logits = torch.cat([parts[-1] for parts in some]).squeeze(1)
        ctx.mark_non_differentiable(loss, entropy, mean_logits)
        return how.weight * loss, loss, entropy, mean_logits

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        d_student, d_v, d_g = ctx.saved_tensors  # in place: autograd refuses a second pass
        # a step asks for 1; looking costs nothing on a CPU, where a number is there to be seen (no fake tensor's)
        if type(grad) is not Tensor or grad.device.type != "cpu" or grad != 1:
            d_student, d_v, d_g = (t if t is None else t.mul_(grad) for t in (d_student, d_v, d_g))
        return None, d_student, d_v, d_g, *[None] * 6


def weighted_sum(weights: Tensor, x: Tensor) -> Tensor:
    """weights [a,b], x [..., b, r] -> [..., a, r]: for a handful of views. As a product of matrices it would be a batched
    one of tiny matrices, after a transposed copy of x; like this it is compiled into the passes around it."""
    terms = (weights[:, b, None] * x[..., b : b + 1, :] for b in range(weights.shape[1]))
    return reduce(torch.add, terms)


class Read(nn.Module):
    """One reading of some prototypes g v / |v| of both networks. They are never made: products are with v, and g / |v| is
    a gain of their rows."""

    def forward(
        self, v: Tensor, g: Tensor, v_t: Tensor, g_t: Tensor, moving: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """v, v_t [k,d], g, g_t [k,1], student's and teacher's; moving [d].

        Returns v in the dtype of the products, |v| and the gain [k,1]; the teacher's v and gain; its logits of moving [k,1].
        """
        norm, norm_t = (torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in (v, v_t))
        gain, gain_t = g / norm, g_t / norm_t
        # summed, not multiplied as matrices: TF32 would round what moves a center
        return v.to(dtype), norm, gain, v_t.to(dtype), gain_t, gain_t * (v_t * moving).sum(1, keepdim=True)


class Exponentials(nn.Module):
    """From some prototypes to exponentials of logits, and their sums."""

    def forward(
        self, z_t: Tensor, z_s: Tensor, w_t: Tensor, w: Tensor, gain_t: Tensor, gain: Tensor, shift: Tensor,
        terms: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """z_t [T,r,d], z_s [V,r,d]: over their temperatures; w_t, w [k,d], gain_t, gain [k,1]: what Read gave; shift
        [k,1,1]: minus the center, over the temperature.

        The k prototypes stand in c groups. Returns exp(t - most_t) [c,k/c,T,r] and exp(s - most_s) [c,k/c,V,r] of the logits
        t and s, in the dtype of the products; then [c,T,r] each: most_t, the group's largest t, and the sums of
        exp(t - most_t), of t exp(t - most_t) and of the term's s exp(t - most_t); [c,V,r] each: most_s, and the sum of
        exp(s - most_s).
        """
        apart = (-1, GROUP if len(w) % GROUP == 0 else len(w))
        shift, gain, gain_t = (x.view(*apart, 1, 1) for x in (shift, gain, gain_t))
        t = torch.mm(w_t, z_t.flatten(0, 1).T).view(*apart, *z_t.shape[:2])
        s = torch.mm(w, z_s.flatten(0, 1).T).view(*apart, *z_s.shape[:2])
        t, s = torch.addcmul(shift, t, gain_t), s * gain
        most_t, most_s = t.amax(1), s.amax(1)
        e_t = (t - most_t.unsqueeze(1)).exp_()
        mixed = s if terms.numel() == 1 else weighted_sum(terms, s)
        sums_t = e_t.sum(1), t.mul_(e_t).sum(1), torch.mul(mixed, e_t, out=t).sum(1)
        e_s = s.sub_(most_s.unsqueeze(1)).exp_()
        sum_s = e_s.sum(1)
        return e_t.to(w.dtype), e_s.to(w.dtype), most_t, *sums_t, most_s, sum_s


class Gradients(nn.Module):
    """From exponentials of logits to the gradients of the student's side."""

    def forward(
        self, e_t: Tensor, e_s: Tensor, part_t: Tensor, part_s: Tensor, terms: Tensor, z: Tensor, w: Tensor | None,
        v: Tensor, norm: Tensor, gain: Tensor, d_z: Tensor, d_v: Tensor, d_g: Tensor | None,
        first: bool, last: bool,
    ) -> None:  # fmt: skip
        """e_t [c,k/c,T,r], e_s [c,k/c,V,r]: what Exponentials gave; part_t [c,T,r], part_s [c,V,r]: what makes them
        probabilities, and weighs them; z [V,r,d]; w (None: is made anew), v [k,d], norm, gain [k,1]: some prototypes.

        Adds to d_z [V,r,d] and, unless these are the first things, to d_v [k,d]. After the last ones d_v, until then gain
        times the gradient of the prototypes, becomes that of v, and d_g [k,1] (None: not wanted) is written: the weight
        norm's backward pass (Salimans & Kingma 2016, eq. 3).
        """
        part_t, part_s = part_t.unsqueeze(1), part_s.unsqueeze(1)
        d = e_s * part_s  # the gradient of the logits, sum_t terms * (q - p)
        if terms.numel() == 1:  # nothing to mix: each point has one teacher
            d = d.addcmul_(e_t, part_t, value=-1)
        else:
            d -= weighted_sum(terms.T, e_t * part_t)
        d = d.mul_(gain.view(*d.shape[:2], 1, 1)).to(e_s.dtype).flatten(0, 1).flatten(1)
        w = v.to(d.dtype) if w is None else w
        d_z += (d.T @ w).view_as(d_z)
        of_v = (d @ z.flatten(0, 1)).to(d_v.dtype)
        if not first:
            of_v = of_v + d_v
        if last:
            along = (of_v * v).sum(1, keepdim=True) / norm
            if d_g is not None:
                d_g.copy_(along / gain)
            of_v.addcmul_(v, along / norm, value=-1)
        d_v.copy_(of_v)
