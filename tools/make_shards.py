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
import itertools
import json
import math
import os
import shutil
import sys
import zlib
from collections import Counter
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.decode import MAX_PIXELS
from pipeline.prepare.existing import index
from pipeline.prepare.folder import (
    WORK,
    ShardFile,
    ShardRecord,
    allowed_bad,
    folder_lock,
    replace_file,
    require_writable,
    write_folder,
    write_rejected,
)
from pipeline.prepare.names import printable
from pipeline.prepare.photo import decode_error, limit_pixels, prepare
from pipeline.prepare.sources import Photo, Source, SourceIndex, Unreadable, list_photos
from pipeline.prepare.verify import verify
from pipeline.prepare.work import MB, Progress, parallel_map
from pipeline.random import hash64, permute
from pipeline.shards import Shards, plural
from runtime.errors import UserError, run_cli
from runtime.files import sync

KEPT = "finished shards are kept, the same command resumes"


@dataclass(frozen=True)
class Settings:
    """Everything that determines the shards of given photos."""

    shard_mb: float
    seed: int
    labels: str
    resize_short: int | None
    quality: int
    max_pixels: int


class Job(NamedTuple):
    """One shard to be made. Its photos are known in advance, so shards can be made in any order."""

    src: Path
    dst: Path
    name: str
    photos: list[Photo]
    first: int  # number of its first photo; samples are named by their number
    settings: Settings


class Totals(NamedTuple):
    photos: int
    size: int  # bytes of the sources
    bad: int


def make_shard(job: Job) -> Totals:
    """Write one shard, DST/<name>, and then its record, DST/.make_shards/<name>.json."""
    settings = job.settings
    limit_pixels(settings.max_pixels)
    record = ShardRecord(job.name, 0, "", [], Counter())
    draft = job.dst / WORK / f"{job.name}.{os.getpid()}.draft"
    with draft.open("wb", buffering=1 << 20) as file, closing(Source(job.src)) as source:
        shard = ShardFile(file)
        for number, photo in enumerate(job.photos, job.first):
            try:
                data = source.read(photo, at_most=4 * settings.max_pixels)
                prepared = prepare(data, settings.resize_short, settings.quality)
            except MemoryError:
                raise UserError("out of memory; fewer --processes or a smaller --max-pixels need less") from None
            except Exception as error:  # Pillow can raise anything for a malformed photo
                record.rejected.append({"source": photo.place, "reason": decode_error(error)})
                record.unread += isinstance(error, Unreadable)
                continue
            (record.kept if prepared.kept else record.converted)[prepared.kind] += 1
            offset = shard.add(f"{number:08d}.jpg", prepared.data)
            if photo.label >= 0:
                shard.add(f"{number:08d}.cls", b"%d" % photo.label)
            crc = zlib.crc32(prepared.data)
            record.rows.append((offset, len(prepared.data), prepared.height, prepared.width, photo.label, crc))
            record.sources.append(f"{number:08d}\t{photo.place}")
        shard.close()
    if record.rows:
        os.replace(draft, job.dst / job.name)
        sync(job.dst)
    else:  # DALI would read a sample from an empty tar: no file is written, and its number is left out
        draft.unlink()
        (job.dst / job.name).unlink(missing_ok=True)
    record.bytes, record.sha256 = shard.at, shard.sha.hexdigest()
    replace_file(_record_path(job), json.dumps(vars(record)).encode())
    return Totals(len(job.photos), sum(p.size for p in job.photos), len(record.rejected))


def _record_path(job: Job) -> Path:
    return job.dst / WORK / f"{job.name}.json"


def _read_record(job: Job) -> ShardRecord:
    return ShardRecord(**json.loads(_record_path(job).read_bytes()))


def make(options: argparse.Namespace) -> None:
    """Make DST's shards from SRC's photos, or resume making them."""
    src, dst = options.src.resolve(), options.dst.resolve()
    settings = Settings(**{f.name: getattr(options, f.name) for f in fields(Settings)})
    if dst.is_relative_to(src) or src.is_relative_to(dst):
        raise UserError(f"DST {options.dst} is inside SRC {options.src}, or SRC inside DST; give a DST outside SRC")
    if not (dst / "manifest.json").exists():
        require_writable(dst, "give another DST")  # before a million photos are listed
    try:
        source = list_photos(src, options.labels, options.devkit, options.skip_broken)
    except OSError as error:
        raise UserError(f"{printable(str(error.filename or src))}: cannot be read: {error.strerror}") from None
    total = sum(p.size for p in source.photos)
    print(f"{plural(len(source.photos), 'photo')}, {total / MB:,.0f} MB; {printable(source.summary)}", flush=True)
    task = {
        "source": {"photos": len(source.photos), "bytes": total, "sha256": source.digest()},
        "settings": asdict(settings),
    }
    with folder_lock(dst, KEPT):
        if (dst / "manifest.json").exists():
            complete = Shards(dst)  # raises if a shard is missing
            _refuse_other(dst, complete.manifest, task)
            shutil.rmtree(dst / WORK, ignore_errors=True)
            print(
                f"{dst}: already complete: {plural(len(complete), 'sample')} in {plural(len(complete.shards), 'shard')}"
            )
            return
        jobs = plan_shards(source, src, dst, settings)
        missing = sum(not (dst / job.name).exists() for job in jobs)
        require_writable(dst, "give a larger --shard-mb", files=2 * missing + 8)
        _begin_or_resume(dst, task)
        try:
            totals = _make_shards(jobs, options.processes, options.max_bad)
            if totals.bad == totals.photos:
                raise UserError(f"{src}: none of its photos is valid; {dst}/rejected.jsonl says why")
        except BaseException:  # whatever ends it, what was found is listed
            write_rejected(dst, source.broken + _rejected(jobs))
            raise
        records = (_read_record(job) for job in jobs)
        head = {**task, "classes": source.classes}
        write_folder(dst, records, head, printable(str(src)), source.skipped, source.broken)


