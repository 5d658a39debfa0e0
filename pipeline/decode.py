"""Bytes -> pixels: the one decoder of every photo, its header check and its errors. JPEG, PNG and still WebP.

`make shards`, `make index`, the WebDataset reader, evaluation and the picture tools all decode here, so a photo that one of
them accepts is accepted by all, with the same pixels; docs/reference/formats.md says how each format is decoded. DALI has
its own decoder, which gets only photos that were accepted here when they were indexed; tests/test_decode.py requires a mean
difference of at most 2 of 255. Masks of a segmentation set are class numbers, which a conversion to RGB would destroy:
`eval/datasets.py` reads those.

    JPEG    libjpeg-turbo, through simplejpeg: what libjpeg prints as a warning ("Corrupt JPEG data: ...") is an error here
    PNG     Pillow, after the checksums of the chunks that make pixels were compared, which Pillow does not do
    WebP    Pillow

Damage must be found when a photo is indexed: later only its crc32 is compared. So everything that a decoder calls
suspicious is refused. On the other hand the decoder gets only what makes pixels. Metadata (EXIF, color profile, XMP, text)
is taken out first, so it can neither be the reason to refuse a photo nor unpack to gigabytes; header fields that no decoder
uses get their usual values, and an end marker that is missing or padded is made plain if all pixels are there.

A photo's header is read before anything is decoded, because a decoder allocates what the header says: for a PNG of 875 kB
whose header says 30000 x 30000 pixels, DALI took 12 GB and 41 s.

Importing this file does not load torch: `make shards` and `make index` run a process on each core, and torch would cost
each of them 500 MB.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin, WebPImagePlugin

from pipeline import jpeg

if TYPE_CHECKING:
    from torch import Tensor

MAX_PIXELS = 10**8  # of a photo in a shard: 300 MB when decoded, and as many as the largest cameras have

_PNG = b"\x89PNG\r\n\x1a\n"
_IEND = b"\0\0\0\0IEND\xae\x42\x60\x82"
_PIXEL_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
_MAKE_PIXELS = {b"IDAT", b"PLTE", b"tRNS"}
_WITHOUT_PIXELS = {  # chunks of which the checksum does not matter; any other name may be a damaged b"IDAT"
    b"IEND", b"bKGD", b"cHRM", b"eXIf", b"gAMA", b"hIST", b"iCCP", b"iTXt", b"pHYs", b"sBIT", b"sPLT", b"sRGB", b"tEXt",
    b"tIME", b"zTXt",
}  # fmt: skip


_MEANINGS = {  # of what decoders say
    "subsampling": "its header is damaged, or its chroma subsampling is one that the decoder does not support",
    "Premature end of JPEG file": "truncated: Premature end of JPEG file",
    "could not create decoder": "damaged: libwebp does not accept its header",
    "cannot identify image file": "no picture that Pillow knows: its first bytes are damaged, or what follows them",
    "failed to read next frame": "damaged: libwebp cannot decode its pixels",
}


class DecodeError(ValueError):
    """A photo cannot be decoded; the message is the reason, in one line."""


# ------------------------------------------------------------------------------------------------------------ headers


def read_header(photo: bytes) -> tuple[int, int] | None:
    """(height, width) as the pixels are stored, before any EXIF rotation; None if the bytes are not a JPEG, PNG or WebP,
    or the header is truncated. 2 µs."""
    try:
        if jpeg.is_jpeg(photo):
            return jpeg.size(photo)
        elif is_png(photo) and photo[12:16] == b"IHDR":
            width, height = struct.unpack_from(">II", photo, 16)
            return height, width
        elif _is_webp(photo):
            return _read_webp_header(photo)
    except (IndexError, struct.error):  # the header is truncated
        pass
    return None


def check_header(photo: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) of a photo that may be decoded. Raises DecodeError for other formats, a size of zero, more than
    `max_pixels`, animations, and JPEGs of a kind that the decoder does not know."""
    height, width = _size_of(photo)
    if height * width > max_pixels:
        raise DecodeError(f"{height} x {width} pixels are more than the readers accept ({max_pixels:,})")
    if photo[12:16] == b"VP8X" and _is_webp(photo) and photo[20] & 2:
        raise DecodeError("an animated WebP; only still ones are supported")
    if jpeg.is_jpeg(photo) and (coding := jpeg.rare_coding(photo)):
        raise DecodeError(f"a JPEG of {coding}, which the decoder does not support; save it as an ordinary JPEG or PNG")
    return height, width


