"""`index`: manifest and index for tars of other programs, which stay as they are."""

import difflib
import json
import os
import zlib
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from hashlib import file_digest
from pathlib import Path
from shlex import quote
from typing import BinaryIO, NamedTuple

from pipeline.prepare.archives import AGAIN, fault, left_out
from pipeline.prepare.folder import (
    WORK,
    ShardRecord,
    allowed_bad,
    folder_lock,
    replace_file,
    require_writable,
    write_folder,
    write_rejected,
)
from pipeline.prepare.kinds import INSTALL, readable, unread_reason
from pipeline.prepare.names import printable
from pipeline.prepare.photo import decode_error, inspect_existing, limit_pixels
from pipeline.prepare.skipped import Skipped
from pipeline.prepare.sources.classes import describe_classes
from pipeline.prepare.tar import members
from pipeline.prepare.tars.choice import choose_tars, describe_broken, link_tars, require_own_folder
from pipeline.prepare.tars.labels import Written, read_label, resolve_labels
from pipeline.prepare.tars.samples import PHOTO_ENDINGS, Sample, group
from pipeline.prepare.warnings import index_warnings, joined_tars
from pipeline.prepare.work import Progress, parallel_map
from pipeline.shards import ORIGIN, SOURCES
from runtime.errors import UserError, plural

RESUMES = "what was read is kept, the same command resumes"


@dataclass
class TarRecord(ShardRecord):
    """What is known about a tar of another program."""

    labels: list[Written] = field(default_factory=list)  # of each row
    skipped: Skipped = field(default_factory=Skipped)
    broken: str = ""  # why the whole tar could not be read


def index(options: Namespace) -> None:
    """Write manifest and index for the tars in a folder."""
    dst = options.dst
    tars = choose_tars(dst, options.skip_broken, options.match)
    out = options.out or dst
    if options.out:
        require_own_folder(out, tars)
    args = quote(f"--out {quote(f'data/{dst.resolve().name}')}")
    require_writable(out, f"write the index elsewhere: `make index DST={quote(str(dst.resolve()))} ARGS={args}`")
    rejected: list[dict] = []
    with folder_lock(out, RESUMES):
        try:
            records = _index_tars(options, tars, rejected)
        except BaseException:  # whatever ends it, what was found is listed
            if rejected:
                write_rejected(out, rejected)
                with suppress(OSError):  # it has records of tars that were read
                    (out / WORK).rmdir()
            raise
        usable, skipped = [r for r in records if not r.broken], Skipped()
        for record in usable:
            skipped.update(record.skipped)
        classes = _set_labels(out, usable, skipped)
        head = {
            "source": {"tars": len(usable)},
            "settings": {"photo": options.photo} if options.photo else {},
            "classes": classes,
        }
        labels = Counter(row[4] for record in usable for row in record.rows)
        for line in _describe_labels(classes, labels):
            print(line)
        origin = _keep_sources(dst, usable)
        if options.out:
            link_tars(out, [dst / record.name for record in usable])
        write_folder(out, usable, head, origin, skipped, _rows_of_broken(records))
        for line in joined_tars(skipped):
            print(line)
        labeled = labels.total() - labels[-1]
        for warning in index_warnings(skipped, labels.total(), labeled, options.photo):
            print(f"warning: {warning}")
        for what in left_out(dst):
            print(f"warning: left out: {what}")
        rotated = sum(n for r in usable for kind, n in r.kept.items() if kind.endswith("rotated"))
        if rotated:
            print(
                f"{plural(rotated, 'photo')} with EXIF rotation, which the readers do not apply; `make` from photos does"
            )


