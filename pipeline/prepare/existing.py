"""Existing tars: `verify` checks shards, `index` writes manifest and index for tars of other programs."""

import json
import os
import zlib
from argparse import Namespace
from collections import Counter
from contextlib import closing
from hashlib import file_digest, sha256
from pathlib import Path
from shlex import quote
from typing import BinaryIO, NamedTuple

import numpy as np

from pipeline.prepare.folder import WORK, ShardRecord, folder_lock, write_folder
from pipeline.prepare.kinds import unread_reason
from pipeline.prepare.labels import Written, read_label, resolve_labels
from pipeline.prepare.names import printable, splits_among
from pipeline.prepare.photo import decode_error, inspect_existing, limit_pixels
from pipeline.prepare.samples import group
from pipeline.prepare.skipped import Skipped, counts, index_warnings
from pipeline.prepare.tar import members
from pipeline.prepare.work import Progress, parallel_map
from pipeline.shards import Shards, describe_loss, plural
from runtime.errors import UserError

UNPACK = {".gz": "gunzip -k", ".tgz": "gunzip -k", ".xz": "unxz -k", ".zst": "unzstd", ".bz2": "bunzip2 -k"}


class Check(NamedTuple):
    """One shard to be checked."""

    path: Path
    first: int  # sample id of its first sample
    shard: dict  # its entry in the manifest
    rows: np.ndarray  # INDEX: its records in the index


def verify(options: Namespace) -> int:
    """Read every shard. Returns 0 if all agree with manifest and index; otherwise 2, after a line per problem."""
    shards = Shards(options.dst, max_missing=None)
    checks = [
        Check(shards.folder / s["name"], int(start), s, np.array(shards.index[start : start + s["samples"]]))
        for s, start in zip(shards.shards, shards.starts, strict=False)
    ]
    problems = 0
    index, written = (
        Path(shards.folder, "index.npy"),
        shards.manifest.get("index"),
    )  # older manifests have no such entry
    if written and sha256(index.read_bytes()).hexdigest() != written["sha256"]:
        print("index.npy: differs from the manifest's sha256", flush=True)
        problems = 1
    with (
        Progress("verifying", sum(s["bytes"] for s in shards.shards)) as progress,
        closing(parallel_map(verify_shard, checks, options.processes)) as results,
    ):
        for check, found in results:
            problems += len(found)
            for line in found:
                print(line, flush=True)
            progress.step(len(check.rows), check.shard["bytes"])
    if problems:
        print(f"{options.dst}: {plural(problems, 'problem')}; copy the shards again, or make them again")
        return 2
    print(f"{options.dst}: {plural(len(shards.shards), 'shard')}, {plural(len(shards), 'sample')}: all agree")
    return 0


def verify_shard(check: Check) -> tuple[Check, list[str]]:
    """What is wrong with one shard, a line each."""
    name, rows = check.path.name, check.rows
    try:
        with check.path.open("rb") as file:
            digest = file_digest(file, "sha256").hexdigest()
            size = file.tell()
            complete = (rows["offset"] + rows["size"]).astype(np.int64) <= size
            problems = [
                f"{name}: sample {check.first + i} ({_member_at(file, row)}) is damaged: "
                f"{row['size']} bytes at byte {row['offset']}"
                for i, row in enumerate(rows)
                if complete[i]
                and zlib.crc32(os.pread(file.fileno(), int(row["size"]), int(row["offset"]))) != row["crc32"]
            ]
            if digest == check.shard["sha256"] and problems:
                problems = [
                    f"index.npy: differs from {plural(len(problems), 'sample')} of {name}, which matches the manifest"
                ]
            elif digest != check.shard["sha256"] and not problems and size == check.shard["bytes"]:
                problems = [
                    f"{name}: {_where_damaged(file, size)}; none of its {plural(len(rows), 'sample')} is lost: all "
                    "photos are intact, but names, labels or the end differ from the manifest's sha256"
                ]
    except OSError as error:
        return check, [f"{name}: {error.strerror}: {describe_loss(np.arange(len(rows)), rows, check.first)}"]
    if size != check.shard["bytes"]:
        loss = describe_loss(np.flatnonzero(~complete), rows, check.first)
        expected = plural(check.shard["bytes"], "byte")
        problems.insert(0, f"{name}: has {plural(size, 'byte')}, the manifest says {expected}: {loss}")
    return check, problems


def _where_damaged(file: BinaryIO, size: int) -> str:
    """Where a tar's headers are damaged; if nowhere, only that it differs."""
    try:
        for _ in members(file, 0, size, ""):
            pass
    except UserError as error:
        return str(error).removeprefix(": ")
    return "differs"


def _member_at(file: BinaryIO, row: np.void) -> str:
    """The member's name in the header before a sample's bytes."""
    header = os.pread(file.fileno(), 100, max(0, int(row["offset"]) - 512))
    return printable(os.fsdecode(header.split(b"\0")[0])) or "no name"


