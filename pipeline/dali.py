"""NVIDIA DALI: the plan -> bytes -> decode once -> cut every window -> uint8 views, on a GPU or on the CPU.

Worker processes read the bytes that the plan names (external_source, so that the order is the plan's and a restart is
exact); the decoder and one region-of-interest resize for each view run on the device; a flip is a region whose ends are
exchanged. Views leave by DLPack, without a copy on the host.
"""

import multiprocessing
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types

from pipeline import wds
from pipeline.batch import Batch, draw_for, size_groups
from pipeline.shards import Plan, Shards
from runtime.config import Config
from runtime.mistake import Mistake


class _Source:
    """What a reading process gives DALI for iteration i: the bytes and regions of step start + i. Travels by pickling."""

    def __init__(self, config: Config, shards: Shards, plan: Plan, rank: int, world: int, start: int, stop: int):
        self.config, self.shards, self.plan = config, shards, plan
        self.rank, self.world, self.start, self.stop = rank, world, start, stop
        self.serving = False

    def __call__(self, iteration: int) -> tuple[list[NDArray], list[NDArray], list[NDArray]]:
        """([bytes], [regions float32 [V,2(start,end),2(y,x)]], [row int64 [1]]) for each image of this rank."""
        if not self.serving and multiprocessing.parent_process() is not None:  # in a reading process, once
            wds.serve_the_trainer()
            self.serving = True
        step = self.start + iteration
        if step >= self.stop:
            raise StopIteration
        ids = self.plan.samples_of(step, self.rank, self.world)
        rows, photos = ids.copy(), []
        try:
            self.shards.prefetch(self.plan, step, self.rank, self.world)
            for i, sample in enumerate(ids):
                rows[i], photo = self.plan.sound(self.shards, int(sample), step)
                photos.append(np.frombuffer(photo, np.uint8))
        except Mistake:  # told by the main process, which meets it on its own way (see `read`)
            rows[:], photos = -1, [np.zeros(1, np.uint8)] * len(ids)
        windows = draw_for(self.config, self.shards, self.plan, step, ids, np.maximum(rows, 0)).windows
        regions = np.ascontiguousarray(windows[..., [1, 0, 3, 2]].reshape(*windows.shape[:2], 2, 2), np.float32)
        return photos, list(regions), list(rows[:, None])


@pipeline_def
def _views(source: _Source, device: str, config: Config):
    """The graph: bytes -> one decoded image -> for each size a stack of views [Vg,S,S,3] uint8; and the rows read."""
    parallel: dict[str, Any] = (
        {"parallel": True, "prefetch_queue_depth": config.speed.prefetch} if config.speed.workers else {}
    )
    photos, regions, rows = fn.external_source(source, num_outputs=3, batch=True, **parallel)
    hints = source.shards.manifest.get("photos", {})
    gpu = {}
    if device == "gpu":
        gpu = {
            "hw_decoder_load": config.speed.hw_decoder_load,
            "preallocate_width_hint": hints.get("max_width", 0),
            "preallocate_height_hint": hints.get("max_height", 0),
            "jpeg_fancy_upsampling": True,  # chroma as the CPU's libjpeg-turbo makes it
        }
    images = fn.decoders.image(
        photos,
        device="mixed" if device == "gpu" else "cpu",
        output_type=types.DALIImageType.RGB,
        adjust_orientation=False,  # the index's sizes are those before any rotation
        **gpu,
    )
    out = []
    for size, group in size_groups(config):
        cut = [
            fn.resize(
                images,
                size=(size, size),
                roi_start=regions[v, 0],
                roi_end=regions[v, 1],
                interp_type=types.DALIInterpType.INTERP_CUBIC,
                antialias=True,
            )
            for v in range(group.start, group.stop)
        ]
        out.append(fn.stack(*cut))  # type: ignore[arg-type]
    return (*out, fn.copy(rows))


def read(
    config: Config,
    shards: Shards,
    plan: Plan,
    *,
    start: int,
    stop: int,
    rank: int = 0,
    world: int = 1,
    device_id: int | None = None,
) -> Iterator[Batch]:
    """This rank's batches of the global steps start..stop-1, in order; on GPU `device_id`, or (None) on the CPU.

    A batch in which DALI's decoder refuses a photo is made once more by the WebDataset reader, whose decoder takes it (some
    WebP files) or replaces that photo.
    """
    source = _Source(config, shards, plan, rank, world, start, stop)
    batch = len(plan.samples_of(start, rank, world)) if start < stop else 1
    pipe = _views(
        source,
        "cpu" if device_id is None else "gpu",
        config,
        batch_size=batch,
        num_threads=config.speed.threads,
        device_id=device_id,
        py_num_workers=max(1, config.speed.workers),
        py_start_method="spawn",
        prefetch_queue_depth=config.speed.prefetch,
    )
    pipe.build()
    told = False
    again = wds.Stages(config, shards, plan, rank, world)
    for step in range(start, stop):
        stream = torch.cuda.current_stream() if device_id is not None else None
        try:
            *views, rows = (torch.from_dlpack(out.as_tensor()) for out in pipe.run(stream))
        except RuntimeError as error:  # the decoder's word on a photo whose bytes are as they were written, or worse
            item = again.batch(step)
            if isinstance(item, Mistake):
                raise item from None
            if torch.equal(item.ids, item.rows):
                if "decoders.image" not in str(error):  # no photo was to blame
                    raise error
                if not told:
                    why = " ".join(str(error).partition("encountered:")[2].split())
                    print(f"step {step}: a photo that only DALI refuses ({why}); its batch, and others like it, come from "
                          "the WebDataset reader, which is slower", file=sys.stderr)  # fmt: skip
                told = True
            yield item
            continue
        ids = plan.samples_of(step, rank, world)
        rows = rows.cpu().flatten()
        draws = draw_for(config, shards, plan, step, ids, rows.numpy())
        yield Batch(step, torch.from_numpy(ids), rows.clone(), views, **draws.tensors())
