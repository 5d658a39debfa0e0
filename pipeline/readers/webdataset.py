"""WebDataset and torch on the CPU: the plan -> bytes -> decode once -> crop and resize each view -> uint8 views.

The fallback if there is no GPU decoder, and the reference that the DALI reader is tested against. Samples are read by offset
in the plan's order; WebDataset gives the chain of stages, and its loader the worker processes and their shared memory.
"""

import multiprocessing
from collections.abc import Iterator
from functools import partial

import webdataset

from pipeline.batch import Batch
from pipeline.mixture import AnyShards
from pipeline.plan import Plan
from pipeline.readers.worker import BatchBuilder, init_worker
from runtime.config import Config
from runtime.errors import UserError


def read(
    config: Config, shards: AnyShards, plan: Plan, *, start: int, stop: int, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """This process's batches of the global steps start..stop-1, in order, for any number of workers (see
    pipeline/readers/__init__.py). Raises UserError if no valid sample is left."""
    builder = BatchBuilder(config, shards, plan, rank, world_size)
    pipeline = webdataset.DataPipeline(
        partial(range, start, stop),
        webdataset.split_by_worker,  # worker w of n makes every n-th step; the loader takes them in turn
        webdataset.map(builder.batch, handler=webdataset.reraise_exception),
    )
    workers = config.speed.workers
    context = None
    if workers:
        # A clean server forks the workers: never a fork of this process with its threads and its CUDA
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
