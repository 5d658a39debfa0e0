"""What processes that resume together read of a checkpoint: 16 gloo processes as 4 machines of 4.

    python -m tools.bench resume [--gigabytes 1] [--ranks 16] [--per-node 4] [--dst FOLDER] [--out FILE]

Each simulated machine has a copy of the checkpoint of its own, which is not in the page cache. `each` is every process for
itself, as this trainer first did: it hashes the file, then reads its tensors. `main` is what train.py does: process 0 hashes
and reads, and the others receive. Linux counts for each process (/proc/self/io) the bytes that it asks for with read(), and
those that its machine fetches from the disk for it, memory maps included. `--dst` must be on a disk, not in memory.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from runtime.checkpoint import latest_valid, save_tensors
from runtime.checkpoint.format import FORMAT
from runtime.config import Speed
from runtime.distributed import start
from runtime.errors import RunError
from tools.bench.rows import cpu_name, make_table, report_rows

BLOCK = 8 * 2**20  # bytes of a tensor
FORMS = ("each", "main")


def write_checkpoint(folder: Path, gigabytes: float) -> Path:
    """A checkpoint of random tensors."""
    count = max(1, round(gigabytes * 1e9 / BLOCK))
    tensors = {f"{i:04d}": torch.randn(BLOCK // 4) for i in range(count)}
    path = folder / "checkpoint-00000001.safetensors"
    header = {"format": str(FORMAT), "step": "1", "config": "", "data": "{}", "environment": "{}"}
    save_tensors(path, tensors, header)
    return path


def forget(path: Path) -> None:
    """Take a file out of the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def counted() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


def resume(rank: int, form: str, folder: Path, environment: dict[str, str], out: Any) -> None:
    """One process: find the checkpoint of its machine and take its tensors; puts its counts into `out`."""
    os.environ |= environment
    context = start(Speed(device="cpu"))
    context.from_main(lambda: None)  # all have begun
    before, begun = counted(), time.perf_counter()
    found = latest_valid(folder) if form == "each" or context.is_main else None
    if form == "main":
        found = context.from_main(lambda: found)
    assert found
    total = torch.zeros((), dtype=torch.int64)
    for _, t in found.stream(read=form == "each" or context.is_main):
        total += (context.broadcast(t) if form == "main" else t).view(torch.int32).sum()
    seconds, after = time.perf_counter() - begun, counted()
    reads = {name: after[name] - before[name] for name in ("rchar", "read_bytes")}
    out.put((rank, seconds, reads, int(total)))
    context.from_main(lambda: None)  # none leaves while others receive
    context.close()


def measure(form: str, paths: list[Path], ranks: int, per_node: int) -> dict[str, Any]:
    """A row: bytes that machines read, and seconds until the last process has all tensors."""
    for path in paths:
        forget(path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    fork = multiprocessing.get_context("fork")  # torch is imported once
    out, processes = fork.Queue(), []
    for rank in range(ranks):
        names = {"RANK": rank, "LOCAL_RANK": rank % per_node, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        environment = {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}}
        folder = paths[rank // per_node].parent
        processes.append(fork.Process(target=resume, args=(rank, form, folder, environment, out)))
        processes[-1].start()
    done = []
    while len(done) < ranks:
        if not out.empty():
            done.append(out.get())
        elif any(process.exitcode for process in processes):
            raise RunError("a process failed, see above")
        else:
            time.sleep(0.02)
    for process in processes:
        process.join()
    assert len({total for *_, total in done}) == 1, "processes have different tensors"

    def of_nodes(name: str) -> list[int]:
        return [sum(r[name] for rank, _, r, _ in done if rank // per_node == node) for node in range(len(paths))]

    return {
        "what": "resume", "form": form, "ranks": ranks, "nodes": len(paths), "gigabytes": paths[0].stat().st_size / 1e9,
        "asked_gb": sum(of_nodes("rchar")) / 1e9, "disk_gb": sum(of_nodes("read_bytes")) / 1e9,
        "disk_gb_most_of_a_node": max(of_nodes("read_bytes")) / 1e9, "seconds": max(seconds for _, seconds, *_ in done),
        "device": cpu_name(),
    }  # fmt: skip


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory(dir=args.dst) as name:
        nodes = [Path(name, f"node{i}") for i in range(-(-args.ranks // args.per_node))]
        for node in nodes:
            node.mkdir()
        paths = [write_checkpoint(nodes[0], args.gigabytes)]
        paths += [Path(shutil.copy(paths[0], node)) for node in nodes[1:]]
        for form in FORMS:
            row = measure(form, paths, args.ranks, args.per_node)
            rows.append(json.loads(json.dumps(row), parse_float=lambda text: round(float(text), 3)))
    names = [name for name in rows[0] if name not in ("what", "device")]
    table = make_table("what machines read to resume together", names, left=1)
    for row in rows:
        table.add_row(*(str(row[name]) for name in names))
    report_rows(table, rows, args.out)
