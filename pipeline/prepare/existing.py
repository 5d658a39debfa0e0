"""Shards that are there already: verify reads them again, index writes manifest and index for those that others made."""

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

from pipeline.prepare.folder import WORK, Record, counts, folder_lock, write_folder
from pipeline.prepare.photo import bound_pixels, decode_error, inspect_existing
from pipeline.prepare.sources import Member, members, shown
from pipeline.prepare.work import Progress, each
from pipeline.shards import Shards
from runtime.errors import UserError

CLASSES_AT_MOST = 100_000  # of tars that others made, whose labels are bare numbers


class Check(NamedTuple):
    path: Path
    first: int  # sample id of its first sample
    shard: dict  # the manifest's words on it
    rows: np.ndarray  # INDEX: the index's words on it


def verify(options: Namespace) -> int:
    """Read every shard again: 0 if all agrees with manifest and index, else a line per problem and 2."""
    shards = Shards(options.dst, max_missing=None)
    checks = [
        Check(shards.folder / s["name"], int(start), s, np.array(shards.index[start : start + s["samples"]]))
        for s, start in zip(shards.shards, shards.starts, strict=False)
    ]
    problems = 0
    index, written = Path(shards.folder, "index.npy"), shards.manifest.get("index")  # older manifests say nothing of it
    if written and sha256(index.read_bytes()).hexdigest() != written["sha256"]:
        print("index.npy: differs from the manifest's sha256", flush=True)
        problems = 1
    with (
        Progress("verifying", sum(s["bytes"] for s in shards.shards)) as progress,
        closing(each(verify_shard, checks, options.processes)) as results,
    ):
        for check, found in results:
            problems += len(found)
            for line in found:
                print(line, flush=True)
            progress.step(len(check.rows), check.shard["bytes"])
    if problems:
        print(f"{options.dst}: {problems} problem{'s' * (problems > 1)}; copy the shards again, or make them again")
        return 2
    print(f"{options.dst}: {len(shards.shards)} shards, {len(shards):,} samples: all agree")
    return 0


def verify_shard(check: Check) -> tuple[Check, list[str]]:
    """What is wrong with one shard, a line each."""
    name, rows = check.path.name, check.rows
    try:
        with check.path.open("rb") as file:
            digest = file_digest(file, "sha256").hexdigest()
            size = file.tell()
            there = (rows["offset"] + rows["size"]).astype(np.int64) <= size
            problems = [
                f"{name}: sample {check.first + i} ({_member_at(file, row)}) is damaged: "
                f"{row['size']} bytes at byte {row['offset']}"
                for i, row in enumerate(rows)
                if there[i]
                and zlib.crc32(os.pread(file.fileno(), int(row["size"]), int(row["offset"]))) != row["crc32"]
            ]
            if digest == check.shard["sha256"] and problems:
                problems = [f"index.npy: wrong about {len(problems)} samples of {name}, which is as the manifest says"]
            elif digest != check.shard["sha256"] and not problems and size == check.shard["bytes"]:
                problems = [f"{name}: {_where_damaged(file, size)}; none of its {len(rows)} samples is lost: its photos are "
                            "sound, but names, labels or the end differ from the manifest's sha256"]  # fmt: skip
    except OSError as error:
        return check, [f"{name}: {error.strerror}: its {len(rows)} samples are lost"]
    if size != check.shard["bytes"]:
        gone = np.flatnonzero(~there)
        since = f", from sample {check.first + gone[0]} (byte {rows['offset'][gone[0]]}) on" if len(gone) else ""
        lost = f"{len(gone)} of its {len(rows)} samples are lost{since}"
        problems.insert(0, f"{name}: has {size} bytes, the manifest says {check.shard['bytes']} bytes: {lost}")
    return check, problems


def _where_damaged(file: BinaryIO, size: int) -> str:
    """The first header of a tar that is none, else no more than that it differs."""
    try:
        for _ in members(file, 0, size, ""):
            pass
    except UserError as mistake:
        return str(mistake).removeprefix(": ")
    return "differs"


