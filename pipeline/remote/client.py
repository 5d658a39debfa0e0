"""One request to a server: bytes of a file at an address, from a given byte on.

HTTP and S3 are read as the bytes arrive. Of the other stores (Google, Azure, Hugging Face) fsspec reads ranges, so a body is
one range after another. Errors are sorted as in filesystem.py: FileNotFoundError, PermissionError, and
`Client.retryable_errors()`, after which another request may succeed.
"""

import asyncio
import os
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import quote, urlunsplit

from pipeline.remote.filesystem import NO_ACCESS, RetryableError, check_address, describe, open_filesystem, sorted_error
from runtime.errors import UserError

CHUNK_BYTES = 1 << 20
RANGE_BYTES = 4 << 20  # of one request to a store that sends ranges


class RangeNotSupported(RetryableError):
    """The server does not send the byte range that was requested."""


class _Response(NamedTuple):
    """start: the byte of the file at which the body begins; size: the whole file's, if the server says it."""

    start: int
    size: int | None
    read: Callable[[int], Awaitable[bytes]]
    close: Callable[[], object]


class _Chunk(NamedTuple):
    """Bytes of a body. more: whether others may follow; error: what the body broke off with."""

    data: bytes
    more: bool
    error: Exception | None


class Client:
    """The files at an address. One file system and event loop for each process, because neither survives a fork.

    timeout: seconds without a byte after which a request has failed.
    """

    def __init__(self, address: str, timeout: float):
        parts = check_address(address)
        path = parts.path.rstrip("/")
        self.scheme, self.timeout = parts.scheme, timeout
        # what requests are made from, with user and password: never shown
        is_http = self.scheme in ("http", "https")
        self.base = urlunsplit((*parts[:2], path, "", "")) if is_http else parts.netloc + path
        self.query = f"?{parts.query}" if parts.query else ""  # may hold an access token: never shown
        self.address = urlunsplit((self.scheme, parts.netloc.rpartition("@")[2], path, "", ""))  # for messages
        self._filesystems: dict[int, Any] = {}  # by process id

    @contextmanager
    def open_range(self, name: str, start: int) -> Iterator[tuple[Iterator[bytes], int, int | None]]:
        """(chunks of a file as they arrive, the byte at which they begin, the file's size if the server says it).

        They begin at byte `start` or, if the server sends whole files only, at 0. Raises FileNotFoundError,
        PermissionError, UserError for an address that cannot be requested, and one of `retryable_errors()`.
        """
        fs, retryable = self.filesystem(), self.retryable_errors()
        get = {"s3": self._get_s3, "http": self._get_http, "https": self._get_http}.get(self.scheme, self._get_ranges)

        async def read_chunk(response: _Response) -> _Chunk:
            # in the event loop and not in the thread that writes: once a connection breaks, aiohttp does not give the
            # bytes that arrived before
            data, begin = bytearray(), time.monotonic()
            try:
                while len(data) < CHUNK_BYTES and time.monotonic() - begin < 1:
                    async with asyncio.timeout(self.timeout):
                        new = await response.read(CHUNK_BYTES)
                    if not new:
                        return _Chunk(bytes(data), False, None)
                    data += new
            except retryable as error:
                return _Chunk(bytes(data), False, error)
            return _Chunk(bytes(data), True, None)

        async def request() -> tuple[_Response, _Chunk]:
            async with asyncio.timeout(self.timeout):
                response = await get(fs, name, start)
            return response, await read_chunk(response)

        def submit(coroutine: Coroutine) -> Any:
            return asyncio.run_coroutine_threadsafe(coroutine, self._loop(fs))

        def chunks() -> Iterator[bytes]:
            chunk = first
            while chunk.more:
                upcoming = submit(read_chunk(response))  # while the caller writes this one
                yield chunk.data
                chunk = upcoming.result()
            yield chunk.data
            if chunk.error is not None:
                raise chunk.error

        try:
            response, first = submit(request()).result()
        except ValueError as error:  # an invalid host name, for example
            if isinstance(error, retryable):
                raise
            raise UserError(f"{self.address}/{name}: {error}") from None
        try:
            yield chunks(), response.start, response.size
        finally:
            self._loop(fs).call_soon_threadsafe(response.close)

    def retryable_errors(self) -> tuple[type[Exception], ...]:
        """Errors of a request after which another request may succeed."""
        errors: tuple[type[Exception], ...] = (RetryableError, OSError, TimeoutError)
        if self.scheme in ("s3", "http", "https"):
            import aiohttp

            errors += (aiohttp.ClientError,)
        if self.scheme == "s3":
            from botocore.exceptions import BotoCoreError, ClientError

            errors += (BotoCoreError, ClientError)
        return errors

    def describe(self, error: Exception) -> str:
        """An error of a request in a few words."""
        if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
            return f"no byte for {self.timeout:g} s"
        return describe(error)

    def filesystem(self) -> Any:
        """fsspec's file system of this process. Raises UserError if a package is missing or a setting is wrong."""
        filesystem = self._filesystems.get(os.getpid())
        if filesystem is None:  # retries are counted in one place: download.py
            filesystem = open_filesystem(self.scheme, self.address, self.timeout, retries=False)
            self._filesystems[os.getpid()] = filesystem
        return filesystem

    def _loop(self, fs: Any) -> asyncio.AbstractEventLoop:
        """The event loop of a file system; fsspec's own for one that knows none."""
        if fs.async_impl:
            return fs.loop
        from fsspec.asyn import get_loop

        return get_loop()

    async def _get_http(self, fs: Any, name: str, start: int) -> _Response:
        import aiohttp

        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        options = fs.kwargs | {"headers": fs.kwargs.get("headers", {}) | headers}
        options["timeout"] = aiohttp.ClientTimeout(total=None)  # `open_range` applies the timeout
        session = await fs.set_session()
        response = await session.get(fs.encode_url(f"{self.base}/{quote(name)}{self.query}"), **options)
        try:
            if response.status not in (200, 206):
                kinds: dict[int, type[Exception]] = {
                    404: FileNotFoundError, 410: FileNotFoundError, 416: RangeNotSupported,
                }  # fmt: skip
                kinds |= dict.fromkeys((401, 403, 407), PermissionError)
                raise kinds.get(response.status, RetryableError)(f"{response.status} {response.reason or ''}".strip())
            begin, size = 0, response.content_length
            if response.status == 206:
                begin, size = _parse_content_range(response.headers.get("Content-Range"), start)
            if response.headers.get("Content-Encoding", "identity") != "identity":
                size = None  # of the compressed body
        except Exception:
            response.close()
            raise
        return _Response(begin, size, response.content.read, response.close)

    async def _get_s3(self, fs: Any, name: str, start: int) -> _Response:
        bucket, _, folder = self.base.partition("/")
        part = {"Range": f"bytes={start}-"} if start else {}
        try:
            answer = await fs._call_s3("get_object", Bucket=bucket, Key=f"{folder}/{name}".lstrip("/"), **part)
        except Exception as error:
            if type(error).__name__ in NO_ACCESS:
                raise PermissionError(str(error)) from None
            raise
        begin, size, body = 0, answer.get("ContentLength"), answer["Body"]
        try:
            if answer.get("ContentRange"):
                begin, size = _parse_content_range(answer["ContentRange"], start)
        except RangeNotSupported:
            body.close()
            raise
        return _Response(begin, size, body.read, body.close)

    async def _get_ranges(self, fs: Any, name: str, start: int) -> _Response:
        path = f"{self.base}/{name}"
        size, at = int((await _call(fs, "info", path))["size"]), start

        async def read(_: int) -> bytes:
            nonlocal at
            end = min(at + RANGE_BYTES, size)
            data = await _call(fs, "cat_file", path, start=at, end=end) if at < end else b""
            if len(data) > end - at:
                raise RangeNotSupported(f"{end - at:,} bytes were requested, the response has {len(data):,}")
            at += len(data)
            return data

        return _Response(start, size, read, lambda: None)


async def _call(fs: Any, function: str, *words: Any, **options: Any) -> Any:
    """What a function of fsspec returns, in its event loop; one that knows no event loop runs in a thread."""
    try:
        if fs.async_impl:
            return await getattr(fs, f"_{function}")(*words, **options)
        return await asyncio.to_thread(getattr(fs, function), *words, **options)
    except Exception as error:
        raise sorted_error(error) from error


def _parse_content_range(header: str | None, start: int) -> tuple[int, int | None]:
    """(first byte, size of the whole file) of a Content-Range. Raises RangeNotSupported if it does not begin at `start`."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", header or "")
    if not match or int(match[1]) != start:
        raise RangeNotSupported(f"bytes from {start:,} on were requested, the response is '{header}'")
    return start, None if match[2] == "*" else int(match[2])
