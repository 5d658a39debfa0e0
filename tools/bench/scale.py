"""Training on several devices beside one: images/s, efficiency and data wait.

    python -m tools.bench scale N|all [--config FILE] [--shards FOLDER] [--batch N] [--steps 100] [--rounds 3] [--out FILE]

Runs train.py with real data on one device, and under torchrun on N devices of this machine, in turns; each device has the
same number of images in both. Efficiency is the images/s on N devices divided by N times those on one; the data wait is
that of the process that waited longest. Without GPUs, a device is an equal share of the cores.
`make bench WHAT=step GPUS=n [CONFIG=…] [SHARDS=folder] [OUT=rows.jsonl]`.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from pipeline.mixture import open_training
from pipeline.plan import Plan
from runtime.config import load_config, shards_word
from runtime.errors import UserError
from runtime.metrics import read_jsonl
from tools.bench.rows import cpu_name, make_table, median_and_range, report_rows

LOG_EVERY = 10  # steps between two rows of a run's metrics
WARMUP_ROWS = 3  # at the start of a run, not counted


def train(config: str, overrides: list[str], processes: int, folder: Path) -> list[dict]:
    """Run train.py; the rows of its metrics after the warm-up. Raises UserError if it fails."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, "train.py", config, *overrides, f"run.folder={folder}", f"run.log_every={LOG_EVERY}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{processes} processes: {done.stderr.strip()[-800:]}")
    return read_jsonl(folder / "metrics.jsonl")[WARMUP_ROWS:]


def run(args: argparse.Namespace) -> None:
    gpus, cores = torch.cuda.device_count(), os.cpu_count() or 1
    n = gpus if args.processes == "all" else args.processes
    if not 1 < n <= (gpus or cores):
        raise UserError(f"GPUS={args.processes}: at least 2, and this machine has {gpus} GPUs, {cores} cores")
    if not gpus:
        os.environ["OMP_NUM_THREADS"] = str(cores // n)
    config = load_config(args.config, [shards_word(args.shards)])
    batch = args.batch or max(1, config.optim.global_batch_size // n)
    metrics: dict[int, list[dict]] = {1: [], n: []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.rounds):
            for processes in metrics:
                plan = Plan(open_training(config), batch=batch * processes, seed=config.seed)
                epochs = args.steps / plan.steps_per_epoch
                overrides = [
                    shards_word(args.shards), "data.val=null", f"optim.global_batch_size={batch * processes}",
                    f"optim.epochs={epochs}", "optim.warmup_epochs=0", "eval.every=0",
                ]  # fmt: skip
                metrics[processes] += train(args.config, overrides, processes, Path(folder, f"{turn}-{processes}"))
    speeds = {p: [row["images_per_second"] for row in rows] for p, rows in metrics.items()}
    one, many = (statistics.median(speeds[p]) for p in (1, n))
    waits = [row["slowest_data_wait_percent"] for row in metrics[n]]
    device = torch.cuda.get_device_name() if gpus else cpu_name()
    settings = {"what": "step", "config": args.config, "batch_per_device": batch, "steps": args.steps}
    settings |= {"rounds": args.rounds}
    rows = [
        settings | {"devices": 1, "device": device} | median_and_range("img_per_s", speeds[1]),
        settings | {"devices": n, "device": device} | median_and_range("img_per_s", speeds[n])
        | {"efficiency": round(many / (n * one), 3)} | median_and_range("slowest_data_wait_percent", waits),
    ]  # fmt: skip
    columns = ("devices", "images/s", "efficiency", "data wait of the slowest, %")
    table = make_table(f"{args.config}: {batch} images on each device", columns)
    table.add_row("1", f"{one:.1f}", "", "")
    table.add_row(str(n), f"{many:.1f}", f"{many / (n * one):.2f}", f"{statistics.median(waits):.2f}")
    report_rows(table, rows, args.out)
