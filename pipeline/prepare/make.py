"""`make`: shards from the photos of a source. A killed `make` is resumed: what is finished is in DST/.make_shards.

DST may be an address (pipeline/remote/upload.py). Then `dst` is a folder of this machine for what is not uploaded yet; each
process makes a shard there, uploads and deletes it.
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
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from shlex import quote
from typing import NamedTuple

import numpy as np

from pipeline.prepare.archives import list_tars
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
    write_skipped,
)
from pipeline.prepare.kinds import unread_reason
from pipeline.prepare.names import printable
from pipeline.prepare.photo import decode_error, limit_pixels, prepare
from pipeline.prepare.sources.listing import describe, list_photos
from pipeline.prepare.sources.photos import Ask, Photo, Root, SourceIndex
from pipeline.prepare.sources.reading import Reader, Unreadable
from pipeline.prepare.work import MB, Progress, megabytes, parallel_map
from pipeline.random import hash64, permute
from pipeline.remote import Upload, is_address
from pipeline.shards import Shards
from runtime.errors import UserError, plural
from runtime.files import sync

UNPACKED = "unpacked"  # in the work folder: what sources without offsets hold
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

    roots: list[Root]
    dst: Path
    name: str
    photos: list[Photo]
    first: int  # number of its first photo; samples are named by their number
    settings: Settings
    upload: Upload | None


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
    with draft.open("wb", buffering=1 << 20) as file, closing(Reader(job.roots)) as source:
        shard = ShardFile(file)
        for number, photo in enumerate(job.photos, job.first):
            data = b""
            try:
                data = source.read(photo, at_most=4 * settings.max_pixels)
                prepared = prepare(data, settings.resize_short, settings.quality)
            except MemoryError:
                raise UserError("out of memory; fewer --processes or a smaller --max-pixels need less") from None
            except Exception as error:  # Pillow can raise anything for a malformed photo
                reason = unread_reason(data, photo.name) or decode_error(error)
                record.rejected.append({"source": source.place(photo), "reason": reason})
                record.unread += isinstance(error, Unreadable)
                continue
            (record.kept if prepared.kept else record.converted)[prepared.kind] += 1
            offset = shard.add(f"{number:08d}.jpg", prepared.data)
            if photo.label >= 0:
                shard.add(f"{number:08d}.cls", b"%d" % photo.label)
            crc = zlib.crc32(prepared.data)
            record.rows.append((offset, len(prepared.data), prepared.height, prepared.width, photo.label, crc))
            record.sources.append(f"{number:08d}\t{source.place(photo)}")
        shard.close()
    if record.rows and job.upload:
        job.upload.put(draft, job.name)
        draft.unlink()
    elif record.rows:
        os.replace(draft, job.dst / job.name)
        sync(job.dst)
    else:  # DALI would read a sample from an empty tar: no file is written, and its number is left out
        draft.unlink()
        (job.dst / job.name).unlink(missing_ok=True)
    record.bytes, record.sha256 = shard.at, shard.sha.hexdigest()
    replace_file(_record_path(job), json.dumps(vars(record)).encode())
    if job.upload:
        job.upload.put(_record_path(job), f"{WORK}/{_record_path(job).name}")
    return Totals(len(job.photos), sum(p.size for p in job.photos), len(record.rejected))


def _record_path(job: Job) -> Path:
    return job.dst / WORK / f"{job.name}.json"


def _read_record(job: Job) -> ShardRecord:
    return ShardRecord(**json.loads(_record_path(job).read_bytes()))


def make(options: argparse.Namespace) -> None:
    """Make DST's shards from SRC's photos, or resume making them."""
    upload = Upload(options.dst, WORK) if is_address(options.dst) else None
    sources, dst = [src.resolve() for src in options.src], upload.folder if upload else options.dst.resolve()
    where = upload.address if upload else dst
    settings = Settings(**{f.name: getattr(options, f.name) for f in fields(Settings)})
    for given, src in zip(options.src, sources, strict=True):
        if dst.is_relative_to(src) or src.is_relative_to(dst):
            raise UserError(f"DST {options.dst} is inside SRC {given}, or SRC inside DST; give a DST outside SRC")
    if not os.path.exists(dst / "manifest.json"):  # unlike Path's, also false in a folder that cannot be entered
        # before a million photos are listed
        require_writable(dst, "XDG_CACHE_HOME names another" if upload else "give another DST")
    if upload:
        upload.check_writable()
    source = _list(options, sources, dst)
    total = sum(p.size for p in source.photos)
    print(f"{plural(len(source.photos), 'photo')}, {megabytes(total)}; {printable(source.summary)}")
    for line in describe(source, options.dst):
        print(line)
    sys.stdout.flush()
    task = {
        "source": {"photos": len(source.photos), "bytes": total, "sha256": source.digest()},
        "settings": asdict(settings),
    }
    with folder_lock(dst, KEPT):
        if upload:
            upload.begin(keep=UNPACKED)
        if (dst / "manifest.json").exists():
            shutil.rmtree(dst / WORK, ignore_errors=True)
            complete = Shards(dst, max_missing=None if upload else 0.0)  # raises if a shard is missing
            _refuse_other(where, complete.manifest, task)
            if upload:
                upload.check_complete(complete.shards)
                upload.clear_work()
                upload.remove_folder()
            print(
                f"{where}: already complete: {plural(len(complete), 'sample')} in {plural(len(complete.shards), 'shard')}"
            )
            return
        jobs = plan_shards(source, dst, settings, upload)
        missing = sum(not (dst / job.name).exists() for job in jobs)
        require_writable(dst, "give a larger --shard-mb", files=(1 if upload else 2) * missing + 8)
        _begin_or_resume(dst, task, upload)
        if upload:
            print(f"uploading to {where}; on this machine: {dst}, at most a shard for each process", flush=True)
        write_skipped(dst, source.skipped)
        try:
            totals = _make_shards(jobs, options.processes, options.max_bad)
            if totals.bad == totals.photos:
                raise UserError(f"{source.origin}: none of its photos is valid; {dst}/rejected.jsonl says why")
        except BaseException:  # whatever ends it, what was found is listed
            write_rejected(dst, source.broken + _rejected(jobs))
            raise
        records = (_read_record(job) for job in jobs)
        head = {**task, "classes": source.classes}
        write_folder(dst, records, head, printable(source.origin), source.skipped, source.broken, upload)
        if upload:
            upload.remove_folder()


def _list(options: argparse.Namespace, sources: list[Path], dst: Path) -> SourceIndex:
    """The photos of all sources. What was unpacked for it is deleted if they cannot be used."""
    unpacked = dst / WORK / UNPACKED
    asked = {f.name: getattr(options, f.name) for f in fields(Ask) if hasattr(options, f.name)}
    try:
        return list_photos(sources, Ask(**asked | {"dst": str(options.dst), "work": unpacked}))
    except BaseException as error:
        if unpacked.exists() and not isinstance(error, KeyboardInterrupt):
            shutil.rmtree(unpacked)
            for folder in (unpacked.parent, dst):
                with suppress(OSError):  # it holds something else
                    folder.rmdir()
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            where = printable(str(error.filename or sources[0]))
            raise UserError(f"{where}: cannot be read: {error.strerror}") from None
        raise


def _refuse_other(dst: Path | str, saved: dict, current: dict) -> None:
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


def _begin_or_resume(dst: Path, task: dict, upload: Upload | None) -> None:
    """Create the work folder, or check the one that a killed run left."""
    work, saved = dst / WORK, dst / WORK / "task"
    where = upload.address if upload else dst
    if saved.exists():
        _refuse_other(where, json.loads(saved.read_bytes()), task)
        for draft in work.glob("*.draft"):
            draft.unlink()
        return
    if upload and any(name.endswith(".tar") for name in upload.names):
        raise UserError(f"DST {where}: holds tars of another program; give another DST, or delete them")
    if list_tars(dst):
        raise UserError(
            f"{dst}: holds tars of another program; give another DST, or write their index with "
            f"`make index DST={quote(str(dst))}`"
        )
    for stale in work.glob("*"):
        if stale.name != UNPACKED:
            stale.unlink()
    work.mkdir(exist_ok=True)
    replace_file(saved, json.dumps(task).encode())
    if upload:
        upload.put(saved, f"{WORK}/task")


def plan_shards(source: SourceIndex, dst: Path, settings: Settings, upload: Upload | None = None) -> list[Job]:
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
        Job(source.roots, dst, f"shard-{i:06d}.tar", shuffled[a:b], int(a), settings, upload)
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
        size = _size(job) if record.rows else record.bytes
    except (OSError, ValueError, TypeError):  # TypeError: a record of another version
        return None
    if record.unread or size != record.bytes or len(record.sources) != len(record.rows):
        return None
    return Totals(len(job.photos), sum(p.size for p in job.photos), len(record.rejected))


def _size(job: Job) -> int:
    """Bytes of a shard where it belongs; -1 or OSError if it is not there."""
    return job.upload.names.get(job.name, -1) if job.upload else (job.dst / job.name).stat().st_size


def _rejected(jobs: list[Job]) -> list[dict]:
    """The rejected photos of all jobs that are finished."""
    rejected = []
    for job in jobs:
        with suppress(OSError, ValueError, TypeError):  # as in _finished
            rejected += _read_record(job).rejected
    return rejected


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
