"""The optimizer, its parameter groups, and every schedule as an array over steps (DINO, section "Implementation details").

Durations given in epochs become steps here, once; `Schedules` can be printed, plotted and tested.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from runtime.config import Config, Optim

BLOCK = re.compile(r"backbone\.blocks\.(\d+)\.")
EMBEDDING = re.compile(r"backbone\.(patch_embed|pos_embed|cls_token|reg_token|norm_pre)")


@dataclass
class Schedules:
    """Values that change over the steps, each [steps]."""

    lr: NDArray[np.float64]
    weight_decay: NDArray[np.float64]
    teacher_momentum: NDArray[np.float64]
    teacher_temperature: NDArray[np.float64]
    frozen: NDArray[np.bool_]  # whether the last layers are frozen
    queue: NDArray[np.bool_]  # whether the queues of clustering are filled and used

    def __len__(self) -> int:
        return len(self.lr)

    def at(self, step: int) -> "StepValues":
        """The values of one step."""
        return StepValues(
            step, float(self.lr[step]), float(self.weight_decay[step]), float(self.teacher_momentum[step]),
            float(self.teacher_temperature[step]), bool(self.frozen[step]), bool(self.queue[step]),
        )  # fmt: skip


@dataclass(frozen=True)
class StepValues:
    """The schedules' values at one step; fields as in `Schedules`."""

    step: int = 0
    lr: float = 0.0
    weight_decay: float = 0.0
    teacher_momentum: float = 0.996
    teacher_temperature: float = 0.04
    frozen: bool = False
    queue: bool = True


def cosine(start: float, end: float, steps: int) -> NDArray[np.float64]:
    """Half a cosine from `start` to `end`, which the step after the last one would reach. [steps]"""
    return end + 0.5 * (start - end) * (1 + np.cos(np.pi * np.arange(steps) / max(1, steps)))


def make_schedules(config: Config, steps_per_epoch: int) -> Schedules:
    """The schedules of a run of optim.epochs epochs of `steps_per_epoch` steps each."""
    o, loss = config.optim, config.loss
    steps = config.steps(steps_per_epoch)
    peak = o.lr * o.global_batch_size / 256
    warmup = min(round(o.warmup_epochs * steps_per_epoch), steps)
    lr = np.concatenate([np.linspace(0, peak, warmup), cosine(peak, o.min_lr, steps - warmup)])
    # indexed by the epoch, as published: it changes between epochs, and the last warm-up epoch has the final value
    start, final = loss.teacher_temperature
    warm_epochs = round(loss.teacher_temperature_warmup)
    epoch = np.arange(steps) // steps_per_epoch
    warm = np.append(np.linspace(start, final, warm_epochs), final)
    return Schedules(
        lr=lr,
        weight_decay=cosine(*o.weight_decay, steps),
        teacher_momentum=cosine(o.teacher_momentum, 1.0, steps),
        teacher_temperature=warm[np.minimum(epoch, warm_epochs)],
        frozen=np.arange(steps) < round(o.freeze_last_layer_epochs * steps_per_epoch),
        queue=np.arange(steps) >= round(config.clustering.queue_start_epochs * steps_per_epoch),
    )


def describe_change(before: Schedules, after: Schedules, step: int) -> str:
    """How the schedules of a run that resumes at `step` (one or more) differ from those that it had, for the log; "" if they
    do not. The jump of a value is from the last step done to the next one."""
    fields = ("lr", "weight_decay", "teacher_momentum", "teacher_temperature", "frozen", "queue")
    if len(before) == len(after) and all(
        np.array_equal(getattr(before, n)[step:], getattr(after, n)[step:]) for n in fields
    ):
        return ""
    if step >= len(after):
        return f"the schedules change: {len(before)} steps -> {len(after)} steps, and {step} are done"
    last, following = before.at(min(step, len(before)) - 1), after.at(step)
    jumps = [f"learning rate {last.lr:.2e} -> {following.lr:.2e}"]
    if last.weight_decay != following.weight_decay:
        jumps.append(f"weight decay {last.weight_decay:.4g} -> {following.weight_decay:.4g}")
    jumps.append(f"teacher momentum {last.teacher_momentum:.5f} -> {following.teacher_momentum:.5f}")
    stretch = "stretched" if len(after) > len(before) else "shortened"
    length = f"{len(before)} steps -> {len(after)} steps, and every cosine is {stretch} to the new length; "
    return (
        f"the schedules change at step {step}: {length if len(before) != len(after) else ''}from the last step to the next: "
        f"{', '.join(jumps)}"
    )


