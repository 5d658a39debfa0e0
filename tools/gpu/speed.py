"""How fast is the step? ViT-S, ViT-Ti and ViT-B beside the naive form, and other settings of compiler and attention.

The measurements are those of `python -m tools.bench step`: every combination in a process of its own.
"""

import argparse
import statistics
from typing import Any

import torch

from model.cost import count_memory
from runtime.distributed import best_device, has_bfloat16
from runtime.errors import UserError
from tools.bench.step import Combination, Results, make_rows, measure
from tools.bench.step_worker import make_config
from tools.gpu.parts import Report, Setting

BATCHES = {"vit_small": (128, 256), "vit_tiny": (256, 512), "vit_base": (64, 128), "tiny": (1, 2)}
TITLES = {"vit_small": "ViT-S", "vit_tiny": "ViT-Ti", "vit_base": "ViT-B", "tiny": "tiny"}
OF_MATMUL, TO_NAIVE = 40, 2.5  # targets for ViT-S: percent of the measured product's FLOP/s, times the naive form


def _dtype() -> str:
    return "bfloat16" if has_bfloat16(best_device()) else "float32"


def _steps(setting: Setting) -> dict[str, Any]:
    steps, warmup = (2, 1) if setting.tiny else (10, 4)
    return {"steps": steps, "warmup": warmup, "eager": False, "backend": setting.backend}


def speed(setting: Setting, report: Report) -> None:
    """Ours and the naive form of each network, at the batch that gives the most images per second."""
    dtype = _dtype()
    matmul = {dtype: measure("matmul", dtype=dtype, side=256 if setting.tiny else None)}
    for arch in ("tiny",) if setting.tiny else ("vit_small", "vit_tiny", "vit_base"):
        results: Results = {}
        combinations = [Combination(arch, "densedino", form, dtype) for form in ("ours", "naive")]
        for c in combinations:
            for batch in BATCHES[arch]:
                try:
                    results[c, batch] = [measure("step", **c._asdict(), batch=batch, **_steps(setting))]
                except UserError as error:
                    report.row(f"{TITLES[arch]}, {c.form}, batch {batch}", None, "", str(error)[-300:])
                    if "memory" not in str(error):
                        raise
        rows = make_rows(argparse.Namespace(batch=BATCHES[arch]), combinations, results, matmul)
        _report_network(TITLES[arch], {row["form"]: row for row in rows}, report)


def _report_network(title: str, rows: dict[str, dict[str, Any]], report: Report) -> None:
    """Rows of one network. rows: of the forms, as `tools.bench step` has them."""
    if "ours" not in rows:
        return
    ours, naive, judged = rows["ours"], rows.get("naive"), title == "ViT-S"
    about = f"{ours['dtype']}, batch {ours['batch']}, compiled: {'yes' if ours['compile'] else 'no'}"
    report.row(f"{title}: step", ours["img_per_s"], "images/s", about, bench=ours)
    if naive:
        beside = f"{naive['img_per_s']:.4g} images/s at batch {naive['batch']}"
        report.row(
            f"{title}: over the naive form",
            ours["ratio_to_naive"],
            "times",
            beside,
            at_least=TO_NAIVE if judged else None,
            bench=naive,
        )
    stated = ours.get("of_stated_percent")
    report.row(f"{title}: arithmetic", ours["tflops"], "TFLOP/s", f"a product has {ours['matmul_tflops']:.4g}")
    report.row(
        f"{title}: share of the product's", ours["of_matmul_percent"], "%",
        f"{stated} % of the maker's figure" if stated else "the maker's figure is not known",
        at_least=OF_MATMUL if judged else None,
    )  # fmt: skip
    device, config = best_device().type, make_config(ours["arch"], "densedino")
    counted = count_memory(config, getattr(torch, ours["dtype"]), device).peak(ours["batch"])
    words = f"counted for an uncompiled step: {counted / 2**20:,.0f}"
    report.row(f"{title}: peak memory", ours["peak_memory_mb"], "MiB", words)


def alternatives(setting: Setting, report: Report) -> None:
    """The step of ViT-S with one setting changed at a time; those that take longest to compile come last."""
    arch, dtype = ("tiny" if setting.tiny else "vit_small"), _dtype()
    batch = BATCHES[arch][0]
    changes: dict[str, dict[str, Any]] = {
        "as it is": {},
        "FlashAttention 2 first": {"attention": "flash"},
        "cuDNN's attention first": {"attention": "cudnn"},
        "CUDA graphs": {"inductor": {"triton.cudagraphs": True}},
        "max-autotune-no-cudagraphs": {"inductor": {"max_autotune": True}},
    }
    reference = None
    for name, change in changes.items():
        words = {"arch": arch, "method": "densedino", "form": "ours", "dtype": dtype, "batch": batch}
        try:
            result = measure("step", **words, **_steps(setting), **change)
        except UserError as error:  # an alternative that does not run is a finding, and no failure
            report.row(f"{TITLES[arch]}, batch {batch}: {name}", None, "", f"does not run: {str(error)[-300:]}")
            continue
        ms = 1e3 * statistics.median(result["times"])
        reference = reference or ms
        beside = f"{ms / reference:.3f} times the step as it is" if change else f"compiled: {result['compile']}"
        spread = [round(1e3 * f(result["times"]), 2) for f in (min, max)]
        report.row(f"{TITLES[arch]}, batch {batch}: {name}", ms, "ms", beside, spread=spread)
