"""Photos to four views of 224 pixels, stage by stage, for every reader and for the pipeline of torchvision and PIL.

    python -m tools.bench data [--shards FOLDER] [--out rows.jsonl]

Photos per CPU-second (all threads and child processes) and per second, of every reader that runs here and of the
torchvision/PIL pipeline that DINO's users run (`pil`). Each reader has a process of its own. They take turns, so that
other load on the machine slows all of them; the rows hold medians and ranges. `make bench WHAT=data [SHARDS=…] [OUT=…]`.
"""

import argparse
import io
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.batch import Batch, size_groups
from pipeline.decode import decode
from pipeline.loader import choose_reader, select_augment
from pipeline.mixture import AnyShards, open_training
from pipeline.plan import Plan
from pipeline.readers.worker import BatchBuilder
from runtime.config import Config, Source, split_places
from runtime.distributed import reuse_memory
from runtime.errors import UserError
from runtime.pixels import IMAGENET
from tools.bench.rows import cpu_name, make_table, median_and_range, report_rows

ROUNDS = 5  # and one before, which is not counted
Stage = Callable[[], int]  # does its work once; returns the number of photos


# ------------------------------------------------------------------------------------------------- stages of a reader


def pil_stages(config: Config, photos: list[bytes]) -> dict[str, Stage]:
    """PIL and torchvision's transforms with DINO's parameters; each view is cut from the decoded photo."""
    from PIL import Image, ImageFilter
    from torchvision import transforms as T

    cubic = T.InterpolationMode.BICUBIC
    j = config.data.jitter
    blur = lambda image: image.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2.0)))  # noqa: E731, NPY002
    tensor = T.Compose([T.ToTensor(), T.Normalize(*IMAGENET)])
    crops, colors = [], []
    for v in config.views:
        crops.append(T.Compose([T.RandomResizedCrop(v.size, v.scale, interpolation=cubic), T.RandomHorizontalFlip()]))
        jitter = T.RandomApply([T.ColorJitter(j.brightness, j.contrast, j.saturation, j.hue)], j.probability)
        recipe = [jitter, T.RandomGrayscale(config.data.grayscale), T.RandomApply([T.Lambda(blur)], v.blur[0])]
        colors.append(T.Compose([*recipe, T.RandomSolarize(128, v.solarize[0]), tensor]))

    def open_rgb(photo: bytes) -> Image.Image:
        return Image.open(io.BytesIO(photo)).convert("RGB")

    def decode_all() -> int:
        return sum(open_rgb(p) is not None for p in photos)

    def views() -> int:
        for p in photos:
            image = open_rgb(p)
            _ = [np.asarray(crop(image)) for crop in crops]
        return len(photos)

    def all_stages() -> int:
        for p in photos:
            image = open_rgb(p)
            _ = [color(crop(image)) for crop, color in zip(crops, colors, strict=True)]
        return len(photos)

    return {"decode": decode_all, "views": views, "all": all_stages}


def reader_stages(reader: str, config: Config, shards: AnyShards, plan: Plan, steps: int) -> dict[str, Stage]:
    """{name: stage} of one reader over the plan's first `steps` steps."""
    groups = [group for _, group in size_groups(config)]
    device = torch.device("cuda", 0) if reader == "dali_gpu" else torch.device("cpu")
    color = select_augment(device, config.speed.compile and device.type == "cuda")

    def augment(batch: Batch) -> int:
        for views, group in zip(batch.views, groups, strict=True):
            color(views, batch.color[:, group].to(views.device))
        return len(batch.ids)

    builder = BatchBuilder(config, shards, plan, 0, 1)
    if reader == "pil":
        return pil_stages(config, [p for step in range(steps) for p in builder.fetch(step).photos])
    if reader == "wds":
        fetched = [builder.fetch(step) for step in range(steps)]
        batches = [builder.views(f) for f in fetched]
        return {
            "read": lambda: sum(len(builder.fetch(step).ids) for step in range(steps)),
            "decode": lambda: sum(decode(p) is not None for f in fetched for p in f.photos),
            "views": lambda: sum(len(builder.views(builder.fetch(step)).ids) for step in range(steps)),
            "color": lambda: sum(augment(batch) for batch in batches),
            "all": lambda: sum(augment(builder.views(builder.fetch(step))) for step in range(steps)),
        }
    from pipeline.readers import dali

    endless = dali.read(config, shards, plan, start=0, stop=10**9, device_id=device.index)

    def read(with_color: bool) -> int:
        n = 0
        for _ in range(steps):
            batch = next(endless)
            n += augment(batch) if with_color else len(batch.ids)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return n

    return {"views": partial(read, False), "all": partial(read, True)}


