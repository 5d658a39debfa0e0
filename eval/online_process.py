"""The process that measures a run's network while it trains (online.py starts it).

    python -m eval.online_process RUN PARENT yields|alone

A line on stdin is a job, {"file": of a backbone, "measures": names}; a line on stdout is its answer, {"metrics": those of a
row of metrics.jsonl, "messages": why one could not be taken}. `yields`: it runs when a core has nothing else to do. It ends
with its input, or with the process PARENT, and the system ends it first when memory is short.
"""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from eval.target import PhotoSets, is_part, open_shards, subsample, without
from pipeline.mixture import open_training
from pipeline.order import held_out
from runtime.child import end_with_parent
from runtime.config import Config, load_config
from runtime.errors import UserError

if TYPE_CHECKING:
    from eval.datasets import LabeledPhotos, VocSegmentation
    from model.backbone import Backbone

SCENES = 300  # of each split


class Measures:
    """What a run measures while it trains. Its photos and scenes are opened once. Every measure returns metrics of a row."""

    def __init__(self, config: Config, threads: int):
        self.config, self.threads = config, threads

    def __call__(self, network: "Backbone", names: list[str]) -> tuple[dict[str, float], list[str]]:
        """(metrics, messages on measures that failed). Nothing that goes wrong here ends a run."""
        known: dict[str, Callable[[Backbone], dict[str, float]]] = {
            "knn": self.knn, "points": self.points, "linear_seg": self.linear_seg,
        }  # fmt: skip
        metrics, messages = dict[str, float](), list[str]()
        for name in names:
            try:
                metrics |= known[name](network)
            except UserError as error:  # photos or scenes that were sound when the run began
                messages.append(f"{name}: {error}")
            except Exception as error:
                messages.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())}")
        return metrics, messages

    @cached_property
    def photos(self) -> "tuple[LabeledPhotos, LabeledPhotos]":
        """(train, validation): the run's own photos, and those of `data.val` or those that `data.holdout` keeps out; at most
        `eval.limit` of each, evenly spaced."""
        c = self.config
        shards = open_training(c)
        kept_out = held_out(shards, seed=c.seed, holdout=0.0 if c.data.val else c.data.holdout)
        own = c.data.val is None or is_part(c.data.val, shards)
        val = shards if own or c.data.val is None else open_shards(c.data.val, c)
        val_ids = kept_out if own else np.arange(len(val))
        count = min(c.eval.limit, len(shards))
        train_ids = np.setdiff1d(np.arange(count) * len(shards) // count, kept_out)  # never a list of all photos
        ignored = c.eval.ignore_classes
        train_ids, val_ids = without(shards, train_ids, ignored), without(val, val_ids, ignored)
        return PhotoSets(shards, train_ids, val, subsample(val_ids, c.eval.limit)).at_size(c.image_size)

    @cached_property
    def scenes(self) -> "tuple[VocSegmentation, VocSegmentation]":
        """(train, validation): SCENES scenes of each split of `eval.voc`, evenly spaced."""
        from eval.datasets import scene_sizes, voc_splits

        assert self.config.eval.voc
        train, val = voc_splits(self.config.eval.voc, scene_sizes(self.config.image_size)[0])
        return train.subset(SCENES), val.subset(SCENES)

    def knn(self, network: "Backbone") -> dict[str, float]:
        """Top-1 of k-NN on photos that no step sees, in percent."""
        from eval.features import default_workers
        from eval.knn import photo_knn

        (train, val), settings = self.photos, self.config.eval
        workers = min(default_workers(len(train)), self.threads)
        accuracy = photo_knn(network, train, val, k=settings.k, temperature=settings.temperature, workers=workers)
        return {"knn_top1": accuracy["cls"][0]}

    def points(self, network: "Backbone") -> dict[str, float]:
        """Top-1 of k-NN at points in percent, by kind of token and by what the points lie on (eval/points.py)."""
        from eval import points
        from model.vit import require_vit

        score = points.measure(require_vit(network, "this run", "the point probe"), *self.scenes)
        return {f"points_{kind}_{on}": top1[kind] for on, top1 in score.knn.items() for kind in points.KINDS}

    def linear_seg(self, network: "Backbone") -> dict[str, float]:
        """mIoU of linear segmentation, in percent: its protocol (eval/linear_seg.py) on fewer scenes, without augmentation,
        so that their features are computed once."""
        from dataclasses import replace

        from eval.linear_seg import Protocol, fit

        (train, val), settings = self.scenes, self.config.eval
        protocol = Protocol.for_views(self.config.image_size)
        protocol = replace(protocol, augment=False, epochs=settings.seg_epochs, lr=settings.seg_lr)
        return {"linear_seg_miou": fit(network, train, val, protocol, last_only=True)[-1].miou}


def yield_to_others() -> None:
    """Take the lowest priority there is: a core is used while nothing else wants it."""
    with contextlib.suppress(OSError, AttributeError):
        os.nice(19)
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def main() -> None:
    run, parent, priority = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # a job system sends them to all: the run decides
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(parent)
    with contextlib.suppress(OSError):  # the first to be ended when memory is short
        Path("/proc/self/oom_score_adj").write_text("1000")
    if priority == "yields":
        yield_to_others()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer

    import torch

    from model.weights import load_backbone

    threads = int(os.environ["OMP_NUM_THREADS"])
    torch.set_num_threads(threads)
    measures = Measures(load_config(run / "config.yaml"), threads)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            network = load_backbone(job["file"]).float().requires_grad_(False)
            metrics, messages = measures(network, job["measures"])
        except UserError as error:
            metrics, messages = {}, [str(error)]
        print(json.dumps({"metrics": metrics, "messages": messages}), file=answers, flush=True)


if __name__ == "__main__":
    main()
