"""What can be said of a network without labels: in how many directions its features differ.

The effective rank of features (Roy & Vetterli 2007): exp of the entropy of their singular values, each divided by the sum of
all. 1 if all features lie on a line, at most their width D or the number of photos less one. A network that maps all photos
to one feature has 0. Features are centered first, so that what all photos share does not count.

n photos · D width of a feature.
"""

import math

import numpy as np
import torch
from torch import Tensor

from eval.datasets import LabeledPhotos
from eval.features import batches, tokens
from eval.target import near_samples, subsample
from model.backbone import Backbone
from model.vit import ViT
from pipeline.batch import Batch
from pipeline.mixture import AnyShards
from runtime.config import Config
from runtime.distributed import DistributedContext

PHOTOS = 256  # of a run; more change the rank of a trained network by little
RANKS = 20  # measurements while a run trains
PART = 64  # images at a time: a batch may be larger than what fits into memory at once


def effective_rank(features: Tensor) -> float:
    """The effective rank of features [n,D] of any dtype; 0 if all are the same, NaN if one is not finite (the weights of a
    run that diverges overflow before its losses end it)."""
    if not features.isfinite().all():
        return math.nan
    centered = features.double() - features.double().mean(0)
    values = torch.linalg.svdvals(centered)
    scale = features.double().norm(dim=1).mean().clamp(min=1e-30) * len(features) ** 0.5
    if values[0] < 1e-6 * scale:  # rounding, not differences
        return 0.0
    shares = values[values > 0] / values.sum()
    return float((-(shares * shares.log()).sum()).exp())


def rank_of_photos(network: Backbone, shards: AnyShards, photos: int = PHOTOS, workers: int = 0) -> tuple[float, int]:
    """(effective rank of [CLS], number of photos it is of): evenly spaced photos, of remote shards the first ones. Photos
    that are damaged, and so are black, are left out."""
    ids = near_samples(shards, photos) if shards.is_remote else subsample(np.arange(len(shards)), photos)
    device = next(network.parameters()).device
    found = []
    for images, _ in batches(LabeledPhotos(shards, network.image_size, ids), 64, device, workers=workers):
        images = images[(images > 0).flatten(1).any(1)]
        if len(images):
            found.append(tokens(network, images)[0].cpu())
    features = torch.cat(found) if found else torch.zeros(1, network.width)
    return effective_rank(features), len(features)


class OnlineRank:
    """The effective rank of the teacher's [CLS] over the first view of a step's batch. It needs no labels and reads no
    photo: one forward pass of one view, at RANKS rows of the log and at the end. All processes take part.

    steps: of the whole run.
    """

    def __init__(self, config: Config, steps: int, processes: DistributedContext):
        self.processes, self.steps = processes, steps
        log_every = config.run.log_every
        self.every = log_every * max(1, round(steps / RANKS / log_every))  # a row is written then anyway

    def due(self, done: int) -> bool:
        """Whether to evaluate after `done` steps."""
        return done % self.every == 0 or done == self.steps

    def __call__(self, backbone: ViT, batch: Batch) -> float:
        """batch: this process's. The rank is that of the batch of all processes."""
        training, backbone.precision = backbone.training, self.processes.dtype
        backbone.eval()
        try:  # the compiled functions are not compiled again for another number of images
            with torch.compiler.set_stance("force_eager"), torch.inference_mode(), self.processes.autocast():
                cls = torch.cat([backbone(part, want=("cls",)).cls for part in batch.views[0][0].split(PART)])
        finally:
            backbone.train(training)
        return effective_rank(self.processes.all_gather(cls.float()))
