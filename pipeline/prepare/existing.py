"""`index`: manifest and index for tars of other programs, which stay as they are."""

import difflib
import json
import os
import shlex
import shutil
import zlib
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from hashlib import file_digest
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pipeline.prepare.archives import AGAIN, describe_archive, fault, first_archive
from pipeline.prepare.folder import (
    WORK,
    ShardRecord,
    allowed_bad,
    folder_lock,
    require_writable,
    write_folder,
    write_rejected,
)
from pipeline.prepare.names import printable
from pipeline.prepare.photo import decode_error, inspect_existing, limit_pixels
from pipeline.prepare.tar import Member, members
from pipeline.prepare.work import Progress, parallel_map
from pipeline.shards import ORIGIN, SOURCES, plural
from runtime.errors import UserError

MAX_CLASSES = 100_000  # of tars of other programs, whose labels are bare numbers
PHOTO_ENDINGS = ("jpg", "jpeg", "png", "webp")
NO_PHOTOS = "no photos in this tar (jpg, jpeg, png or webp;"


def index(options: Namespace) -> None:
    """Write manifest and index for the tars in a folder."""
    dst = options.dst
    tars = _tars_in(dst)
    here, new = shlex.quote(str(dst.resolve())), shlex.quote(f"data/{dst.resolve().name}")
    links = f"links to the tars do as well: `mkdir -p {new} && ln -s {here}/*.tar {new} && make index DST={new}`"
    require_writable(dst, links)
    rejected: list[dict] = []
    with folder_lock(dst, "nothing was changed; the same command begins again"):
        try:
            records = _index_tars(options, tars, rejected)
        except BaseException:  # whatever ends it, what was found is listed
            if rejected:
                write_rejected(dst, rejected)
                shutil.rmtree(dst / WORK)
            raise
        usable, broken = [r for r in records if not r.broken], _rows_of_broken(records)
        head = {
            "source": {"tars": len(usable)},
            "settings": {"photo": options.photo} if options.photo else {},
            "classes": _classes_of_labels(dst, usable),
        }
        write_folder(
            dst,
            usable,
            head,
            _keep_sources(dst, usable),
            Counter(),
            broken,
        )
        rotated = sum(n for r in usable for kind, n in r.kept.items() if kind.endswith("rotated"))
        if rotated:
            print(
                f"{plural(rotated, 'photo')} with EXIF rotation, which the readers do not apply; `make` from photos does"
            )


def _tars_in(dst: Path) -> list[Path]:
    """The tars of a folder. Raises UserError if there are none, or if `make` has not finished there."""
    if not dst.is_dir():
        archive = describe_archive(dst) if dst.is_file() else ""
        what = archive or (
            "is a file; give the folder of the tars: " + str(dst.parent) if dst.exists() else "no such folder"
        )
        raise UserError(f"{dst}: {what}")
    if (dst / WORK / "task").exists():
        raise UserError(f"{dst}: holds an unfinished `make`; run the same `make` command again to finish it")
    tars = sorted(dst.glob("*.tar"))
    if not tars:
        hint = first_archive(dst) or "; `make shards SRC=photos/ DST=shards/` makes shards from photos"
        raise UserError(f"{dst}: no *.tar here{hint}")
    return tars


