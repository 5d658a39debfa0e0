"""A process of `python -m tools.bench step`: builds one model, runs it, and prints what it measured as a line of JSON.

    python -m tools.bench.step_worker step|matmul|head|check JSON     (the arguments of the function of that name)

Peak memory is a high-water mark of a process, so every measurement has one of its own.
"""

import functools
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch._inductor.config
from torch.nn.attention import SDPBackend

from model.methods import build
from pipeline.batch import Batch, draw, size_groups
from runtime import distributed
from runtime.compile import can_compile, compile_parts
from runtime.config import Config, Model, load_config, patch_of
from runtime.distributed import best_device
from runtime.errors import run_cli
from runtime.schedule import Optimizer, Schedules, make_schedules
from tools.bench.naive import NaiveStep
from tools.bench.rows import device_name
from train import train_step


def make_config(arch: str, method: str, compile: bool = False) -> Config:
    """A method's own config, configs/METHOD_vits16.yaml; arch "tiny": its views at 32 pixels, and a network whose step takes
    milliseconds."""
    words = [] if arch == "tiny" else [f"model.arch={arch}", f"model.patch={patch_of(arch)}"]
    config = load_config(f"configs/{method}_vits16.yaml", words)
    config.model.init = None  # what the weights are costs nothing
    if arch == "tiny":
        config.model = Model("custom", 8, 24, 2, 2, 0.0)
        config.head.hidden, config.head.bottleneck, config.head.prototypes = 32, 16, 64
        for views in config.data.views:
            views.size = 32
    config.speed.compile = compile
    return config


def prepare(config: Config, batch: int, device: torch.device, dtype: torch.dtype) -> tuple[Any, Schedules, Batch]:
    """(model, schedules after warm-up and the last layer's freeze, a batch as the loader gives it)."""
    torch.manual_seed(0)
    model = build(config).to(device)
    with torch.no_grad():  # networks that differ, as after some steps
        for network in model.networks().values():
            for p in network.parameters() if network is not model.student else ():
                p.add_(0.01 * torch.randn_like(p) * p.std() if p.numel() > 1 else 0)
    config.optim.freeze_last_layer_epochs = config.optim.warmup_epochs = 0
    config.optim.global_batch_size, config.optim.epochs = batch, 1
    draws = draw(config, 0, np.arange(batch), np.full(batch, 400), np.full(batch, 500))
    groups = [(size, views.stop - views.start) for size, views in size_groups(config)]
    views = [
        torch.randn(count, batch, config.data.channels, size, size, device=device, dtype=dtype)
        for size, count in groups
    ]
    ids = torch.arange(batch)
    made = Batch(0, ids, ids, views, **draws.tensors()).map(lambda t: t.to(device))
    return model, make_schedules(config, 1000), made


def peak_memory_mb() -> float:
    """Of the GPU if there is one, else of this process."""
    return distributed.peak_memory(best_device())


# ------------------------------------------------------------------------------------------------------ measurements


