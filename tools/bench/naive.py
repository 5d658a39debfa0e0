"""The naive implementation: model and step as the paper and the published code have them. For benchmarks and tests only.

An N x N mask in every block; reference tokens of every pair, self pairs too, through backbone and heads; all logits at
once; a loop over pairs; gradients clipped, teacher averaged and loss read one tensor after the other. `python -m
tools.bench step` measures our implementation beside it, and tests/test_losses.py compares the losses of both.

Token order [CLS], reference tokens, patches. n images · R reference tokens · N patches · D width · V views, the first T of
them the teacher's · B images of a batch · M points of a pair · K prototypes · S side of a view, pixels.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.reference import resize_grid
from pipeline.batch import Batch
from runtime.config import TEACHERS
from runtime.schedule import Schedules


def attention_mask(patches: int, references: int, mode: str, device: torch.device) -> Tensor | None:
    """[length, length], length = 1 + R + N: 0 where a query (row) may attend to a key (column), else -inf. None: no mask."""
    if mode == "none" or not references:
        return None
    first = 1 + references
    blocked = torch.zeros(first + patches, first + patches, dtype=torch.bool, device=device)
    blocked[:, 1:first] = True
    if mode in ("patches", "patches+self"):
        blocked[1:first, 0] = True
    if mode == "patches+self":
        blocked.fill_diagonal_(False)
    return torch.zeros(blocked.shape, device=device).masked_fill(blocked, -math.inf)


def forward_backbone(network: Any, images: Tensor, points: Tensor | None, mode: str) -> tuple[Tensor, Tensor | None]:
    """images [n,3,S,S], points [n,R,2] -> [CLS] [n,D] and reference tokens [n,R,D] after the final norm."""
    vit = network.backbone
    side = vit.image_size // vit.patch
    grid = vit.pos_embed[0, 1:].unflatten(0, (side, side))
    patches = vit.patch_embed.proj(images)
    h, w = patches.shape[-2:]
    patches = patches.flatten(2).transpose(1, 2) + resize_grid(grid, h, w).flatten(0, 1)
    cls = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(images), -1, -1)
    tokens, references = [cls, patches], 0
    if points is not None:
        references = points.shape[1]
        table = grid.permute(2, 0, 1)[None].expand(len(points), -1, -1, -1)
        embedded = F.grid_sample(table, points[:, None] * 2 - 1, mode="bicubic", align_corners=False)
        tokens.insert(1, embedded[:, :, 0].transpose(1, 2))
    x = torch.cat(tokens, 1)
    mask = attention_mask(h * w, references, mode, x.device)
    block: Any
    for block in vit.blocks:
        n, length, width = x.shape
        qkv = block.attn.qkv(block.norm1(x)).reshape(n, length, 3, vit.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scores = (q @ k.transpose(-2, -1)) * (width // vit.heads) ** -0.5
        if mask is not None:
            scores = scores + mask
        x = x + block.drop_path1(block.attn.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, length, width)))
        x = x + block.drop_path2(block.mlp(block.norm2(x)))
    x = vit.norm(x)
    return x[:, 0], x[:, 1 : 1 + references] if references else None


class NaiveStep:
    """Losses and training step on the weights of a DINO or DenseDINO. All views must have one size."""

    def __init__(self, model: Any, schedules: Schedules, clip: float):
        self.model, self.schedules, self.clip = model, schedules, clip
        self.optimizer = torch.optim.AdamW(model.parameter_groups())

    def losses(self, batch: Batch, temperature: float) -> tuple[Tensor, Tensor, Tensor | None]:
        """(loss, the teacher's [CLS] logits [T,B,K], the teacher's reference logits [T,B,V,M,K])."""
        m = self.model
        views = len(batch.views[0])
        with torch.no_grad():
            t_cls, t_ref = self._logits(m.teacher, batch, TEACHERS, 0)
        s_cls, s_ref = self._logits(m.student, batch, views, 1)
        tau = m.loss.student_temperature
        total, terms = s_cls.new_zeros(()), 0
        targets = ((t_cls - m.cls_center) / temperature).softmax(-1)
        for t in range(TEACHERS):
            for v in range(views):
                if v != t:
                    total = total + (-targets[t] * F.log_softmax(s_cls[v] / tau, -1)).sum(-1).mean()
                    terms += 1
        loss = total / terms
        if s_ref is not None and t_ref is not None:
            total, terms = s_cls.new_zeros(()), 0
            targets = ((t_ref - m.reference_center) / temperature).softmax(-1)
            students = s_ref / tau
            for t in range(TEACHERS):
                for v in range(views):
                    if v != t:
                        total = total + (-targets[t][:, v] * F.log_softmax(students[v][:, t], -1)).sum(-1).mean()
                        terms += 1
            loss = m.alpha * loss + (1 - m.alpha) * total / terms
        return loss, t_cls, t_ref

    def _logits(self, network: Any, batch: Batch, count: int, role: int) -> tuple[Tensor, Tensor | None]:
        """Logits of the first `count` views: [CLS] [count,B,K], reference tokens [count,B,slots,M,K]. role: 0 for the
        teacher, 1 for the student; a slot is a pair of views."""
        m = self.model
        images = batch.views[0]  # [V,B,3,S,S]
        size = images.shape[1]
        points = None
        if m.points:
            view_points = batch.view_points[..., role, :]  # [B,T,V,M,2]
            of_view = [(view_points[:, v] if role == 0 else view_points[:, :, v]).flatten(1, 2) for v in range(count)]
            points = torch.cat(of_view)  # [count*B, slots*M, 2]
        mode = m.reference.attention if m.points else "none"
        cls, references = forward_backbone(network, images[:count].flatten(0, 1), points, mode)
        logits = network.cls_head.logits(cls).unflatten(0, (count, size))
        if references is None:
            return logits, None
        of_points = network.point_head.logits(references)
        return logits, of_points.unflatten(1, (-1, m.points)).unflatten(0, (count, size))

    def step(self, batch: Batch, step: int, dtype: torch.dtype) -> float:
        """One training step; returns the loss. Raises FloatingPointError if it is not finite."""
        m, schedules = self.model, self.schedules
        for i, group in enumerate(self.optimizer.param_groups):
            group["lr"] = schedules.lr[step]
            if i == 0:
                group["weight_decay"] = schedules.weight_decay[step]
        with torch.autocast(batch.views[0].device.type, dtype, enabled=dtype != torch.float32):
            loss, t_cls, t_ref = self.losses(batch, float(schedules.teacher_temperature[step]))
        if not math.isfinite(loss.item()):
            raise FloatingPointError(loss.item())
        self.optimizer.zero_grad()
        loss.backward()
        self._clip_gradients()
        if schedules.frozen[step]:
            for name, p in m.student.named_parameters():
                if "last_layer" in name:
                    p.grad = None
        self.optimizer.step()
        self._update_teacher(schedules.teacher_momentum[step], t_cls, t_ref)
        return loss.item()

    def _clip_gradients(self) -> None:
        for name, p in self.model.student.named_parameters():
            if p.grad is not None:
                split = self.model.points and name.endswith("pos_embed")
                for grad in [p.grad[:, :1], p.grad[:, 1:]] if split else [p.grad]:
                    factor = self.clip / (grad.norm(2) + 1e-6)
                    if factor < 1:
                        grad.mul_(factor)

    @torch.no_grad()
    def _update_teacher(self, momentum: float, t_cls: Tensor, t_ref: Tensor | None) -> None:
        m = self.model
        for s, t in zip(m.student.parameters(), m.teacher.parameters(), strict=True):
            t.mul_(momentum).add_((1 - momentum) * s.detach())
        center_momentum = m.loss.center_momentum
        m.cls_center.copy_(m.cls_center * center_momentum + t_cls.float().mean((0, 1)) * (1 - center_momentum))
        if t_ref is not None:
            mean = torch.stack([t_ref[t][:, v] for t, v in m.reference_pairs]).float().mean((0, 1, 2))
            m.reference_center.copy_(m.reference_center * center_momentum + mean * (1 - center_momentum))
