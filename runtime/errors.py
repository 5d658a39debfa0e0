"""Errors that a user can act on: one clear message, an exit code, no traceback."""

import argparse
import difflib
import itertools
import os
import select
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TextIO

OUTPUT_CLOSED = 141  # 128 + SIGPIPE: what a shell says of a program that a closed pipe ended


class UserError(Exception):
    """A wrong input. The message names it and the nearest valid one. The program ends with exit code 2."""


class RunError(Exception):
    """A failure that no input caused and no traceback explains, such as a killed process. The message says what happened
    and what is kept. The program ends with exit code 1."""


def plural(count: int, noun: str) -> str:
    """1 shard, 2 shards, 1,000 shards, 2 classes."""
    return f"{count:,} {noun}{'' if count == 1 else 'es' if noun.endswith('s') else 's'}"


def suggest(word: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """The end of a message: `, did you mean 'x'?` for the known word closest to `word`, in any case, or nothing."""
    words = {str(k).casefold(): str(k) for k in known}
    close = difflib.get_close_matches(str(word).casefold(), words, n=1, cutoff=cutoff)
    return f", did you mean '{words[close[0]]}'?" if close else ""


def suggest_path(path: str | Path) -> str:
    """`suggest` for a path that does not exist: each part that is missing is replaced by the nearest name there is."""
    found = Path(path)
    while missing := next((p for p in reversed((found, *found.parents)) if not os.path.exists(p)), None):
        try:
            with os.scandir(missing.parent) as entries:  # a folder of more names is one of photos
                names = sorted(entry.name for entry in itertools.islice(entries, 10_000))
        except OSError:
            return ""
        near = difflib.get_close_matches(
            missing.name, [name for name in names if name != missing.name], n=1, cutoff=0.5
        )
        if not near:
            return ""
        found = missing.parent / near[0] / found.relative_to(missing)
    return f", did you mean '{found}'?"


def require_positive(args: argparse.Namespace, *names: str) -> None:
    """Raise UserError where one of these options is given and is not above 0."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be more than 0")


def run_cli(main: Callable[[], int | None]) -> None:
    """Run a program's `main` and exit. UserError prints its message and exits with 2, RunError with 1, Ctrl-C with 130.

    If what reads the output ends first (`… | head -1`), the program ends quietly: with 141, as a shell reports it, if that
    stopped it, and with its own code if all its work was done.
    """
    code: int | str = OUTPUT_CLOSED
    try:
        code = _run(main)
        if sys.stdout:  # None: it was closed from the start (`>&-`)
            sys.stdout.flush()
    except BrokenPipeError:
        closed = [stream for stream in (sys.stdout, sys.stderr) if stream and _is_closed_pipe(stream)]
        if not closed:  # the pipe of a worker process, or a connection
            raise
        for stream in closed:  # the interpreter's end writes what is left in its buffer
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _run(main: Callable[[], int | None]) -> int | str:
    """The exit code of `main`, after an error's message was printed."""
    try:
        return main() or 0
    except SystemExit as end:  # argparse: help, and wrong options
        return end.code or 0
    except (UserError, RunError) as error:
        rank = os.environ.get("RANK", "0")
        print(f"error: {error}" if rank == "0" else f"[process {rank}] error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 130


def _is_closed_pipe(stream: TextIO) -> bool:
    """Whether nothing reads this stream any more."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError):  # not a file of the system
        return False
