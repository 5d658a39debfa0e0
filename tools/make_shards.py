"""Make, verify and index shards:  python -m tools.make_shards make SRC DST | verify DST | index DST

make    writes DST/shard-%06d.tar (plain WebDataset tars), index.npy, sources.txt and manifest.json from a folder of photos,
        a tar of photos, a folder of class tars, or ImageNet's own tars (`pipeline/prepare/classes.py` and `class_tars.py`
        say which photos have a class).
verify  reads every shard and lists each sample that is damaged or lost, and the photo that it was made from.
index   writes manifest and index for WebDataset tars of other programs, and does not change the tars.

Every photo is decoded once, whole, so an index holds only photos that decode. An upright 8-bit JPEG keeps its bytes,
everything else is converted to one (`pipeline/prepare/photo.py` says how); the manifest counts both by kind.
--resize-short N also re-encodes photos with more than N pixels on the short side; shards are split by the sizes of the
sources, so their own size then differs from --shard-mb. A photo that does not decode, has more than --max-pixels (by its
header, before anything is decoded) or is not a photo goes to rejected.jsonl; the program stops if more than --max-bad of
all photos do, rounded up. --skip-broken leaves out tars that cannot be read, and lists them there.

Samples are shuffled, so every shard holds all classes; a tar is therefore read in random order, which needs an SSD.
The same photos and settings give the same bytes, for any --processes. If the program is killed, the same command resumes:
a shard gets its name only when it is complete, and manifest.json is written last.
"""

import argparse
import math
import os
import sys
from pathlib import Path

from pipeline.decode import MAX_PIXELS
from pipeline.prepare.existing import index
from pipeline.prepare.make import make
from pipeline.prepare.verify import verify
from runtime.errors import UserError, run_cli


def main() -> int | None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.make_shards",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="make | verify | index")
    for command, what in (
        (make, "make shards from photos"),
        (verify, "check shards"),
        (index, "index tars of other programs"),
    ):
        one = commands.add_parser(command.__name__, help=what, allow_abbrev=False)
        one.set_defaults(command=command)
        if command is make:
            one.add_argument(
                "src",
                type=Path,
                help="a folder of photos, a tar of photos, a folder of class tars, or ImageNet's own tars",
            )
        one.add_argument("dst", type=Path, help="the folder of the shards")
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        one.add_argument("--processes", type=int, default=cpus, help="default: %(default)s, one per core")
        if command is not verify:
            one.add_argument(
                "--max-bad", type=float, default=0.01, help="share of photos that may be bad; default 0.01"
            )
            one.add_argument(
                "--skip-broken",
                action="store_true",
                help="leave out tars that are empty, cut, compressed or damaged, and list them in rejected.jsonl",
            )
            one.add_argument(
                "--max-pixels", type=int, default=MAX_PIXELS, help="of a source photo; default %(default)s"
            )
        if command is index:
            one.add_argument(
                "--photo",
                metavar="KEY",
                type=lambda key: key.lower().removeprefix("."),
                help="the key of the photos, for example input.jpg; default: jpg, jpeg, png, webp",
            )
        if command is make:
            one.add_argument(
                "--labels",
                choices=("auto", "yes", "no"),
                default="auto",
                help="whether folders are classes; default auto",
            )
            one.add_argument(
                "--devkit", type=Path, help="ILSVRC2012_devkit_t12.tar.gz; default: next to SRC, if it exists"
            )
            one.add_argument(
                "--follow-links", action="store_true", help="read the files and folders that links lead to"
            )
            one.add_argument("--shard-mb", type=float, default=256.0, help="most MB of a shard; default 256")
            one.add_argument("--seed", type=int, default=0, help="of the shuffle; default 0")
            one.add_argument("--resize-short", type=int, help="resize photos whose short side has more pixels to this")
            one.add_argument("--quality", type=int, default=95, help="of every JPEG that is encoded here; default 95")
    options = parser.parse_args()
    _check_numbers(options)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # paths may not be UTF-8
    return options.command(options)


def _check_numbers(options: argparse.Namespace) -> None:
    """Raise UserError if an option is out of bounds."""
    for name, low, high in (
        ("shard_mb", 0.001, math.inf), ("processes", 1, math.inf), ("max_pixels", 1, math.inf),
        ("resize_short", 1, math.inf), ("quality", 1, 100), ("max_bad", 0, 1),
    ):  # fmt: skip
        value = getattr(options, name, None)
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            bounds = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise UserError(f"--{name.replace('_', '-')} {value}: must be {bounds}")


if __name__ == "__main__":
    run_cli(main)
