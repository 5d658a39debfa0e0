"""The members of a tar, from its headers alone: nothing is extracted, no link is followed."""

import os
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from pipeline.shards import plural
from runtime.errors import UserError

BLOCK = 512
RECORD = 20 * BLOCK  # programs fill a tar with zeros up to a multiple of this
MAX_HEADER = 1 << 20  # bytes of a long name or PAX header; real ones have a few hundred
CHUNK = 1 << 20  # bytes of zeros that are read at once


class Member(NamedTuple):
    """One entry of a tar: `size` bytes at `offset` of the file that holds the tar."""

    name: str  # undecodable bytes as surrogates
    offset: int
    size: int
    skip: str  # why it is skipped ("links", ...); empty for an ordinary file
    tar: int  # first byte of its tar: several can be joined in a file


def members(tar: BinaryIO, start: int, end: int, where: str) -> Iterator[Member]:
    """Members of the tar in bytes [start, end) of a file (USTAR, GNU, PAX), without folders.

    Not `tarfile`: it ends silently at a truncated or damaged header and at the first zeros, and accepts negative sizes.
    Several tars behind each other (`cat a.tar b.tar`) are read as one. where: the tar's name for messages. Raises UserError,
    with the byte, if the tar is truncated or damaged, or not a tar.
    """
    at = first = start  # first: of the tar at hand, if there are several
    name, size, skip = "", -1, ""  # what extension headers say about the next member
    while True:
        header = os.pread(tar.fileno(), min(BLOCK, end - at), at)
        announced = name or skip or size >= 0  # a member must follow
        if len(header) == BLOCK and not any(header) and not announced:
            at = first = _after_end(tar, first, at, end, where)
            if at == end:
                return
            continue
        if len(header) < BLOCK:
            raise UserError(
                f"{where}: truncated at byte {at}: the end of the tar (two empty blocks of 512 bytes) is missing"
            )
        try:
            if not _is_header(header):
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
            yield Member(name, data, size, skip, first)
        at, name, size, skip = after, "", -1, ""


def _after_end(tar: BinaryIO, first: int, at: int, end: int, where: str) -> int:
    """Where to read on after a block of zeros at `at`: `end` if only zeros follow, else the first byte of the next tar.
    Raises UserError if the zeros are damage. first: the first byte of the tar that ends here.

    Whatever the zeros overwrote is lost, so they are a tar's end only if they are as many as programs write: two blocks, or
    up to a multiple of RECORD.
    """
    zeros = _count_zeros(tar, at, end)
    if at + zeros == end:
        return end
    following = at + zeros // BLOCK * BLOCK
    blocks, is_filled = (following - at) // BLOCK, (following - first) % RECORD == 0
    header = os.pread(tar.fileno(), min(BLOCK, end - following), following)
    if (blocks == 2 or (blocks > 2 and is_filled)) and _is_header(header):
        return following
    behind = plural(end - at - zeros, "byte")
    raise UserError(
        f"{where}: damaged: {zeros:,} zero bytes at byte {at} are not its end, because {behind} follow them, from byte "
        f"{at + zeros} on; copy or download it again"
    )


def _count_zeros(file: BinaryIO, at: int, end: int) -> int:
    """How many bytes from `at` on are zeros, up to `end`."""
    start, zeros = at, bytes(CHUNK)
    while at < end and (chunk := os.pread(file.fileno(), min(CHUNK, end - at), at)):
        if chunk != zeros[: len(chunk)]:  # ten times faster than to strip each chunk
            return at + len(chunk) - len(chunk.lstrip(b"\0")) - start
        at += len(chunk)
    return at - start


def _is_header(block: bytes) -> bool:
    """Whether these bytes are a whole header, by its checksum."""
    try:
        return len(block) == BLOCK and _number(block[148:156]) == sum(block[:148]) + 8 * ord(" ") + sum(block[156:])
    except ValueError:
        return False


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
