"""Several processes: reductions, and DDP's step beside that of one process with the whole batch.

    python -m tools.gpu.processes SETTING            one of the processes (torchrun's variables are in the environment)

Over NCCL on two devices. With one device NCCL has one process, which shows that it starts and reduces, and that DDP around
a compiled step changes nothing. Over gloo without a GPU.
"""

import json
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.batch import Batch
from runtime import distributed
from runtime.compile import can_compile, compile_parts
from runtime.errors import RunError, plural
from runtime.metrics import append_jsonl, read_jsonl
from runtime.schedule import Optimizer
from tools.bench.step_worker import make_config, prepare
from tools.gpu.equal import distance
from tools.gpu.parts import NotHere, Report, Setting
from train import train_step

IMAGES = 8  # of the global batch
TIMEOUT = 300  # seconds of a reduction


def processes(setting: Setting, report: Report) -> None:
    gpus = torch.cuda.device_count()
    if gpus and not dist.is_nccl_available():
        raise NotHere("this torch has no NCCL")
    count = min(2, gpus) if gpus else 2
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    job = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    command = [sys.executable, "-m", "tools.gpu.processes", json.dumps(setting)]
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    started = [subprocess.Popen(command, env=job | rank) for rank in ranks]
    if any([process.wait() for process in started]):  # a list: all of them are waited for
        raise RunError(f"a process failed: exit codes {[process.returncode for process in started]}")
    (row,) = read_jsonl(Path(setting.scratch, "processes.jsonl"))
    backend = "NCCL" if gpus else "gloo"
    about = f"{plural(count, 'process')} over {backend}"
    report.row(f"{about}: a mean over them", row["mean_error"], "from the true one", at_most=1e-6, required=True)
    for name in ("loss", "gradients"):
        report.row(
            f"{about}: {name} of DDP's step, from one process's", row[name], "‖a−b‖/‖b‖", at_most=1e-3, required=True
        )  # fmt: skip
    report.row(f"{about}: 100 MB reduced", row["reduce_ms"], "ms")


def step_of(batch: Batch, setting: Setting, context: distributed.DistributedContext, ddp: bool) -> dict[str, Tensor]:
    """Loss and first moments (as tools/gpu/equal.py has them) after a compiled step in float32."""
    config = make_config("tiny" if setting.tiny else "vit_tiny", "densedino")
    config.model.drop_path = 0.0
    model, schedules, _ = prepare(config, 2, torch.device("cpu"), torch.float32)
    model.to(context.device)
    optimizer = Optimizer.of(model, config.optim)
    if not can_compile(context.device):
        torch._dynamo.reset()
        compile_parts(model.compile_units(), context.device, setting.backend)
    forward = distributed.wrap_ddp(model, context) if ddp else model
    metrics = train_step(batch, model, forward, optimizer, schedules.at(0), context)
    moments = [optimizer.adamw.state[p]["exp_avg"].flatten() for p in optimizer.trained]
    (loss,) = context.all_reduce_mean([metrics["loss"].clone()])
    return {"loss": loss, "gradients": torch.cat(moments)}


def main(setting: Setting) -> None:
    """One process: the reduction, then its part of a step and, in process 0, the whole step."""
    config = make_config("tiny" if setting.tiny else "vit_tiny", "densedino")
    context = distributed.start(config.speed, TIMEOUT)
    device, rank, count = context.device, context.rank, context.world_size
    if count == 1:  # `start` needs no group for one process; here it is what is measured
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT), rank=0, world_size=1)
    torch.set_float32_matmul_precision("highest")
    value = torch.full((1000,), float(rank), device=device)
    dist.all_reduce(value)
    row = {"mean_error": abs(float(value.mean()) / count - (count - 1) / 2)}
    payload = torch.ones(25_000_000 // (100 if setting.tiny else 1), device=device)
    for _ in range(3):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(payload)
        float(payload[0])
        row["reduce_ms"] = 1e3 * (time.perf_counter() - start)
    _, _, whole = prepare(config, IMAGES, torch.device("cpu"), torch.float32)
    whole = whole.map(lambda t: t.to(device))
    context.dtype = torch.float32
    part = whole.split(count)[rank]
    theirs = step_of(part, setting, context, ddp=True)
    alone = distributed.DistributedContext(0, 1, device, torch.float32)
    ours = step_of(whole, setting, alone, ddp=False)
    row |= {name: distance(theirs[name], ours[name]) for name in ours}
    if context.is_main:
        append_jsonl(Path(setting.scratch, "processes.jsonl"), row)
    dist.destroy_process_group()


if __name__ == "__main__":
    (fields,) = sys.argv[1:]
    main(Setting(*json.loads(fields)))
