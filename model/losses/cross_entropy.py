"""Cross-entropy between teacher and student probabilities: both losses of DenseDINO. Paper eq. 1-4.

Letters: T teacher views, V views, K prototypes, k prototypes of one chunk, n samples (images or points), r samples of one
chunk, d dimensions of the unit sphere, c groups of prototypes in a chunk.
"""

from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from model.heads import Prototypes

GROUP = 64  # prototypes whose logits stay in a CPU core's own cache between two passes over them


class CrossEntropy(nn.Module):
    """Eq. 2 or eq. 3 as a mean over its terms. All logits are never in memory at once.

    terms [T,V]: 1 where (t, v) is a term of the loss, else 0. weight: factor of this loss in the total (eq. 4).
    sample_chunk: samples processed at a time (default: 256 on a CPU, 1,024 rows of student logits on a GPU).
    prototype_chunk: prototypes processed at a time (default: 4,096 on a CPU, which fit its cache; all on a GPU).
    """

    terms: Tensor

    def __init__(
        self, terms: Tensor, student_temperature: float, weight: float = 1.0,
        sample_chunk: int | None = None, prototype_chunk: int | None = None,
    ):  # fmt: skip
        super().__init__()
        self.register_buffer("terms", terms, persistent=False)
        self.student_temperature, self.weight = student_temperature, weight
        self.sample_chunk, self.prototype_chunk = sample_chunk, prototype_chunk
        self.prepare, self.exponentials, self.gradients = PreparePrototypes(), Exponentials(), Gradients()

    def compile_units(self) -> list[nn.Module]:
        """The operations on one chunk of prototypes: many passes over memory unless they are compiled into a few."""
        return [self.prepare, self.exponentials, self.gradients]

    def forward(
        self, student: Tensor, prototypes: Prototypes, teacher: Tensor, teacher_prototypes: Prototypes, center: Tensor,
        teacher_temperature: Tensor | float, center_batch: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """student [V,n,d], teacher [T,n,d]: unit vectors of the same n samples in each view. center [K]. center_batch [d]:
        mean of the unit vectors whose logits update the center.

            for t, v in terms:  for i in range(n):
                p = softmax((teacher[t,i] @ teacher_prototypes().T - center) / teacher_temperature)
                loss += -sum_k p[k] * log_softmax(student[v,i] @ prototypes().T / student_temperature)[k] / (terms.sum() * n)

        Returns (weight * loss, whose gradient reaches student and prototypes; loss; mean entropy of p in nats;
        teacher_prototypes() @ center_batch [K]). A second backward pass raises RuntimeError.
        """
        return _CrossEntropy.apply(
            self, student, prototypes.weight_v, prototypes.weight_g, teacher, teacher_prototypes.weight_v,
            teacher_prototypes.weight_g, center, teacher_temperature, center_batch,
        )  # fmt: skip


class _CrossEntropy(torch.autograd.Function):
    """Processes one chunk of samples at a time: logits, both softmaxes, the loss and at once the student's gradient,
    (sum_t terms * q - sum_t terms * p) / tau_s. Logits are freed with their chunk; backward has nothing left to compute.

    Each chunk of samples passes twice over the chunks of prototypes. The first pass computes the logits, their exponentials
    (relative to the maximum of a group) and the sums for loss and entropy. The second, with the sums over all K known,
    computes the gradient. Each exponential is computed once, and the data between two matrix products is a few megabytes,
    which stay in a CPU's cache. Logits are laid out [K,r]: on a CPU the product takes 1.5 times as long the other way round
    (docs/lab/2026-11.md).
    """

    @staticmethod
    def forward(ctx: Any, spec: CrossEntropy, student, v, g, teacher, v_t, g_t, center, tau_t, center_batch):
        on_cpu = v.device.type == "cpu"
        dtype, prototype_chunk = v.dtype, spec.prototype_chunk or (4096 if on_cpu else len(v))
        sample_chunk = spec.sample_chunk or (256 if on_cpu else max(1, 1024 // len(student)))
        if torch.is_autocast_enabled(v.device.type):
            dtype = torch.get_autocast_dtype(v.device.type)
        with torch.autocast(v.device.type, enabled=False):
            sum_dtype = torch.promote_types(dtype, torch.float32)
            v, g, tau_s, terms = v.detach(), g.detach(), spec.student_temperature, spec.terms.to(sum_dtype)
            terms_of_view = terms.sum(0).unsqueeze(-1)  # [V,1]
            n = student.shape[1]
            scale = spec.weight / (tau_s * terms.sum() * n)
            shifts = (center / tau_t).to(sum_dtype).neg().view(-1, 1, 1).split(prototype_chunk)
            prototype_blocks: list[tuple[Any, ...]] = []  # the output of PreparePrototypes for each chunk
            d_student, d_v = torch.empty_like(student), torch.empty_like(v)
            d_g = torch.empty_like(g) if ctx.needs_input_grad[3] else None
            d_g_blocks = [None] * len(shifts) if d_g is None else d_g.split(prototype_chunk)
            loss, entropy = torch.zeros(2, dtype=sum_dtype, device=v.device).unbind()
            for start in range(0, n, sample_chunk):
                first, last = start == 0, start + sample_chunk >= n
                samples = slice(start, start + sample_chunk)
                z, z_t = student[:, samples], teacher[:, samples]  # [V,r,d], [T,r,d]
                z_t, z_s, z = ((x / tau).to(dtype) for x, tau in ((z_t, tau_t), (z, tau_s), (z, 1)))
                exp_blocks, block_sums = [], []
                for i, shift in enumerate(shifts):
                    if first:  # here and not before the loop: what was prepared is still in the cache
                        k = slice(i * prototype_chunk, (i + 1) * prototype_chunk)
                        prototype_blocks.append(spec.prepare(v[k], g[k], v_t[k], g_t[k], center_batch, dtype))
                    w, _, gain, w_t, gain_t, _ = prototype_blocks[i]
                    e_t, e_s, *sums = spec.exponentials(z_t, z_s, w_t, w, gain_t, gain, shift, terms)
                    exp_blocks.append((e_t, e_s))
                    if first and last:  # v is read once more anyway; converting it to w again is cheaper than keeping w
                        prototype_blocks[i] = (None, *prototype_blocks[i][1:3], None, None, prototype_blocks[i][-1])
                    block_sums.append(sums)
                max_t, sum_t, sum_t_logit, sum_s_logit, max_s, sum_s = (
                    torch.cat(blocks) for blocks in zip(*block_sums, strict=True)
                )
                log_z_t = (max_t + sum_t.log()).logsumexp(0)  # log-partition [groups,T,r] -> [T,r]
                log_z_s = (max_s + sum_s.log()).logsumexp(0)  # [V,r]
                p_scale, q_scale = (max_t - log_z_t).exp(), (max_s - log_z_s).exp()  # exponentials -> probabilities
                entropy += log_z_t.sum() - (p_scale * sum_t_logit).sum()
                loss += (terms_of_view * log_z_s).sum() - (p_scale * sum_s_logit).sum()
                p_scale, q_scale = p_scale * scale, q_scale * terms_of_view * scale
                d_z = torch.zeros(z.shape, dtype=sum_dtype, device=v.device)
                groups = [len(e_t) for e_t, _ in exp_blocks]
                for (w, norm, gain, *_), exps, p_scale_k, q_scale_k, v_k, d_v_k, d_g_k in zip(
                    prototype_blocks, exp_blocks, p_scale.split(groups), q_scale.split(groups),
                    v.split(prototype_chunk), d_v.split(prototype_chunk), d_g_blocks, strict=True,
                ):  # fmt: skip
                    spec.gradients(
                        *exps, p_scale_k, q_scale_k, terms, z, w, v_k, norm, gain, d_z, d_v_k, d_g_k, first, last
                    )
                d_student[:, samples] = d_z
        ctx.save_for_backward(d_student, d_v, d_g)
        loss, entropy = loss / (terms.sum() * n), entropy / (teacher.shape[0] * n)
        mean_logits = torch.cat([block[-1] for block in prototype_blocks]).squeeze(1)
        ctx.mark_non_differentiable(loss, entropy, mean_logits)
        return spec.weight * loss, loss, entropy, mean_logits

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        d_student, d_v, d_g = ctx.saved_tensors  # changed in place: autograd refuses a second pass
        # a whole step's factor is 1. Reading it costs nothing on a CPU; on a GPU the host would wait, a fake tensor has none
        if type(grad) is not Tensor or grad.device.type != "cpu" or grad != 1:
            d_student, d_v, d_g = (t if t is None else t.mul_(grad) for t in (d_student, d_v, d_g))
        return None, d_student, d_v, d_g, *[None] * 6


def weighted_sum(weights: Tensor, x: Tensor) -> Tensor:
    """weights [a,b], x [..., b, r] -> [..., a, r], for a few views. As a matrix product this would be a batch of tiny
    products after a transposed copy of x; as sums it is compiled into the passes around it."""
    terms = (weights[:, b, None] * x[..., b : b + 1, :] for b in range(weights.shape[1]))
    return reduce(torch.add, terms)


class PreparePrototypes(nn.Module):
    """Reads a chunk of both networks' prototypes g v / |v| once. The prototypes themselves are never formed: products are
    with v, and g / |v| is a gain of the logits."""

    def forward(
        self, v: Tensor, g: Tensor, v_t: Tensor, g_t: Tensor, center_batch: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """v [k,d], g [k,1] of the student, v_t, g_t of the teacher; center_batch [d].

        Returns v in the dtype of the products, |v| and the gain [k,1]; the teacher's v and gain; the teacher's logits of
        center_batch [k,1].
        """
        norm, norm_t = (torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in (v, v_t))
        gain, gain_t = g / norm, g_t / norm_t
        # a sum, not a matrix product: TF32 would round what updates a center
        return v.to(dtype), norm, gain, v_t.to(dtype), gain_t, gain_t * (v_t * center_batch).sum(1, keepdim=True)


class Exponentials(nn.Module):
    """The first pass over a chunk of prototypes: exponentials of the logits, and their sums."""

    def forward(
        self, z_t: Tensor, z_s: Tensor, w_t: Tensor, w: Tensor, gain_t: Tensor, gain: Tensor, shift: Tensor,
        terms: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """z_t [T,r,d], z_s [V,r,d]: unit vectors over their temperatures. w_t, w [k,d], gain_t, gain [k,1]: output of
        PreparePrototypes. shift [k,1,1]: -center / temperature.

        The k prototypes form c groups. For logits t and s, returns exp(t - max_t) [c,k/c,T,r] and exp(s - max_s)
        [c,k/c,V,r] in the dtype of the products; then [c,T,r] each: max_t, the group's largest t, and the sums over the
        group of exp(t - max_t), of t exp(t - max_t) and of the term's s exp(t - max_t); then [c,V,r] each: max_s, and the
        sum of exp(s - max_s).
        """
        grouped = (-1, GROUP if len(w) % GROUP == 0 else len(w))
        shift, gain, gain_t = (x.view(*grouped, 1, 1) for x in (shift, gain, gain_t))
        t = torch.mm(w_t, z_t.flatten(0, 1).T).view(*grouped, *z_t.shape[:2])
        s = torch.mm(w, z_s.flatten(0, 1).T).view(*grouped, *z_s.shape[:2])
        t, s = torch.addcmul(shift, t, gain_t), s * gain
        max_t, max_s = t.amax(1), s.amax(1)
        e_t = (t - max_t.unsqueeze(1)).exp_()
        s_of_terms = s if terms.numel() == 1 else weighted_sum(terms, s)
        sums_t = e_t.sum(1), t.mul_(e_t).sum(1), torch.mul(s_of_terms, e_t, out=t).sum(1)
        e_s = s.sub_(max_s.unsqueeze(1)).exp_()
        sum_s = e_s.sum(1)
        return e_t.to(w.dtype), e_s.to(w.dtype), max_t, *sums_t, max_s, sum_s


class Gradients(nn.Module):
    """The second pass over a chunk of prototypes: the gradients of the student's side."""

    def forward(
        self, e_t: Tensor, e_s: Tensor, p_scale: Tensor, q_scale: Tensor, terms: Tensor, z: Tensor, w: Tensor | None,
        v: Tensor, norm: Tensor, gain: Tensor, d_z: Tensor, d_v: Tensor, d_g: Tensor | None,
        first: bool, last: bool,
    ) -> None:  # fmt: skip
        """e_t [c,k/c,T,r], e_s [c,k/c,V,r]: output of Exponentials. p_scale [c,T,r], q_scale [c,V,r]: factors that make
        them weighted probabilities. z [V,r,d]. w (None: v is converted again), v [k,d], norm, gain [k,1]: the chunk's
        prototypes. first, last: whether this is the first or last chunk of samples.

        Adds to d_z [V,r,d], and to d_v [k,d] (overwrites it if first). Until the last chunk d_v is gain times the gradient
        of the prototypes; then it becomes the gradient of v, and d_g [k,1] (None: not needed) is written: the weight norm's
        backward pass (Salimans & Kingma 2016, eq. 3).
        """
        p_scale, q_scale = p_scale.unsqueeze(1), q_scale.unsqueeze(1)
        d = e_s * q_scale  # becomes the gradient of the logits, sum_t terms * (q - p)
        if terms.numel() == 1:  # each point has one teacher view: nothing to sum over
            d = d.addcmul_(e_t, p_scale, value=-1)
        else:
            d -= weighted_sum(terms.T, e_t * p_scale)
        d = d.mul_(gain.view(*d.shape[:2], 1, 1)).to(e_s.dtype).flatten(0, 1).flatten(1)
        w = v.to(d.dtype) if w is None else w
        d_z += (d.T @ w).view_as(d_z)
        d_v_new = (d @ z.flatten(0, 1)).to(d_v.dtype)
        if not first:
            d_v_new = d_v_new + d_v
        if last:
            radial = (d_v_new * v).sum(1, keepdim=True) / norm
            if d_g is not None:
                d_g.copy_(radial / gain)
            d_v_new.addcmul_(v, radial / norm, value=-1)
        d_v.copy_(d_v_new)
