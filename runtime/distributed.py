"""Device, precision, DDP and reductions: the only module that knows there may be several processes. torchrun starts them."""

import contextlib
import ctypes
import os
import pickle
import resource
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from runtime.cards import card_of
from runtime.compile import compile_failure, prefer_attention
from runtime.config import Speed
from runtime.errors import RunError, UserError

T = TypeVar("T")


@dataclass
class DistributedContext:
    """This process among all that train together."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype  # of the forward pass; parameters are float32, or float64 with it (for comparisons)
    local_rank: int = 0  # among the processes of its machine, which have consecutive ranks

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce_mean(self, tensors: list[Tensor]) -> list[Tensor]:
        """The mean over all processes, in place, in one reduction."""
        if self.world_size > 1:
            flat = torch.cat([t.flatten() for t in tensors])
            dist.all_reduce(flat)
            flat /= self.world_size
            parts = flat.split([t.numel() for t in tensors])
            for t, part in zip(tensors, parts, strict=True):
                t.copy_(part.view_as(t))
        return tensors

    def all_reduce_mean_async(self, tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
        """Start the mean over all processes. The function returned waits for it and returns it; what is computed in
        between runs beside the reduction."""
        if self.world_size == 1:
            return lambda: tensors
        flat = torch.cat([t.flatten().to(tensors[0].dtype) for t in tensors])
        work = dist.all_reduce(flat, async_op=True)

        def finish() -> list[Tensor]:
            work.wait()
            parts = (flat / self.world_size).split([t.numel() for t in tensors])
            return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]

        return finish

    def throughput_metrics(self, flops: int | None, images_per_second: float) -> dict[str, float]:
        """TFLOP/s of one device, and their share of the stated peak if that is known. flops: of one image, counted."""
        if flops is None:
            return {}
        achieved = flops * images_per_second / self.world_size
        peak = peak_flops(self.device, self.dtype)
        return {"tflops": achieved / 1e12} | ({"mfu_percent": 100 * achieved / peak} if peak else {})

    def from_main(self, work: Callable[[], T]) -> T:
        """What `work` returns on process 0, in every process; only process 0 calls it. If it raises a UserError, all
        processes end, and process 0 says why."""
        if self.world_size == 1:
            return work()
        sent: list[T | None] = [None]
        refused = [""]
        if self.is_main:
            try:
                sent = [work()]
            except UserError as error:
                refused = [str(error)]
        both = [*refused, *sent]
        dist.broadcast_object_list(both, 0, device=self.device)
        if both[0]:
            if self.is_main:
                raise UserError(refused[0])
            sys.exit(2)
        return both[1]  # type: ignore[return-value]

    def from_first_of_node(self, value: Any) -> Any:
        """The value of the first process of this machine, in each of its processes. It travels by pickle."""
        if self.world_size == 1:
            return value
        sent = [b""] * self.world_size
        dist.all_gather_object(sent, b"" if self.local_rank else pickle.dumps(value))
        first = self.rank - self.local_rank
        if first < 0 or not sent[first]:
            raise UserError(
                f"LOCAL_RANK {self.local_rank} with RANK {self.rank}: the processes of a machine need consecutive ranks, as "
                "torchrun gives them"
            )
        return pickle.loads(sent[first]) if self.local_rank else value

    def broadcast(self, t: Tensor) -> Tensor:
        """A tensor of process 0, bit for bit, on the device of every process. t: that tensor; in the others one of its shape
        and dtype, which is written over if it is on the device."""
        if self.world_size == 1:
            return t
        t = t.to(self.device)
        if t.numel():
            dist.broadcast(t.flatten().view(torch.uint8), 0)
        return t

    def all_gather(self, rows: Tensor) -> Tensor:
        """The rows [n,*] of all processes, in order of rank, in each of them: [n_0 + n_1 + ..., *]. n may differ."""
        if self.world_size == 1:
            return rows
        count = torch.tensor([len(rows)], device=rows.device)
        counts = [torch.empty_like(count) for _ in range(self.world_size)]
        dist.all_gather(counts, count)
        most = int(max(counts))
        padded = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])])
        gathered = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(gathered, padded)
        return torch.cat([theirs[: int(n)] for theirs, n in zip(gathered, counts, strict=True)])

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def to_device(self, model: nn.Module) -> nn.Module:
        """Move the model to this process's device, and to float64 if that is the precision."""
        return model.to(self.device, torch.float64 if self.dtype == torch.float64 else None)

    def close(self) -> None:
        if self.world_size > 1:
            dist.destroy_process_group()


def env_world_size() -> int:
    """How many processes train together, as torchrun says in the environment."""
    return int(os.environ.get("WORLD_SIZE", 1))


def alone() -> DistributedContext:
    """A process by itself, on the CPU. Nothing is set up."""
    return DistributedContext(0, 1, torch.device("cpu"), torch.float32)


