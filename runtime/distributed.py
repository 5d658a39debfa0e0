"""Device, dtype, compile, DDP: the only file that knows there may be several devices. torchrun is the launcher."""

import contextlib
import ctypes
import os
import re
import resource
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend
from torch.nn.parallel import DistributedDataParallel

from runtime.config import Speed
from runtime.errors import RunError, UserError


@dataclass
class DistributedContext:
    """This process among all that train together."""

    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype  # of the network's arithmetic; parameters are float32, or float64 with it (for comparisons)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mean(self, tensors: list[Tensor]) -> list[Tensor]:
        """The mean over all processes, in place, in one reduction."""
        if self.world > 1:
            flat = torch.cat([t.flatten() for t in tensors])
            dist.all_reduce(flat)
            flat /= self.world
            parts = flat.split([t.numel() for t in tensors])
            for t, part in zip(tensors, parts, strict=True):
                t.copy_(part.view_as(t))
        return tensors

    def all_reduce_mean_async(self, tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
        """Begin the mean over all processes; the function returned waits for it and gives it. What is computed in between
        goes on beside the reduction."""
        if self.world == 1:
            return lambda: tensors
        flat = torch.cat([t.flatten().to(tensors[0].dtype) for t in tensors])
        work = dist.all_reduce(flat, async_op=True)

        def finish() -> list[Tensor]:
            work.wait()
            parts = (flat / self.world).split([t.numel() for t in tensors])
            return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]

        return finish

    def arithmetic(self, flops: int | None, images_per_second: float) -> dict[str, float]:
        """Counted matrix arithmetic of one device in TFLOP/s, and its share of the stated peak where that is known."""
        if flops is None:
            return {}
        done = flops * images_per_second / self.world
        peak = peak_flops(self.device, self.dtype)
        return {"tflops": done / 1e12} | ({"mfu_percent": 100 * done / peak} if peak else {})

    def agree(self, number: int) -> bool:
        """Whether all processes hold the same number."""
        if self.world == 1:
            return True
        everyone: list[int] = [0] * self.world
        dist.all_gather_object(everyone, number)
        return len(set(everyone)) == 1

    def gather(self, rows: Tensor) -> Tensor:
        """The rows [n,*] of all processes, in order of rank, in each of them: [n_0 + n_1 + ..., *]. n may differ."""
        if self.world == 1:
            return rows
        count = torch.tensor([len(rows)], device=rows.device)
        counts = [torch.empty_like(count) for _ in range(self.world)]
        dist.all_gather(counts, count)
        most = int(max(counts))
        padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
        everyone = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(everyone, padded)
        return torch.cat([theirs[: int(n)] for theirs, n in zip(everyone, counts, strict=True)])

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def place(self, model: nn.Module) -> nn.Module:
        """The model on this process's device."""
        return model.to(self.device, torch.float64 if self.dtype == torch.float64 else None)

    def close(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()


# dense matrix products, TFLOP/s as the maker states them: (bfloat16, TF32)
PEAKS = {"H200": (989, 494), "H100 PCIe": (756, 378), "H100": (989, 494), "A100": (312, 156), "L40S": (362, 183),
         "RTX 4090": (165, 83), "B200": (2250, 1125)}  # fmt: skip


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The device's stated peak for this arithmetic, FLOP/s; None where it is not known (every CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    known = next((peaks for words, peaks in PEAKS.items() if words in name), None)
    return 1e12 * known[0 if dtype == torch.bfloat16 else 1] if known else None


def peak_memory(device: torch.device) -> float:
    """MiB: the most that tensors took on a GPU, or that this process had resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def reuse_memory() -> None:
    """On a CPU, keep what is freed: glibc hands large blocks back to the kernel, which clears every page anew for the
    next step (measured in docs/benchmarks.md). Nothing happens where the C library is another one."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_max = -1, -4  # names in malloc.h
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)


def world_size() -> int:
    """How many processes train together, as torchrun says."""
    return int(os.environ.get("WORLD_SIZE", 1))


