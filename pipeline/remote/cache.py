"""Shards at s3:// or https:// (or http://), read through a bounded cache on this machine's disk.

    cache/                         speed.cache, shared by all processes of the machine
      <address>-<manifest>/        one data set; another manifest at the same address is another data set
        manifest.json, index.npy   fetched first
        shard-000000.tar           whole: of the manifest's size and sha256
        shard-000001.tar.part      coming; its file system's size counts in full from the first byte on
        shard-000001.tar.lock      held by whom it comes for; holds the reason where it did not come

A shard is fetched once for a machine, whichever process needs it first; the others wait for it. What is broken off goes
on at the byte where it broke. The least recently used shard gives way when the bound is reached: its file is unlinked, so
that a process which has it open reads on. fsspec brings the connection and the credentials, not the cache.
"""

import asyncio
import fcntl
import json
import os
import random
import re
import shutil
import threading
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import file_digest, sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, BinaryIO, NamedTuple
from urllib.parse import quote, urlsplit, urlunsplit

import numpy as np

from runtime.config import Speed
from runtime.errors import UserError, suggest

SCHEMES = ("s3", "https", "http")
TRIES = 8  # in a row that bring next to nothing (less than 1/64 of the file, or CHUNK_BYTES), then the run stops
FIRST_TRIES = 4  # the same for manifest and index, which somebody sits and waits for
MAX_REDOWNLOADS = 3  # whole ones of a wrong sha256, then the run stops
FIRST_WAIT, LONGEST_WAIT = 0.5, 32.0  # seconds before the second try, doubled for each further one; 63 for all TRIES
FETCHERS = 4  # shards that come ahead of need, for each process
MARK = 2.0  # seconds between two marks of the shards in use
CHUNK_BYTES = 1 << 20
METADATA = ("manifest.json", "index.npy")
OURS = f"*-{'[0-9a-f]' * 12}-{'[0-9a-f]' * 12}/*.lock"  # the cache deletes nothing without a lock of its own beside it


def is_address(folder: object) -> bool:
    return "://" in str(folder)


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "densedino"


class RetryableError(Exception):
    """A try that may go better the next time."""


class _NoRanges(RetryableError):
    """The server does not give the part that was asked for."""


class _Body(NamedTuple):
    """An answer: the first byte's place in the file, the file's size if told, and how to go on and to end."""

    begin: int
    size: int | None
    read: Callable[[int], Awaitable[bytes]]
    close: Callable[[], object]


