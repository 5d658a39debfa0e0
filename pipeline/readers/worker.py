"""What readers share: how a worker process lives, how it makes a batch, and how a view is cut from an image.

Letters: B images of this process, V views, Vg views of one size.
"""

import faulthandler
import signal
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.batch import Batch, draw_for, size_groups
from pipeline.decode import DecodeError, decode
from pipeline.mixture import AnyShards
from pipeline.plan import Plan
from runtime.child import end_with_parent
from runtime.config import Config
from runtime.errors import UserError

# the operators behind F.interpolate(antialias=True), by data.interpolation
RESIZE = {"bicubic": torch.ops.aten._upsample_bicubic2d_aa, "bilinear": torch.ops.aten._upsample_bilinear2d_aa}


def init_worker(_worker: int = 0) -> None:
    """Let this worker process end with the trainer, neither before nor after it.

    Ctrl-C and torchrun's SIGTERM reach the whole process group, but the trainer has a checkpoint to save first, so both are
    ignored here. A thread ends this process when the trainer is killed. SIGABRT prints the stacks (runtime/watchdog.py).
    """
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent()


def crop_resize(
    image: Tensor, window: NDArray[np.int32], size: int, out: Tensor | None = None, interpolation: str = "bicubic"
) -> Tensor:
    """A view uint8 [size,size,3] of an image [3,H,W]: the signed window, resized antialiased, flipped if x0 > x1.

    out: where to write it. The operator behind F.interpolate writes there directly: 0.6 ms for a photo's four views instead
    of 1.06 ms through a tensor of its own (docs/lab/2026-11.md).
    """
    x0, y0, x1, y1 = window.tolist()
    view = torch.empty(size, size, 3, dtype=torch.uint8) if out is None else out
    crop = image[None, :, y0:y1, min(x0, x1) : max(x0, x1)]
    if x0 > x1:  # before resizing, which copies a crop in any case; equal to the last bit (tests/test_reader.py)
        crop = crop.flip(3).contiguous(memory_format=torch.channels_last)  # as `decode` leaves an image: no second copy
    RESIZE[interpolation].out(crop, [size, size], False, None, None, out=view.permute(2, 0, 1)[None])
    return view


class Fetched(NamedTuple):
    """The bytes of a batch, and whose they are."""

    step: int
    ids: NDArray[np.int64]  # [B] planned
    passes: NDArray[np.int64]  # [B] of the planned samples, see Plan.passes_of
    rows: NDArray[np.int64]  # [B] read: another sample where the planned one is damaged
    photos: list[bytes]


class BatchBuilder:
    """Makes this process's batch of a step on the CPU. Worker processes get it by pickling config, shards and plan."""

    def __init__(self, config: Config, shards: AnyShards, plan: Plan, rank: int, world_size: int):
        self.config, self.shards, self.plan, self.rank, self.world_size = config, shards, plan, rank, world_size

    def batch(self, step: int) -> Batch | UserError:
        """The batch, or the UserError as a value: raised in a worker, it would be printed with the worker's traceback."""
        try:
            return self.views(self.fetch(step))
        except UserError as error:
            return error

    def fetch(self, step: int) -> Fetched:
        """Read the photos of a step; damaged ones are replaced."""
        ids = self.plan.samples_of(step, self.rank, self.world_size)
        self.plan.prefetch(self.shards, step, self.rank, self.world_size)
        rows, photos = ids.copy(), []
        for i, sample in enumerate(ids):
            rows[i], photo = self.plan.read_valid(self.shards, int(sample), step)
            photos.append(photo)
        return Fetched(step, ids, self.plan.passes_of(step, self.rank, self.world_size), rows, photos)

    def views(self, fetched: Fetched) -> Batch:
        """Decode each photo once, and cut all its views."""
        step, ids, passes, rows, photos = fetched
        draws = draw_for(self.config, self.shards, passes, ids, rows)
        groups = size_groups(self.config)
        views = [torch.empty(len(ids), g.stop - g.start, size, size, 3, dtype=torch.uint8) for size, g in groups]
        for i, photo in enumerate(photos):
            attempt = 0
            while True:
                try:
                    image = decode(photo)  # of the index's size: `read_valid` has compared the header with it
                    break
                except DecodeError:  # valid bytes that the decoder refuses count as damaged too
                    attempt += 1
                rows[i], photo = self.plan.read_valid(self.shards, int(ids[i]), step, attempt)
                one = slice(i, i + 1)
                again = draw_for(self.config, self.shards, passes[one], ids[one], rows[one])
                draws.windows[i], draws.view_points[i] = again.windows[0], again.view_points[0]
            for (size, group), out in zip(groups, views, strict=True):
                for place, v in enumerate(range(group.start, group.stop)):
                    crop_resize(image, draws.windows[i, v], size, out[i, place], self.config.data.interpolation)
        return Batch(step, torch.from_numpy(ids), torch.from_numpy(rows), views, **draws.tensors())
