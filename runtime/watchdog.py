"""Who watches a run: a lock on its folder, signals that ask it to stop, and a thread that sees when it hangs.

Whatever hangs, the job ends: the thread tells where this process stands and which ones are silent, dumps the stacks of this
process and of its reading processes, and ends it; torchrun then ends, or restarts, the others. Nothing is saved by a
process that hangs: the newest checkpoint stands.
"""

import contextlib
import errno
import faulthandler
import fcntl
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

if TYPE_CHECKING:
    from torch.distributed import Store

    from runtime.distributed import DistributedContext

TICK = 0.5  # seconds between two looks
START = "before the first step"
FIRST_STEP = 10  # times as long as others may the first step of a start take: it compiles


def lock(folder: Path) -> IO[str] | None:
    """Take a run folder for this process, until it ends in whatever way. None where the file system has no locks.

    Raises UserError where another run holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - held as long as the process lives
    except OSError as error:
        raise UserError(f"{folder}: nothing can be written there ({error.strerror})") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            return None
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise UserError(f"{folder}: {holder} trains there; RUN=another/folder starts another run beside it") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')},\n")
    file.flush()
    return file


class StopSignal:
    """Ctrl-C, SIGTERM and SIGUSR1 ask the loop to save and stop; a second Ctrl-C stops at once.

    number: of the signal that came, 0 until then. since: when it came (monotonic seconds).
    """

    def __init__(self) -> None:
        self.number, self.since = 0, 0.0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        if not self.number:
            self.number, self.since = number, time.monotonic()
        signal.signal(signal.SIGINT, signal.default_int_handler)


def exit_code(number: int) -> int:
    """What a run ends with that a signal stopped: 130 after Ctrl-C, 138 after SIGUSR1, 143 after SIGTERM, and where another
    process got the signal (0)."""
    return 128 + (number or signal.SIGTERM)


class Watchdog:
    """Sees to it that a run moves or ends. The thread that trains tells where it is (`at`); this one looks twice a second.

    step_timeout: seconds that a step may take, and a wait for a batch. grace: seconds after a stop signal in which the run
    has to have saved. Several processes tell each other where they are through torchrun's own store.
    """

    def __init__(self, processes: "DistributedContext", stop: StopSignal, step_timeout: float, grace: float):
        self._rank, self._world = processes.rank, processes.world
        self._stop, self._timeout, self._grace = stop, step_timeout, grace
        self._where, self._limit = START, FIRST_STEP * step_timeout
        self._idle = 0.0  # seconds at this place, by this thread's own ticks: a run that Ctrl-Z stopped has not hung
        self._over = threading.Event()
        self._ticks = 0
        self._store = _join_store() if self._world > 1 else None
        self._tell()
        faulthandler.enable()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()

    def at(self, where: str, first: bool = False) -> None:
        """Where the run is now ("in step 12"); its time begins. first: it may take as long as a first step."""
        self._where, self._limit = where, self._timeout * (FIRST_STEP if first else 1)
        self._idle = 0.0

    def close(self) -> None:
        """The run has ended; nothing is watched any more."""
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def silent(self) -> str:
        """Which processes have stopped telling where they are, and where they were, in words; looks for two seconds."""
        if self._store is None:
            return ""
        before = self._everyone()
        time.sleep(4 * TICK)
        after = self._everyone()
        if not after:
            return "process 0 is gone, or its machine"  # where the store is
        return _list(
            [
                f"process {rank} is silent or gone, last heard of {now.partition('|')[2] or START}"
                for rank, (was, now) in enumerate(zip(before, after, strict=True))
                if was == now and rank != self._rank
            ]
        )

    # ------------------------------------------------------------------------------------------- the watching thread

    def _look(self) -> None:
        while not self._over.wait(TICK):
            # should C code hold the interpreter, so that this thread stands still too: its own clock, which needs neither
            faulthandler.dump_traceback_later(2 * self._limit + 10, exit=True)
            self._idle += TICK
            self._tell()
            if self._stop.number and time.monotonic() - self._stop.since > self._grace:
                self._end(
                    f"stopped unsaved: still {self._where} {self._grace:g} s after the signal (run.grace)",
                    exit_code(self._stop.number),
                )
            elif self._idle > self._limit:
                others = self.silent() or self._elsewhere()
                if self._idle > self._limit and not self._over.is_set():  # it did not go on meanwhile
                    self._end(f"{self._limit:g} s {self._where} (run.step_timeout){others and '; ' + others}", 1)

    def _tell(self) -> None:
        self._ticks += 1
        if self._store is not None:
            with contextlib.suppress(Exception):  # its host is gone: the connections between processes tell
                self._store.set(str(self._rank), f"{self._ticks}|{self._where}")

    def _everyone(self) -> list[str]:
        assert self._store is not None
        try:
            names = [str(rank) for rank in range(self._world)]  # asking for what nobody has set would wait
            return [self._store.get(name).decode() if self._store.check([name]) else "" for name in names]
        except Exception:  # no store any more
            return []

    def _elsewhere(self) -> str:
        """Who else is where, if not all wait at the same place."""
        if self._store is None:
            return ""
        places = [text.partition("|")[2] for text in self._everyone()]
        return _list([f"process {rank} is {place}" for rank, place in enumerate(places) if place != self._where])

    def _end(self, why: str, code: int) -> None:
        speaker = f"[process {self._rank}] " if self._rank else ""  # as `run_cli` has it
        print(f"{speaker}error: {why}; the newest checkpoint stands; stacks:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        readers = multiprocessing.active_children()
        for number in (signal.SIGABRT, signal.SIGKILL):  # the first makes them dump their stacks
            for reader in readers:
                with contextlib.suppress(ProcessLookupError, TypeError):
                    os.kill(reader.pid, number)  # type: ignore[arg-type]
            time.sleep(TICK)
        os._exit(code)


def _join_store() -> "Store":
    """A connection of its own to the store through which torchrun brought the processes together."""
    from torch.distributed import PrefixStore, TCPStore

    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(*where, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10))
    return PrefixStore("densedino", store)  # a new one after every restart: `parallel.start` sees to it


def _list(items: list[str]) -> str:
    return "; ".join(items[:4]) + (f"; and {len(items) - 4} more" if len(items) > 4 else "")
