"""All evaluations of a frozen network, as one command line.

    python -m eval knn|linear|linear_seg|cluster_seg|retrieval_seg|points|compare|report|html|embed NETWORK ... [--help]
    torchrun --nproc-per-node=8 -m eval knn NETWORK ...

Imports no torch until the arguments, the paths and the data are checked: help and errors come at once.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eval.options import (
    NETWORK,
    SCENES,
    Options,
    add_ignore_class,
    add_network,
    add_palette,
    add_photos,
    add_scenes,
    add_size,
    add_splits,
    check_positive,
    open_features,
    open_photos,
    open_scenes,
    read_clusters,
    read_rates,
    read_size,
)
from eval.target import KINDS, MEASURES, MEMORY_SIZE, PROTOCOLS, check_temperature, require_choice
from runtime.errors import run_cli


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one evaluation; returns the exit code. Raises UserError, or SystemExit for an unknown option."""
    args = vars(build_parser().parse_args(argv))
    return args.pop("run")(args.pop("network", None), args)


def build_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m eval", description=__doc__, allow_abbrev=False, formatter_class=raw)
    commands = parser.add_subparsers(metavar="EVALUATION", required=True)
    for name, command in COMMANDS.items():
        description = f"{command.summary}\n\n{command.details}\n\nThe protocol and its sources: eval/{name}.py"
        added = commands.add_parser(
            name, help=command.summary, description=description, allow_abbrev=False, formatter_class=raw
        )
        command.add_options(added)
        added.set_defaults(run=command.run)
    return parser


# --------------------------------------------------------- each command: its options; then check, import, and run


def add_knn(parser: argparse.ArgumentParser) -> None:
    add_network(parser)
    add_photos(parser)
    parser.add_argument("--features", default="cls", help=f"{', '.join(KINDS)} (default: cls)")
    parser.add_argument("--k", type=int, help="neighbors (default: the run's eval.k, 20)")
    parser.add_argument("--temperature", type=float, help="of the votes (default: the run's eval.temperature, .07)")
    parser.add_argument("--batch", type=int, default=256, help="photos at a time (default: 256)")


def run_knn(network: str, args: Options) -> int:
    require_choice("--features", args["features"], KINDS)
    check_positive(args, "k", "temperature", "limit", "batch")
    if args["temperature"]:
        check_temperature(args["temperature"])
    target, sets = open_photos(network, args)
    from eval import knn

    return knn.run(target, sets, **args)


def add_linear(parser: argparse.ArgumentParser) -> None:
    add_network(parser)
    add_photos(parser)
    parser.add_argument("--epochs", type=int, help="default: 10; small protocol: 100")
    parser.add_argument("--batch", type=int, help="photos (default: 1024; small protocol: 128)")
    parser.add_argument("--augment", action=argparse.BooleanOptionalAction, help="default: yes; small protocol: no")
    parser.add_argument("--rates", help="learning rates per 256 photos of a batch, as in .001,.01,.1")
    parser.add_argument("--seed", type=int, help="of the initial weights, the order and the crops (default: 0)")


def run_linear(network: str, args: Options) -> int:
    check_positive(args, "epochs", "batch", "limit")
    args["rates"] = read_rates(args["rates"]) if args["rates"] else None
    target, sets = open_photos(network, args)
    from eval import linear

    return linear.run(target, sets, **args)


def add_linear_seg(parser: argparse.ArgumentParser) -> None:
    add_network(parser)
    add_scenes(parser)
    add_splits(parser)
    parser.add_argument("--protocol", default="densedino", help=f"{' or '.join(PROTOCOLS)} (default: densedino)")
    parser.add_argument("--train-size", type=int, help="side of the logits in training (default: 100/448 of --size)")
    parser.add_argument("--augment", action=argparse.BooleanOptionalAction, help="default: yes; small protocol: no")
    parser.add_argument("--epochs", type=int, help="default: the run's eval.seg_epochs, 25")
    parser.add_argument("--lr", type=float, help="per 60 scenes of a batch (default: the run's eval.seg_lr, .01)")
    parser.add_argument("--batch", type=int, help="scenes (default: 64)")
    parser.add_argument("--seed", type=int, help="of the initial weights and the order (default: 0)")


def run_linear_seg(network: str, args: Options) -> int:
    require_choice("--protocol", args["protocol"], PROTOCOLS)
    check_positive(args, "classes", "train_size", "epochs", "lr", "batch")
    target, data = open_scenes(network, args)
    from eval import linear_seg

    return linear_seg.run(target, data, **args)


