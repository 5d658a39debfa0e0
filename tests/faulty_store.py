"""fsspec stores in memory that misbehave on request: `gs` is read in threads, `az` in fsspec's event loop."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from fsspec.implementations.asyn_wrapper import AsyncFileSystemWrapper
from fsspec.implementations.memory import MemoryFileSystem

Behavior = Callable[[bytes], bytes]  # what a range that is read becomes


class FaultyStore(MemoryFileSystem):
    """`behave(name, *behaviors)`: the next ranges of a file fail in these ways. `requests`: (file, first byte) of each
    range; `written`: files, in order."""

    protocol = ("gs",)
    store: dict = {}  # noqa: RUF012  # as in MemoryFileSystem: one for the process
    pseudo_dirs = [""]  # noqa: RUF012
    requests: list[tuple[str, int]] = []  # noqa: RUF012
    written: list[str] = []  # noqa: RUF012
    behavior: dict[str, Iterator[Behavior]] = defaultdict(lambda: iter(()))  # noqa: RUF012

    @classmethod
    def reset(cls, folder: Path | None = None) -> None:
        """Empty, or with a folder's files in bucket/tiny."""
        for kept in (cls.store, cls.requests, cls.written, cls.behavior):
            kept.clear()
        cls.pseudo_dirs[:] = [""]
        for file in folder.iterdir() if folder else ():
            cls().pipe_file(f"bucket/tiny/{file.name}", file.read_bytes())

    @classmethod
    def behave(cls, name: str, *behaviors: Behavior) -> None:
        cls.behavior[name] = iter(behaviors)

    @classmethod
    def starts(cls, name: str) -> list[int]:
        return [start for file, start in cls.requests if file == name]

    def cat_file(self, path, start=None, end=None, **kwargs):
        name = path.rpartition("/")[2]
        self.requests.append((name, start or 0))
        data = super().cat_file(path, start=start, end=end, **kwargs)
        return next(self.behavior[name], bytes)(data)

    def put_file(self, lpath, rpath, **kwargs):
        super().put_file(lpath, rpath, **kwargs)
        self.written.append(rpath.partition("/")[2])


class AsyncStore(AsyncFileSystemWrapper):
    protocol = ("az",)

    def __init__(self, **options):
        super().__init__(FaultyStore(), **options)


class ServerError(Exception):
    """As the packages of stores raise them: with the status in an attribute."""

    def __init__(self, code: int):
        super().__init__(f"{code}")
        self.code = code


def status(code: int) -> Behavior:
    def answer(data: bytes) -> bytes:
        raise ServerError(code)

    return answer


def short(data: bytes) -> bytes:
    return data[: len(data) // 2]


def none(data: bytes) -> bytes:
    return b""


def longer(data: bytes) -> bytes:
    return data + b"more"


def damaged(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def stall(data: bytes) -> bytes:
    time.sleep(1)
    return data
