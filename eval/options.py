"""Options that several evaluations share, and how they are read. Imports no torch."""

import argparse
import re
from pathlib import Path
from typing import Any

from eval.feature_folder import ARRAYS, DTYPES, FITS, read_state
from eval.masks import check_scenes
from eval.parquet import require_pyarrow
from eval.photo_source import PhotoSource, open_photo_source
from eval.point_list import PointList, read_points
from eval.target import EvalTarget, PhotoSets, require_choice
from runtime.errors import UserError, require_positive

NETWORK = "a run folder, a checkpoint, a backbone file or timm:NAME"
SCENES = "a folder in Pascal VOC's layout"
PHOTO_SIZE = "side of a photo in pixels (default: that of the training views)"

Options = dict[str, Any]  # by name, as argparse gives them


def add_network(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("network", metavar="NETWORK", help=NETWORK)
    parser.add_argument("--untrained", action="store_true", help="the run's network before training")


def add_photos(parser: argparse.ArgumentParser, size: bool = True) -> None:
    parser.add_argument("--train", help="train set: shards (default: the run's own, without what it held out)")
    parser.add_argument("--val", help="validation set: shards (default: the run's data.val, else what it held out)")
    parser.add_argument("--limit", type=int, help="at most this many photos of each set, evenly spaced")
    add_ignore_class(parser)
    parser.add_argument("--workers", type=int, help="data workers (default: by the number of photos)")
    if size:
        add_size(parser, PHOTO_SIZE)


def add_size(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--size", type=read_side, metavar="N", help=help)


def add_ignore_class(parser: argparse.ArgumentParser) -> None:
    help = "leave out the photos of a class; may be repeated (default: the run's eval.ignore_classes)"
    parser.add_argument("--ignore-class", metavar="NAME", action="append", help=help)


def add_scenes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", help=f"{SCENES} (default: the run's eval.voc)")
    parser.add_argument(
        "--classes", type=int, help="their number (default: from classes.txt, else from the masks of all splits)"
    )
    add_palette(parser)
    add_size(parser, "side of a scene in pixels (default: 448; small protocol: the view's)")
    parser.add_argument("--workers", type=int, help="data workers (default: by the number of scenes)")


def add_palette(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--palette",
        help="for masks of colors: a file of lines R G B CLASS (default: palette.txt in the scenes' folder)",
    )


def add_splits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--train-split", help="default: trainaug if it is listed, else train")
    parser.add_argument("--val-split", default="val", help="default: val")


def check_positive(args: Options, *names: str) -> None:
    require_positive(argparse.Namespace(**args), *names)


def open_target(network: str, args: Options) -> EvalTarget:
    """The network's target. Raises UserError if its path or --untrained is wrong."""
    target = EvalTarget(network)
    target.check_untrained(args["untrained"])
    return target


def open_photos(network: str, args: Options) -> tuple[EvalTarget, PhotoSets | None]:
    """(target, its photos), taking --train, --val and --ignore-class out of the options. Raises UserError."""
    target = open_target(network, args)
    target.ignore_classes(args.pop("ignore_class"))
    return target, target.photo_sets(args.pop("train"), args.pop("val"), args["limit"])


def open_scenes(network: str, args: Options) -> tuple[EvalTarget, str]:
    """(target, folder of scenes), taking --data out of the options; all masks are looked at. Raises UserError."""
    target = open_target(network, args)
    data = target.scenes_folder(args.pop("data"))
    splits = (args["split"],) if "split" in args else (args["train_split"], args["val_split"])
    check_scenes(data, splits, args["palette"], args["classes"])
    return target, data


def open_features(network: str, args: Options) -> tuple[EvalTarget, PhotoSource, PointList | None]:
    """(target, photos, points), taking the source and --points out of the options; the folder to write is looked at.
    Raises UserError."""
    args["features"] = [require_choice("--features", name, ARRAYS[:-1]) for name in args["features"].split(",")]
    require_choice("--fit", args["fit"], FITS)
    require_choice("--dtype", args["dtype"], DTYPES)
    if not -1 <= args["threshold"] <= 1:
        raise UserError(f"--threshold {args['threshold']:g}: a cosine, from -1 to 1")
    if args["neighbors"] and not {"cls", "mean"} & {*args["features"]}:
        raise UserError("--neighbors compares [CLS] or mean patch tokens: add cls to --features")
    if args["parquet"]:
        require_pyarrow()
    target = open_target(network, args)
    read_state(args["out"])
    source = open_photo_source(args["source"], target.config)
    if args["out"].resolve().is_relative_to(Path(args.pop("source")).resolve()):
        raise UserError(f"{args['out']}: lies in the photos' folder, whose pictures are all photos; name one beside it")
    points = args.pop("points")
    return target, source, read_points(points, source.names) if points else None


def read_size(text: str) -> int | tuple[int, int]:
    """The side of a square, as in 448, or height and width, as in 480x640. Raises UserError."""
    sides = [int(side) for side in text.lower().split("x") if re.fullmatch(r"[0-9]{1,6}", side)]
    if len(sides) != 1 + text.lower().count("x") or len(sides) > 2 or 0 in sides:
        raise UserError(f"--size {text}: expected pixels, as in 448, or HEIGHTxWIDTH, as in 480x640")
    return sides[0] if len(sides) == 1 or sides[0] == sides[1] else (sides[0], sides[1])


def read_side(text: str) -> int:
    """The side of a square. Raises UserError."""
    size = read_size(text)
    if not isinstance(size, int):
        raise UserError(
            f"--size {text}: this measure is defined on squares: one number, as in --size {max(size)} (embed takes "
            "HEIGHTxWIDTH)"
        )
    return size


def read_rates(text: str) -> tuple[float, ...]:
    """Learning rates, as in .001,.01,.1. Raises UserError."""
    try:
        rates = tuple(float(number) for number in text.split(","))
    except ValueError:
        raise UserError(f"--rates {text}: must be numbers separated by commas, as in .001,.01,.1") from None
    if min(rates) <= 0 or len(set(rates)) < len(rates):
        raise UserError(f"--rates {text}: all must be more than 0 and different")
    return rates


def read_clusters(text: str) -> list[int]:
    """Numbers of clusters, as in 500,21. Raises UserError."""
    try:
        clusters = [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"--clusters {text}: must be whole numbers separated by commas, as in 500,21") from None
    if min(clusters) < 2:
        raise UserError(f"--clusters {text}: each must be at least 2")
    return clusters
