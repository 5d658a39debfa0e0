"""Run folders with real checkpoints of networks that were not trained: written in a tenth of a second."""

from pathlib import Path

import torch

from model import methods
from runtime.checkpoint import Writer
from runtime.config import load_config
from runtime.schedule import Optimizer

CONFIG = """
data: {{shards: {shards}, holdout: 0.2, views: [{{count: 2, size: 24, scale: [0.4, 1.0], teacher: true}}]}}
model: {{arch: custom, width: 24, depth: 1, heads: 2, patch: 8}}
reference: {{points: 2}}
head: {{hidden: 32, bottleneck: 16, prototypes: 40}}
optim: {{global_batch_size: 8}}
speed: {{compile: false, workers: 0, device: cpu}}
eval: {{seg_epochs: 1, k: 5}}
"""


def write_run(folder: Path, shards: Path, step: int = 7) -> Path:
    """A run at a step; called again for the same folder, one that was trained further. Another step has other weights."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.yaml").exists():
        (folder / "config.yaml").write_text(CONFIG.format(shards=shards))
    config = load_config(folder / "config.yaml")
    torch.manual_seed(step)
    method = methods.build(config)
    writer = Writer(folder / "checkpoints", 2, (folder / "config.yaml").read_text(), {}, {})
    writer.save(step, method, Optimizer(method.student, 3.0, groups=method.parameter_groups()).adamw)
    writer.finish()
    return folder
