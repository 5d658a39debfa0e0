"""`verify`: read all shards, and compare them with manifest and index."""

import os
import zlib
from argparse import Namespace
from collections.abc import Iterator
from contextlib import closing
from hashlib import file_digest, sha256
from pathlib import Path
from shlex import quote
from typing import BinaryIO, NamedTuple

import numpy as np

from pipeline.prepare.tar import BLOCK, members
from pipeline.prepare.work import Progress, parallel_map
from pipeline.shards import SOURCES, Shards, describe_loss, member_name
from runtime.errors import UserError, plural


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
    problems += _verify_sources(shards)
    with (
        Progress("verifying", sum(s["bytes"] for s in shards.shards)) as progress,
        closing(parallel_map(verify_shard, checks, options.processes, "nothing was changed")) as results,
    ):
        for check, found in results:
            problems += len(found)
            for line in found:
                print(line, flush=True)
            progress.step(len(check.rows), check.shard["bytes"])
    if problems:
        print(f"{options.dst}: {plural(problems, 'problem')}; {_repair(shards)}")
        return 2
    print(f"{options.dst}: {plural(len(shards.shards), 'shard')}, {plural(len(shards), 'sample')}: all agree")
    return 0


def _repair(shards: Shards) -> str:
    """How to get whole shards. `make` would find a folder with a manifest complete, and one with other tars another
    program's, so what it wrote is deleted first."""
    folder = quote(str(shards.folder))
    if "photos" in shards.manifest.get("source", {}):
        made = f"rm -f {folder}/manifest.json {folder}/shard-*.tar"
        return f"copy what is damaged again; or make all shards again: `{made}`, then the same `make shards` command"
    return f"copy what is damaged again, and if it came so, `make index DST={folder}` indexes what is whole"


def verify_shard(check: Check) -> tuple[Check, list[str]]:
    """What is wrong with one shard, a line each."""
    name, rows = check.path.name, check.rows
    try:
        with check.path.open("rb") as file:
            digest = file_digest(file, "sha256").hexdigest()
            size = file.tell()
            complete = (rows["offset"] + rows["size"]).astype(np.int64) <= size
            damaged = [
                i
                for i, row in enumerate(rows)
                if complete[i]
                and zlib.crc32(os.pread(file.fileno(), int(row["size"]), int(row["offset"]))) != row["crc32"]
            ]
            problems = [
                f"{name}: sample {check.first + i} ({what}) is damaged: {rows['size'][i]} bytes at byte {rows['offset'][i]}"
                for i, what in zip(damaged, _describe_samples(check, file, damaged), strict=True)
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


def _describe_samples(check: Check, file: BinaryIO, damaged: list[int]) -> Iterator[str]:
    """Of these rows of a shard: the member's name, and the photo that it was made from, if it is known."""
    if not damaged:
        return
    shards = Shards(check.path.parent, max_missing=None)
    for i in damaged:
        member = member_name(os.pread(file.fileno(), BLOCK, max(0, int(check.rows["offset"][i]) - BLOCK)))
        source = shards.source(check.first + i)
        made_from = f", made from {source}" if source and source != f"{check.path.name}/{member}" else ""
        yield (member or "no name") + made_from


def _verify_sources(shards: Shards) -> int:
    """Print whether sources.txt is not the manifest's; returns the number of problems. No photo depends on it."""
    written = shards.manifest.get("sources")
    if not written:
        return 0
    try:
        lines = Path(shards.folder, SOURCES).read_bytes().partition(b"\n")[2]  # the first one says where they were
        if sha256(lines).hexdigest() == written["sha256"]:
            return 0
        print(f"{SOURCES}: differs from the manifest's sha256", flush=True)
    except OSError as error:
        print(f"{SOURCES}: {error.strerror}: no photo is lost, but what each was made from", flush=True)
    return 1
