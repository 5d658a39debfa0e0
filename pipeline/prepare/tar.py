"""The members of a tar, from its headers alone: nothing is extracted, no link leaves the tar."""

import os
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from runtime.errors import UserError, plural

BLOCK = 512
RECORDS = (20 * BLOCK, 64 * BLOCK)  # programs fill a tar with zeros up to a multiple of one of these
MAX_HEADER = 1 << 20  # bytes of a long name or PAX header; real ones have a few hundred
CHUNK = 1 << 20  # bytes of zeros that are read at once


class Member(NamedTuple):
    """One entry of a tar: `size` bytes at `offset` of the file that holds the tar."""

    name: str  # undecodable bytes as surrogates
    offset: int
    size: int
    skip: str  # why it is skipped ("links", ...); empty for an ordinary file
    tar: int  # first byte of its tar: several can be joined in a file


class _Announced(NamedTuple):
    """What extension headers say about the member behind them."""

    name: str = ""
    link: str = ""
    size: int = -1
    skip: str = ""


_NOTHING = _Announced()


def members(tar: BinaryIO, start: int, end: int, where: str, joints: list[int] | None = None) -> Iterator[Member]:
    """Members of the tar in bytes [start, end) of a file (USTAR, GNU, PAX), without folders.

    Not `tarfile`: it ends silently at a truncated or damaged header and at the first zeros, and accepts negative sizes.
    Several tars behind each other (`cat a.tar b.tar`) are read as one; the first bytes of all but the first are added to
    `joints`. A hard link is its target's bytes, if that is a member before it. Leading slashes of names are left out.
    where: the tar's name for messages. Raises UserError, with the byte, if the tar is truncated or damaged, or not a tar.
    """
    at = first = start  # first: of the tar at hand, if there are several
    announced = _NOTHING
    by_name = dict[str, Member]()  # the targets of hard links
    while True:
        header = os.pread(tar.fileno(), min(BLOCK, end - at), at)
        if len(header) == BLOCK and not any(header) and announced == _NOTHING:  # what is announced must follow
            at = first = _after_end(tar, first, at, end, where)
            if at == end:
                return
            if joints is not None:
                joints.append(at)
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
            text = os.pread(tar.fileno(), length, data) if length <= MAX_HEADER else None
            try:
                announced = _extend(announced, kind, text)
            except ValueError:
                raise UserError(f"{where}: the PAX header at byte {at} is damaged") from None
            at = after
            continue
        skip = announced.skip
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
        name = announced.name or _ustar_name(header)
        size = 0 if kind in b"123456" else length if announced.size < 0 else announced.size
        after = _next_header(data, size, end, where)
        if kind != b"5" and not name.endswith("/"):
            name = _relative(name)
            if ".." in name.split("/"):
                skip = skip or "unsafe names"
            m = Member(name, data, size, skip, first)
            if kind == b"1" and skip == "links":
                target = by_name.get(_relative(announced.link or _text(header[157:257])))
                m = target._replace(name=name, tar=first) if target else m
            if not m.skip:
                by_name[name] = m
            yield m
        at, announced = after, _NOTHING


def _after_end(tar: BinaryIO, first: int, at: int, end: int, where: str) -> int:
    """Where to read on after a block of zeros at `at`: `end` if only zeros follow, else the first byte of the next tar.
    Raises UserError if the zeros are damage. first: the first byte of the tar that ends here.

    Whatever the zeros overwrote is lost, so they are a tar's end only if they are as many as programs write: one or two
    blocks, or up to a multiple of one of RECORDS.
    """
    zeros = _count_zeros(tar, at, end)
    if at + zeros == end:
        return end
    following = at + zeros // BLOCK * BLOCK
    blocks, is_filled = (following - at) // BLOCK, any((following - first) % record == 0 for record in RECORDS)
    header = os.pread(tar.fileno(), min(BLOCK, end - following), following)
    if (blocks <= 2 or is_filled) and _is_header(header):
        return following
    left = end - at - zeros
    behind = f"{plural(left, 'byte')} follow{'s' * (left == 1)} them"
    raise UserError(
        f"{where}: damaged: {zeros:,} zero bytes at byte {at} are not its end, because {behind}, from byte "
        f"{at + zeros} on"
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
    name = _text(header[:100])
    return f"{_text(header[345:500])}/{name}" if header[257:263] == b"ustar\0" and header[345] else name


def _text(field: bytes) -> str:
    return field.split(b"\0")[0].decode("utf-8", "surrogateescape")


def _relative(name: str) -> str:
    """A name as `tar` would extract it below a folder. `tar -P` keeps leading slashes; here names only label samples."""
    return name.removeprefix("./").lstrip("/")


def _extend(announced: _Announced, kind: bytes, text: bytes | None) -> _Announced:
    """What is announced after one more extension header; text: its data, None if huge. ValueError if a PAX header is
    damaged."""
    if text is None:
        return announced._replace(skip="huge headers")
    if kind == b"L":
        return announced._replace(name=_text(text))
    if kind == b"K":
        return announced._replace(link=_text(text))
    return _parse_pax(text, announced) if kind == b"x" else announced


def _parse_pax(text: bytes, announced: _Announced) -> _Announced:
    """What is announced after the records `<length> <key>=<value>\\n` of a PAX header. ValueError if damaged."""
    at = 0
    while at < len(text):
        space = text.index(b" ", at, at + 20)
        end = at + int(text[at:space])
        if not space < end <= len(text):
            raise ValueError(end)
        key, _, value = text[space + 1 : end - 1].partition(b"=")
        if key == b"path":
            announced = announced._replace(name=value.decode("utf-8", "surrogateescape"))
        elif key == b"linkpath":
            announced = announced._replace(link=value.decode("utf-8", "surrogateescape"))
        elif key == b"size":
            if int(value) < 0:
                raise ValueError(value)
            announced = announced._replace(size=int(value))
        elif key.startswith(b"GNU.sparse"):
            announced = announced._replace(skip="sparse members")
        at = end
    return announced
