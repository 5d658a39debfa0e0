"""A real HTTP server over a folder that misbehaves on request."""

import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat
from pathlib import Path
from urllib.parse import unquote, urlsplit

# (handler, the whole file, first requested byte, whether a range was requested)
Behavior = Callable[["_Handler", bytes, int, bool], None]


class FaultyServer:
    """Serves `folder` at `address`. `behave(name, *behaviors)`: the next requests for a file fail in these ways, one each,
    and later ones succeed; `always(name, behavior)`: all of them fail. `requests`: (file, first byte) of every request;
    `sent`:
    bytes of bodies, by file."""

    def __init__(self, folder: Path):
        self.folder, self.requests, self.sent = folder, list[tuple[str, int]](), Counter[str]()
        self._behavior: dict[str, Iterator[Behavior]] = defaultdict(lambda: iter(()))
        self.closing = threading.Event()
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"site": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def behave(self, name: str, *behaviors: Behavior) -> None:
        self._behavior[name] = iter(behaviors)

    def always(self, name: str, behavior: Behavior) -> None:
        self._behavior[name] = repeat(behavior)

    def next_behavior(self, name: str) -> Behavior:
        with self.lock:
            return next(self._behavior[name], good)

    def starts(self, name: str) -> list[int]:
        """First requested bytes of a file, request by request."""
        return [start for file, start in self.requests if file == name]

    def __enter__(self) -> "FaultyServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    site: FaultyServer
    protocol_version = "HTTP/1.1"
    name = ""

    def do_GET(self) -> None:
        url_path = unquote(urlsplit(self.path).path)
        self.name, path = url_path.rpartition("/")[2], self.site.folder / url_path.lstrip("/")
        part = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        at = int(part[1]) if part else 0
        with self.site.lock:
            self.site.requests.append((self.name, at))
        if not path.is_file():
            return status(404)(self, b"", 0, False)
        return self.site.next_behavior(self.name)(self, path.read_bytes(), at, bool(part))

    def head(self, code: int, **headers: object) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()

    def body(self, pieces: Iterable[bytes]) -> None:
        try:
            for piece in pieces:
                self.wfile.write(piece)
                with self.site.lock:
                    self.site.sent[self.name] += len(piece)
        except OSError:  # the client has closed the connection
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


def _begin(handler: _Handler, whole: bytes, at: int, part: bool) -> None:
    if part:
        content_range = f"bytes {at}-{len(whole) - 1}/{len(whole)}"
        handler.head(206, Content_Length=len(whole) - at, Content_Range=content_range)
    else:
        handler.head(200, Content_Length=len(whole))


def good(handler: _Handler, whole: bytes, at: int, part: bool) -> None:
    _begin(handler, whole, at, part)
    handler.body([whole[at:]])


def status(code: int) -> Behavior:
    def answer(handler: _Handler, whole: bytes, at: int, part: bool) -> None:
        handler.head(code, Content_Length=0)

    return answer


def cut(after: int) -> Behavior:
    """The connection breaks after so many bytes of the body."""

    def answer(handler: _Handler, whole: bytes, at: int, part: bool) -> None:
        _begin(handler, whole, at, part)
        handler.body([whole[at : at + after]])
        handler.close_connection = True

    return answer


def no_length(after: int | None = None) -> Behavior:
    """No header says how long the body is: it ends with the connection, after so many bytes or when it is complete."""

    def answer(handler: _Handler, whole: bytes, at: int, part: bool) -> None:
        headers = {"Content_Range": f"bytes {at}-{len(whole) - 1}/*"} if part else {}
        handler.head(206 if part else 200, Connection="close", **headers)
        handler.body([whole[at:] if after is None else whole[at : at + after]])
        handler.close_connection = True

    return answer


def stall(after: int | None) -> Behavior:
    """No byte after so many of the body (None: not even headers), with the connection open."""

    def answer(handler: _Handler, whole: bytes, at: int, part: bool) -> None:
        if after is not None:
            _begin(handler, whole, at, part)
            handler.body([whole[at : at + after]])
        handler.site.closing.wait()
        handler.close_connection = True

    return answer


def slow(piece: int, pause: float) -> Behavior:
    """A body in small pieces with pauses."""

    def pieces(whole: bytes) -> Iterator[bytes]:
        for i in range(0, len(whole), piece):
            time.sleep(pause)
            yield whole[i : i + piece]

    def answer(handler: _Handler, whole: bytes, at: int, part: bool) -> None:
        _begin(handler, whole, at, part)
        handler.body(pieces(whole[at:]))

    return answer


def no_ranges(handler: _Handler, whole: bytes, at: int, part: bool) -> None:
    """The whole file, whatever was requested."""
    good(handler, whole, 0, False)


def other_range(handler: _Handler, whole: bytes, at: int, part: bool) -> None:
    """Another range than the requested one, with the right header."""
    _begin(handler, whole, at // 2, part)
    handler.body([whole[at // 2 :]])


def lying_range(handler: _Handler, whole: bytes, at: int, part: bool) -> None:
    """Another range than the requested one, with the header of the requested one."""
    _begin(handler, whole, at, part)
    handler.body([whole[: len(whole) - at]])


def damaged(handler: _Handler, whole: bytes, at: int, part: bool) -> None:
    """One bit is flipped."""
    good(handler, whole[:-1] + bytes([whole[-1] ^ 1]), at, part)


def longer(handler: _Handler, whole: bytes, at: int, part: bool) -> None:
    """A body that continues after the end of the file, without a length."""
    handler.head(200, Connection="close")
    handler.body([whole, *repeat(bytes(1 << 16), 1000)])
    handler.close_connection = True
