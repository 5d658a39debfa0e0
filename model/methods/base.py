"""What train.py needs of a pretraining method, and nothing more."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from model.vit import ViT
from pipeline.batch import Batch
from runtime.schedule import StepValues, decay_groups


@dataclass
class StepOutput:
    """The result of a method's forward pass.

    loss: 0-dim, its gradient reaches the student. metrics: 0-dim each, without gradient, for the log. statistics: averaged
    over the parts of an accumulated step and over all processes, then passed to `after_step`.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    statistics: list[Tensor]


class Method(nn.Module):
    """A module that is constructed from the config alone.

    `student` learns by gradient. All other state (a teacher, centers, queues) is in parameters without gradient and in
    buffers, so that a checkpoint contains it.
    """

    student: nn.Module
    # whether the pipeline draws reference points; a batch has M = 0 of them otherwise
    uses_points: ClassVar[bool] = False
    # whether a step may be processed in pieces (speed.grad_accum_steps); not if the batch as a whole enters the loss
    accumulates: ClassVar[bool] = True
    # the role of the network that is evaluated and exported; if there is only a student, it is the student's
    evaluated: ClassVar[str] = "teacher"
    # whether the gradients of [CLS]'s and the patches' positions are clipped separately
    clip_positions_apart: ClassVar[bool] = False

    def forward(self, batch: Batch, at: StepValues) -> StepOutput:
        """batch: one step's batch, or a part of it. at: the schedules' values of this step. Changes no state: an accumulated
        step calls it once for each part."""
        raise NotImplementedError

    def before_step(self, at: StepValues) -> None:
        """Called before the first forward pass of a step."""

    def before_update(self, at: StepValues, applied: Tensor) -> None:
        """Called after the backward pass, just before the optimizer changes the student. applied: as in `after_step`."""

    def after_step(self, statistics: list[Tensor], at: StepValues, applied: Tensor) -> None:
        """Called after the optimizer: update teacher, centers, queues.

        applied: 0-dim on the device, 0 if a loss or gradient was not finite and the optimizer changed nothing; then nothing
        may change here either. Do not read its value: the host would wait for the device.
        """

    def compile_units(self) -> list[nn.Module]:
        """The submodules to be compiled, each by itself."""
        return []

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups. Those with "decays" follow the schedule of the weight decay."""
        return decay_groups(self.student)

    def networks(self) -> dict[str, nn.Module]:
        """The networks by their role, which prefixes their names in a checkpoint. `model.init` loads weights into each: its
        `backbone`, and its heads of known names."""
        return {"student": self.student}

    @property
    def backbone(self) -> ViT:
        """The network that is evaluated and exported."""
        networks = self.networks()
        backbone = networks.get(self.evaluated, self.student).backbone
        assert isinstance(backbone, ViT)
        return backbone
