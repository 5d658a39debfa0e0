"""Existing tars: `verify` checks shards, `index` writes manifest and index for tars of other programs."""

import json
import os
import zlib
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from hashlib import file_digest, sha256
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from pipeline.prepare.folder import WORK, ShardRecord, counts, folder_lock, write_folder
from pipeline.prepare.names import printable
from pipeline.prepare.photo import decode_error, inspect_existing, limit_pixels
from pipeline.prepare.tar import Member, members
from pipeline.prepare.work import Progress, parallel_map
from pipeline.shards import Shards, describe_loss, plural
from runtime.errors import UserError

MAX_CLASSES = 100_000  # of tars of other programs, whose labels are bare numbers
PHOTO_ENDINGS = ("jpg", "jpeg", "png", "webp")


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
        head = {"source": {"tars": len(tars)}, "settings": {}, "classes": _classes_of_labels(dst, in_order)}
        write_folder(dst, in_order, head, Counter())
        rotated = sum(n for r in in_order for kind, n in r.kept.items() if kind.endswith("rotated"))
        if rotated:
            print(
                f"{plural(rotated, 'photo')} with EXIF rotation, which the readers do not apply; `make` from photos does"
            )


def _classes_of_labels(dst: Path, records: list[ShardRecord]) -> list[str]:
    """Names of the labels: those of the manifest that is replaced if it has enough, otherwise the numbers."""
    count = 1 + max((row[4] for record in records for row in record.rows), default=-1)
    try:
        names = json.loads((dst / "manifest.json").read_bytes())["classes"]
    except (OSError, ValueError, KeyError, TypeError):
        names = []
    return names if len(names) >= count else [str(label) for label in range(count)]


def index_tar(job: tuple[Path, int]) -> ShardRecord:
    """The record of an existing tar. Every photo is decoded once, so that only photos that decode are indexed."""
    path, max_pixels = job
    limit_pixels(max_pixels)
    kept, skipped, rejected, rows = Counter[str](), Counter[str](), list[dict](), list[tuple[int, ...]]()
    with path.open("rb") as tar:
        digest = file_digest(tar, "sha256").hexdigest()
        size = tar.tell()
        if size == 0:
            raise UserError(f"{path}: empty (0 bytes)")
        for photo, cls in _samples(members(tar, 0, size, str(path)), skipped):
            try:
                if not 0 < photo.size <= 4 * max_pixels:
                    raise ValueError("empty" if photo.size == 0 else f"{photo.size} bytes")
                data = os.pread(tar.fileno(), photo.size, photo.offset)
                image, kind = inspect_existing(data)
            except Exception as error:  # as in make_shard
                rejected.append({"source": f"{path.name}/{printable(photo.name)}", "reason": decode_error(error)})
                continue
            label = os.pread(tar.fileno(), min(cls.size, 16), cls.offset).strip() if cls else b""
            is_label = label.isdigit() and int(label) < MAX_CLASSES
            skipped["non-numeric labels"] += bool(cls) and not is_label
            kept[kind] += 1
            crc = zlib.crc32(data)
            rows.append((photo.offset, photo.size, image.height, image.width, int(label) if is_label else -1, crc))
    if not rows and not rejected:
        raise UserError(f"{path}: no photos in this tar (jpg, jpeg, png or webp; found: {counts(+skipped)})")
    return ShardRecord(path.name, size, digest, rows, kept, rejected=rejected, skipped=+skipped)


def _samples(found: Iterable[Member], skipped: Counter[str]) -> Iterator[tuple[Member, Member | None]]:
    """(photo, class) of every sample. WebDataset's rule: adjacent members that share the name up to its first dot."""
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
            role = "photo" if ending.lower() in PHOTO_ENDINGS else ending.lower()
            if role in ("photo", "cls") and role in parts:
                skipped["duplicates in a sample"] += 1
            skipped["not photos"] += role not in ("photo", "cls")
            parts.setdefault(role, m)
