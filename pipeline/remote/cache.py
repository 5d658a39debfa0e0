"""Remote: the shards at an address as files of this machine, in a bounded cache that all its processes share.

    cache/                         speed.cache
      <address>-<manifest>/        one data set; another manifest at the same address is another data set
        manifest.json, index.npy   downloaded first
        shard-000000.tar           complete: of the manifest's size and sha256
        shard-000001.tar.part      being downloaded; its full size counts from the first byte on
        shard-000001.tar.lock      locked by the process that downloads it; if the download failed, holds the reason

A shard is downloaded once for a machine, by the process that needs it first; the others wait for it. When the bound is
reached, the least recently used shard is evicted: its file is unlinked, so a process that has it open can still read it.
"""

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import file_digest, sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, BinaryIO

import numpy as np

from pipeline.remote.client import Client
from pipeline.remote.download import MAX_TRIES, METADATA, Download, backoff
from runtime.config import Speed
from runtime.errors import UserError
from runtime.files import sync

POLL_SECONDS = 0.02  # between two looks at a lock that another process holds
GRACE_SECONDS = 60  # on top of what a live process can need until it brings a byte or gives up
MAX_FREE_SHARE = 0.95  # of the disk's free space that the cache may take
LOCK_GLOB = f"*-{'[0-9a-f]' * 12}-{'[0-9a-f]' * 12}/*.lock"  # the cache deletes only files that have such a lock


def is_address(folder: object) -> bool:
    return "://" in str(folder)


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "densedino"


