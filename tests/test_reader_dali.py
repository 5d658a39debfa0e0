"""The DALI reader, on the CPU: the WebDataset reader's batches, all workers busy, photos and machine distinguished.

Long: all cases share the shards and the broken pipelines made here.
"""

import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.batch import Batch
from pipeline.readers.worker import BatchBuilder
from pipeline.shards import Shards
from runtime.config import load_config
from runtime.errors import RunError, UserError
from tests.test_reader import batches, make_loader, opened, same, with_damage

dali = pytest.importorskip("pipeline.readers.dali")


@pytest.fixture
def config(tiny_config):
    return load_config(tiny_config)


def dali_batches(config, start=0, stop=7, **ranks) -> list[Batch]:
    shards, plan = opened(config)
    return list(dali.read(config, shards, plan, start=start, stop=stop, **ranks))


@pytest.fixture
def started(monkeypatch) -> list[int]:
    """The steps at which pipelines start, in order."""
    steps: list[int] = []

    def record(self, config, shards, plan, rank, world_size, start, stop):
        steps.append(start)
        init(self, config, shards, plan, rank, world_size, start, stop)

    init = dali._Source.__init__
    monkeypatch.setattr(dali._Source, "__init__", record)
    return steps


@pytest.fixture
def fallback_steps(monkeypatch) -> list[int]:
    """The steps whose batch is made without DALI, in order."""
    steps: list[int] = []
    batch = BatchBuilder.batch
    monkeypatch.setattr(BatchBuilder, "batch", lambda self, step: steps.append(step) or batch(self, step))
    return steps


# ------------------------------------------------------------------------------------------------------- the same batches


