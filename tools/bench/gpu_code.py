"""Kernels, library calls and bytes of the class loss on an H200, counted without a GPU.

    python -m tools.bench gpu_code [--images 256] [--out rows.jsonl]

Inductor writes its Triton code for fake tensors on an H200; kernels, matrix products and the bytes that they read and write
are counted. Triton compiles nothing and nothing runs, so no figure here is a time.
"""

import argparse
import contextlib
import types
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from model.losses.cross_entropy import GROUP, Exponentials, Gradients
from tools.bench.rows import make_table, report_rows

Spec = tuple[tuple[int, ...], torch.dtype]  # shape and dtype of an argument

H200 = types.SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, max_threads_per_multi_processor=2048,
    max_threads_per_block=1024, warp_size=32, regs_per_multiprocessor=65536, total_memory=141 << 30,
    shared_memory_per_block_optin=232_448,
)  # fmt: skip


@contextlib.contextmanager
def pretend_h200() -> Iterator[None]:
    """Within this context torch.cuda reports the properties of an H200."""
    from torch._inductor.runtime.hints import DeviceProperties
    from torch.utils import _triton

    properties = DeviceProperties(
        "cuda", 0, H200.multi_processor_count, 90, H200.major, H200.regs_per_multiprocessor,
        H200.max_threads_per_multi_processor, H200.max_threads_per_block, H200.warp_size,
    )  # fmt: skip
    values = {
        "get_device_properties": H200, "is_available": True, "device_count": 1, "current_device": 0,
        "get_device_capability": (H200.major, H200.minor), "get_device_name": H200.name, "is_bf16_supported": True,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, value in values.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, return_value=value))
        stack.enter_context(mock.patch.object(DeviceProperties, "create", return_value=properties))
        stack.enter_context(mock.patch.object(_triton, "triton_hash_with_backend", return_value="none"))
        yield


def count_code(function: Callable[..., object], *specs: Spec) -> tuple[int, int, int]:
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


def count_cls_loss(images: int, teachers: int = 2, views: int = 4, k: int = 65_536, d: int = 256) -> dict[str, tuple]:
    """{piece: counts} of the two compiled pieces of the class loss with all prototypes, for [CLS] [views,images,d]."""
    half, full, groups = torch.bfloat16, torch.float32, k // GROUP
    terms: Spec = ((teachers, views), full)

    def gradients(e_t, e_s, p_scale, q_scale, terms, z, w, v, norm, gain, d_z, d_v) -> tuple[Tensor, Tensor]:
        Gradients().forward(e_t, e_s, p_scale, q_scale, terms, z, w, v, norm, gain, d_z, d_v, None, True, True)
        return d_z, d_v

    return {
        "exponentials": count_code(
            Exponentials().forward, ((teachers, images, d), half), ((views, images, d), half), ((k, d), half),
            ((k, d), half), ((k, 1), full), ((k, 1), full), ((k, 1, 1), full), terms,
        ),
        "gradients": count_code(
            gradients, ((groups, GROUP, teachers, images), half), ((groups, GROUP, views, images), half),
            ((groups, teachers, images), full), ((groups, views, images), full), terms, ((views, images, d), half),
            ((k, d), half), ((k, d), full), ((k, 1), full), ((k, 1), full), ((views, images, d), full), ((k, d), full),
        ),
    }  # fmt: skip


def run(args: argparse.Namespace) -> None:
    rows = []
    title = f"class loss, {args.images} images, 4 views, K 65,536: inductor's code for an H200"
    table = make_table(title, ("piece", "kernels", "library calls", "MB read and written"), left=1)
    for piece, (kernels, calls, size) in count_cls_loss(args.images).items():
        table.add_row(piece, str(kernels), str(calls), f"{size / 1e6:,.0f}")
        rows.append({"what": "gpu_code", "piece": piece, "kernels": kernels, "calls": calls, "mb": round(size / 1e6)})
    report_rows(table, rows, args.out)
