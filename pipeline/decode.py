"""Bytes -> pixels: the decoder of every photo, its header check and its errors. JPEG, PNG and still WebP.

The WebDataset reader, `make shards`, `make index`, evaluation and the picture tools all decode here, so a photo has the
same pixels in each of them; docs/reference/formats.md says how each format is decoded. DALI has its own decoder;
tests/test_decode.py requires a mean difference of at most 2 of 255. Masks of a segmentation set are class numbers, which a
conversion to RGB would destroy: `eval/datasets.py` reads those.

A photo's header is read before anything is decoded, because a decoder allocates what the header says: for a PNG of 875 kB
whose header says 30000 x 30000 pixels, DALI took 12 GB and 41 s.

Importing this file loads Pillow, but neither torch nor torchcodec: `make shards` and `make index` run a process on each
core, and torchcodec would cost each of them 500 MB to decode 8 % faster. Pillow and torchcodec give the same pixels.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

if TYPE_CHECKING:
    from torch import Tensor

MAX_PIXELS = 10**8  # of a photo in a shard: 300 MB when decoded, and as many as the largest cameras have
FORMATS = ("JPEG", "PNG", "WEBP")  # as Pillow names them

# Markers of a JPEG's header
_FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}  # SOF: holds the size
_APP1, _APP14, _APP15 = 0xE1, 0xEE, 0xEF
_WITHOUT_LENGTH = {0x00, 0x01, *range(0xD0, 0xD8)}  # a stuffed byte, TEM, RST
_ENDS = {0xD8, 0xD9, 0xDA}  # SOI, EOI, SOS: the header ends here

_ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"  # APP14, transform 0: CMYK


class DecodeError(ValueError):
    """A photo cannot be decoded; the message is the reason, in one line."""


# ------------------------------------------------------------------------------------------------------------ headers


def read_header(photo: bytes) -> tuple[int, int] | None:
    """(height, width) as the pixels are stored, before any EXIF rotation; None if the bytes are not a JPEG, PNG or WebP,
    or the header is truncated. 2 µs."""
    try:
        if photo.startswith(b"\xff\xd8"):
            for marker, at in _segments(photo):
                if marker in _FRAMES:
                    height, width = struct.unpack_from(">HH", photo, at + 5)
                    return height, width
        elif _is_png(photo) and photo[12:16] == b"IHDR":
            width, height = struct.unpack_from(">II", photo, 16)
            return height, width
        elif photo.startswith(b"RIFF") and photo[8:12] == b"WEBP":
            return _read_webp_header(photo)
    except (IndexError, struct.error):  # the header is truncated
        pass
    return None


def check_header(photo: bytes) -> tuple[int, int]:
    """(height, width) of a photo that may be decoded. Raises DecodeError for other formats, a size of zero, more than
    MAX_PIXELS, and animations."""
    size = read_header(photo)
    if size is None:
        raise DecodeError("neither JPEG, PNG nor WebP")
    height, width = size
    if height * width == 0:
        raise DecodeError(f"its header says {height} x {width} pixels")
    if height * width > MAX_PIXELS:
        raise DecodeError(f"{height} x {width} pixels are more than the readers accept ({MAX_PIXELS:,})")
    if photo[12:16] == b"VP8X" and photo.startswith(b"RIFF") and photo[20] & 2:
        raise DecodeError("an animated WebP; only still ones are supported")
    return height, width


def with_adobe_marker(photo: bytes) -> bytes:
    """The same photo for DALI: a CMYK JPEG without Adobe's marker gets one, every other photo is returned as it is.

    Nearly all CMYK JPEGs hold inverted values. Pillow and torchcodec always assume that, DALI only after Adobe's marker:
    without the marker its image is a negative. 3 µs.
    """
    if not photo.startswith(b"\xff\xd8"):
        return photo
    components, has_marker = 0, False
    try:
        for marker, at in _segments(photo):
            if marker in _FRAMES:
                components = photo[at + 9]
            elif marker == _APP14 and photo[at + 4 : at + 9] == b"Adobe":
                has_marker = True
    except IndexError:  # the header is truncated; the decoder will report it
        return photo
    return photo[:2] + _ADOBE + photo[2:] if components == 4 and not has_marker else photo


def _segments(photo: bytes) -> Iterator[tuple[int, int]]:
    """(marker, its offset) of a JPEG's header, read as libjpeg does: bytes between two segments are skipped."""
    at = 2
    while (at := photo.find(b"\xff", at)) >= 0:
        marker = photo[at + 1]
        if marker == 0xFF:
            at += 1
        elif marker in _WITHOUT_LENGTH:
            at += 2
        elif marker in _ENDS:
            return
        else:
            yield marker, at
            at += 2 + (photo[at + 2] << 8 | photo[at + 3])


def _is_png(photo: bytes) -> bool:
    return photo.startswith(b"\x89PNG\r\n\x1a\n")


