"""The score of a segmentation: pixels counted by (true class, predicted class), intersection over union, its mean.

C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Score:
    """In percent."""

    miou: float  # mean over all classes, as published
    miou_present: float  # mean over the classes that the masks contain
    iou: list[float]  # per class


def confusion(truth: Tensor, predicted: Tensor, classes: int, columns: int | None = None) -> Tensor:
    """Pixels counted by (true class, predicted class): int64 [C,C].

    truth and predicted: integer tensors of one shape. What the truth ignores (255, or any number that is no class)
    counts nowhere, also not as a wrong prediction. columns: how many the predictions count to, where these are
    clusters and not classes: [C,columns].
    """
    columns = classes if columns is None else columns
    truth = truth.flatten().long()
    truth = truth.where((truth >= 0) & (truth < classes), classes)  # one row more, for what is ignored
    pairs = torch.bincount(truth * columns + predicted.flatten(), minlength=(classes + 1) * columns)
    return pairs.view(classes + 1, columns)[:classes]


def intersection_over_union(counts: Tensor) -> Tensor:
    """Of each class, 0 to 1: float64 [C] from a confusion matrix [C,C]; 0 for a class that is nowhere, as published."""
    counts = counts.double()
    right = counts.diagonal()
    return right / (counts.sum(0) + counts.sum(1) - right + 1e-6)


def scored(counts: Tensor) -> Score:
    """mIoU in both conventions: over all classes (published), and over those that occur in the masks."""
    iou = 100 * intersection_over_union(counts)
    present = counts.sum(1) > 0
    return Score(float(iou.mean()), float(iou[present].mean()), iou.tolist())


def score_rows(names: Sequence[str], scores: Sequence[Score]) -> list[tuple[str, ...]]:
    """Rows of a table, a column for each score: the classes, then the two means."""
    rows = [(name, *(f"{score.iou[i]:.2f}" for score in scores)) for i, name in enumerate(names)]
    rows.append((f"mean of all {len(names)} classes", *(f"{score.miou:.2f}" for score in scores)))
    rows.append(("mean of the classes present", *(f"{score.miou_present:.2f}" for score in scores)))
    return rows
