"""Features of photos, as files (`make features`), beside the bare forward pass of the same network, in turns.

    python -m tools.bench features [--arch vit_small] [--size 224] [--photos 600] [--shards SHARDS] [--rounds 3]

Bare: the network on batches at rest, as many and as large. Both in the process that is asked for, with its threads; photos
are read by the processes that `eval embed` would start. What is written: [CLS] and the mean patch token, float32.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from eval.embed import FEW, embed, shapes_of
from eval.feature_folder import FeatureFolder
from eval.features import default_workers, tokens_at
from eval.photo_source import PhotoSource, open_photo_source
from model.backbone import Backbone
from model.vit import build_vit
from runtime.distributed import best_device
from runtime.errors import UserError
from tools.bench.rows import device_name, make_table, median_and_range, report_rows
from tools.bench.step_worker import make_config

BATCH = 64


def _written(network: Backbone, source: PhotoSource, size: int) -> float:
    """Seconds for all photos of a source, from their files to files of features."""
    features = ["cls", "mean"]
    with tempfile.TemporaryDirectory() as place:
        folder = FeatureFolder(Path(place) / "features", {}, {})
        folder.open(source.names, shapes_of(features, len(source.names), 0, network, size), "float32")
        start = time.perf_counter()
        workers = default_workers(len(source.names), few=FEW)
        embed(network, source, folder, None, size=size, fit="crop", batch=BATCH, workers=workers)
        seconds = time.perf_counter() - start
        folder.close()
    return seconds


def _bare(network: Backbone, photos: int, size: int) -> float:
    """Seconds for the forward pass alone of as many images."""
    device = next(network.parameters()).device
    images = torch.randint(256, (BATCH, 3, size, size), dtype=torch.uint8, device=device)
    start = time.perf_counter()
    with torch.inference_mode():
        for first in range(0, photos, BATCH):
            cls, *_ = tokens_at(network, images[: photos - first], [])
        cls.sum().item()  # waits for the device
    return time.perf_counter() - start


def measure(arch: str, size: int, photos: int, shards: str, rounds: int) -> dict[str, Any]:
    """A row: photos per second of both, and their ratio."""
    source = open_photo_source(shards)
    if len(source.names) < photos:
        raise UserError(f"--photos {photos}: {shards} has {len(source.names)}")
    source.names = source.names[:photos]
    config = make_config(arch, "densedino")
    for views in config.data.views:
        views.size = size
    device = best_device()
    network = build_vit(config, 0.0).to(device).eval()
    written, bare = list[float](), list[float]()
    for i in range(-1, rounds):  # a first round to warm up
        seconds = _written(network, source, size), _bare(network, photos, size)
        if i >= 0:
            written.append(photos / seconds[0])
            bare.append(photos / seconds[1])
    row: dict[str, Any] = {"what": "features", "arch": arch, "size": size, "photos": photos, "rounds": rounds}
    row |= median_and_range("written_per_s", written) | median_and_range("bare_per_s", bare)
    row |= median_and_range("ratio", [a / b for a, b in zip(written, bare, strict=True)])
    return row | {"device": device_name(device)}


def run(args: argparse.Namespace) -> None:
    row = measure(args.arch, args.size, args.photos, args.shards, args.rounds)
    columns = ("arch", "size", "photos", "written_per_s", "bare_per_s", "ratio")
    table = make_table("features as files beside the bare forward pass, photos per second", columns, left=1)
    table.add_row(*(str(row[name]) for name in columns))
    report_rows(table, [row], args.out)
