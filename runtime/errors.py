"""Errors that a user can act on: one clear message, an exit code, no traceback."""

import argparse
import difflib
import itertools
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path


class UserError(Exception):
    """A wrong input. The message names it and the nearest valid one. The program ends with exit code 2."""


class RunError(Exception):
    """A failure that no input caused and no traceback explains, such as a killed process. The message says what happened
    and what is kept. The program ends with exit code 1."""


def suggest(word: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """The end of a message: `, did you mean 'x'?` for the known word closest to `word`, or nothing."""
    close = difflib.get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=cutoff)
    return f", did you mean '{close[0]}'?" if close else ""


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
    """Run a program's `main` and exit. UserError prints its message and exits with 2, RunError with 1, Ctrl-C with 130."""
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
