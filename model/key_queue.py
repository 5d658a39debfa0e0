"""MoCo's queue: the keys of earlier steps, which are the negatives of this one (He et al. 2020, section 3.2).

Letters: L rows of the queue, n new rows, d width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.distributed import gather_rows


class KeyQueue(nn.Module):
    """Buffers: `rows` [L,d], equal on all processes; `pointer`, where the next rows go. At first the rows are random unit
    vectors, as published."""

    rows: Tensor
    pointer: Tensor

    def __init__(self, length: int, width: int):
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(length, width), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, rows: Tensor, applied: Tensor) -> None:
        """Replace the oldest rows by the new ones [n,d] of each process, in the order of the global batch. applied: 0-dim, 0
        if nothing may change."""
        rows = gather_rows(rows.to(self.rows.dtype))
        length = len(self.rows)
        places = (self.pointer + torch.arange(len(rows), device=rows.device)) % length
        self.rows.index_copy_(0, places, torch.where(applied > 0, rows, self.rows[places]))
        self.pointer.copy_(torch.where(applied > 0, (self.pointer + len(rows)) % length, self.pointer))
