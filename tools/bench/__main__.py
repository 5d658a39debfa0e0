"""Measurements of speed and memory.

    python -m tools.bench WHAT ...        `python -m tools.bench WHAT --help` describes it; or `make bench WHAT=...`

The command line is checked before torch is imported. `--out rows.jsonl` appends the results as JSON lines, with versions
and date.
"""

import argparse
import importlib
import os
import tempfile
from pathlib import Path

from runtime.config import load_config, split_places
from runtime.errors import UserError, require_positive, run_cli
from tools.docstring import add_command, make_parser

SCENES, PHOTOS = "data/scenes/shards/train", "data/scenes/train"
MODULES = {"all": "loader"}  # of subcommands whose module has another name


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser("tools.bench", "tools.bench.__main__")
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")

    def add(name: str, summary: str, shards: bool = False, config: str | None = None) -> argparse.ArgumentParser:
        command = add_command(commands, f"tools.bench.{MODULES.get(name, name)}", name, summary)
        if config:
            command.add_argument("--config", default=config, help="default: %(default)s")
        if shards:
            command.add_argument(
                "--shards", default=SCENES, help="shards: a folder, or several (default: the painted scenes)"
            )
        command.add_argument("--out", type=Path, help="append the rows as JSON lines")
        return command

    add("data", "photos per second of each reader, stage by stage", shards=True)
    loader = add("all", "training with the loader, beside a cached batch", shards=True, config="configs/demo.yaml")
    loader.add_argument("--rounds", type=int, default=5, help="default %(default)s, after a first one")
    loader.add_argument("--steps", type=int, default=30, help="of each round (default %(default)s)")
    _add_step_options(add("step", "the training step of each method, beside the naive implementation"))
    locality = add("locality", "the price of the locality prior, step by step in turns")
    locality.add_argument(
        "--arch", choices=("vit_small", "vit_tiny", "tiny"), default="vit_small", help="default %(default)s"
    )
    locality.add_argument("--batch", type=int, default=8, help="images (default %(default)s)")
    locality.add_argument("--rounds", type=int, default=9, help="pairs of steps (default %(default)s)")
    locality.add_argument("--sigma", type=float, default=1.0, help="patches (default %(default)s)")
    features = add("features", "features of photos as files, beside the bare forward pass", shards=True)
    features.add_argument(
        "--arch", choices=("vit_small", "vit_tiny", "tiny"), default="vit_small", help="default %(default)s"
    )
    features.add_argument("--size", type=int, default=224, help="of the images, pixels (default %(default)s)")
    features.add_argument("--photos", type=int, default=600, help="of each round (default %(default)s)")
    features.add_argument("--rounds", type=int, default=3, help="default %(default)s, after a first one")
    scale = add("scale", "training on several devices, beside one", shards=True, config="configs/demo.yaml")
    scale.add_argument("processes", type=_devices, metavar="N", help="number of devices, or all")
    scale.add_argument("--batch", type=int, help="images on each device (default: the config's batch divided by N)")
    scale.add_argument("--steps", type=int, default=100, help="default %(default)s")
    scale.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    leak = add("leak", "memory, threads and open files over many steps", shards=True, config="configs/demo.yaml")
    leak.add_argument("--reader", choices=("wds", "dali"), help="only this one")
    leak.add_argument("--steps", type=int, default=2000, help="default %(default)s")
    plan = add("plan", "index and plan at 1.28 and 100 million samples")
    plan.add_argument("--sources", type=int, default=1, help="folders that the samples are in (default %(default)s)")
    ranks = add("ranks", "512 processes: what each plans, reads and decides")
    ranks.add_argument("--ranks", type=int, default=512, help="default %(default)s")
    ranks.add_argument("--per-node", type=int, default=8, help="on one machine (default %(default)s)")
    ranks.add_argument("--steps", type=int, default=20, help="default %(default)s")
    resume = add("resume", "what 16 processes that resume together read of a checkpoint")
    resume.add_argument("--gigabytes", type=float, default=1.0, help="of the checkpoint (default %(default)s)")
    resume.add_argument("--ranks", type=int, default=16, help="default %(default)s")
    resume.add_argument("--per-node", type=int, default=4, help="on one simulated machine (default %(default)s)")
    resume.add_argument("--dst", default=tempfile.gettempdir(), help="the disk to write to (default: %(default)s)")
    _add_shards_options(add("shards", "making shards, beside decoding alone"))
    _add_knn_options(add("knn", "k-NN at ImageNet's size, beside the bare product and top-k"))
    checkpoint = add("checkpoint", "how long a checkpoint delays the step", config="configs/densedino_vits16.yaml")
    checkpoint.add_argument("--dst", default=tempfile.gettempdir(), help="the disk to write to (default: %(default)s)")
    checkpoint.add_argument("--rounds", type=int, default=5, help="default %(default)s, after a first one")
    online = add("online", "how long training waits for measures beside it", shards=True, config="configs/demo.yaml")
    online.add_argument("--voc", default="data/scenes", help="scenes (default: the painted ones)")
    online.add_argument("--rounds", type=int, default=20, help="default %(default)s")
    online.add_argument("--steps", type=int, default=10, help="of each part of a round (default %(default)s)")
    gpu_code = add("gpu_code", "kernels and bytes of the losses on an H200, counted without a GPU")
    gpu_code.add_argument("--images", type=int, default=256, help="images of one chunk (default %(default)s)")
    return parser


