"""A shard folder while it is written: a tar, its record, and at the end sources.txt, index.npy and manifest.json.

A file with its final name is complete: drafts are in DST/.make_shards, are synced to the disk and then renamed.
"""

import errno
import getpass
import io
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from shlex import quote
from tempfile import TemporaryFile
from typing import BinaryIO

import numpy as np

from pipeline.prepare.skipped import Skipped, counts
from pipeline.prepare.work import megabytes
from pipeline.remote import Upload
from pipeline.shards import FORMAT, INDEX, ORIGIN, SOURCES
from runtime.errors import UserError, plural
from runtime.files import sync, try_lock, write_atomic

WORK = ".make_shards"  # in DST while it is being written


@dataclass
class ShardRecord:
    """What is known about one shard once it is made or read. Its JSON in the work folder marks a finished shard."""

    name: str
    bytes: int
    sha256: str
    rows: list[tuple[int, ...]]  # the index's columns but the first: offset, size, height, width, label, crc32
    kept: Counter[str]  # photos with the source's bytes, by kind
    converted: Counter[str] = field(default_factory=Counter)
    rejected: list[dict] = field(default_factory=list)  # {"source": name, "reason": why}
    unread: int = 0  # of the rejected, those that could not be read: the next run tries them again
    sources: list[str] = field(default_factory=list)  # of each row, a line of sources.txt, if it is known


class ShardFile:
    """A tar that is being written: USTAR, with the same date, user and mode for all members. `at`: bytes so far."""

    def __init__(self, file: BinaryIO):
        self.file, self.at, self.sha = file, 0, sha256()

    def add(self, name: str, data: bytes) -> int:
        """Append a member; returns the offset of its first byte."""
        self._put(_header(name, len(data)))
        offset = self.at
        self._put(data)
        self._put(bytes(-len(data) % 512))
        return offset

    def close(self) -> None:
        self._put(bytes(1024))
        self.file.flush()
        os.fsync(self.file.fileno())

    def _put(self, data: bytes) -> None:
        self.file.write(data)
        self.sha.update(data)
        self.at += len(data)


def _header(name: str, size: int) -> bytes:
    """A file's USTAR header, mode 0644, date, user and group 0: the same bytes as tarfile's, in a quarter of the time."""
    before = name.encode().ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + b"%011o\0%011o\0" % (size, 0)
    after = b"0" + bytes(100) + b"ustar\x0000" + bytes(247)
    return before + b"%06o\0 " % (sum(before) + 8 * ord(" ") + sum(after)) + after


def replace_file(path: Path, data: bytes) -> None:
    """Write a file atomically. Its draft is in the work folder and has this process's id in its name: a worker that survives
    its killed parent for a moment cannot touch another one's draft."""
    work = path.parent if path.parent.name == WORK else path.parent / WORK
    work.mkdir(exist_ok=True)
    write_atomic(path, data, work / f"{path.name}.{os.getpid()}.draft")


def require_writable(dst: Path, otherwise: str, files: int = 8) -> None:
    """Try to write into a folder, or into the one that it will be made in, and leave nothing there.

    files: how many will be written. otherwise: the next step, for the message. Raises UserError if it is not possible.
    """
    folder = next(p for p in (dst, *dst.parents) if os.path.exists(p))
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file, not a folder; {otherwise}")
    try:
        with TemporaryFile(dir=folder, buffering=0) as probe:
            probe.write(bytes(4096))
        sync(folder)
        room = os.statvfs(folder)
    except OSError as error:
        raise UserError(f"{folder}: {_cannot_write(error)}; {otherwise}") from None
    if room.f_files > 0 and room.f_favail < files:  # some disks do not count them, and say 0
        raise UserError(
            f"{folder}: {plural(files, 'file')} will be written, and its disk has room for {room.f_favail:,} more "
            f"(`df -i {quote(str(folder))}`); delete some there, or {otherwise}"
        )


def _cannot_write(error: OSError) -> str:
    return "cannot be written: " + {
        errno.EROFS: "its disk is mounted read-only",
        errno.EACCES: f"no permission for {_user()} (`ls -ld` shows whose it is)",
        errno.EPERM: f"no permission for {_user()} (`lsattr -d` may show why)",
        errno.ENOSPC: "its disk is full (`df -h` and `df -i` show what is free)",
        errno.EDQUOT: "your quota there is used up (`quota -s`)",
    }.get(error.errno or 0, error.strerror or str(error))


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return f"user {os.getuid()}"


@contextmanager
def folder_lock(dst: Path, afterwards: str) -> Iterator[None]:
    """Make the folder and hold its lock, which a kill releases. Raises UserError if another process holds it, and for disk
    errors. afterwards: what holds after such an error, for the message."""
    try:
        dst.mkdir(parents=True, exist_ok=True)
        fd = os.open(dst, os.O_RDONLY)
        try:
            if not try_lock(fd, dst):
                raise UserError(f"{dst}: another make_shards is writing here; wait until it has finished")
            yield
        finally:
            os.close(fd)
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the output's, not a disk's
            raise
        what = f"{error.strerror or error}: {error.filename or dst}"
        raise UserError(f"{dst}: {what}; {afterwards}") from None