@pytest.mark.parametrize(("workers", "interpolation"), [(0, "bicubic"), (2, "bicubic"), (0, "bilinear")])
def test_dali_reads_the_same(config, workers, interpolation):
    """Three epochs: ids, windows, points and colors bit for bit, pixels within 0.5 of 255 in the mean. All batches are held
    until the end: DALI overwrites none of them."""
    config.data.interpolation = interpolation
    ours = batches(config, stop=15)
    config.speed.workers = workers
    theirs = dali_batches(config, stop=15)
    assert len(theirs) == 15
    for a, b in zip(ours, theirs, strict=True):
        assert a.step == b.step
        for name in ("ids", "rows", "windows", "view_points", "color"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
            assert getattr(a, name).dtype == getattr(b, name).dtype
        for x, y in zip(a.views, b.views, strict=True):
            assert x.shape == y.shape
            assert y.dtype == torch.uint8
            assert (x.float() - y.float()).abs().mean() < 0.5
    assert all(same(a, b) for a, b in zip(dali_batches(config, start=2, stop=4), theirs[2:4], strict=True))


def test_ranks_share_a_step(config):
    [whole] = dali_batches(config, stop=1)
    for rank in range(2):
        [part] = dali_batches(config, stop=1, rank=rank, world_size=2)
        for name in ("ids", "rows", "windows", "view_points", "color"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[rank::2]), name


def test_the_loader_uses_dali(config):
    config.speed.reader = "dali"
    loader = make_loader(config, stop=3)
    assert loader.reader == "dali"
    assert [b.views[0].shape for b in loader] == [(2, 16, 3, 32, 32)] * 3


def test_readers_agree_on_damage(config, tmp_path):
    """5 % damaged photos, one with the indexed bytes that no decoder accepts, and one whose header has another size than the
    index: both readers read the same rows."""
    shards, _ = opened(config)
    damaged = list(range(3, 96, 20))
    folder = Path(with_damage(shards, tmp_path / "damaged", damaged))
    index = np.load(folder / "index.npy")
    record = index[50]
    path = folder / shards.shards[int(record["shard"])]["name"]
    content = bytearray(path.read_bytes())
    at, size = int(record["offset"]), int(record["size"])
    content[at : at + size] = b"not a photo " * (size // 12) + b"." * (size % 12)
    path.write_bytes(content)
    index["crc32"][50] = zlib.crc32(bytes(content[at : at + size]))
    index["height"][70] += 1  # other than in its header
    np.save(folder / "index.npy", index)
    config.data.shards = str(folder)
    read: set[int] = set()
    for a, b in zip(batches(config, stop=15), dali_batches(config, stop=15), strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.rows, b.rows)
        assert torch.equal(a.windows, b.windows)
        assert len(b.views[0]) == 16
        read |= set(b.rows.tolist())
    assert not read & {*damaged, 50, 70}


# --------------------------------------------------------------------------------------------------- the worker processes


class Slow(dali._Source):
    """A slow source that records which process was called, from when to when."""

    def __call__(self, iteration: int):
        begin = time.monotonic()
        arrays = super().__call__(iteration)
        time.sleep(0.3 if iteration % 3 else 0.6)  # so that later steps are ready before earlier ones
        with open(os.environ["CALLS"], "a") as calls:
            calls.write(f"{os.getpid()} {begin} {time.monotonic()}\n")
        return arrays


def test_all_workers_are_busy(config, tmp_path, monkeypatch):
    """Tasks in flight: speed.prefetch x speed.workers. The order of the batches is the plan's, whichever is ready first."""
    monkeypatch.setattr(dali, "_Source", Slow)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    config.speed.workers, config.speed.prefetch = 4, 2
    shards, plan = opened(config)
    reading = dali.read(config, shards, plan, start=0, stop=14)
    read = [next(reading)]
    ahead = 2 * 4 + 2  # in flight, and in DALI's own queue; no other starts until the next batch is read
    until = time.monotonic() + 30
    while (calls := (tmp_path / "calls").read_text().splitlines()) and len(calls) < ahead and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(1)
    calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    assert len(calls) == ahead
    assert len({pid for pid, _, _ in calls} - {str(os.getpid())}) == 4
    spans = [(float(begin), float(end)) for _, begin, end in calls]
    assert max(sum(begin <= at < end for begin, end in spans) for at, _ in spans) == 4  # all of them at once
    read += reading
    assert [b.step for b in read] == list(range(14))
    assert all(np.array_equal(b.ids, plan.samples_of(b.step)) for b in read)


class Dying(dali._Source):
    def __call__(self, iteration: int):
        if iteration == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(iteration)


def test_a_killed_worker(config, monkeypatch):
    monkeypatch.setattr(dali, "_Source", Dying)
    config.speed.workers = config.speed.prefetch = 1
    with pytest.raises(
        RunError, match=r"step \d: a data worker process exited unexpectedly: .*/dev/shm \([\d,]+ MB\) is full"
    ):
        dali_batches(config)


def test_draws_are_made_in_the_workers(config, monkeypatch):
    monkeypatch.setattr(dali, "draw_for", None)  # in this process only: a worker imports the module itself
    config.speed.workers = 1
    assert [b.step for b in dali_batches(config, stop=2)] == [0, 1]


# ------------------------------------------------------------------------------------------------------- photos it refuses


def webp(photo: bytes) -> bytes:
    """The photo as a WebP that only DALI refuses: lossless, with EXIF after a chunk of an odd number of bytes."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0131] = "a camera"
    Image.open(io.BytesIO(photo)).convert("RGB").save(file, "WEBP", lossless=True, exif=exif)
    content = bytearray(file.getvalue())
    assert content[30:34] == b"VP8L"
    size = int.from_bytes(content[34:38], "little")
    if size % 2 == 0:  # one byte more, which decoders ignore, and the one that makes the chunk even again
        content[38 + size : 38 + size] = b"\0\0"
        content[34:38], content[4:8] = (n.to_bytes(4, "little") for n in (size + 1, len(content) - 8))
    return bytes(content)


def with_webp(shards: Shards, folder: Path, samples: list[int]) -> str:
    """A copy of the shards in which these photos are WebP files that only DALI refuses."""
    shutil.copytree(shards.folder, folder)
    index, manifest = np.load(folder / "index.npy"), json.loads((folder / "manifest.json").read_text())
    for sample in samples:
        photo = webp(shards.read(sample))
        shard = manifest["shards"][index["shard"][sample]]
        path = folder / shard["name"]
        index["offset"][sample], index["size"][sample] = path.stat().st_size, len(photo)
        index["crc32"][sample] = zlib.crc32(photo)
        path.write_bytes(path.read_bytes() + photo)
        shard["bytes"] = path.stat().st_size
    np.save(folder / "index.npy", index)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return str(folder)


def refuse(config, folder: Path, steps: list[int]) -> list[Batch]:
    """Let DALI refuse a photo in each of these steps of the first epoch. Returns the WebDataset reader's batches of it."""
    shards, plan = opened(config)
    assert plan.steps_per_epoch == 5
    config.data.shards = with_webp(shards, folder, [int(plan.samples_of(step)[3]) for step in steps])
    return batches(config, stop=5)


def agree(ours: list[Batch], theirs: list[Batch]) -> bool:
    """Nothing was replaced, and the pixels are the same within 0.5 of 255."""
    return all(
        torch.equal(a.ids, b.ids) and torch.equal(a.ids, b.rows) and torch.equal(a.view_points, b.view_points)
        and all((x.float() - y.float()).abs().mean() < 0.5 for x, y in zip(a.views, b.views, strict=True))
        for a, b in zip(ours, theirs, strict=True)
    )  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1])
