"""The same model and step written as the paper's and the published code's text says: what `benchmark step` measures beside
ours, and what ours is held equal to. Nothing trains with this.

An N x N mask in every block; reference tokens of every pair, self pairs too, through backbone and heads; all logits at
once; a loop over pairs; gradients clipped, teacher averaged and loss read one tensor after the other.
Token order [CLS], reference tokens, patches. Letters: n images, R reference tokens, N patches.
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


def mask(patches: int, references: int, mode: str, device: torch.device) -> Tensor | None:
    """[length, length], 0 where a query (row) may see a key (column), else -inf."""
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


def backbone(network: Any, images: Tensor, points: Tensor | None, mode: str) -> tuple[Tensor, Tensor | None]:
    """[CLS] [n,D] and reference tokens [n,R,D]."""
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
        read = F.grid_sample(table, points[:, None] * 2 - 1, mode="bicubic", align_corners=False)
        tokens.insert(1, read[:, :, 0].transpose(1, 2))
    x = torch.cat(tokens, 1)
    allowed = mask(h * w, references, mode, x.device)
    block: Any
    for block in vit.blocks:
        n, length, width = x.shape
        qkv = block.attn.qkv(block.norm1(x)).reshape(n, length, 3, vit.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scores = (q @ k.transpose(-2, -1)) * (width // vit.heads) ** -0.5
        if allowed is not None:
            scores = scores + allowed
        x = x + block.drop_path1(block.attn.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, length, width)))
        x = x + block.drop_path2(block.mlp(block.norm2(x)))
    x = vit.norm(x)
    return x[:, 0], x[:, 1 : 1 + references] if references else None


class Literal:
    """A step on a DenseDINO's own weights. Plain views of one size (what is timed)."""

    def __init__(self, model: Any, schedules: Schedules, clip: float):
        self.model, self.schedules, self.clip = model, schedules, clip
        self.optimizer = torch.optim.AdamW(model.parameter_groups())

    def losses(self, batch: Batch, temperature: float) -> tuple[Tensor, Tensor, Tensor | None]:
        """(total loss, teacher's [CLS] logits, teacher's reference logits)."""
        m = self.model
        images = batch.views[0]  # [V,B,3,S,S]
        views, size = images.shape[:2]
        points = batch.view_points if m.points else None

        def see(network: Any, count: int, role: int) -> tuple[Tensor, Tensor | None]:
            read = None
            if points is not None:
                seen = points[..., role, :]  # [B,T,V,M,2]
                of_view = [(seen[:, v] if role == 0 else seen[:, :, v]).flatten(1, 2) for v in range(count)]
                read = torch.cat(of_view)  # [count*B, slots*M, 2]
            mode = m.reference.attention if m.points else "none"
            cls, references = backbone(network, images[:count].flatten(0, 1), read, mode)
            logits = network.cls_head.logits(cls).unflatten(0, (count, size))
            if references is None:
                return logits, None
            of_points = network.point_head.logits(references)
            return logits, of_points.unflatten(1, (-1, m.points)).unflatten(0, (count, size))  # [count,B,slots,M,K]

        with torch.no_grad():
            t_cls, t_ref = see(m.teacher, TEACHERS, 0)
        s_cls, s_ref = see(m.student, views, 1)
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

    def step(self, batch: Batch, step: int, dtype: torch.dtype) -> float:
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
        for name, p in m.student.named_parameters():
            if p.grad is not None:
                parts = [p.grad[:, :1], p.grad[:, 1:]] if m.points and name.endswith("pos_embed") else [p.grad]
                for grad in parts:
                    factor = self.clip / (grad.norm(2) + 1e-6)
                    if factor < 1:
                        grad.mul_(factor)
        if schedules.frozen[step]:
            for name, p in m.student.named_parameters():
                if "last_layer" in name:
                    p.grad = None
        self.optimizer.step()
        with torch.no_grad():
            momentum = schedules.teacher_momentum[step]
            for s, t in zip(m.student.parameters(), m.teacher.parameters(), strict=True):
                t.mul_(momentum).add_((1 - momentum) * s.detach())
            keep = m.loss.center_momentum
            m.cls_center.copy_(m.cls_center * keep + t_cls.float().mean((0, 1)) * (1 - keep))
            if t_ref is not None:
                of_pairs = torch.stack([t_ref[t][:, v] for t, v in m.reference_pairs])
                m.reference_center.copy_(m.reference_center * keep + of_pairs.float().mean((0, 1, 2)) * (1 - keep))
        return loss.item()