def _size_of(photo: bytes) -> tuple[int, int]:
    """What `read_header` returns. Raises DecodeError if that is None or has no pixels."""
    size = read_header(photo)
    if is_png(photo) and photo[12:16] == b"CgBI":
        raise DecodeError(
            "a PNG of Apple's own kind (CgBI), which the decoder does not support; save it as an ordinary PNG"
        )
    if size is None:
        kind = "JPEG" if jpeg.is_jpeg(photo) else "PNG" if is_png(photo) else "WebP" if _is_webp(photo) else ""
        raise DecodeError(
            f"a {kind} without a size: its header is damaged or truncated" if kind else "neither JPEG, PNG nor WebP"
        )
    if 0 in size:
        raise DecodeError(f"its header says {size[0]} x {size[1]} pixels")
    return size


def for_dali(photo: bytes) -> bytes:
    """The same photo for DALI's own decoders: of a JPEG or PNG only what `decode_array` decodes. So DALI prints no warning
    of the rest. Takes 3 % of the time of decoding it.

    A JPEG without an end marker stays as it is: with one, DALI would accept truncated photos too. DALI refuses it, and its
    batch is decoded by `decode_array`; `make shards` writes no such JPEG.

    A CMYK JPEG gets Adobe's marker: `decode_array` always takes its values as inverted, DALI only after the marker; without
    it DALI's image is a negative.
    """
    try:
        if is_png(photo):
            return select_chunks(photo, _MAKE_PIXELS)
        if not jpeg.is_jpeg(photo):
            return photo
        return jpeg.with_adobe(jpeg.only_pixels(photo))
    except (ValueError, IndexError, StopIteration):  # the header is truncated; the decoder will report it
        return photo


def is_png(photo: bytes) -> bool:
    return photo.startswith(_PNG)


def _is_webp(photo: bytes) -> bool:
    return photo.startswith(b"RIFF") and photo[8:12] == b"WEBP"


def is_known(photo: bytes) -> bool:
    """Whether the bytes begin like a photo that is decoded here, be it sound or not."""
    return jpeg.is_jpeg(photo) or is_png(photo) or _is_webp(photo)


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
    """A photo's pixels, uint8 [3,H,W], RGB: `decode_array` as a tensor. Raises DecodeError as that does."""
    import torch

    return torch.from_numpy(decode_array(photo)).permute(2, 0, 1)