def decay_groups(model: nn.Module, lr_factor: float = 1.0) -> list[dict[str, Any]]:
    """Two groups of the trained parameters: weight decay for matrices and tokens, none for biases and norms (published).
    lr_factor: of their learning rate, over that of the schedule."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    plain = {n for n, p in trained if p.ndim == 1 or n.endswith(".bias")}
    return [
        {"params": [p for n, p in trained if n not in plain], "lr_factor": lr_factor, "decays": True},
        {"params": [p for n, p in trained if n in plain], "lr_factor": lr_factor, "decays": False, "weight_decay": 0.0},
    ]


def with_layer_decay(groups: list[dict[str, Any]], student: nn.Module, decay: float) -> list[dict[str, Any]]:
    """The groups, each split by layer: a parameter's rate has the factor decay^(depth + 1 - layer) (BEiT, Bao et al. 2022).

    The embedding of patches, its tokens and positions are layer 0, block i is layer i + 1, all else is layer depth + 1.
    """
    if decay == 1:
        return groups
    blocks = {name: int(found[1]) for name, _ in student.named_parameters() if (found := BLOCK.match(name))}
    top = 2 + max(blocks.values(), default=-1)
    layers = {
        p: blocks[name] + 1 if name in blocks else 0 if EMBEDDING.match(name) else top
        for name, p in student.named_parameters()
    }
    split = []
    for group in groups:
        for layer in sorted({layers[p] for p in group["params"]}):
            own = [p for p in group["params"] if layers[p] == layer]
            factor = group.get("lr_factor", 1.0) * decay ** (top - layer)
            split.append(group | {"params": own, "lr_factor": factor})
    return split


class Optimizer:
    """AdamW with the rest of the published step: schedules, clipping per tensor, a last layer that is frozen at first.

    student: its parameters are trained. clip: the largest norm of a gradient tensor, 0: no clipping. groups:
    `Method.parameter_groups`. split_positions: the position embedding is clipped as two tensors, [CLS]'s with the registers'
    and the patches' (`Method.clip_positions_apart`), where it has both. layer_decay: see `with_layer_decay`.
    """

    def __init__(
        self, student: nn.Module, clip: float, *, groups: list[dict[str, Any]] | None = None,
        split_positions: bool = False, layer_decay: float = 1.0,
    ):  # fmt: skip
        self.clip = clip
        vits: list[Any] = [m for m in student.modules() if split_positions and getattr(m, "front_positions", None)]
        self.positions = [(vit.pos_embed, vit.front_positions) for vit in vits]
        groups = with_layer_decay(groups or decay_groups(student), student, layer_decay)
        self.adamw = torch.optim.AdamW(groups, fused=True)
        self.trained = [p for p in student.parameters() if p.requires_grad]
        self.last_layers = [p for n, p in student.named_parameters() if "last_layer" in n and p.requires_grad]

    @classmethod
    def of(cls, method: Any, optim: Optim) -> "Optimizer":
        """What trains a `Method`, with the values of the config's section `optim`."""
        return cls(
            method.student, optim.clip_grad, groups=method.parameter_groups(),
            split_positions=method.clip_positions_apart, layer_decay=optim.layer_decay,
        )  # fmt: skip

    @torch.no_grad()
    def step(
        self, at: StepValues, finite: torch.Tensor | None = None,
        before_update: Callable[[StepValues, torch.Tensor], None] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Clip, step with the schedules' values, clear the gradients.

        finite: 0-dim, 1 if the losses of all processes are finite, else 0. If they or a gradient are not, no bit of the
        parameters and moments changes. The host does not wait for the device. before_update: `Method.before_update`.
        Returns (1 if the step was applied, else 0; norm of all gradients before clipping), both 0-dim on the device.
        """
        for group in self.adamw.param_groups:
            group["lr"] = at.lr * group.get("lr_factor", 1.0)
            if group["decays"]:
                group["weight_decay"] = at.weight_decay
        norms = torch._foreach_norm(self._clipped())
        norm = torch.linalg.vector_norm(torch.stack(norms))
        applied = norm.isfinite().to(norm.dtype) * (1 if finite is None else finite.to(norm.dtype))
        if self.clip:
            clip_each(self._clipped(), norms, self.clip)
        if at.frozen:  # no decay and no Adam statistics either, as published
            for p in self.last_layers:
                p.grad = None
        if before_update:
            before_update(at, applied)
        self.adamw.grad_scale = None  # type: ignore[attr-defined]
        self.adamw.found_inf = (1 - applied).float()  # type: ignore[attr-defined]  # the fused kernel's own switch
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return applied, norm

    def _clipped(self) -> list[torch.Tensor]:
        """The gradient tensors that are clipped, each by its own norm."""
        unsplit = [p.grad for p in self.trained if p.grad is not None and all(p is not q for q, _ in self.positions)]
        parts = [part for p, n in self.positions if p.grad is not None for part in (p.grad[:, :n], p.grad[:, n:])]
        return unsplit + parts


def clip_each(grads: list[torch.Tensor], norms: Sequence[torch.Tensor], largest: float) -> None:
    """Scale each gradient whose own norm is above `largest` down to it, in place (as published: per tensor, not global)."""
    factors = (largest / (torch.stack(list(norms)) + 1e-6)).clamp(max=1.0)
    if factors.device.type == "cpu":  # most need no scaling, and reading the factors is free here
        long = [i for i, factor in enumerate(factors.tolist()) if factor != 1]
        grads, factors = [grads[i] for i in long], factors[long]
    if grads:
        torch._foreach_mul_(grads, list(factors.unbind()))
