"""Pictures of what a network sees and has learned.

    python -m tools.show WHAT NETWORK ...        one kind of picture; `python -m tools.show WHAT --help` describes it
    python -m tools.show run RUN                 all pictures of a run, into RUN/pictures/

The command line is checked before torch and matplotlib are imported.
"""

import argparse
import importlib
from pathlib import Path

from eval.masks import check_scenes
from eval.provenance import known_weights, weights_of
from eval.target import EvalTarget, open_shards
from runtime.config import Config, load_config
from runtime.errors import UserError, run_cli
from tools.docstring import add_command, make_parser
from tools.show.files import check_images, keep_existing, output_path

NETWORK_TOOLS = {  # name: (summary, the photos' shorter side as a multiple of the size that the network was trained for)
    "attention": ("what [CLS] attends to, head by head", 1),
    "points": ("what reference tokens attend to", 1),
    "pca": ("the first three principal components of patch tokens", 2),
    "similarity": ("cosine similarity of one patch to all patches", 2),
    "neighbors": ("photos and those that the network finds most similar, without labels", 1),
    "segmentation": ("a linear map on patch tokens, beside the true classes", 2),
}


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser("tools.show", "tools.show.__main__")
    commands = parser.add_subparsers(dest="tool", required=True, metavar="WHAT")
    _add_views(commands)
    for name, (summary, scale) in NETWORK_TOOLS.items():
        _add_network_tool(commands, name, summary, scale)
    _add_misalignment(commands)
    run = add_command(commands, "tools.show.run", "run", "all pictures of a run")
    run.add_argument("run", type=Path, help="a run folder")
    run.add_argument("--skip-existing", action="store_true", help="keep pictures of the same weights")
    return parser


def _add_views(commands: "argparse._SubParsersAction") -> None:
    views = add_command(commands, "tools.show.views", "views", "the trainer's input: windows, views and shared points")
    views.add_argument("source", help="a run folder, or a folder or an address of shards")
    views.add_argument("--config", type=Path, help="the config of the views, for a folder of shards")
    views.add_argument("--out", type=Path, help="the picture (default: RUN/pictures/views.png or views.png)")
    views.add_argument("--images", type=int, default=4, help="number of images, evenly spaced (default 4)")
    views.add_argument("--samples", type=int, nargs="+", help="these sample ids instead")
    views.add_argument("--epoch", type=int, default=0, help="the epoch whose views are shown (default 0)")
    views.add_argument("--skip-existing", action="store_true", help="keep a picture of the same weights")


def _add_network_tool(commands: "argparse._SubParsersAction", name: str, summary: str, scale: int) -> None:
    tool = add_command(commands, f"tools.show.{name}", name, summary)
    tool.set_defaults(scale=scale)
    tool.add_argument("network", help="a run folder, a checkpoint or a backbone file")
    tool.add_argument("photos", type=Path, nargs="*", help="image files, or a folder in Pascal VOC's layout")
    tool.add_argument("--compare", nargs="+", default=[], metavar="NETWORK", help="other networks, a row each")
    tool.add_argument("--out", type=Path, help=f"the picture (default: RUN/pictures/{name}.png or {name}.png)")
    images = "photos that are searched, evenly spaced" if name == "neighbors" else "images of a folder, evenly spaced"
    number = 1000 if name == "neighbors" else 4
    tool.add_argument("--images", type=int, default=number, help=f"number of {images} (default {number})")
    usual = "the size that each network was trained for" if scale == 1 else f"{scale} times the size of training"
    tool.add_argument("--size", type=int, help=f"the shorter side in pixels (default: {usual})")
    tool.add_argument("--skip-existing", action="store_true", help="keep a picture of the same weights")
    if name in ("attention", "points"):
        tool.add_argument("--block", type=int, help="the block, counted from 1 (default: the last)")
    if name in ("points", "similarity"):
        tool.add_argument(
            "--points", nargs="+", metavar="X,Y", help="points, as shares of the photo's width and height"
        )
    if name == "neighbors":
        tool.add_argument("--queries", type=int, default=6, help="photos whose neighbors are shown (default 6)")
    if name == "segmentation":
        tool.add_argument("--scenes", type=int, default=500, help="train scenes, at most (default 500)")
        tool.add_argument("--palette", help="classes of the masks' colors (default: palette.txt in the scenes' folder)")


