"""Sources without offsets: a compressed tar is unpacked once, into the work folder, which is deleted with it.

Photos are shuffled over the shards, so each is read from anywhere, and in a compressed stream nothing can be found without
reading all before it. What was unpacked is found again by the same command after a kill.
"""

import bz2
import gzip
import hashlib
import lzma
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from pipeline.prepare.archives import AGAIN, describe_archive, refuse_bomb
from pipeline.prepare.work import MB
from runtime.errors import UserError
from runtime.files import atomic_path

CHUNK = 1 << 22
DISK_RESERVE = 64 * MB  # that are left free


def work_file(work: Path, src: Path, files: Iterable[Path], *settings: str) -> Path:
    """The path in the work folder for what is unpacked of these files: another one as soon as they change."""
    sha = hashlib.sha256(repr(settings).encode())
    for path in files:
        found = path.stat()
        sha.update(f"{path}\0{found.st_size} {found.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    return work / f"{src.name[:80]}-{sha.hexdigest()[:12]}"


def unpack_tar(src: Path, kind: str, work: Path) -> Path:
    """The tar in a compressed file. kind: gzip, xz, zstd, bzip2. Raises UserError if it is cut or a bomb, or if the disk is
    full."""
    tar = work_file(work, src, [src])
    if tar.exists():
        return tar
    size = src.stat().st_size
    print(f"{src}: {kind}, unpacked once into {work}, which is deleted when the shards are complete", flush=True)
    work.mkdir(parents=True, exist_ok=True)
    with src.open("rb") as file, atomic_path(tar) as draft, draft.open("wb") as out:
        stream, done = _open(src, file, kind), 0
        while chunk := _next(src, stream):
            done += len(chunk)
            refuse_bomb(str(src), done, size)
            require_room(src, work, len(chunk))
            out.write(chunk)
    return tar


def require_room(src: Path, work: Path, size: int) -> None:
    if shutil.disk_usage(work).free < size + DISK_RESERVE:
        raise UserError(f"{work}: the disk is full while {src} is unpacked; give a DST on a larger disk")


def _open(src: Path, file: IO[bytes], kind: str) -> IO[bytes]:
    opener: dict[str, Any] = {"gzip": gzip.open, "xz": lzma.open, "bzip2": bz2.open, "zstd": _open_zstd}
    if kind not in opener:
        raise UserError(f"{src}: {describe_archive(src)}")
    try:
        return opener[kind](file)
    except ImportError:
        raise UserError(
            f"{src}: compressed (zstd), which needs the package zstandard: `.venv/bin/python -m pip install zstandard`; or "
            f"unpack it first: `zstd -d -k {src}`"
        ) from None


def _open_zstd(file: IO[bytes]) -> IO[bytes]:
    try:
        from compression import zstd  # type: ignore[import-not-found]  # of Python 3.14

        return zstd.open(file)
    except ImportError:
        import zstandard

        return zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)


def _next(src: Path, stream: IO[bytes]) -> bytes:
    """The next bytes of a stream. Raises UserError if it is cut or damaged."""
    try:
        return stream.read(CHUNK)
    except (EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{src}: cut or damaged: {error}; {AGAIN}") from None
    except Exception as error:  # gzip's and bzip2's are OSErrors without a number; zstandard has its own
        if getattr(error, "errno", None):
            raise
        raise UserError(f"{src}: damaged: {error}; {AGAIN}") from None
