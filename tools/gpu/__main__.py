"""The first minutes on a GPU: is all right, and how fast is it? One command, ten minutes, a table.

    python -m tools.gpu [--shards FOLDER] [--parts NAME,...] [--minutes 10] [--out runs/gpu/rows.jsonl]
    python -m tools.gpu --tiny         every part at a tiny size, on a CPU too: whether it runs, not how fast

Each part runs in a process of its own with a time limit, so that one that crashes or hangs costs only its own rows. A row
is appended to --out as soon as it is measured; what the parts print is in log.txt beside it. A part that cannot run here
(no DALI, no NCCL) says so. Exit code 1 if a part failed. It needs no network. What each row means:
docs/howto/first-hour-on-a-gpu.md. `make gpu [SHARDS=folder OUT=file ARGS='--parts speed']`.
"""

import argparse
import importlib.util
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from runtime.errors import UserError, require_positive, run_cli, suggest
from runtime.metrics import append_jsonl, read_jsonl, versions
from tools.docstring import make_parser
from tools.gpu.parts import PARTS, Part, Setting

# what every part imports, by its module: a machine that was not set up with `make setup` may lack some
PACKAGES = {
    "torch": "torch", "torchvision": "torchvision", "timm": "timm", "pydantic": "pydantic", "yaml": "pyyaml",
    "PIL": "pillow", "simplejpeg": "simplejpeg", "safetensors": "safetensors", "scipy": "scipy",
    "tensorboard": "tensorboard",
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser("tools.gpu", "tools.gpu.__main__")
    parser.add_argument("--shards", help="a folder of shards, of photos as you train on (default: painted scenes)")
    parser.add_argument("--parts", metavar="NAME,...", help=f"only these: {', '.join(part.name for part in PARTS)}")
    parser.add_argument("--minutes", type=float, default=10, help="for all parts together (default %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu/rows.jsonl"), help="rows are appended here (default %(default)s)"
    )
    parser.add_argument("--tiny", action="store_true", help="every part at a tiny size")
    return parser


def choose_parts(names: str | None) -> list[Part]:
    """The parts of --parts; `photos` comes with those that read photos. Raises UserError for an unknown name."""
    if names is None:
        return list(PARTS)
    wanted = set(filter(None, names.split(",")))
    known = [part.name for part in PARTS]
    if unknown := sorted(wanted - set(known)):
        raise UserError(f"--parts {names}: no part '{unknown[0]}'{suggest(unknown[0], known)} ({', '.join(known)})")
    if not wanted:
        raise UserError(f"--parts '{names}' names none ({', '.join(known)})")
    if wanted & {"decode", "training", "resume"}:
        wanted.add("photos")
    return [part for part in PARTS if part.name in wanted]


def check(args: argparse.Namespace) -> None:
    """Raise UserError if an option is wrong, or if there is no GPU and --tiny is not given."""
    if missing := [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]:
        raise UserError(
            f"not installed: {', '.join(missing)}; `{sys.executable} -m pip install {' '.join(missing)}`; on a machine "
            "without network: docs/howto/first-hour-on-a-gpu.md"
        )
    require_positive(args, "minutes")
    if args.shards:
        from eval.target import open_shards

        open_shards(args.shards)
    if args.out.is_dir():
        raise UserError(f"--out {args.out}: a folder; name a file in it, such as {args.out / 'rows.jsonl'}")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.open("a").close()
    except OSError as error:
        raise UserError(f"--out {args.out}: {error.strerror}") from None
    if not args.tiny:
        import torch

        if not torch.cuda.is_available():
            raise UserError(
                "torch finds no CUDA device here (`nvidia-smi` shows whether the driver does); --tiny runs every part "
                "at a tiny size on the CPU"
            )


def print_table(rows: list[dict[str, Any]], statuses: list[dict[str, Any]]) -> None:
    from rich.console import Console

    from tools.bench.rows import make_table

    console = Console()
    if not console.is_terminal:
        console.width = 190
    table = make_table("the first minutes on a GPU", ("part", "what", "value", "beside it", "target", ""), left=2)
    marks = {True: "reached", False: "NOT REACHED"}
    for row in rows:
        value = "" if row.get("value") is None else str(row["value"])
        words = (row["what"], f"{value} {row['unit']}".strip(), row.get("beside", ""), row.get("target", ""))
        table.add_row(row["part"], *words, marks[row["reached"]] if "reached" in row else "")
    console.print(table, markup=False)
    for status in statuses:
        if status["status"] != "done":
            print(f"{status['part']}: {status['status']}: {status['why']}")


def main(argv: list[str] | None = None, parts: list[Part] | None = None) -> int:
    """parts: others than those of --parts, for the tests."""
    args = build_parser().parse_args(argv)
    parts = parts or choose_parts(args.parts)
    check(args)
    from tools.gpu.runner import FAILED, run_parts

    log, begin = args.out.with_name("log.txt"), len(read_jsonl(args.out))
    started = {"run": time.strftime("%Y-%m-%d %H:%M:%S"), "tiny": args.tiny, "versions": versions()}
    append_jsonl(args.out, started | {"command": " ".join(sys.argv[1:])})
    with tempfile.TemporaryDirectory(prefix="gpu-") as scratch:
        shards = args.shards or str(Path(scratch, "shards"))
        setting = Setting(args.tiny, str(Path(shards).resolve()), scratch, str(args.out.resolve()))
        statuses = run_parts(parts, setting, log, 60 * args.minutes)
    rows = [row for row in read_jsonl(args.out)[begin:] if "what" in row]
    print_table(rows, statuses)
    print(f"{len(rows)} rows appended to {args.out}; what the parts printed: {log}")
    if failed := [status["part"] for status in statuses if status["status"] == FAILED]:
        print(f"error: failed: {', '.join(failed)}; `--parts {','.join(failed)}` runs them again", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    run_cli(main)
