"""Atomic writes: at every moment a path holds a whole file, the old one or the new one."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


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
    """Why no file can be written to a folder, which need not exist yet; "" if one can be. Writes nothing itself."""
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        return f"{existing} is no folder"
    if os.access(existing, os.W_OK | os.X_OK):
        return ""
    read_only = os.statvfs(existing).f_flag & os.ST_RDONLY
    return f"{existing}: {'Read-only file system' if read_only else 'Permission denied'}"


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
