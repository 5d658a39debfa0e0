"""The section of the config on evaluation: what is measured of the teacher, and how often while it trains."""

from dataclasses import asdict

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from runtime.config.bounds import SETTINGS, Text, Texts, number_or_section


@dataclass(config=SETTINGS)
class Every:
    """Epochs between two evaluations during training, of each measure; 0 means never. A measure that is named here and
    cannot be taken stops the run before its first step."""

    knn: NonNegativeFloat = 0
    """k-NN on photos that no step sees (`knn_top1`). It needs classes, and `data.val` or `data.holdout`."""
    points: NonNegativeFloat = 0
    """What tokens at points know of what lies there (`points_reference_small` and others). It needs `eval.voc`, and a method
    with reference tokens."""
    linear_seg: NonNegativeFloat = 0
    """Linear segmentation of 300 scenes of each split, without augmentation (`linear_seg_miou`). It needs `eval.voc`."""


@dataclass(config=SETTINGS)
class Eval:
    """Evaluation of the teacher."""

    voc: Text | None = None
    """Folder in Pascal VOC's layout, for linear segmentation (section 4.1: Pascal VOC 2012)."""
    ignore_classes: Texts = Field(default_factory=list)
    """Classes whose photos take no part in k-NN and linear classification, such as one that only `data.val` has."""
    every: number_or_section(Every) = 0  # type: ignore[valid-type]
    """Epochs between two evaluations during training. A number is for k-NN, and with `voc` for the point probe; a mapping
    names the measures: `{knn: 1, points: 5, linear_seg: 10}`. 0 means never. Training does not wait for them."""
    limit: PositiveInt = 20_000
    """Largest number of training images, and of validation images, in k-NN evaluations during training."""
    k: PositiveInt = 20
    """Number of neighbors that vote in k-NN (section 4.1: 20)."""
    temperature: PositiveFloat = 0.07
    """Temperature of the neighbors' votes in k-NN (DINO)."""
    seg_epochs: PositiveInt = 25
    """Epochs of linear segmentation."""
    seg_lr: PositiveFloat = 0.01
    """Learning rate of linear segmentation, for each 60 images of a batch."""

    @property
    def names_measures(self) -> bool:
        """Whether `every` names measures, so that each of them must be possible."""
        return isinstance(self.every, Every)

    @property
    def measures(self) -> dict[str, float]:
        """Epochs between two evaluations during training, by measure; without those that are never taken."""
        every = asdict(self.every) if isinstance(self.every, Every) else dict(knn=self.every, points=self.every)
        return {name: epochs for name, epochs in every.items() if epochs}
