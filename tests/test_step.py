"""The training step as a whole: the host never waits for a GPU, and nothing is compiled again after the first steps."""

import functools
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import losses_of
from torch._dynamo.utils import counters
from torch._inductor.exc import CppCompileError
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.methods import build
from pipeline.augment import numba_kernel, recipe
from pipeline.batch import Batch, draw, size_groups
from pipeline.loader import select_augment
from runtime import distributed
from runtime.compile import RECOMPILE_LIMIT, compile_failure, compile_parts, prefer_attention
from runtime.config import Config, Head, Model, Views
from runtime.schedule import Optimizer, make_schedules


class Crossings(TorchDispatchMode):
    """Counts the operations with tensors of both host and device: each makes one wait for the other."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        if len({t.device.type for t in tensors}) > 1:
            self.seen[str(f)] += 1
        return out


def small_config() -> Config:
    """Two sizes of views, groups of views with different numbers of points, drop path, a last layer frozen at first."""
    config = Config(model=Model("custom", 8, 16, 2, 2, 0.1), head=Head(24, 12, 20))
    config.data.views = [Views(2, 32, teacher=True), Views(1, 32), Views(2, 16)]
    config.reference.points = 2
    config.optim.freeze_last_layer_epochs = 0.6
    return config


@pytest.mark.parametrize("at", [0, 9])  # last layers frozen, and not frozen
def test_on_a_gpu_the_host_waits_for_nothing(at: int, monkeypatch):
    """Color, both networks, losses, clipping, AdamW and EMA on torch's fake GPU: its tensors have shapes and devices but no
    data, so reading a value raises. Autograd's engine refuses fake tensors: of the backward pass, only our losses' own part
    is run."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    config, images, gpu = small_config(), 4, torch.device("cuda", 0)
    model, schedules = build(config), make_schedules(config, 10)
    crossings = Crossings()
    with FakeTensorMode():
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(torch.empty(p.shape, device=gpu), p.requires_grad))
            for name, b in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(b.shape, device=gpu))
        optimizer = Optimizer(model.student, 3.0, split_positions=True)
        color, processes = select_augment(gpu, compile=False), distributed.DistributedContext(0, 1, gpu, torch.bfloat16)
        draws = torch.empty(images, len(config.views), 8, device=gpu)
        groups = [(size, group.stop - group.start, draws[:, group]) for size, group in size_groups(config)]
        pixels = [torch.empty(images, n, size, size, 3, dtype=torch.uint8, device=gpu) for size, n, _ in groups]
        points, ids = (
            torch.empty(images, 2, len(config.views), 2, 2, 2, device=gpu),
            torch.empty(images, dtype=int, device=gpu),
        )
        with crossings:
            views = [color(p, d, dtype=torch.bfloat16) for p, (*_, d) in zip(pixels, groups, strict=True)]
            with processes.autocast():
                log, means = losses_of(model, Batch(0, ids, ids, views, ids, points, draws))
            for node, _ in log["loss"].grad_fn.next_functions:
                node.apply(*(torch.empty((), device=gpu) for _ in range(4)))
            for p in model.student.parameters():
                p.grad = torch.empty_like(p) if p.requires_grad else None
            applied, norm = optimizer.step(schedules.at(at), log["loss"].detach().isfinite())
            model.update_teacher(0.9, applied)
            model.update_centers(means, applied)
        results = [applied, norm, *log.values(), *means, *views]
        assert {(t.device, t.dtype) for t in results} == {(gpu, torch.float32), (gpu, torch.bfloat16)}
        assert not crossings.seen
        with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
            norm.item()  # a wait of the host would be noticed like this
        with crossings:
            norm * torch.tensor(2.0)  # and a copy like this
        assert crossings.seen


def test_compiled_color_has_no_host_tensor(monkeypatch):
    """A constant tensor created within the compiled function would be copied to the device at every step."""
    graphs = []

    def record(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=record))
    monkeypatch.setattr(numba_kernel, "available", False)
    views, draws = torch.zeros(1, 2, 16, 16, 3, dtype=torch.uint8), torch.ones(1, 2, recipe.COLUMNS)
    torch._dynamo.reset()
    color = select_augment(torch.device("cpu"), compile=True)
    assert torch.allclose(color(views, draws), recipe.apply_color(views, draws))
    (graph,) = graphs
    constants = [node for node in graph.graph.nodes if node.op == "get_attr" or node.target is torch.tensor]
    assert not constants


