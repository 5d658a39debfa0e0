"""While training: k-NN of the teacher on photos that no training step uses, the point probe on labeled scenes, and the
effective rank of its features.

All processes take part. No random number of the run is drawn, so a run trains the same with and without it. Imports no
torch until the first evaluation.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from eval.target import PhotoSets, check_classes, is_part, open_shards, subsample, without
from pipeline.mixture import AnyShards
from pipeline.plan import Plan
from runtime.config import Config
from runtime.errors import UserError

if TYPE_CHECKING:
    from model.vit import ViT
    from pipeline.batch import Batch
    from runtime.distributed import DistributedContext

RANKS = 20  # measurements of the effective rank in a run
SCENES = 300  # of each split in the point probe
PART = 64  # images at a time: a batch may be larger than what fits into memory at once


class OnlineKnn:
    """k-NN on the photos of `data.val`, or on those that `data.holdout` keeps out; the train set is the run's own.
    At most `eval.limit` photos of each, evenly spaced.

    skipped: the reason if `eval.every` is set and cannot be done, else None. every: steps between evaluations, 0: never.
    """

    name = "the k-NN"

    def __init__(self, config: Config, shards: AnyShards, plan: Plan, processes: "DistributedContext"):
        self.config, self.processes = config, processes
        self.every = 0
        self.skipped: str | None = None
        if config.eval.every == 0:
            return
        held_out = plan.held_out()
        other = config.data.val is not None and not is_part(config.data.val, shards)
        val = shards
        if other and config.data.val:  # a machine opens them once
            opened = None if processes.local_rank else open_shards(config.data.val, config)
            val = processes.from_first_of_node(opened)
        val_ids = np.arange(len(val)) if other else held_out
        if not shards.classes or not val.classes:
            reason = shards.incomparable or "these shards have no classes"
            self.skipped = f"k-NN while training is skipped: {reason}"
        elif not len(val_ids):
            self.skipped = "k-NN while training is skipped: data.holdout keeps no photo out, and there is no data.val"
        if self.skipped:
            return
        self.every = max(1, round(config.eval.every * plan.steps_per_epoch))
        limit = config.eval.limit
        count = min(limit, len(shards))
        train_ids = np.setdiff1d(np.arange(count) * len(shards) // count, held_out)  # never a list of all photos
        ignored = config.eval.ignore_classes
        check_classes(shards, val, ignored, training=True)
        train_ids, val_ids = without(shards, train_ids, ignored), without(val, val_ids, ignored)
        sets = PhotoSets(shards, train_ids, val, subsample(val_ids, limit))
        self.train, self.val = sets.at_size(config.image_size)

    def due(self, done: int) -> bool:
        """Whether to evaluate after `done` steps."""
        return self.every > 0 and done % self.every == 0

    def __call__(self, backbone: "ViT") -> dict[str, float]:
        """Top-1 in percent, as a metric of a row; none if every photo is damaged."""
        from eval.features import default_workers
        from eval.knn import photo_knn

        settings, processes = self.config.eval, self.processes
        workers = default_workers(len(self.train) // processes.world_size)
        try:
            with frozen(backbone, processes):
                accuracy = photo_knn(
                    backbone, self.train, self.val, k=settings.k, temperature=settings.temperature, workers=workers,
                    processes=processes,
                )  # fmt: skip
        except UserError:  # every photo is damaged: the run has its own limit for damage
            return {}
        return {"knn_top1": accuracy["cls"][0]}


class OnlinePoints:
    """The point probe (eval/points.py) on SCENES scenes of each split of `eval.voc`, every `eval.every` epochs.

    Every process measures the same scenes: none waits for another, and the time is that of one. every: steps between
    evaluations, 0: never, such as for a method without reference tokens.
    """

    name = "the point probe"

    def __init__(self, config: Config, plan: Plan, processes: "DistributedContext"):
        self.config, self.processes = config, processes
        measured = config.eval.voc and config.eval.every and config.points
        self.every = max(1, round(config.eval.every * plan.steps_per_epoch)) if measured else 0

    def due(self, done: int) -> bool:
        """Whether to evaluate after `done` steps."""
        return self.every > 0 and done % self.every == 0

    def __call__(self, backbone: "ViT") -> dict[str, float]:
        """Top-1 of k-NN at points in percent, by kind of token and by what the points lie on: the metrics of a row."""
        from eval import points
        from eval.datasets import scene_sizes, voc_splits

        assert self.config.eval.voc
        try:
            splits = voc_splits(self.config.eval.voc, scene_sizes(self.config.image_size)[0])
            train, val = (split.subset(SCENES) for split in splits)
            with frozen(backbone, self.processes):
                score = points.measure(backbone, train, val)
        except UserError as error:  # scenes that were sound when the run began
            if self.processes.is_main:
                print(f"the point probe is skipped: {error}", file=sys.stderr, flush=True)
            return {}
        return {f"points_{kind}_{on}": top1[kind] for on, top1 in score.knn.items() for kind in points.KINDS}


class OnlineRank:
    """The effective rank (eval/unlabeled.py) of the teacher's [CLS] over the first view of a step's batch. It needs no
    labels and reads no photo: one forward pass of one view, at RANKS rows of the log and at the end.

    steps: of the whole run.
    """

    def __init__(self, config: Config, steps: int, processes: "DistributedContext"):
        self.processes, self.steps = processes, steps
        log_every = config.run.log_every
        self.every = log_every * max(1, round(steps / RANKS / log_every))  # a row is written then anyway

    def due(self, done: int) -> bool:
        """Whether to evaluate after `done` steps."""
        return done % self.every == 0 or done == self.steps

    def __call__(self, backbone: "ViT", batch: "Batch") -> float:
        """batch: this process's. The rank is that of the batch of all processes."""
        import torch

        from eval.unlabeled import effective_rank

        with torch.inference_mode(), frozen(backbone, self.processes), self.processes.autocast():
            cls = torch.cat([backbone(part, want=("cls",)).cls for part in batch.views[0][0].split(PART)])
        return effective_rank(self.processes.all_gather(cls.float()))


@contextlib.contextmanager
def frozen(backbone: "ViT", processes: "DistributedContext") -> Iterator[None]:
    """The backbone as it is evaluated, in the run's precision. Afterwards it has the mode it had; its compiled functions are
    not compiled again for another size of the images."""
    import torch

    training, backbone.precision = backbone.training, processes.dtype
    backbone.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        backbone.train(training)
