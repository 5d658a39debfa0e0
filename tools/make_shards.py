"""Photos become shards:  python -m tools.make_shards make SRC DST | verify DST | index DST

make    writes DST/shard-%06d.tar (plain WebDataset tars), index.npy and manifest.json from a folder of photos, a tar of
        photos, or ImageNet's own tars as they are (`pipeline/prepare/sources.py` says which photos have a class, and why).
verify  reads every shard again and names each sample that is damaged or lost.
index   writes manifest and index for WebDataset tars that others made; the tars stay as they are.

Every photo is decoded once, whole, so that what is in an index is known to decode. An upright 8-bit JPEG is kept byte by
byte, all else becomes one (`pipeline/prepare/photo.py` says how), counted by kind in the manifest. --resize-short N also
re-encodes what has more than N pixels on its short side; shards are cut by the sizes of the sources, so they come out
of another size than --shard-mb then. A photo that does not decode, has more than --max-pixels (read from its header, before
anything is decoded) or is something else under a photo's name goes to rejected.jsonl; more than --max-bad of them stop
the program.

Samples are shuffled, so that every shard holds all classes; that reads a tar in random order (an SSD does not mind).
The same photos and settings give the same bytes, whatever --processes. Killed at any moment, the same command goes on where
it was: a shard appears only when it is whole, and manifest.json last of all.
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
from pipeline.prepare.existing import index, verify
from pipeline.prepare.folder import (
    WORK,
    Record,
    ShardFile,
    folder_lock,
    replace_file,
    sync_folder,
    write_folder,
    write_rejected,
)
from pipeline.prepare.photo import bound_pixels, decode_error, prepare
from pipeline.prepare.sources import Photo, Source, SourceIndex, Unread, list_photos, shown
from pipeline.prepare.work import MB, Progress, each
from pipeline.random import hash64, permute
from pipeline.shards import Shards
from runtime.errors import UserError, run_cli


@dataclass(frozen=True)
class Settings:
    """All that decides what the shards of given photos hold."""

    shard_mb: float
    seed: int
    labels: str
    resize_short: int | None
    quality: int
    max_pixels: int


class Job(NamedTuple):
    """One shard to be made. What is in it is known beforehand, so every shard is made alone, in any order."""

    src: Path
    dst: Path
    name: str
    photos: list[Photo]
    first: int  # running number of its first photo: samples are named by it
    settings: Settings


class Done(NamedTuple):
    photos: int
    size: int  # bytes of the sources
    bad: int


def make_shard(job: Job) -> Done:
    """Write one shard and the record of it: DST/<name>, once whole, then DST/.make_shards/<name>.json."""
    settings = job.settings
    bound_pixels(settings.max_pixels)
    record = Record(job.name, 0, "", [], Counter())
    draft = job.dst / WORK / f"{job.name}.{os.getpid()}.draft"
    with draft.open("wb", buffering=1 << 20) as file, closing(Source(job.src)) as source:
        shard = ShardFile(file)
        for number, photo in enumerate(job.photos, job.first):
            try:
                data = source.read(photo, at_most=4 * settings.max_pixels)
                ready = prepare(data, settings.resize_short, settings.quality)
            except MemoryError:
                raise UserError("out of memory; fewer --processes or a lower --max-pixels need less") from None
            except Exception as error:  # a hostile photo can make Pillow raise anything
                record.rejected.append({"source": shown(photo.name), "reason": decode_error(error)})
                record.unread += isinstance(error, Unread)
                continue
            (record.kept if ready.kept else record.converted)[ready.kind] += 1
            offset = shard.add(f"{number:08d}.jpg", ready.data)
            if photo.label >= 0:
                shard.add(f"{number:08d}.cls", b"%d" % photo.label)
            crc = zlib.crc32(ready.data)
            record.rows.append((offset, len(ready.data), ready.height, ready.width, photo.label, crc))
        shard.close()
    if record.rows:
        os.replace(draft, job.dst / job.name)
        sync_folder(job.dst)
    else:  # a tar of nothing would be a phantom sample to DALI: no file, and a gap in the numbers
        draft.unlink()
        (job.dst / job.name).unlink(missing_ok=True)
    record.bytes, record.sha256 = shard.at, shard.sha.hexdigest()
    replace_file(_record_path(job), json.dumps(vars(record)).encode())
    return Done(len(job.photos), sum(p.size for p in job.photos), len(record.rejected))


def _record_path(job: Job) -> Path:
    return job.dst / WORK / f"{job.name}.json"


def _read_record(job: Job) -> Record:
    return Record(**json.loads(_record_path(job).read_bytes()))


def make(options: argparse.Namespace) -> None:
    """Make DST's shards from SRC's photos, or go on making them."""
    src, dst = options.src.resolve(), options.dst.resolve()
    settings = Settings(**{f.name: getattr(options, f.name) for f in fields(Settings)})
    if dst.is_relative_to(src) or src.is_relative_to(dst):
        raise UserError(f"DST {options.dst} lies in SRC {options.src}, or SRC in DST; take a folder beside it")
    try:
        listing = list_photos(src, options.labels, options.devkit)
    except OSError as error:
        raise UserError(f"{shown(str(error.filename or src))}: cannot be read: {error.strerror}") from None
    total = sum(p.size for p in listing.photos)
    print(f"{len(listing.photos):,} photos, {total / MB:,.0f} MB; {shown(listing.told)}", flush=True)
    task = {
        "source": {"photos": len(listing.photos), "bytes": total, "sha256": listing.digest()},
        "settings": asdict(settings),
    }
    with folder_lock(dst):
        if (dst / "manifest.json").exists():
            whole = Shards(dst)  # raises if one is missing
            _refuse_other(dst, whole.manifest, task)
            shutil.rmtree(dst / WORK, ignore_errors=True)
            print(f"{dst}: already whole: {len(whole):,} samples in {len(whole.shards)} shards")
            return
        jobs = share_out(listing, src, dst, settings)
        _take_up(dst, task)
        done = _make_shards(jobs, options.processes, options.max_bad)
        if done.bad == done.photos:
            raise UserError(f"{src}: not one of its photos is sound; {dst}/rejected.jsonl says why")
        records = (_read_record(job) for job in jobs)
        write_folder(dst, records, {**task, "classes": listing.classes}, listing.skipped)


def _refuse_other(dst: Path, there: dict, now: dict) -> None:
    """Raise UserError where the folder's shards are of another source or other settings."""
    if there.get("source", {}).get("sha256") != now["source"]["sha256"]:
        photos = there.get("source", {}).get("photos", "?"), now["source"]["photos"]
        raise UserError(f"{dst} holds shards of other photos or labels ({photos[0]} photos there, {photos[1]} now); "
                      "take another DST, or delete it")  # fmt: skip
    before = there.get("settings", {})
    differences = [f"{k} {before.get(k)} there, {v} now" for k, v in now["settings"].items() if before.get(k) != v]
    if differences:
        raise UserError(f"{dst} holds shards made otherwise: {'; '.join(differences)}; take another DST, or delete it")