class Server:
    """The files at an address. One file system and event loop for each process: neither survives a fork."""

    def __init__(self, address: str, stall: float):
        parts = urlsplit(address)
        path = parts.path.rstrip("/")
        self.scheme, self.stall = parts.scheme, stall
        self.place = parts.netloc + path if self.scheme == "s3" else urlunsplit((*parts[:2], path, "", ""))
        self.query = f"?{parts.query}" if parts.query else ""  # a token of access, say: kept out of messages and names
        self.address = urlunsplit((self.scheme, parts.netloc.rpartition("@")[2], path, "", ""))
        self._systems: dict[int, Any] = {}

    @contextmanager
    def ask(self, name: str, at: int) -> Iterator[tuple[Iterator[bytes], int, int | None]]:
        """(the pieces of a file as they come, the byte at which they begin, the file's size if told).

        They begin at byte `at` or, where the server gives whole files only, at 0. No answer or no byte for `stall`
        seconds ends the try. Raises FileNotFoundError, PermissionError and, where another try may go better, one of
        `broken()`.
        """
        fs, broken = self.system(), self.broken()

        async def gather(body: _Body) -> tuple[bytes, bool, Exception | None]:
            """(a piece, whether more may come, what it broke off with). Here and not in the thread that writes: once
            a connection breaks, aiohttp does not give what came before."""
            piece, begun = bytearray(), time.monotonic()
            try:
                while len(piece) < CHUNK_BYTES and time.monotonic() - begun < 1:
                    async with asyncio.timeout(self.stall):
                        new = await body.read(CHUNK_BYTES)
                    if not new:
                        return bytes(piece), False, None
                    piece += new
            except broken as error:
                return bytes(piece), False, error
            return bytes(piece), True, None

        async def begin() -> tuple[_Body, tuple[bytes, bool, Exception | None]]:
            async with asyncio.timeout(self.stall):
                body = await (self._ask_s3 if self.scheme == "s3" else self._ask_http)(fs, name, at)
            return body, await gather(body)

        def run(coroutine: Coroutine) -> Any:
            return asyncio.run_coroutine_threadsafe(coroutine, fs.loop)

        def pieces() -> Iterator[bytes]:
            piece, more, end = first
            while more:
                coming = run(gather(body))  # while this one is written
                yield piece
                piece, more, end = coming.result()
            yield piece
            if end is not None:
                raise end

        try:
            body, first = run(begin()).result()
        except ValueError as error:  # no name of a host, say
            if isinstance(error, broken):
                raise
            raise UserError(f"{self.address}/{name}: {error}") from None
        try:
            yield pieces(), body.begin, body.size
        finally:
            fs.loop.call_soon_threadsafe(body.close)

    def broken(self) -> tuple[type[Exception], ...]:
        """What a try can end with that another one may not."""
        import aiohttp

        known: tuple[type[Exception], ...] = (RetryableError, OSError, TimeoutError, aiohttp.ClientError)
        if self.scheme == "s3":
            from botocore.exceptions import BotoCoreError, ClientError

            known += (BotoCoreError, ClientError)
        return known

    def words(self, error: Exception) -> str:
        """What happened, in a few words."""
        if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
            return f"no byte for {self.stall:g} s"
        told = getattr(error.__cause__ or error, "response", None)
        if isinstance(told, dict):  # botocore's
            status, why = told.get("ResponseMetadata", {}).get("HTTPStatusCode", ""), told.get("Error", {})
            return f"{status} {why.get('Code', '')}: {why.get('Message', '')}".strip(" :")
        return " ".join(str(error).split()) or type(error).__name__

    def system(self) -> Any:
        """fsspec's file system of this process. Raises UserError where a package is missing or a setting is wrong."""
        system = self._systems.get(os.getpid())
        if system is None:
            try:
                system = self._systems[os.getpid()] = self._s3() if self.scheme == "s3" else self._http()
            except ImportError as error:
                raise UserError(
                    f"{self.address}: reading from there needs more ({error}): pip install -e '.[remote]'"
                ) from None
            except (TypeError, ValueError) as error:
                where = "AWS_ENDPOINT_URL" if self.scheme == "s3" else "FSSPEC_HTTP"
                raise UserError(f"{self.address}: {error}; see {where}, FSSPEC_* and ~/.config/fsspec") from None
        return system

    def _http(self) -> Any:
        import fsspec
        from fsspec.config import conf

        client = conf.get("http", {}).get("client_kwargs", {}) | conf.get("https", {}).get("client_kwargs", {})
        return fsspec.filesystem(
            "http", skip_instance_cache=True, use_listings_cache=False,
            client_kwargs={"trust_env": True} | client,  # proxies and ~/.netrc, as every other program reads them
        )  # fmt: skip

    def _s3(self) -> Any:
        import fsspec

        config = {"connect_timeout": self.stall, "read_timeout": self.stall, "retries": {"total_max_attempts": 1}}
        system = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False, config_kwargs=config)
        system.retries = 1  # tries are counted in one place, `Remote._receive`
        system.connect()
        return system

    async def _ask_http(self, fs: Any, name: str, at: int) -> _Body:
        import aiohttp

        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={at}-"} if at else {})
        options = fs.kwargs | {"headers": fs.kwargs.get("headers", {}) | headers}
        options["timeout"] = aiohttp.ClientTimeout(total=None)  # `ask` counts the seconds
        session = await fs.set_session()
        answer = await session.get(fs.encode_url(f"{self.place}/{quote(name)}{self.query}"), **options)
        try:
            if answer.status not in (200, 206):
                kinds: dict[int, type[Exception]] = {404: FileNotFoundError, 410: FileNotFoundError, 416: _NoRanges}
                kinds |= dict.fromkeys((401, 403, 407), PermissionError)
                raise kinds.get(answer.status, RetryableError)(f"{answer.status} {answer.reason or ''}".strip())
            begin, size = 0, answer.content_length
            if answer.status == 206:
                begin, size = _range_told(answer.headers.get("Content-Range"), at)
            if answer.headers.get("Content-Encoding", "identity") != "identity":
                size = None  # that of the packed body
        except Exception:
            answer.close()
            raise
        return _Body(begin, size, answer.content.read, answer.close)

    async def _ask_s3(self, fs: Any, name: str, at: int) -> _Body:
        bucket, _, folder = self.place.partition("/")
        part = {"Range": f"bytes={at}-"} if at else {}
        try:
            answer = await fs._call_s3("get_object", Bucket=bucket, Key=f"{folder}/{name}".lstrip("/"), **part)
        except Exception as error:
            if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
                raise PermissionError(str(error)) from None
            raise
        begin, size, body = 0, answer.get("ContentLength"), answer["Body"]
        try:
            if answer.get("ContentRange"):
                begin, size = _range_told(answer["ContentRange"], at)
        except _NoRanges:
            body.close()
            raise
        return _Body(begin, size, body.read, body.close)


