"""The training step of each method, and beside it the naive implementation of DINO and DenseDINO (tools/bench/naive.py).

    python -m tools.bench step [--methods M,...|all] [--arch A,...] [--form naive|ours] [--dtype D] [--batch N ...] [...]
    python -m tools.bench step --head [--batch 128]      peak memory of heads and losses alone
    python -m tools.bench step --check [--arch A]        five losses of both implementations

A method is measured as configs/METHOD_vits16.yaml has it. Every combination runs in processes of its own (peak memory is a
high-water mark), which take turns; a row is the median over all timed steps. Both implementations get the same images,
points and weights; the data are ready before the clock starts. `--arch vit_small,vit_small_patch14_reg4_dinov2` measures the
ViTs of two names in turns; the naive implementation is that of a plain ViT, so others have no row of it.

`make bench WHAT=step [METHODS=all OUT=rows.jsonl]`.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from typing import Any, NamedTuple

from runtime.config import ARCH, ARCHS_OF_TIMM
from runtime.errors import UserError, suggest
from runtime.methods import METHODS
from runtime.metrics import append_jsonl
from tools.bench.rows import cpu_name, make_table, median_and_range, report_rows

ARCHS, PAPER = ("vit_small", "vit_tiny"), ("densedino", "dino")  # PAPER: the methods that have a naive implementation
PLAIN = (*ARCHS, "tiny")  # those that have a naive implementation, if the method has one
FORMS, DTYPES = ("naive", "ours"), ("float32", "bfloat16")


class Combination(NamedTuple):
    arch: str
    method: str
    form: str
    dtype: str


def read_methods(names: str) -> tuple[str, ...]:
    """The methods of --methods. Raises UserError for one that the registry does not have."""
    methods = tuple(METHODS) if names == "all" else tuple(dict.fromkeys(names.split(",")))
    for name in methods:
        if name not in METHODS:
            raise UserError(f"--methods {names}: no method '{name}'{suggest(name, METHODS)}")
    return methods


def read_archs(names: str | None) -> tuple[str, ...]:
    """The architectures of --arch. Raises UserError for a word that is no value of model.arch, or no model of timm."""
    archs = ARCHS if names is None else tuple(dict.fromkeys(names.split(",")))
    for arch in archs:
        if arch not in PLAIN and not ARCH.fullmatch(arch):
            raise UserError(f"--arch {names}: no architecture '{arch}'{suggest(arch, (*PLAIN, *ARCHS_OF_TIMM))}")
    if named := [arch for arch in archs if arch not in PLAIN]:
        from model.architecture import of_timm  # imports timm

        for arch in named:
            of_timm(arch)
    return archs


def measure(name: str, **arguments: Any) -> Any:
    """The result of a measurement in a process of its own. Raises UserError with the last line of its error."""
    command = [sys.executable, "-m", "tools.bench.step_worker", name, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{name} {arguments}: {(done.stderr.strip() or 'killed').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def run_check(args: argparse.Namespace) -> None:
    """Print the losses of five steps of both implementations."""
    if args.methods[0] not in PAPER:
        raise UserError(f"--check: {args.methods[0]} has no naive implementation, only {' and '.join(PAPER)} have one")
    for losses in measure("check", arch=args.arch[0], method=args.methods[0], batch=args.batch[0]):
        print(json.dumps(losses))


def run_head(args: argparse.Namespace) -> None:
    """Peak memory of heads and losses: each implementation at the given batch, minus the same process at batch 1."""
    rows: list[dict[str, Any]] = []
    for form in FORMS:
        peaks = [measure("head", form=form, batch=batch)["peak"] for batch in (1, args.batch[0])]
        row = {"what": "head", "form": form, "batch": args.batch[0], "peak_memory_mb": round(peaks[1] - peaks[0])}
        row |= {"process_mb": [round(p) for p in peaks]}
        rows.append(row | {"device": cpu_name()})
    title = f"heads and losses alone, batch {args.batch[0]}, 4 views, M 4, K 65,536: peak memory above that of batch 1"
    columns = ("form", "peak memory mb", "whole process at batch 1, at this batch")
    table = make_table(title, columns, left=3)
    for row in rows:
        table.add_row(row["form"], str(row["peak_memory_mb"]), str(row["process_mb"]))
    report_rows(table, rows, args.out)


# ---------------------------------------------------------------------------------------------------- the step's rows


Results = dict[
    tuple[Combination, int], list[dict[str, Any]]
]  # of each combination and batch: a result for each process


def choose_combinations(args: argparse.Namespace) -> list[Combination]:
    """The combinations that the options allow; without bfloat16 where the hardware lacks it, unless it is named, and without
    naive implementations that do not exist."""
    from runtime.distributed import best_device, has_bfloat16

    allowed = (args.form, args.dtype)
    combinations = [
        Combination(*c)
        for c in itertools.product(args.arch, args.methods, FORMS, DTYPES)
        if all(option in (None, value) for option, value in zip(allowed, c[2:], strict=True))
        if (c[0] in PLAIN and c[1] in PAPER) or c[2] == "ours"
    ]
    if args.dtype is None and not has_bfloat16(best_device()):
        print("this device has no bfloat16 in hardware: its rows would take hours and are left out", flush=True)
        combinations = [c for c in combinations if c.dtype != "bfloat16"]
    return combinations


def read_times(args: argparse.Namespace) -> Results:
    """The results of earlier calls, from --times."""
    results: Results = {}
    if args.times and args.times.is_file():
        for line in args.times.read_text().splitlines():
            result = json.loads(line)
            if result["settings"] == {"eager": args.eager}:
                *combination, batch = result["combination"]
                results.setdefault((Combination(*combination), batch), []).append(result)
    return results


def measure_all(args: argparse.Namespace, combinations: list[Combination]) -> Results:
    """Run the processes of all rounds in turns. A batch that is too large for the device is left out."""
    results = read_times(args)
    too_large = set()
    for n, c, batch in itertools.product(range(args.rounds), combinations, args.batch):
        if (c, batch) in too_large:
            continue
        try:
            result = measure("step", **c._asdict(), batch=batch, steps=args.steps, warmup=args.warmup, eager=args.eager)
        except UserError as error:
            if "memory" not in str(error) or len(args.batch) == 1:
                raise
            too_large.add((c, batch))
            print(f"{' '.join(c)}, batch {batch}: too large for the device", flush=True)
            continue
        results.setdefault((c, batch), []).append(result)
        if args.times:
            line = {"combination": (*c, batch), "settings": {"eager": args.eager}, **result}
            append_jsonl(args.times, line)
        seconds = statistics.median(result["times"])
        print(f"round {n + 1}/{args.rounds} {' '.join(c):<38} {batch:>4} {seconds:.3f} s", flush=True)
    return results


def make_rows(
    args: argparse.Namespace, combinations: list[Combination], results: Results, matmul: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """A row for each combination, at the batch that gives the most images per second."""
    from model.cost import count_cost
    from tools.bench.step_worker import make_config

    rows: dict[Combination, dict[str, Any]] = {}
    for c in combinations:
        speeds = {b: [b / t for r in results[c, b] for t in r["times"]] for b in args.batch if (c, b) in results}
        if not speeds:
            continue
        batch = max(speeds, key=lambda b: statistics.median(speeds[b]))
        processes = results[c, batch]
        row: dict[str, Any] = {"what": "step", **c._asdict(), "batch": batch}
        row |= median_and_range("img_per_s", speeds[batch])
        row |= {"peak_memory_mb": round(max(r["peak"] for r in processes))}
        flops = count_cost(make_config(c.arch, c.method)).flops  # of an image, forward and backward, as ours needs them
        tflops, peak = flops * row["img_per_s"] / 1e12, matmul[c.dtype]
        row |= {"tflops": _significant(tflops), "of_matmul_percent": _significant(100 * tflops / peak["matmul_tflops"])}
        row |= {"matmul_tflops": _significant(peak["matmul_tflops"])}
        if peak["stated_tflops"]:
            row["of_stated_percent"] = _significant(100 * tflops / peak["stated_tflops"])
        rows[c] = row | {k: v for k, v in processes[-1].items() if k in ("compile", "device", "host_waits")}
    for c, row in rows.items():
        naive = rows.get(c._replace(form="naive"))
        dino = rows.get(c._replace(method="dino"))
        for name, other in (("ratio_to_naive", naive), ("ratio_to_dino", dino)):
            row[name] = round(row["img_per_s"] / other["img_per_s"], 3) if other else None
    return list(rows.values())


def _significant(value: float) -> float:
    """Rounded to 3 significant digits."""
    return float(f"{value:.3g}")


def run_steps(args: argparse.Namespace) -> None:
    combinations = choose_combinations(args)
    tiny = args.arch == ("tiny",)
    side = 256 if tiny else None
    matmul = {dtype: measure("matmul", dtype=dtype, side=side) for dtype in sorted({c.dtype for c in combinations})}
    rows = make_rows(args, combinations, measure_all(args, combinations), matmul)
    names = [
        "arch",
        "method",
        "form",
        "dtype",
        "batch",
        "img_per_s",
        "ratio_to_naive",
        "ratio_to_dino",
        "peak_memory_mb",
        "tflops",
    ]
    names += [n for n in ("of_matmul_percent", "of_stated_percent", "host_waits") if any(n in row for row in rows)]
    about = "tiny networks, views of 32" if tiny else "views and heads of configs/METHOD_vits16.yaml"
    table = make_table(f"one step, {about}, {rows[0]['device'] if rows else ''}", names, left=4)
    for row in rows:
        table.add_row(*("" if row.get(name) is None else str(row[name]) for name in names))
    report_rows(table, rows, args.out)


def run(args: argparse.Namespace) -> None:
    args.methods = read_methods(args.methods)
    args.arch = ("tiny",) if args.check and args.arch is None else read_archs(args.arch)
    (run_check if args.check else run_head if args.head else run_steps)(args)