def _take_up(dst: Path, task: dict) -> None:
    """Begin the work folder, or go on with the one that a killed run left."""
    work, told = dst / WORK, dst / WORK / "task"
    if told.exists():
        _refuse_other(dst, json.loads(told.read_bytes()), task)
        for draft in work.glob("*.draft"):
            draft.unlink()
        return
    if any(dst.glob("*.tar")):
        raise UserError(
            f"{dst}: holds tars that this program did not make; take another DST, or `make index DST={dst}`"
        )
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    replace_file(told, json.dumps(task).encode())


def share_out(listing: SourceIndex, src: Path, dst: Path, settings: Settings) -> list[Job]:
    """Shuffle the photos and cut them into shards of about the same number of bytes, at most `shard_mb` and one photo."""
    n = len(listing.photos)
    shuffled = [listing.photos[i] for i in permute(np.arange(n), n, hash64(settings.seed, "shards"))]
    in_tar = np.array([1024 + 1024 * (p.label >= 0) + p.size for p in shuffled])  # headers and padding, about
    shards = max(1, math.ceil(in_tar.sum() / (settings.shard_mb * MB)))
    shard_of = (np.cumsum(in_tar) - in_tar) * shards // in_tar.sum()
    cuts = np.searchsorted(shard_of, np.arange(shards + 1))
    return [
        Job(src, dst, f"shard-{i:06d}.tar", shuffled[a:b], int(a), settings)
        for i, (a, b) in enumerate(itertools.pairwise(cuts))
        if a < b
    ]