def _index_tars(options: Namespace, tars: list[Path], rejected: list[dict]) -> list[ShardRecord]:
    """The records of all tars, in order. Bad photos and broken tars are added to `rejected` as they are found.

    Raises UserError for broken tars, unless --skip-broken, and if more than --max-bad of the photos are bad.
    """
    dst = options.dst
    faults = {tar.name: why for tar in tars if (why := _fault(tar))}  # in the first second, before anything is decoded
    records = {name: ShardRecord(name, 0, "", [], Counter(), broken=why) for name, why in faults.items()}
    rejected += _rows_of_broken(records.values())
    if faults and not options.skip_broken:
        raise UserError(_refuse_broken(dst, rejected, len(tars)))
    jobs = [TarJob(tar, options.max_pixels, options.photo) for tar in tars if tar.name not in faults]
    with (
        Progress("indexing", sum(job.path.stat().st_size for job in jobs)) as progress,
        closing(parallel_map(index_tar, jobs, options.processes, "nothing was changed")) as results,
    ):
        for record in results:
            records[record.name] = record
            rejected += _rows_of_broken([record]) + record.rejected
            if record.broken and not options.skip_broken:
                raise UserError(_refuse_broken(dst, _rows_of_broken([record]), len(tars)))
            progress.step(len(record.rows), record.bytes)
    in_order = [records[tar.name] for tar in tars]
    rejected[:] = _rows_of_broken(in_order) + [row for r in in_order for row in r.rejected]
    bad, samples = sum(len(r.rejected) for r in in_order), sum(len(r.rows) for r in in_order)
    if bad > allowed_bad(options.max_bad, bad + samples):
        first = next(r.rejected[0] for r in in_order if r.rejected)
        raise UserError(
            f"{dst}: {bad} of {bad + samples} samples are bad, more than --max-bad {options.max_bad:g}; the first one is "
            f"{first['source']}: {first['reason']}; {dst}/rejected.jsonl lists all of them"
        )
    if not samples:
        raise UserError(f"{dst}: no valid photo in its tars; {dst}/rejected.jsonl says why")
    return in_order


def _fault(tar: Path) -> str:
    try:
        return fault(tar)
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _rows_of_broken(records: Iterable[ShardRecord]) -> list[dict]:
    return [{"source": r.name, "reason": r.broken} for r in records if r.broken]


def _refuse_broken(dst: Path, broken: list[dict], tars: int) -> str:
    """The message for tars that cannot be used: each with its reason, and the command that goes on without them."""
    listed = "; ".join(f"{row['source']}: {row['reason']}" for row in broken[:3])
    more = f"; and {len(broken) - 3} more ({dst}/rejected.jsonl lists all)" if len(broken) > 3 else ""
    skip = (
        f"; or index the others: `make index DST={shlex.quote(str(dst))} ARGS=--skip-broken`"
        if tars > len(broken)
        else ""
    )
    if len(broken) == 1:
        return f"{dst}/{listed}{skip}"
    return f"{dst}: {len(broken)} of {plural(tars, 'tar')} cannot be used: {listed}{more}{skip}"


def _keep_sources(dst: Path, records: list[ShardRecord]) -> str:
    """Shards that `make` made keep what they were made from, under a new index too: gives each record its lines of the
    present sources.txt. Returns its folder of photos; "" if there is no such file, and then records have no lines."""
    origin, known = "", dict[str, str]()
    with suppress(OSError, ValueError):
        first, *lines = (dst / SOURCES).read_text().splitlines()
        if first.startswith(f"{ORIGIN}\t"):  # not another program's file of that name
            origin = first.partition("\t")[2]
            known = {line.partition("\t")[0]: line for line in lines}
    for record in records:
        all_known = all(key in known for key in record.sources)
        record.sources = [known[key] for key in record.sources] if all_known else []
    return origin


def _classes_of_labels(dst: Path, records: list[ShardRecord]) -> list[str]:
    """Names of the labels: those of the manifest that is replaced if it has enough, otherwise the numbers."""
    count = 1 + max((row[4] for record in records for row in record.rows), default=-1)
    try:
        names = json.loads((dst / "manifest.json").read_bytes())["classes"]
    except (OSError, ValueError, KeyError, TypeError):
        names = []
    return names if len(names) >= count else [str(label) for label in range(count)]


class TarJob(NamedTuple):
    """One tar to be indexed. photo: the key of its photos (`input.jpg`); None: PHOTO_ENDINGS."""

    path: Path
    max_pixels: int
    photo: str | None


