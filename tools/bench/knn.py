"""k-NN at ImageNet's size beside the bare matrix product and top-k: speed and resident memory.

    python -m tools.bench.knn [--photos 1281167] [--queries 50000] [--width 384] [--k 20] [--minutes 8] [--out rows.jsonl]

The bank is random and lies in a float16 file that is mapped, as a user's own features may. Both sides take turns at
pieces of the bank (16,384 photos against all queries) until the time is over; where that is before the end of the bank,
the time for all of it is extrapolated, and said so. `bare`: `(queries @ bank.T).topk(k)` of the same pieces, float32,
normalized, in memory, as many queries at once as is fastest; neither reading, nor normalizing, nor keeping the best of
all pieces is counted. Resident memory is the peak after every page of the bank has been read (the kernel counts a mapped
file's pages as the process's), with the answers of all queries.
"""

import argparse
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table

from eval.knn import BANK_ROWS, NearestNeighbors
from runtime.distributed import reuse_memory
from runtime.errors import require_positive, run_cli
from tools.bench.data import cpu_name, finish


def simulate(path: Path, photos: int, width: int) -> None:
    """Random float16 features [photos,width] as a .npy file."""
    draws = np.random.default_rng(0)
    features = np.lib.format.open_memmap(path, "w+", np.float16, (photos, width))
    for first in range(0, photos, BANK_ROWS):
        rows = min(BANK_ROWS, photos - first)
        features[first : first + rows] = draws.standard_normal((rows, width), np.float32)
    features.flush()


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def bare(queries: torch.Tensor, bank: torch.Tensor, k: int, rows: int) -> float:
    """Seconds for one piece of the bank, both sides normalized beforehand."""
    began = time.perf_counter()
    for some in queries.split(rows):
        (some @ bank.T).topk(k, dim=1)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--photos", type=int, default=1_281_167, help="of the bank")
    parser.add_argument("--queries", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=8, help="for both sides together")
    parser.add_argument("--folder", type=Path, help="where the bank's file is put (default: the temporary folder)")
    parser.add_argument("--out", type=Path, help="append the row as a JSON line")
    args = parser.parse_args()
    require_positive(args, "photos", "queries", "width", "k", "minutes")
    reuse_memory()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        file = Path(folder) / "bank.npy"
        simulate(file, args.photos, args.width)
        features = torch.from_numpy(np.load(file, mmap_mode="c"))  # copy on write: torch wants a writable array
        labels = torch.arange(args.photos) % 1000
        before = peak_mb()
        draws = torch.Generator().manual_seed(1)
        found = NearestNeighbors(torch.randn(args.queries, args.width, generator=draws), args.k)
        piece = F.normalize(features[:BANK_ROWS].float(), dim=1)
        some = found.queries[:4096]
        sizes = {rows: min(bare(some, piece, args.k, rows) for _ in range(2)) for rows in (256, 1024, 4096)}
        rows = min(sizes, key=lambda rows: sizes[rows])
        ours: list[float] = []
        theirs: list[float] = []
        began = time.perf_counter()
        whole = args.photos // BANK_ROWS * BANK_ROWS
        for first in range(0, max(whole, BANK_ROWS), BANK_ROWS):
            block = slice(first, min(first + BANK_ROWS, args.photos))
            if time.perf_counter() - began > 60 * args.minutes and ours:
                break
            start = time.perf_counter()
            found.meet(features[block], labels[block])
            ours.append(time.perf_counter() - start)
            theirs.append(bare(found.queries, F.normalize(features[block].float(), dim=1), args.k, rows))
        met = len(ours) * BANK_ROWS
        few = NearestNeighbors(found.queries[:64], args.k)
        few.meet(features, labels)  # the rest of the bank's pages, for the memory
        memory = peak_mb()
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    low, high = min(ratios), max(ratios)
    per_piece, bare_piece = statistics.median(ours), statistics.median(theirs)
    pieces = args.photos / BANK_ROWS
    row = {
        "what": "knn", "photos": args.photos, "queries": args.queries, "width": args.width, "k": args.k,
        "measured_share": round(min(1.0, met / args.photos), 3), "seconds": round(per_piece * pieces, 1),
        "bare_seconds": round(bare_piece * pieces, 1), "bare_rows": rows, "speed": round(sum(theirs) / sum(ours), 3),
        "speed_spread": [round(low, 3), round(high, 3)], "peak_mb": round(memory), "peak_mb_before": round(before),
        "threads": torch.get_num_threads(), "device": cpu_name(), "load": round(os.getloadavg()[0], 2),
    }  # fmt: skip
    table = Table(title=f"k-NN, {args.photos:,} x {args.queries:,} features of {args.width}, {cpu_name()}")
    names = ("seconds", "bare_seconds", "speed", "speed_spread", "measured_share", "peak_mb")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    table.add_row(*(str(row[name]) for name in names))
    finish(table, [row], args.out)
    if row["measured_share"] < 1:
        print(f"seconds are extrapolated from {100 * row['measured_share']:.0f} % of the bank")


if __name__ == "__main__":
    run_cli(main)
