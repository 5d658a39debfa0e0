"""How long a checkpoint delays the step.

    python -m tools.bench checkpoint [--config FILE] [--dst FOLDER] [--rounds 5] [--out FILE]

The state of a whole run (student, teacher, centers, AdamW's moments) of a config's size, on the device that trains.
`before` hashes, checks and writes it between two steps, as this trainer first did; `pause` is what the step waits for now,
the copy off the device; `on disk` is when the writer thread is done. In turns, each to the same disk, synced.
"""

import argparse
import hashlib
import os
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.methods import build
from runtime.checkpoint import Writer, training_state
from runtime.config import dump_config, load_config
from runtime.distributed import best_device, reuse_memory
from tools.bench.rows import device_name, make_table, median_and_range, report_rows


def save_synchronously(path: Path, state: dict[str, Tensor]) -> None:
    """Hash, check, write and sync, while the device waits."""
    state = {n: t.cpu().contiguous() for n, t in state.items()}
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(state[name].reshape(-1).view(torch.uint8).numpy().data)
    assert all(bool(t.isfinite().all()) for t in state.values())
    save_file(state, path, metadata={"sha256": digest.hexdigest()})
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def run(args: argparse.Namespace) -> None:
    config = load_config(args.config)
    device = best_device()
    if device.type == "cpu":
        reuse_memory()
    model = build(config).to(device)
    adamw = torch.optim.AdamW(model.parameter_groups(), lr=1e-4, fused=True)
    for p in model.student.parameters():
        if p.requires_grad:
            p.grad = torch.randn_like(p)
    adamw.step()
    adamw.zero_grad()
    seconds: dict[str, list[float]] = {"before": [], "pause": [], "on disk": []}
    with tempfile.TemporaryDirectory(dir=args.dst) as folder:
        writer = Writer(Path(folder) / "checkpoints", 1, dump_config(config), {}, {})
        for step in range(args.rounds + 1):
            start = time.perf_counter()
            writer.save(step, model, adamw)
            seconds["pause"].append(time.perf_counter() - start)
            writer.finish()
            seconds["on disk"].append(time.perf_counter() - start)
            start = time.perf_counter()
            save_synchronously(Path(folder) / "before.safetensors", training_state(model, adamw))
            seconds["before"].append(time.perf_counter() - start)
        size = (Path(folder) / "before.safetensors").stat().st_size
    name = device_name(device)
    about = {"what": "checkpoint", "config": args.config, "device": name, "megabytes": round(size / 1e6)}
    print(f"{size / 1e6:,.0f} MB of {args.config} on {name}")
    table = make_table("how long a step waits", ("seconds", "median", "least", "most", "first"), left=1)
    rows = []
    for part, (first, *values) in seconds.items():
        row = median_and_range("seconds", values)
        table.add_row(part, *(f"{s:.3f}" for s in (row["seconds"], *row["seconds_spread"], first)))
        rows.append(about | {"part": part, "rounds": args.rounds} | row | {"first_seconds": round(first, 3)})
    report_rows(table, rows, args.out)
