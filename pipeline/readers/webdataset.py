"""WebDataset and torch on the CPU: the plan -> bytes -> decode once -> cut every window -> uint8 views.

The fallback where there is no GPU decoder, and the reference that the DALI reader is tested against. Samples are read by
offset in the plan's order; WebDataset gives the chain of stages, its loader the worker processes and their shared memory.
"""

import faulthandler
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
import webdataset
from numpy.typing import NDArray
from torch import Tensor

from pipeline.batch import Batch, draw_for, size_groups
from pipeline.decode import DecodeError, decode, load_torchcodec
from pipeline.shards import Plan, Shards
from runtime.config import Config
from runtime.errors import UserError

load_torchcodec()  # now, so that the reading processes forked from a server with this module have it


def cut(image: Tensor, window: NDArray[np.int32], size: int, out: Tensor | None = None) -> Tensor:
    """A view uint8 [size,size,3] of an image [3,H,W]: the signed window, antialiased bicubic, flipped if it says so.

    out: where to write it. The resize behind F.interpolate writes there itself: 0.6 ms for a photo's four views instead of
    1.06 through a tensor of its own (docs/benchmarks.md).
    """
    x0, y0, x1, y1 = window.tolist()
    view = torch.empty(size, size, 3, dtype=torch.uint8) if out is None else out
    crop = image[None, :, y0:y1, min(x0, x1) : max(x0, x1)]
    torch.ops.aten._upsample_bicubic2d_aa.out(crop, [size, size], False, None, None, out=view.permute(2, 0, 1)[None])
    if x0 > x1:
        view.copy_(view.flip(1))
    return view


class BatchBuilder:
    """What a worker does with a step. Travels to the worker by pickling config, shards and plan."""

    def __init__(self, config: Config, shards: Shards, plan: Plan, rank: int, world: int):
        self.config, self.shards, self.plan, self.rank, self.world = config, shards, plan, rank, world

    def batch(self, step: int) -> Batch | UserError:
        """A UserError comes as a value: raised in a worker it would be told with the worker's traceback."""
        try:
            return self.views(self.fetch(step))
        except UserError as mistake:
            return mistake

    def fetch(self, step: int) -> tuple[int, NDArray, NDArray, list[bytes]]:
        """(step, planned ids, rows whose bytes these are, the bytes) of this rank's slice; damaged ones replaced."""
        ids = self.plan.samples_of(step, self.rank, self.world)
        self.shards.prefetch(self.plan, step, self.rank, self.world)
        rows, photos = ids.copy(), []
        for i, sample in enumerate(ids):
            rows[i], photo = self.plan.sound(self.shards, int(sample), step)
            photos.append(photo)
        return step, ids, rows, photos

    def views(self, fetched: tuple[int, NDArray, NDArray, list[bytes]]) -> Batch:
        """Decode once, cut every window."""
        step, ids, rows, photos = fetched
        draws = draw_for(self.config, self.shards, self.plan, step, ids, rows)
        groups = size_groups(self.config)
        views = [torch.empty(len(ids), g.stop - g.start, size, size, 3, dtype=torch.uint8) for size, g in groups]
        for i, photo in enumerate(photos):
            attempt = 0
            while True:
                try:
                    image = decode(photo)  # of the index's size: `sound` held the header against it
                    break
                except DecodeError:  # sound bytes that the decoder refuses count as damaged too
                    attempt += 1
                rows[i], photo = self.plan.sound(self.shards, int(ids[i]), step, first=attempt)
                again = draw_for(self.config, self.shards, self.plan, step, ids[i : i + 1], rows[i : i + 1])
                draws.windows[i], draws.view_points[i] = again.windows[0], again.view_points[0]
            for (size, group), out in zip(groups, views, strict=True):
                for place, v in enumerate(range(group.start, group.stop)):
                    cut(image, draws.windows[i, v], size, out[i, place])
        return Batch(step, torch.from_numpy(ids), torch.from_numpy(rows), views, **draws.tensors())


def init_worker(_worker: int = 0) -> None:
    """A reading process ends with the trainer, not before: Ctrl-C and torchrun's SIGTERM reach the whole process group,
    but the trainer has a checkpoint to save first; and when it is killed outright, nobody is left to end this one. SIGABRT
    makes it tell where it stands (runtime/watchdog.py)."""
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    trainer = multiprocessing.parent_process()
    assert trainer is not None

    def follow() -> None:
        trainer.join()
        os._exit(1)

    threading.Thread(target=follow, name="follow the trainer", daemon=True).start()


def read(
    config: Config, shards: Shards, plan: Plan, *, start: int, stop: int, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """This rank's batches of the global steps start..stop-1, in order, whatever the number of workers."""
    stages = BatchBuilder(config, shards, plan, rank, world)
    pipeline = webdataset.DataPipeline(
        partial(range, start, stop),
        webdataset.split_by_worker,  # worker w of n makes every n-th step; the loader takes them in turn
        webdataset.map(stages.batch, handler=webdataset.reraise_exception),
    )
    workers = config.speed.workers
    context = None
    if workers:
        # a clean server forks the workers: never a fork of this process with its threads and its CUDA
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["pipeline.readers.webdataset"])
    loader = webdataset.WebLoader(
        pipeline,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=config.speed.prefetch if workers else None,
        multiprocessing_context=context,
        worker_init_fn=init_worker,
    )
    for item in loader:
        if isinstance(item, UserError):
            raise item
        yield item
