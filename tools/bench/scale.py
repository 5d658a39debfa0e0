"""Training on several devices beside one: `make bench WHAT=step GPUS=n [CONFIG=…] [SHARDS=folder] [OUT=rows.jsonl]`.

train.py itself, with real data, on one device and under torchrun on n of this machine, in turns; each device has the same
number of images in both. Images/s, efficiency (images/s by n times those of one device) and the data wait of the process
that waited longest. Without GPUs a device is an equal share of the cores.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.table import Table

from pipeline.shards import Plan, Shards
from runtime.config import load_config
from runtime.errors import UserError, run_cli
from runtime.metrics import read_jsonl
from tools.bench.data import cpu_name, finish, spread

BEAT, WARM = 10, 3  # steps between two rows of a run; rows at its start that do not count


def run(path: str, words: list[str], processes: int, folder: Path) -> list[dict]:
    """The rows of metrics of a run, but for its start."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, "train.py", path, *words, f"run.folder={folder}", f"run.log_every={BEAT}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{processes} processes: {done.stderr.strip()[-800:]}")
    return read_jsonl(folder / "metrics.jsonl")[WARM:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("processes", type=lambda word: torch.cuda.device_count() if word == "all" else int(word))
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--shards", default="data/scenes/shards/train")
    parser.add_argument("--batch", type=int, help="images on each device (default: the config's batch by their number)")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="append the rows as JSON lines")
    args = parser.parse_args()
    n, gpus = args.processes, torch.cuda.device_count()
    cores = os.cpu_count() or 1
    if not 1 < n <= (gpus or cores):
        raise UserError(f"GPUS={n}: two at least, and this machine has {gpus} GPUs, {cores} cores")
    if not gpus:
        os.environ["OMP_NUM_THREADS"] = str(cores // n)
    config = load_config(args.config, [f"data.shards={args.shards}"])
    batch = args.batch or max(1, config.optim.global_batch_size // n)
    rows: dict[int, list[dict]] = {1: [], n: []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.rounds):
            for processes in rows:
                plan = Plan(Shards(args.shards), batch=batch * processes, seed=config.seed)
                epochs = args.steps / plan.steps_per_epoch
                words = [f"data.shards={args.shards}", "data.val=null", f"optim.global_batch_size={batch * processes}",
                         f"optim.epochs={epochs}", "optim.warmup_epochs=0", "eval.every=0"]  # fmt: skip
                rows[processes] += run(args.config, words, processes, Path(folder, f"{turn}-{processes}"))
    speeds = {p: [row["images_per_second"] for row in found] for p, found in rows.items()}
    one, many = (statistics.median(speeds[p]) for p in (1, n))
    waits = [row["slowest_data_wait_percent"] for row in rows[n]]
    about = {
        "what": "step",
        "config": args.config,
        "batch_per_device": batch,
        "steps": args.steps,
        "rounds": args.rounds,
    }
    device = torch.cuda.get_device_name() if gpus else cpu_name()
    told = [
        about | {"devices": 1, "device": device, **spread("img_per_s", speeds[1])},
        about | {"devices": n, "device": device, **spread("img_per_s", speeds[n]), "efficiency": round(many / (n * one), 3),
                 **spread("slowest_data_wait_percent", waits)},
    ]  # fmt: skip
    table = Table(title=f"{args.config}: {batch} images on each device")
    for name in ("devices", "images/s", "efficiency", "data wait of the slowest, %"):
        table.add_column(name, justify="right")
    table.add_row("1", f"{one:.1f}", "", "")
    table.add_row(str(n), f"{many:.1f}", f"{many / (n * one):.2f}", f"{statistics.median(waits):.2f}")
    finish(table, told, args.out)


if __name__ == "__main__":
    run_cli(main)