def start(speed: Speed, timeout: float = 1800) -> DistributedContext:
    """Set up this process: its device, precision and process group.

    timeout: seconds that a process waits for the others in one reduction (torch's own for NCCL, 600, is less than a first
    step may take, which compiles). Raises UserError if the device of the config does not exist, and if torchrun is set up
    so that its restarts would fail.
    """
    rank, local, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0)), env_world_size()
    shared, restarts = (os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("USE_AGENT_STORE", "MAX_RESTARTS"))
    # seen with gloo: after a restart, processes connect to one that has exited
    if shared == "True" and restarts != "0":
        raise UserError(
            "--max-restarts: torchrun keeps the addresses of processes that exited, unless the environment has "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        )
    cuda = torch.cuda.is_available()
    if speed.device == "cuda" and not cuda:
        raise UserError(
            "speed.device: cuda, but torch finds no CUDA device here (speed.device: auto uses the CPU then)"
        )
    if cuda and speed.device != "cpu":
        if local >= torch.cuda.device_count():
            raise UserError(f"process {local} of this machine has no device: torch finds {torch.cuda.device_count()}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    set_up_device(device)
    if world_size > 1:
        gpu = device.type == "cuda"
        dist.init_process_group(
            "nccl" if gpu else "gloo", timeout=timedelta(seconds=timeout), device_id=device if gpu else None
        )
    return DistributedContext(rank, world_size, device, choose_precision(speed.precision, device), local)


def best_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def set_up_device(device: torch.device) -> None:
    """Torch's settings of this process for training on a device: products, fused attention, memory."""
    if device.type == "cpu":
        reuse_memory()
        return
    torch.set_float32_matmul_precision("high")
    # the losses sum over all prototypes: partial sums of such a product stay float32
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    prefer_attention(torch.cuda.get_device_capability(device)[0])


# --------------------------------------------------------------------------------------------------------------- DDP


def wrap_ddp(model: nn.Module, context: DistributedContext) -> nn.Module:
    """DDP around the model if `start` made a process group, for several: gradients are averaged during the backward pass.

    No static_graph: torch 2.15 ends in an internal assertion of its reducer if the first backward pass is one of
    `no_sync`, as with speed.grad_accum_steps. Unused parameters, whose search it would save, are not looked for.
    """
    if not dist.is_initialized():
        return model
    with warnings.catch_warnings():  # torch 2.15 has a new name for it, which older versions do not know
        warnings.filterwarnings("ignore", message="`broadcast_buffers`", category=FutureWarning)
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def no_sync(model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Around a piece of an accumulated step: only the last one averages gradients."""
    return contextlib.nullcontext() if last or not isinstance(model, DistributedDataParallel) else model.no_sync()


# ------------------------------------------------------------------------- for losses that need the batch of all processes


def rank_and_size() -> tuple[int, int]:
    """This process's rank, and how many processes train together."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_processes(x: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in each of them. It has no gradient."""
    x = x.detach()
    if rank_and_size()[1] > 1:
        x = x.clone()
        dist.all_reduce(x)
    return x


def gather_rows(rows: Tensor) -> Tensor:
    """The rows [n,*] of all processes, as many in each, in the order of the global batch: [n*processes,*] in each of them.
    The plan deals that to the processes in turn, so row i of process r is row i * processes + r. They have no gradient.
    (`DistributedContext.all_gather` takes different numbers; the host waits for them.)"""
    world_size = rank_and_size()[1]
    if world_size == 1:
        return rows.detach()
    gathered = rows.new_empty(world_size, *rows.shape)
    dist.all_gather(list(gathered.unbind()), rows.detach().contiguous())
    return gathered.transpose(0, 1).flatten(0, 1)


# --------------------------------------------------------------------------------------------------------- precision


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of `speed.precision` on a device. auto: bfloat16 on a GPU that multiplies in it, else float32."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and has_bfloat16(device) else "float32"
    return getattr(torch, name)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device itself multiplies in bfloat16. If not (a CPU without AVX-512, a GPU older than Ampere) torch
    emulates it; on a CPU that is many times slower than float32 (docs/lab/2026-11.md)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return not torch.backends.mkldnn.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def precision_note(context: DistributedContext, asked: str) -> str:
    """A note if another precision is faster on this device than the run's, else "". asked: speed.precision."""
    if context.dtype == torch.bfloat16 and not has_bfloat16(context.device):
        return "bfloat16 is not in this device's hardware, torch's emulation is slow: use speed.precision=float32"
    if asked == "auto" and context.device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return "this CPU multiplies in bfloat16: speed.precision=bfloat16 is faster"
    return ""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The device's stated peak in a precision, FLOP/s; None if it is not known (every CPU)."""
    if device.type != "cuda":
        return None
    card = card_of(torch.cuda.get_device_name(device))
    return 1e12 * (card.bfloat16 if dtype == torch.bfloat16 else card.tf32) if card else None


# ------------------------------------------------------------------------------------------------------------ memory


def peak_memory(device: torch.device) -> float:
    """MiB: the most that tensors used on a GPU, or that this process had resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else ():
        if line.startswith("VmHWM:"):  # getrusage may have the peak of the program that started this one
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def reuse_memory() -> None:
    """On a CPU, keep freed memory: glibc returns large blocks to the kernel, which clears every page again for the next
    step (measured in docs/lab/2026-11.md). Does nothing with another C library."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_max = -1, -4  # names in malloc.h
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)


# ------------------------------------------------------------------------------------------------------------ errors


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def explain_error(
    error: RuntimeError, speed: Speed, device: torch.device, step: int, unresponsive_ranks: Callable[[], str]
) -> RunError | None:
    """A training loop's error as a RunError with its cause and a remedy; None if the error says all there is.

    unresponsive_ranks: `Watchdog.unresponsive_ranks`.
    """
    if is_out_of_memory(error):
        return RunError(
            f"out of memory in step {step}, {peak_memory(device):,.0f} MiB were in use; "
            f"speed.grad_accum_steps={2 * speed.grad_accum_steps} holds half as many images at a time, "
            "speed.activation_checkpointing=true needs less for each (--dry-run estimates both); "
            "the newest checkpoint is kept"
        )
    if failure := compile_failure(error):
        return RunError(f"{failure}; the newest checkpoint, if there is one, is kept")
    if unresponsive := unresponsive_ranks():
        reason = str(error).partition("\n")[0].partition(". ")[0]
        return RunError(f"{unresponsive}; the newest checkpoint is kept ({reason})")
    return None
