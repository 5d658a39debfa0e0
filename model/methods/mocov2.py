"""MoCo-v2 (He et al. 2020, "MoCo"; Chen et al. 2020, "v2"): the query of one view has to find the key of the other view of
its image among the keys of earlier steps.

Letters: B images, N patches, E width of the backbone, d width of queries and keys.
"""

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from model import drop_path
from model.backbone import Tokens
from model.heads import new_mlp
from model.key_queue import KeyQueue
from model.losses.info_nce import InfoNCE, unit
from model.methods.base import Method, StepOutput
from model.methods.student_teacher import Network, update_average
from model.vit import build_vit
from pipeline.batch import Batch
from runtime.config import Config, Head
from runtime.schedule import StepValues


class MoCoNetwork(Network):
    """An encoder f: a backbone, and v2's head on the feature of an image."""

    def __init__(self, config: Config, drop_path: float):
        super().__init__()
        self.backbone = build_vit(config, drop_path)
        self.projector = two_layers(self.backbone.width, config.head)


def two_layers(width: int, head: Head) -> nn.Sequential:
    """E -> hidden -> d with a ReLU (v2, section 2: "a 2-layer MLP head"), initialized as torch does."""
    return new_mlp(width, head.hidden, head.bottleneck, layers=2, activation="relu", norm=head.norm)


class MomentumContrast(Method):
    """A query network f_q, which is trained and evaluated, and a key network f_k, its moving average (MoCo, eq. 2).

    The average is taken before the keys are computed, as published: it takes in what the step before has changed.
    """

    student: Network  # f_q
    key: Network  # f_k
    moved: Tensor
    evaluated = "student"
    # which of the two views each network sees
    query_views: ClassVar[slice] = slice(0, 1)
    key_views: ClassVar[slice] = slice(1, 2)
    want: tuple[str, ...] = ("cls",)

    def __init__(self, config: Config, new_network: Callable[[float], Network]):
        """new_network: builds a network from its drop path rate; the key network has none."""
        super().__init__()
        self.seed, self.drop_path, self.settings = config.seed, config.model.drop_path, config.contrast
        if self.settings.feature == "mean":
            self.want = ("cls", "patches")
        self.student = new_network(config.model.drop_path)
        self.student.backbone.activation_checkpointing = config.speed.activation_checkpointing
        self.key = new_network(0.0)
        self.key.load_state_dict(self.student.state_dict())
        self.key.requires_grad_(False)
        self.register_buffer("moved", torch.zeros(()))  # 1 if the last step was applied, 0 at the start

    def networks(self) -> dict[str, nn.Module]:
        return {"student": self.student, "key": self.key}

    def compile_units(self) -> list[nn.Module]:
        return [unit for network in self.networks().values() for unit in network.children()]

    def before_step(self, at: StepValues) -> None:
        update_average(self.key, self.student, at.teacher_momentum, self.moved)

    def after_step(self, statistics: list[Tensor], at: StepValues, applied: Tensor) -> None:
        self.moved.copy_(applied)

    def forward(self, batch: Batch, at: StepValues) -> StepOutput:
        with torch.no_grad():
            key = self.encode(self.key, batch, self.key_views)
        return self.compare(self.encode(self.student, batch, self.query_views), key)

    def compare(self, query: Tokens, key: Tokens) -> StepOutput:
        """The loss of the query network's tokens, given the key network's."""
        raise NotImplementedError

    def encode(self, network: Network, batch: Batch, views: slice) -> Tokens:
        """A network's tokens of one view [B,...], or of both [2*B,...], view by view."""
        (images,) = batch.views  # [2,B,3,H,W]: both views have one size
        drop = None
        if network is self.student and self.drop_path > 0:
            draws = drop_path.draw(self.seed, batch.step, batch.ids, (2, len(network.backbone.blocks), 2))
            drop = draws[:, views].transpose(0, 1).flatten(0, 1)  # [B,2,depth,2] -> [views*B,depth,2]
        return network.backbone(images[views].flatten(0, 1), want=self.want, drop=drop)

    def feature(self, tokens: Tokens) -> Tensor:
        """What the head of an image gets, [n,E]: [CLS], or the mean of the patch tokens."""
        if self.settings.feature == "cls":
            return tokens.cls
        assert tokens.patches is not None
        return tokens.patches.mean(1)


class MoCoV2(MomentumContrast):
    """The negatives are a queue of keys. It scores as it was before the step, which pushes its own keys at its end."""

    student: MoCoNetwork
    key: MoCoNetwork

    def __init__(self, config: Config, network: type[MoCoNetwork] = MoCoNetwork):
        super().__init__(config, partial(network, config))
        self.info_nce = InfoNCE(config.contrast.temperature)
        self.queue = KeyQueue(config.contrast.queue, config.head.bottleneck)
        # the keys of this step's pieces, for each queue: not state, because a step begins without any
        self.new_keys: list[tuple[Tensor, ...]] = []

    def compile_units(self) -> list[nn.Module]:
        return super().compile_units() + self.info_nce.compile_units()

    def queues(self) -> tuple[KeyQueue, ...]:
        return (self.queue,)

    def before_step(self, at: StepValues) -> None:
        super().before_step(at)
        self.new_keys.clear()

    def after_step(self, statistics: list[Tensor], at: StepValues, applied: Tensor) -> None:
        super().after_step(statistics, at, applied)
        for queue, keys in zip(self.queues(), zip(*self.new_keys, strict=True), strict=True):
            queue.push(torch.cat(keys), applied)

    def compare(self, query: Tokens, key: Tokens) -> StepOutput:
        loss, k = self.compare_images(query, key)
        self.new_keys.append((k,))
        return StepOutput(loss, {}, [])

    def compare_images(self, query: Tokens, key: Tokens) -> tuple[Tensor, Tensor]:
        """(MoCo, eq. 1; the keys k [B,d] of the images)."""
        q = unit(self.student.projector(self.feature(query)))
        with torch.no_grad():
            k = unit(self.key.projector(self.feature(key)))
        return self.info_nce(q, k, self.queue.rows), k