def _member_at(file: BinaryIO, row: np.void) -> str:
    """The name in the header before a sample's bytes, for people to find it by."""
    header = os.pread(file.fileno(), 100, max(0, int(row["offset"]) - 512))
    return shown(os.fsdecode(header.split(b"\0")[0])) or "nameless"


def index(options: Namespace) -> None:
    """Write manifest and index for the tars in a folder."""
    dst = options.dst
    if not dst.is_dir():
        raise UserError(f"{dst}: no such folder")
    if (dst / WORK / "task").exists():
        raise UserError(f"{dst}: an unfinished `make` is here; the same command as before goes on with it")
    tars = sorted(dst.glob("*.tar"))
    if odd := [t for t in tars if not t.is_file()]:
        raise UserError(f"{odd[0]}: is no file")  # a fifo would be waited for
    if not tars:
        raise UserError(f"{dst}: no *.tar here; `make shards SRC=photos/ DST=shards/` makes shards of photos")
    with folder_lock(dst):
        records = {}
        with Progress("indexing", sum(t.stat().st_size for t in tars)) as progress:
            jobs = [(tar, options.max_pixels) for tar in tars]
            with closing(each(index_tar, jobs, options.processes)) as results:
                for record in results:
                    records[record.name] = record
                    progress.step(len(record.rows), record.bytes)
        in_order = [records[tar.name] for tar in tars]
        bad, samples = sum(len(r.rejected) for r in in_order), sum(len(r.rows) for r in in_order)
        if bad > options.max_bad * (bad + samples):
            first = next(r.rejected[0] for r in in_order if r.rejected)
            raise UserError(
                f"{dst}: {bad} of {bad + samples} samples are bad, more than --max-bad {options.max_bad:g}; "
                f"the first: {first['source']}: {first['reason']}"
            )
        head = {"source": {"tars": len(tars)}, "settings": {}, "classes": _classes_of_labels(dst, in_order)}
        write_folder(dst, in_order, head, Counter())
        turned = sum(n for r in in_order for kind, n in r.kept.items() if kind.endswith("rotated"))
        if turned:
            print(f"{turned:,} photos carry an EXIF rotation that no reader here applies; `make` of the photos does")


def _classes_of_labels(dst: Path, records: list[Record]) -> list[str]:
    """Names of the labels: those of the manifest that is being replaced if it has enough, else the numbers themselves."""
    count = 1 + max((row[4] for record in records for row in record.rows), default=-1)
    try:
        names = json.loads((dst / "manifest.json").read_bytes())["classes"]
    except (OSError, ValueError, KeyError, TypeError):
        names = []
    return names if len(names) >= count else [str(label) for label in range(count)]


def index_tar(job: tuple[Path, int]) -> Record:
    """The record of a tar that others made: every photo decoded once, so that what is indexed is known to decode."""
    path, max_pixels = job
    bound_pixels(max_pixels)
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
                rejected.append({"source": f"{path.name}/{shown(photo.name)}", "reason": decode_error(error)})
                continue
            label = os.pread(tar.fileno(), min(cls.size, 16), cls.offset).strip() if cls else b""
            is_label = label.isdigit() and int(label) < CLASSES_AT_MOST
            skipped["labels that are no number"] += bool(cls) and not is_label
            kept[kind] += 1
            crc = zlib.crc32(data)
            rows.append((photo.offset, photo.size, image.height, image.width, int(label) if is_label else -1, crc))
    if not rows and not rejected:
        raise UserError(f"{path}: no photos in this tar (jpg, jpeg, png or webp; found: {counts(+skipped)})")
    return Record(path.name, size, digest, rows, kept, rejected=rejected, skipped=+skipped)


def _samples(found: Iterable[Member], skipped: Counter[str]) -> Iterator[tuple[Member, Member | None]]:
    """(photo, class) of every sample: WebDataset's rule, neighbors that share the name up to its first dot."""
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
            role = "photo" if ending.lower() in ("jpg", "jpeg", "png", "webp") else ending.lower()
            if role in ("photo", "cls") and role in parts:
                skipped["twice in a sample"] += 1
            skipped["not photos"] += role not in ("photo", "cls")
            parts.setdefault(role, m)
