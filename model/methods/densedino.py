"""DenseDINO (paper section 3.2): DINO, and the student also predicts the teacher's output at each reference point.

Letters: B images, V views, T teacher views, M points of a pair (t, v), P pairs, D width, d bottleneck, K prototypes.
"""

import torch
from torch import Tensor, nn

from model.heads import ProjectionHead
from model.losses.cross_entropy import CrossEntropy
from model.methods.base import StepOutput
from model.methods.dino import DINO, DINONetwork, mean_token
from model.methods.student_teacher import STUDENT, TEACHER, stack_pairs
from pipeline.batch import Batch
from runtime.config import TEACHERS, Config
from runtime.schedule import StepValues


class DenseDINONetwork(DINONetwork):
    """DINO's network with a second head for reference tokens, unless head.shared: then they use that of [CLS]."""

    reference_head: ProjectionHead | None

    def __init__(self, config: Config, drop_path: float):
        super().__init__(config, drop_path)
        self.reference_head = None if config.head.shared else self.new_head(config)

    @property
    def point_head(self) -> ProjectionHead:
        return self.reference_head or self.cls_head


class DenseDINO(DINO):
    """Eq. 4: alpha times the class loss, 1 - alpha times the reference loss."""

    student: DenseDINONetwork
    teacher: DenseDINONetwork
    reference_center: Tensor
    uses_points = True
    clip_positions_apart = True  # as in the published DenseDINO; published DINO and timm have one tensor

    def __init__(self, config: Config):
        super().__init__(config, DenseDINONetwork, config.loss.alpha)
        self.reference, self.shared_head = config.reference, config.head.shared
        self.register_buffer("reference_center", torch.zeros(config.head.prototypes))
        # each pair has its own points: one "view" on either side, and each of the P*B*M points is a sample
        self.reference_loss = CrossEntropy(torch.ones(1, 1), self.loss.student_temperature, 1 - self.alpha)
        self.reference_pairs = self.pairs(self.reference.views)
        # published: the tokens of all teacher views update the center, including the self pairs (t, t)
        self.center_pairs = self.reference_pairs
        if self.reference.center == "published":
            self.center_pairs = [(t, v) for t in range(TEACHERS) for v in range(TEACHERS)]
        # only tokens of the loss or the center are computed; all of them where reference tokens attend to each other
        self.student_pairs = set(self.reference_pairs)
        self.teacher_pairs = self.student_pairs | set(self.center_pairs)
        if self.reference.attention == "none":
            self.student_pairs = self.teacher_pairs = {(t, v) for t in range(TEACHERS) for v in range(self.views)}

    def compile_units(self) -> list[nn.Module]:
        return super().compile_units() + self.reference_loss.compile_units()

    def forward(self, batch: Batch, at: StepValues) -> StepOutput:
        student, teacher = self.student, self.teacher
        with torch.no_grad():
            cls, tokens = self.encode_views(teacher, batch, TEACHER, self.teacher_pairs)
            cls_t = teacher.cls_head(cls)  # [T,B,d]
            points_t = center_points = teacher.point_head(stack_pairs(tokens, self.reference_pairs))  # [P,B,M,d]
            if self.center_pairs != self.reference_pairs:
                center_points = teacher.point_head(stack_pairs(tokens, self.center_pairs))
        cls, tokens = self.encode_views(student, batch, STUDENT, self.student_pairs)
        image = self.compare_cls(student.cls_head(cls), cls_t, at)
        points = student.point_head(stack_pairs(tokens, self.reference_pairs))
        loss, reference_loss, _, mean = self.reference_loss(
            points.flatten(0, 2)[None], student.point_head.last_layer, points_t.flatten(0, 2)[None],
            teacher.point_head.last_layer, self.cls_center if self.shared_head else self.reference_center,
            at.teacher_temperature, mean_token(center_points),
        )  # fmt: skip
        means = [*image.statistics, mean]
        if self.shared_head:  # one center: the mean over all tokens of the head
            n = [z.shape[:-1].numel() for z in (cls_t, center_points)]
            means = [(n[0] * means[0] + n[1] * means[1]) / sum(n)]
        return StepOutput(image.loss + loss, image.metrics | {"reference_loss": reference_loss}, means)

    def centers(self) -> list[Tensor]:
        return [self.cls_center] if self.shared_head else [self.cls_center, self.reference_center]
