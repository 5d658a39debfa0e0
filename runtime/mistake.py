"""What a user got wrong, and what broke under way, told in one clear message."""

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Iterable


class Mistake(Exception):
    """A wrong input: the message names the thing and the nearest right one; the program ends with exit code 2."""


class Failure(Exception):
    """What no input is to blame for, and no traceback explains (a process that was killed): the message says what happened
    and what stands; the program ends with exit code 1."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message: `, did you mean 'x'?` for the known word closest to `word`, or nothing."""
    close = difflib.get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=0.5)
    return f", did you mean '{close[0]}'?" if close else ""


def ask_positive(args: argparse.Namespace, *names: str) -> None:
    """Raise Mistake where one of these options is given and not above 0."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise Mistake(f"--{name.replace('_', '-')} {value}: more than 0")


def tell_mistakes(main: Callable[[], int | None]) -> None:
    """Run a program's `main`: a Mistake becomes a message on stderr and exit code 2, a Failure exit code 1, Ctrl-C 130."""
    try:
        code = main() or 0
    except (Mistake, Failure) as error:
        rank = os.environ.get("RANK", "0")
        print(f"error: {error}" if rank == "0" else f"[process {rank}] error: {error}", file=sys.stderr)
        code = 2 if isinstance(error, Mistake) else 1
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        code = 130
    sys.exit(code)
