"""SwAV (Caron et al. 2020): from one view of an image, the student predicts the cluster that another view is assigned to.

Letters: B images of this process, V views, Vg views of one size, T views that are assigned (the first of the V), D width, d
bottleneck of the head, K prototypes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.methods.base import Method, StepOutput
from model.methods.clustering import ClusterNetwork, assign, mean_entropy, new_queue
from model.methods.encode import encode
from pipeline.batch import Batch
from runtime.config import TEACHERS, Config
from runtime.distributed import gather_rows
from runtime.schedule import StepValues


class SwAV(Method):
    """A single network: the targets are assignments of its own scores (section 3.1, eq. 3)."""

    student: ClusterNetwork
    accumulates = False
    evaluated = "student"

    def __init__(self, config: Config):
        super().__init__()
        self.views, self.settings = len(config.views), config.clustering
        self.temperature = config.loss.student_temperature
        self.drop_seed = config.seed if config.model.drop_path else None
        self.student = ClusterNetwork(config, config.model.drop_path)
        self.student.backbone.activation_checkpointing = config.speed.activation_checkpointing
        self.queue = new_queue(config)
        self.newest: list[Tensor] = []  # what this step pushes into the queue; empty between steps

    def parameter_groups(self) -> list[dict[str, Any]]:
        return self.student.groups(self.settings.head_lr_factor)

    def compile_units(self) -> list[nn.Module]:
        return list(self.student.children())

    def forward(self, batch: Batch, at: StepValues) -> StepOutput:
        want = ("cls",) if self.settings.feature == "cls" else ("cls", "patches")
        tokens = encode(self.student.backbone, batch, self.views, want, self.drop_seed)
        features = [x.cls if x.patches is None else x.patches.mean(2) for x in tokens]  # [Vg,B,D]
        return self.compare(torch.cat(features), at)

    def compare(self, features: Tensor, at: StepValues) -> StepOutput:
        """Eq. 2 for the features [V,B,D] of all views."""
        head = self.student.head
        z = head(features)  # [V,B,d]; in one call: the statistics of a batch norm are over all views
        assigned = z[:TEACHERS].detach()
        queue = self.queue if at.queue else None
        q = assign(assigned, head.prototypes, queue, head.prototypes, self.settings)  # [T,B,K]
        log_p = F.log_softmax(head.scores(z) / self.temperature, -1)  # [V,B,K]
        pairs = [-(q[t] * log_p[v]).sum(-1).mean() for t in range(TEACHERS) for v in range(self.views) if v != t]
        self.newest = [assigned]
        return StepOutput(torch.stack(pairs).mean(), {"target_entropy": mean_entropy(q)}, [])

    def before_step(self, at: StepValues) -> None:
        self.newest = []

    def after_step(self, statistics: list[Tensor], at: StepValues, applied: Tensor) -> None:
        self.student.head.normalize_prototypes(applied)
        for z in self.newest:  # [T,B,d]
            if self.queue is not None and at.queue:
                self.queue.push(gather_rows(z.transpose(0, 1)).transpose(0, 1), applied)