def allowed_bad(max_bad: float, photos: int) -> int:
    """How many of `photos` may be bad: the share, rounded up. So one bad photo is allowed among a few, unless it is 0."""
    return math.ceil(round(max_bad * photos, 6))


def write_rejected(dst: Path, rejected: Sequence[dict]) -> None:
    _write_rows(dst / "rejected.jsonl", rejected)


def write_skipped(dst: Path, skipped: Skipped) -> None:
    _write_rows(dst / "skipped.jsonl", skipped.listed)


def _write_rows(path: Path, rows: Sequence[dict]) -> None:
    """Write JSON lines atomically. Without rows there is no file."""
    if rows:
        replace_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    else:
        path.unlink(missing_ok=True)


def write_folder(
    dst: Path,
    records: Iterable[ShardRecord],
    head: dict,
    origin: str,
    skipped: Skipped,
    broken: list[dict],
    upload: Upload | None = None,
) -> None:
    """Write rejected.jsonl, skipped.jsonl, sources.txt, index.npy and, last, manifest.json from the records of all shards;
    upload them in this order if there is an `upload`; then print the summary.

    head: the manifest's source, settings and classes. origin: the folder or tar of the photos, if it is known. broken: rows
    of rejected.jsonl for tars that were left out; they are counted as skipped.
    """
    shards: list[dict] = []
    rejected: list[dict] = []
    sources = bytearray()
    parts = [np.zeros(0, INDEX)]
    kept, converted = Counter[str](), Counter[str]()
    for record in records:
        if record.rows:
            parts.append(np.array([(len(shards), *row) for row in record.rows], INDEX))
            shard = {"name": record.name, "samples": len(record.rows), "bytes": record.bytes, "sha256": record.sha256}
            if record.sources:
                shard["sources"] = len(sources)
                sources += "".join(f"{line}\n" for line in record.sources).encode()
            shards.append(shard)
        rejected += record.rejected
        kept.update(record.kept)
        converted.update(record.converted)
    if broken:
        skipped.counts["broken tars"] += len(broken)
    index = np.concatenate(parts)
    if len(index) == 0:
        raise UserError(f"{dst}: no valid photo in its tars")
    table = io.BytesIO()
    np.save(table, index)
    manifest = {
        "format": FORMAT,
        **head,
        "samples": len(index),
        # a decoder on a GPU allocates by these before the first photo
        "photos": {
            "max_height": int(index["height"].max()),
            "max_width": int(index["width"].max()),
            "max_bytes": int(index["size"].max()),
            "mean_bytes": int(index["size"].mean()),
        },
        "kept": dict(sorted(kept.items())),
        "converted": dict(sorted(converted.items())),
        "rejected": len(rejected),
        "skipped": dict(sorted(skipped.counts.items())),
        "index": {"bytes": table.tell(), "sha256": sha256(table.getbuffer()).hexdigest()},
        "shards": shards,
    }
    write_rejected(dst, broken + rejected)
    write_skipped(dst, skipped)
    if any("sources" in shard for shard in shards):
        # without the first line, so that the same photos in another place give the same manifest
        manifest["sources"] = {"bytes": len(sources), "sha256": sha256(sources).hexdigest()}
        replace_file(dst / SOURCES, f"{ORIGIN}\t{origin}\n".encode() + sources)
    replace_file(dst / "index.npy", table.getvalue())
    replace_file(dst / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
    if upload:
        for name in ("rejected.jsonl", "skipped.jsonl", SOURCES, "index.npy", "manifest.json"):
            if (dst / name).exists():
                upload.put(dst / name, name)
        upload.clear_work()
    shutil.rmtree(dst / WORK)
    _print_summary(upload.address if upload else dst, manifest, skipped, broken)


def _print_summary(dst: Path | str, manifest: dict, skipped: Skipped, broken: list[dict]) -> None:
    shards, kept, converted = manifest["shards"], Counter(manifest["kept"]), Counter(manifest["converted"])
    size = sum(s["bytes"] for s in shards)
    print(
        f"{dst}: {plural(manifest['samples'], 'sample')} in {plural(len(shards), 'shard')} ({megabytes(size)}), "
        f"{plural(len(manifest['classes']), 'class')}"
    )
    rejected = f"{manifest['rejected']}{' (rejected.jsonl)' if manifest['rejected'] else ''}"
    listed = "" if len(skipped.listed) == skipped.counts.total() else f"{len(skipped.listed):,} of "
    where = f"; skipped.jsonl lists {listed}them" if skipped.listed else ""
    print(f"kept unchanged {counts(kept)} · converted {counts(converted)} · rejected {rejected}", end="")
    print(f" · skipped {counts(skipped.counts)}{where}")
    if broken:
        first = "; ".join(f"{row['source']}: {row['reason']}" for row in broken[:3])
        more = f"; and {len(broken) - 3} more" if len(broken) > 3 else ""
        print(f"left out: {plural(len(broken), 'tar')} (rejected.jsonl): {first}{more}")
