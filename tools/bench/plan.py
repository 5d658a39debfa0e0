"""Index and plan at 1.28 and 100 million simulated samples: load time, memory, time per step, and the plan's guarantees.

    python -m tools.bench plan [--sources N] [--out rows.jsonl]

Checks that no sample comes twice in an epoch, and that any number of processes shares its steps. With --sources the samples
are in N folders without weights, so that every sample comes once an epoch too. `make bench WHAT=plan`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.errors import UserError
from tools.bench.rows import cpu_name, make_table, median_and_range, report_rows

if TYPE_CHECKING:
    from pipeline.mixture import AnyShards

SAMPLES = (1_281_167, 100_000_000)
BATCHES = (256, 1024)
PER_SHARD = 2400  # photos of 110 kB in a shard of 256 MB


def simulate(folder: Path, samples: int) -> None:
    """Write manifest and index of a data set of `samples` photos of 110 kB in shards of 256 MB, without the tars."""
    from pipeline.shards import FORMAT, INDEX

    counts = [PER_SHARD] * (samples // PER_SHARD) + [samples % PER_SHARD] * (samples % PER_SHARD > 0)
    index = np.lib.format.open_memmap(folder / "index.npy", "w+", INDEX, (samples,))
    for first in range(0, samples, 10_000_000):
        part = index[first : first + 10_000_000]
        row = np.arange(first, first + len(part))
        part["shard"], part["offset"] = row // PER_SHARD, row % PER_SHARD * 110_592
        part["size"], part["height"], part["width"], part["label"] = 110_000, 375, 500, row % 1000
    index.flush()
    shards = [{"name": f"shard-{i:06d}.tar", "samples": n, "bytes": 0, "sha256": ""} for i, n in enumerate(counts)]
    (folder / "manifest.json").write_text(json.dumps({"format": FORMAT, "classes": [], "shards": shards}))


def simulate_sources(folder: Path, samples: int, sources: int) -> None:
    """`simulate` so many folders, 0, 1, ..., with `samples` in all: source i has i + 1 shares of them."""
    ends = [samples * i * (i + 1) // (sources * (sources + 1)) for i in range(sources + 1)]
    for i in range(sources):
        (folder / str(i)).mkdir()
        simulate(folder / str(i), ends[i + 1] - ends[i])


def open_simulated(folder: Path) -> "AnyShards":
    """What `simulate_sources` wrote, without looking for the tars."""
    from pipeline.mixture import Mixture
    from pipeline.shards import Shards

    parts = [Shards(source, max_missing=None) for source in sorted(folder.iterdir(), key=lambda path: int(path.name))]
    return Mixture(parts) if len(parts) > 1 else parts[0]


def measure_plan(folder: Path, batch: int) -> dict[str, Any]:
    """The cost of loading and planning, for a row. Asserts the plan's guarantees. Needs a process of its own."""
    from pipeline.plan import Plan

    before = resident_mb()
    start = time.perf_counter()
    shards = open_simulated(folder)
    plan = Plan(shards, batch=batch, seed=0)
    plan.samples_of(0)
    loaded = time.perf_counter() - start
    first = plan.steps_per_epoch // 3
    times = []
    for step in range(first, first + min(1000, plan.steps_per_epoch // 2)):  # as a reader does
        start = time.perf_counter()
        ids = plan.samples_of(step)
        plan.passes_of(step)
        shards.records(ids)
        if (step - first) * batch % 65_536 < batch:  # as Shards.read does
            shards.release_pages()
        times.append(time.perf_counter() - start)
    memory = resident_mb()
    steps = np.random.default_rng(0).permutation(plan.steps_per_epoch)[:200]

    # an epoch is a permutation: no sample appears twice in the steps checked
    seen = np.concatenate([plan.samples_of(int(s)) for s in steps[: 2_000_000 // batch]])
    assert len(np.unique(seen)) == len(seen), "a sample appears twice in an epoch"
    assert seen.min() >= 0
    assert seen.max() < len(shards)
    for world in (1, 2, 8, 64):
        parts = np.stack([plan.samples_of(7, rank, world) for rank in range(world)], 1)
        assert np.array_equal(parts.ravel(), plan.samples_of(7)), f"{world} processes do not share the same step"
    # a node of 8 (of 64 processes): the shards that it reads in a part of the epoch; of one source those of its streams
    touched = {
        int(s) for step in steps.tolist() for r in range(8) for s in plan.samples_of(step, r * 8, 64) // PER_SHARD
    }
    count = sum(len(part.shards) for part in shards.parts)
    bound = count / 8 + plan.orders[0].streams
    assert len(plan.orders) > 1 or len(touched) <= bound, f"a node of 8 reads {len(touched)} shards, more than {bound}"
    ms = [1000 * t for t in times]
    return {
        "samples": len(shards), "batch": batch, "load_s": round(loaded, 3), "resident_mb": round(memory, 1),
        "added_mb": round(memory - before, 1), **median_and_range("ms_per_step", ms),
        "ms_per_step_p99": float(np.quantile(ms, 0.99)), "node_share_shards": len(touched), "shards": count,
        "sources": len(plan.orders),
    }  # fmt: skip


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def run(args: argparse.Namespace) -> None:
    """Measure each simulated set in a process of its own."""
    code = (
        "import json, sys, pathlib; from tools.bench.plan import measure_plan; "
        "print(json.dumps(measure_plan(pathlib.Path(sys.argv[1]), int(sys.argv[2]))))"
    )
    rows = []
    for samples in SAMPLES:
        with tempfile.TemporaryDirectory() as folder:
            simulate_sources(Path(folder), samples, args.sources)
            for batch in BATCHES:
                command = [sys.executable, "-c", code, folder, str(batch)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise UserError(f"plan of {samples} samples: {done.stderr.strip().splitlines()[-1]}")
                rows.append({"what": "plan", **json.loads(done.stdout), "device": cpu_name()})
    names = (
        "samples",
        "sources",
        "batch",
        "load_s",
        "resident_mb",
        "ms_per_step",
        "ms_per_step_p99",
        "node_share_shards",
        "shards",
    )
    table = make_table("plan: simulated sets", names)
    for row in rows:
        table.add_row(*(f"{row[name]:,.2f}" if isinstance(row[name], float) else f"{row[name]:,}" for name in names))
    report_rows(table, rows, args.out)