def step(
    arch: str, method: str, form: str, dtype: str, batch: int, steps: int, warmup: int, eager: bool,
    backend: str = "inductor", attention: str | None = None, inductor: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Time training steps, seconds each after the warm-up; peak memory; on a GPU, how often the host waits in a step.

    backend: torch's name of the compiler.
    attention: the fused attention that is asked first instead of the trainer's, of torch's SDPBackend (flash, cudnn).
    inductor: settings of torch._inductor.config that differ from the trainer's.
    """
    device, precision = best_device(), getattr(torch, dtype)
    compiled = form == "ours" and not eager and not can_compile(device)
    config = make_config(arch, method, compiled)
    model, schedules, data = prepare(config, batch, device, precision if form == "ours" else torch.float32)
    if form == "naive":
        naive = NaiveStep(model, schedules, config.optim.clip_grad)

        def run_step(i: int) -> None:
            naive.step(data, i, precision)
    else:
        distributed.set_up_device(device)
        set_alternatives(attention, inductor or {})
        optimizer = Optimizer.of(model, config.optim)
        context = distributed.DistributedContext(0, 1, device, precision)
        if compiled:
            compile_parts(model.compile_units(), device, backend)

        def run_step(i: int) -> None:
            train_step(data, model, model, optimizer, schedules.at(i), context)

    gpu = device.type == "cuda"
    result: dict[str, Any] = {"compile": compiled, "device": device_name(device)}
    times = []
    for i in range(warmup + steps):
        synchronize(device)
        start = time.perf_counter()
        run_step(i)
        synchronize(device)
        times.append(time.perf_counter() - start)
        if gpu and i == warmup - 1:
            result["host_waits"] = count_host_waits(lambda: run_step(warmup + steps))
    return result | {"times": times[warmup:], "peak": peak_memory_mb()}


def set_alternatives(attention: str | None, inductor: dict[str, Any]) -> None:
    """Settings of this process that the trainer does not have (arguments as those of `step`)."""
    if attention:
        first = int(getattr(SDPBackend, f"{attention.upper()}_ATTENTION").value)
        others = [kind for kind in torch._C._get_sdp_priority_order() if kind != first]
        torch._C._set_sdp_priority_order([first, *others])
    for name, value in inductor.items():
        *groups, last = name.split(".")
        setattr(functools.reduce(getattr, groups, torch._inductor.config), last, value)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def count_host_waits(run_step: Callable[[], None]) -> int:
    """How often the host waits for the GPU within a step."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_step()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(w.message) for w in caught)


def matmul(dtype: str, side: int | None = None) -> dict[str, Any]:
    """TFLOP/s of a square matrix product [side,side], in the trainer's precision, and the vendor's figure."""
    device, precision = best_device(), getattr(torch, dtype)
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")
    side = side or (8192 if device.type == "cuda" else 2048)
    a, b = torch.randn(2, side, side, device=device, dtype=precision).unbind()
    times = []
    for _ in range(12):
        start = time.perf_counter()
        for _ in range(4):
            a @ b
        synchronize(device)
        times.append((time.perf_counter() - start) / 4)
    stated = distributed.peak_flops(device, precision)
    tflops = 2 * side**3 / statistics.median(times[2:]) / 1e12
    return {"matmul_tflops": tflops, "stated_tflops": stated and stated / 1e12}


def head(form: str, batch: int) -> dict[str, Any]:
    """Peak memory of forward and backward passes of heads and losses alone, on random tokens of ViT-S."""
    device = best_device()
    config = make_config("vit_small", "densedino")
    config.model.arch, config.model.width, config.model.depth, config.model.heads = "custom", 384, 0, 6
    model, schedules, data = prepare(config, batch, device, torch.float32)
    data.views = [torch.zeros(4, batch, 3, 16, 16, device=device)]  # the backbone costs next to nothing here
    if form == "ours":
        distributed.reuse_memory()
        for network in (
            model.student,
            model.teacher,
        ):  # without blocks there is no last block that could omit the patches
            network.backbone.forward = functools.partial(_with_patches, network.backbone.forward)
        loss = model(data, schedules.at(0)).loss
    else:
        loss = NaiveStep(model, schedules, 3.0).losses(data, 0.04)[0]
    loss.backward()
    return {"peak": peak_memory_mb(), "loss": loss.item()}


def _with_patches(forward: Callable[..., Any], images: Any, points: Any, want: Any) -> Any:
    return forward(images, points)


def check(arch: str, method: str, batch: int) -> list[dict[str, Any]]:
    """Losses of five steps of both implementations from the same weights, without drop path, which each draws its own
    way."""
    device = torch.device("cpu")

    def config() -> Config:
        made = make_config(arch, method)
        made.model.drop_path = 0.0
        return made

    a, schedules, data = prepare(config(), batch, device, torch.float32)
    b, _, _ = prepare(config(), batch, device, torch.float32)
    naive, optimizer = NaiveStep(a, schedules, 3.0), Optimizer(b.student, 3.0, split_positions=b.clip_positions_apart)
    context = distributed.DistributedContext(0, 1, device, torch.float32)
    losses = []
    for i in range(5):
        naive_loss = naive.step(data, i, torch.float32)
        ours = train_step(data, b, b, optimizer, schedules.at(i), context)
        losses.append({"step": i, "naive": naive_loss, "ours": ours["loss"].item()})
    return losses


def main() -> None:
    measurements: dict[str, Callable[..., Any]] = {"step": step, "matmul": matmul, "head": head, "check": check}
    name, arguments = sys.argv[1:]
    print(json.dumps(measurements[name](**json.loads(arguments))))


if __name__ == "__main__":
    run_cli(main)
