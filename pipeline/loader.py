"""Picks the reader, prefetches batches, copies and colors them on the device, and counts the data wait of the step."""

import contextlib
import importlib.util
import multiprocessing
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from pipeline.augment import numba_kernel, recipe
from pipeline.batch import Batch, size_groups
from pipeline.mixture import AnyShards
from pipeline.plan import Plan
from runtime.config import Config
from runtime.cores import usable_cores
from runtime.errors import RunError, UserError

# a batch; an event of its finished copies; (planned ids, samples read)
_Item = tuple[Batch, torch.cuda.Event | None, tuple[list[int], list[int]]]

SHUTDOWN_SECONDS = 5  # for worker processes to finish their current batch; then they are killed
POLL_SECONDS = 0.2  # between two looks at the workers while a batch is awaited


def choose_reader(wanted: str, device: torch.device) -> tuple[str, str]:
    """("dali" or "wds", the reason for this choice). Raises UserError if DALI is wanted but not installed."""
    has_dali = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    if wanted == "dali" and not has_dali:
        raise UserError(
            "speed.reader: dali, but DALI is not installed: pip install -e '.[dali13]' (or dali12 for CUDA 12)"
        )
    if wanted != "auto":
        return wanted, "set by speed.reader"
    if device.type != "cuda":
        return "wds", "the faster reader without a GPU"
    return ("dali", "decoding on the GPU") if has_dali else ("wds", "DALI is not installed: pip install -e '.[dali13]'")


def count_workers(wanted: int) -> tuple[int, str]:
    """(data workers to start, a message if they are fewer than wanted). No more than cores: each takes seconds of a core to
    start and memory, and no worker makes a batch sooner for having to wait for a core. The batches are the same."""
    cores = usable_cores()
    if wanted <= cores:
        return wanted, ""
    return cores, f"speed.workers: {wanted}, but this process may use {cores} cores, so {cores} are started"


def select_augment(device: torch.device, compile: bool) -> Callable[..., Tensor]:
    """`apply_color` for a device: on a CPU the numba form if numba is installed, else the torch form."""
    if device.type == "cpu" and numba_kernel.available:
        return numba_kernel.apply_color
    color = torch.compile(recipe.apply_color, dynamic=False) if compile else recipe.apply_color
    return partial(color, orders=torch.tensor(recipe.ORDERS, device=device))


