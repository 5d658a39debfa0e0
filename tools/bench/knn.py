"""k-NN at ImageNet's size beside the bare matrix product and top-k: speed and resident memory.

    python -m tools.bench knn [--photos 1281167] [--queries 50000] [--width 384] [--k 20] [--minutes 8] [--out rows.jsonl]

The train set is random and in a memory-mapped float16 file, as a user's own features may be. Both sides take turns on
blocks of the train set (16,384 photos against all queries) until the time is over; if that is before the end of the train
set, the total time is extrapolated, and the output says so. `bare`: `(queries @ train.T).topk(k)` of the same blocks,
float32, normalized, in memory, with the fastest number of queries at once; reading, normalizing, and merging the blocks'
best are not counted. Resident memory is the peak after every page of the train set has been read (the kernel counts a
mapped file's pages as the process's), with the answers of all queries.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.knn import BLOCK_ROWS, NearestNeighbors
from runtime.distributed import peak_memory, reuse_memory
from tools.bench.rows import cpu_name, make_table, report_rows


def simulate(path: Path, photos: int, width: int) -> None:
    """Random float16 features [photos,width] as a .npy file."""
    draws = np.random.default_rng(0)
    features = np.lib.format.open_memmap(path, "w+", np.float16, (photos, width))
    for first in range(0, photos, BLOCK_ROWS):
        rows = min(BLOCK_ROWS, photos - first)
        features[first : first + rows] = draws.standard_normal((rows, width), np.float32)
    features.flush()


def peak_mb() -> float:
    return peak_memory(torch.device("cpu"))


def time_bare(queries: Tensor, train: Tensor, k: int, rows: int) -> float:
    """Seconds for one block of the train set, both sides normalized beforehand; `rows` queries at once."""
    start = time.perf_counter()
    for chunk in queries.split(rows):
        (chunk @ train.T).topk(k, dim=1)
    return time.perf_counter() - start


def measure(args: argparse.Namespace, features: Tensor, labels: Tensor) -> dict[str, Any]:
    """Seconds per block of both sides and the peak memory. features [photos,width] float16, labels [photos]."""
    before = peak_mb()
    draws = torch.Generator().manual_seed(1)
    neighbors = NearestNeighbors(torch.randn(args.queries, args.width, generator=draws), args.k)
    block = F.normalize(features[:BLOCK_ROWS].float(), dim=1)
    some = neighbors.queries[:4096]
    sizes = {rows: min(time_bare(some, block, args.k, rows) for _ in range(2)) for rows in (256, 1024, 4096)}
    rows = min(sizes, key=lambda rows: sizes[rows])
    ours: list[float] = []
    bare: list[float] = []
    start = time.perf_counter()
    whole = args.photos // BLOCK_ROWS * BLOCK_ROWS
    for first in range(0, max(whole, BLOCK_ROWS), BLOCK_ROWS):
        part = slice(first, min(first + BLOCK_ROWS, args.photos))
        if time.perf_counter() - start > 60 * args.minutes and ours:
            break
        block_start = time.perf_counter()
        neighbors.update(features[part], labels[part])
        ours.append(time.perf_counter() - block_start)
        bare.append(time_bare(neighbors.queries, F.normalize(features[part].float(), dim=1), args.k, rows))
    few = NearestNeighbors(neighbors.queries[:64], args.k)
    few.update(features, labels)  # reads the remaining pages of the train set, for the memory
    return {"ours": ours, "bare": bare, "bare_rows": rows, "peak_mb_before": before, "peak_mb": peak_mb()}


def run(args: argparse.Namespace) -> None:
    reuse_memory()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        file = Path(folder) / "train.npy"
        simulate(file, args.photos, args.width)
        features = torch.from_numpy(np.load(file, mmap_mode="c"))  # copy on write: torch wants a writable array
        result = measure(args, features, torch.arange(args.photos) % 1000)
    ours, bare = result["ours"], result["bare"]
    ratios = [b / a for a, b in zip(ours, bare, strict=True)]
    blocks = args.photos / BLOCK_ROWS
    row = {
        "what": "knn", "photos": args.photos, "queries": args.queries, "width": args.width, "k": args.k,
        "measured_share": round(min(1.0, len(ours) * BLOCK_ROWS / args.photos), 3),
        "seconds": round(statistics.median(ours) * blocks, 1), "bare_seconds": round(statistics.median(bare) * blocks, 1),
        "bare_rows": result["bare_rows"], "speed": round(sum(bare) / sum(ours), 3),
        "speed_spread": [round(min(ratios), 3), round(max(ratios), 3)], "peak_mb": round(result["peak_mb"]),
        "peak_mb_before": round(result["peak_mb_before"]), "threads": torch.get_num_threads(), "device": cpu_name(),
        "load": round(os.getloadavg()[0], 2),
    }  # fmt: skip
    names = ("seconds", "bare_seconds", "speed", "speed_spread", "measured_share", "peak_mb")
    table = make_table(f"k-NN, {args.photos:,} x {args.queries:,} features of {args.width}, {cpu_name()}", names)
    table.add_row(*(str(row[name]) for name in names))
    report_rows(table, [row], args.out)
    if row["measured_share"] < 1:
        print(f"seconds are extrapolated from {100 * row['measured_share']:.0f} % of the train set")
