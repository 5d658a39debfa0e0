"""k-NN while training: the teacher asked now and then about photos that no step sees.

All processes ask together, each reads its share of the photos, and all get the same answer; nothing of the run's
randomness is drawn, so a run is the same with and without.
"""

from typing import Any

import numpy as np
import torch

from eval.datasets import LabeledPhotos, open_shards
from eval.features import default_workers
from eval.knn import photo_knn
from eval.target import same_folder, spread
from model.vit import ViT
from pipeline.shards import Plan, Shards
from runtime.config import Config
from runtime.distributed import DistributedContext
from runtime.errors import UserError


class OnlineKnn:
    """The photos that a run asks its teacher about: those of `data.val`, or what `data.holdout` keeps out; the bank is
    what it trains on. At most `eval.limit` of each, evenly spread.

    skipped: why nothing is asked where `eval.every` asks for it, else None. every: steps between two answers, 0: never.
    """

    def __init__(self, config: Config, shards: Shards, plan: Plan, processes: DistributedContext):
        self.config, self.processes = config, processes
        self.every = 0
        self.skipped: str | None = None
        if config.eval.every == 0:
            return
        held_out = plan.held_out()
        other = config.data.val is not None and not same_folder(config.data.val, shards.folder)
        val = open_shards(config.data.val, config) if other and config.data.val else shards
        asked = np.arange(len(val)) if other else held_out
        if not shards.classes or not val.classes:
            self.skipped = "k-NN while training is skipped: these shards have no classes"
        elif not len(asked):
            self.skipped = "k-NN while training is skipped: data.holdout keeps no photo out, and there is no data.val"
        if self.skipped:
            return
        self.every = max(1, round(config.eval.every * plan.steps_per_epoch))
        limit, size = config.eval.limit, config.image_size
        voting = min(limit, len(shards))
        rows = np.setdiff1d(np.arange(voting) * len(shards) // voting, held_out)  # never a list of all photos
        self.bank = LabeledPhotos(shards, size, rows)
        self.val = LabeledPhotos(val, size, spread(asked, limit), classes=shards.classes)

    def due(self, done: int) -> bool:
        """Whether the teacher is asked after `done` steps."""
        return self.every > 0 and done % self.every == 0

    def __call__(self, backbone: ViT) -> float | None:
        """Top-1 in percent; None where all that was read is damaged. The backbone keeps its mode, and what is compiled
        of it is not compiled anew for the photos' size."""
        training, backbone.precision = backbone.training, self.processes.dtype
        backbone.eval()
        ask = self.config.eval
        workers = default_workers(len(self.bank) // self.processes.world)
        how: dict[str, Any] = dict(k=ask.k, temperature=ask.temperature, workers=workers)
        try:
            with torch.compiler.set_stance("force_eager"):
                top1, _ = photo_knn(backbone, self.bank, self.val, **how, processes=self.processes)["cls"]
        except UserError:  # nothing but damage: the run has its own limit for that
            return None
        finally:
            backbone.train(training)
        return top1
