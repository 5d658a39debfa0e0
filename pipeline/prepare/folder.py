"""A shard folder being written: a tar, the record of it, and at the end index.npy and manifest.json.

Whatever has its final name is whole: drafts stand in DST/.make_shards, are synced to the disk and then renamed.
"""

import fcntl
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipeline.prepare.work import MB
from pipeline.shards import FORMAT, INDEX
from runtime.errors import UserError

WORK = ".make_shards"  # in DST while it is being written


@dataclass
class Record:
    """What is known of one shard when it is made or read; as JSON in the work folder it says that the shard is finished."""

    name: str
    bytes: int
    sha256: str
    rows: list[tuple[int, ...]]  # the index's columns but the first: offset, size, height, width, label, crc32
    kept: Counter[str]  # photos that are the source's bytes, by kind
    converted: Counter[str] = field(default_factory=Counter)
    rejected: list[dict] = field(default_factory=list)  # {"source": name, "reason": why}
    skipped: Counter[str] = field(default_factory=Counter)
    unread: int = 0  # of the rejected, those whose bytes the source did not give: the next run tries them again


class ShardFile:
    """A tar being written: USTAR, every date, user and mode the same. `at` bytes so far."""

    def __init__(self, file: BinaryIO):
        self.file, self.at, self.sha = file, 0, sha256()

    def add(self, name: str, data: bytes) -> int:
        """Append a member; the offset of its first byte."""
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
    """A plain file's USTAR header, mode 0644, date, user and group 0: tarfile's, byte for byte, in a quarter of its time."""
    before = name.encode().ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + b"%011o\0%011o\0" % (size, 0)
    after = b"0" + bytes(100) + b"ustar\x0000" + bytes(247)
    return before + b"%06o\0 " % (sum(before) + 8 * ord(" ") + sum(after)) + after


def replace_file(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all. Its draft stands in the work folder, named after this process: one
    that outlives its killed parent for a moment cannot touch another's."""
    work = path.parent if path.parent.name == WORK else path.parent / WORK
    work.mkdir(exist_ok=True)
    draft = work / f"{path.name}.{os.getpid()}.draft"
    with draft.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def folder_lock(dst: Path) -> Iterator[None]:
    """Make the folder and hold its lock (a kill lets go of it); errors of the disk become one line."""
    try:
        dst.mkdir(parents=True, exist_ok=True)
        fd = os.open(dst, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise UserError(f"{dst}: another make_shards is at work here; let it end") from None
        finally:
            os.close(fd)
    except OSError as error:
        what = f"{error.strerror or error}: {error.filename or dst}"
        raise UserError(f"{dst}: {what}; what is done is kept, the same command goes on") from None


def write_rejected(dst: Path, rejected: list[dict]) -> None:
    if rejected:
        replace_file(dst / "rejected.jsonl", "".join(json.dumps(r) + "\n" for r in rejected).encode())
    else:
        (dst / "rejected.jsonl").unlink(missing_ok=True)


def write_folder(dst: Path, records: Iterable[Record], head: dict, skipped: Counter[str]) -> None:
    """index.npy, rejected.jsonl and, last, manifest.json from the records of all shards; then the summary."""
    shards: list[dict] = []
    rejected: list[dict] = []
    parts = [np.zeros(0, INDEX)]
    kept, converted = Counter[str](), Counter[str]()
    for record in records:
        if record.rows:
            parts.append(np.array([(len(shards), *row) for row in record.rows], INDEX))
            told = {"name": record.name, "samples": len(record.rows), "bytes": record.bytes, "sha256": record.sha256}
            shards.append(told)
        rejected += record.rejected
        kept.update(record.kept)
        converted.update(record.converted)
        skipped.update(record.skipped)
    index = np.concatenate(parts)
    if len(index) == 0:
        raise UserError(f"{dst}: not one sound photo in its tars")
    table = io.BytesIO()
    np.save(table, index)
    manifest = {
        "format": FORMAT,
        **head,
        "samples": len(index),
        # what a decoder on a GPU wants to know before it sees the first photo
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
    replace_file(dst / "index.npy", table.getvalue())
    replace_file(dst / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
    shutil.rmtree(dst / WORK)
    size = sum(s["bytes"] for s in shards)
    print(
        f"{dst}: {len(index):,} samples in {len(shards)} shards ({size / MB:,.0f} MB), {len(head['classes'])} classes"
    )
    print(f"kept as they are {counts(kept)} · converted {counts(converted)} · rejected {len(rejected)}", end="")
    print(f"{' (rejected.jsonl)' if rejected else ''} · passed over {counts(skipped)}")


def counts(kinds: Counter[str]) -> str:
    each_kind = ", ".join(f"{kind} {n:,}" for kind, n in kinds.most_common())
    return f"{kinds.total():,}" + (f" ({each_kind})" if each_kind else "")
