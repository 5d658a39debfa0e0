"""A training step, ours beside the literal form (tools/bench/naive.py): `make bench WHAT=step [OUT=rows.jsonl]`.

Every combination runs in processes of its own (peak memory is a high-water mark), which take turns; a row is the median
over all timed steps. The same images, points and weights for both forms; data are ready before the clock starts.
"""

import argparse
import functools
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from runtime.config import Config, Head, Model, Views, load_config
from runtime.errors import UserError, run_cli
from runtime.metrics import append_jsonl
from tools.bench.data import cpu_name, finish, spread

ARCHS, METHODS, FORMS, DTYPES = (
    ("vit_small", "vit_tiny"),
    ("densedino", "dino"),
    ("literal", "ours"),
    ("float32", "bfloat16"),
)


def config_of(arch: str, method: str, compile: bool) -> Config:
    """The paper's views and points; K 65,536."""
    config = load_config("configs/densedino_vits16.yaml", [f"model.arch={arch}", f"method={method}"])
    config.speed.compile = compile
    return config


def tiny() -> Config:
    """A network that the equality of both forms is shown on in a second."""
    config = Config(model=Model("custom", 8, 24, 2, 2, 0.0), head=Head(32, 16, 64))
    config.data.views = [Views(2, 32, teacher=True), Views(2, 32)]
    return config


def prepared(config: Config, batch: int, device: Any, dtype: Any) -> tuple[Any, Any, Any]:
    """(model, schedules after the last layer's freeze, a batch as the loader hands it over)."""
    import numpy as np
    import torch

    from model.methods import build
    from pipeline.batch import Batch, draw
    from runtime.schedule import make_schedules

    torch.manual_seed(0)
    model = build(config).to(device)
    teacher: Any = model.teacher
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.01 * torch.randn_like(p) * p.std() if p.numel() > 1 else 0)
    (
        config.optim.freeze_last_layer_epochs,
        config.optim.warmup_epochs,
        config.optim.global_batch_size,
        config.optim.epochs,
    ) = 0, 0, batch, 1
    draws = draw(config, 0, np.arange(batch), np.full(batch, 400), np.full(batch, 500))
    size = config.image_size
    views = [torch.randn(len(config.views), batch, 3, size, size, device=device, dtype=dtype)]
    ids = torch.arange(batch)
    made = Batch(0, ids, ids, views, **draws.tensors()).map(lambda t: t.to(device))
    return model, make_schedules(config, 1000), made


def child(args: argparse.Namespace) -> None:
    """One process: warm up, time steps, tell."""
    import torch

    from runtime import distributed
    from runtime.schedule import Optimizer
    from tools.bench.naive import Literal
    from train import train_step

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype)
    compiled = args.form == "ours" and not args.eager and not distributed.can_compile(device)
    config = config_of(args.arch, args.method, compiled)
    model, schedules, batch = prepared(config, args.batch[0], device, dtype if args.form == "ours" else torch.float32)
    if args.form == "literal":
        literal = Literal(model, schedules, config.optim.clip_grad)

        def step(i: int) -> None:
            literal.step(batch, i, dtype)
    else:
        if device.type == "cpu":
            distributed.reuse_memory()
        else:
            torch.set_float32_matmul_precision("high")  # as distributed.start does
        optimizer = Optimizer(model.student, config.optim.clip_grad, split_positions=model.clip_positions_apart)
        processes = distributed.DistributedContext(0, 1, device, dtype)
        if compiled:
            distributed.compile_parts(model.compile_units(), device)

        def step(i: int) -> None:
            train_step(batch, model, model, optimizer, schedules.at(i), processes)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    gpu = device.type == "cuda"
    told: dict[str, Any] = {"compile": compiled, "device": torch.cuda.get_device_name() if gpu else cpu_name()}
    times = []
    for i in range(args.warmup + args.steps):
        wait()
        begun = time.perf_counter()
        step(i)
        wait()
        times.append(time.perf_counter() - begun)
        if gpu and i == args.warmup - 1:
            told["host_waits"] = host_waits(lambda: step(args.warmup + args.steps))
    peak = (
        torch.cuda.max_memory_allocated() / 2**20 if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    )
    print(json.dumps(told | {"times": times[args.warmup :], "peak": peak}))


def host_waits(step: Callable[[], None]) -> int:
    """How often the host waits for the GPU within a step."""
    import torch

    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(w.message) for w in seen)


def matmul_child(args: argparse.Namespace) -> None:
    """One process: TFLOP/s of a large square matrix product, as the trainer would run it, and the maker's figure."""
    import torch

    from runtime import distributed

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")
    dtype, side = getattr(torch, args.dtype), 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, side, side, device=device, dtype=dtype).unbind()
    times = []
    for _ in range(12):
        begun = time.perf_counter()
        for _ in range(4):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - begun) / 4)
    stated = distributed.peak_flops(device, dtype)
    tflops = 2 * side**3 / statistics.median(times[2:]) / 1e12
    print(json.dumps({"matmul_tflops": tflops, "stated_tflops": stated and stated / 1e12}))


