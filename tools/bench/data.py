"""Images per second, measured: `make bench WHAT=data|all|leak|plan|shards [SHARDS=folder] [OUT=rows.jsonl]`.

data    photos -> 4 views of 224, stage by stage, for every reader that runs here and for the torchvision/PIL pipeline
        that DINO's users run today: photos per CPU-second (all threads and children) and per second
plan    index and plan for 1.28 and for 100 million simulated samples: loading, memory, time per step, and that an epoch
        is a permutation which any number of processes shares
all     training with the real loader and with one batch kept ready, in turns: images/s of both, their ratio (the headspace)
        and the data wait; CONFIG names what is trained
leak    2,000 steps with each reader: memory, threads and open files on the way (tools/bench/leak.py)
shards  making shards beside decoding alone (tools/bench/shards.py)

Entries take turns round by round, so that a busy machine hurts all of them alike; the rows hold medians and spread.
"""

import argparse
import io
import itertools
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from runtime.config import Config, load_config
from runtime.errors import UserError, run_cli
from runtime.metrics import append_jsonl, versions

ROUNDS = 5
SIMULATED = (1_281_167, 100_000_000)
Entry = Callable[[], int]  # does its work once; returns how many photos that was


# --------------------------------------------------------------------------------------------------------------- data


def pil_entries(config: Config, photos: list[bytes]) -> dict[str, Entry]:
    """Today's pipeline: PIL and torchvision's transforms with DINO's parameters, each view from the decoded photo."""
    from PIL import Image, ImageFilter
    from torchvision import transforms as T

    from pipeline.augment.recipe import MEAN, STD

    cubic = T.InterpolationMode.BICUBIC
    j = config.data.jitter
    blur = lambda image: image.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2.0)))  # noqa: E731, NPY002
    tensor = T.Compose([T.ToTensor(), T.Normalize(MEAN, STD)])
    crops, colors = [], []
    for v in config.views:
        crops.append(T.Compose([T.RandomResizedCrop(v.size, v.scale, interpolation=cubic), T.RandomHorizontalFlip()]))
        jitter = T.RandomApply([T.ColorJitter(j.brightness, j.contrast, j.saturation, j.hue)], j.probability)
        recipe = [jitter, T.RandomGrayscale(config.data.grayscale), T.RandomApply([T.Lambda(blur)], v.blur[0])]
        colors.append(T.Compose([*recipe, T.RandomSolarize(128, v.solarize[0]), tensor]))

    def opened(photo: bytes) -> Image.Image:
        return Image.open(io.BytesIO(photo)).convert("RGB")

    def decode() -> int:
        return sum(opened(p) is not None for p in photos)

    def views() -> int:
        for p in photos:
            image = opened(p)
            _ = [np.asarray(crop(image)) for crop in crops]
        return len(photos)

    def everything() -> int:
        for p in photos:
            image = opened(p)
            _ = [color(crop(image)) for crop, color in zip(crops, colors, strict=True)]
        return len(photos)

    return {"decode": decode, "views": views, "all": everything}


def reader_entries(reader: str, config: Config, shards: Any, plan: Any, steps: int) -> dict[str, Entry]:
    """{stage: entry} of one reader over the plan's first `steps` steps."""
    import torch

    from pipeline.batch import Batch, size_groups
    from pipeline.loader import select_augment
    from pipeline.readers import webdataset

    groups = [group for _, group in size_groups(config)]
    device = torch.device("cuda", 0) if reader == "dali_gpu" else torch.device("cpu")
    color = select_augment(device, config.speed.compile and device.type == "cuda")

    def colored(batch: Batch) -> int:
        for views, group in zip(batch.views, groups, strict=True):
            color(views, batch.color[:, group].to(views.device))
        return len(batch.ids)

    stages = webdataset.BatchBuilder(config, shards, plan, 0, 1)
    if reader == "pil":
        return pil_entries(config, [p for step in range(steps) for p in stages.fetch(step)[3]])
    if reader == "wds":
        fetched = [stages.fetch(step) for step in range(steps)]
        made = [stages.views(f) for f in fetched]
        return {
            "read": lambda: sum(len(stages.fetch(step)[1]) for step in range(steps)),
            "decode": lambda: sum(webdataset.decode(p) is not None for f in fetched for p in f[3]),
            "views": lambda: sum(len(stages.views(stages.fetch(step)).ids) for step in range(steps)),
            "color": lambda: sum(colored(batch) for batch in made),
            "all": lambda: sum(colored(stages.views(stages.fetch(step))) for step in range(steps)),
        }
    from pipeline.readers import dali

    endless = dali.read(config, shards, plan, start=0, stop=10**9, device_id=device.index)

    def take(colors: bool) -> int:
        n = 0
        for _ in range(steps):
            batch = next(endless)
            n += colored(batch) if colors else len(batch.ids)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return n

    return {"views": partial(take, False), "all": partial(take, True)}