def _read_webp_header(photo: bytes) -> tuple[int, int] | None:
    """The canvas of an extended file (decoders refuse a still image of another size in it), else the image's size."""
    kind = photo[12:16]
    if kind == b"VP8X" and len(photo) >= 30:
        return int.from_bytes(photo[27:30], "little") + 1, int.from_bytes(photo[24:27], "little") + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", photo, 26)
        return height & 0x3FFF, width & 0x3FFF
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", photo, 21)
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    return None


# ------------------------------------------------------------------------------------------------------------- pixels


def decode(photo: bytes) -> Tensor:
    """A photo's pixels, uint8 [3,H,W], RGB; by torchcodec, or by Pillow if torchcodec is missing or would differ.

    EXIF rotation is not applied: decoders disagree about malformed EXIF, and the index holds the sizes before rotation.
    Raises DecodeError if the header is refused (`check_header`) or the bytes do not decode.
    """
    size = check_header(photo)
    torchcodec_decode, data = load_torchcodec(), _for_torchcodec(photo)
    if torchcodec_decode is None or data is None:
        import torch

        return torch.from_numpy(decode_with_pillow(photo)).permute(2, 0, 1)
    try:
        pixels = torchcodec_decode(data)
    except MemoryError:
        raise
    except Exception as error:  # a decoder may raise anything
        raise DecodeError(_reason(error)) from None
    if pixels.shape != (3, *size):
        raise DecodeError(f"its header says {size[0]} x {size[1]} pixels, the decoded image is {list(pixels.shape)}")
    return pixels


def decode_with_pillow(photo: bytes) -> NDArray[np.uint8]:
    """What `decode` returns, as an array [H,W,3] and without torch. Raises DecodeError as `decode` does."""
    height, width = check_header(photo)
    try:
        with open_image(photo) as image:
            if image.size != (width, height):
                raise DecodeError(f"its header says {height} x {width} pixels, Pillow {image.height} x {image.width}")
            return np.array(to_8_bits(image).convert("RGB"))
    except (DecodeError, MemoryError):
        raise
    except Exception as error:  # hostile bytes can make Pillow raise anything
        raise DecodeError(_reason(error)) from None


def open_image(photo: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Pillow's image of a photo, of which only the header has been read. Raises DecodeError if the bytes have none of these
    formats, and anything else that Pillow raises. `make shards` passes more formats than the readers accept."""
    try:
        return Image.open(io.BytesIO(photo), formats=formats)
    except UnidentifiedImageError:
        raise DecodeError(f"not a {', '.join(formats)}: it begins with {photo[:16]!r}") from None


def to_8_bits(image: Image.Image) -> Image.Image:
    """Any photo as L (gray) or RGB, 8 bits a value: the one place that converts Pillow's modes.

    16 bits a value     the high byte (as Pillow reads color of 16 bits; gray has to match)
    palette             its colors
    transparency        dropped: the colors below it become visible
    CMYK                to RGB by Pillow's formula; color profiles are never applied
    32 bits, LAB        DecodeError: the value of white is not defined
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F", "LAB"):
        raise DecodeError(f"mode {image.mode}: the value of white is not defined")
    image.load()
    image.info.pop("transparency", None)  # Pillow would warn that a palette's transparency is lost
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode in ("1", "LA") else "RGB")


@cache
def load_torchcodec() -> Callable[[bytes], Tensor] | None:
    """torchcodec's decoder to RGB; None if torchcodec is not installed, or installed for another version of torch.

    Loads torch. A program that decodes in forked processes calls this before the fork, so that they share it.
    """
    try:
        from torchcodec.decoders import decode_image
    except (ImportError, OSError, RuntimeError):
        return None
    return lambda photo: decode_image(photo, mode="RGB")


def _for_torchcodec(photo: bytes) -> bytes | None:
    """Bytes from which torchcodec makes the same pixels as Pillow, or None if Pillow has to decode. 3 µs.

    torchcodec applies EXIF rotation. All APP1 segments of a JPEG are renamed APP15: torchcodec takes the first one
    as EXIF without reading its name. A PNG or WebP with EXIF is left to Pillow; so is a PNG of 16 bits a value, which
    torchcodec reads as v / 257, rounded, and Pillow as the high byte.
    """
    if _is_png(photo):
        return None if photo[24:25] == b"\x10" or b"eXIf" in photo else photo
    if not photo.startswith(b"\xff\xd8"):
        return None if b"EXIF" in photo else photo
    try:
        offsets = [at for marker, at in _segments(photo) if marker == _APP1]
    except IndexError:  # the header is truncated; the decoder will report it
        return photo
    if offsets:
        renamed = bytearray(photo)
        for at in offsets:
            renamed[at + 1] = _APP15
        photo = bytes(renamed)
    return photo


def _reason(error: Exception) -> str:
    """A decoder's message in one line, without the source location that torchcodec begins it with."""
    return re.sub(r"^\w+, \S+:\d+, ", "", " ".join(str(error).split())) or type(error).__name__
