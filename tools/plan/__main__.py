"""What training on your photos will take, before it starts: config, values, memory, hours, disk.

    python -m tools.plan [--images N | --shards SHARDS | --src PHOTOS] [--config FILE] [--gpu NAME] [--gpus N]
                         [--shard-mb MB] [--write FILE] [a.b=c ...]           or `make plan IMAGES=10000 GPU=24GB`

    --images N      so many photos, of ImageNet's size; no data is needed
    --shards PLACE  the photos of shards: a folder or an address
    --src PLACE     a folder or tar of photos, of which a sample of headers is read
    --config FILE   plan this config; by default one is proposed, and scaled to the number of photos
    --gpu NAME      h100, a100, 4090, ... or a memory (24GB), or cpu; by default all cards are compared
    --gpus N        so many of them; default 1
    --shard-mb MB   size of the shards to be made; default 256
    --write FILE    write the proposed config to FILE, which must not exist

Nothing is trained, and torch is not loaded, unless a config is asked for that is not in tools/plan/counted.json: then its
arithmetic is counted, which takes up to a minute. Memory is that of tensors in an uncompiled step (model/cost.py); hours are
those of the nearest measured row, or an estimate that says so (tools/plan/hours.py); rules for epochs, batch and rate are in
tools/plan/recipe.py, each with its source.
"""

import argparse
import shlex
from pathlib import Path

from runtime.config import Config, load_config, unknown_option
from runtime.errors import UserError, run_cli
from tools.docstring import make_parser
from tools.photo_shards import is_photo_folder
from tools.plan import photos as about_photos
from tools.plan import recipe
from tools.plan.counted import Counted, count, known
from tools.plan.hours import Device, find_device
from tools.plan.page import Plan, line, precision

OPTIONS = ("--images", "--shards", "--src", "--config", "--gpu", "--gpus", "--shard-mb", "--write", "--help")


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser("tools.plan", "tools.plan.__main__")
    for name in ("images", "shards", "src", "config", "gpu", "gpus", "shard-mb", "write"):
        parser.add_argument(f"--{name}", default="", help=argparse.SUPPRESS)  # in the docstring
    parser.add_argument("words", nargs="*", metavar="a.b=c", help=argparse.SUPPRESS)
    return parser


def number(name: str, word: str, example: str) -> int:
    """Raise UserError if the value of an option is no whole number above 0. 10_000, 10,000 and 10k are numbers too."""
    plain = word.strip().replace(",", "").replace("_", "").lower()
    factor = {"k": 1000, "m": 1_000_000}.get(plain[-1:], 1)
    plain = plain[:-1] if factor > 1 else plain
    try:
        value = float(plain) * factor
    except ValueError:
        value = 0
    if not 1 <= value < 1e12 or not value.is_integer():
        raise UserError(f"{name}={word}: a whole number above 0, for example {name}={example}")
    return int(value)


def photos_of(args: argparse.Namespace) -> about_photos.Photos:
    """The photos that the options name. Raises UserError if they name none, or more than one kind."""
    given = [name for name in ("images", "shards", "src") if getattr(args, name)]
    if len(given) != 1:
        found = f" ({' and '.join(name.upper() for name in given)} are given)" if given else ""
        raise UserError(f"which photos? One of IMAGES=10000, SHARDS=folder and SRC=photos/{found}")
    if args.images:
        return about_photos.assumed(number("IMAGES", args.images, "10000"))
    return about_photos.of_shards(args.shards) if args.shards else about_photos.of_source(args.src)


def main(argv: list[str] | None = None) -> int:
    args, unknown = build_parser().parse_known_intermixed_args(argv)
    if unknown:
        raise UserError(unknown_option(unknown[0], OPTIONS))
    if args.write:
        recipe.refuse(Path(args.write), args.words)
    device = find_device(args.gpu) if args.gpu else None
    gpus = number("GPUS", args.gpus, "2") if args.gpus else 1
    photos = photos_of(args)
    name, why = args.config, "as asked for"
    if not name:
        name, why = recipe.choose(photos.images, device.kind if device else "cuda")
    given = {word.partition("=")[0] for word in args.words}
    values = [] if args.config else recipe.scale(load_config(name, args.words), photos.images, name)
    values = [v for v in values if v.key not in given]  # what the user says goes before the rules
    config = load_config(name, [*recipe.words(values), *args.words])
    ready = args.shards or (args.src if args.src and is_photo_folder(args.src) else "")  # what SHARDS= takes as it is
    place = shlex.quote(ready or "data/mine")
    shard_mb = number("SHARD_MB", args.shard_mb, "256") if args.shard_mb else about_photos.SHARD_MB
    plan = Plan(name, why, values, args.words, config, photos, device, gpus, _counted(config, device), shard_mb, place)
    print("\n".join(plan.lines()))
    if args.write:
        recipe.write(
            Path(args.write),
            name,
            values,
            [*args.words, *plan.fitting_words()],
            photos.images,
            plan.hours_text(),
            place,
        )
        print(line("written", f"{args.write}: make pretrain CONFIG={args.write} SHARDS={place}"))
    return 0


def _counted(config: Config, device: Device | None) -> Counted:
    kind = device.kind if device else "cuda"
    dtype = precision(config, kind)
    if found := known(config, kind, dtype):
        return found
    print("counting the arithmetic of this config: up to a minute ...", flush=True)
    return count(config, kind, dtype)


if __name__ == "__main__":
    run_cli(main)
