"""What a user got wrong, and what broke under way, told in one clear message."""

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Iterable


class UserError(Exception):
    """A wrong input: the message names the thing and the nearest right one; the program ends with exit code 2."""


class RunError(Exception):
    """What no input is to blame for, and no traceback explains (a process that was killed): the message says what happened
    and what stands; the program ends with exit code 1."""


def suggest(word: str, known: Iterable[str]) -> str:
    """The end of a message: `, did you mean 'x'?` for the known word closest to `word`, or nothing."""
    close = difflib.get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=0.5)
    return f", did you mean '{close[0]}'?" if close else ""


def require_positive(args: argparse.Namespace, *names: str) -> None:
    """Raise UserError where one of these options is given and not above 0."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value}: more than 0")


def run_cli(main: Callable[[], int | None]) -> None:
    """Run a program's `main`: a UserError becomes a message on stderr and exit code 2, a RunError exit code 1, Ctrl-C 130."""
    try:
        code = main() or 0
    except (UserError, RunError) as error:
        rank = os.environ.get("RANK", "0")
        print(f"error: {error}" if rank == "0" else f"[process {rank}] error: {error}", file=sys.stderr)
        code = 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        code = 130
    sys.exit(code)
