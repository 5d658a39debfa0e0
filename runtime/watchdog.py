"""What watches a run: a lock on its folder, stop signals, and a thread that detects a hang.

Whatever hangs, the job ends: the thread prints where this process is and which ones do not respond, dumps the stacks of this
process and of its data workers, and ends it; torchrun then ends, or restarts, the others. A process that hangs saves
nothing: the newest checkpoint is kept.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING

from runtime.errors import UserError
from runtime.files import try_lock

if TYPE_CHECKING:
    from torch.distributed import Store

    from runtime.distributed import DistributedContext

TICK = 0.5  # seconds between two checks
BEFORE_FIRST_STEP = "before the first step"
FIRST_STEP_FACTOR = 10  # the first step of a start may take so many times run.step_timeout: it compiles


def lock(folder: Path) -> IO[str]:
    """Lock a run folder for this process until it exits, however it exits. Without locks on its disk, a warning.

    Raises UserError if another process holds the lock, or if the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - held as long as the process lives
    except OSError as error:
        raise UserError(f"{folder}: cannot write there ({error.strerror})") from None
    if not try_lock(file, folder):
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise UserError(f"{folder}: {holder} trains there; start another run with RUN=another/folder")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')},\n")
    file.flush()
    return file


class StopSignal:
    """Ctrl-C, SIGTERM and SIGUSR1 ask the training loop to save and stop; a second Ctrl-C stops at once.

    number: of the signal received, 0 until then. since: when it was received (monotonic seconds).
    """

    def __init__(self) -> None:
        self.number, self.since = 0, 0.0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    @property
    def received(self) -> bool:
        return self.number > 0

    def _receive(self, number: int, frame: object) -> None:
        if not self.number:
            self.number, self.since = number, time.monotonic()
        signal.signal(signal.SIGINT, signal.default_int_handler)


def exit_code(number: int) -> int:
    """The exit code of a run that a signal stopped: 130 after Ctrl-C, 138 after SIGUSR1, 143 after SIGTERM, and if another
    process received the signal (0)."""
    return 128 + (number or signal.SIGTERM)


class Watchdog:
    """Makes sure that a run advances or ends. The training thread reports where it is (`heartbeat`); a thread of the
    watchdog checks twice a second.

    step_timeout: seconds that a step, or a wait for a batch, may take. shutdown_timeout: seconds after a stop signal within
    which the run must have saved (run.grace). Several processes publish where they are in torchrun's store.
    """

    def __init__(
        self, context: "DistributedContext", stop: StopSignal, step_timeout: float, shutdown_timeout: float
    ):  # fmt: skip
        self._rank, self._world_size = context.rank, context.world_size
        self._stop, self._step_timeout, self._shutdown_timeout = stop, step_timeout, shutdown_timeout
        self._where, self._limit = BEFORE_FIRST_STEP, FIRST_STEP_FACTOR * step_timeout
        self._idle = (
            0.0  # seconds since the heartbeat, by this thread's own ticks: a run paused by Ctrl-Z does not hang
        )
        self._closed = threading.Event()
        self._ticks = 0
        self._store = _connect_store() if self._world_size > 1 else None
        one_machine = os.environ.get("LOCAL_WORLD_SIZE", "1") == str(self._world_size)
        self._host = "" if one_machine else f" on {socket.gethostname()}"
        self._publish()
        faulthandler.enable()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def heartbeat(self, where: str, first: bool = False) -> None:
        """The run is now at `where` ("in step 12"). first: this may take as long as a first step."""
        self._where, self._limit = where, self._step_timeout * (FIRST_STEP_FACTOR if first else 1)
        self._idle = 0.0

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def unresponsive_ranks(self) -> str:
        """A message with the processes that publish no heartbeat, and where they were; "" if there are none. Takes two
        seconds."""
        if self._store is None:
            return ""
        before = self._published()
        time.sleep(4 * TICK)
        after = self._published()
        if not after:
            return "process 0 or its machine is gone"  # it hosts the store
        return _join(
            [
                f"process {rank}{host} is silent or gone, last heard of {where}"
                for rank, (was, (ticks, where, host)) in enumerate(zip(before, after, strict=True))
                if was[0] == ticks and rank != self._rank
            ]
        )

    # ------------------------------------------------------------------------------------------- the watchdog's thread

    def _run(self) -> None:
        while not self._closed.wait(TICK):
            # if C code holds the interpreter, this thread is blocked too: faulthandler's timer needs neither
            faulthandler.dump_traceback_later(2 * self._limit + 10, exit=True)
            self._idle += TICK
            self._publish()
            if self._stop.number and time.monotonic() - self._stop.since > self._shutdown_timeout:
                self._end(
                    f"stopped, and nothing was saved: still {self._where} {self._shutdown_timeout:g} s after the signal "
                    "(run.grace)",
                    exit_code(self._stop.number),
                )
            elif self._idle > self._limit:
                others = self.unresponsive_ranks() or self._elsewhere()
                if self._idle > self._limit and not self._closed.is_set():  # it has not advanced meanwhile
                    self._end(f"{self._limit:g} s {self._where} (run.step_timeout){others and '; ' + others}", 1)

    def _publish(self) -> None:
        self._ticks += 1
        if self._store is not None:
            with contextlib.suppress(Exception):  # the store's host is gone: a reduction between processes will fail
                self._store.set(str(self._rank), f"{self._ticks}|{self._where}|{self._host}")

    def _published(self) -> list[tuple[str, str, str]]:
        """(ticks, where it is, " on <host>" if there are several machines) of each process."""
        assert self._store is not None
        names = [str(rank) for rank in range(self._world_size)]
        try:  # one request, not one for each of hundreds of processes; `get` of a name that is not set would wait
            if self._store.check(names):
                texts = [text.decode() for text in self._store.multi_get(names)]
            else:
                texts = [self._store.get(name).decode() if self._store.check([name]) else "" for name in names]
        except Exception:  # the store is gone
            return []
        return [tuple(text.split("|")) if text else ("", BEFORE_FIRST_STEP, "") for text in texts]  # type: ignore[misc]

    def _elsewhere(self) -> str:
        """Which processes are somewhere else, if not all wait at the same place."""
        if self._store is None:
            return ""
        published = enumerate(self._published())
        return _join(
            [f"process {rank}{host} is {where}" for rank, (_, where, host) in published if where != self._where]
        )

    def _end(self, reason: str, code: int) -> None:
        prefix = f"[process {self._rank}] " if self._rank else ""  # as in `run_cli`
        print(f"{prefix}error: {reason}; the newest checkpoint is kept; stacks:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        workers = multiprocessing.active_children()
        for number in (signal.SIGABRT, signal.SIGKILL):  # the first makes them dump their stacks
            for worker in workers:
                with contextlib.suppress(ProcessLookupError, TypeError):
                    os.kill(worker.pid, number)  # type: ignore[arg-type]
            time.sleep(TICK)
        os._exit(code)


def _connect_store() -> "Store":
    """A connection of its own to torchrun's store."""
    from torch.distributed import PrefixStore, TCPStore

    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))
    return PrefixStore("densedino", store)  # a new store after every restart: `distributed.start` requires it


def _join(items: list[str]) -> str:
    return "; ".join(items[:4]) + (f"; and {len(items) - 4} more" if len(items) > 4 else "")
