"""Atomic writes: at every moment a path holds a whole file, the old one or the new one. And locks.

Some network disks have no locks, or cannot sync a folder. Both only guard against accidents, so this is a warning.
"""

import contextlib
import errno
import fcntl
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import IO

HELD = (errno.EAGAIN, errno.EACCES)  # another process holds the lock
NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF)


@contextlib.contextmanager
def atomic_path(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """A temporary path to write to. It replaces `path` when the block ends, and is removed if the block raises.

    File and folder are synced to disk, so the promise holds for a power failure too. temporary: a path on the same file
    system; by default beside `path`, with the process's number in its name, so that two processes do not share it.
    Raises OSError if a file cannot be written.
    """
    temporary = temporary or path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync(path.parent)  # a rename is on the disk once its folder is


def write_atomic(path: Path, content: str | bytes, temporary: Path | None = None) -> None:
    """Write a whole file, text as UTF-8. See `atomic_path`."""
    with atomic_path(path, temporary) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)


def refusal(folder: Path) -> str:
    """Why no file can be written to a folder, which need not exist yet; "" if one can be. Tried with a file without a name
    in the nearest folder there is, because permissions alone do not say it (/proc): nothing is left behind."""
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        return f"{existing} is no folder"
    if not os.access(existing, os.W_OK | os.X_OK):
        read_only = os.statvfs(existing).f_flag & os.ST_RDONLY
        return f"{existing}: {'Read-only file system' if read_only else 'Permission denied'}"
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)  # the folder is there: its file system makes no files
        return f"{existing}: {'no file can be made there' if missing else error.strerror}"
    return ""


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk. Warns if the disk cannot sync folders."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_SYNC or not path.is_dir():
            raise
        _warn_once(
            f"{path}: this disk cannot sync a folder ({error.strerror}): after a power failure the newest files may be "
            "missing"
        )
    finally:
        os.close(handle)


def try_lock(file: IO | int, folder: Path) -> bool:
    """Lock an open file for this process; False if another process holds its lock. Warns if the disk has no locks: then it
    is True, and nothing is locked. folder: which one the lock guards, for the warning."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            return False
        _warn_once(
            f"{folder}: this disk has no file locks ({error.strerror}): nothing stops a second program that writes here, so "
            "start only one"
        )
    return True


@cache
def _warn_once(message: str) -> None:
    if multiprocessing.parent_process() is None:  # worker processes would repeat it
        print(f"warning: {message}", file=sys.stderr, flush=True)
