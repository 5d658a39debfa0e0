"""NVIDIA DALI: the plan -> bytes -> decode once -> crop and resize each view -> uint8 views, on a GPU or on the CPU.

Worker processes read the bytes that the plan names and make the draws (external_source: so the order is the plan's, and a
resumed run is exact). The decoder and one region-of-interest resize for each view run on the device; a flip is a region with
exchanged ends. Views leave by DLPack, without a copy on the host.

Letters: B images of this process, V views, T teacher views, M points of a pair.
"""

import multiprocessing
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import nvidia.dali
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types

from pipeline.batch import Batch, draw_for, size_groups
from pipeline.decode import for_dali
from pipeline.mixture import AnyShards
from pipeline.plan import Plan
from pipeline.readers.worker import BatchBuilder, init_worker
from runtime.config import Config
from runtime.errors import RunError, UserError

MIN_VERSION = "2.2"  # the first DALI whose decoder can ignore EXIF's rotation (adjust_orientation)
MAX_REFUSALS = 3  # batches in a row that the decoder refuses, then the pipeline is rebuilt

# What the source returns besides the photos and their regions, in this order: fields of a Batch
ARRAYS = ("step", "ids", "rows", "windows", "view_points", "color")

# Words of an error that the machine causes and not a photo. The numbers are nvImageCodec's, for failed allocation, execution
# and CUDA calls
MACHINE_ERROR = re.compile(r"cuda|driver|alloc|memory|nvImageCodec failure: '#(5|6|15|20|21)'", re.IGNORECASE)


RESIZE = {"bicubic": types.DALIInterpType.INTERP_CUBIC, "bilinear": types.DALIInterpType.INTERP_LINEAR}


def check_version() -> None:
    """Raise UserError if the installed DALI is older than MIN_VERSION."""
    installed = nvidia.dali.__version__
    if [int(n) for n in installed.split(".")[:2]] < [int(n) for n in MIN_VERSION.split(".")]:
        package = f"nvidia-dali-cuda{str(nvidia.dali.__cuda_version__)[:2]}0"
        raise UserError(
            f"speed.reader: dali needs DALI {MIN_VERSION} or later, but {installed} is installed: "
            f"pip install --upgrade '{package}>={MIN_VERSION}'"
        )


class _Source:
    """What a worker process gives DALI for iteration i: all of step start + i except the pixels. Picklable."""

    def __init__(
        self, config: Config, shards: AnyShards, plan: Plan, rank: int, world_size: int, start: int, stop: int
    ):
        self.config, self.shards, self.plan = config, shards, plan
        self.rank, self.world_size, self.start, self.stop = rank, world_size, start, stop
        self.initialized = False

    def __call__(self, iteration: int) -> tuple[list[NDArray] | NDArray, ...]:
        """B photos' bytes, and arrays of which [i] belongs to photo i: regions float32 [B,V,2(start,end),2(y,x)], the step
        int64 [B], and the other ARRAYS as in a Batch. Raises StopIteration after the last step.

        If no valid sample is left, rows are -1 and no photo can be decoded: a UserError raised here would be wrapped in a
        traceback of this process. The trainer raises the same UserError when it makes the batch itself (`_batches`).
        """
        if not self.initialized and multiprocessing.parent_process() is not None:  # once, in a worker process
            init_worker()
            self.initialized = True
        step = self.start + iteration
        if step >= self.stop:
            raise StopIteration
        ids = self.plan.samples_of(step, self.rank, self.world_size)
        rows, photos = ids.copy(), []
        try:
            self.plan.prefetch(self.shards, step, self.rank, self.world_size)
            for i, sample in enumerate(ids):
                rows[i], photo = self.plan.read_valid(self.shards, int(sample), step)
                photos.append(np.frombuffer(for_dali(photo), np.uint8))
        except UserError:
            rows[:], photos = -1, [np.zeros(1, np.uint8)] * len(ids)
        passes = self.plan.passes_of(step, self.rank, self.world_size)
        draws = draw_for(self.config, self.shards, passes, ids, np.maximum(rows, 0))
        regions = draws.windows[..., [1, 0, 3, 2]].reshape(*draws.windows.shape[:2], 2, 2).astype(np.float32)
        arrays = regions, np.full_like(ids, step), ids, rows, draws.windows, draws.view_points, draws.color
        return photos, *(np.ascontiguousarray(a) for a in arrays)  # DALI takes no strides


@pipeline_def
def _views(source: _Source, device: str, config: Config):
    """The graph: bytes -> one decoded image -> for each size a stack of views [Vg,S,S,3] uint8; and the source's arrays."""
    parallel: dict[str, Any] = {}
    if config.speed.workers:
        # A batch is one task. Each process has speed.prefetch of them, and DALI returns them in the order of the steps
        parallel = {"parallel": True, "prefetch_queue_depth": config.speed.prefetch * config.speed.workers}
    photos, regions, *arrays = fn.external_source(source, num_outputs=2 + len(ARRAYS), batch=True, **parallel)
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
        views = [
            fn.resize(
                images,
                size=(size, size),
                roi_start=regions[v, 0],
                roi_end=regions[v, 1],
                interp_type=RESIZE[config.data.interpolation],
                antialias=True,
            )
            for v in range(group.start, group.stop)
        ]
        out.append(fn.stack(*views))  # type: ignore[arg-type]
    # Without a copy the arrays may be in memory that a worker process writes its next batch into (DALI before 2.3)
    return (*out, *(fn.copy(a) for a in arrays))


