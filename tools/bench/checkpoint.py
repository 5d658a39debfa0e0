"""How long a checkpoint holds the step up:  python -m tools.bench.checkpoint [--config FILE] [--dst FOLDER] [--rounds N]

The state of a whole run (student, teacher, centers, AdamW's moments) of a config's size, on the device that trains.
`before` hashes, checks and writes it between two steps, as this trainer did at first; `pause` is what the step waits for
now, the copy off the device; `on disk` is when the thread is done. In turns, each to the same disk, synced.
"""

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.methods import build
from runtime.checkpoint import Writer, state_of
from runtime.config import dump_config, load_config
from runtime.distributed import reuse_memory
from runtime.errors import run_cli


def between_two_steps(path: Path, state: dict[str, Tensor]) -> None:
    """Hash, check, write, sync: all of it while the device waits."""
    state = {n: t.cpu().contiguous() for n, t in state.items()}
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(state[name].reshape(-1).view(torch.uint8).numpy().data)
    assert all(bool(t.isfinite().all()) for t in state.values())
    save_file(state, path, metadata={"sha256": digest.hexdigest()})
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", default="configs/densedino_vits16.yaml")
    parser.add_argument("--dst", default=tempfile.gettempdir(), help="disk to write to; default: /tmp")
    parser.add_argument(
        "--rounds", type=int, default=5, help="default 5; the first save, which makes its buffers, is apart"
    )
    options = parser.parse_args()
    config = load_config(options.config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    with tempfile.TemporaryDirectory(dir=options.dst) as folder:
        writer = Writer(Path(folder) / "checkpoints", 1, dump_config(config), {}, {})
        for step in range(options.rounds + 1):
            start = time.perf_counter()
            writer.save(step, model, adamw)
            pause = time.perf_counter() - start
            writer.finish()
            on_disk = time.perf_counter() - start
            start = time.perf_counter()
            between_two_steps(Path(folder) / "before.safetensors", state_of(model, adamw))
            before = time.perf_counter() - start
            for name, value in (("before", before), ("pause", pause), ("on disk", on_disk)):
                seconds[name].append(value)
        size = (Path(folder) / "before.safetensors").stat().st_size
    print(f"{size / 1e6:,.0f} MB of {options.config} on {device}, torch {torch.__version__}")
    for name, (first, *values) in seconds.items():
        spread = f"{min(values):.3f} to {max(values):.3f}, {len(values)} rounds; first {first:.3f}"
        print(f"{name:8s} {statistics.median(values):6.3f} s  ({spread})")


if __name__ == "__main__":
    run_cli(main)
