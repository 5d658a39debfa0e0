"""One request to a server: bytes of a file at an HTTP or S3 address, from a given byte on.

Connections, proxies and credentials are fsspec's. Errors are sorted into three kinds: FileNotFoundError, PermissionError,
and `Client.retryable_errors()`, after which another request may succeed.
"""

import asyncio
import os
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit, urlunsplit

from runtime.errors import UserError

CHUNK_BYTES = 1 << 20


class RetryableError(Exception):
    """A request that failed and may succeed the next time."""


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
        parts = urlsplit(address)
        path = parts.path.rstrip("/")
        self.scheme, self.timeout = parts.scheme, timeout
        # what requests are made from, with user and password: never shown
        self.base = parts.netloc + path if self.scheme == "s3" else urlunsplit((*parts[:2], path, "", ""))
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
                response = await (self._get_s3 if self.scheme == "s3" else self._get_http)(fs, name, start)
            return response, await read_chunk(response)

        def submit(coroutine: Coroutine) -> Any:
            return asyncio.run_coroutine_threadsafe(coroutine, fs.loop)

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
            fs.loop.call_soon_threadsafe(response.close)

    def retryable_errors(self) -> tuple[type[Exception], ...]:
        """Errors of a request after which another request may succeed."""
        import aiohttp

        errors: tuple[type[Exception], ...] = (RetryableError, OSError, TimeoutError, aiohttp.ClientError)
        if self.scheme == "s3":
            from botocore.exceptions import BotoCoreError, ClientError

            errors += (BotoCoreError, ClientError)
        return errors

    def describe(self, error: Exception) -> str:
        """An error of a request in a few words."""
        if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
            return f"no byte for {self.timeout:g} s"
        response = getattr(error.__cause__ or error, "response", None)
        if isinstance(response, dict):  # botocore's
            status, why = response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""), response.get("Error", {})
            return f"{status} {why.get('Code', '')}: {why.get('Message', '')}".strip(" :")
        return " ".join(str(error).split()) or type(error).__name__

    def filesystem(self) -> Any:
        """fsspec's file system of this process. Raises UserError if a package is missing or a setting is wrong."""
        filesystem = self._filesystems.get(os.getpid())
        if filesystem is None:
            try:
                filesystem = self._s3_filesystem() if self.scheme == "s3" else self._http_filesystem()
            except ImportError as error:
                raise UserError(
                    f"{self.address}: a package for remote shards is missing ({error}): pip install -e '.[remote]'"
                ) from None
            except (TypeError, ValueError) as error:
                where = "AWS_ENDPOINT_URL" if self.scheme == "s3" else "FSSPEC_HTTP"
                raise UserError(f"{self.address}: {error}; see {where}, FSSPEC_* and ~/.config/fsspec") from None
            self._filesystems[os.getpid()] = filesystem
        return filesystem

    def _http_filesystem(self) -> Any:
        import fsspec
        from fsspec.config import conf

        client = conf.get("http", {}).get("client_kwargs", {}) | conf.get("https", {}).get("client_kwargs", {})
        return fsspec.filesystem(
            "http", skip_instance_cache=True, use_listings_cache=False,
            client_kwargs={"trust_env": True} | client,  # proxies and ~/.netrc, as in other programs
        )  # fmt: skip

    def _s3_filesystem(self) -> Any:
        import fsspec

        config = {"connect_timeout": self.timeout, "read_timeout": self.timeout, "retries": {"total_max_attempts": 1}}
        filesystem = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False, config_kwargs=config)
        filesystem.retries = 1  # retries are counted in one place: download.py
        filesystem.connect()
        return filesystem

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
            if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
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


def _parse_content_range(header: str | None, start: int) -> tuple[int, int | None]:
    """(first byte, size of the whole file) of a Content-Range. Raises RangeNotSupported if it does not begin at `start`."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", header or "")
    if not match or int(match[1]) != start:
        raise RangeNotSupported(f"bytes from {start:,} on were requested, the response is '{header}'")
    return start, None if match[2] == "*" else int(match[2])