def _devices(word: str) -> int | str:
    if word != "all" and not word.isdecimal():
        raise argparse.ArgumentTypeError(f"'{word}': a number of devices, or all")
    return word if word == "all" else int(word)


def _add_step_options(step: argparse.ArgumentParser) -> None:
    from tools.bench.step import DTYPES, FORMS, PAPER

    step.add_argument("--head", action="store_true", help="peak memory of heads and losses alone (with --batch 128)")
    step.add_argument("--check", action="store_true", help="losses of five steps of both, of arch tiny by default")
    step.add_argument(
        "--methods", default=",".join(PAPER), metavar="M,...|all", help="of runtime/methods.py (default: %(default)s)"
    )
    step.add_argument(
        "--arch", metavar="A,...", help="vit_small, vit_tiny, tiny, or timm's names (default: the first two)"
    )
    for name, choices in (("form", FORMS), ("dtype", DTYPES)):
        step.add_argument(f"--{name}", choices=choices, help="only this one")
    step.add_argument("--batch", type=int, nargs="+", default=[8], help="images; of several, a row has the fastest")
    step.add_argument("--steps", type=int, default=2, help="timed steps of each process (default %(default)s)")
    # the first step compiles; the kernel still clears the memory it freed in the second (docs/lab/2026-11.md)
    step.add_argument("--warmup", type=int, default=3, help="steps before those (default %(default)s)")
    step.add_argument("--rounds", type=int, default=3, help="processes of each combination, taking turns")
    step.add_argument("--eager", action="store_true", help="do not compile ours (default: compile if possible)")
    step.add_argument("--times", type=Path, help="keep every process's times here, and use those of earlier calls too")


def _add_shards_options(shards: argparse.ArgumentParser) -> None:
    shards.add_argument(
        "--src", default=PHOTOS, help="photos: a folder or a tar (default: those of the painted scenes)"
    )
    shards.add_argument("--dst", default=tempfile.gettempdir(), help="the disk to write to (default: %(default)s)")
    shards.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default %(default)s")
    shards.add_argument("--photos", type=int, default=4000, help="in each round (default %(default)s)")
    shards.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    shards.add_argument("--json", action="store_true", help="print the measurements as one line of JSON")


def _add_knn_options(knn: argparse.ArgumentParser) -> None:
    knn.add_argument("--photos", type=int, default=1_281_167, help="in the train set (default %(default)s)")
    knn.add_argument("--queries", type=int, default=50_000, help="default %(default)s")
    knn.add_argument("--width", type=int, default=384, help="of the features (default %(default)s)")
    knn.add_argument("--k", type=int, default=20, help="default %(default)s")
    knn.add_argument("--minutes", type=float, default=8, help="for both sides together (default %(default)s)")
    knn.add_argument(
        "--folder", type=Path, help="where the train set's file is written (default: the temporary folder)"
    )


def check(args: argparse.Namespace) -> None:
    """Raise UserError if an option is out of its bounds, or if a path does not exist."""
    positive = (
        "steps", "rounds", "processes", "photos", "queries", "width", "k", "minutes", "images", "sigma", "sources", "ranks",
        "per_node", "gigabytes", "batch", "size",
    )  # fmt: skip
    require_positive(args, *(name for name in positive if isinstance(getattr(args, name, None), int | float)))
    if "config" in args:
        load_config(args.config)
    if args.what == "shards":
        if not Path(args.src).exists():
            raise UserError(f"{args.src}: no such folder or tar")
    elif "shards" in args:
        from pipeline.shards import Shards

        for place in split_places(args.shards):
            Shards(place)


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    check(args)
    importlib.import_module(f"tools.bench.{MODULES.get(args.what, args.what)}").run(args)


if __name__ == "__main__":
    run_cli(main)
