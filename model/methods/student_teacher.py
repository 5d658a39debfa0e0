"""A student, its moving average as teacher, and the pairs of views that they are compared on.

Letters: B images, V views, Vg views of one size, T teacher views (the first of the V), M points of a pair (t, v), P pairs,
S pairs that one view has points for, D width.
"""

import itertools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from model.methods.base import Method
from model.vit import ViT
from pipeline.batch import Batch
from runtime.config import TEACHERS, Config

TEACHER, STUDENT = 0, 1  # places in Batch.view_points
Pair = tuple[int, int]  # (t, v): teacher view t, student view v


class Network(nn.Module):
    """A backbone and its heads: what the student and the teacher each are."""

    backbone: ViT


class StudentTeacher(Method):
    """Two networks of one architecture; the teacher begins as the student's copy and follows it."""

    student: Network
    teacher: Network

    def __init__(self, config: Config, new_network: Callable[[float], Network]):
        """new_network: makes a network from its drop path rate; the teacher has none."""
        super().__init__()
        self.views, self.points = len(config.views), config.points
        self.student = new_network(config.model.drop_path)
        self.student.backbone.recompute = config.speed.activation_checkpointing
        self.teacher = new_network(0.0)
        self.teacher.load_state_dict(self.student.state_dict(), strict=False)  # the student may have a predictor more
        self.teacher.requires_grad_(False)

    @property
    def backbone(self) -> ViT:
        return self.teacher.backbone

    def compile_units(self) -> list[nn.Module]:
        return [unit for network in (self.student, self.teacher) for unit in network.children()]

    def pairs(self, views: str) -> list[Pair]:
        """(t, v), t != v: of all views, or ("teacher") of the teacher's alone."""
        last = self.views if views == "all" else TEACHERS
        return [(t, v) for t in range(TEACHERS) for v in range(last) if v != t]

    @torch.no_grad()
    def update_teacher(self, momentum: float, applied: Tensor | None = None) -> None:
        """theta_t <- momentum theta_t + (1 - momentum) theta_s. applied: 0-dim, 0 where nothing is to move."""
        names = dict(self.student.named_parameters())
        teacher: list[Tensor] = list(self.teacher.parameters())
        student: list[Tensor] = [names[name] for name, _ in self.teacher.named_parameters()]
        # student and teacher are finite: a weight of 0 leaves every value
        if applied is None or applied.device.type == "cpu":
            torch._foreach_lerp_(teacher, student, (1 - momentum) * (1.0 if applied is None else float(applied)))
        else:  # lerp takes no weight from the device but tensor by tensor; these are a few launches for all of them
            moves = torch._foreach_sub(student, teacher)
            torch._foreach_mul_(moves, (1 - momentum) * applied)
            torch._foreach_add_(teacher, moves)

    def encode_views(
        self, network: Network, batch: Batch, role: int, pairs: Iterable[Pair] = ()
    ) -> tuple[Tensor, dict[Pair, Tensor]]:
        """What a network makes of the views that its role sees: [CLS] [views,B,D], and for each of the pairs its reference
        tokens [B,M,D]; the teacher has those of (t, v) in view t, the student in view v."""
        view_points = batch.view_points[..., role, :]  # [B,T,V,M,2]
        cls: list[Tensor] = []
        tokens: dict[Pair, Tensor] = {}
        first = 0
        for images in batch.views:  # [Vg,B,3,H,W]: views of one size go through in one batch
            views = range(first, first + len(images))
            first += len(images)
            if role == TEACHER:
                views = range(views.start, min(views.stop, TEACHERS))
            if not views:
                continue
            images = images[: len(views)]
            runs = group_by_count(pairs, views, role)
            points = []
            for run in runs:
                of_run = torch.stack(
                    [view_points[:, t, v] for of_view in run for t, v in of_view]
                )  # [len(run)*S,B,M,2]
                of_run = of_run.unflatten(0, (len(run), -1)).transpose(1, 2)  # [len(run),B,S,M,2]
                points.append(of_run.flatten(2, 3).flatten(0, 1))  # [len(run)*B,S*M,2]
            c, _, read = network.backbone(images.flatten(0, 1), points, patches_too=False)
            cls.append(c.unflatten(0, images.shape[:2]))
            for run, r in zip(runs, read, strict=True):
                r = r.unflatten(1, (-1, self.points)).unflatten(0, (len(run), -1))  # [len(run),B,S,M,D]
                tokens |= {pair: r[i, :, s] for i, of_view in enumerate(run) for s, pair in enumerate(of_view)}
        return torch.cat(cls), tokens


def group_by_count(pairs: Iterable[Pair], views: range, role: int) -> list[list[list[Pair]]]:
    """The pairs of each of these views, for runs of views with equally many: a run is one call of the backbone."""
    of_views = [[(t, v) for t, v in sorted(pairs) if (t if role == TEACHER else v) == view] for view in views]
    # views without points, if any, are the student's alone and come last: they make no run
    return [list(run) for of_view, run in itertools.groupby(of_views, key=len) if of_view]


def stack_pairs(tokens: dict[Pair, Tensor], pairs: list[Pair]) -> Tensor:
    """[P,B,M,D]"""
    return torch.stack([tokens[pair] for pair in pairs])
