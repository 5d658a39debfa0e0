"""`index`: manifest and index for tars of other programs, which stay as they are."""

import difflib
import json
import os
import shutil
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

from pipeline.prepare.archives import (
    AGAIN,
    compressed_tars,
    describe_archive,
    fault,
    first_archive,
    left_out,
    list_tars,
    unpack_tars,
)
from pipeline.prepare.classes import describe_classes
from pipeline.prepare.folder import (
    WORK,
    ShardRecord,
    allowed_bad,
    folder_lock,
    require_writable,
    write_folder,
    write_rejected,
)
from pipeline.prepare.kinds import unread_reason
from pipeline.prepare.labels import Written, read_label, resolve_labels
from pipeline.prepare.names import in_command, printable, splits_among
from pipeline.prepare.photo import decode_error, inspect_existing, limit_pixels
from pipeline.prepare.samples import PHOTO_ENDINGS, Sample, group
from pipeline.prepare.skipped import Skipped, index_warnings, joined_tars
from pipeline.prepare.tar import members
from pipeline.prepare.work import Progress, parallel_map
from pipeline.shards import ORIGIN, SOURCES, plural
from runtime.errors import UserError


@dataclass
class TarRecord(ShardRecord):
    """What is known about a tar of another program."""

    labels: list[Written] = field(default_factory=list)  # of each row
    skipped: Skipped = field(default_factory=Skipped)
    broken: str = ""  # why the whole tar could not be read


def index(options: Namespace) -> None:
    """Write manifest and index for the tars in a folder."""
    dst = options.dst
    tars = _tars_in(dst, options.skip_broken)
    here, new = quote(str(dst.resolve())), quote(f"data/{dst.resolve().name}")
    files = " ".join(f"{here}/*{suffix}" for suffix in sorted({tar.suffix for tar in tars}))
    links = f"links to the tars do as well: `mkdir -p {new} && ln -s {files} {new} && make index DST={new}`"
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
        usable, skipped = [r for r in records if not r.broken], Skipped()
        for record in usable:
            skipped.update(record.skipped)
        classes = _set_labels(dst, usable, skipped)
        head = {
            "source": {"tars": len(usable)},
            "settings": {"photo": options.photo} if options.photo else {},
            "classes": classes,
        }
        labels = Counter(row[4] for record in usable for row in record.rows)
        for line in _describe_labels(classes, labels):
            print(line)
        write_folder(dst, usable, head, _keep_sources(dst, usable), skipped, _rows_of_broken(records))
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


def _tars_in(dst: Path, skip_broken: bool) -> list[Path]:
    """The tars of a folder, compressed ones too if they are to be left out. Raises UserError if there are none, if they
    cannot be indexed together, or if `make` has not finished there."""
    if not dst.is_dir():
        archive = describe_archive(dst) if dst.is_file() else ""
        what = archive or (
            "is a file; give the folder of the tars: " + str(dst.parent) if dst.exists() else "no such folder"
        )
        raise UserError(f"{dst}: {what}")
    if (dst / WORK / "task").exists():
        raise UserError(f"{dst}: holds an unfinished `make`; run the same `make` command again to finish it")
    tars = list_tars(dst)
    if not tars:
        other = "; ".join(left_out(dst)) or "`make shards SRC=photos/ DST=shards/` makes shards from photos"
        raise UserError(f"{dst}: no *.tar here{first_archive(dst) or f'; {other}'}")
    _refuse_splits(dst, [tar.name for tar in tars])
    compressed = compressed_tars(dst)
    if compressed and not skip_broken:
        first = compressed[0][0]
        raise UserError(
            f"{first}: compressed, and would be left out of the index ({plural(len(compressed), 'such file')}): "
            f"`{unpack_tars(compressed)}`, then the same command again; {_skip_broken(dst)}"
        )
    return sorted(tars + [path for path, _ in compressed])


def _refuse_splits(dst: Path, names: list[str]) -> None:
    """Raise UserError if the names of the tars are of several splits."""
    splits = splits_among(names)
    if splits:
        found = [f"{split} ({plural(len(names), 'tar')}, {names[0]} first)" for split, names in splits.items()]
        split, names = next(iter(splits.items()))
        into = quote(str(dst / split))
        raise UserError(
            f"{dst} holds tars of several splits: {', '.join(found)}; give each a folder of its own: `mkdir {into} && "
            f"mv {in_command(dst, names, '.tar')} {into} && make index DST={into}`"
        )


def _skip_broken(dst: Path) -> str:
    """The end of a message: how to continue without the tars that it names."""
    return f"or index the others: `make index DST={quote(str(dst))} ARGS=--skip-broken`"


def _index_tars(options: Namespace, tars: list[Path], rejected: list[dict]) -> list[TarRecord]:
    """The records of all tars, in order. Bad photos and broken tars are added to `rejected` as they are found.

    Raises UserError for broken tars, unless --skip-broken, and if more than --max-bad of the photos are bad.
    """
    dst = options.dst
    faults = {tar.name: why for tar in tars if (why := _fault(tar))}  # in the first second, before anything is decoded
    records = {name: TarRecord(name, 0, "", [], Counter(), broken=why) for name, why in faults.items()}
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
    if all(record.broken for record in in_order):
        raise UserError(_refuse_broken(dst, _rows_of_broken(in_order), len(tars)))
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


def _rows_of_broken(records: Iterable[TarRecord]) -> list[dict]:
    return [{"source": r.name, "reason": r.broken} for r in records if r.broken]


def _refuse_broken(dst: Path, broken: list[dict], tars: int) -> str:
    """The message for tars that cannot be used: each with its reason, and the command that continues without them."""
    listed = "; ".join(f"{row['source']}: {row['reason']}" for row in broken[:3])
    more = f"; and {len(broken) - 3} more ({dst}/rejected.jsonl lists all)" if len(broken) > 3 else ""
    skip = f"; {_skip_broken(dst)}" if tars > len(broken) else ""
    if len(broken) == 1:
        return f"{dst}/{listed}{skip}"
    return f"{dst}: {len(broken)} of {plural(tars, 'tar')} cannot be used: {listed}{more}{skip}"


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
    """One tar to be indexed. photo: as in samples.group."""

    path: Path
    max_pixels: int
    photo: str | None


def index_tar(job: TarJob) -> TarRecord:
    """The record of an existing tar, with `broken` set if it cannot be used. Every photo is decoded once, so that only
    photos that decode are indexed."""
    path, max_pixels, key = job
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
    return TarRecord(path.name, record.bytes, "", [], Counter(), broken=record.broken) if record.broken else record


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
    if any(kind.startswith(("GIF", "TIFF", "BMP")) for kind in skipped.counts):
        shards = tar.parent.with_name(f"{tar.parent.resolve().name}-shards")
        return f"{what}; `make shards SRC={quote(str(tar))} DST={quote(str(shards))}` converts them"
    return f"{what}; convert them to JPEG and pack them again" if skipped.pictures() else what