def serve(reader: str, folder: str, pipe: Any) -> None:
    """A process for one reader: tells its stages, then runs the one that is asked for and tells what it took."""
    import torch

    from pipeline.shards import Plan, Shards
    from runtime.distributed import reuse_memory

    if reader != "pil":  # which runs as its users run it
        reuse_memory()
    gpu = reader == "dali_gpu"
    torch.set_num_threads(1)  # CPU-seconds are what a photo costs
    config = Config()
    shards = Shards(folder)
    config.speed.workers = 4 if gpu else 0
    config.speed.dali_threads = (os.cpu_count() or 1) if gpu else 1
    config.optim.global_batch_size = min(256 if gpu else 64, len(shards))
    plan = Plan(shards, batch=config.optim.global_batch_size, seed=0)
    steps = max(1, min(plan.steps_per_epoch, 192 // config.optim.global_batch_size)) + (8 if gpu else 0)
    entries = reader_entries(reader, config, shards, plan, steps)
    pipe.send(list(entries))
    while (stage := pipe.recv()) is not None:
        cpu, wall = cpu_seconds(), time.perf_counter()
        photos = entries[stage]()
        wall = time.perf_counter() - wall
        used = cpu_seconds()
        while True:  # what a reader prepares ahead is its own work: until it rests
            time.sleep(0.1)
            before, used = used, cpu_seconds()
            if used - before < 0.02:
                break
        pipe.send((photos / max(used - cpu, 1e-9), photos / wall))


def bench_data(folder: str, out: Path | None) -> None:
    """Stage by stage, a process for each reader, taking turns; ROUNDS rounds after one that does not count."""
    import multiprocessing

    import torch

    from pipeline.loader import choose_reader
    from pipeline.shards import Shards

    Shards(folder)
    readers = ["pil", "wds"]
    try:
        choose_reader("dali", torch.device("cpu"))
        readers += ["dali_cpu", *(["dali_gpu"] if torch.cuda.is_available() else [])]
    except UserError as missing:
        print(f"no dali rows: {missing}")
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Any] = {}
    found: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    for reader in readers:
        pipes[reader], theirs = context.Pipe()
        context.Process(target=serve, args=(reader, folder, theirs), daemon=reader != "dali_gpu").start()
        found |= {(reader, stage): ([], []) for stage in pipes[reader].recv()}
    for n in range(ROUNDS + 1):
        for (reader, stage), (per_cpu, per_second) in found.items():
            if sys.stderr.isatty():
                print(f"round {n}/{ROUNDS}: {reader} {stage:<12}", end="\r", file=sys.stderr)
            pipes[reader].send(stage)
            cpu, wall = pipes[reader].recv()
            if n:
                per_cpu.append(cpu)
                per_second.append(wall)
    for pipe in pipes.values():
        pipe.send(None)
    rows: list[dict[str, Any]] = []
    for (reader, stage), (per_cpu, per_second) in found.items():
        device = torch.cuda.get_device_name(0) if reader == "dali_gpu" else cpu_name()
        row: dict[str, Any] = {"what": "data", "reader": reader, "stage": stage, "shards": folder}
        row |= spread("photos_per_cpu_s", per_cpu) | spread("photos_per_s", per_second) | {"device": device}
        rows.append(row)
    base = {r["stage"]: r["photos_per_cpu_s"] for r in rows if r["reader"] == "pil"}
    table = Table(title=f"{folder}: photos -> 4 views of 224, {cpu_name()}")
    for name in ("reader", "stage", "photos / CPU-s", "least – most", "photos / s", "x pil"):
        table.add_column(name, justify="left" if name in ("reader", "stage") else "right")
    for r in rows:
        times = f"{r['photos_per_cpu_s'] / base[r['stage']]:.2f}" if r["stage"] in base else "–"
        low, high = r["photos_per_cpu_s_spread"]
        figures = (f"{r['photos_per_cpu_s']:.1f}", f"{low:.1f} – {high:.1f}", f"{r['photos_per_s']:.1f}", times)
        table.add_row(r["reader"], r["stage"], *figures)
    finish(table, rows, out)


def cpu_seconds() -> float:
    """Of this process, its threads, and its children that live (/proc) or have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    tick = os.sysconf("SC_CLK_TCK")
    me = os.getpid()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == me:
            total += (int(fields[11]) + int(fields[12])) / tick
    return total


# --------------------------------------------------------------------------------------------------------------- plan


def simulate(folder: Path, samples: int) -> None:
    """Manifest and index of a data set of `samples` photos of 110 kB in shards of 256 MB; no tars."""
    from pipeline.shards import FORMAT, INDEX

    per_shard = 2400
    counts = [per_shard] * (samples // per_shard) + [samples % per_shard] * (samples % per_shard > 0)
    index = np.lib.format.open_memmap(folder / "index.npy", "w+", INDEX, (samples,))
    for first in range(0, samples, 10_000_000):
        part = index[first : first + 10_000_000]
        row = np.arange(first, first + len(part))
        part["shard"], part["offset"] = row // per_shard, row % per_shard * 110_592
        part["size"], part["height"], part["width"], part["label"] = 110_000, 375, 500, row % 1000
    index.flush()
    shards = [{"name": f"shard-{i:06d}.tar", "samples": n, "bytes": 0, "sha256": ""} for i, n in enumerate(counts)]
    (folder / "manifest.json").write_text(json.dumps({"format": FORMAT, "classes": [], "shards": shards}))


def measure_plan(folder: Path, batch: int) -> dict[str, Any]:
    """Run in a process of its own: what loading and planning cost, and what must hold of the plan."""
    from pipeline.shards import Plan, Shards

    before = resident_mb()
    begun = time.perf_counter()
    shards = Shards(folder, max_missing=None)
    plan = Plan(shards, batch=batch, seed=0)
    plan.samples_of(0)
    loaded = time.perf_counter() - begun
    first = plan.steps_per_epoch // 3
    times = []
    for step in range(first, first + min(1000, plan.steps_per_epoch // 2)):  # as a reader does
        begun = time.perf_counter()
        ids = plan.samples_of(step)
        _ = shards.index["height"][ids], shards.index["crc32"][ids]
        if (step - first) * batch % 65_536 < batch:  # as Shards.read does
            shards.forget_pages()
        times.append(time.perf_counter() - begun)
    memory = resident_mb()
    steps = np.random.default_rng(0).permutation(plan.steps_per_epoch)[:200]

    # an epoch is a permutation: sampled steps never meet a sample twice
    seen = np.concatenate([plan.samples_of(int(s)) for s in steps[: 2_000_000 // batch]])
    assert len(np.unique(seen)) == len(seen), "a sample came twice in an epoch"
    assert seen.min() >= 0
    assert seen.max() < len(shards)
    for world in (1, 2, 8, 64):
        parts = np.stack([plan.samples_of(7, rank, world) for rank in range(world)], 1)
        assert np.array_equal(parts.ravel(), plan.samples_of(7)), f"{world} processes get another step"
    # one node of 8 (8 of 64 processes): shards it touches in a stretch of the epoch that visits all of its lanes' shards
    touched = {int(s) for step in steps.tolist() for r in range(8) for s in plan.samples_of(step, r * 8, 64) // 2400}
    bound = len(shards.shards) / 8 + plan.lanes
    assert len(touched) <= bound, f"a node of 8 touches {len(touched)} shards, more than {bound}"
    ms = [1000 * t for t in times]
    return {
        "samples": len(shards), "batch": batch, "load_s": round(loaded, 3), "resident_mb": round(memory, 1),
        "added_mb": round(memory - before, 1), **spread("ms_per_step", ms), "ms_per_step_p99": float(np.quantile(ms, 0.99)),
        "node_share_shards": len(touched), "shards": len(shards.shards),
    }  # fmt: skip


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def bench_plan(out: Path | None) -> None:
    """Simulated sets, each measured in a process of its own."""
    import subprocess

    rows = []
    for samples in SIMULATED:
        with tempfile.TemporaryDirectory() as folder:
            simulate(Path(folder), samples)
            for batch in (256, 1024):
                code = (
                    "import json, sys, pathlib; from tools.bench.data import measure_plan; "
                    "print(json.dumps(measure_plan(pathlib.Path(sys.argv[1]), int(sys.argv[2]))))"
                )
                done = subprocess.run(
                    [sys.executable, "-c", code, folder, str(batch)], capture_output=True, text=True, check=False
                )
                if done.returncode:
                    raise UserError(f"plan of {samples} samples: {done.stderr.strip().splitlines()[-1]}")
                rows.append({"what": "plan", **json.loads(done.stdout), "device": cpu_name()})
    table = Table(title="plan: simulated sets")
    names = (
        "samples",
        "batch",
        "load_s",
        "resident_mb",
        "ms_per_step",
        "ms_per_step_p99",
        "node_share_shards",
        "shards",
    )
    for name in names:
        table.add_column(name.replace("_", " "), justify="right", no_wrap=False, overflow="fold")
    for row in rows:
        table.add_row(*(f"{row[name]:,.2f}" if isinstance(row[name], float) else f"{row[name]:,}" for name in names))
    finish(table, rows, out)


# ----------------------------------------------------------------------------------------------- all: the headspace


def bench_all(path: str, folder: str, out: Path | None, steps: int = 30) -> None:
    """Train `steps` steps at a time, the loader's batches and one kept batch by turns."""
    import torch

    from model.methods import build
    from pipeline.loader import Loader
    from pipeline.shards import Plan, Shards
    from runtime import distributed, schedule
    from train import train_step

    config = load_config(path, [f"data.shards={folder}", "data.val=null"])
    shards = Shards(folder)
    plan = Plan(shards, batch=config.optim.global_batch_size, seed=0, holdout=config.data.holdout)
    processes = distributed.start(config.speed)
    method = build(config)
    processes.place(method)
    if config.speed.compile:
        distributed.compile_parts(method.compile_units(), processes.device)
    schedules = schedule.make_schedules(config, plan.steps_per_epoch)
    optimizer = schedule.Optimizer(method.student, config.optim.clip_grad, split_positions=method.clip_positions_apart)
    total = (ROUNDS + 1) * steps + 1
    loader = Loader(
        config, shards, plan, device=processes.device, dtype=processes.dtype, start=0, stop=total,
        compile=config.speed.compile,
    )  # fmt: skip
    kept = next(loader)

    def train(batches: Iterator[Any]) -> float:
        begun = time.perf_counter()
        for batch in batches:
            train_step(batch, method, method, optimizer, schedules.at(0), processes)
        if processes.device.type == "cuda":
            torch.cuda.synchronize()
        return config.optim.global_batch_size * steps / (time.perf_counter() - begun)

    real: list[float] = []
    cached: list[float] = []
    waits: list[float] = []
    for n in range(ROUNDS + 1):
        loader.waited()
        begun = time.perf_counter()
        speed = train(itertools.islice(loader, steps))
        wait = 100 * loader.waited() / (time.perf_counter() - begun)
        ready = train(itertools.repeat(kept, steps))
        if n:
            real.append(speed)
            cached.append(ready)
            waits.append(wait)
    loader.close()
    device = torch.cuda.get_device_name(0) if processes.device.type == "cuda" else cpu_name()
    row: dict[str, Any] = {"what": "all", "config": path, "reader": loader.reader, "shards": folder}
    row |= spread("img_per_s", real) | spread("img_per_s_cached", cached) | spread("data_wait_percent", waits)
    row |= {"headspace": round(statistics.median(real) / statistics.median(cached), 4), "device": device}
    table = Table(title=f"{path}, {loader.reader}, {device}: training with the loader and with a batch kept ready")
    names = ("img_per_s", "img_per_s_cached", "headspace", "data_wait_percent")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    table.add_row(*(f"{row[name]:.4g}" for name in names))
    finish(table, [row], out)


# ------------------------------------------------------------------------------------------------- for all of them


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else ():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()} x {os.cpu_count()}"
    return f"{platform.processor()} x {os.cpu_count()}"