def test_a_refusal_costs_one_batch(config, tmp_path, started, fallback_steps, capfd, workers):
    """DALI's real behavior after an error: its next batch is the next step's."""
    ours = refuse(config, tmp_path / "shards", [1, 3])
    fallback_steps.clear()
    config.speed.workers = workers
    theirs = dali_batches(config, stop=5)
    assert agree(ours, theirs)
    assert started == [0]
    assert fallback_steps == [1, 3]
    assert [same(a, b) for a, b in zip(ours, theirs, strict=True)] == [False, True, False, True, False]
    assert capfd.readouterr().err.count("DALI refuses a photo that our decoder accepts") == 1


def test_refusals_in_a_row_rebuild_the_pipeline(config, tmp_path, started, fallback_steps, capfd):
    ours = refuse(config, tmp_path / "shards", [0, 1, 2])
    fallback_steps.clear()
    config.speed.workers = 1
    shards, plan = opened(config)
    reading = dali.read(config, shards, plan, start=0, stop=5)
    theirs = [next(reading) for _ in range(4)]
    assert len(multiprocessing.active_children()) == 1  # the first pipeline's worker has exited
    theirs += reading
    assert agree(ours, theirs)
    assert started == [0, 3]
    assert fallback_steps == [0, 1, 2]
    assert "step 2: DALI refused 3 batches in a row; its pipeline is rebuilt" in capfd.readouterr().err


def test_the_loader_accepts_a_rebuilt_pipeline(config, tmp_path, started):
    refuse(config, tmp_path / "shards", [0, 1, 2])
    config.speed.reader, config.speed.workers = "dali", 2
    loader = make_loader(config, stop=5)
    steps = []
    for batch in loader:
        steps.append(batch.step)
        time.sleep(0.3)  # so that it sees the workers of the first pipeline
    assert steps == list(range(5))
    assert started == [0, 3]
    assert len(loader._workers) == 4
    loader.close()


def test_photos_that_any_pipeline_refuses_rebuild_it_once(config, tmp_path, started, fallback_steps):
    ours = refuse(config, tmp_path / "shards", [0, 1, 2, 3, 4])
    fallback_steps.clear()
    assert all(same(a, b) for a, b in zip(ours, dali_batches(config, stop=5), strict=True))
    assert started == [0, 3]
    assert fallback_steps == [0, 1, 2, 3, 4]


def test_no_valid_photo_is_left(config, tmp_path):
    """The same UserError as the WebDataset reader's, with and without worker processes."""
    shards, _ = opened(config)
    folder = shutil.copytree(shards.folder, tmp_path / "shards")
    for shard in shards.shards:
        (folder / shard["name"]).unlink()
    plan = opened(config)[1]
    for config.speed.workers in (0, 1):
        with pytest.raises(UserError, match="100 samples in a row are damaged, the last one in shard-"):
            list(dali.read(config, Shards(folder, max_missing=None), plan, start=0, stop=2))


# ------------------------------------------------------------------------------------------------- another step's batch


class Skipping(dali._Source):
    def __call__(self, iteration: int):
        return super().__call__(iteration + (iteration >= 2))


class Ending(dali._Source):
    def __call__(self, iteration: int):
        if iteration == 2:
            raise StopIteration
        return super().__call__(iteration)


class Ahead(dali._Source):
    def __call__(self, iteration: int):
        return super().__call__(iteration + 1)


@pytest.mark.parametrize("source", [Skipping, Ending])
def test_a_pipeline_that_skips_a_step(config, monkeypatch, capfd, source):
    """No batch has another step's content: a new pipeline starts at the missing step."""
    expected = dali_batches(config, stop=5)
    monkeypatch.setattr(dali, "_Source", source)
    assert all(same(a, b) for a, b in zip(expected, dali_batches(config, stop=5), strict=True))
    messages = capfd.readouterr().err.splitlines()
    line = "DALI returned the batch of another step; its pipeline is rebuilt"
    assert messages == [f"step {n}: {line}" for n in (2, 4)]


def test_a_pipeline_that_never_returns_the_step(config, monkeypatch):
    monkeypatch.setattr(dali, "_Source", Ahead)
    with pytest.raises(RuntimeError, match="step 0: DALI returned the batch of another step, from a new pipeline too"):
        dali_batches(config)


