"""What processes that resume together read of a checkpoint: 16 gloo processes as 4 machines of 4.

    python -m tools.bench resume [--gigabytes 1] [--ranks 16] [--per-node 4] [--dst FOLDER] [--out FILE]

Each simulated machine has a copy of the checkpoint of its own, which is not in the page cache. `each` is every process for
itself, as this trainer first did: it hashes the file, then reads its tensors. `main` is what train.py does: process 0 hashes
and reads, and the others receive. Counted are the bytes that processes ask for with read() (/proc/self/io), and how much of
each machine's copy is in the page cache afterwards (mincore), whether it was read or mapped. `--dst` must be on a disk.
"""

import argparse
import ctypes
import json
import mmap
import multiprocessing
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
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


def cached_bytes(path: Path) -> int:
    """How much of a file is in the page cache."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
        address = np.frombuffer(pages, np.uint8).ctypes.data
        present = np.zeros(-(-len(pages) // mmap.PAGESIZE), np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        wanted = (ctypes.c_void_p(address), ctypes.c_size_t(len(pages)), ctypes.c_void_p(present.ctypes.data))
        if libc.mincore(*wanted):
            raise OSError(ctypes.get_errno(), "mincore")
    return int((present & 1).sum()) * mmap.PAGESIZE


def asked_bytes() -> int:
    """What this process has asked for with read(), of any file."""
    return int(Path("/proc/self/io").read_text().split()[1])


def resume(rank: int, form: str, folder: Path, environment: dict[str, str], out: Any) -> None:
    """One process: finds the checkpoint, takes its tensors, puts (seconds, bytes asked, checksum) in `out`."""
    os.environ |= environment
    context = start(Speed(device="cpu"))
    context.from_main(lambda: None)  # all have begun
    before, begun = asked_bytes(), time.perf_counter()
    found = latest_valid(folder) if form == "each" or context.is_main else None
    if form == "main":
        found = context.from_main(lambda: found)
    assert found
    total = torch.zeros((), dtype=torch.int64)
    for _, t in found.stream(read=form == "each" or context.is_main):
        total += (context.broadcast(t) if form == "main" else t).view(torch.int32).sum()
    out.put((time.perf_counter() - begun, asked_bytes() - before, int(total)))
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
    done = list[tuple[float, int, int]]()
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

    fetched = [cached_bytes(path) / 1e9 for path in paths]
    return {
        "what": "resume", "form": form, "ranks": ranks, "nodes": len(paths), "gigabytes": paths[0].stat().st_size / 1e9,
        "asked_gb": sum(asked for _, asked, _ in done) / 1e9, "fetched_gb": sum(fetched),
        "fetched_gb_most_of_a_node": max(fetched), "seconds": max(seconds for seconds, *_ in done), "device": cpu_name(),
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
