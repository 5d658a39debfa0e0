"""512 processes on one machine: what each of them plans, reads and decides, as threads with torch's threaded process group.

    python -m tools.bench ranks [--ranks 512] [--per-node 8] [--steps 20] [--out FILE]

Each thread does what train.py does outside the network: it takes the shards from the first process of its machine and the
resume decision from process 0, plans steps and the shards to prefetch, and reads the metrics with the vote to stop. The data
set has 1.28 million samples without tars. Checks that all ranks together have the order of one process, resume at the same
step, and stop at the vote of one. Memory is what all threads add, divided by them; time is each thread's own CPU time.
"""

import argparse
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pipeline.plan import Plan
from pipeline.shards import Shards
from runtime.distributed import DistributedContext
from runtime.errors import RunError
from runtime.metric_sums import MetricSums
from tools.bench.plan import PER_SHARD, SAMPLES, resident_mb, simulate
from tools.bench.rows import cpu_name, make_table, report_rows

IMAGES = 4  # of a rank in a step
FIRST = 1_000  # the step that process 0 resumes from


class Rank:
    """One of the simulated processes. After `run`: ids [steps,IMAGES], shards (those of its steps and the ones to prefetch),
    stopped (what the vote says), ms of CPU time of a step and of the vote."""

    def __init__(self, folder: Path, rank: int, ranks: int, per_node: int, steps: int):
        self.context = DistributedContext(rank, ranks, torch.device("cpu"), torch.float32, rank % per_node)
        self.folder, self.steps = folder, range(FIRST, FIRST + steps)
        self.ids: list[np.ndarray] = []
        self.shards: set[int] = set()
        self.step_ms: list[float] = []
        self.error: BaseException | None = None

    def run(self, store: Any) -> None:
        context = self.context
        try:
            dist.init_process_group("threaded", rank=context.rank, world_size=context.world_size, store=store)
            opened = None if context.local_rank else Shards(self.folder, max_missing=None)
            self.opened = context.from_first_of_node(opened)
            self.first = context.from_main(lambda: FIRST)
            self.plan = make_plan(self.opened, context.world_size)
            for step in self.steps:
                begun = time.thread_time()
                ids = self.plan.samples_of(step, context.rank, context.world_size)
                _ = self.opened.index["height"][ids], self.opened.index["crc32"][ids]
                current, upcoming = self.plan.shards_ahead(step, context.rank, context.world_size)
                self.step_ms.append(1000 * (time.thread_time() - begun))
                self.ids.append(ids)
                self.shards.update((ids // PER_SHARD).tolist(), current, upcoming)
            sums = MetricSums(0)
            sums.add({"loss": torch.tensor(1.0), "step_applied": torch.tensor(1.0)})
            begun = time.thread_time()
            last = context.rank == context.world_size - 1  # one rank of all has received a signal
            self.stopped = sums.read(context, last, 0, 0.1, 0.2 + 0.1 * last, 1)
            self.vote_ms = 1000 * (time.thread_time() - begun)
        except BaseException as error:  # raised again by `simulate_ranks`
            self.error = error


def make_plan(shards: Shards, ranks: int) -> Plan:
    return Plan(shards, batch=IMAGES * ranks, seed=0)


def simulate_ranks(folder: Path, ranks: int, per_node: int, steps: int) -> list[Rank]:
    """All ranks, each in a thread, after their last step. Raises RunError if one of them failed."""
    # torch's own tests have it; it is in every version from 2.11 to 2.15
    from torch.testing._internal.distributed.multi_threaded_pg import _install_threaded_pg, _uninstall_threaded_pg

    isolate: Any = torch._C._distributed_c10d
    _install_threaded_pg()
    isolate._set_thread_isolation_mode(True)  # each thread has process groups of its own
    try:
        store = dist.HashStore()
        all_ranks = [Rank(folder, rank, ranks, per_node, steps) for rank in range(ranks)]
        threads = [threading.Thread(target=rank.run, args=(store,), daemon=True) for rank in all_ranks]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            if failed := next((rank for rank in all_ranks if rank.error), None):  # the others would wait for it
                raise RunError(f"rank {failed.context.rank}: {failed.error!r}") from failed.error
            time.sleep(0.05)
    finally:
        isolate._set_thread_isolation_mode(False)
        _uninstall_threaded_pg()
    return all_ranks


def check_ranks(all_ranks: list[Rank], folder: Path) -> None:
    """Assert that they are one run: the order of one process, one resume decision, one vote, the same slowest rank."""
    ranks = len(all_ranks)
    alone = make_plan(Shards(folder, max_missing=None), ranks)
    for i, step in enumerate(all_ranks[0].steps):
        together = np.stack([rank.ids[i] for rank in all_ranks], 1).ravel()
        assert np.array_equal(together, alone.samples_of(step)), f"step {step}: not the order of one process"
    assert {rank.first for rank in all_ranks} == {FIRST}, "ranks resume at different steps"
    assert all(rank.stopped.stop for rank in all_ranks), "a rank has not heard the vote to stop"
    rows = [rank.stopped.row(1, 0.0, rank.context, None) for rank in all_ranks]
    assert {row["slowest_rank"] for row in rows} == {ranks - 1}, "ranks disagree on the slowest"


def run(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        simulate(folder, SAMPLES[0])
        alone = Shards(folder, max_missing=None)
        make_plan(alone, args.ranks).samples_of(
            0
        )  # what the first plan of a process imports and allocates is not a rank's
        before = resident_mb()
        all_ranks = simulate_ranks(folder, args.ranks, args.per_node, args.steps)
        added = (resident_mb() - before) / args.ranks
        check_ranks(all_ranks, folder)
        shards = len(alone.shards)
        nodes = [all_ranks[i : i + args.per_node] for i in range(0, args.ranks, args.per_node)]
        touched = [len(set().union(*(rank.shards for rank in node))) for node in nodes]
    step_ms = [ms for rank in all_ranks for ms in rank.step_ms]
    row = {
        "what": "ranks", "ranks": args.ranks, "nodes": len(nodes), "steps": args.steps, "samples": SAMPLES[0],
        "mb_per_rank": round(added, 2), "ms_per_step": round(statistics.median(step_ms), 3),
        "ms_per_step_p99": round(float(np.quantile(step_ms, 0.99)), 3),
        "vote_ms": round(statistics.median(rank.vote_ms for rank in all_ranks), 3),
        "node_shards": round(statistics.median(touched)), "node_shards_most": max(touched), "shards": shards,
        "device": cpu_name(),
    }  # fmt: skip
    names = [name for name in row if name not in ("what", "samples", "device")]
    table = make_table(f"{args.ranks} ranks: each by itself; the same order as one process", names)
    table.add_row(*(str(row[name]) for name in names))
    report_rows(table, [row], args.out)
