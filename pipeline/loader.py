"""Picks the reader, keeps batches ready, copies and colors them on the device, counts the time that the step waited."""

import contextlib
import importlib.util
import multiprocessing
import queue
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from pipeline.augment import numba_kernel, recipe
from pipeline.batch import Batch, size_groups
from pipeline.shards import Plan, Shards
from runtime.config import Config
from runtime.errors import RunError, UserError

# a batch, when its copies are done, and (planned ids, rows read)
_Item = tuple[Batch, torch.cuda.Event | None, tuple[list[int], list[int]]]

PATIENCE = 5  # seconds for reading processes to finish the batches that they are at


def choose_reader(wanted: str, device: torch.device) -> tuple[str, str]:
    """("dali" or "wds", why). Raises UserError where dali is asked for and not installed."""
    has_dali = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    if wanted == "dali" and not has_dali:
        raise UserError(
            "speed.reader: dali, but it is not installed: pip install -e '.[dali13]' (or dali12 for CUDA 12)"
        )
    if wanted != "auto":
        return wanted, "as speed.reader says"
    if device.type != "cuda":
        return "wds", "without a GPU it is the faster one"
    return ("dali", "decoding on the GPU") if has_dali else ("wds", "DALI is not installed: pip install -e '.[dali13]'")


def select_augment(device: torch.device, compile: bool) -> Callable[..., Tensor]:
    """The form of `apply_color` for a device: on a CPU its own loop where numba is installed, else torch's."""
    if device.type == "cpu" and numba_kernel.available:
        return numba_kernel.apply_color
    color = torch.compile(recipe.apply_color, dynamic=False) if compile else recipe.apply_color
    return partial(color, orders=torch.tensor(recipe.ORDERS, device=device))


