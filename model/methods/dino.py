"""DINO (Caron et al. 2021; paper section 3.1): the student's [CLS] of one view predicts the teacher's of another.

Letters: B images, V views, T teacher views, D width, d bottleneck of the head, K prototypes.
"""

from functools import partial

import torch
from torch import Tensor, nn

from model.heads import ProjectionHead
from model.losses.cross_entropy import CrossEntropy
from model.methods.base import StepOutput
from model.methods.student_teacher import STUDENT, TEACHER, Network, StudentTeacher
from model.vit import build_vit
from pipeline.batch import Batch
from runtime.config import TEACHERS, Config
from runtime.schedule import StepValues


class DINONetwork(Network):
    """A backbone and the projection head of [CLS]."""

    def __init__(self, config: Config, drop_path: float):
        super().__init__()
        self.backbone = build_vit(config, drop_path)
        self.cls_head = self.new_head(config)

    def new_head(self, config: Config) -> ProjectionHead:
        head = config.head
        return ProjectionHead(
            self.backbone.width, hidden=head.hidden, bottleneck=head.bottleneck, prototypes=head.prototypes,
            norm=head.norm, norm_last_layer=head.norm_last_layer,
        )  # fmt: skip


class DINO(StudentTeacher):
    """The student learns by gradient, the teacher is its EMA, the center is the EMA of the teacher's logits."""

    student: DINONetwork
    teacher: DINONetwork
    cls_center: Tensor

    def __init__(self, config: Config, network: type[DINONetwork] = DINONetwork, alpha: float = 1.0):
        """alpha: weight of the class loss in the total."""
        super().__init__(config, partial(network, config))
        self.loss, self.alpha = config.loss, alpha
        self.register_buffer("cls_center", torch.zeros(config.head.prototypes))
        self.cls_pairs = self.pairs(config.loss.cls_views)
        terms = torch.zeros(TEACHERS, self.views)
        for t, v in self.cls_pairs:
            terms[t, v] = 1
        self.cls_loss = CrossEntropy(terms, self.loss.student_temperature, alpha)

    def compile_units(self) -> list[nn.Module]:
        return super().compile_units() + self.cls_loss.compile_units()

    def forward(self, batch: Batch, at: StepValues) -> StepOutput:
        with torch.no_grad():
            cls, _ = self.encode_views(self.teacher, batch, TEACHER)
            cls_t = self.teacher.cls_head(cls)
        cls, _ = self.encode_views(self.student, batch, STUDENT)
        return self.compare_cls(self.student.cls_head(cls), cls_t, at)

    def compare_cls(self, student: Tensor, teacher: Tensor, at: StepValues) -> StepOutput:
        """Eq. 2 for the heads' outputs, student [V,B,d], teacher [T,B,d], with the center from before this step."""
        loss, cls_loss, entropy, mean = self.cls_loss(
            student, self.student.cls_head.last_layer, teacher, self.teacher.cls_head.last_layer, self.cls_center,
            at.teacher_temperature, mean_token(teacher),
        )  # fmt: skip
        return StepOutput(loss, {"cls_loss": cls_loss, "teacher_entropy": entropy}, [mean])

    def after_step(self, statistics: list[Tensor], at: StepValues, applied: Tensor) -> None:
        self.update_teacher(at.teacher_momentum, applied)
        self.update_centers(statistics, applied)

    def centers(self) -> list[Tensor]:
        return [self.cls_center]

    @torch.no_grad()
    def update_centers(self, means: list[Tensor], applied: Tensor | None = None) -> None:
        """c <- m c + (1 - m) mean of the teacher's logits over all processes. means: [K] each. applied: 0-dim, 0 if nothing
        may change."""
        for center, mean in zip(self.centers(), means, strict=True):
            updated = center.lerp(mean, 1 - self.loss.center_momentum)
            center.copy_(updated if applied is None else torch.where(applied > 0, updated, center))


def mean_token(z: Tensor) -> Tensor:
    """Mean over all tokens [..., d] -> [d]; the logits of the mean are the mean of the logits (a linear map)."""
    return z.flatten(0, -2).mean(0, dtype=torch.promote_types(z.dtype, torch.float32))
