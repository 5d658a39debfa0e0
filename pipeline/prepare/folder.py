"""A shard folder while it is written: a tar, its record, and at the end index.npy and manifest.json.

A file with its final name is complete: drafts are in DST/.make_shards, are synced to the disk and then renamed.
"""

import fcntl
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipeline.prepare.labels import Written
from pipeline.prepare.skipped import counts
from pipeline.prepare.work import MB
from pipeline.shards import FORMAT, INDEX, plural
from runtime.errors import UserError
from runtime.files import write_atomic

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
    skipped: Counter[str] = field(default_factory=Counter)
    left_out: list[dict] = field(default_factory=list)  # rows of skipped.jsonl
    labels: list[Written] = field(default_factory=list)  # of each row, as a tar of another program has them
    unread: int = 0  # of the rejected, those that could not be read: the next run tries them again


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


@contextmanager
def folder_lock(dst: Path) -> Iterator[None]:
    """Make the folder and hold its lock, which a kill releases. Raises UserError if another process holds it, and for disk
    errors."""
    try:
        dst.mkdir(parents=True, exist_ok=True)
        fd = os.open(dst, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise UserError(f"{dst}: another make_shards is writing here; wait until it has finished") from None
        finally:
            os.close(fd)
    except OSError as error:
        what = f"{error.strerror or error}: {error.filename or dst}"
        raise UserError(f"{dst}: {what}; finished shards are kept, the same command resumes") from None


def write_rejected(dst: Path, rejected: list[dict]) -> None:
    _write_rows(dst / "rejected.jsonl", rejected)


def write_skipped(dst: Path, skipped: list[dict]) -> None:
    _write_rows(dst / "skipped.jsonl", skipped)


def _write_rows(path: Path, rows: list[dict]) -> None:
    """Write JSON lines atomically. Without rows there is no file."""
    if rows:
        replace_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    else:
        path.unlink(missing_ok=True)


def write_folder(
    dst: Path, records: Iterable[ShardRecord], head: dict, skipped: Counter[str], listed: Sequence[dict] = ()
) -> None:
    """Write index.npy, rejected.jsonl, skipped.jsonl and, last, manifest.json from the records of all shards; then print the
    summary. skipped, listed: what the source holds beside them, counted by kind, and the rows of skipped.jsonl."""
    shards: list[dict] = []
    rejected: list[dict] = []
    left_out = list(listed)
    parts = [np.zeros(0, INDEX)]
    kept, converted = Counter[str](), Counter[str]()
    for record in records:
        if record.rows:
            parts.append(np.array([(len(shards), *row) for row in record.rows], INDEX))
            shards.append(
                {"name": record.name, "samples": len(record.rows), "bytes": record.bytes, "sha256": record.sha256}
            )
        rejected += record.rejected
        kept.update(record.kept)
        converted.update(record.converted)
        skipped.update(record.skipped)
        left_out += record.left_out
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
        "skipped": dict(sorted(skipped.items())),
        "index": {"bytes": table.tell(), "sha256": sha256(table.getbuffer()).hexdigest()},
        "shards": shards,
    }
    write_rejected(dst, rejected)
    write_skipped(dst, left_out)
    replace_file(dst / "index.npy", table.getvalue())
    replace_file(dst / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
    shutil.rmtree(dst / WORK)
    size = sum(s["bytes"] for s in shards)
    classes = len(head["classes"])
    print(
        f"{dst}: {plural(len(index), 'sample')} in {plural(len(shards), 'shard')} ({size / MB:,.0f} MB), "
        f"{classes:,} {'class' if classes == 1 else 'classes'}"
    )
    print(f"kept unchanged {counts(kept)} · converted {counts(converted)} · rejected {len(rejected)}", end="")
    print(f"{' (rejected.jsonl)' if rejected else ''} · skipped {counts(skipped)}", end="")
    print("; skipped.jsonl lists them" if left_out else "")