def index_tar(job: TarJob) -> ShardRecord:
    """The record of an existing tar, with `broken` set if it cannot be used. Every photo is decoded once, so that only
    photos that decode are indexed."""
    path, max_pixels, key = job
    limit_pixels(max_pixels)
    record = ShardRecord(path.name, 0, "", [], Counter())
    endings = Counter[str]()
    try:
        with path.open("rb") as tar:
            record.sha256 = file_digest(tar, "sha256").hexdigest()
            record.bytes = tar.tell()
            for photo, cls in _samples(members(tar, 0, record.bytes, ""), record.skipped, key, endings):
                _index_sample(record, tar, photo, cls, max_pixels)
        if not record.rows and not record.rejected:
            record.broken = _no_photos(path.parent, key, endings)
    except UserError as error:
        record.broken = f"{error}; {AGAIN}".removeprefix(": ")
    except OSError as error:
        record.broken = f"cannot be read: {error.strerror}; {AGAIN}"
    record.skipped = +record.skipped
    return ShardRecord(path.name, record.bytes, "", [], Counter(), broken=record.broken) if record.broken else record


def _index_sample(record: ShardRecord, tar: BinaryIO, photo: Member, cls: Member | None, max_pixels: int) -> None:
    """Add a sample to its tar's record, or to the rejected ones."""
    try:
        if not 0 < photo.size <= 4 * max_pixels:
            raise ValueError("empty" if photo.size == 0 else f"{photo.size} bytes")
        data = os.pread(tar.fileno(), photo.size, photo.offset)
        image, kind = inspect_existing(data)
    except Exception as error:  # as in make_shard
        if isinstance(error, OSError) and error.errno:  # the disk's; Pillow's own have no number
            raise
        record.rejected.append({"source": f"{record.name}/{printable(photo.name)}", "reason": decode_error(error)})
        return
    label = os.pread(tar.fileno(), min(cls.size, 16), cls.offset).strip() if cls else b""
    is_label = label.isdigit() and int(label) < MAX_CLASSES
    record.skipped["non-numeric labels"] += bool(cls) and not is_label
    record.kept[kind] += 1
    place = photo.offset, photo.size, image.height, image.width
    record.rows.append((*place, int(label) if is_label else -1, zlib.crc32(data)))
    record.sources.append(photo.name.partition(".")[0])  # its key: `make` lists what it was made from under that


def _no_photos(folder: Path, key: str | None, endings: Counter[str]) -> str:
    """Why a tar has no photos: the keys that its members have, and the command that chooses one."""
    found = ", ".join(f"{printable(ending)} ({n:,})" for ending, n in endings.most_common(8)) or "nothing"
    what = f"no photos in this tar (key {key}; found: {found})" if key else f"{NO_PHOTOS} found: {found})"
    likely = [e for e, _ in endings.most_common() if e.rpartition(".")[2] in PHOTO_ENDINGS]
    if not likely:
        return what
    chosen = difflib.get_close_matches(key or "", likely, 1) or likely
    args = shlex.quote(f"--photo {chosen[0]}")
    return f"{what}; `make index DST={shlex.quote(str(folder))} ARGS={args}` takes {chosen[0]}"


def _samples(
    found: Iterable[Member], skipped: Counter[str], photo: str | None, endings: Counter[str]
) -> Iterator[tuple[Member, Member | None]]:
    """(photo, class) of every sample. WebDataset's rule: adjacent members that share the name up to its first dot.

    photo: the key of the photos; None: PHOTO_ENDINGS. All keys are counted in `endings`.
    """
    key, parts = "", dict[str, Member]()
    for m in [*found, None]:
        folder, _, base = m.name.rpartition("/") if m else ("", "", "")
        stem, _, ending = base.partition(".")
        if m and (m.skip or not stem or not ending):
            skipped[m.skip or "not photos"] += 1
            continue
        if m is None or f"{folder}/{stem}" != key:
            if "photo" in parts:
                yield parts["photo"], parts.get("cls")
            elif key:
                skipped["samples without a photo"] += 1
            key, parts = f"{folder}/{stem}", {}
        if m:
            ending = ending.lower()
            endings[ending] += 1
            role = "photo" if (ending == photo if photo else ending in PHOTO_ENDINGS) else ending
            if role in ("photo", "cls") and role in parts:
                skipped["duplicates in a sample"] += 1
            skipped["not photos"] += role not in ("photo", "cls")
            parts.setdefault(role, m)
