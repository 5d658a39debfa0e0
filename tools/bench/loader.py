"""Training with the loader beside training on one batch kept in memory: images/s of both, headspace, and data wait.

    python -m tools.bench all [--config FILE] [--shards FOLDER] [--rounds 5] [--steps 30] [--out rows.jsonl]

Headspace (the term is SPDL's) is the step time with a perfect loader divided by the step time with this one: 1 means that
the loader costs nothing. Both take turns, so that other load on the machine slows both.
`make bench WHAT=all [CONFIG=…] [SHARDS=…] [OUT=…]`.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from model.methods import build
from pipeline.batch import Batch
from pipeline.loader import Loader
from pipeline.mixture import open_training
from pipeline.plan import Plan
from runtime import distributed, schedule
from runtime.compile import compile_parts
from runtime.config import load_config, shards_word
from tools.bench.rows import cpu_name, make_table, median_and_range, report_rows
from train import train_step


def run(args: argparse.Namespace) -> None:
    config = load_config(args.config, [shards_word(args.shards), "data.val=null"])
    shards = open_training(config)
    plan = Plan(shards, batch=config.optim.global_batch_size, seed=0, holdout=config.data.holdout)
    context = distributed.start(config.speed)
    method = build(config)
    context.to_device(method)
    if config.speed.compile:
        compile_parts(method.compile_units(), context.device)
    schedules = schedule.make_schedules(config, plan.steps_per_epoch)
    optimizer = schedule.Optimizer.of(method, config.optim)
    loader = Loader(
        config, shards, plan, device=context.device, dtype=context.dtype, start=0, stop=(args.rounds + 1) * args.steps + 1,
        compile=config.speed.compile,
    )  # fmt: skip
    cached_batch = next(loader)

    def images_per_second(batches: Iterator[Batch]) -> float:
        start = time.perf_counter()
        for batch in batches:
            train_step(batch, method, method, optimizer, schedules.at(0), context)
        if context.device.type == "cuda":
            torch.cuda.synchronize()
        return config.optim.global_batch_size * args.steps / (time.perf_counter() - start)

    real: list[float] = []
    cached: list[float] = []
    waits: list[float] = []
    for n in range(args.rounds + 1):  # the first round is not counted
        loader.waited()
        start = time.perf_counter()
        real_speed = images_per_second(itertools.islice(loader, args.steps))
        wait = 100 * loader.waited() / (time.perf_counter() - start)
        cached_speed = images_per_second(itertools.repeat(cached_batch, args.steps))
        if n:
            real.append(real_speed)
            cached.append(cached_speed)
            waits.append(wait)
    loader.close()
    device = torch.cuda.get_device_name(0) if context.device.type == "cuda" else cpu_name()
    row: dict[str, Any] = {"what": "all", "config": args.config, "reader": loader.reader, "shards": args.shards}
    row |= median_and_range("img_per_s", real) | median_and_range("img_per_s_cached", cached)
    row |= median_and_range("data_wait_percent", waits)
    row |= {"headspace": round(statistics.median(real) / statistics.median(cached), 4), "device": device}
    names = ("img_per_s", "img_per_s_cached", "headspace", "data_wait_percent")
    title = f"{args.config}, {loader.reader}, {device}: training with the loader and with a cached batch"
    table = make_table(title, names)
    table.add_row(*(f"{row[name]:.4g}" for name in names))
    report_rows(table, [row], args.out)
