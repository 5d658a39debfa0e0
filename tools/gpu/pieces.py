"""Pieces of the step by themselves, with their alternatives: colors, the losses by chunk, attention by kernel.

Letters: B images, V views, T teacher views, n samples, d dimensions of the unit sphere, K prototypes.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.heads import Prototypes
from model.losses.cross_entropy import CrossEntropy
from pipeline.augment import recipe
from pipeline.batch import draw
from pipeline.loader import select_augment
from runtime import distributed
from runtime.compile import can_compile, compile_parts
from runtime.config import TEACHERS, Config
from tools.gpu.machine import seconds_of
from tools.gpu.parts import Report, Setting


def pieces(setting: Setting, report: Report) -> None:
    device = distributed.best_device()
    distributed.set_up_device(device)
    dtype = torch.bfloat16 if distributed.has_bfloat16(device) else torch.float32
    for measure in (color, losses, attention):
        measure(setting, report, device, dtype)


def try_row(report: Report, what: str, run: Callable[[], object], beside: str = "") -> None:
    """A row of the milliseconds of `run`, or of why it does not run here: an alternative may not."""
    try:
        ms = 1e3 * seconds_of(run)
    except RuntimeError as error:
        report.row(what, None, "", f"does not run: {str(error).strip().splitlines()[0][:200]}")
        return
    report.row(what, ms, "ms", beside)


def color(setting: Setting, report: Report, device: torch.device, dtype: torch.dtype) -> None:
    """Four views of each image, with draws as a run has them, compiled and not."""
    images, side, config = 2 if setting.tiny else 128, 32 if setting.tiny else 224, Config()
    views = len(config.views)
    key = torch.arange(images).numpy().astype("int64")
    sizes = torch.full((images,), 400).numpy()
    draws = torch.from_numpy(draw(config, 0, key, sizes, sizes).color).to(device)
    pixels = torch.randint(0, 256, (images, views, side, side, 3), dtype=torch.uint8, device=device)
    orders = torch.tensor(recipe.ORDERS, device=device)
    compiled, what = select_augment(device, compile=True), f"colors of {images} x {views} views of {side}"
    moved = pixels.numel() * (1 + dtype.itemsize) / 1e9
    words = f"{moved:.3g} GB read and written, once"
    try_row(report, f"{what}, as the loader has it", lambda: compiled(pixels, draws, dtype=dtype), words)
    try_row(report, f"{what}, not compiled", lambda: recipe.apply_color(pixels, draws, dtype=dtype, orders=orders))


def losses(setting: Setting, report: Report, device: torch.device, dtype: torch.dtype) -> None:
    """Both losses of DenseDINO, forward and backward, by the number of samples in a chunk; None: the trainer's."""
    images, k, d = (4, 256, 16) if setting.tiny else (128, 65_536, 256)
    pairs, points = 6, 4  # teacher view and another view, and points of each: 4 views, M = 4
    every_pair = 1 - torch.eye(TEACHERS, 4)
    few = (2, 4) if setting.tiny else (128, 512)
    many = (16, 64) if setting.tiny else (2048, 4096)
    for name, terms, n, chunks in (
        ("class loss", every_pair, images, few),
        ("reference loss", torch.ones(1, 1), images * pairs * points, many),
    ):
        for chunk in (None, *chunks):
            run = _loss(terms, n, k, d, chunk, device, dtype, setting.backend)
            size = "the trainer's chunk" if chunk is None else f"{chunk} samples in a chunk"
            try_row(report, f"{name}, {n} samples, K {k:,}: {size}", run)


def _loss(
    terms: Tensor, n: int, k: int, d: int, chunk: int | None, device: torch.device, dtype: torch.dtype, backend: str
) -> Callable[[], None]:
    """A loss on random unit vectors, forward and backward, compiled as the trainer does."""
    loss = CrossEntropy(terms, 0.1, 0.5, sample_chunk=chunk).to(device)
    student, teacher = (Prototypes(d, k, norm_last_layer=True).to(device) for _ in range(2))
    teachers, views = terms.shape
    z = F.normalize(torch.randn(views, n, d, device=device), dim=-1).requires_grad_()
    z_t = F.normalize(torch.randn(teachers, n, d, device=device), dim=-1)
    center, mean = torch.zeros(k, device=device), z_t.mean((0, 1))
    if not can_compile(device):
        torch._dynamo.reset()
        compile_parts(loss.compile_units(), device, backend)

    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            total = loss(z, student, z_t, teacher, center, 0.04, mean)[0]
        total.backward()
        z.grad = student.weight_v.grad = None

    return run


def attention(setting: Setting, report: Report, device: torch.device, dtype: torch.dtype) -> None:
    """Fused attention of ViT-S's 197 tokens, forward and backward: what the trainer's order takes, and each kernel alone."""
    images, heads = (2, 2) if setting.tiny else (512, 6)
    shape = images, heads, 197, 64
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    out = torch.randn(shape, device=device, dtype=dtype)
    flops = 7 * 2 * images * heads * 197**2 * 64  # two products forward, five backward

    def run() -> None:
        F.scaled_dot_product_attention(q, k, v).backward(out)
        q.grad = k.grad = v.grad = None

    what = f"attention of 197 tokens, {images} views, {heads} heads, {str(dtype)[6:]}"
    beside = f"{flops / 1e9:.3g} GFLOP"
    try_row(report, f"{what}: the trainer's order", run, beside)
    for kind in (
        SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH,
    ):  # fmt: skip
        with sdpa_kernel(kind):
            try_row(report, f"{what}: {kind.name.lower()}", run, beside)