class _Pipeline:
    """A DALI pipeline that is built when a batch is first needed, and again after `drop`."""

    def __init__(self, build: Callable[[int], nvidia.dali.Pipeline], device_id: int | None):
        self._build, self._device_id = build, device_id
        self._pipe: nvidia.dali.Pipeline | None = None

    def batch(self, step: int) -> Batch:
        """The batch of a step. Raises what DALI raises: RuntimeError or MemoryError.

        After an error DALI calls a pipeline "no longer valid", but it continues to run. So a pipeline that returns another
        step's batch is replaced by one that begins at this step.
        """
        batch = self._next(step)
        if batch is None:
            print(f"step {step}: DALI returned the batch of another step; its pipeline is rebuilt", file=sys.stderr)
            self.drop()
            batch = self._next(step)
        if batch is None:
            raise RuntimeError(f"step {step}: DALI returned the batch of another step, from a new pipeline too")
        return batch

    def drop(self) -> None:
        """End the pipeline and its worker processes."""
        self._pipe = None

    def _next(self, step: int) -> Batch | None:
        """The next batch, or None if it is not that of `step`."""
        if self._pipe is None:
            self._pipe = self._build(step)
        stream = torch.cuda.current_stream() if self._device_id is not None else None
        try:
            outputs: Any = self._pipe.run(stream)
        except StopIteration:
            return None
        views, arrays = outputs[: -len(ARRAYS)], outputs[-len(ARRAYS) :]
        tensors = {name: torch.from_numpy(a.as_array()) for name, a in zip(ARRAYS, arrays, strict=True)}  # copies
        if int(tensors.pop("step")[0]) != step:
            return None
        # No copies: as long as the views are held, DALI does not use their memory again (exec_dynamic)
        return Batch(step, views=[torch.from_dlpack(v.as_tensor()) for v in views], **tensors)


def read(
    config: Config,
    shards: AnyShards,
    plan: Plan,
    *,
    start: int,
    stop: int,
    rank: int = 0,
    world_size: int = 1,
    device_id: int | None = None,
) -> Iterator[Batch]:
    """This process's batches of the global steps start..stop-1, in order (see pipeline/readers/__init__.py); decoded on GPU
    `device_id`, or (None) on the CPU.

    A batch in which DALI's decoder refuses a photo is made again by `BatchBuilder`, whose decoder accepts it (some WebP
    files) or replaces that photo. Raises UserError at once if DALI is too old; with a batch, RunError if memory, CUDA, the
    driver or a worker process fails, and UserError if no valid sample is left.
    """
    check_version()

    def build(step: int) -> nvidia.dali.Pipeline:
        pipe = _views(
            _Source(config, shards, plan, rank, world_size, step, stop),
            "cpu" if device_id is None else "gpu",
            config,
            batch_size=len(plan.samples_of(step, rank, world_size)),
            num_threads=config.speed.dali_threads,
            device_id=device_id,
            py_num_workers=max(1, config.speed.workers),
            py_start_method="spawn",
            prefetch_queue_depth=config.speed.prefetch,
            exec_dynamic=True,
        )
        pipe.build()
        return pipe

    return _batches(_Pipeline(build, device_id), BatchBuilder(config, shards, plan, rank, world_size), start, stop)


def _batches(pipeline: _Pipeline, fallback: BatchBuilder, start: int, stop: int) -> Iterator[Batch]:
    """DALI's batches, and those of `fallback` where DALI's decoder refuses a photo."""
    refused, reported = 0, False  # refusals in a row; whether the first one was reported
    for step in range(start, stop):
        try:
            batch = pipeline.batch(step)
            refused = 0
        except (RuntimeError, MemoryError) as error:
            why = _reason(error)
            if failure := _machine_failure(step, why):
                raise RunError(failure) from error
            if "decoders.image" not in str(error):
                raise
            item = fallback.batch(step)
            if isinstance(item, UserError):
                raise item from None
            batch, refused = item, refused + 1
            if not reported and torch.equal(
                batch.ids, batch.rows
            ):  # nothing was replaced: the other decoder accepts it
                print(f"step {step}: DALI refuses a photo that our decoder accepts ({why}); this batch, and others like it, "
                      "are decoded on the CPU, which is slower", file=sys.stderr)  # fmt: skip
                reported = True
            if refused == MAX_REFUSALS:
                # once in a row of refusals: if a new pipeline refuses too, the photos are to blame
                print(f"step {step}: DALI refused {refused} batches in a row; its pipeline is rebuilt", file=sys.stderr)
                pipeline.drop()
        yield batch


def _reason(error: BaseException) -> str:
    """What DALI says went wrong, in one line: without the graph's lines before it and the library's stack after it, whose
    paths may hold any word."""
    text = str(error) or repr(error)
    text = text.partition("encountered:")[2] or text
    return " ".join(re.split("Stacktrace|Current pipeline object", text)[0].split())


def _machine_failure(step: int, why: str) -> str:
    """The message if the machine failed and not a photo; else empty."""
    if MACHINE_ERROR.search(why):
        return (
            f"step {step}: DALI failed, and not because of a photo: {why}; speed.prefetch=1 or a smaller "
            "optim.global_batch_size needs less memory, speed.reader=wds reads without DALI"
        )
    if "receiving interrupted" in why:
        shared_mb = shutil.disk_usage("/dev/shm").total >> 20
        return (
            f"step {step}: a data worker process exited unexpectedly: it was killed (see dmesg), or /dev/shm "
            f"({shared_mb:,} MB) is full; fewer speed.workers or a smaller speed.prefetch need less of it, "
            "`docker run --shm-size=…` gives more"
        )
    return ""
