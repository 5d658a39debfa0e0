"""Make, verify and index shards:  python -m tools.make_shards make SRC... DST | verify DST | index DST

make    writes DST/shard-%06d.tar (plain WebDataset tars), index.npy, sources.txt and manifest.json from photos: folders,
        tars (compressed ones too), zips, Parquet, tables of paths, ImageNet's own tars, or other shards. Several sources
        become one; equal names of classes are one class (`pipeline/prepare/sources/`).
verify  reads every shard and lists each sample that is damaged or lost, and the photo that it was made from.
index   writes manifest and index for WebDataset tars of other programs, and does not change the tars. --out writes them into
        another folder.

Every photo is decoded once, whole, so an index holds only photos that decode. An upright 8-bit JPEG keeps its bytes,
everything else is converted to one (`pipeline/prepare/photo.py` says how); the manifest counts both by kind.
--resize-short N also re-encodes photos with more than N pixels on the short side; shards are split by the sizes of the
sources, so their own size then differs from --shard-mb. A photo that does not decode, has more than --max-pixels (by its
header, before anything is decoded) or is not a photo goes to rejected.jsonl; the program stops if more than --max-bad of
all photos do, rounded up. --skip-broken leaves out tars that cannot be read, and lists them there.

Samples are shuffled, so every shard holds all classes; a tar is therefore read in random order, which needs an SSD.
The same photos and settings give the same bytes, for any --processes. If the program is killed, the same command resumes:
a shard gets its name only when it is complete, and manifest.json is written last. DST may be an address (s3://bucket/mine;
gs://, az://, hf://): each shard is uploaded when it is made and then deleted here, and any machine resumes.
"""

import argparse
import glob
import math
import os
import shlex
import sys
from pathlib import Path

from pipeline.decode import MAX_PIXELS
from pipeline.prepare.index import index
from pipeline.prepare.make import make
from pipeline.prepare.verify import verify
from pipeline.remote import is_address
from pipeline.remote.filesystem import WRITABLE
from runtime.cores import usable_cores
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
            sources = (
                "folders, tars, zips, Parquet, shards or tables of photos; docs/reference/formats.md lists all kinds"
            )
            one.add_argument("src", nargs="+", help=sources)
        where = "the folder of the shards" + (", or an address that they are uploaded to" if command is make else "")
        one.add_argument("dst", type=_destination if command is make else _folder, help=where)
        one.add_argument("--processes", type=int, default=usable_cores(), help="default: %(default)s, one per core")
        if command is not verify:
            _add_reading_options(one)
        if command is index:
            one.add_argument(
                "--photo",
                metavar="KEY",
                type=lambda key: key.lower().removeprefix("."),
                help="the key of the photos, for example input.jpg; default: jpg, jpeg, png, webp",
            )
            one.add_argument(
                "--out",
                type=Path,
                help="write the index into this folder, with links to the tars; default: beside them",
            )
        if command is make:
            _add_source_options(one)
            _add_shard_options(one)
    options = parser.parse_args()
    if options.command is make:
        options.src = [path for text in options.src for path in _paths(text)]
    _check_numbers(options)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # paths may not be UTF-8
    return options.command(options)


def _add_reading_options(one: argparse.ArgumentParser) -> None:
    """Options of `make` and `index`."""
    one.add_argument("--max-bad", type=float, default=0.01, help="share of photos that may be bad; default 0.01")
    one.add_argument(
        "--skip-broken",
        action="store_true",
        help="leave out tars that are empty, cut, compressed or damaged, and list them in rejected.jsonl",
    )
    one.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help="of a source photo; default %(default)s")
    one.add_argument(
        "--match", metavar="PATTERN", default="", help="only photos or files like this: 'train-*', 'cats/*'"
    )


def _add_source_options(one: argparse.ArgumentParser) -> None:
    """Options that say what the sources hold."""
    choices = ("auto", "yes", "no")
    one.add_argument("--labels", choices=choices, default="auto", help="whether folders are classes; default auto")
    one.add_argument("--devkit", type=Path, help="ILSVRC2012_devkit_t12.tar.gz; default: next to SRC, if it exists")
    one.add_argument("--follow-links", action="store_true", help="read the files and folders that links lead to")
    one.add_argument(
        "--list", dest="listed", metavar="FILE", type=Path, help="only the photos of this table, with its labels"
    )
    one.add_argument(
        "--label-file", metavar="FILE", type=Path, help="a table of photos and labels: CSV, TSV, JSON or text"
    )
    one.add_argument(
        "--class-names", metavar="FILE", type=Path, help="names of classes: one a line, or number and name"
    )
    one.add_argument(
        "--photo", metavar="COLUMN", default="", help="of Parquet: the photos' bytes; default: image, img, ..."
    )
    one.add_argument(
        "--label-column", dest="label", metavar="COLUMN", default="", help="of Parquet; default: label, class, ..."
    )


def _add_shard_options(one: argparse.ArgumentParser) -> None:
    """Options of the shards that are written."""
    one.add_argument("--shard-mb", type=float, default=256.0, help="most MB of a shard; default 256")
    one.add_argument("--seed", type=int, default=0, help="of the shuffle; default 0")
    one.add_argument("--resize-short", type=int, help="resize photos whose short side has more pixels to this")
    one.add_argument("--quality", type=int, default=95, help="of every JPEG that is encoded here; default 95")


def _destination(text: str) -> Path | str:
    scheme, _, rest = text.partition(":/")
    if scheme in WRITABLE and not rest.startswith("/"):
        raise UserError(f"DST {text}: did you mean {scheme}://{rest}? (a folder of this name: ./{text})")
    return text if is_address(text) else Path(text)


def _folder(text: str) -> Path:
    if is_address(text):
        raise UserError(
            f"DST {text}: an address; verify and index read a folder of this machine, and training checks each shard of an "
            "address when it downloads it"
        )
    return Path(text)


def _paths(text: str) -> list[Path]:
    """The sources that a word of the command line names: a path; or several with blanks between them, or a pattern, if there
    is no such path (`make shards SRC='a.zip b.zip'`)."""
    if os.path.exists(text):
        return [Path(text)]
    try:
        words = shlex.split(text)
    except ValueError:  # a quote without its end: a name
        words = [text]
    expanded = [found for word in words for found in (sorted(glob.glob(word)) or [word])]
    return [Path(word) for word in expanded] if any(map(os.path.exists, expanded)) else [Path(text)]


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