def index(options: Namespace) -> None:
    """Write manifest and index for the tars in a folder."""
    dst = options.dst
    if not dst.is_dir():
        raise UserError(f"{dst}: no such folder")
    if (dst / WORK / "task").exists():
        raise UserError(f"{dst}: holds an unfinished `make`; run the same `make` command again to finish it")
    tars = sorted(dst.glob("*.tar"))
    if special := [t for t in tars if not t.is_file()]:
        raise UserError(f"{special[0]}: is not a file")  # reading a fifo would wait for ever
    if not tars:
        raise UserError(f"{dst}: no *.tar here; `make shards SRC=photos/ DST=shards/` makes shards from photos")
    _refuse_other_tars(dst, tars)
    with folder_lock(dst):
        records = {}
        with Progress("indexing", sum(t.stat().st_size for t in tars)) as progress:
            jobs = [(tar, options.max_pixels) for tar in tars]
            with closing(parallel_map(index_tar, jobs, options.processes)) as results:
                for record in results:
                    records[record.name] = record
                    progress.step(len(record.rows), record.bytes)
        in_order = [records[tar.name] for tar in tars]
        bad, samples = sum(len(r.rejected) for r in in_order), sum(len(r.rows) for r in in_order)
        if bad > options.max_bad * (bad + samples):
            first = next(r.rejected[0] for r in in_order if r.rejected)
            raise UserError(
                f"{dst}: {bad} of {bad + samples} samples are bad, more than --max-bad {options.max_bad:g}; "
                f"the first one is {first['source']}: {first['reason']}"
            )
        skipped = Skipped()
        classes = _set_labels(dst, in_order, skipped)
        head = {"source": {"tars": len(tars)}, "settings": {}, "classes": classes}
        write_folder(dst, in_order, head, skipped.counts, skipped.listed)
        labels = sum(row[4] >= 0 for record in in_order for row in record.rows)
        skipped.listed += [row for record in in_order for row in record.left_out]
        for warning in index_warnings(skipped, samples, labels):
            print(f"warning: {warning}")
        rotated = sum(n for r in in_order for kind, n in r.kept.items() if kind.endswith("rotated"))
        if rotated:
            print(
                f"{plural(rotated, 'photo')} with EXIF rotation, which the readers do not apply; `make` from photos does"
            )


def _refuse_other_tars(dst: Path, tars: list[Path]) -> None:
    """Raise UserError if the folder holds compressed tars that would be left out, or tars of several splits."""
    packed = {
        p: p.with_suffix(".tar" if p.suffix.lower() == ".tgz" else "")
        for p in dst.iterdir()
        if p.suffix.lower() in UNPACK
    }
    left_out = sorted(p for p, tar in packed.items() if tar.suffix.lower() == ".tar" and not tar.exists())
    if left_out:
        first = left_out[0]
        files = _words(dst, [p.name for p in left_out], "".join(first.suffixes[-2:]))
        raise UserError(
            f"{first}: compressed, and would be left out of the index ({plural(len(left_out), 'such file')}): "
            f"`{UNPACK[first.suffix.lower()]} {files}`, then the same command again; or move them elsewhere"
        )
    splits = splits_among(tar.stem for tar in tars)
    if splits:
        found = [f"{split} ({plural(len(stems), 'tar')}, {stems[0]}.tar first)" for split, stems in splits.items()]
        split, stems = next(iter(splits.items()))
        into = quote(str(dst / split))
        raise UserError(
            f"{dst} holds tars of several splits: {', '.join(found)}; give each a folder of its own: `mkdir {into} && "
            f"mv {_words(dst, [f'{stem}.tar' for stem in stems], '.tar')} {into} && make index DST={into}`"
        )


def _words(dst: Path, names: list[str], ending: str) -> str:
    """These files in a command: as a pattern if it matches no other file of the folder."""
    beginning = os.path.commonprefix(names)  # noqa: RUF071  # of letters, not of folders
    beginning = beginning.removesuffix(ending) if len(names) > 1 else ""
    matched = [p.name for p in dst.iterdir() if p.name.startswith(beginning) and p.name.endswith(ending)]
    if len(names) > 1 and sorted(matched) == sorted(names):
        return f"{quote(f'{dst}/{beginning}')}*{ending}"
    return " ".join(quote(str(dst / name)) for name in names)


def _set_labels(dst: Path, records: list[ShardRecord], skipped: Skipped) -> list[str]:
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


def index_tar(job: tuple[Path, int]) -> ShardRecord:
    """The record of an existing tar. Every photo is decoded once, so that only photos that decode are indexed."""
    path, max_pixels = job
    limit_pixels(max_pixels)
    kept, skipped, rejected, rows = Counter[str](), Skipped(), list[dict](), list[tuple[int, ...]]()
    labels = list[Written]()
    with path.open("rb") as tar:
        digest = file_digest(tar, "sha256").hexdigest()
        size = tar.tell()
        if size == 0:
            raise UserError(f"{path}: empty (0 bytes)")
        for sample in group(tar, members(tar, 0, size, str(path)), skipped, path.name):
            photo, data = sample.parts["photo"], b""
            try:
                if not 0 < photo.size <= 4 * max_pixels:
                    raise ValueError("empty" if photo.size == 0 else f"{photo.size} bytes")
                data = os.pread(tar.fileno(), photo.size, photo.offset)
                image, kind = inspect_existing(data)
            except Exception as error:  # as in make_shard
                reason = unread_reason(data, photo.name) or decode_error(error)
                rejected.append({"source": f"{path.name}/{printable(photo.name)}", "reason": reason})
                continue
            labels.append(read_label(tar, sample.parts, skipped, path.name))
            kept[kind] += 1
            crc = zlib.crc32(data)
            rows.append((photo.offset, photo.size, image.height, image.width, -1, crc))
    if not rows and not rejected:
        raise UserError(f"{path}: no photos in this tar (jpg, jpeg, png or webp; found: {counts(skipped.counts)})")
    return ShardRecord(
        path.name,
        size,
        digest,
        rows,
        kept,
        rejected=rejected,
        skipped=skipped.counts,
        left_out=skipped.listed,
        labels=labels,
    )
