"""The price of the locality prior: DenseDINO's training step with `reference.locality` and without, in turns.

    python -m tools.bench locality [--arch vit_small] [--batch 8] [--rounds 9] [--sigma 1] [--out rows.jsonl]

One process, one network, one batch at rest: only the prior changes from step to step, so that what slows the machine slows
both. The figure is the median of the pairs' ratios. Not compiled on a CPU. On a CPU the step of ViT-S takes seconds.
"""

import argparse
import statistics
import time
from typing import Any

import torch

from runtime import distributed
from runtime.schedule import Optimizer
from tools.bench.rows import device_name, make_table, median_and_range, report_rows
from tools.bench.step_worker import make_config, prepare, synchronize
from train import train_step


def measure(arch: str, batch: int, rounds: int, sigma: float) -> dict[str, Any]:
    """A row: seconds of a step without the prior and with it, and their ratio."""
    device = distributed.best_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if device.type == "cpu":
        distributed.reuse_memory()
    config = make_config(arch, "densedino")
    model, schedules, data = prepare(config, batch, device, dtype)
    optimizer = Optimizer.of(model, config.optim)
    context = distributed.DistributedContext(0, 1, device, dtype)
    seconds: dict[float | None, list[float]] = {None: [], sigma: []}
    for i in range(-2, rounds):  # two rounds to warm up
        for locality in sorted(seconds, key=str, reverse=i % 2 == 0):
            for network in (model.student, model.teacher):
                network.backbone.locality = locality
            synchronize(device)
            start = time.perf_counter()
            train_step(data, model, model, optimizer, schedules.at(max(i, 0)), context)
            synchronize(device)
            if i >= 0:
                seconds[locality].append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(seconds[None], seconds[sigma], strict=True)]
    row: dict[str, Any] = {"what": "locality", "arch": arch, "batch": batch, "sigma": sigma}
    row |= median_and_range("seconds", seconds[None]) | median_and_range("seconds_with_prior", seconds[sigma])
    row |= {"ratio": round(statistics.median(ratios), 4), "rounds": rounds, "dtype": str(dtype).removeprefix("torch.")}
    return row | {"device": device_name(device)}


def run(args: argparse.Namespace) -> None:
    row = measure(args.arch, args.batch, args.rounds, args.sigma)
    columns = ("arch", "batch", "seconds", "seconds_with_prior", "ratio")
    table = make_table(f"a step of DenseDINO with a prior of σ = {args.sigma:g} and without, in turns", columns, left=1)
    table.add_row(*(str(row[name]) for name in columns))
    report_rows(table, [row], args.out)