def start(speed: Speed, timeout: float = 1800) -> DistributedContext:
    """Join the processes that torchrun started, or be alone.

    timeout: seconds that a process waits for the others in one reduction (torch's own for NCCL, 600, is less than a first
    step may take, which compiles). Raises UserError where the device asked for is not there, and where torchrun would not
    restart them well.
    """
    world, rank = world_size(), int(os.environ.get("RANK", 0))
    shared, restarts = (os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("USE_AGENT_STORE", "MAX_RESTARTS"))
    if shared == "True" and restarts != "0":  # seen with gloo: who starts first after a restart calls one that has died
        raise UserError(
            "--max-restarts: torchrun keeps the addresses of processes that died, unless the environment says "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        )
    cuda = torch.cuda.is_available()
    if speed.device == "cuda" and not cuda:
        raise UserError(
            "speed.device: cuda, but torch finds no CUDA device here (speed.device: auto takes the CPU then)"
        )
    if cuda and speed.device != "cpu":
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise UserError(f"process {local} of this machine has no device: torch finds {torch.cuda.device_count()}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        # the losses sum over all prototypes: partial sums of such a product stay float32
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        prefer_attention(torch.cuda.get_device_capability(device)[0])
    else:
        device = torch.device("cpu")
        reuse_memory()
    if world > 1:
        gpu = device.type == "cuda"
        dist.init_process_group(
            "nccl" if gpu else "gloo", timeout=timedelta(seconds=timeout), device_id=device if gpu else None
        )
    return DistributedContext(rank, world, device, choose_precision(speed.precision, device))


# Fused attention by compute capability: the first that takes the shapes is used. torch's own order, which holds everywhere
# else, begins with FlashAttention 2, written for Ampere; cuDNN's is written for Hopper. From public measurements: no GPU has
# been at hand (docs/lab/gpu-audit.md).
ATTENTION = {
    9: (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
}


def prefer_attention(capability: int) -> None:
    """For the rest of this process, fused attention in the order that suits GPUs of this compute capability (9: Hopper)."""
    if order := ATTENTION.get(capability):
        torch._C._set_sdp_priority_order([int(backend.value) for backend in order])  # what sdpa_kernel calls


def choose_precision(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of `speed.precision` on a device. auto: bfloat16 on a GPU that multiplies in it, else float32."""
    if wanted == "auto":
        wanted = "bfloat16" if device.type == "cuda" and has_bfloat16(device) else "float32"
    return getattr(torch, wanted)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device itself multiplies in bfloat16. Where it does not (a processor without AVX-512, a GPU older than
    Ampere) torch has a stand-in; a processor's is slower than float32 many times over (docs/benchmarks.md)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return not torch.backends.mkldnn.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()


# Shapes of one compiled function: multi-crop needs 12 of what the losses do with some prototypes (tests/test_step.py counts
# them); torch's own limit of 8 would leave the rest uncompiled with a warning.
RECOMPILE_LIMIT = 32


def can_compile(device: torch.device) -> str | None:
    """None where torch.compile can work, else what is missing."""
    if device.type == "cpu" and not any(shutil.which(c) for c in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        return "no C++ compiler (g++) is found"
    if device.type == "cuda" and not any(shutil.which(c) for c in (os.environ.get("CC", "cc"), "gcc", "clang")):
        return "no C compiler (gcc) is found, which Triton needs"
    return None


def compile_parts(parts: list[nn.Module], device: torch.device) -> str:
    """torch.compile each part for itself; returns one line to tell."""
    missing = can_compile(device)
    if missing:
        return f"running eagerly: {missing}; speed.compile: false silences this"
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    for part in parts:
        # static shapes: a run has few, and Dynamo's DDP optimizer cannot split a graph with symbolic ones
        part.compile(dynamic=False)
    return "compiling: the first steps take a while"


def compile_failure(error: Exception) -> str | None:
    """What torch.compile stumbled over and what helps, in words; None where the error is another one."""
    from torch._dynamo.exc import BackendCompilerFailed  # has no public name

    if not isinstance(error, BackendCompilerFailed):
        return None
    cause = error.inner_exception
    lines = str(cause).splitlines() or [""]
    why = f"{type(cause).__name__}: {next((line for line in lines if 'error:' in line), lines[0])}"
    helps = "TORCH_LOGS=+dynamo tells more"
    if cut := re.search(r"(/\S+)/\w+/\S+\.so: (file too short|cannot read file data|invalid ELF header)", why):
        helps = f"a kill or a full disk cut this file off: remove it, or all of {cut[1]}"
    return f"torch.compile failed ({why}); {helps}; speed.compile=false trains without it"


def explain(
    error: RuntimeError, speed: Speed, device: torch.device, step: int, silent: Callable[[], str]
) -> RunError | None:
    """What a training loop's error means, as a RunError with what helps; None where nobody can say more.

    silent: which processes have gone silent, in words, or "" (`watch.Watchdog.silent`).
    """
    if is_out_of_memory(error):
        return RunError(
            f"out of memory in step {step}, {peak_memory(device):,.0f} MiB were in use; "
            f"speed.grad_accum_steps={2 * speed.grad_accum_steps} holds half as many images at a time, speed.activation_checkpointing=true "
            "takes less for each (--dry-run estimates both); the newest checkpoint stands"
        )
    if failed := compile_failure(error):
        return RunError(f"{failed}; the newest checkpoint, if there is one, stands")
    if gone := silent():
        why = str(error).partition("\n")[0].partition(". ")[0]
        return RunError(f"{gone}; the newest checkpoint stands ({why})")
    return None


def slow_precision(processes: DistributedContext) -> str:
    """A line where the device has no arithmetic of the run's precision, else "" """
    if processes.dtype != torch.bfloat16 or has_bfloat16(processes.device):
        return ""
    return "bfloat16 is not in this device's hardware, torch's stand-in is slow: use speed.precision=float32"


def distribute(model: nn.Module, processes: DistributedContext) -> nn.Module:
    """DDP around the model where there are several processes: gradients are averaged as they appear.

    No static_graph: torch 2.15 ends in an internal assertion of its reducer when the first backward pass is one of
    `no_sync`, as it is with speed.grad_accum_steps. Unused parameters, whose search it would save, are not looked for.
    """
    if processes.world == 1:
        return model
    if processes.device.type == "cuda":  # BatchNorm in the heads, if any, over all devices (as published DINO)
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    with warnings.catch_warnings():  # torch 2.15 has another word for it, which older ones do not know
        warnings.filterwarnings("ignore", message="`broadcast_buffers`", category=FutureWarning)
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def no_sync(model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Around a piece of an accumulated step: only the last one averages gradients."""
    return contextlib.nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync()