def _all_tokens(see: Any, images: Any, points: Any, patches_too: bool) -> Any:
    return see(images, points)


def head_child(args: argparse.Namespace) -> None:
    """One process: forward and backward of heads and losses alone, on random tokens of ViT-S; tells its peak memory."""
    import torch

    from runtime import distributed
    from tools.bench.naive import Literal

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = config_of("vit_small", "densedino", False)
    config.model.arch, config.model.width, config.model.depth, config.model.heads = "custom", 384, 0, 6
    model, schedules, batch = prepared(config, args.batch[0], device, torch.float32)
    batch.views = [torch.zeros(4, args.batch[0], 3, 16, 16, device=device)]  # the backbone costs next to nothing here
    if args.form == "ours":
        distributed.reuse_memory()
        for network in (model.student, model.teacher):  # there is no last block that could leave the patches out
            backbone = network.backbone
            backbone.forward = functools.partial(_all_tokens, backbone.forward)
        loss = model(batch, schedules.at(0)).loss
    else:
        loss = Literal(model, schedules, 3.0).losses(batch, 0.04)[0]
    loss.backward()
    gpu = device.type == "cuda"
    peak = (
        torch.cuda.max_memory_allocated() / 2**20 if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    )
    print(json.dumps({"peak": peak, "loss": loss.item()}))


def bench_head(args: argparse.Namespace) -> None:
    """Peak memory of heads and losses: each form at the batch asked for, less the same process at batch 1."""
    rows: list[dict[str, Any]] = []
    for form in FORMS:
        peaks = []
        for batch in (1, args.batch[0]):
            peaks.append(ask("--head-child", f"--form={form}", f"--batch={batch}")["peak"])
        row = {"what": "head", "form": form, "batch": args.batch[0], "peak_memory_mb": round(peaks[1] - peaks[0])}
        row |= {"process_mb": [round(p) for p in peaks]}
        rows.append(row | {"device": cpu_name()})
    table = Table(
        title=f"heads and losses alone, batch {args.batch[0]}, 4 views, M 4, K 65,536: peak memory above batch 1's"
    )
    for name in ("form", "peak memory mb", "whole process at batch 1, at this one"):
        table.add_column(name)
    for row in rows:
        table.add_row(row["form"], str(row["peak_memory_mb"]), str(row["process_mb"]))
    finish(table, rows, args.out)


def check(args: argparse.Namespace) -> None:
    """Five steps of both forms from the same weights: the losses. Without drop path, which each form draws its own way."""
    import torch

    from runtime.distributed import DistributedContext
    from runtime.schedule import Optimizer
    from tools.bench.naive import Literal
    from train import train_step

    device = torch.device("cpu")

    def config() -> Config:
        chosen = config_of(args.arch, args.method or METHODS[0], compile=False) if args.arch else tiny()
        chosen.model.drop_path = 0.0
        return chosen

    a, schedules, batch = prepared(config(), args.batch[0], device, torch.float32)
    b, _, _ = prepared(config(), args.batch[0], device, torch.float32)
    literal, optimizer = Literal(a, schedules, 3.0), Optimizer(b.student, 3.0, split_positions=b.clip_positions_apart)
    for i in range(5):
        theirs = literal.step(batch, i, torch.float32)
        ours = train_step(batch, b, b, optimizer, schedules.at(i), DistributedContext(0, 1, device, torch.float32))
        print(json.dumps({"step": i, "literal": theirs, "ours": ours["loss"].item()}))