def _range_told(header: str | None, at: int) -> tuple[int, int | None]:
    """(first byte, size of the whole) of a Content-Range; raises _NoRanges where it is not what was asked for."""
    told = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", header or "")
    if not told or int(told[1]) != at:
        raise _NoRanges(f"bytes from {at:,} on were asked for, the answer is of '{header}'")
    return at, None if told[2] == "*" else int(told[2])


class Remote:
    """The shards at an address, as files of this machine.

    `folder` is where manifest.json and index.npy lie once this is made; `open` gives a shard. Travels to reading processes
    by pickling, which asks for nothing again. Raises UserError where there are no shards at the address, where it cannot be
    read, and where the cache's bound cannot hold what is read at a time.
    """

    def __init__(self, address: str, speed: Speed | None = None, folder: Path | None = None):
        self.given, self.speed = address, speed or Speed()
        try:
            parts = urlsplit(address)
            good = parts.scheme in SCHEMES and bool(parts.hostname) and parts.port != 0
        except ValueError:  # no number of a port, or no address of IPv6
            good = False
        if not good:
            scheme = address.partition(":")[0]
            close = "" if scheme in SCHEMES else suggest(scheme, SCHEMES)
            raise UserError(f"{address}: shards are a folder, s3://bucket/path or https://host/path{close}")
        self.server = Server(address, self.speed.read_timeout)
        self.address = self.server.address
        self.root = Path(self.speed.cache).expanduser() if self.speed.cache else default_cache()
        self.bound = int(self.speed.cache_gb * 1e9)
        self._wanted: deque[dict] = deque()
        self._fetching = 0
        self._lock = threading.Lock()
        self._expected, self._marked = b"", 0.0
        self.folder = folder or self.root
        if folder is not None and all((folder / name).is_file() for name in METADATA):
            self.folder = folder
            return
        with self._disk():
            self.folder = self._fetch_metadata()
        if folder not in (None, self.folder):
            raise UserError(f"{self.address}: manifest.json is another one now than at the start; start again")

    def __reduce__(self):
        return Remote, (self.given, self.speed, self.folder)

    def open(self, shard: dict) -> BinaryIO:
        """A shard of the manifest, whole, open for reading. It comes first where it is not here yet."""
        path = self.folder / shard["name"]
        while True:  # between its coming and its opening it may give way to another
            with self._disk():
                if path.exists():
                    with suppress(FileNotFoundError):
                        file = open(path, "rb", buffering=0)  # noqa: SIM115
                        if os.fstat(file.fileno()).st_size == shard["bytes"]:
                            self._mark([path])
                            return file
                        file.close()  # somebody cut it
                        path.unlink()
            self.fetch(shard)

    def prefetch(self, shards: list[dict], now: list[int], then: list[int], readers: int) -> None:
        """Let the shards come that are read now and then, in this order, in the background, as far as the cache holds
        them; and mark them as in use.

        now, then: positions in `shards`. readers: so many ranks read other shards than this one. Raises UserError where
        the cache does not hold those that are read now. What fails to come is told by the `open` that needs it.
        """
        expected = repr((now, then)).encode()
        if expected != self._expected:
            ranks = min(readers, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # those of this machine share its cache
            sizes = {i: shards[i]["bytes"] for i in [*now, *then]}
            beside = sum(stat.st_size for name in METADATA if (stat := _stat(self.folder / name)))
            need = beside + ranks * sum(sizes[i] for i in now)
            if need > self.bound:
                raise UserError(
                    f"speed.cache_gb: {self.speed.cache_gb:g} GB do not hold the shards that are read at a time, "
                    f"{len(now) * ranks} of up to {max(sizes.values()) / 1e6:.3g} MB; "
                    f"speed.cache_gb={1.01 * need / 1e9:.3g} does, or smaller shards (make shards SHARD_MB=…)"
                )
            wanted, left = deque[dict](), (self.bound - beside) // ranks
            for i in [*now, *then]:
                left -= sizes[i]
                if left < 0:
                    break
                wanted.append(shards[i])
            with self._lock:
                self._expected, self._wanted, self._marked = expected, wanted, 0.0
                new = min(FETCHERS, len(wanted)) - self._fetching
                self._fetching += max(0, new)
            for _ in range(new):
                threading.Thread(target=self._fetch_wanted, name="shards to come", daemon=True).start()
        if time.monotonic() - self._marked > MARK:
            self._marked = time.monotonic()
            self._mark(self.folder / name for name in (*(shards[i]["name"] for i in [*then, *now]), *METADATA))

    def fetch(self, shard: dict, wait: bool = True) -> None:
        """Let a shard come, unless it is here or (with wait=False) coming already."""
        name = shard["name"]
        if name != Path(name).name or name.startswith("."):
            raise UserError(f"{self.address}/manifest.json: '{name}' is no name of a shard")

        with self._disk():
            self._fetch(name, self.folder, lambda path: _sha256(path) == shard["sha256"], shard["bytes"], wait)

    # ------------------------------------------------------------------------------------------------- one file comes

    def _fetch_metadata(self) -> Path:
        """manifest.json, always anew, and index.npy where it is not here: the folder in which they lie."""
        place = re.sub(r"\W+", "-", self.address.partition("://")[2])[-40:].strip("-")
        place = f"{place}-{sha256(self.server.place.encode()).hexdigest()[:12]}"
        self.root.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=self.root, prefix=f"{place}-") as fresh:
            self._fetch(METADATA[0], Path(fresh), _is_json)
            manifest = (Path(fresh) / METADATA[0]).read_bytes()
            folder = self.root / f"{place}-{sha256(manifest).hexdigest()[:12]}"
            folder.mkdir(exist_ok=True)
            (folder / f"{METADATA[0]}.lock").touch()
            os.replace(Path(fresh) / METADATA[0], folder / METADATA[0])
        told = json.loads(manifest)
        try:
            samples, largest = sum(s["samples"] for s in told["shards"]), max(s["bytes"] for s in told["shards"])
        except (KeyError, TypeError, ValueError):
            samples, largest = None, 0  # no manifest of shards: told by who reads it
        if largest > self.bound:
            raise UserError(
                f"speed.cache_gb: {self.speed.cache_gb:g} GB do not hold one shard of {self.address} "
                f"({largest / 1e9:.3g} GB); give more, or make smaller shards (make shards SHARD_MB=…)"
            )
        index = told.get("index")
        if isinstance(index, dict) and isinstance(index.get("bytes"), int):
            self._fetch(METADATA[1], folder, lambda path: _sha256(path) == index.get("sha256"), index["bytes"])
        else:  # a manifest of before 2026-11-25
            self._fetch(METADATA[1], folder, lambda path: _is_index(path, samples))
        return folder

    def _fetch(
        self, name: str, folder: Path, whole: Callable[[Path], bool], size: int | None = None, wait: bool = True
    ) -> None:
        """Let a file come into a folder of the cache: a temporary file, checked, synced and renamed."""
        path, part = folder / name, folder / f"{name}.part"
        with self._acquire(part, wait) as mine:
            if not mine or path.exists():
                return
            try:
                with self._reserve(part, size or 0) as file:
                    self._receive(name, file, size, lambda: whole(part))
                    os.fsync(file.fileno())
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
            directory = os.open(folder, os.O_RDONLY)
            os.fsync(directory)
            os.close(directory)

    def _receive(self, name: str, file: BinaryIO, size: int | None, whole: Callable[[], bool]) -> None:
        """The file's bytes, in as many tries as it takes, each from where the last one broke."""
        at = most = failed = copies = 0
        ranges, begun = True, time.monotonic()
        tries = FIRST_TRIES if name in METADATA else TRIES
        reasons: Counter[str] = Counter()
        self.server.system()
        broken = self.server.broken()
        while True:
            try:
                with self.server.ask(name, at if ranges else 0) as (pieces, passed, told):
                    if None not in (size, told) and size != told:
                        raise UserError(
                            f"{self.address}/{name}: has {told} bytes, the manifest says {size} bytes; upload it again"
                        )
                    with self._disk():
                        file.seek(at)
                    for piece in pieces:
                        new = piece[max(0, at - passed) :]  # a server without ranges begins at 0 again
                        passed, at = passed + len(piece), at + len(new)
                        if size is not None and at > size:
                            at = 0
                            raise RetryableError(f"more bytes than the manifest's {size}")
                        with self._disk():
                            file.write(new)
                            file.flush()  # those who wait look whether it grows
                if at < (size or told or 0):
                    raise RetryableError("the body ended early")
                with self._disk():
                    if size is None:
                        file.truncate(at)
                    if whole():
                        return
                at, copies, ranges = 0, copies + 1, False
                raise RetryableError("it came, but not as it was written")
            except FileNotFoundError as error:
                raise UserError(self._not_found(name, self.server.words(error))) from None
            except PermissionError as error:
                raise UserError(self._forbidden(name, self.server.words(error))) from None
            except broken as error:
                ranges = ranges and not isinstance(error, _NoRanges)
                reasons[self.server.words(error)] += 1
            if copies == MAX_REDOWNLOADS:
                wrong = (
                    "is not what `make shards` writes" if size is None else "has another sha256 than the manifest says"
                )
                raise UserError(
                    f"{self.address}/{name}: came whole {MAX_REDOWNLOADS} times and {wrong}; `make verify` where the shards were "
                    "made, then upload it again"
                )
            if at > most + min(CHUNK_BYTES, (size or 0) // 64):
                most, failed = at, 0
            failed += 1
            if failed >= tries:
                why = "; ".join(f"{reason} ({n} x)" for reason, n in reasons.items())
                here = "" if size is None else f"{at:,} of {size:,} bytes are here; "
                raise UserError(
                    f"{self.address}/{name}: did not come in {tries} tries and {time.monotonic() - begun:.0f} s: {why}; "
                    f"{here}is the address right, is the server up? The same command goes on once it is"
                )
            # ranks of many machines that lost the same server do not come back all at once
            time.sleep(min(LONGEST_WAIT, FIRST_WAIT * 2 ** (failed - 1)) * random.uniform(0.75, 1.0))

    def _not_found(self, name: str, why: str) -> str:
        if name == METADATA[0]:
            return (
                f"{self.address}: no shards here (no manifest.json: {why}); the address is that of the folder that "
                "`make shards` wrote, uploaded whole"
            )
        return f"{self.address}/{name}: is missing ({why}); upload it from where the shards were made"

    def _forbidden(self, name: str, why: str) -> str:
        keys = "~/.netrc, or headers in FSSPEC_HTTP, if the server wants a name"
        if self.server.scheme == "s3":
            keys = (
                "AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; AWS_ENDPOINT_URL where it is not Amazon's; "
                "FSSPEC_S3_ANON=true for a public bucket"
            )
        return f"{self.address}/{name}: denied ({why}); which credentials? {keys}"

    # ---------------------------------------------------------------------------------------------- the cache's order

    @contextmanager
    def _acquire(self, part: Path, wait: bool) -> Iterator[bool]:
        """The right to fetch a file, which one thread of one process has at a time; False where it is not had and not
        waited for. Who waited for another one's failure gets that one's UserError: it need not fail again by itself."""
        with open(part.with_suffix(".lock"), "a+") as lock:
            waited, seen, since = False, -1, time.monotonic()
            while not _locked(lock):
                if not wait:
                    yield False
                    return
                waited, now = True, _changed(part)
                if now != seen:
                    seen, since = now, time.monotonic()
                elif time.monotonic() - since > self._patience():
                    raise UserError(
                        f"{self.address}/{part.stem}: another process is to fetch it and has stood still for "
                        f"{self._patience():.0f} s ({lock.name} is its lock); end that process"
                    )
                time.sleep(0.02)
            lock.seek(0)
            told = lock.read()
            if waited and told:
                raise UserError(told)
            lock.truncate(0)
            try:
                yield True
            except UserError as mistake:
                lock.write(str(mistake))
                lock.flush()
                raise

    def _patience(self) -> float:
        """Seconds after which a live process has brought a byte or given up."""
        waits = (min(LONGEST_WAIT, FIRST_WAIT * 2**n) for n in range(TRIES - 1))
        return 60 + TRIES * self.speed.read_timeout + sum(waits)

    def _reserve(self, part: Path, size: int) -> BinaryIO:
        """A file of `size` bytes to write into, after the least recently used ones gave way to it.

        The bound is passed only by what comes at that moment: what is being written gives way to nobody.
        """
        with open(self.root / "lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            files = (lock.with_suffix(end) for lock in self.root.glob(OURS) for end in ("", ".part"))
            held = {path: stat for path in files if (stat := _stat(path))}
            total = sum(stat.st_size for stat in held.values())
            on_disk = sum(512 * stat.st_blocks for stat in held.values())
            bound = min(self.bound, on_disk + int(0.95 * shutil.disk_usage(self.root).free))
            own = {self.folder / name for name in METADATA}
            for path in sorted(held.keys() - own, key=lambda path: held[path].st_mtime_ns):
                if total + size <= bound:
                    break
                if path.suffix != ".part" or _left_over(path):
                    path.unlink(missing_ok=True)
                    total -= held[path].st_size
            file = open(part, "wb")  # noqa: SIM115
            file.truncate(size)
        return file

    def _mark(self, paths: Iterable[Path]) -> None:
        """These are in use: others give way before them."""
        for path in paths:
            try:
                os.utime(path)
            except OSError:  # not here, or not anymore
                continue

    def _fetch_wanted(self) -> None:
        while True:
            with self._lock:
                if not self._wanted:
                    self._fetching -= 1
                    return
                shard = self._wanted.popleft()
            if not (self.folder / shard["name"]).exists():
                try:
                    self.fetch(shard, wait=False)
                except UserError:  # told by the `open` that needs it
                    continue

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """The disk's own errors, told as such: a network's are OSErrors too."""
        try:
            yield
        except OSError as error:
            try:
                free = f"{shutil.disk_usage(self.root).free / 1e9:.1f} GB free; "
            except OSError:
                free = ""
            raise UserError(
                f"{self.root}: {error.strerror or error} ({free}the cache of {self.address}, up to speed.cache_gb: "
                f"{self.speed.cache_gb:g}); speed.cache=another/folder takes another place"
            ) from None


def _locked(lock: IO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


def _left_over(part: Path) -> bool:
    """Whether nobody writes this any more: its process was killed."""
    with open(part.with_suffix(".lock"), "a") as lock:
        return _locked(lock)


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _changed(path: Path) -> int:
    stat = _stat(path)
    return stat.st_mtime_ns if stat else 0


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
