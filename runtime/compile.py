"""torch.compile and fused attention: what a device can do, and what a compiler's error means."""

import os
import re
import shutil

import torch
from torch import nn
from torch.nn.attention import SDPBackend

# Shapes of one compiled function: multi-crop needs 12 of what the losses do with a block of prototypes (tests/test_step.py
# counts them); torch's own limit of 8 would leave the rest uncompiled with a warning.
RECOMPILE_LIMIT = 32

# Fused attention by compute capability: the first that accepts the shapes is used. torch's own order, used everywhere
# else, begins with FlashAttention 2, written for Ampere; cuDNN's is written for Hopper. Chosen from public measurements,
# not measured here (docs/lab/gpu-audit.md).
ATTENTION = {
    9: (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
}


def prefer_attention(capability: int) -> None:
    """Set this process's order of fused attention for GPUs of a compute capability (its major number; 9: Hopper)."""
    if order := ATTENTION.get(capability):
        torch._C._set_sdp_priority_order([int(backend.value) for backend in order])  # what sdpa_kernel calls


def can_compile(device: torch.device) -> str | None:
    """None if torch.compile can work, else what is missing."""
    if device.type == "cpu" and not any(shutil.which(c) for c in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        return "no C++ compiler (g++) is found"
    if device.type == "cuda" and not any(shutil.which(c) for c in (os.environ.get("CC", "cc"), "gcc", "clang")):
        return "no C compiler (gcc) is found, which Triton needs"
    return None


def compile_parts(parts: list[nn.Module], device: torch.device, backend: str | None = None) -> str:
    """Compile each module by itself, in place. Returns one line for the log. backend: torch's name of another compiler."""
    missing = can_compile(device)
    if missing:
        return f"running eagerly: {missing}; speed.compile: false silences this"
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    for part in parts:
        # static shapes: a run has few, and Dynamo's DDP optimizer cannot split a graph with symbolic ones
        part.compile(dynamic=False, **({"backend": backend} if backend else {}))
    return "compiling: the first step takes a while, minutes for a large network; the time left does not count it"


def compile_failure(error: Exception) -> str | None:
    """A message with the cause of a torch.compile failure and a remedy; None if it is another error."""
    from torch._dynamo.exc import BackendCompilerFailed  # has no public name

    if not isinstance(error, BackendCompilerFailed):
        return None
    cause = error.inner_exception
    lines = str(cause).splitlines() or [""]
    reason = f"{type(cause).__name__}: {next((line for line in lines if 'error:' in line), lines[0])}"
    remedy = "TORCH_LOGS=+dynamo prints more"
    if cut := re.search(r"(/\S+)/\w+/\S+\.so: (file too short|cannot read file data|invalid ELF header)", reason):
        remedy = f"a kill or a full disk truncated this file: remove it, or all of {cut[1]}"
    return f"torch.compile failed ({reason}); {remedy}; speed.compile=false trains without it"