def spread(name: str, values: list[float]) -> dict[str, Any]:
    """The median, and the least and the greatest."""
    return {name: round(statistics.median(values), 3), f"{name}_spread": [round(min(values), 3), round(max(values), 3)]}


def finish(table: Table, rows: list[dict[str, Any]], out: Path | None) -> None:
    console = Console()
    if not console.is_terminal:  # a file has no width that a table would have to be cut for
        console.width = 160
    console.print(table)
    told = {"versions": versions(), "date": date.today().isoformat()}
    for row in rows if out else []:
        append_jsonl(out, row | told)  # type: ignore[arg-type]
    if out:
        print(f"{len(rows)} rows appended to {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("what", choices=("data", "all", "leak", "plan", "shards"))
    parser.add_argument("--config", default="configs/demo.yaml", help="what is trained (all, leak)")
    parser.add_argument(
        "--shards", default="data/scenes/shards/train", help="photos to measure on (default: the scenes)"
    )
    parser.add_argument("--out", type=Path, help="append the rows as JSON lines")
    args = parser.parse_args()
    if args.what == "data":
        bench_data(args.shards, args.out)
    elif args.what == "all":
        bench_all(args.config, args.shards, args.out)
    elif args.what == "plan":
        bench_plan(args.out)
    else:
        words = {"shards": [args.shards], "leak": [args.config, "--shards", args.shards]}[args.what]
        out = ["--out", str(args.out)] if args.out and args.what == "leak" else []
        os.execv(sys.executable, [sys.executable, "-m", f"tools.bench_{args.what}", *words, *out])


if __name__ == "__main__":
    run_cli(main)