def _refuse_other(dst: Path, saved: dict, current: dict) -> None:
    """Raise UserError if the folder's shards are of another source or other settings."""
    advice = "give another DST, or delete this one"
    if saved.get("source", {}).get("sha256") != current["source"]["sha256"]:
        photos = saved.get("source", {}).get("photos", "?"), current["source"]["photos"]
        raise UserError(
            f"{dst} holds shards of other photos or labels (saved: {photos[0]} photos, current: {photos[1]}); {advice}"
        )
    before = saved.get("settings", {})
    diff = [f"{k} (saved: {before.get(k)}, current: {v})" for k, v in current["settings"].items() if before.get(k) != v]
    if diff:
        raise UserError(f"{dst} holds shards made with other settings: {', '.join(diff)}; {advice}")


def _begin_or_resume(dst: Path, task: dict) -> None:
    """Create the work folder, or check the one that a killed run left."""
    work, saved = dst / WORK, dst / WORK / "task"
    if saved.exists():
        _refuse_other(dst, json.loads(saved.read_bytes()), task)
        for draft in work.glob("*.draft"):
            draft.unlink()
        return
    if any(dst.glob("*.tar")):
        raise UserError(
            f"{dst}: holds tars of another program; give another DST, or write their index with `make index DST={dst}`"
        )
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    replace_file(saved, json.dumps(task).encode())


def plan_shards(source: SourceIndex, src: Path, dst: Path, settings: Settings) -> list[Job]:
    """Shuffle the photos and split them into shards of about the same size, at most `shard_mb` plus one photo."""
    n = len(source.photos)
    shuffled = [source.photos[i] for i in permute(np.arange(n), n, hash64(settings.seed, "shards"))]
    in_tar = np.array(
        [1024 + 1024 * (p.label >= 0) + p.size for p in shuffled]
    )  # with headers and padding, approximately
    shards = max(1, math.ceil(in_tar.sum() / (settings.shard_mb * MB)))
    shard_of = (np.cumsum(in_tar) - in_tar) * shards // in_tar.sum()
    bounds = np.searchsorted(shard_of, np.arange(shards + 1))
    return [
        Job(src, dst, f"shard-{i:06d}.tar", shuffled[a:b], int(a), settings)
        for i, (a, b) in enumerate(itertools.pairwise(bounds))
        if a < b
    ]


def _make_shards(jobs: list[Job], processes: int, max_bad: float) -> Totals:
    """Make the shards that are not finished. Raises UserError as soon as more than `max_bad` of all photos are bad."""
    finished = {job.name: totals for job in jobs if (totals := _finished(job))}
    todo = [job for job in jobs if job.name not in finished]
    photos = sum(len(job.photos) for job in jobs)
    so_far = Totals(*map(sum, zip(*finished.values(), strict=True))) if finished else Totals(0, 0, 0)
    if finished:
        print(f"resuming: {len(finished)} of {plural(len(jobs), 'shard')} finished", flush=True)
    _stop_if_bad(so_far, photos, max_bad, jobs)
    with (
        Progress("making shards", sum(p.size for job in todo for p in job.photos)) as progress,
        closing(parallel_map(make_shard, todo, processes, KEPT)) as results,
    ):
        for done in results:
            so_far = Totals(*(a + b for a, b in zip(so_far, done, strict=True)))
            progress.step(done.photos, done.size)
            _stop_if_bad(so_far, photos, max_bad, jobs)
    return so_far


def _finished(job: Job) -> Totals | None:
    """The totals of this job if an earlier run has finished it."""
    try:
        record = _read_record(job)
        size = (job.dst / job.name).stat().st_size if record.rows else record.bytes
    except (OSError, ValueError):
        return None
    if record.unread or size != record.bytes or len(record.sources) != len(record.rows):
        return None
    return Totals(len(job.photos), sum(p.size for p in job.photos), len(record.rejected))


def _rejected(jobs: list[Job]) -> list[dict]:
    """The rejected photos of all jobs that are finished."""
    return [r for job in jobs if _record_path(job).exists() for r in _read_record(job).rejected]


def _stop_if_bad(so_far: Totals, photos: int, max_bad: float, jobs: list[Job]) -> None:
    """Raise UserError if more than `max_bad` of all photos are bad."""
    if so_far.bad <= allowed_bad(max_bad, photos):
        return
    first = _rejected(jobs)[0]
    raise UserError(
        f"{so_far.bad} of the first {so_far.photos:,} photos are bad, more than --max-bad {max_bad:g} of all {photos:,}; "
        f"the first one is {first['source']}: {first['reason']}; {jobs[0].dst}/rejected.jsonl lists all of them; "
        "finished shards are kept, a larger --max-bad resumes"
    )


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