def add_cluster_seg(parser: argparse.ArgumentParser) -> None:
    add_network(parser)
    add_scenes(parser)
    parser.add_argument("--split", default="val", help="default: val")
    parser.add_argument("--clusters", help="numbers of clusters, as in 500,21 (default: 500 and one per class)")
    parser.add_argument("--seeds", type=int, default=5, help="default: 5")


def run_cluster_seg(network: str, args: Options) -> int:
    check_positive(args, "classes", "seeds")
    args["clusters"] = read_clusters(args["clusters"]) if args["clusters"] else None
    target, data = open_scenes(network, args)
    from eval import cluster_seg

    return cluster_seg.run(target, data, **args)


def add_retrieval_seg(parser: argparse.ArgumentParser) -> None:
    add_network(parser)
    add_scenes(parser)
    add_splits(parser)
    parser.add_argument("--pixels", action="store_true", help="raw pixels of the patches instead of tokens")
    parser.add_argument("--scenes", type=int, help="train scenes with labels, evenly spaced (default: all)")
    parser.add_argument("--k", type=int, default=30, help="neighbors (default: 30)")
    parser.add_argument("--temperature", type=float, default=0.02, help="of their weights (default: .02)")
    size_help = f"tokens of the memory bank, at most (default: {MEMORY_SIZE})"
    parser.add_argument("--memory-size", type=int, default=MEMORY_SIZE, help=size_help)
    parser.add_argument("--seed", type=int, default=0, help="of the choice among more tokens (default: 0)")


def run_retrieval_seg(network: str, args: Options) -> int:
    check_positive(args, "classes", "scenes", "k", "temperature", "memory_size")
    target, data = open_scenes(network, args)
    from eval import retrieval_seg

    return retrieval_seg.run(target, data, **args)


def add_points(parser: argparse.ArgumentParser) -> None:
    add_network(parser)
    add_scenes(parser)
    add_splits(parser)
    parser.add_argument("--points", type=int, default=3, help="of each kind for each scene (default: 3)")
    parser.add_argument("--scenes", type=int, help="train scenes with labels, evenly spaced (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the points (default: 0)")


def run_points(network: str, args: Options) -> int:
    check_positive(args, "classes", "points", "scenes")
    target, data = open_scenes(network, args)
    from eval import points

    return points.run(target, data, **args)


def add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("networks", nargs="+", metavar="NETWORK", help=NETWORK)
    add_photos(parser, size=False)
    parser.add_argument("--data", help=f"scenes: {SCENES} (default: the first run's eval.voc)")
    add_palette(parser)
    parser.add_argument("--measures", help=f"some of {','.join(MEASURES)} (default: all)")
    stages = parser.add_mutually_exclusive_group()
    stages.add_argument("--untrained", action="store_true", help="also each run's network before training")
    stages.add_argument(
        "--only-untrained", action="store_true", help="each run's network before training, not the trained one"
    )
    stages.add_argument(
        "--only-trained", action="store_true", help="each run's trained network, not the weights that it started from"
    )
    add_size(parser, "side of photos and scenes in pixels, of every network (default: each network's own)")
    parser.add_argument("--seeds", type=int, default=5, help="of the clusters (default: 5)")
    parser.add_argument(
        "--aggregate-seeds", action="store_true", help="one column for runs whose names differ only in a number"
    )
    parser.add_argument("--skip-existing", action="store_true", help="keep what measures.json already has")
    parser.add_argument("--out", type=Path, help="folder for the files (default: the first run's, else evaluation/)")


def run_compare(_: None, args: Options) -> int:
    measures = args["measures"].split(",") if args["measures"] else MEASURES
    args["measures"] = [require_choice("--measures", measure, MEASURES) for measure in measures]
    check_positive(args, "limit", "seeds")
    from eval import compare

    return compare.run(args.pop("networks"), **args)


def add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("network", metavar="RUN", help="a run folder")
    parser.add_argument("--data", help=f"scenes: {SCENES} (default: the run's eval.voc)")
    add_palette(parser)
    parser.add_argument("--limit", type=int, help="at most this many photos of each set in k-NN, evenly spaced")
    add_ignore_class(parser)
    parser.add_argument("--workers", type=int, help="data workers (default: by the number of photos)")
    parser.add_argument("--skip-existing", action="store_true", help="keep results of the same weights")


def run_report(network: str, args: Options) -> int:
    check_positive(args, "limit")
    from eval import report

    return report.run(network, **args)


def add_html(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", type=Path, help="a run folder; several: their curves together"
    )
    parser.add_argument(
        "--out", type=Path, help="with several: the file to write (default: curves.html beside the runs)"
    )


def run_html(_: None, args: Options) -> int:
    from eval import html_runs

    return html_runs.run(**args)