class Remote:
    """The shards at an address, as files of this machine.

    `folder` holds manifest.json and index.npy once this is constructed; `open` returns a shard. Worker processes get it by
    pickling, which downloads nothing again. Raises UserError if the address is invalid, has no shards or cannot be read, or
    if the cache's bound cannot hold one shard.
    """

    def __init__(self, address: str, speed: Speed | None = None, folder: Path | None = None):
        self.given, self.speed = address, speed or Speed()
        self.client = Client(address, self.speed.read_timeout)
        self.address = self.client.address
        self.root = Path(self.speed.cache).expanduser() if self.speed.cache else default_cache()
        self.bound = int(self.speed.cache_gb * 1e9)
        self.folder = folder or self.root
        if folder is not None and all((folder / name).is_file() for name in METADATA):
            self.folder = folder
            return
        with self._disk_errors():
            self.folder = self._download_metadata()
        if folder not in (None, self.folder):
            raise UserError(f"{self.address}: manifest.json has changed since the start of this run; start again")

    def __reduce__(self):
        return Remote, (self.given, self.speed, self.folder)

    def open(self, shard: dict) -> BinaryIO:
        """A complete shard of the manifest, open for reading; it is downloaded first if the cache does not hold it."""
        path = self.folder / shard["name"]
        while True:  # between its download and its opening it may be evicted
            with self._disk_errors():
                if path.exists():
                    with suppress(FileNotFoundError):
                        file = open(path, "rb", buffering=0)  # noqa: SIM115
                        if os.fstat(file.fileno()).st_size == shard["bytes"]:
                            self.mark_used([path])
                            return file
                        file.close()  # something truncated it
                        path.unlink()
            self.download(shard)

    def download(self, shard: dict, wait: bool = True) -> None:
        """Download a shard unless the cache holds it or (with wait=False) another process downloads it already."""
        name = shard["name"]
        if name != Path(name).name or name.startswith("."):
            raise UserError(f"{self.address}/manifest.json: '{name}' is not the name of a shard")

        with self._disk_errors():
            self._download(name, self.folder, lambda path: _sha256(path) == shard["sha256"], shard["bytes"], wait)

    def mark_used(self, paths: Iterable[Path]) -> None:
        """Mark files as in use: others are evicted before them."""
        for path in paths:
            try:
                os.utime(path)
            except OSError:  # not in the cache, or not any more
                continue

    # ------------------------------------------------------------------------------------------------------ downloads

    def _download_metadata(self) -> Path:
        """The folder of manifest.json, which is always downloaded, and index.npy, which is downloaded if it is not there."""
        name = re.sub(r"\W+", "-", self.address.partition("://")[2])[-40:].strip("-")
        name = f"{name}-{sha256(self.client.base.encode()).hexdigest()[:12]}"
        self.root.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=self.root, prefix=f"{name}-") as fresh:
            self._download(METADATA[0], Path(fresh), _is_json)
            content = (Path(fresh) / METADATA[0]).read_bytes()
            folder = self.root / f"{name}-{sha256(content).hexdigest()[:12]}"
            folder.mkdir(exist_ok=True)
            (folder / f"{METADATA[0]}.lock").touch()
            os.replace(Path(fresh) / METADATA[0], folder / METADATA[0])
        manifest = json.loads(content)
        try:
            samples, largest = (
                sum(s["samples"] for s in manifest["shards"]),
                max(s["bytes"] for s in manifest["shards"]),
            )
        except (KeyError, TypeError, ValueError):
            samples, largest = None, 0  # not a manifest of shards: Shards reports it
        if largest > self.bound:
            raise UserError(
                f"speed.cache_gb: {self.speed.cache_gb:g} GB cannot hold one shard of {self.address} "
                f"({largest / 1e9:.3g} GB); set a larger speed.cache_gb, or make smaller shards (make shards SHARD_MB=…)"
            )
        index = manifest.get("index")
        if isinstance(index, dict) and isinstance(index.get("bytes"), int):
            self._download(METADATA[1], folder, lambda path: _sha256(path) == index.get("sha256"), index["bytes"])
        else:  # manifests from before 2026-11-25 have no checksum of the index
            self._download(METADATA[1], folder, lambda path: _is_index(path, samples))
        return folder

    def _download(
        self, name: str, folder: Path, is_complete: Callable[[Path], bool], size: int | None = None, wait: bool = True
    ) -> None:
        """Download a file into a folder of the cache: a temporary file, checked, synced and renamed."""
        path, part = folder / name, folder / f"{name}.part"
        with self._acquire(part, wait) as acquired:
            if not acquired or path.exists():
                return
            try:
                with self._reserve(part, size or 0) as file:
                    Download(self.client, name, size, lambda: is_complete(part), self._disk_errors).run(file)
                    os.fsync(file.fileno())
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
            sync(folder)

    # ------------------------------------------------------------------------------------------------ locks and bound

    @contextmanager
    def _acquire(self, part: Path, wait: bool) -> Iterator[bool]:
        """The right to download a file, which one thread of one process has at a time; False if another one has it and
        `wait` is False. If the other one fails meanwhile, a waiting one raises the same UserError instead of trying
        again."""
        with open(part.with_suffix(".lock"), "a+") as lock:
            waited, last_change, since = False, -1, time.monotonic()
            while not _try_lock(lock):
                if not wait:
                    yield False
                    return
                waited, change = True, _mtime(part)
                if change != last_change:
                    last_change, since = change, time.monotonic()
                elif time.monotonic() - since > self._lock_timeout():
                    raise UserError(
                        f"{self.address}/{part.stem}: another process downloads it and has made no progress for "
                        f"{self._lock_timeout():.0f} s (its lock is {lock.name}); end that process"
                    )
                time.sleep(POLL_SECONDS)
            lock.seek(0)
            failure = lock.read()
            if waited and failure:
                raise UserError(failure)
            lock.truncate(0)
            try:
                yield True
            except UserError as error:
                lock.write(str(error))
                lock.flush()
                raise

    def _lock_timeout(self) -> float:
        """Seconds after which a live process has brought a byte or given up."""
        waits = sum(backoff(failures) for failures in range(1, MAX_TRIES))
        return GRACE_SECONDS + MAX_TRIES * self.speed.read_timeout + waits

    def _reserve(self, part: Path, size: int) -> BinaryIO:
        """A file of `size` bytes to write into, after the least recently used files were evicted for it.

        Files that are being written are not evicted, so only they can exceed the bound.
        """
        with open(self.root / "lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            files = (lock.with_suffix(end) for lock in self.root.glob(LOCK_GLOB) for end in ("", ".part"))
            cached = {path: status for path in files if (status := stat_or_none(path))}
            total = sum(status.st_size for status in cached.values())
            on_disk = sum(512 * status.st_blocks for status in cached.values())
            bound = min(self.bound, on_disk + int(MAX_FREE_SHARE * shutil.disk_usage(self.root).free))
            own = {self.folder / name for name in METADATA}
            for path in sorted(cached.keys() - own, key=lambda path: cached[path].st_mtime_ns):
                if total + size <= bound:
                    break
                if path.suffix != ".part" or _is_abandoned(path):
                    path.unlink(missing_ok=True)
                    total -= cached[path].st_size
            file = open(part, "wb")  # noqa: SIM115
            file.truncate(size)
        return file

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Turns errors of this machine's disk into UserErrors; a network's errors are OSErrors too."""
        try:
            yield
        except OSError as error:
            try:
                free = f"{shutil.disk_usage(self.root).free / 1e9:.1f} GB free; "
            except OSError:
                free = ""
            raise UserError(
                f"{self.root}: {error.strerror or error} ({free}the cache of {self.address}, up to speed.cache_gb: "
                f"{self.speed.cache_gb:g}); set another folder with speed.cache=another/folder"
            ) from None


def _try_lock(lock: IO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def _is_abandoned(part: Path) -> bool:
    """Whether no process writes this file any more, because its process was killed."""
    with open(part.with_suffix(".lock"), "a") as lock:
        return _try_lock(lock)


def stat_or_none(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _mtime(path: Path) -> int:
    status = stat_or_none(path)
    return status.st_mtime_ns if status else 0


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
        return True
    except ValueError:
        return False


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _is_index(path: Path, samples: int | None) -> bool:
    try:
        return samples is None or len(np.load(path, mmap_mode="r", allow_pickle=False)) == samples
    except (OSError, ValueError):
        return False
