"""The members of a tar, from its headers alone: nothing is extracted, no link is followed."""

import os
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from runtime.errors import UserError

BLOCK = 512
MAX_HEADER = 1 << 20  # bytes of a long name or PAX header; real ones have a few hundred


class Member(NamedTuple):
    """One entry of a tar: `size` bytes at `offset` of the file that holds the tar."""

    name: str  # undecodable bytes as surrogates
    offset: int
    size: int
    skip: str  # why it is skipped ("links", ...); empty for an ordinary file


def members(tar: BinaryIO, start: int, end: int, where: str) -> Iterator[Member]:
    """Members of the tar in bytes [start, end) of a file (USTAR, GNU, PAX), without folders.

    Not `tarfile`: it ends silently at a truncated or damaged header, and accepts negative sizes. where: the tar's name for
    messages. Raises UserError, with the byte, if the tar is truncated or damaged, or not a tar.
    """
    at = start
    name, size, skip = "", -1, ""  # what extension headers say about the next member
    while True:
        header = os.pread(tar.fileno(), BLOCK, at) if at + BLOCK <= end else b""
        if len(header) < BLOCK:
            raise UserError(
                f"{where}: truncated at byte {at}: the end of the tar (two empty blocks of 512 bytes) is missing"
            )
        if header.count(0) == BLOCK:
            return
        try:
            if _number(header[148:156]) != sum(header[:148]) + 8 * ord(" ") + sum(header[156:]):
                raise ValueError
            length = _number(header[124:136])
        except ValueError:
            raise UserError(f"{where}: byte {at} is not a tar header: damaged, truncated, or not a tar") from None
        kind, data = header[156:157], at + BLOCK
        if kind in b"xLKg":
            after = _next_header(data, length, end, where)
            text = os.pread(tar.fileno(), length, data) if length <= MAX_HEADER else b""
            if length > MAX_HEADER:
                skip = "huge headers"
            elif kind == b"L":
                name = text.split(b"\0")[0].decode("utf-8", "surrogateescape")
            elif kind == b"x":
                try:
                    name, size, skip = _parse_pax(text, name, size, skip)
                except ValueError:
                    raise UserError(f"{where}: the PAX header at byte {at} is damaged") from None
            at = after
            continue
        if kind == b"S":  # GNU sparse: a chain of blocks with the map comes before the data
            more = header[482]
            while more:
                more, data = os.pread(tar.fileno(), BLOCK, data).ljust(BLOCK, b"\0")[504], data + BLOCK
            skip = skip or "sparse members"
        elif kind in b"12":
            skip, length = skip or "links", 0
        elif kind in b"346":
            skip, length = skip or "special files", 0
        elif kind not in b"\x00075":
            skip = skip or "special files"
        name = name or _ustar_name(header)
        size = 0 if kind in b"123456" else length if size < 0 else size
        after = _next_header(data, size, end, where)
        if kind != b"5" and not name.endswith("/"):
            name = name.removeprefix("./")
            if name.startswith("/") or ".." in name.split("/"):
                skip = skip or "unsafe names"
            yield Member(name, data, size, skip)
        at, name, size, skip = after, "", -1, ""


def _next_header(data: int, size: int, end: int, where: str) -> int:
    """Where the next header is. Raises UserError if the `size` bytes at `data` are not all there."""
    if data + size > end:
        raise UserError(
            f"{where}: truncated: the member at byte {data - BLOCK} has {size} bytes, but only {end - data} are left"
        )
    return data + size + -size % BLOCK


def _number(field: bytes) -> int:
    """A number of a header: octal digits, or binary if the first byte is 0x80. ValueError if neither."""
    value = int.from_bytes(field[1:], "big") if field[0] == 0x80 else int(field.split(b"\0")[0].strip() or b"0", 8)
    if value < 0:
        raise ValueError(value)
    return value


def _ustar_name(header: bytes) -> str:
    name = header[:100].split(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0")[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _parse_pax(text: bytes, name: str, size: int, skip: str) -> tuple[str, int, str]:
    """(name, size, skip) after the records `<length> <key>=<value>\\n` of a PAX header. ValueError if damaged."""
    at = 0
    while at < len(text):
        space = text.index(b" ", at, at + 20)
        end = at + int(text[at:space])
        if not space < end <= len(text):
            raise ValueError(end)
        key, _, value = text[space + 1 : end - 1].partition(b"=")
        if key == b"path":
            name = value.decode("utf-8", "surrogateescape")
        elif key == b"size":
            size = int(value)
            if size < 0:
                raise ValueError(size)
        elif key.startswith(b"GNU.sparse"):
            skip = "sparse members"
        at = end
    return name, size, skip
