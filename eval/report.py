"""All figures of a run side by side: the trained teacher, the same network untrained, and no network at all.

    python -m eval.report RUN [--data FOLDER] [--limit N] [--workers N] [--skip-existing]

k-NN (eval/knn.py) on [CLS], on the mean of the patch tokens and on raw pixels; linear segmentation (eval/linear_seg.py)
of a folder in Pascal VOC's layout. Prints one table and writes RUN/results.json.
"""

import argparse
import json
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from eval.features import check_size, default_workers
from eval.knn import photo_knn
from eval.linear_seg import Protocol, fit, scenes_of
from eval.target import EvalTarget
from runtime.errors import UserError, require_positive, run_cli

MOST_PIXELS = 100_000  # photos of a bank whose raw pixels are still compared: 12 kB each


def report(
    subject: EvalTarget, voc: str | None, limit: int | None = None, workers: int | None = None
) -> dict[str, Any]:
    """The figures in percent as results.json keeps them; None for what was skipped. Says what it skips, and why."""
    settings = subject.settings
    networks = {"trained": subject.network(), "untrained": subject.network(untrained=True)}
    image_size = networks["trained"].image_size
    figures: dict[str, dict[str, float | None]]
    figures = {who: dict.fromkeys(("knn_top1", "knn_top1_patches", "miou")) for who in networks}
    figures["pixels"] = {"knn_top1": None}
    told: dict[str, Any] = {}

    photos = subject.photos(image_size, limit=limit)
    if photos is None:
        print("k-NN skipped: these shards have no classes")
    else:
        bank, val = photos
        vote: dict[str, Any] = dict(k=settings.k, temperature=settings.temperature)
        reading = default_workers(len(bank)) if workers is None else workers
        kinds = {"trained": ("cls", "patches", "pixels"), "untrained": ("cls", "patches")}  # pixels: read on the way
        if len(bank) > MOST_PIXELS:
            print(f"k-NN on raw pixels skipped: more than {MOST_PIXELS:,} photos")
            kinds["trained"] = kinds["untrained"]
        for who, network in networks.items():
            top = photo_knn(network, bank, val, kinds[who], **vote, workers=reading, show=True)
            figures[who] |= {"knn_top1": top["cls"][0], "knn_top1_patches": top["patches"][0]}
            if "pixels" in top:
                figures["pixels"]["knn_top1"] = top["pixels"][0]
        sets = dict(bank=str(bank.shards.folder), val=str(val.shards.folder), photos=len(bank), queries=len(val))
        told["knn"] = sets | dict(classes=len(bank.classes), size=bank.size) | vote

    if voc is None:
        print("mIoU skipped: no scenes to segment (--data FOLDER, or eval.voc in the config)")
    else:
        protocol = replace(Protocol.for_views(image_size), epochs=settings.seg_epochs, lr=settings.seg_lr)
        check_size(networks["trained"], protocol.size)
        train, scenes = scenes_of(voc, protocol, None, "val")
        reading = default_workers(len(train) * (protocol.epochs if protocol.augment else 1))
        reading = reading if workers is None else workers
        for who, network in networks.items():
            history = fit(network, train, scenes, protocol, workers=reading, show=True)
            figures[who] |= {"miou": history[-1].miou, "miou_present": history[-1].miou_present}
            figures[who] |= {"miou_best": max(epoch.miou for epoch in history)}
        sets = dict(data=str(voc), train_split=train.split, scenes=len(train), val_scenes=len(scenes))
        told["segmentation"] = sets | dict(classes=train.classes) | asdict(protocol)

    trained = figures.pop("trained")
    return {**trained, **figures, "settings": told}


def table_of(results: dict[str, Any], title: str) -> Table:
    """One table: a row for each figure; trained, untrained, raw pixels."""
    table = Table(title=escape(title), title_justify="left")
    table.add_column("%")
    for who in ("trained", "untrained", "raw pixels"):
        table.add_column(who, justify="right")
    rows = {
        "knn_top1": "k-NN top-1, [CLS]",
        "knn_top1_patches": "k-NN top-1, mean of the patch tokens",
        "miou": "mIoU, a linear map on patch tokens",
    }
    for key, words in rows.items():
        values = (results[key], results["untrained"][key], results["pixels"].get(key))
        table.add_row(escape(words), *("–" if v is None else f"{v:.2f}" for v in values))
    return table


def is_fresh(results: Path, checkpoints: Path) -> bool:
    """Whether there are results, and no checkpoint has been written since."""
    if not results.is_file():
        return False
    written = [path.stat().st_mtime for path in checkpoints.glob("*.safetensors")]
    return results.stat().st_mtime >= max(written, default=0.0)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m eval.report", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", help="a run folder")
    parser.add_argument("--data", help="scenes in Pascal VOC's layout (default: the run's eval.voc)")
    parser.add_argument("--limit", type=int, help="at most so many photos of each set in k-NN, evenly spread")
    parser.add_argument("--workers", type=int, help="reading processes (default: by the number of photos)")
    parser.add_argument(
        "--skip-existing", action="store_true", help="measure only what was not, since the last checkpoint"
    )
    args = parser.parse_args(argv)

    began = time.perf_counter()
    require_positive(args, "limit")
    subject = EvalTarget(args.run)
    if subject.run is None:
        raise UserError(
            f"{args.run}: no run folder (no config.yaml); eval.knn and eval.linear_seg take a backbone file"
        )
    file = subject.run / "results.json"
    if args.skip_existing and is_fresh(file, subject.run / "checkpoints"):
        Console().print(table_of(json.loads(file.read_text()), str(subject.path)))
        print(f"from {file}")
        return 0
    results = report(subject, args.data or subject.settings.voc, args.limit, args.workers)
    results |= {
        "network": str(subject.path),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - began, 1),
    }
    file.write_text(json.dumps(results, indent=1) + "\n")
    Console().print(table_of(results, str(subject.path)))
    print(f"written to {file}")
    return 0


if __name__ == "__main__":
    run_cli(main)