def decode_array(photo: bytes, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """A photo's pixels, uint8 [H,W,3], RGB.

    EXIF rotation is not applied: decoders disagree about malformed EXIF, and the index holds the sizes before rotation.
    Raises DecodeError if the header is refused (`check_header`) or the bytes do not decode without a complaint.
    """
    size = check_header(photo, max_pixels)
    try:
        if jpeg.is_jpeg(photo):
            pixels = _decode_jpeg(photo)
        else:
            with open_image(photo) as opened:
                image = to_8_bits(opened)
                pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except (DecodeError, MemoryError):
        raise
    except Exception as error:  # hostile bytes can make a decoder raise anything
        raise DecodeError(reason(error)) from None
    if pixels.shape != (*size, 3):
        raise DecodeError(f"its header says {size[0]} x {size[1]} pixels, the decoded image is {list(pixels.shape)}")
    return pixels


def _decode_jpeg(photo: bytes) -> NDArray[np.uint8]:
    """A JPEG's pixels, [H,W,3]. Raises ValueError with libjpeg's words, also where libjpeg would only warn."""
    plain = jpeg.only_pixels(photo)
    try:
        return _decode_strictly(plain)
    except ValueError as error:
        if not any(words in str(error) for words in ("before marker 0xd9", "Premature end of JPEG file")):
            raise
        try:  # if libjpeg has nothing to say of these pixels with a plain end, they are all there
            return _decode_strictly(jpeg.with_plain_end(plain))
        except ValueError:
            raise error from None


def mend_end(photo: bytes) -> bytes:
    """The same bytes of a JPEG that `decode_array` accepts. If libjpeg complains of its end, instead a JPEG with the same
    pixels and a plain end, without metadata."""
    plain = jpeg.only_pixels(photo)
    mended = jpeg.with_plain_end(plain)
    if mended == plain:
        return photo
    try:  # a zero before the end may belong to the pixels, and bytes behind it do no harm
        _decode_strictly(plain)
    except ValueError:
        return mended
    return photo


def _decode_strictly(photo: bytes) -> NDArray[np.uint8]:
    if jpeg.components(photo) != 4:
        return simplejpeg.decode_jpeg(photo, "RGB", strict=True)
    inks = simplejpeg.decode_jpeg(photo, "CMYK", strict=True)  # inverted, as Adobe's programs store them
    return np.array(Image.fromarray(255 - inks, "CMYK").convert("RGB"))


def open_image(photo: bytes) -> Image.Image:
    """Pillow's image of a PNG or WebP, of which only the header has been parsed. Raises DecodeError if its bytes are
    incomplete, a PNG's checksum is wrong, or Pillow sees another size than `read_header`; and anything that Pillow raises.

    Not `Image.open`, which hides the reason for a refusal and judges sizes by a limit of its own.
    """
    height, width = _size_of(photo)
    image = _open_png(photo) if is_png(photo) else _open_webp(photo)
    if image.size != (width, height):
        raise DecodeError(f"its header says {height} x {width} pixels, Pillow {image.height} x {image.width}")
    return image


def _open_png(photo: bytes) -> Image.Image:
    pixels = select_chunks(photo, _MAKE_PIXELS)
    return PngImagePlugin.PngImageFile(io.BytesIO(pixels))


def _open_webp(photo: bytes) -> Image.Image:
    size = 8 + int.from_bytes(photo[4:8], "little")
    if len(photo) < size:
        raise DecodeError(f"truncated: {len(photo)} of {size} bytes")
    return WebPImagePlugin.WebPImageFile(io.BytesIO(photo))


def select_chunks(png: bytes, kinds: set[bytes]) -> bytes:
    """A PNG with only the chunks of these kinds, its header and its end; nothing if it has no such chunk. Raises DecodeError
    as `_png_chunks` does."""
    chunks = list(_png_chunks(png))
    if not kinds & {kind for kind, _, _ in chunks}:
        return b""
    return _PNG + b"".join(png[a:b] for kind, a, b in chunks if kind in {b"IHDR", *kinds}) + _IEND


def _png_chunks(png: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, first byte, end) of a PNG's chunks, up to IEND. Raises DecodeError if a chunk is truncated or, unless no pixel
    depends on it, its checksum is wrong, and for a critical chunk that is not in PNG's standard."""
    at, kind, view = len(_PNG), b"", memoryview(png)
    while kind != b"IEND":
        size, kind = int.from_bytes(png[at : at + 4], "big"), png[at + 4 : at + 8]
        end, name = at + 12 + size, repr(kind.decode("latin-1"))
        if len(kind) < 4 or end > len(png):
            raise DecodeError(f"truncated: the chunk at byte {at} is incomplete")
        checksum = int.from_bytes(png[end - 4 : end], "big")
        if kind not in _WITHOUT_PIXELS and zlib.crc32(view[at + 4 : end - 4]) != checksum:
            raise DecodeError(f"damaged: the checksum of its {name} chunk at byte {at} is wrong")
        if not kind[0] & 32 and kind not in _PIXEL_CHUNKS:  # an upper case letter: no pixels without this chunk
            raise DecodeError(f"a PNG with a chunk {name}, which is not in PNG's standard; save it as an ordinary PNG")
        yield kind, at, end
        at = end


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


def reason(error: Exception) -> str:
    """A decoder's message in one line, and what its poorest ones mean."""
    text = " ".join(str(error).split()) or type(error).__name__
    return next((meaning for words, meaning in _MEANINGS.items() if words in text), text)