# --------------------------------------------------------------------------------------- errors that only a GPU would raise

ERROR = """Critical error in pipeline:
Error in {device} operator `nvidia.dali.fn.{operator}`,
which was used in the pipeline definition with the following traceback:

  File "/opt/cuda/memory/pipeline/dali.py", line 94, in _views
    images = fn.{operator}(

encountered:

{why}
{stack}Current pipeline object is no longer valid."""
STACK = "Stacktrace (2 entries):\n[frame 0]: /opt/cuda/libdali.so(+0x9)\n[frame 1]: /lib/libmemory.so(malloc+0x1)\n"


def fail_at(monkeypatch, step: int, error: Exception) -> None:
    """Let the pipeline's run raise an error instead of returning a step's batch."""
    run, runs = dali.nvidia.dali.Pipeline.run, iter(range(sys.maxsize))

    def failing(self, *args):
        outputs = run(self, *args)
        if next(runs) == step:
            raise error
        return outputs

    monkeypatch.setattr(dali.nvidia.dali.Pipeline, "run", failing)


@pytest.mark.parametrize(
    ("operator", "why"),
    [
        ("decoders.image", "CUDA runtime API error cudaErrorIllegalAddress (700):\nan illegal address was met"),
        ("decoders.image", "CUDA driver API error CUDA_ERROR_UNKNOWN (999):\nunknown error"),
        ("decoders.image", "nvml error (999): A nvml internal driver error occurred"),
        ("decoders.image", "nvImageCodec failure: '#5'"),
        ("resize", "Can't allocate 1073741824 bytes on device 0."),
        ("stack", "std::bad_alloc"),
    ],
)
@pytest.mark.parametrize("stack", ["", STACK])
def test_an_error_of_the_machine(config, monkeypatch, fallback_steps, operator, why, stack):
    fail_at(monkeypatch, 1, RuntimeError(ERROR.format(device="MIXED", operator=operator, why=why, stack=stack)))
    shards, plan = opened(config)
    reading = dali.read(config, shards, plan, start=0, stop=5)
    assert next(reading).step == 0
    with pytest.raises(RunError) as failure:
        next(reading)
    assert f"step 1: DALI failed, and not because of a photo: {' '.join(why.split())}; speed" in str(failure.value)
    assert fallback_steps == []


def test_out_of_memory_outside_an_operator(config, monkeypatch):
    fail_at(monkeypatch, 1, MemoryError("std::bad_alloc"))
    with pytest.raises(RunError, match="step 1: DALI failed, and not because of a photo: std::bad_alloc; "):
        dali_batches(config)


def test_an_error_of_a_photo_with_misleading_paths(config, monkeypatch, fallback_steps):
    error = ERROR.format(device="MIXED", operator="decoders.image", why="Failed to decode sample #3 : ", stack=STACK)
    fail_at(monkeypatch, 1, RuntimeError(error))
    assert [b.step for b in dali_batches(config, stop=4)] == [0, 1, 2, 3]
    assert fallback_steps == [1]


def test_other_errors_are_raised_unchanged(config, monkeypatch, fallback_steps):
    error = ERROR.format(device="CPU", operator="resize", why="Assert on roi failed", stack="")
    fail_at(monkeypatch, 1, RuntimeError(error))
    with pytest.raises(RuntimeError, match="Assert on roi failed"):
        dali_batches(config)
    assert fallback_steps == []


# ---------------------------------------------------------------------------------------------------------------- versions


@pytest.mark.parametrize(
    ("installed", "cuda", "package"),
    [("2.1.1", 12980, "nvidia-dali-cuda120"), ("1.51.2", 13000, "nvidia-dali-cuda130")],
)
def test_a_dali_that_is_too_old(config, monkeypatch, installed, cuda, package):
    monkeypatch.setattr(dali.nvidia.dali, "__version__", installed)
    monkeypatch.setattr(dali.nvidia.dali, "__cuda_version__", cuda)
    shards, plan = opened(config)
    with pytest.raises(UserError) as error:  # at once, before a batch is requested
        dali.read(config, shards, plan, start=0, stop=1)
    assert str(error.value) == (
        f"speed.reader: dali needs DALI 2.2 or later, but {installed} is installed: pip install --upgrade '{package}>=2.2'"
    )


@pytest.mark.parametrize("installed", ["2.2.0", "2.10.1", "2.4.0.dev20260101", "3.0.0"])
def test_a_dali_that_is_new_enough(monkeypatch, installed):
    monkeypatch.setattr(dali.nvidia.dali, "__version__", installed)
    dali.check_version()