class Loader:
    """Iterates over this rank's batches of the steps start..stop-1, ready for the network (see Batch).

    `interrupted`: a wait for a batch asks it now and then, and ends the iteration where it says so.

    A thread takes batches from the reader's workers and, for a GPU, copies them from pinned memory on a stream of its own;
    colors are applied on the compute stream. `waited`: seconds of data wait since it was last asked; `damaged`: planned
    samples that another one stood in for, with it, since last asked.
    """

    def __init__(
        self, config: Config, shards: Shards, plan: Plan, *, device: torch.device, dtype: torch.dtype,
        start: int, stop: int, rank: int = 0, world: int = 1, compile: bool = False,
    ):  # fmt: skip
        self.config, self.device = config, device
        self._color = partial(select_augment(device, compile), dtype=dtype)
        self._groups = [group for _, group in size_groups(config)]
        self._ready: queue.Queue[_Item | BaseException | None] = queue.Queue(maxsize=2)
        self._closing = threading.Event()
        self.interrupted: Callable[[], bool] = lambda: False
        self._readers: set[multiprocessing.process.BaseProcess] = set()
        self._waited = 0.0
        self._damaged: list[tuple[int, int, int]] = []
        self._idle: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.reader, self.why = choose_reader(config.speed.reader, device)
        self._batches: Iterator[Batch]
        if self.reader == "dali":
            from pipeline.readers import dali  # heavy, and not on every machine

            self._batches = dali.read(
                config, shards, plan, start=start, stop=stop, rank=rank, world=world, device_id=device.index
            )
        else:
            from pipeline.readers import webdataset

            self._batches = webdataset.read(config, shards, plan, start=start, stop=stop, rank=rank, world=world)
        self._thread = threading.Thread(target=self._fill, name="loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        before, begun = time.perf_counter(), None
        if self._copies is not None:  # the compute stream may run dry while this thread waits for a batch
            begun = torch.cuda.Event(enable_timing=True)
            begun.record(torch.cuda.current_stream(self.device))
        item = self._next()
        if self._copies is None:
            self._waited += time.perf_counter() - before
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        batch, copied, told = item
        for planned, read in zip(*told, strict=True):
            if planned != read:
                self._damaged.append((batch.step, planned, read))
        if copied is not None and begun is not None:
            self._take_over(batch, copied, begun)
        batch.views = [self._color(v, batch.color[:, g]) for v, g in zip(batch.views, self._groups, strict=True)]
        return batch

    def waited(self) -> float:
        """Seconds of data wait since last asked. On a GPU: the time its compute stream stood idle before a batch, as far
        as the device has come; asking waits for nothing."""
        while self._idle and self._idle[0][1].query():
            begun, over = self._idle.pop(0)
            self._waited += begun.elapsed_time(over) / 1000
        waited, self._waited = self._waited, 0.0
        return waited

    def damaged(self) -> list[tuple[int, int, int]]:
        """(step, planned sample, sample read instead) since last asked."""
        damaged, self._damaged = self._damaged, []
        return damaged

    def close(self) -> None:
        """Stop reading; no thread and no process is left behind. A reading process that is still at a batch after a while,
        whose server or disk stalls, is killed: it is deaf to anything less."""
        self._closing.set()
        until = time.monotonic() + (0 if self._lost_a_reader() else PATIENCE)
        while self._thread.is_alive() and time.monotonic() < until + PATIENCE:
            if time.monotonic() > until:
                for reader in multiprocessing.active_children():
                    reader.kill()
            with contextlib.suppress(queue.Empty):
                self._ready.get(timeout=0.05)

    def _next(self) -> _Item | BaseException | None:
        """The next item. That a reading process is gone is told as such, whatever its reader makes of it: WebDataset's
        loader raises one error or another, DALI waits for ever."""
        while True:
            # DALI's reader may start others in the middle of a run; those that have ended stay in the set
            self._readers.update(multiprocessing.active_children())
            error: BaseException | None = None
            with contextlib.suppress(queue.Empty):
                item = self._ready.get(timeout=0.2)
                if not isinstance(item, BaseException):
                    return item
                error = item
            if self._lost_a_reader():
                raise RunError(
                    "a reading process ended unasked: killed, by somebody or for want of memory (dmesg tells; fewer "
                    "speed.workers, or a smaller speed.prefetch, take less memory and less of /dev/shm)"
                ) from error
            if error is not None or self.interrupted():
                return error

    def _lost_a_reader(self) -> bool:
        return any(reader.exitcode for reader in self._readers)

    def _fill(self) -> None:
        last: BaseException | None = None
        if self._copies is not None:
            torch.cuda.set_device(self.device)
            torch.cuda.set_stream(self._copies)  # this thread's; a GPU reader's views are made on it
        try:
            for batch in self._batches:
                if self._closing.is_set():
                    break
                told = batch.ids.tolist(), batch.rows.tolist()  # while they are on the CPU
                self._ready.put((*self._to_device(batch), told))
        except BaseException as error:  # told in the thread that trains
            last = error
        finally:
            del self._batches  # ends the workers
            self._ready.put(last)

    def _to_device(self, batch: Batch) -> tuple[Batch, torch.cuda.Event | None]:
        if self._copies is None:
            return batch, None
        # a GPU reader's views lie in its own memory, which it uses again: they are copied, too, into torch's
        batch = batch.map(lambda t: t.clone() if t.is_cuda else t.pin_memory().to(self.device, non_blocking=True))
        copied = torch.cuda.Event()
        copied.record(self._copies)
        return batch, copied

    def _take_over(self, batch: Batch, copied: torch.cuda.Event, begun: torch.cuda.Event) -> None:
        """The compute stream waits for the copies; an event after the wait says how long it stood since `begun`."""
        compute = torch.cuda.current_stream(self.device)
        over = torch.cuda.Event(enable_timing=True)
        compute.wait_event(copied)
        over.record(compute)
        self._idle.append((begun, over))

        def used(t: Tensor) -> Tensor:
            t.record_stream(compute)
            return t

        batch.map(used)
