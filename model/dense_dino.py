"""Student and teacher together: forward(batch) -> losses and means of teacher logits; update_centers; update_teacher.

Letters: B images, V views, Vg views of one size, T teacher views (the first of the V), M points of a pair (t, v), P pairs,
S pairs that one view has points for, D width, K prototypes.
"""

import torch
from torch import Tensor, nn

from model.heads import ProjectionHead
from model.losses import cross_entropy
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
    cls_terms: Tensor  # [T,V] 1 where (t, v) is a term of the class loss

    def __init__(self, config: Config):
        super().__init__()
        self.points, self.loss, self.reference = config.points, config.loss, config.reference
        self.alpha = config.loss.alpha if config.points else 1.0
        self.shared_head = config.head.shared
        self.student = Network(config, config.model.drop_path)
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
        self.register_buffer("cls_terms", torch.zeros(TEACHERS, self.views), persistent=False)
        for t, v in self.cls_pairs:
            self.cls_terms[t, v] = 1
        self.published_center_pairs = [(t, v) for t in range(TEACHERS) for v in range(TEACHERS)]

    def parts(self) -> list[nn.Module]:
        """What takes the time, to be compiled each for itself."""
        networks = (self.student, self.teacher)
        return [m for n in networks for m in (n.backbone, n.cls_head, n.reference_head) if m is not None]

    def forward(self, batch: Batch, teacher_temperature: Tensor | float) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Losses of a batch (the loader's form), and the means of the teacher's logits that move the centres.

        Returns ({"loss", "cls_loss", "reference_loss", "teacher_entropy"}: scalars, [cls mean [K], reference mean [K]];
        one mean where there is one centre). The centres used are those before this step (published order).
        """
        student, teacher = self.student, self.teacher
        temperatures = (self.loss.student_temperature, teacher_temperature)
        with torch.no_grad():
            cls, tokens = self._see(teacher, batch, TEACHER)
            z_t, rows_t = teacher.cls_head(cls), teacher.cls_head.last_layer()  # [T,B,d], [K,d]
            means = [self._mean_logits(z_t, rows_t)]
            if self.points:
                points_t = teacher.point_head(self._stacked(tokens, self.reference_pairs))  # [P,B,M,d]
                point_rows_t = rows_t if self.shared_head else teacher.point_head.last_layer()
                moving = points_t
                if self.reference.center == "published":
                    moving = teacher.point_head(self._stacked(tokens, self.published_center_pairs))
                means.append(self._mean_logits(moving, point_rows_t))
                if self.shared_head:  # one centre: the mean over all tokens of its head
                    n = [z.shape[:-1].numel() for z in (z_t, moving)]
                    means = [(n[0] * means[0] + n[1] * means[1]) / sum(n)]

        cls, tokens = self._see(student, batch, STUDENT)
        rows = student.cls_head.last_layer()
        log = {}
        log["cls_loss"], log["teacher_entropy"] = cross_entropy(
            student.cls_head(cls), rows, z_t, rows_t, self.cls_center, *temperatures, self.cls_terms
        )
        log["loss"] = self.alpha * log["cls_loss"]
        if self.points:
            # each pair has its own points: one "view" on either side, and every one of the P*B*M points a term
            points = student.point_head(self._stacked(tokens, self.reference_pairs))
            point_rows = rows if self.shared_head else student.point_head.last_layer()
            center = self.cls_center if self.shared_head else self.reference_center
            log["reference_loss"], _ = cross_entropy(
                points.flatten(0, 2)[None], point_rows, points_t.flatten(0, 2)[None], point_rows_t, center, *temperatures,
                torch.ones(1, 1, device=points.device),
            )  # fmt: skip
            log["loss"] = log["loss"] + (1 - self.alpha) * log["reference_loss"]
        return log, means

    def _mean_logits(self, z: Tensor, prototypes: Tensor) -> Tensor:
        """Mean over all tokens of z @ prototypes.T [K]: linear, so the mean of z does."""
        exact = self.cls_center.dtype
        with torch.autocast(z.device.type, enabled=False):
            return prototypes.to(exact) @ z.flatten(0, -2).mean(0, dtype=exact)

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
            pairs = self._pairs_seen(views, role)
            points = None
            if pairs[0]:
                points = torch.stack([points_seen[:, t, v] for of_view in pairs for t, v in of_view])  # [Vg*S,B,M,2]
                points = points.unflatten(0, (len(views), -1)).transpose(1, 2)  # [Vg,B,S,M,2]
                points = points.flatten(2, 3).flatten(0, 1)  # [Vg*B,S*M,2]
            c, _, r = network.backbone(images.flatten(0, 1), points)
            cls.append(c.unflatten(0, images.shape[:2]))
            if r is not None:
                r = r.unflatten(1, (-1, self.points)).unflatten(0, images.shape[:2])  # [Vg,B,S,M,D]
                tokens |= {pair: r[i, :, s] for i, of_view in enumerate(pairs) for s, pair in enumerate(of_view)}
        return torch.cat(cls), tokens

    def _pairs_seen(self, views: range, role: int) -> list[list[tuple[int, int]]]:
        """For each of these views, the pairs (t, v) whose points are computed in it: those that enter the loss or the
        centre. All, where reference tokens see each other. Equally many for each view of a batch: beside student-only
        views a teacher view carries its self pair too."""
        needed = set(self.reference_pairs if self.points else [])
        if role == TEACHER and self.points and self.reference.center == "published":
            needed |= set(self.published_center_pairs)
        if needed and self.reference.attention == "none":
            needed = {(t, v) for t in range(TEACHERS) for v in range(self.views)}
        seen = [[(t, v) for t, v in sorted(needed) if (t if role == TEACHER else v) == view] for view in views]
        if len({len(of_view) for of_view in seen}) > 1:
            seen = [[(t, view) for t in range(TEACHERS)] for view in views]
        return seen

    @staticmethod
    def _stacked(tokens: dict[tuple[int, int], Tensor], pairs: list[tuple[int, int]]) -> Tensor:
        """[P,B,M,D]"""
        return torch.stack([tokens[pair] for pair in pairs])

    @torch.no_grad()
    def update_centers(self, means: list[Tensor]) -> None:
        """c <- m c + (1 - m) mean of the teacher's logits, the mean over all processes; after the optimiser's step."""
        for center, mean in zip((self.cls_center, self.reference_center), means, strict=False):
            center.lerp_(mean, 1 - self.loss.center_momentum)

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """theta_t <- momentum theta_t + (1 - momentum) theta_s."""
        torch._foreach_lerp_(list(self.teacher.parameters()), list(self.student.parameters()), 1 - momentum)