def ask(*words: str) -> dict[str, Any]:
    """What a process of this program tells. Raises UserError with its last line where it ends otherwise."""
    command = [sys.executable, "-m", "tools.bench.step", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(words)}: {(done.stderr.strip() or 'killed').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def count(arch: str, method: str) -> int:
    """FLOP of an image, forward and backward, as ours needs them."""
    from model.cost import count_cost

    config = config_of(arch, method, compile=False)
    return count_cost(config).flops


def bench(args: argparse.Namespace) -> None:
    import torch

    from runtime import distributed

    combinations = [
        c
        for c in itertools.product(ARCHS, METHODS, FORMS, DTYPES)
        if all(w in (None, have) for w, have in zip((args.arch, args.method, args.form, args.dtype), c, strict=True))
    ]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.dtype is None and not distributed.has_bfloat16(device):
        print("bfloat16 is not in this device's hardware: its rows would take hours, and are left out", flush=True)
        combinations = [c for c in combinations if c[3] != "bfloat16"]
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}  # what processes told of each combination and batch
    settings = {"eager": args.eager}
    if args.times and args.times.is_file():
        for line in args.times.read_text().splitlines():
            before = json.loads(line)
            if settings == before["settings"]:
                found.setdefault(tuple(before["combination"]), []).append(before)
    flops = {c: count(*c) for c in sorted({c[:2] for c in combinations})}
    matmul = {dtype: ask("--matmul-child", f"--dtype={dtype}") for dtype in sorted({c[3] for c in combinations})}
    too_large = set()
    for n, c, batch in itertools.product(range(args.rounds), combinations, args.batch):
        if (c, batch) in too_large:
            continue
        words = [f"--{k}={v}" for k, v in zip(("arch", "method", "form", "dtype"), c, strict=True)]
        words += [f"--batch={batch}", f"--steps={args.steps}", f"--warmup={args.warmup}"]
        words += ["--eager"] if args.eager else []
        try:
            told = ask("--child", *words)
        except UserError as mistake:
            if "memory" not in str(mistake) or len(args.batch) == 1:
                raise
            too_large.add((c, batch))
            print(f"{' '.join(c)}, batch {batch}: too large for the device", flush=True)
            continue
        found.setdefault((*c, batch), []).append(told)
        if args.times:
            append_jsonl(args.times, {"combination": (*c, batch), "settings": settings, **told})
        print(
            f"round {n + 1}/{args.rounds} {' '.join(c):<38} {batch:>4} {statistics.median(told['times']):.3f} s",
            flush=True,
        )
    rows: list[dict[str, Any]] = []
    for c in combinations:  # of each, the batch that gives most images a second
        speeds = {b: [b / t for told in found[*c, b] for t in told["times"]] for b in args.batch if (*c, b) in found}
        if not speeds:
            continue
        batch = max(speeds, key=lambda b: statistics.median(speeds[b]))
        processes = found[*c, batch]
        row: dict[str, Any] = dict(
            zip(("what", "arch", "method", "form", "dtype", "batch"), ("step", *c, batch), strict=True)
        )
        row |= spread("img_per_s", speeds[batch]) | {"peak_memory_mb": round(max(t["peak"] for t in processes))}
        tflops, most = flops[c[:2]] * row["img_per_s"] / 1e12, matmul[c[3]]
        row |= {"tflops": round(tflops, 3), "of_matmul_percent": round(100 * tflops / most["matmul_tflops"], 1)}
        row |= {"matmul_tflops": round(most["matmul_tflops"], 3)}
        if most["stated_tflops"]:
            row["of_stated_percent"] = round(100 * tflops / most["stated_tflops"], 1)
        rows.append(row | {k: v for k, v in processes[-1].items() if k in ("compile", "device", "host_waits")})
    of = {tuple(row[k] for k in ("arch", "method", "form", "dtype")): row for row in rows}
    for (arch, method, _, dtype), row in of.items():
        literal = of.get((arch, method, "literal", dtype))
        row["ratio_to_literal"] = round(row["img_per_s"] / literal["img_per_s"], 3) if literal else None
    names = ["arch", "method", "form", "dtype", "batch", "img_per_s", "ratio_to_literal", "peak_memory_mb", "tflops"]
    names += [n for n in ("of_matmul_percent", "of_stated_percent", "host_waits") if any(n in row for row in rows)]
    table = Table(title=f"one step, 4 views of 224, K 65,536, {rows[0]['device'] if rows else ''}")
    for name in names:
        table.add_column(name.replace("_", " "), justify="left" if name in names[:4] else "right")
    for row in rows:
        table.add_row(*(str(row.get(name, "")) for name in names))
    finish(table, rows, args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--matmul-child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--head-child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--head", action="store_true", help="peak memory of heads and losses alone (--batch 128)")
    parser.add_argument(
        "--check", action="store_true", help="five steps of both forms, their losses: of a tiny network, or --arch"
    )
    for name, choices in (("arch", ARCHS), ("method", METHODS), ("form", FORMS), ("dtype", DTYPES)):
        parser.add_argument(f"--{name}", choices=choices, help="only this one")
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[8], help="images; of several, a row is of the fastest one"
    )
    parser.add_argument("--steps", type=int, default=2, help="timed in each process")
    # the first step compiles; what memory it frees is still cleared by the kernel in the second (docs/benchmarks.md)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3, help="processes for each combination, taking turns")
    parser.add_argument("--eager", action="store_true", help="ours not compiled (it is, where a compiler is found)")
    parser.add_argument(
        "--times",
        type=Path,
        help="a table in several calls: every process's times are kept here, rows are medians of all",
    )
    parser.add_argument("--out", type=Path, help="append the rows as JSON lines")
    args = parser.parse_args()
    if args.check:
        check(args)
    elif args.child:
        child(args)
    elif args.matmul_child:
        matmul_child(args)
    elif args.head_child:
        head_child(args)
    elif args.head:
        bench_head(args)
    else:
        bench(args)


if __name__ == "__main__":
    run_cli(main)
