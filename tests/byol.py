"""A method outside this repository, as a user would write it: BYOL's regression (Grill et al. 2020, eq. 2) of the teacher's
[CLS], and of its reference tokens. `method=tests.byol:BYOL` trains it."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from model.methods.base import StepOutput
from model.methods.student_teacher import STUDENT, TEACHER, Network, StudentTeacher, stack_pairs
from model.vit import build_vit


class BYOLNetwork(Network):
    def __init__(self, config, drop_path: float):
        super().__init__()
        self.backbone = build_vit(config, drop_path)
        self.projector = nn.Linear(self.backbone.width, config.head.bottleneck)


class BYOL(StudentTeacher):
    def __init__(self, config):
        super().__init__(config, partial(BYOLNetwork, config))
        width = config.head.bottleneck
        self.student.predictor = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, batch, at):
        with torch.no_grad():
            target = self.teacher.projector(self.encode_views(self.teacher, batch, TEACHER)[0])  # [T,B,d]
        predicted = self.student.predictor(self.student.projector(self.encode_views(self.student, batch, STUDENT)[0]))
        pairs = [1 - F.cosine_similarity(predicted[v], target[t], dim=-1).mean() for t, v in self.pairs("all")]
        return StepOutput(2 * torch.stack(pairs).mean(), {}, [])

    def after_step(self, statistics, at, applied):
        self.update_teacher(at.teacher_momentum, applied)


class PointBYOL(BYOL):
    """The same of the reference tokens of all pairs."""

    uses_points = True

    def forward(self, batch, at):
        pairs = self.pairs("all")
        with torch.no_grad():
            tokens = self.encode_views(self.teacher, batch, TEACHER, pairs)[1]
            target = self.teacher.projector(stack_pairs(tokens, pairs))  # [P,B,M,d]
        tokens = self.encode_views(self.student, batch, STUDENT, pairs)[1]
        predicted = self.student.predictor(self.student.projector(stack_pairs(tokens, pairs)))
        return StepOutput(2 - 2 * F.cosine_similarity(predicted, target, dim=-1).mean(), {}, [])
