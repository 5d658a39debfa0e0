"""Making shards beside decoding alone: images per second of both, and their ratio.

    python -m tools.bench shards [--shards SRC] [--dst FOLDER] [--processes P] [--photos 4000] [--rounds 5] [--json]

SRC is a folder or tar of JPEGs. Both read the same photos with the same decoder in the same number of processes, started
and warm before the clock starts, in interleaved rounds. `decode` reads a photo and decodes it; `make` also checks its
header, computes checksums (crc32, sha256) and writes shards, synced to disk, and their records. The result is make /
decode, per round. `make bench WHAT=shards SHARDS=SRC [OUT=rows.jsonl]`.
"""

import argparse
import json
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.prepare.folder import WORK
from pipeline.prepare.make import Job, Settings, make_shard, plan_shards
from pipeline.prepare.sources.listing import list_photos
from pipeline.prepare.sources.reading import Reader
from pipeline.prepare.work import MB, init_worker
from tools.bench.rows import cpu_name, make_table, median_and_range, report_rows


def decode_only(job: Job) -> None:
    """Read and decode a shard's photos, and write nothing."""
    with closing(Reader(job.roots)) as source:
        for photo in job.photos:
            Image.open(BytesIO(source.read(photo, at_most=1 << 30)), formats=("JPEG",)).load()


def measure(src: Path, dst: Path, processes: int, photos: int, rounds: int) -> dict[str, Any]:
    """Images per second of both, per round. SRC's photos are repeated until there are `photos` of them."""
    listing = list_photos([src.resolve()])
    listing.photos = (listing.photos * (photos // len(listing.photos) + 1))[:photos]
    size = sum(p.size for p in listing.photos)
    settings = Settings(size / MB / (4 * processes), 0, "auto", None, 95, 10**8)  # four shards for every process
    jobs = plan_shards(listing, dst, settings)
    speed: dict[str, list[float]] = {"decode": [], "make": []}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=init_worker) as pool:

        def images_per_second(work: Callable[[Job], object]) -> float:
            (dst / WORK).mkdir(parents=True)
            start = time.perf_counter()
            list(pool.map(work, jobs))
            seconds = time.perf_counter() - start
            shutil.rmtree(dst)
            return photos / seconds

        images_per_second(decode_only)  # starts the processes and fills the page cache
        for _ in range(rounds):
            speed["decode"].append(images_per_second(decode_only))
            speed["make"].append(images_per_second(make_shard))
    ratios = [m / d for m, d in zip(speed["make"], speed["decode"], strict=True)]
    return {"photos": photos, "mean_bytes": size // photos, "processes": processes, **speed, "make / decode": ratios}


def run(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=args.dst) as folder:
        result = measure(Path(args.src), Path(folder) / "shards", args.processes, args.photos, args.rounds)
    if args.json:
        print(json.dumps(result))
        return
    about = {"what": "shards", "photos": result["photos"], "mean_bytes": result["mean_bytes"]}
    row = about | {"processes": result["processes"], "device": cpu_name()}
    title = f"{result['photos']:,} photos of {result['mean_bytes']:,} bytes, {result['processes']} processes"
    table = make_table(title, ("", "median", "least – most", "rounds"), left=1)
    for name, unit, key in (("decode", "images/s", "decode_img_per_s"), ("make", "images/s", "make_img_per_s"),
                            ("make / decode", "", "make_per_decode")):  # fmt: skip
        values = result[name]
        row |= median_and_range(key, values)
        spread = f"{min(values):,.2f} – {max(values):,.2f}"
        table.add_row(f"{name} {unit}".strip(), f"{statistics.median(values):,.2f}", spread, str(len(values)))
    report_rows(table, [row], args.out)