class Loader:
    """Iterates over this process's batches of the steps start..stop-1, ready for the network (see Batch).

    A thread takes batches from the reader's workers and, for a GPU, copies them from pinned memory on its own stream; colors
    are applied on the compute stream. `waited` returns the seconds of data wait, `damaged` the replaced samples, both since
    the last call. `interrupted` is called while a batch is awaited, and ends the iteration if it returns True.
    """

    def __init__(
        self, config: Config, shards: AnyShards, plan: Plan, *, device: torch.device, dtype: torch.dtype,
        start: int, stop: int, rank: int = 0, world_size: int = 1, compile: bool = False,
    ):  # fmt: skip
        self.config, self.device = config, device
        self._color = partial(select_augment(device, compile), dtype=dtype, pixels=config.pixels)
        self._groups = [group for _, group in size_groups(config)]
        self._ready: queue.Queue[_Item | BaseException | None] = queue.Queue(maxsize=2)
        self._closing = threading.Event()
        self.interrupted: Callable[[], bool] = lambda: False
        self._workers: set[multiprocessing.process.BaseProcess] = set()
        self._waited = 0.0
        self._damaged: list[tuple[int, int, int]] = []
        self._idle: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.reader, self.why = choose_reader(config.speed.reader, device)
        workers, self.note = count_workers(config.speed.workers)
        config = replace(config, speed=replace(config.speed, workers=workers))
        self._batches: Iterator[Batch]
        if self.reader == "dali":
            from pipeline.readers import dali  # heavy, and not on every machine

            self._batches = dali.read(
                config, shards, plan, start=start, stop=stop, rank=rank, world_size=world_size, device_id=device.index
            )
        else:
            from pipeline.readers import webdataset

            self._batches = webdataset.read(
                config, shards, plan, start=start, stop=stop, rank=rank, world_size=world_size
            )
        self._thread = threading.Thread(target=self._fill, name="loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        before, begin = time.perf_counter(), None
        if self._copies is not None:  # the compute stream may run dry while this thread waits for a batch
            begin = torch.cuda.Event(enable_timing=True)
            begin.record(torch.cuda.current_stream(self.device))
        item = self._next()
        if self._copies is None:
            self._waited += time.perf_counter() - before
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        batch, copied, samples = item
        for planned, read in zip(*samples, strict=True):
            if planned != read:
                self._damaged.append((batch.step, planned, read))
        if copied is not None and begin is not None:
            self._wait_for_copies(batch, copied, begin)
        batch.views = [self._color(v, batch.color[:, g]) for v, g in zip(batch.views, self._groups, strict=True)]
        return batch

    def waited(self) -> float:
        """Seconds of data wait since the last call. On a GPU: the time that its compute stream was idle before a batch, for
        the batches that the device has reached; this does not synchronize with the device."""
        while self._idle and self._idle[0][1].query():
            begin, end = self._idle.pop(0)
            self._waited += begin.elapsed_time(end) / 1000
        waited, self._waited = self._waited, 0.0
        return waited

    def damaged(self) -> list[tuple[int, int, int]]:
        """(step, planned sample, sample read instead) since the last call."""
        damaged, self._damaged = self._damaged, []
        return damaged

    def close(self) -> None:
        """Stop reading; no thread and no process is left behind. A worker process that has not finished its batch after
        SHUTDOWN_SECONDS, because its server or disk stalls, is killed: it ignores SIGTERM."""
        self._closing.set()
        until = time.monotonic() + (0 if self._lost_a_worker() else SHUTDOWN_SECONDS)
        while self._thread.is_alive() and time.monotonic() < until + SHUTDOWN_SECONDS:
            if time.monotonic() > until:
                for worker in multiprocessing.active_children():
                    worker.kill()
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=0.05)

    def _next(self) -> _Item | BaseException | None:
        """The next item. Raises RunError if a worker process has died; of the readers, WebDataset's loader would raise
        various errors, and DALI would wait for ever."""
        while True:
            # DALI's reader may start new workers in the middle of a run; those that have exited stay in the set
            self._workers.update(multiprocessing.active_children())
            error: BaseException | None = None
            with contextlib.suppress(queue.Empty):
                item = self._ready.get(timeout=POLL_SECONDS)
                if not isinstance(item, BaseException):
                    return item
                error = item
            if self._lost_a_worker():
                raise RunError(
                    "a data worker process exited unexpectedly: it was killed, perhaps because memory ran out (see dmesg); "
                    "fewer speed.workers or a smaller speed.prefetch need less memory and less of /dev/shm"
                ) from error
            if error is not None or self.interrupted():
                return error

    def _lost_a_worker(self) -> bool:
        return any(worker.exitcode for worker in self._workers)

    def _fill(self) -> None:
        last: BaseException | None = None
        if self._copies is not None:
            torch.cuda.set_device(self.device)
            torch.cuda.set_stream(self._copies)  # this thread's; a GPU reader's views are made on it
        try:
            for batch in self._batches:
                if self._closing.is_set():
                    break
                samples = batch.ids.tolist(), batch.rows.tolist()  # while they are on the CPU
                self._ready.put((*self._to_device(batch), samples))
        except BaseException as error:  # raised again in the thread that trains
            last = error
        finally:
            del self._batches  # ends the workers
            self._ready.put(last)

    def _to_device(self, batch: Batch) -> tuple[Batch, torch.cuda.Event | None]:
        if self._copies is None:
            return batch, None
        # A GPU reader's views are in its own memory, which it uses again: they are copied too, into torch's
        batch = batch.map(lambda t: t.clone() if t.is_cuda else t.pin_memory().to(self.device, non_blocking=True))
        copied = torch.cuda.Event()
        copied.record(self._copies)
        return batch, copied

    def _wait_for_copies(self, batch: Batch, copied: torch.cuda.Event, begin: torch.cuda.Event) -> None:
        """Let the compute stream wait for the copies; `begin` and an event after the wait give its idle time."""
        compute = torch.cuda.current_stream(self.device)
        end = torch.cuda.Event(enable_timing=True)
        compute.wait_event(copied)
        end.record(compute)
        self._idle.append((begin, end))

        def used(t: Tensor) -> Tensor:
            t.record_stream(compute)
            return t

        batch.map(used)