# ------------------------------------------------------------------------------------------------ a reader's process


def serve_reader(reader: str, folder: str, pipe: Connection) -> None:
    """The process of one reader. Sends the names of its stages; then runs each stage that it receives, and sends photos
    per CPU-second and per second; ends at None."""
    if reader != "pil":  # which runs as its users run it
        reuse_memory()
    gpu = reader == "dali_gpu"
    torch.set_num_threads(1)  # CPU-seconds are the measure
    config = Config()
    config.data.shards = [Source(place) for place in split_places(folder)]
    shards = open_training(config)
    config.speed.workers = 4 if gpu else 0
    config.speed.dali_threads = (os.cpu_count() or 1) if gpu else 1
    config.optim.global_batch_size = min(256 if gpu else 64, len(shards))
    plan = Plan(shards, batch=config.optim.global_batch_size, seed=0)
    steps = max(1, min(plan.steps_per_epoch, 192 // config.optim.global_batch_size)) + (8 if gpu else 0)
    stages = reader_stages(reader, config, shards, plan, steps)
    pipe.send(list(stages))
    while (stage := pipe.recv()) is not None:
        cpu, start = cpu_seconds(), time.perf_counter()
        photos = stages[stage]()
        wall = time.perf_counter() - start
        used = cpu_seconds()
        while True:  # a reader's prefetching counts too: wait until it idles
            time.sleep(0.1)
            before, used = used, cpu_seconds()
            if used - before < 0.02:
                break
        pipe.send((photos / max(used - cpu, 1e-9), photos / wall))


def cpu_seconds() -> float:
    """CPU-seconds of this process, its threads, and its children, running (from /proc) or ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    tick = os.sysconf("SC_CLK_TCK")
    pid = os.getpid()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            total += (int(fields[11]) + int(fields[12])) / tick
    return total


# ------------------------------------------------------------------------------------------------------ the benchmark


def run(args: argparse.Namespace) -> None:
    """Measure each stage of each reader in turns: ROUNDS rounds after a first one that is not counted."""
    readers = ["pil", "wds"]
    try:
        choose_reader("dali", torch.device("cpu"))
        readers += ["dali_cpu", *(["dali_gpu"] if torch.cuda.is_available() else [])]
    except UserError as error:
        print(f"no dali rows: {error}")
    speeds = measure(readers, args.shards)
    rows: list[dict[str, Any]] = []
    for (reader, stage), (per_cpu, per_second) in speeds.items():
        device = torch.cuda.get_device_name(0) if reader == "dali_gpu" else cpu_name()
        row: dict[str, Any] = {"what": "data", "reader": reader, "stage": stage, "shards": args.shards}
        row |= median_and_range("photos_per_cpu_s", per_cpu) | median_and_range("photos_per_s", per_second)
        rows.append(row | {"device": device})
    pil = {r["stage"]: r["photos_per_cpu_s"] for r in rows if r["reader"] == "pil"}
    columns = ("reader", "stage", "photos / CPU-s", "least – most", "photos / s", "x pil")
    table = make_table(f"{args.shards}: photos -> 4 views of 224, {cpu_name()}", columns, left=2)
    for r in rows:
        ratio = f"{r['photos_per_cpu_s'] / pil[r['stage']]:.2f}" if r["stage"] in pil else "–"
        low, high = r["photos_per_cpu_s_spread"]
        figures = (f"{r['photos_per_cpu_s']:.1f}", f"{low:.1f} – {high:.1f}", f"{r['photos_per_s']:.1f}", ratio)
        table.add_row(r["reader"], r["stage"], *figures)
    report_rows(table, rows, args.out)


def measure(readers: list[str], folder: str) -> dict[tuple[str, str], tuple[list[float], list[float]]]:
    """{(reader, stage): (photos per CPU-second, photos per second), a value for each round}."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    speeds: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    for reader in readers:
        pipes[reader], child_end = context.Pipe()
        context.Process(target=serve_reader, args=(reader, folder, child_end), daemon=reader != "dali_gpu").start()
        speeds |= {(reader, stage): ([], []) for stage in pipes[reader].recv()}
    for n in range(ROUNDS + 1):
        for (reader, stage), (per_cpu, per_second) in speeds.items():
            if sys.stderr.isatty():
                print(f"round {n}/{ROUNDS}: {reader} {stage:<12}", end="\r", file=sys.stderr)
            pipes[reader].send(stage)
            cpu, wall = pipes[reader].recv()
            if n:
                per_cpu.append(cpu)
                per_second.append(wall)
    for pipe in pipes.values():
        pipe.send(None)
    return speeds
