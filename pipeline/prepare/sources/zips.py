"""A zip of photos, read where it lies: its members are stored or deflated one by one, so each has an offset.

Names that lead out (`../x`), links, hidden files and the folders of file systems are skipped, as in a tar. A zip of which a
photo is encrypted, or which claims to unpack to far more bytes than it has, is refused as a whole.
"""

import os
import stat
import struct
import zipfile
import zlib
from pathlib import Path
from shlex import quote
from typing import BinaryIO

from pipeline.prepare.archives import AGAIN, refuse_bomb
from pipeline.prepare.kinds import HEAD, is_photo, kind_of
from pipeline.prepare.names import has_photo_ending, is_hidden, printable, skipped_folder
from pipeline.prepare.skipped import Skipped
from pipeline.prepare.sources.photos import Ask, Listing, Photo
from runtime.errors import UserError

LOCAL_HEADER = 30  # bytes before a member's name and extra fields
ENCRYPTED = 0x1  # in a member's flags
UNIX = 3  # the system whose file modes a zip holds


def list_zip(src: Path, ask: Ask, skipped: Skipped) -> Listing:
    """Raises UserError if it is cut, encrypted, or a bomb."""
    with src.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as opened:
                infos = [info for info in opened.infolist() if not info.is_dir()]
            photos = [photo for info in infos if (photo := _photo(file, src, info, skipped))]
        except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError) as error:
            raise UserError(f"{src}: cut or damaged: {error}; {AGAIN}") from None
    refuse_bomb(str(src), sum(p.size for p in photos), src.stat().st_size)
    return Listing(sorted(photos))


def _photo(file: BinaryIO, src: Path, info: zipfile.ZipInfo, skipped: Skipped) -> Photo | None:
    """The photo that a member is; None if it is none, which is counted."""
    name = (
        info.filename if info.create_system else info.filename.replace("\\", "/")
    )  # some programs on Windows write `\`
    name = name.removeprefix("./").lstrip("/")
    kind, reason = _why_skipped(name, info)
    if kind:
        skipped.add(name, kind, reason)
        return None
    if info.flag_bits & ENCRYPTED:
        raise UserError(
            f"{src}: encrypted ({printable(name)} first); unpack it with its password, `7z x {quote(str(src))}`, and make "
            "shards of that folder"
        )
    packed = info.compress_size if info.compress_type == zipfile.ZIP_DEFLATED else 0
    if not packed and info.compress_size != info.file_size:
        raise ValueError(f"the sizes of {printable(name)} differ")
    photo = Photo(name, _data_offset(file, info), info.file_size, packed=packed, crc=info.CRC)
    if has_photo_ending(name) or is_photo(kind := kind_of(_head(file, photo), name)):
        return photo
    skipped.add_file(name, kind)
    return None


def _why_skipped(name: str, info: zipfile.ZipInfo) -> tuple[str, str]:
    """(kind, reason) of a member that is skipped by its name or header; two empty texts if it is not."""
    if ".." in name.split("/"):
        return "unsafe names", "not read from a zip"
    if why := skipped_folder(name)[1]:
        return why, "not looked into"
    if info.create_system == UNIX and stat.S_ISLNK(info.external_attr >> 16):
        return "links", "not read from a zip"
    if is_hidden(name.rpartition("/")[2]):
        return "hidden files", "its name begins with a dot"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"members of zip's method {info.compress_type}", "only stored and deflated members are read"
    return "", ""


def _data_offset(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """The first byte of a member: its local header has a length of its own. Raises ValueError if it is not there."""
    header = os.pread(file.fileno(), LOCAL_HEADER, info.header_offset)
    if len(header) < LOCAL_HEADER or header[:4] != b"PK\x03\x04":
        raise ValueError(f"byte {info.header_offset} is not the header of {printable(info.filename)}")
    offset = info.header_offset + LOCAL_HEADER + sum(struct.unpack("<HH", header[26:30]))
    if offset + info.compress_size > os.fstat(file.fileno()).st_size:
        raise ValueError(f"{printable(info.filename)} ends behind its end")
    return offset


def _head(file: BinaryIO, photo: Photo) -> bytes:
    data = os.pread(file.fileno(), min(photo.packed or photo.size, 2 * HEAD), photo.offset)
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, HEAD) if photo.packed else data[:HEAD]
    except zlib.error:
        return b""
