"""The score of a segmentation: confusion matrix, intersection over union, its mean over the classes.

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


def confusion(truth: Tensor, predicted: Tensor, classes: int, clusters: int | None = None) -> Tensor:
    """The confusion matrix of the pixels, (true class, predicted class): int64 [C,C].

    truth and predicted: integer tensors of one shape. A pixel whose true class is ignored (255, or any number above the
    classes) is not counted. clusters: if the predictions are clusters, their number: the matrix is [C,clusters].
    """
    clusters = classes if clusters is None else clusters
    truth = truth.flatten().long()
    truth = truth.where((truth >= 0) & (truth < classes), classes)  # one more row, for ignored pixels
    pairs = torch.bincount(truth * clusters + predicted.flatten(), minlength=(classes + 1) * clusters)
    return pairs.view(classes + 1, clusters)[:classes]


def intersection_over_union(counts: Tensor) -> Tensor:
    """Of each class, 0 to 1: float64 [C] from a confusion matrix [C,C]; 0 for an absent class, as published."""
    counts = counts.double()
    correct = counts.diagonal()
    return correct / (counts.sum(0) + counts.sum(1) - correct + 1e-6)


def score_of(counts: Tensor) -> Score:
    """mIoU of a confusion matrix [C,C] in both conventions: over all classes (published), and over those in the masks."""
    iou = 100 * intersection_over_union(counts)
    present = counts.sum(1) > 0
    return Score(float(iou.mean()), float(iou[present].mean()), iou.tolist())


def score_rows(names: Sequence[str], scores: Sequence[Score]) -> list[tuple[str, ...]]:
    """Rows of a table, one column per score: the classes, then the two means."""
    rows = [(name, *(f"{score.iou[i]:.2f}" for score in scores)) for i, name in enumerate(names)]
    rows.append((f"mean of all {len(names)} classes", *(f"{score.miou:.2f}" for score in scores)))
    rows.append(("mean of the classes present", *(f"{score.miou_present:.2f}" for score in scores)))
    return rows
