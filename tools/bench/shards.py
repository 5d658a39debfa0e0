"""How much slower making shards is than decoding alone:  python -m tools.bench.shards SRC [--processes P] [--json]

Both read the same photos with the same decoder in the same number of processes, started and warm before the clock runs,
turn about in interleaved rounds. `decode` reads a photo and decodes it; `make` also checks its header, sums its bytes
(crc32, sha256) and writes shards, synced to the disk, and their records. The figure of interest is make / decode, per round.
"""

import argparse
import json
import multiprocessing
import os
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
from pipeline.prepare.sources import Source, list_photos
from pipeline.prepare.work import MB, set_up_worker
from runtime.errors import run_cli
from tools.make_shards import Job, Settings, make_shard, share_out


def decode_only(job: Job) -> None:
    """Read and decode a shard's photos; nothing is kept."""
    with closing(Source(job.src)) as source:
        for photo in job.photos:
            Image.open(BytesIO(source.read(photo, at_most=1 << 30)), formats=("JPEG",)).load()


def measure(src: Path, dst: Path, processes: int, photos: int, rounds: int) -> dict[str, Any]:
    """Images per second of both, per round. SRC's photos are taken again and again until there are `photos` of them."""
    listing = list_photos(src.resolve(), "auto")
    listing.photos = (listing.photos * (photos // len(listing.photos) + 1))[:photos]
    size = sum(p.size for p in listing.photos)
    settings = Settings(size / MB / (4 * processes), 0, "auto", None, 95, 10**8)  # four shards for every process
    jobs = share_out(listing, src.resolve(), dst, settings)
    speed: dict[str, list[float]] = {"decode": [], "make": []}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=set_up_worker) as pool:

        def clock(work: Callable[[Job], object]) -> float:
            (dst / WORK).mkdir(parents=True)
            start = time.perf_counter()
            list(pool.map(work, jobs))
            seconds = time.perf_counter() - start
            shutil.rmtree(dst)
            return photos / seconds

        clock(decode_only)  # starts the processes and fills the page cache
        for _ in range(rounds):
            speed["decode"].append(clock(decode_only))
            speed["make"].append(clock(make_shard))
    ratios = [m / d for m, d in zip(speed["make"], speed["decode"], strict=True)]
    return {"photos": photos, "mean_bytes": size // photos, "processes": processes, **speed, "make / decode": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("src", type=Path, help="a folder or tar of JPEGs")
    parser.add_argument("--dst", type=Path, default=Path(tempfile.gettempdir()), help="disk to write to; default: /tmp")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--photos", type=int, default=4000, help="per round; default 4000")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--json", action="store_true", help="print the measurements as one line of JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dst) as folder:
        found = measure(options.src, Path(folder) / "shards", options.processes, options.photos, options.rounds)
    if options.json:
        print(json.dumps(found))
        return
    print(f"{found['photos']:,} photos of {found['mean_bytes']:,} bytes, {found['processes']} processes")
    for name, unit in (("decode", "images/s"), ("make", "images/s"), ("make / decode", "")):
        values = found[name]
        middle = statistics.median(values)
        print(f"{name:14s} {middle:10,.2f} {unit}  ({min(values):,.2f} to {max(values):,.2f}, {len(values)} rounds)")


if __name__ == "__main__":
    run_cli(main)
