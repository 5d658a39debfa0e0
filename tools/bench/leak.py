"""Memory, threads and open files of the trainer and its data workers over 2,000 steps, for each reader.

    python -m tools.bench leak [--config FILE] [--shards FOLDER] [--reader wds|dali] [--steps 2000] [--out rows.jsonl]

They are read from /proc while train.py runs. A row for each quarter of the steps: figures that grow from row to row are a
leak. `make bench WHAT=leak [CONFIG=…] [SHARDS=…] [OUT=…]`.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from pipeline.loader import choose_reader
from pipeline.mixture import open_training
from pipeline.plan import Plan
from runtime.config import load_config, shards_word
from runtime.errors import UserError
from runtime.metrics import read_jsonl
from tools.bench.rows import cpu_name, make_table, report_rows

LOG_EVERY = 100  # steps between two lines of metrics.jsonl
WARMUP = 200  # steps before the first quarter, not reported


def process_usage(pid: int) -> dict[str, float]:
    """Of a process and all its descendants: memory (MB, shared pages counted once), threads, open files, processes."""
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
    for member in family:
        proc = Path("/proc", str(member))
        try:
            rollup = (proc / "smaps_rollup").read_text().splitlines()
            threads += len(list((proc / "task").iterdir()))
            files += len(list((proc / "fd").iterdir()))
        except OSError:
            continue
        memory += sum(int(line.split()[1]) for line in rollup if line.startswith("Pss:"))
    return {"memory_mb": round(memory / 1024), "threads": threads, "open_files": files, "processes": len(family)}


def measure_reader(path: str, shards: str, reader: str, steps: int, folder: Path) -> list[dict[str, Any]]:
    """Train for `steps` steps; a row for each quarter of them after the warm-up. Medians, because memory varies within a
    step. Raises UserError if the run fails."""
    config = load_config(path, [shards_word(shards)])
    plan = Plan(
        open_training(config), batch=config.optim.global_batch_size, seed=config.seed, holdout=config.data.holdout
    )
    epochs = (steps + LOG_EVERY) / plan.steps_per_epoch
    overrides = [
        shards_word(shards), "data.val=null", f"optim.epochs={epochs}", f"speed.reader={reader}",
        f"run.folder={folder}", f"run.log_every={LOG_EVERY}",
    ]  # fmt: skip
    ends = [WARMUP, *(steps * quarter // 4 for quarter in (1, 2, 3, 4))]
    rows: list[dict[str, Any]] = []
    usages: list[dict[str, float]] = []
    with open(folder.with_suffix(".log"), "w+") as log:
        trainer = subprocess.Popen([sys.executable, "train.py", path, *overrides], stdout=log, stderr=log)
        try:
            while len(rows) < len(ends):
                if trainer.poll() is not None:
                    log.seek(0)
                    raise UserError(f"the run ended before step {ends[len(rows)]}: {log.read()[-500:]}")
                metrics = read_jsonl(folder / "metrics.jsonl")
                usages.append(process_usage(trainer.pid))
                if metrics and metrics[-1]["step"] >= ends[len(rows)]:
                    row = {"what": "leak", "reader": reader, "config": path, "steps_to": metrics[-1]["step"]}
                    medians = {name: round(statistics.median(usage[name] for usage in usages)) for name in usages[0]}
                    rows.append(row | medians | {"device": cpu_name()})
                    usages.clear()
                time.sleep(0.25)
        finally:
            trainer.terminate()
            trainer.wait()
    return rows[1:]


def run(args: argparse.Namespace) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for reader in (args.reader,) if args.reader else ("wds", "dali"):
            try:
                choose_reader(reader, torch.device("cpu"))
            except UserError as error:
                print(f"no row: {error}")
                continue
            rows += measure_reader(args.config, args.shards, reader, args.steps, Path(folder, reader))
    names = ("reader", "steps_to", "memory_mb", "threads", "open_files", "processes")
    table = make_table(f"{args.config}: {args.steps} steps, medians of each quarter", names, left=1)
    for row in rows:
        table.add_row(*(str(row[name]) for name in names))
    report_rows(table, rows, args.out)
