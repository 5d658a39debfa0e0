"""What train.py needs of a method of pretraining, and nothing more."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from model.vit import ViT
from pipeline.batch import Batch
from runtime.schedule import StepValues, decay_groups


@dataclass
class StepOutput:
    """What a method makes of a batch.

    loss: 0-dim, its gradient reaches the student. metrics: 0-dim each, without gradient, for the log. statistics: averaged
    over the pieces of an accumulated step and over all processes, then given to `after_step`.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    statistics: list[Tensor]


class Method(nn.Module):
    """`student` learns by gradient; what else there is (a teacher, centers, queues) lies in parameters that ask for no
    gradient and in buffers, so that a checkpoint holds it. Takes the config alone."""

    student: nn.Module
    clip_positions_apart = False  # whether [CLS]'s position and the patches' are two tensors to gradient clipping

    def forward(self, batch: Batch, at: StepValues) -> StepOutput:
        """batch: the loader's form. at: this step's values of the schedules. Changes no state: a step may call it several
        times, for a piece of the batch each."""
        raise NotImplementedError

    def before_step(self, at: StepValues) -> None:
        """Before a step's first forward pass."""

    def after_step(self, statistics: list[Tensor], at: StepValues, applied: Tensor) -> None:
        """After the optimizer. applied: 0-dim on the device, 0 where a loss or gradient was not finite and the optimizer
        moved nothing: then nothing may move here either, and asking for its value would make the host wait."""

    def compile_units(self) -> list[nn.Module]:
        """Submodules to be compiled, each for itself."""
        return []

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups; those with "decays" follow the weight decay's schedule."""
        return decay_groups(self.student)

    @property
    def backbone(self) -> ViT:
        """What is evaluated and exported."""
        raise NotImplementedError