def _add_misalignment(commands: "argparse._SubParsersAction") -> None:
    tool = add_command(
        commands, "tools.show.misalignment", "misalignment", "how often two views hold different objects"
    )
    tool.add_argument("data", type=Path, nargs="?", default=Path("data/scenes"), help="a folder in Pascal VOC's layout")
    tool.add_argument("--config", nargs="+", default=[], metavar="FILE", help="add the views of these configs")
    tool.add_argument("--split", default="train", help="default: train")
    tool.add_argument("--scenes", type=int, default=1000, help="scenes, at most, evenly spaced (default 1000)")
    tool.add_argument("--draws", type=int, default=20, help="window draws for each scene (default 20)")
    tool.add_argument(
        "--min-share", type=float, default=0.0, help="share of an object that a view must hold (default: any)"
    )
    tool.add_argument("--out", type=Path, default=Path("misalignment.png"), help="the picture")


# ---------------------------------------------------------------------------------------------------- the subcommands


def _check_minima(args: argparse.Namespace, **minima: int) -> None:
    """Raise UserError if one of these options is below its minimum."""
    for name, minimum in minima.items():
        if getattr(args, name) < minimum:
            raise UserError(f"--{name}: at least {minimum}, this is {getattr(args, name)}")


def show_views(args: argparse.Namespace) -> None:
    _check_minima(args, images=1, epoch=0)
    run = Path(args.source)
    is_run = (run / "config.yaml").is_file()
    if is_run and args.config:
        raise UserError(f"{args.source} is a run with a config of its own; --config is for a folder of shards")
    out = output_path("views", run if is_run else None, args.out)
    current = known_weights(run) if is_run else None
    weights = [current] if current else []
    if keep_existing(out, args.skip_existing, weights):
        return
    file = run / "config.yaml" if is_run else args.config
    config = load_config(file) if file else Config()
    shards = EvalTarget(run).training_shards() if is_run else open_shards(args.source, config)
    if shards is None:
        raise UserError(f"{run}/config.yaml: data.shards names no folder")
    from tools.show import views

    views.show(shards, config, args, weights, out)


def show_networks(args: argparse.Namespace) -> None:
    _check_minima(args, images=1)
    if args.tool == "segmentation":
        _check_minima(args, scenes=1)
    if args.tool == "neighbors":
        _check_minima(args, queries=1)
    targets = [EvalTarget(path) for path in (args.network, *args.compare)]
    weights = [weights_of(target.path) for target in targets]
    out = output_path(args.tool, targets[0].run, args.out)
    if keep_existing(out, args.skip_existing, weights):
        return
    check_images(args.photos)
    if args.tool == "segmentation":
        for folder in args.photos or [Path(targets[0].place("eval.voc") or "")]:
            if (folder / "ImageSets").is_dir():
                check_scenes(folder, palette_file=args.palette)
    from tools.show.figures import run_tool

    run_tool(importlib.import_module(f"tools.show.{args.tool}").draw, targets, weights, args, out)


def show_misalignment(args: argparse.Namespace) -> None:
    _check_minima(args, scenes=1, draws=1)
    if not 0 <= args.min_share <= 1:
        raise UserError(f"--min-share: between 0 and 1, this is {args.min_share}")
    configs = {path: load_config(path) for path in args.config}
    if not args.data.is_dir():
        raise UserError(f"{args.data}: no such folder; `make scenes` paints data/scenes")
    from tools.show import misalignment

    misalignment.show(args, configs)


def show_run(args: argparse.Namespace) -> None:
    from tools.show import run

    for name in run.pictures_of(args.run):
        main([name, str(args.run), *(["--skip-existing"] if args.skip_existing else [])])


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    commands = {"views": show_views, "misalignment": show_misalignment, "run": show_run}
    commands.get(args.tool, show_networks)(args)


if __name__ == "__main__":
    run_cli(main)
