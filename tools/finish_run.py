"""After training: the figures (results.json), the pictures and the HTML page of a run, in one process.

    python -m tools.finish_run RUN [--skip-existing]

The same as `python -m eval report RUN`, `python -m tools.show run RUN` and `python -m eval html RUN`, but torch is loaded
once. If a part fails, its message is printed and the others are still made; the exit code is that of the first failure.
With --skip-existing, results and pictures of the run's weights are kept; those of other weights are made again. The page
takes half a second and is always written.
"""

import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import eval.__main__ as evaluate
import tools.show.__main__ as show
from runtime.errors import RunError, UserError, run_cli
from tools.docstring import make_parser
from tools.show.run import pictures_of


def attempt(part: Callable[[], object]) -> int:
    """Run a part; its error is printed. Returns the exit code that the part would have as a program."""
    try:
        part()
    except (UserError, RunError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, UserError) else 1
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def finish(run: Path, skip_existing: bool) -> int:
    """Make all parts; returns the exit code. Raises UserError if `run` is no run folder."""
    pictures = pictures_of(run)
    skip = ["--skip-existing"] if skip_existing else []
    parts: list[Callable[[], object]] = [partial(evaluate.main, ["report", str(run), *skip])]
    parts += [partial(show.main, [picture, str(run), *skip]) for picture in pictures]
    parts.append(partial(evaluate.main, ["html", str(run)]))
    codes = [attempt(part) for part in parts]
    return next((code for code in codes if code), 0)


def main(argv: list[str] | None = None) -> int:
    parser = make_parser("tools.finish_run", "tools.finish_run")
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--skip-existing", action="store_true", help="keep results and pictures of the run's weights")
    args = parser.parse_args(argv)
    return finish(args.run, args.skip_existing)


if __name__ == "__main__":
    run_cli(main)
