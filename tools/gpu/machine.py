"""What there is: versions, the device, its own peaks of arithmetic and memory; and photos to read."""

import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.shards import Shards
from runtime.compile import can_compile
from runtime.distributed import best_device, has_bfloat16, peak_flops
from runtime.metrics import versions
from tools.bench.rows import cpu_name
from tools.bench.step_worker import matmul
from tools.gpu.parts import Report, Setting

SCENES, SIDE = 384, 400  # painted scenes and their pixels, near ImageNet's


def seconds_of(run: Callable[[], object], calls: int = 10) -> float:
    """The median time of one call, after three."""
    gpu, times = torch.cuda.is_available(), []
    for i in range(3 + calls):
        if gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if gpu:
            torch.cuda.synchronize()
        if i >= 3:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def copy_speed(device: torch.device, size: int) -> float:
    """GB/s, read and written, of a copy of `size` bytes on the device."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source)) / 1e9


def machine(setting: Setting, report: Report) -> None:
    device = best_device()
    for name, version in versions().items():
        report.row(f"version of {name}", version)
    report.row("processor", cpu_name())
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        report.row("device", about.name, beside=f"compute capability {about.major}.{about.minor}")
        report.row("memory of the device", about.total_memory / 2**30, "GiB")
        report.row("CUDA of torch", torch.version.cuda, beside=f"cuDNN {torch.backends.cudnn.version()}")
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            done = subprocess.run(query, capture_output=True, text=True, check=False)
            report.row("driver", done.stdout.strip() or done.stderr.strip())
    else:
        report.row("device", "no CUDA device: the CPU")
    report.row("torch.compile", can_compile(device) or "yes")
    for module, name in (("nvidia.dali", "DALI"), ("webdataset", "webdataset"), ("timm", "timm")):
        report.row(f"{name} is installed", "yes" if is_installed(module) else "no")
    for dtype in ("float32", *(["bfloat16"] if has_bfloat16(device) or setting.tiny else [])):
        tflops = matmul(dtype, 256 if setting.tiny else None)["matmul_tflops"]
        stated = peak_flops(device, getattr(torch, dtype))
        beside = f"the maker states {stated / 1e12:.0f}" if stated else "the maker's figure is not known"
        report.row(f"a product of matrices, {dtype}", tflops, "TFLOP/s", beside)
    report.row("copy within the device", copy_speed(device, 2**22 if setting.tiny else 2**31), "GB/s")


def is_installed(module: str) -> bool:
    """Whether a module is there, which is not imported."""
    parent = module.partition(".")[0]
    return importlib.util.find_spec(parent) is not None and importlib.util.find_spec(module) is not None


def photos(setting: Setting, report: Report) -> None:
    """Paint scenes and make their shards, unless shards are given."""
    folder, start = Path(setting.shards), time.perf_counter()
    if not folder.exists():
        count, side = (48, 64) if setting.tiny else (SCENES, SIDE)
        scenes = Path(setting.scratch, "scenes")
        words = ["--train", str(count), "--val", "1", "--size", str(side)]
        for command in (
            ["make_scenes", str(scenes), *words],
            ["make_shards", "make", str(scenes / "train"), str(folder)],
        ):
            subprocess.run([sys.executable, "-m", f"tools.{command[0]}", *command[1:]], check=True)
    shards = Shards(str(folder))
    sizes = shards.index
    beside = f"painted in {time.perf_counter() - start:.0f} s on {os.cpu_count()} cores"
    report.row("photos", len(shards), "", beside if folder.parent == Path(setting.scratch) else setting.shards)
    mean = f"{sizes['height'].mean():.0f} x {sizes['width'].mean():.0f}"
    report.row("a photo", sizes["size"].mean() / 1e3, "kB", f"{mean} pixels")