def add_embed(parser: argparse.ArgumentParser) -> None:
    add_network(parser)
    parser.add_argument("source", metavar="SRC", help="a folder of photos, a file with a path a line, or shards")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write, or to continue")
    kinds = "some of cls,mean,patches: [CLS], the mean patch token, all patch tokens (default: cls,mean)"
    parser.add_argument("--features", default="cls,mean", help=kinds)
    points = "also reference tokens at points: CSV photo,x,y or JSON {photo: [[x, y], ...]}, shares of a photo's sides"
    parser.add_argument("--points", type=Path, metavar="FILE", help=points)
    size = "pixels: a side, or HEIGHTxWIDTH as in 480x640 (default: that of the training views)"
    parser.add_argument("--size", type=read_size, help=size)
    parser.add_argument("--fit", default="crop", help="crop: the center; square: the whole, distorted (default: crop)")
    parser.add_argument("--dtype", default="float32", help="float32 or float16 (default: float32)")
    parser.add_argument("--batch", type=int, default=64, help="photos at a time (default: 64)")
    parser.add_argument("--workers", type=int, help="data workers (default: by the number of photos)")
    parser.add_argument("--parquet", action="store_true", help="also features.parquet; needs pyarrow")
    parser.add_argument("--neighbors", action="store_true", help="also near-duplicates, outliers and a sheet of them")
    parser.add_argument("--k", type=int, default=10, help="neighbors of a photo (default: 10)")
    parser.add_argument("--threshold", type=float, default=0.95, help="cosine of near-duplicates (default: .95)")


def run_embed(network: str, args: Options) -> int:
    check_positive(args, "batch", "k")
    target, source, points = open_features(network, args)
    from eval import embed

    return embed.run(target, source, args.pop("out"), points, **args)


class Command(NamedTuple):
    summary: str
    details: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[Any, Options], int]  # (network, the other options) -> exit code


COMMANDS = {
    "knn": Command(
        "k-NN classification of photos",
        "The k photos of the train set most similar to a query vote for their classes. With torchrun, all processes\n"
        "share the photos.",
        add_knn,
        run_knn,
    ),
    "linear": Command(
        "linear classification of photos",
        "Linear probes of 16 learning rates and two choices of features, trained on the same batches; the best one is\n"
        "chosen on the validation photos. The small protocol is for networks trained on views of less than 128 pixels.",
        add_linear,
        run_linear,
    ),
    "linear_seg": Command(
        "linear segmentation of scenes",
        "A 1x1 convolution predicts the class of every patch token; trained on one split, evaluated on another. The\n"
        "small protocol is for networks trained on views of less than 128 pixels.",
        add_linear_seg,
        run_linear_seg,
    ),
    "cluster_seg": Command(
        "segmentation of scenes by clusters of patch tokens",
        "Patch tokens are clustered with k-means, and each cluster is matched to a class: one cluster per class\n"
        "(Hungarian), or the majority class of each cluster.",
        add_cluster_seg,
        run_cluster_seg,
    ),
    "retrieval_seg": Command(
        "segmentation of scenes by nearest neighbors",
        "Every patch gets the labels of the most similar labeled patches. Nothing is trained.",
        add_retrieval_seg,
        run_retrieval_seg,
    ),
    "points": Command(
        "what tokens know of the thing at a point",
        "Reference token, patch token under it and [CLS], by k-NN and by a linear map, on large and on small things.",
        add_points,
        run_points,
    ),
    "compare": Command(
        "every measure of several networks, in one table",
        "All networks are measured on the same data: the named sets, else those of the first run among them. Writes\n"
        "measures.json, measures.md and measures.png.\n"
        "--aggregate-seeds: runs whose names differ only in a number at the end (dino-0 dino-1) share a column, mean\n"
        "(min – max). --skip-existing: measures in measures.json of the same weights with the same settings are kept.",
        add_compare,
        run_compare,
    ),
    "report": Command(
        "the main results of a run, as results.json",
        "k-NN and linear segmentation of the trained network, of the same network before training, and of raw pixels.",
        add_report,
        run_report,
    ),
    "html": Command(
        "a run in one page, as report.html; several runs: their curves, as curves.html",
        "One run: results, curves, pictures, configuration, versions. Several: newest figures, curves, what differs.",
        add_html,
        run_html,
    ),
    "embed": Command(
        "features of photos, as files",
        "A photo is resized to 256/224 of the size (its shorter side, bicubic), its center is cut: as in k-NN. --fit\n"
        "square resizes the whole photo to a square (bilinear), as scenes are measured. The same command continues what\n"
        "was stopped. Damaged photos have NaN rows and are listed; so have points that the crop does not hold.",
        add_embed,
        run_embed,
    ),
}


if __name__ == "__main__":
    run_cli(main)