def _make_shards(jobs: list[Job], processes: int, max_bad: float) -> Done:
    """Make the shards that are not there yet. Raises UserError as soon as more than `max_bad` of all photos are bad."""
    finished = {job.name: done for job in jobs if (done := _finished(job))}
    todo = [job for job in jobs if job.name not in finished]
    photos = sum(len(job.photos) for job in jobs)
    so_far = Done(*map(sum, zip(*finished.values(), strict=True))) if finished else Done(0, 0, 0)
    if finished:
        print(f"going on: {len(finished)} of {len(jobs)} shards are there", flush=True)
    _stop_if_bad(so_far, photos, max_bad, jobs)
    with (
        Progress("making shards", sum(p.size for job in todo for p in job.photos)) as progress,
        closing(each(make_shard, todo, processes)) as results,
    ):
        for done in results:
            so_far = Done(*(a + b for a, b in zip(so_far, done, strict=True)))
            progress.step(done.photos, done.size)
            _stop_if_bad(so_far, photos, max_bad, jobs)
    return so_far


def _finished(job: Job) -> Done | None:
    """What an earlier run made of this job, if its shard is there whole."""
    try:
        record = _read_record(job)
        size = (job.dst / job.name).stat().st_size if record.rows else record.bytes
    except (OSError, ValueError):
        return None
    if record.unread or size != record.bytes:
        return None
    return Done(len(job.photos), sum(p.size for p in job.photos), len(record.rejected))


def _stop_if_bad(so_far: Done, photos: int, max_bad: float, jobs: list[Job]) -> None:
    if so_far.bad <= max_bad * photos:
        return
    dst = jobs[0].dst
    rejected = [r for job in jobs if _record_path(job).exists() for r in _read_record(job).rejected]
    write_rejected(dst, rejected)
    raise UserError(
        f"{so_far.bad} of the first {so_far.photos:,} photos are bad, more than --max-bad {max_bad:g} of all {photos:,}; "
        f"the first: {rejected[0]['source']}: {rejected[0]['reason']}; all: {dst}/rejected.jsonl; "
        "what is done is kept, a higher --max-bad goes on"
    )


def main() -> int | None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.make_shards",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="make | verify | index")
    for command, what in ((make, "photos become shards"), (verify, "read shards again"), (index, "index others' tars")):
        one = commands.add_parser(command.__name__, help=what, allow_abbrev=False)
        one.set_defaults(command=command)
        if command is make:
            one.add_argument("src", type=Path, help="a folder of photos, a tar of photos, or ImageNet's own tars")
        one.add_argument("dst", type=Path, help="the folder of the shards")
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        one.add_argument("--processes", type=int, default=cpus, help="default: %(default)s, one per core")
        if command is not verify:
            one.add_argument("--max-bad", type=float, default=0.01, help="share of bad photos to bear; default 0.01")
            one.add_argument(
                "--max-pixels", type=int, default=MAX_PIXELS, help="of a source photo; default %(default)s"
            )
        if command is make:
            one.add_argument("--labels", choices=("auto", "yes", "no"), default="auto", help="are folders classes?")
            one.add_argument("--devkit", type=Path, help="ILSVRC2012_devkit_t12.tar.gz; default: beside SRC, if there")
            one.add_argument("--shard-mb", type=float, default=256.0, help="MB of a shard, at most; default 256")
            one.add_argument("--seed", type=int, default=0, help="of the shuffle; default 0")
            one.add_argument("--resize-short", type=int, help="re-encode photos whose short side is longer, to this")
            one.add_argument("--quality", type=int, default=95, help="of every JPEG made here; default 95")
    options = parser.parse_args()
    _check_numbers(options)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a path need not be UTF-8
    return options.command(options)


def _check_numbers(options: argparse.Namespace) -> None:
    """Raise UserError where an option lies outside its bounds."""
    for name, low, high in (
        ("shard_mb", 0.001, math.inf), ("processes", 1, math.inf), ("max_pixels", 1, math.inf),
        ("resize_short", 1, math.inf), ("quality", 1, 100), ("max_bad", 0, 1),
    ):  # fmt: skip
        value = getattr(options, name, None)
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            span = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise UserError(f"--{name.replace('_', '-')} {value}: give a number {span}")


if __name__ == "__main__":
    run_cli(main)