def _index_tars(options: Namespace, tars: list[Path], rejected: list[dict]) -> list[TarRecord]:
    """The records of all tars, in order. Bad photos and broken tars are added to `rejected` as they are found.

    Raises UserError for broken tars, unless --skip-broken, and if more than --max-bad of the photos are bad.
    """
    dst, out = options.dst, options.out or options.dst
    faults = {tar.name: why for tar in tars if (why := _fault(tar))}  # in the first second, before anything is decoded
    records = {name: TarRecord(name, 0, "", [], Counter(), broken=why) for name, why in faults.items()}
    rejected += _rows_of_broken(records.values())
    if faults and not options.skip_broken:
        raise UserError(describe_broken(dst, rejected, len(tars)))
    jobs = [TarJob(tar, out, options.max_pixels, options.photo) for tar in tars if tar.name not in faults]
    before = {job.path.name: record for job in jobs if (record := _read_record(job))}
    if before:
        print(f"resuming: {len(before)} of {plural(len(tars), 'tar')} read before", flush=True)
    for record in before.values():
        rejected += record.rejected
    records |= before
    jobs = [job for job in jobs if job.path.name not in before]
    with (
        Progress("indexing", sum(job.path.stat().st_size for job in jobs)) as progress,
        closing(parallel_map(index_tar, jobs, options.processes, RESUMES)) as results,
    ):
        for record in results:
            records[record.name] = record
            rejected += _rows_of_broken([record]) + record.rejected
            if record.broken and not options.skip_broken:
                raise UserError(describe_broken(dst, _rows_of_broken([record]), len(tars)))
            progress.step(len(record.rows), record.bytes)
    in_order = [records[tar.name] for tar in tars]
    rejected[:] = _rows_of_broken(in_order) + [row for r in in_order for row in r.rejected]
    if all(record.broken for record in in_order):
        raise UserError(describe_broken(dst, _rows_of_broken(in_order), len(tars)))
    bad, samples = sum(len(r.rejected) for r in in_order), sum(len(r.rows) for r in in_order)
    if bad > allowed_bad(options.max_bad, bad + samples):
        first = next(r.rejected[0] for r in in_order if r.rejected)
        raise UserError(
            f"{dst}: {bad} of {bad + samples} samples are bad, more than --max-bad {options.max_bad:g}; the first one is "
            f"{first['source']}: {first['reason']}; {out}/rejected.jsonl lists all of them; {RESUMES}"
        )
    if not samples:
        raise UserError(f"{dst}: no valid photo in its tars; {out}/rejected.jsonl says why")
    return in_order


def _fault(tar: Path) -> str:
    try:
        return fault(tar)
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _rows_of_broken(records: Iterable[TarRecord]) -> list[dict]:
    return [{"source": r.name, "reason": r.broken} for r in records if r.broken]


def _keep_sources(dst: Path, records: list[TarRecord]) -> str:
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


def _set_labels(dst: Path, records: list[TarRecord], skipped: Skipped) -> list[str]:
    """Fill in the rows' labels; returns the names of the classes: those that are written in the tars. For numbers, those of
    the manifest that is replaced if it has enough, otherwise the numbers."""
    label_of, classes, said = resolve_labels([w for record in records for w in record.labels], skipped)
    if said:
        print(said)
    labels = iter(label_of)
    for record in records:
        record.rows = [(*row[:4], next(labels), *row[5:]) for row in record.rows]
    if classes:
        return classes
    count = 1 + max(label_of, default=-1)
    try:
        names = json.loads((dst / "manifest.json").read_bytes())["classes"]
    except (OSError, ValueError, KeyError, TypeError):
        names = []
    return names if len(names) >= count else [str(label) for label in range(count)]


def _describe_labels(classes: list[str], labels: Counter[int]) -> list[str]:
    """Lines for the user on the labels: how many samples have each, -1 for none."""
    lines = []
    if classes:
        lines.append(describe_classes(classes, labels))
    without, found = labels[-1], len(labels.keys() - {-1})
    if 0 < found < len(classes):
        lines.append(
            f"samples in only {found:,} of {len(classes):,} classes: labels are positions in the list of classes, from 0 "
            f"on; here the lowest is {min(labels.keys() - {-1})}, the highest {max(labels)}"
        )
    if without and found:
        lines.append(f"{without:,} of {labels.total():,} samples have no label")
    return lines


class TarJob(NamedTuple):
    """One tar to be indexed. photo: as in `tars.samples.group`."""

    path: Path
    out: Path  # the folder of the index
    max_pixels: int
    photo: str | None


