"""Jobs in parallel processes, and their progress."""

import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from runtime.child import end_with_parent
from runtime.errors import UserError

MB = 10**6
LOG_SECONDS = 10  # between two lines of progress in a log


def megabytes(size: float) -> str:
    """Bytes in words: `1,234 MB`, `0.12 MB`."""
    return f"{size / MB:,.0f} MB" if size >= 10 * MB else f"{size / MB:.2g} MB"


def parallel_map(
    work: Callable[[Any], Any], jobs: Sequence[Any], processes: int, afterwards: str
) -> Generator[Any, None, None]:
    """Results of work(job), as they are finished. With one process they are made in this one; otherwise in spawned processes
    that exit with this one. Raises UserError if one of them is killed; `afterwards`, what holds then, ends its message."""
    if min(processes, len(jobs)) <= 1:
        yield from map(work, jobs)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(processes, len(jobs)), context, initializer=init_worker)
    try:
        for done in as_completed([pool.submit(work, job) for job in jobs]):
            yield done.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, perhaps because memory ran out: fewer --processes need less "
            f"(ARGS='--processes {max(1, processes // 2)}'); {afterwards}"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def init_worker() -> None:
    """Leave Ctrl-C to the parent process; and end with it, so that nothing is written after it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


class Progress:
    """What is done, how fast, and the time left: a live line on a terminal, otherwise a line every ten seconds."""

    def __init__(self, verb: str, size: int):
        self.verb, self.size = verb, size
        self.done_photos = self.done_size = 0
        self.start = self.last_print = time.monotonic()

    def __enter__(self) -> "Progress":
        if sys.stdout.isatty():
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Live

            self.live = Live(TextColumn(self.verb), BarColumn(), TextColumn("{task.description}"))
            self.task = self.live.add_task("", total=self.size)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if sys.stdout.isatty():
            self.live.stop()

    def step(self, photos: int, size: int) -> None:
        self.done_photos += photos
        self.done_size += size
        now = time.monotonic()
        seconds = max(now - self.start, 1e-9)
        left = (self.size - self.done_size) * seconds / max(self.done_size, 1)
        text = (
            f"{100 * self.done_size / max(self.size, 1):.0f} %, {self.done_photos:,} photos, "
            f"{self.done_photos / seconds:,.0f}/s, {megabytes(self.done_size / seconds)}/s, "
            f"{int(left // 60)}:{int(left % 60):02d} left"
        )
        if sys.stdout.isatty():
            self.live.update(self.task, completed=self.done_size, description=text)
        elif now - self.last_print > LOG_SECONDS:
            self.last_print = now
            print(f"{self.verb}: {text}", flush=True)
