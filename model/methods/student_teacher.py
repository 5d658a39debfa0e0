"""A student network, its moving average as the teacher, and the pairs of views on which they are compared.

Letters: B images, V views, Vg views of one size, T teacher views (the first of the V), M points of a pair (t, v), P pairs,
S pairs whose points lie in one view, G views of one group, D width.
"""

import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from model import drop_path
from model.methods.base import Method
from model.vit import ViT
from pipeline.batch import Batch
from runtime.config import TEACHERS, Config

TEACHER, STUDENT = 0, 1  # indices into Batch.view_points
Pair = tuple[int, int]  # (t, v): teacher view t, student view v


class Network(nn.Module):
    """A backbone and its heads: the architecture of both student and teacher."""

    backbone: ViT


class StudentTeacher(Method):
    """Two networks of one architecture. The teacher starts as a copy of the student and follows it by EMA."""

    student: Network
    teacher: Network

    def __init__(self, config: Config, new_network: Callable[[float], Network]):
        """new_network: builds a network from its drop path rate; the teacher has none."""
        super().__init__()
        self.seed, self.drop_path = config.seed, config.model.drop_path
        self.views, self.points = len(config.views), config.reference.points if self.uses_points else 0
        self.student = new_network(config.model.drop_path)
        self.student.backbone.activation_checkpointing = config.speed.activation_checkpointing
        self.teacher = new_network(0.0)
        self.teacher.load_state_dict(self.student.state_dict(), strict=False)  # the student may also have a predictor
        self.teacher.requires_grad_(False)

    def networks(self) -> dict[str, nn.Module]:
        return {"student": self.student, "teacher": self.teacher}

    def compile_units(self) -> list[nn.Module]:
        return [unit for network in self.networks().values() for unit in network.children()]

    def pairs(self, views: str) -> list[Pair]:
        """(t, v), t != v. views: "all", or "teacher" for v among the teacher views only."""
        last = self.views if views == "all" else TEACHERS
        return [(t, v) for t in range(TEACHERS) for v in range(last) if v != t]

    def update_teacher(self, momentum: float, applied: Tensor | None = None) -> None:
        """theta_t <- momentum theta_t + (1 - momentum) theta_s. applied: 0-dim, 0 if nothing may change."""
        update_average(self.teacher, self.student, momentum, applied)

    def encode_views(
        self, network: Network, batch: Batch, role: int, pairs: Iterable[Pair] = ()
    ) -> tuple[Tensor, dict[Pair, Tensor]]:
        """Run a network on the views of its role (TEACHER: the first T; STUDENT: all).

        Returns [CLS] [views,B,D], and the reference tokens [B,M,D] of each given pair (t, v), which the teacher has in view
        t and the student in view v.
        """
        view_points = batch.view_points[..., role, :]  # [B,T,V,M,2]
        drops = role == STUDENT and self.drop_path > 0
        shape = (self.views, len(network.backbone.blocks), 2)
        draws = drop_path.draw(self.seed, batch.step, batch.ids, shape) if drops else None  # [B,V,depth,2]
        cls: list[Tensor] = []
        tokens: dict[Pair, Tensor] = {}
        first = 0
        for images in batch.views:  # [Vg,B,3,H,W]: views of one size are one batch of the backbone
            views = range(first, first + len(images))
            first += len(images)
            if role == TEACHER:
                views = range(views.start, min(views.stop, TEACHERS))
            if not views:
                continue
            images = images[: len(views)]
            groups = group_by_count(pairs, views, role)
            points = []
            for group in groups:
                group_points = torch.stack([view_points[:, t, v] for pairs_of_view in group for t, v in pairs_of_view])
                group_points = group_points.unflatten(0, (len(group), -1)).transpose(1, 2)  # [G*S,B,M,2] -> [G,B,S,M,2]
                points.append(group_points.flatten(2, 3).flatten(0, 1))  # [G*B,S*M,2]
            drop = None if draws is None else draws[:, views.start : views.stop].transpose(0, 1).flatten(0, 1)
            out = network.backbone(images.flatten(0, 1), points, want=("cls",), drop=drop)
            cls.append(out.cls.unflatten(0, images.shape[:2]))
            for group, r in zip(groups, out.references, strict=True):
                r = r.unflatten(1, (-1, self.points)).unflatten(0, (len(group), -1))  # [G,B,S,M,D]
                tokens |= {pair: r[g, :, s] for g, of_view in enumerate(group) for s, pair in enumerate(of_view)}
        return torch.cat(cls), tokens


@torch.no_grad()
def update_average(average: Network, network: Network, momentum: float, applied: Tensor | None = None) -> None:
    """The parameters of a moving average: a <- momentum a + (1 - momentum) p, each with the network's of the same name.
    applied: 0-dim, 0 if nothing may change."""
    of_network = dict(network.named_parameters())
    averages: list[Tensor] = list(average.parameters())
    parameters: list[Tensor] = [of_network[name] for name, _ in average.named_parameters()]
    # both networks are finite: a weight of 0 leaves every value unchanged
    if applied is None or applied.device.type == "cpu":
        torch._foreach_lerp_(averages, parameters, (1 - momentum) * (1.0 if applied is None else float(applied)))
    else:  # lerp accepts a weight on the device only tensor by tensor; these are a few launches for all tensors
        changes = torch._foreach_sub(parameters, averages)
        torch._foreach_mul_(changes, (1 - momentum) * applied)
        torch._foreach_add_(averages, changes)


def group_by_count(pairs: Iterable[Pair], views: range, role: int) -> list[list[list[Pair]]]:
    """The pairs whose points lie in each of these views, for groups of consecutive views with equally many pairs: a group's
    points are one tensor."""
    of_views = [[(t, v) for t, v in sorted(pairs) if (t if role == TEACHER else v) == view] for view in views]
    # views without points, if any, are seen by the student only and come last: they form no group
    return [list(group) for of_view, group in itertools.groupby(of_views, key=len) if of_view]


def stack_pairs(tokens: dict[Pair, Tensor], pairs: list[Pair]) -> Tensor:
    """The tokens of some pairs, [P,B,M,D]."""
    return torch.stack([tokens[pair] for pair in pairs])