def index_tar(job: TarJob) -> TarRecord:
    """The record of an existing tar, with `broken` set if it cannot be used. Every photo is decoded once, so that only
    photos that decode are indexed."""
    path, _, max_pixels, key = job
    limit_pixels(max_pixels)
    record = TarRecord(path.name, 0, "", [], Counter())
    endings = Counter[str]()
    try:
        with path.open("rb") as tar:
            record.sha256 = file_digest(tar, "sha256").hexdigest()
            record.bytes = tar.tell()
            found = members(tar, 0, record.bytes, "", record.skipped.joints(path.name))
            for sample in group(tar, found, record.skipped, path.name, key, endings):
                _index_sample(record, tar, sample, max_pixels)
        if not record.rows and not record.rejected:
            record.broken = _no_photos(path, key, endings, record.skipped)
    except UserError as error:
        record.broken = f"{error}; {AGAIN}".removeprefix(": ")
    except OSError as error:
        record.broken = f"cannot be read: {error.strerror}; {AGAIN}"
    if record.broken:
        return TarRecord(path.name, record.bytes, "", [], Counter(), broken=record.broken)
    replace_file(
        _record_path(job), json.dumps([_identity(job), vars(record) | {"skipped": vars(record.skipped)}]).encode()
    )
    return record


def _record_path(job: TarJob) -> Path:
    return job.out / WORK / f"{job.path.name}.json"


def _identity(job: TarJob) -> list:
    """What a record depends on."""
    found = job.path.stat()
    return [str(job.path.resolve()), found.st_size, found.st_mtime_ns, job.max_pixels, job.photo]


def _read_record(job: TarJob) -> TarRecord | None:
    """The record that a run before this one has made of the tar as it is now."""
    try:
        identity, saved = json.loads(_record_path(job).read_bytes())
        if identity != _identity(job):
            return None
        skipped, labels = Skipped(**saved.pop("skipped")), [Written(*w) for w in saved.pop("labels")]
        skipped.counts, kept = Counter(skipped.counts), Counter(saved.pop("kept"))
        return TarRecord(**saved, kept=kept, labels=labels, skipped=skipped)
    except (OSError, ValueError, TypeError, KeyError):  # none, or of another version
        return None


def _index_sample(record: TarRecord, tar: BinaryIO, sample: Sample, max_pixels: int) -> None:
    """Add a sample to its tar's record, or to the rejected ones. Its label comes later, from all tars together."""
    photo, data = sample.parts["photo"], b""
    try:
        if not 0 < photo.size <= 4 * max_pixels:
            raise ValueError("empty" if photo.size == 0 else f"{photo.size} bytes")
        data = os.pread(tar.fileno(), photo.size, photo.offset)
        image, kind = inspect_existing(data)
    except Exception as error:  # as in make_shard
        if isinstance(error, OSError) and error.errno:  # the disk's; Pillow's own have no number
            raise
        reason = unread_reason(data, photo.name) or decode_error(error)
        record.rejected.append({"source": f"{record.name}/{printable(photo.name)}", "reason": reason})
        return
    record.labels.append(read_label(tar, sample.parts, record.skipped, record.name))
    record.kept[kind] += 1
    record.rows.append((photo.offset, photo.size, image.height, image.width, -1, zlib.crc32(data)))
    record.sources.append(sample.key)  # `make` lists what it was made from under that


def _no_photos(tar: Path, key: str | None, endings: Counter[str], skipped: Skipped) -> str:
    """Why a tar has no photos: the endings of its members, and the command that chooses one."""
    found = ", ".join(f"{printable(e) or 'no ending'} ({n:,})" for e, n in endings.most_common(8)) or "nothing"
    what = f"no photos in this tar ({f'key {key}' if key else 'jpg, jpeg, png or webp'}; found: {found})"
    likely = [e for e, _ in endings.most_common() if e.rpartition(".")[2] in PHOTO_ENDINGS]
    if likely:
        chosen = difflib.get_close_matches(key or "", likely, 1) or likely
        args = quote(f"--photo {chosen[0]}")
        return f"{what}; `make index DST={quote(str(tar.parent))} ARGS={args}` takes {chosen[0]}"
    if any(kind.startswith(("GIF", "TIFF", "BMP", *filter(readable, INSTALL))) for kind in skipped.counts):
        shards = tar.parent.with_name(f"{tar.parent.resolve().name}-shards")
        return f"{what}; `make shards SRC={quote(str(tar))} DST={quote(str(shards))}` converts them"
    return f"{what}; convert them to JPEG and pack them again" if skipped.pictures() else what
