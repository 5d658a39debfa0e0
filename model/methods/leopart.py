"""Leopart (Ziegler & Asano 2022, "Self-Supervised Learning of Object Parts for Semantic Segmentation"): patch tokens are
clustered, and the student predicts, from another view, the cluster that the teacher assigns a place to.

Letters: B images of this process, V views, Vg views of one size, T teacher views, g x g = N patches of a teacher view, h x h
of any view, d bottleneck of the head, K prototypes, n rows that a step pushes.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from model import drop_path
from model.foreground import foreground
from model.losses.dense_clustering import dense_clustering
from model.methods.base import StepOutput
from model.methods.clustering import ClusterNetwork, assign, mean_entropy, new_queue
from model.methods.encode import encode
from model.methods.student_teacher import StudentTeacher
from pipeline.batch import Batch
from runtime.config import PUSHED, TEACHERS, Config
from runtime.distributed import gather_rows, rank_and_size, sum_over_processes
from runtime.schedule import StepValues


class Leopart(StudentTeacher):
    """Fine-tunes a backbone (`model.init`). The teacher's head is drawn separately; the student is what is evaluated."""

    student: ClusterNetwork
    teacher: ClusterNetwork
    accumulates = False
    evaluated = "student"

    def __init__(self, config: Config):
        super().__init__(config, partial(ClusterNetwork, config))
        self.teacher.head.draw_weights()
        self.settings, self.temperature = config.clustering, config.loss.student_temperature
        self.queue = new_queue(config)
        self.newest: list[Tensor] = []  # what this step pushes into the queue; empty between steps

    def parameter_groups(self) -> list[dict[str, Any]]:
        return self.student.groups(self.settings.head_lr_factor)

    def forward(self, batch: Batch, at: StepValues) -> StepOutput:
        student, teacher = self.student, self.teacher
        with torch.no_grad():
            (tokens,) = encode(teacher.backbone, batch, TEACHERS, ("cls", "patches", "attention"))
            z = teacher.head(tokens.patches)  # [T,B,N,d]
            mask = self.mask(tokens.attention)  # [T,B,N]
            queue = self.queue if at.queue else None
            q = assign(z.flatten(1, 2), teacher.head.prototypes, queue, student.head.prototypes, self.settings)
            q = q.unflatten(1, z.shape[1:3])  # [T,B,N,K]
            if queue is not None:
                self.newest = [self.draw_rows(z, mask, batch, queue.rows.shape[1])]
        drop_seed = self.seed if self.drop_path else None
        views = encode(student.backbone, batch, self.views, ("cls", "patches"), drop_seed)
        scores = [square(student.head.scores(student.head(x.patches))) for x in views]  # [Vg,B,h,h,K]
        loss, *_ = dense_clustering(scores, square(q), square(mask[..., None])[..., 0], batch.windows, self.temperature)
        return StepOutput(loss, {"target_entropy": mean_entropy(q), "mask": mask.to(q.dtype).mean()}, [])

    def mask(self, attention: Tensor) -> Tensor:
        """bool [T,B,N]: the patches that the loss is taken on, and that are pushed. attention [T,B,H,N]: of the teacher's
        [CLS]."""
        if self.settings.mask == "all":
            return torch.ones_like(attention[:, :, 0], dtype=torch.bool)
        inside = foreground(attention.flatten(0, 1)).flatten(1).unflatten(0, attention.shape[:2])
        return inside if self.settings.mask == "foreground" else ~inside

    def before_step(self, at: StepValues) -> None:
        self.newest = []

    def before_update(self, at: StepValues, applied: Tensor) -> None:
        self.update_teacher(at.teacher_momentum, applied)

    def after_step(self, statistics: list[Tensor], at: StepValues, applied: Tensor) -> None:
        for network in (self.student, self.teacher):
            network.head.normalize_prototypes(applied)
        for rows in self.newest:
            if self.queue is not None:
                self.queue.push(rows, applied)

    def draw_rows(self, z: Tensor, mask: Tensor, batch: Batch, most: int) -> Tensor:
        """Rows [T,n,d] for the queue, drawn without replacement from the teacher's unit vectors z [T,B,N,d] of all processes
        where the mask [T,B,N] is 1: n is PUSHED for each image, at most `most`. Where the mask has fewer, the rest is drawn
        from outside it (published: the step fails)."""
        teachers, images, patches, d = z.shape
        rank, processes = rank_and_size()
        u = drop_path.draw(self.seed, batch.step, batch.ids, (teachers, patches), "queue")  # [B,T,N]
        u = gather_rows(u + (~mask.transpose(0, 1)))  # [all B,T,N]: outside the mask, 1 is added
        order = u.transpose(0, 1).flatten(1).argsort(dim=1, stable=True)
        drawn = order[:, : min(PUSHED * images * processes, most)]  # [T,n]
        image, patch = drawn // patches, drawn % patches
        own = image % processes == rank  # see gather_rows
        place = image // processes * patches + patch
        rows = z.flatten(1, 2).gather(1, place[..., None].expand(-1, -1, d))
        return sum_over_processes(rows * own[..., None])  # each row comes from one process


def square(x: Tensor) -> Tensor:
    """Patches in their grid: [a,B,N,K] -> [a,B,h,h,K]."""
    side = round(x.shape[2] ** 0.5)
    return x.unflatten(2, (side, side))
