"""What can be said of a network without labels: in how many directions its features differ.

The effective rank of features (Roy & Vetterli 2007): exp of the entropy of their singular values, each divided by the sum of
all. 1 if all features lie on a line, at most their width D or the number of photos less one. A network that maps all photos
to one feature has 0. Features are centered first, so that what all photos share does not count.

n photos · D width of a feature.
"""

import numpy as np
import torch
from torch import Tensor

from eval.datasets import LabeledPhotos
from eval.features import batches, tokens
from eval.target import near_samples, subsample
from model.backbone import Backbone
from pipeline.mixture import AnyShards

PHOTOS = 256  # of a run; more change the rank of a trained network by little


def effective_rank(features: Tensor) -> float:
    """The effective rank of features [n,D] of any dtype; 0 if all are the same."""
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
