"""Is the step right? The same step compiled, run eagerly, and in float64 on the CPU; and what makes the host wait.

A step is compared by its loss, its gradients (AdamW's first moment after one step: a tenth of them, clipped), its update and
its centers. An update is nearly the sign of the gradient, whatever that one's size; weighted with the gradient, elements
that are zero but for rounding do not count.
"""

from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from pipeline.augment.recipe import COLUMNS
from pipeline.loader import select_augment
from runtime import distributed
from runtime.compile import can_compile, compile_parts
from runtime.schedule import Optimizer
from tools.bench.step_worker import count_host_waits, make_config, prepare
from tools.gpu.parts import NotHere, Report, Setting
from train import train_step

CPU, IMAGES = torch.device("cpu"), 4
# of ‖a − b‖ / ‖b‖, b in float64: loss, gradients, update, centers
TOLERANCE = {"float32": 1e-4, "TF32": 1e-2, "bfloat16": 1e-1}
NAMES = ("loss", "gradients", "update", "centers")


def one_step(
    setting: Setting, device: torch.device, dtype: torch.dtype, compile: bool, products: str = "highest"
) -> dict[str, Tensor]:
    """What a step from the same weights and images gives, in float64 on the CPU. products: torch's float32 precision."""
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = products != "highest"
    torch._dynamo.reset()
    config = make_config("tiny" if setting.tiny else "vit_tiny", "densedino")
    config.model.drop_path = 0.0  # its draws differ from device to device
    config.optim.lr = 1e-3 * 256 / IMAGES  # an update of 1e-3, well above the rounding of a weight
    model, schedules, batch = prepare(config, IMAGES, CPU, torch.float32)
    context = distributed.DistributedContext(0, 1, device, dtype)
    context.to_device(model)
    wide = dtype == torch.float64
    batch = batch.map(lambda t: t.to(device, torch.float64 if wide and t.is_floating_point() else None))
    optimizer = Optimizer.of(model, config.optim)
    if compile:
        compile_parts(model.compile_units(), device, setting.backend)
    before = [p.detach().clone() for p in optimizer.trained]
    metrics = train_step(batch, model, model, optimizer, schedules.at(0), context)
    moments = [optimizer.adamw.state[p]["exp_avg"] for p in optimizer.trained]
    updates = [p.detach() - old for p, old in zip(optimizer.trained, before, strict=True)]
    sizes = [m.abs() * u for m, u in zip(moments, updates, strict=True)]

    def flat(tensors: list[Tensor]) -> Tensor:
        return torch.cat([t.detach().flatten().to(CPU, torch.float64) for t in tensors])

    return {
        "loss": flat([metrics["loss"]]), "gradients": flat(moments), "update": flat(sizes), "centers": flat(model.centers())
    }  # fmt: skip


def distance(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖; not a number if either is not finite."""
    return float((a - b).norm() / b.norm())


def equal(setting: Setting, report: Report) -> None:
    device = distributed.best_device()
    truth = one_step(setting, CPU, torch.float64, compile=False)
    forms: list[tuple[str, str, tuple[Any, ...]]] = [("eager", "float32", (torch.float32, False))]
    if not (missing := can_compile(device)):
        forms.append(("compiled", "float32", (torch.float32, True)))
        if device.type == "cuda":  # on a CPU "high" is float32 again
            forms.append(("compiled", "TF32", (torch.float32, True, "high")))
        forms.append(("compiled", "bfloat16", (torch.bfloat16, True, "high")))
    forms.append(("eager", "bfloat16", (torch.bfloat16, False, "high")))
    results = {}
    for form, precision, arguments in forms:
        results[form, precision] = found = one_step(setting, device, *arguments)
        for name in NAMES:
            report.row(
                f"{name}, {form} {precision}, from float64 on the CPU", distance(found[name], truth[name]), "‖a−b‖/‖b‖",
                at_most=TOLERANCE[precision], required=True,
            )  # fmt: skip
    for precision in ("float32", "bfloat16"):
        if ("compiled", precision) in results:
            a, b = results["compiled", precision], results["eager", precision]
            value = max(distance(a[name], b[name]) for name in NAMES)
            limit = TOLERANCE[precision]
            report.row(f"compiled from eager, {precision}", value, "‖a−b‖/‖b‖", at_most=limit, required=True)
    if missing:
        report.row("compiled", None, "", f"not compared: {missing}")


def waits(setting: Setting, report: Report) -> None:
    """Colors and the whole step, compiled as the trainer does, ten times with a batch of the same shape."""
    device = distributed.best_device()
    if missing := can_compile(device):
        raise NotHere(f"torch.compile cannot work: {missing}")
    distributed.set_up_device(device)
    dtype = torch.bfloat16 if distributed.has_bfloat16(device) else torch.float32
    config = make_config("tiny" if setting.tiny else "vit_tiny", "densedino", compile=True)
    images = 2 if setting.tiny else 64
    model, schedules, batch = prepare(config, images, device, dtype)
    optimizer = Optimizer.of(model, config.optim)
    context = distributed.DistributedContext(0, 1, device, dtype)
    counters.clear()
    compile_parts(model.compile_units(), device, setting.backend)
    color, side = select_augment(device, compile=True), config.views[0].size
    pixels = torch.randint(0, 256, (images, len(config.views), side, side, 3), dtype=torch.uint8, device=device)
    draws = torch.ones(images, len(config.views), COLUMNS, device=device)

    def run_step(i: int) -> None:
        batch.views = [color(pixels, draws, dtype=dtype)]
        train_step(batch, model, model, optimizer, schedules.at(i), context)

    graphs = []
    for i in range(10):
        run_step(i)
        graphs.append(counters["stats"]["unique_graphs"])
    breaks = sum(counters["graph_break"].values())
    report.row("graphs that the first two steps compile", graphs[1])
    # a step of the run changes the schedules' values, and no shape
    report.row("graphs compiled after them", graphs[-1] - graphs[1], at_most=0, required=True)
    report.row("graph breaks", breaks, "", "; ".join(map(str, list(counters["graph_break"])[:2])), at_most=0)
    if device.type == "cuda":
        count = count_host_waits(lambda: run_step(10))
        report.row("waits of the host in a step", count, "", "torch's sync debug mode", at_most=0, required=True)
    else:
        report.row("waits of the host in a step", None, "", "there is no device to wait for")
