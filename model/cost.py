"""Cost of a training step: arithmetic and memory, counted on torch's fake tensors (real shapes, no data, no memory)."""

import contextlib
import copy
import itertools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from model.architecture import architecture
from model.losses.cross_entropy import CrossEntropy
from model.memory import Memory
from model.methods import METHODS, Method, build
from pipeline.batch import Batch
from runtime.config import TEACHERS, Config
from runtime.schedule import StepValues

BATCHES = (4, 8)  # images of the two steps whose peaks are compared. Batch normalization of one view needs two


@dataclass(frozen=True)
class Cost:
    """Arithmetic of one image of a step, and the size of the networks."""

    flops: int  # forward and backward; a multiplication and an addition of a matrix product count as two
    parameters: int  # of the student
    backbone: int  # of the backbone alone


def count_cost(config: Config) -> Cost:
    """The cost of a config's step.

    Counted for networks of two and of three blocks: a block more costs the same each time, so a deep network takes no longer
    to count. Methods outside this repository need not be so regular: they are counted at their own depth.
    """
    return Cost(**_over_depths(config, _count_cost))


def count_memory(config: Config, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Memory:
    """The memory of a config's step, uncompiled. dtype: of the forward pass. device: "cpu" or "cuda", which process the
    losses in chunks of other sizes; what is counted needs neither.

    A compiled step keeps less (docs/howto/memory.md). What a process needs besides tensors is not counted.
    """

    def count(config: Config) -> dict[str, int]:
        (few, *rest), (many, *_) = (_peak(config, images, dtype, device) for images in BATCHES)
        image = (many - few) // (BATCHES[1] - BATCHES[0])
        return dict(
            zip(("fixed", "image", "state", "gradients"), (few - BATCHES[0] * image, image, *rest), strict=True)
        )

    return Memory(**_over_depths(config, count))


def _over_depths(config: Config, count: Any) -> dict[str, int]:
    """`count` of a config at its own depth, from two and three blocks where a block costs the same each time."""
    depth = architecture(config.model).depth
    if config.method not in METHODS or depth <= 3:
        return count(config)
    two, three = (count(_with_depth(config, n)) for n in (2, 3))
    return {name: two[name] + (depth - 2) * (three[name] - two[name]) for name in two}


def _with_depth(config: Config, depth: int) -> Config:
    config = copy.deepcopy(config)
    config.model.depth = depth
    return config


# --------------------------------------------------------------------------------------------------------- fake steps


def _count_cost(config: Config) -> dict[str, int]:
    with _fake(config, BATCHES[0]) as (method, batch):
        counter = FlopCounterMode(display=False)
        for suffix in "", "_backward":  # torch 2.11 counts a GPU's fused attention, but not a CPU's
            gpu_op, cpu_op = (
                getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention{device}{suffix}")
                for device in ("", "_for_cpu")
            )
            counter.flop_registry.setdefault(cpu_op, counter.flop_registry[gpu_op])
        with counter:
            method(batch, StepValues()).loss.backward()
    parameters = sum(p.numel() for p in method.student.parameters())
    backbone = sum(p.numel() for p in method.backbone.parameters())
    return {"flops": counter.get_total_flops() // BATCHES[0], "parameters": parameters, "backbone": backbone}


def _peak(config: Config, images: int, dtype: torch.dtype, device: str) -> tuple[int, int, int]:
    """(most bytes of tensors at one time in a step of so many images, those of networks and moments, of gradients)."""
    with _fake(config, images) as (method, batch):
        if device == "cuda":
            for loss in (m for m in method.modules() if isinstance(m, CrossEntropy)):  # its default chunks on a GPU
                loss.prototype_chunk, loss.sample_chunk = config.head.prototypes, max(1, 1024 // loss.terms.shape[1])
        own = (*method.parameters(), *method.buffers())
        gradients = sum(_bytes(p) for p in method.student.parameters() if p.requires_grad)
        moments = 2 * gradients  # AdamW's
        next_batch = sum(_bytes(t) for t in batch.views)  # the loader has it ready
        with _LiveTensors((*own, *batch.views, batch.view_points)) as live:
            with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
                loss = method(batch, StepValues()).loss
            loss.backward()
        return live.most + moments + next_batch, sum(_bytes(t) for t in own) + moments, gradients


def _bytes(t: torch.Tensor) -> int:
    return t.numel() * t.element_size()


@contextlib.contextmanager
def _fake(config: Config, images: int) -> Iterator[tuple[Method, Batch]]:
    """A config's method and a batch of fake tensors."""
    with torch.device("meta"):
        method = build(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        method.to_empty(device="cpu")
        yield method, _batch(config, images)


def _batch(config: Config, images: int) -> Batch:
    """A batch in the loader's form."""
    sizes = itertools.groupby(view.size for view in config.views)
    views = [torch.empty(len(list(group)), images, config.data.channels, size, size) for size, group in sizes]
    points = torch.empty(images, TEACHERS, len(config.views), max(1, config.reference.points), 2, 2)
    ids, windows = torch.empty(images, dtype=torch.int64), torch.empty(images, len(config.views), 4, dtype=torch.int32)
    return Batch(0, ids, ids, views, windows, points, torch.empty(0))


class _LiveTensors(TorchDispatchMode):
    """Follows which storages are alive, from their first use to their end, and the most bytes at one time."""

    def __init__(self, tensors: tuple[torch.Tensor, ...]):
        super().__init__()
        self._alive: set[int] = set()
        self.now = self.most = 0
        for t in tensors:
            self._follow(t)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor):
                self._follow(t)
        return result

    def _follow(self, t: torch.Tensor) -> None:
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._end, key, size)

    def _end(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size
