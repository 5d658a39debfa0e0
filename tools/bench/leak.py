"""Does a long run grow? `make bench WHAT=leak [CONFIG=…] [SHARDS=folder] [OUT=rows.jsonl]`: 2,000 steps of training with
each reader; memory, threads and open files of the trainer and its reading processes on the way, seen from outside."""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from pipeline.loader import choose_reader
from pipeline.shards import Plan, Shards
from runtime.config import load_config
from runtime.errors import UserError, run_cli
from runtime.metrics import read_jsonl
from tools.bench.data import cpu_name, finish

BEAT = 100  # steps between two rows of the run


def look(pid: int) -> dict[str, float]:
    """Of a process and all that descend from it: memory (MB, shared pages counted once), threads, open files."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended meanwhile
            continue
    family, new = {pid}, {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new}
        family |= new
    memory = threads = files = 0
    for one in family:
        here = Path("/proc", str(one))
        try:
            rollup = (here / "smaps_rollup").read_text().splitlines()
            threads += len(list((here / "task").iterdir()))
            files += len(list((here / "fd").iterdir()))
        except OSError:
            continue
        memory += sum(int(line.split()[1]) for line in rollup if line.startswith("Pss:"))
    return {"memory_mb": round(memory / 1024), "threads": threads, "open_files": files, "processes": len(family)}


def run(path: str, shards: str, reader: str, steps: int, folder: Path) -> list[dict[str, Any]]:
    """Train for `steps` steps; a row for each quarter of them, without the first 200: medians, for a step's own memory
    comes and goes."""
    config = load_config(path, [f"data.shards={shards}"])
    plan = Plan(Shards(shards), batch=config.optim.global_batch_size, seed=config.seed, holdout=config.data.holdout)
    epochs = (steps + BEAT) / plan.steps_per_epoch
    words = [
        f"data.shards={shards}", "data.val=null", f"optim.epochs={epochs}", f"speed.reader={reader}",
        f"run.folder={folder}", f"run.log_every={BEAT}",
    ]  # fmt: skip
    at = [200, *(steps * quarter // 4 for quarter in (1, 2, 3, 4))]
    rows: list[dict[str, Any]] = []
    looks: list[dict[str, float]] = []
    with open(folder.with_suffix(".log"), "w+") as told:
        trainer = subprocess.Popen([sys.executable, "train.py", path, *words], stdout=told, stderr=told)
        try:
            while len(rows) < len(at):
                if trainer.poll() is not None:
                    told.seek(0)
                    raise UserError(f"the run ended before step {at[len(rows)]}: {told.read()[-500:]}")
                metrics = read_jsonl(folder / "metrics.jsonl")
                looks.append(look(trainer.pid))
                if metrics and metrics[-1]["step"] >= at[len(rows)]:
                    row = {"what": "leak", "reader": reader, "config": path, "steps_to": metrics[-1]["step"]}
                    medians = {name: round(statistics.median(seen[name] for seen in looks)) for name in looks[0]}
                    rows.append(row | medians | {"device": cpu_name()})
                    looks.clear()
                time.sleep(0.25)
        finally:
            trainer.terminate()
            trainer.wait()
    return rows[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("config", nargs="?", default="configs/demo.yaml")
    parser.add_argument("--shards", default="data/scenes/shards/train")
    parser.add_argument("--reader", choices=("wds", "dali"), help="only this one")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, help="append the rows as JSON lines")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for reader in (args.reader,) if args.reader else ("wds", "dali"):
            try:
                choose_reader(reader, torch.device("cpu"))
            except UserError as missing:
                print(f"no row: {missing}")
                continue
            rows += run(args.config, args.shards, reader, args.steps, Path(folder, reader))
    names = ("reader", "steps_to", "memory_mb", "threads", "open_files", "processes")
    table = Table(title=f"{args.config}: {args.steps} steps, medians of each quarter")
    for name in names:
        table.add_column(name.replace("_", " "), justify="left" if name == "reader" else "right")
    for row in rows:
        table.add_row(*(str(row[name]) for name in names))
    finish(table, rows, args.out)


if __name__ == "__main__":
    run_cli(main)
