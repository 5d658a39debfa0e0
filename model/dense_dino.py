"""Student and teacher together: forward(batch) -> losses and means of teacher logits; update_centers; update_teacher.

Letters: B images, V views, Vg views of one size, T teacher views (the first of the V), M points of a pair (t, v), P pairs,
S pairs that one view has points for, D width, K prototypes.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from model.heads import ProjectionHead
from model.losses import CrossEntropy
from model.vit import build_vit
from pipeline.batch import Batch
from runtime.config import TEACHERS, Config

TEACHER, STUDENT = 0, 1  # places in view_points


class Network(nn.Module):
    """A backbone and its projection heads: what the student and the teacher each are."""

    def __init__(self, config: Config, drop_path: float):
        super().__init__()
        reference = config.reference
        self.backbone = build_vit(config.model, config.image_size, reference.attention, reference.border, drop_path)
        head = config.head

        def new_head() -> ProjectionHead:
            return ProjectionHead(
                self.backbone.width, hidden=head.hidden, bottleneck=head.bottleneck, prototypes=head.prototypes,
                norm=head.norm, unit_prototypes=head.unit_prototypes,
            )  # fmt: skip

        self.cls_head = new_head()
        # without points, or with a shared head, there is no second one
        self.reference_head = new_head() if config.points and not head.shared else None

    @property
    def point_head(self) -> ProjectionHead:
        return self.reference_head or self.cls_head


class DenseDINO(nn.Module):
    """Paper section 3. The student learns by gradient, the teacher is its moving average, the centres are the moving
    averages of the teacher's logits."""

    cls_center: Tensor
    reference_center: Tensor

    def __init__(self, config: Config):
        super().__init__()
        self.points, self.loss, self.reference = config.points, config.loss, config.reference
        self.alpha = config.loss.alpha if config.points else 1.0
        self.shared_head = config.head.shared
        self.student = Network(config, config.model.drop_path)
        self.student.backbone.recompute = config.speed.recompute
        self.teacher = Network(config, 0.0)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.register_buffer("cls_center", torch.zeros(config.head.prototypes))
        self.register_buffer("reference_center", torch.zeros(config.head.prototypes))

        self.views = len(config.views)
        every = [(t, v) for t in range(TEACHERS) for v in range(self.views) if v != t]
        between_teachers = [(t, v) for t, v in every if v < TEACHERS]
        self.cls_pairs = every if self.loss.cls_views == "all" else between_teachers
        self.reference_pairs = every if self.reference.views == "all" else between_teachers
        terms = torch.zeros(TEACHERS, self.views)
        for t, v in self.cls_pairs:
            terms[t, v] = 1
        self.cls_loss = CrossEntropy(terms, self.loss.student_temperature, self.alpha)
        # each pair has its own points: one "view" on either side, and every one of the P*B*M points a term
        self.reference_loss = CrossEntropy(torch.ones(1, 1), self.loss.student_temperature, 1 - self.alpha)
        self.published_center_pairs = [(t, v) for t in range(TEACHERS) for v in range(TEACHERS)]

    def parts(self) -> list[nn.Module]:
        """What takes the time, to be compiled each for itself."""
        networks, losses = (self.student, self.teacher), (self.cls_loss, self.reference_loss)
        of_networks = [m for n in networks for m in (n.backbone, n.cls_head, n.reference_head) if m is not None]
        return of_networks + [m for loss in losses for m in loss.parts()]

    def forward(self, batch: Batch, teacher_temperature: Tensor | float) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Losses of a batch (the loader's form), and the means of the teacher's logits that move the centres.

        Returns ({"loss", "cls_loss", "reference_loss", "teacher_entropy"}: scalars, [cls mean [K], reference mean [K]];
        one mean where there is one centre). The centres used are those before this step (published order).
        """
        student, teacher = self.student, self.teacher
        with torch.no_grad():
            cls, tokens = self._see(teacher, batch, TEACHER)
            cls_t = teacher.cls_head(cls)  # [T,B,d]
            if self.points:
                points_t = moving_points = teacher.point_head(self._stacked(tokens, self.reference_pairs))  # [P,B,M,d]
                if self.reference.center == "published":
                    moving_points = teacher.point_head(self._stacked(tokens, self.published_center_pairs))

        cls, tokens = self._see(student, batch, STUDENT)
        log, means = {}, []
        log["loss"], log["cls_loss"], log["teacher_entropy"], mean = self.cls_loss(
            student.cls_head(cls), student.cls_head.last_layer, cls_t, teacher.cls_head.last_layer, self.cls_center,
            teacher_temperature, _mean(cls_t),
        )  # fmt: skip
        means.append(mean)
        if self.points:
            points = student.point_head(self._stacked(tokens, self.reference_pairs))
            loss, log["reference_loss"], _, mean = self.reference_loss(
                points.flatten(0, 2)[None], student.point_head.last_layer, points_t.flatten(0, 2)[None],
                teacher.point_head.last_layer, self.cls_center if self.shared_head else self.reference_center,
                teacher_temperature, _mean(moving_points),
            )  # fmt: skip
            means.append(mean)
            if self.shared_head:  # one centre: the mean over all tokens of its head
                n = [z.shape[:-1].numel() for z in (cls_t, moving_points)]
                means = [(n[0] * means[0] + n[1] * means[1]) / sum(n)]
            log["loss"] = log["loss"] + loss
        return log, means

    def _see(self, network: Network, batch: Batch, role: int) -> tuple[Tensor, dict[tuple[int, int], Tensor]]:
        """What a network makes of the views that its role sees: [CLS] [views,B,D], and the reference tokens [B,M,D] of
        each pair (t, v); the teacher sees them in view t, the student in view v."""
        points_seen = batch.view_points[..., role, :]  # [B,T,V,M,2]
        cls: list[Tensor] = []
        tokens: dict[tuple[int, int], Tensor] = {}
        first = 0
        for images in batch.views:  # [Vg,B,3,H,W]: views of one size go through in one batch
            views = range(first, first + len(images))
            first += len(images)
            if role == TEACHER:
                views = range(views.start, min(views.stop, TEACHERS))
            if not views:
                continue
            images = images[: len(views)]
            runs = self._runs(views, role)
            points = []  # of each run of views with equally many pairs
            for run in runs:
                of_run = torch.stack([points_seen[:, t, v] for pairs in run for t, v in pairs])  # [len(run)*S,B,M,2]
                of_run = of_run.unflatten(0, (len(run), -1)).transpose(1, 2)  # [len(run),B,S,M,2]
                points.append(of_run.flatten(2, 3).flatten(0, 1))  # [len(run)*B,S*M,2]
            c, _, read = network.backbone(images.flatten(0, 1), points, patches_too=False)
            cls.append(c.unflatten(0, images.shape[:2]))
            for run, r in zip(runs, read, strict=True):
                r = r.unflatten(1, (-1, self.points)).unflatten(0, (len(run), -1))  # [len(run),B,S,M,D]
                tokens |= {pair: r[i, :, s] for i, pairs in enumerate(run) for s, pair in enumerate(pairs)}
        return torch.cat(cls), tokens

    def _runs(self, views: range, role: int) -> list[list[list[tuple[int, int]]]]:
        """The pairs (t, v) whose points are computed in each of these views, those that enter the loss or the centre (all,
        where reference tokens see each other): for runs of views with equally many."""
        needed = set(self.reference_pairs if self.points else [])
        if role == TEACHER and self.points and self.reference.center == "published":
            needed |= set(self.published_center_pairs)
        if needed and self.reference.attention == "none":
            needed = {(t, v) for t in range(TEACHERS) for v in range(self.views)}
        seen = [[(t, v) for t, v in sorted(needed) if (t if role == TEACHER else v) == view] for view in views]
        # views without points, if any, are student-only ones and come last: they make no run
        return [list(run) for pairs, run in itertools.groupby(seen, key=len) if pairs]

    @staticmethod
    def _stacked(tokens: dict[tuple[int, int], Tensor], pairs: list[tuple[int, int]]) -> Tensor:
        """[P,B,M,D]"""
        return torch.stack([tokens[pair] for pair in pairs])

    @torch.no_grad()
    def update_centers(self, means: list[Tensor], taken: Tensor | None = None) -> None:
        """c <- m c + (1 - m) mean of the teacher's logits, the mean over all processes; after the optimiser's step.

        taken: 0-dim, 0 where the optimiser's step was not taken: then nothing moves, here and in `update_teacher`.
        """
        for center, mean in zip((self.cls_center, self.reference_center), means, strict=False):
            moved = center.lerp(mean, 1 - self.loss.center_momentum)
            center.copy_(moved if taken is None else torch.where(taken > 0, moved, center))

    @torch.no_grad()
    def update_teacher(self, momentum: float, taken: Tensor | None = None) -> None:
        """theta_t <- momentum theta_t + (1 - momentum) theta_s."""
        teacher: list[Tensor] = list(self.teacher.parameters())
        student: list[Tensor] = list(self.student.parameters())
        # student and teacher are finite: a weight of 0 leaves every value
        if taken is None or taken.device.type == "cpu":
            weight = (1 - momentum) * (1.0 if taken is None else float(taken))
            torch._foreach_lerp_(teacher, student, weight)
        else:  # lerp takes no weight from the device but tensor by tensor; these are a few launches for all of them
            moves = torch._foreach_sub(student, teacher)
            torch._foreach_mul_(moves, (1 - momentum) * taken)
            torch._foreach_add_(teacher, moves)


def _mean(z: Tensor) -> Tensor:
    """Mean over all tokens [..., d] -> [d]; logits are linear, so theirs is that of the mean."""
    return z.flatten(0, -2).mean(0, dtype=torch.promote_types(z.dtype, torch.float32))


@dataclass
class Cost:
    """What one image of a step costs."""

    flops: int  # of forward and backward passes, two for each multiplication and addition of a matrix product
    activations: int  # bytes kept for the backward pass, in float32


def count_cost(model: DenseDINO, config: Config) -> Cost:
    """Counted, not estimated: a step of one image with torch's fake tensors (real shapes, no numbers)."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        views = [
            torch.empty(len(list(g)), 1, 3, size, size) for size, g in itertools.groupby(v.size for v in config.views)
        ]
        points = torch.empty(1, TEACHERS, model.views, max(1, model.points), 2, 2)
        ids, nothing = torch.empty(1, dtype=torch.int64), torch.empty(0)
        batch = Batch(0, ids, ids, views, nothing, points, nothing)
        own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), *views, points)}
        kept: dict[int, int] = {}

        def keep(t: Tensor) -> Tensor:
            storage = t.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
            return t

        counter = FlopCounterMode(display=False)
        for which in "", "_backward":  # torch 2.11 counts a GPU's fused attention, and a CPU's not
            of_gpu, of_cpu = (
                getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention{device}{which}")
                for device in ("", "_for_cpu")
            )
            counter.flop_registry.setdefault(of_cpu, counter.flop_registry[of_gpu])
        with counter:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
                log, _ = model(batch, 0.04)
            log["loss"].backward()
    model.zero_grad(set_to_none=True)
    # the gradient of the prototypes is made on the way forward: once for a whole batch, not for each image
    once = sum(p.numel() * 4 for n, p in model.student.named_parameters() if "last_layer" in n and p.requires_grad)
    return Cost(counter.get_total_flops(), max(0, sum(kept.values()) - once))
