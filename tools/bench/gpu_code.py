"""What a GPU would be given, counted without one: `python -m tools.bench.gpu_code [--images 256]`.

torch's fake tensors stand for an H200's, inductor writes its Triton code for them, and the kernels, the matrix products and
the bytes that they read and write are counted. Nothing is compiled by Triton and nothing runs: no figure here is a time.
"""

import argparse
import contextlib
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from model.losses.cross_entropy import GROUP, Exponentials, Gradients
from runtime.errors import run_cli
from tools.bench.data import finish

Spec = tuple[tuple[int, ...], torch.dtype]  # shape and dtype of an argument

H200 = types.SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, max_threads_per_multi_processor=2048,
    max_threads_per_block=1024, warp_size=32, regs_per_multiprocessor=65536, total_memory=141 << 30,
    shared_memory_per_block_optin=232_448,
)  # fmt: skip


@contextlib.contextmanager
def pretend_h200() -> Iterator[None]:
    """While inductor writes its code, torch.cuda describes an H200."""
    from torch._inductor.runtime.hints import DeviceProperties
    from torch.utils import _triton

    described = DeviceProperties(
        "cuda", 0, H200.multi_processor_count, 90, H200.major, H200.regs_per_multiprocessor,
        H200.max_threads_per_multi_processor, H200.max_threads_per_block, H200.warp_size,
    )  # fmt: skip
    answers = {
        "get_device_properties": H200, "is_available": True, "device_count": 1, "current_device": 0,
        "get_device_capability": (H200.major, H200.minor), "get_device_name": H200.name, "is_bf16_supported": True,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, return_value=answer))
        stack.enter_context(mock.patch.object(DeviceProperties, "create", return_value=described))
        stack.enter_context(mock.patch.object(_triton, "triton_hash_with_backend", return_value="none"))
        yield


def count(function: Callable[..., object], *specs: Spec) -> tuple[int, int, int]:
    """(Triton kernels, library calls such as matrix products, bytes read and written) of a compiled function."""
    from torch._inductor import metrics
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch.fx.experimental.proxy_tensor import make_fx

    mode, pure = FakeTensorMode(), torch.func.functionalize(lambda *args: function(*args), remove="mutations")
    with mode:
        inputs = [torch.empty(shape, device="cuda:0", dtype=dtype) for shape, dtype in specs]
        traced = make_fx(pure, decomposition_table=select_decomp_table(), tracing_mode="fake")(*inputs)
    graph = GraphLowering(traced, example_inputs=inputs, shape_env=None)
    with (
        pretend_h200(), DebugContext(), V.set_graph_handler(graph), V.set_extern_kernel_nodes([]),
        V.set_fake_mode(mode),
    ):  # fmt: skip
        graph.run(*inputs)
        metrics.reset()
        code, _ = graph.codegen()
        total, _, _ = graph.count_bytes()
    return metrics.generated_kernel_count, code.value.count("extern_kernels."), total


def cls_loss(images: int, teachers: int = 2, views: int = 4, k: int = 65_536, d: int = 256) -> dict[str, tuple]:
    """The two compiled pieces of the class loss with all prototypes: [CLS] of `images` images in each view."""
    half, full, groups = torch.bfloat16, torch.float32, k // GROUP
    terms: Spec = ((teachers, views), full)

    def gradients(e_t, e_s, part_t, part_s, terms, z, w, v, norm, gain, d_z, d_v) -> tuple[Tensor, Tensor]:
        Gradients().forward(e_t, e_s, part_t, part_s, terms, z, w, v, norm, gain, d_z, d_v, None, True, True)
        return d_z, d_v

    return {
        "exponentials": count(
            Exponentials().forward, ((teachers, images, d), half), ((views, images, d), half), ((k, d), half),
            ((k, d), half), ((k, 1), full), ((k, 1), full), ((k, 1, 1), full), terms,
        ),
        "gradients": count(
            gradients, ((groups, GROUP, teachers, images), half), ((groups, GROUP, views, images), half),
            ((groups, teachers, images), full), ((groups, views, images), full), terms, ((views, images, d), half),
            ((k, d), half), ((k, d), full), ((k, 1), full), ((k, 1), full), ((views, images, d), full), ((k, d), full),
        ),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--images", type=int, default=256, help="images of one chunk (default: 256)")
    parser.add_argument("--out", type=Path, help="append the rows as JSON lines")
    args = parser.parse_args()
    rows = []
    table = Table(title=f"class loss, {args.images} images, 4 views, K 65,536: inductor's code for an H200")
    for name in ("piece", "kernels", "library calls", "MB read and written"):
        table.add_column(name, justify="left" if name == "piece" else "right")
    for piece, (kernels, calls, size) in cls_loss(args.images).items():
        table.add_row(piece, str(kernels), str(calls), f"{size / 1e6:,.0f}")
        rows.append({"what": "gpu_code", "piece": piece, "kernels": kernels, "calls": calls, "mb": round(size / 1e6)})
    finish(table, rows, args.out)


if __name__ == "__main__":
    run_cli(main)