@pytest.mark.slow
def test_nothing_is_compiled_after_the_first_steps(monkeypatch):
    """Including after a non-finite step. Graphs are counted, not timed; they are traced, but no compiler is called."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr("runtime.compile.can_compile", lambda device: None)
    torch._dynamo.reset()
    config = small_config()
    torch.manual_seed(0)
    model, schedules = build(config), make_schedules(config, 10)
    assert schedules.frozen[5]
    assert not schedules.frozen[6]
    compile_parts(model.compile_units(), torch.device("cpu"))
    optimizer = Optimizer(model.student, 3.0, split_positions=True)

    def step(i: int, images: int = 4) -> int:
        ids = np.arange(images) + i
        draws = draw(config, i, ids, np.full(images, 40), np.full(images, 50))
        views = [torch.randn(n, images, 3, size, size) for n, size in ((3, 32), (2, 16))]
        batch = Batch(i, torch.from_numpy(ids), torch.from_numpy(ids), views, **draws.tensors())
        log, means = losses_of(model, batch, 0.04 + i / 1e3)
        log["loss"].backward()
        applied, _ = optimizer.step(schedules.at(i), torch.tensor(float(i != 4)))
        model.update_teacher(float(schedules.teacher_momentum[i]), applied)
        model.update_centers(means, applied)
        return counters["stats"]["unique_graphs"]

    counters.clear()
    after = [step(i) for i in range(9)]
    assert after[0] > 0
    assert after[2:] == [after[1]] * 7
    assert step(9, images=5) > after[-1]  # a new shape is noticed: the count can rise


@pytest.mark.slow
@pytest.mark.parametrize(
    ("views", "chunk", "parts"),
    [
        ([Views(2, 32, teacher=True), Views(2, 32)], None, 1),  # as 4 x 224
        ([Views(2, 32, teacher=True), Views(4, 16)], None, 1),  # as 2 x 224 + 4 x 96
        ([Views(2, 32, teacher=True), Views(4, 16)], 2, 2),  # parts, with shorter last chunks of samples and prototypes
    ],
    ids=["one-size", "multi-crop", "accumulated"],
)
def test_compiled_functions_stay_below_the_recompile_limit(views, chunk, parts, monkeypatch):
    """Above the limit torch stops compiling a function, with only a warning. And no shape is symbolic."""
    symbolic = []

    def backend(graph, inputs):
        sizes = [size for x in inputs if isinstance(x, torch.Tensor) for size in x.shape]
        symbolic.append(sum(isinstance(x, torch.SymInt) for x in [*inputs, *sizes]))
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr("runtime.compile.can_compile", lambda device: None)
    torch._dynamo.reset()
    config = small_config()
    config.data.views = views
    model = build(config)
    for loss in (model.cls_loss, model.reference_loss):
        loss.sample_chunk, loss.prototype_chunk = chunk, 16 if chunk else None
    compile_parts(model.compile_units(), torch.device("cpu"))
    for images in (6, 4):  # a change of the batch starts a new run; evaluation is not compiled
        ids = np.arange(images)
        draws = draw(config, 0, ids, np.full(images, 40), np.full(images, 50))
        pixels = [torch.randn(g.stop - g.start, images, 3, size, size) for size, g in size_groups(config)]
        batch = Batch(0, torch.from_numpy(ids), torch.from_numpy(ids), pixels, **draws.tensors())
        for part in batch.split(parts):
            losses_of(model, part)[0]["loss"].backward()
    shapes = {
        type(unit).__name__: len(torch._dynamo.eval_frame._debug_get_cache_entry_list(type(unit).forward.__code__))
        for unit in model.compile_units()
    }
    assert all(0 < n <= RECOMPILE_LIMIT / 2 for n in shapes.values()), shapes
    if chunk:
        assert max(shapes.values()) > 8  # torch's own limit
    assert symbolic
    assert not any(symbolic)


def test_attention_by_gpu(monkeypatch):
    before = torch._C._get_sdp_priority_order()
    try:
        prefer_attention(8)
        assert torch._C._get_sdp_priority_order() == before
        prefer_attention(9)
        assert torch._C._get_sdp_priority_order()[0] == int(SDPBackend.CUDNN_ATTENTION.value)
    finally:
        torch._C._set_sdp_priority_order(before)


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (
            ImportError("/tmp/torchinductor_me/ab/abc.main.so: file too short"),
            "a kill or a full disk truncated this file: remove it, or all of /tmp/torchinductor_me",
        ),
        (
            CppCompileError(["g++", "x.cpp"], "x.cpp:1: fatal error: omp.h: No such file"),
            "fatal error: omp.h: No such file",
        ),
        (ValueError(), "(ValueError: ); TORCH_LOGS=+dynamo prints more"),
    ],
)
def test_compiler_failures_are_explained(raised: Exception, message: str):
    def backend(graph, inputs):
        raise raised

    with pytest.raises(RuntimeError) as failed:
        torch.compile(torch.nn.Linear(2, 2), backend=backend)(torch.ones(1, 2))
    explanation = compile_failure(failed.value)
    assert explanation is not None
    assert message in explanation
    assert "speed.compile=false trains without it" in explanation
    assert compile_failure(RuntimeError("another")) is None
