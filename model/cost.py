"""Cost of a training step for one image: arithmetic and memory, counted with torch's fake tensors."""

import copy
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from model.architecture import architecture
from model.methods import METHODS, Method, build
from pipeline.batch import Batch
from runtime.config import TEACHERS, Config
from runtime.schedule import StepValues


@dataclass
class Cost:
    """Cost of one image of a step, and the size of the networks."""

    flops: int  # forward and backward; a multiplication and an addition of a matrix product count as two
    activations: int  # bytes kept for the backward pass, in float32
    parameters: int  # of the student
    backbone: int  # of the backbone alone

    @property
    def state(self) -> int:
        """Bytes of weights and optimizer: student, teacher; gradient and AdamW's two moments."""
        return 4 * (2 + 3) * self.parameters

    def memory(self, images: int, halved: bool = False) -> int:
        """Bytes of a step of so many images at a time. halved: in bfloat16, whose activations are about half."""
        return self.state + images * self.activations // (2 if halved else 1)


def count_cost(config: Config) -> Cost:
    """The cost of a config's step.

    Counted for networks of two and of three blocks: a block more costs the same each time, so a deep network takes no longer
    to count. Methods outside this repository need not be so regular: they are counted at their own depth.
    """
    depth = architecture(config.model).depth
    if config.method not in METHODS or depth <= 3:
        return _count(config)
    two, three = (vars(_count(_with_depth(config, n))) for n in (2, 3))
    return Cost(**{name: two[name] + (depth - 2) * (three[name] - two[name]) for name in two})


def _with_depth(config: Config, depth: int) -> Config:
    config = copy.deepcopy(config)
    config.model.depth = depth
    return config


def _count(config: Config) -> Cost:
    """Run a step on torch's fake tensors (real shapes, no data, no memory) and count."""
    with torch.device("meta"):
        method = build(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        method.to_empty(device="cpu")
        batch = _two_images(config)
        counter, saved = FlopCounterMode(display=False), _SavedTensors(method, batch)
        for suffix in "", "_backward":  # torch 2.11 counts a GPU's fused attention, but not a CPU's
            gpu_op, cpu_op = (
                getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention{device}{suffix}")
                for device in ("", "_for_cpu")
            )
            counter.flop_registry.setdefault(cpu_op, counter.flop_registry[gpu_op])
        with counter:
            with torch.autograd.graph.saved_tensors_hooks(saved.add, lambda t: t):
                loss = method(batch, StepValues()).loss
            loss.backward()
    trained = [(n, p.numel()) for n, p in method.student.named_parameters() if p.requires_grad]
    # the gradient of the prototypes is computed in the forward pass: once for a whole batch, not for each image
    once = sum(4 * n for name, n in trained if "last_layer.weight_" in name)
    parameters = sum(p.numel() for p in method.student.parameters())
    backbone = sum(p.numel() for p in method.backbone.parameters())
    return Cost(counter.get_total_flops() // 2, max(0, saved.total() - once) // 2, parameters, backbone)


def _two_images(config: Config) -> Batch:
    """A batch of two images, in the loader's form. Batch normalization of one view needs two."""
    sizes = itertools.groupby(view.size for view in config.views)
    views = [torch.empty(len(list(group)), 2, config.data.channels, size, size) for size, group in sizes]
    points = torch.empty(2, TEACHERS, len(config.views), max(1, config.reference.points), 2, 2)
    ids, windows = torch.empty(2, dtype=torch.int64), torch.empty(2, len(config.views), 4, dtype=torch.int32)
    return Batch(0, ids, ids, views, windows, points, torch.empty(0))


class _SavedTensors:
    """The storages that autograd saves, except the method's own and the batch."""

    def __init__(self, method: Method, batch: Batch):
        own = (*method.parameters(), *method.buffers(), *batch.views, batch.view_points)
        self._own = {t.untyped_storage()._cdata for t in own}
        self._bytes: dict[int, int] = {}

    def add(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in self._own:
            self._bytes[storage._cdata] = storage.nbytes()
        return t

    def total(self) -> int:
        return sum(self._bytes.values())
