"""DALI on the GPU: does it make the CPU reader's batches, how fast, and with which share of the JPEG engine and workers?

Without a GPU DALI decodes on the CPU, so that these lines are run.
"""

import copy
import itertools
import os
import time
from collections.abc import Iterator

import numpy as np
import torch

from pipeline.batch import Batch
from pipeline.loader import choose_reader
from pipeline.plan import Plan
from pipeline.readers.worker import BatchBuilder
from pipeline.shards import Shards
from runtime.config import Config
from runtime.distributed import best_device
from runtime.errors import UserError
from tools.bench.step_worker import make_config, synchronize
from tools.gpu.parts import NotHere, Report, Setting

WANTED = 2500  # photos per second into 4 views
COMPARED = 16  # photos of a batch whose pixels are compared
FAR = 32  # a pixel that differs by more than this is another pixel
FIELDS = ("ids", "rows", "windows", "view_points", "color")


def decode(setting: Setting, report: Report) -> None:
    device = best_device()
    try:
        choose_reader("dali", device)
    except UserError as missing:
        raise NotHere(str(missing)) from None
    shards, config = Shards(setting.shards), make_config("tiny" if setting.tiny else "vit_small", "densedino")
    config.optim.global_batch_size = 8 if setting.tiny else min(128, len(shards))
    config.speed.workers, config.speed.dali_threads = (1, 1) if setting.tiny else (8, 8)
    _compare(config, shards, device, report)
    _engine_and_workers(setting, config, shards, device, report)


def _read(config: Config, shards: Shards, device: torch.device) -> Iterator[Batch]:
    from pipeline.readers import dali

    plan = Plan(shards, batch=config.optim.global_batch_size, seed=0)
    return dali.read(
        config, shards, plan, start=0, stop=10**9, device_id=device.index or 0 if device.type == "cuda" else None
    )


def _compare(config: Config, shards: Shards, device: torch.device, report: Report) -> None:
    """The first two batches beside those of the CPU reader."""
    builder = BatchBuilder(config, shards, Plan(shards, batch=config.optim.global_batch_size, seed=0), 0, 1)
    differences, equal = [], dict.fromkeys(FIELDS, True)
    for step, batch in enumerate(itertools.islice(_read(config, shards, device), 2)):
        expected = builder.batch(step)
        assert isinstance(expected, Batch)
        for name in FIELDS:
            equal[name] &= torch.equal(getattr(batch, name).cpu(), getattr(expected, name))
        for theirs, ours in zip(batch.views, expected.views, strict=True):
            differences.append((theirs[:COMPARED].cpu().float() - ours[:COMPARED].float()).abs().flatten().numpy())
    for name, same in equal.items():
        report.row(f"{name}: equal to the CPU reader's", int(same), "(1: yes)", at_least=1, required=True)
    pixels = np.concatenate(differences)
    report.row("pixels: mean difference", float(pixels.mean()), "of 255", at_most=2, required=True)
    report.row("pixels: 99.9 % differ by at most", float(np.quantile(pixels, 0.999)), "of 255")
    report.row(f"pixels: share that differ by more than {FAR}", 100 * float((pixels > FAR).mean()), "%")


def _engine_and_workers(setting: Setting, config: Config, shards: Shards, device: torch.device, report: Report) -> None:
    default = config.speed.hw_decoder_load
    report.row(
        f"dali, {config.speed.workers} workers, JPEG engine's share {default}",
        _speed(setting, config, shards, device), "photos/s", "into 4 views", at_least=WANTED,
    )  # fmt: skip
    cores = os.cpu_count() or 1
    changes: list[tuple[str, int]] = [("hw_decoder_load", 0), ("hw_decoder_load", 1)]
    changes += [("workers", 2)] if setting.tiny else [("workers", n) for n in (2, 4, 16) if n <= cores]
    for name, value in changes:
        changed = copy.deepcopy(config)
        setattr(changed.speed, name, value)
        report.row(f"dali, speed.{name}={value}", _speed(setting, changed, shards, device), "photos/s")


def _speed(setting: Setting, config: Config, shards: Shards, device: torch.device) -> float:
    """Photos per second into views on the device, after the batches that were prepared while the pipeline started."""
    ready, timed = (1, 2) if setting.tiny else (2 * config.speed.workers, 24)
    batches = _read(config, shards, device)
    for _ in itertools.islice(batches, ready):
        pass
    synchronize(device)
    start = time.perf_counter()
    photos = sum(len(batch.ids) for batch in itertools.islice(batches, timed))
    synchronize(device)
    return photos / (time.perf_counter() - start)
