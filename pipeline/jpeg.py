"""The bytes of a JPEG without decoding it: its segments, its size, and the same picture without what makes no pixel.

A JPEG is a row of segments, each with a marker: frames (SOF) hold the size, scans (SOS) begin the pixels, all others are
tables and metadata. pipeline/decode.py decodes.
"""

import struct
from collections.abc import Iterator

# Markers of a JPEG's header
_FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}  # SOF: holds the size
_LOSSLESS, _ARITHMETIC, _HIERARCHICAL = {0xC3, 0xCB}, {0xC9, 0xCA}, {0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF}  # frames
_SEQUENTIAL = {0xC0, 0xC1}
_SOS, _APP0, _APP14 = 0xDA, 0xE0, 0xEE
_METADATA = {*range(0xE1, 0xEE), 0xEF, 0xFE}  # APP1 to APP13, APP15, COM; APP0 and APP14 say how colors are stored
_WITHOUT_LENGTH = {0x00, 0x01, *range(0xD0, 0xD8)}  # a stuffed byte, TEM, RST
_ENDS = {0xD8, 0xD9}  # SOI, EOI: the header ends before them

_ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"  # APP14, transform 0: CMYK

_JFIF = b"\xff\xe0\x00\x10JFIF\0\1\1\0\0\1\0\1\0\0"  # APP0, revision 1.1: gray or YCbCr
_EOI = b"\xff\xd9"
_FILLING = b"\0\r\n"  # cameras and text-mode copies put these between the pixels and the end


def is_jpeg(photo: bytes) -> bool:
    return photo.startswith(b"\xff\xd8")


def segments(photo: bytes) -> Iterator[tuple[int, int]]:
    """(marker, its offset) of a JPEG's header up to its first scan (SOS), read as libjpeg does: bytes between two segments
    are skipped. IndexError if the header is truncated."""
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
            if marker == _SOS:
                return
            at += 2 + (photo[at + 2] << 8 | photo[at + 3])


def size(jpeg: bytes) -> tuple[int, int] | None:
    """(height, width) of the first frame; None if there is none. IndexError or struct.error if the header is truncated."""
    for marker, at in segments(jpeg):
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", jpeg, at + 5)
            return height, width
    return None


def components(jpeg: bytes) -> int:
    """Values of a pixel as they are stored: 1 gray, 3 color, 4 CMYK. StopIteration without a frame."""
    return next(jpeg[at + 9] for marker, at in segments(jpeg) if marker in _FRAMES)


def rare_coding(jpeg: bytes) -> str:
    """How the pixels of a JPEG with a frame are coded, if few decoders know it: `lossless coding`, `12 bits a value`; else
    "" """
    marker, at = next((marker, at) for marker, at in segments(jpeg) if marker in _FRAMES)
    for name, markers in (("lossless", _LOSSLESS), ("hierarchical", _HIERARCHICAL), ("arithmetic", _ARITHMETIC)):
        if marker in markers:
            return f"{name} coding"
    return "" if jpeg[at + 4] == 8 else f"{jpeg[at + 4]} bits a value"


def with_adobe(jpeg: bytes) -> bytes:
    """A CMYK JPEG with Adobe's marker, which says that its values are inverted, as nearly all are; any other as it is."""
    has_marker = any(m == _APP14 and jpeg[at + 4 : at + 9] == b"Adobe" for m, at in segments(jpeg))
    return jpeg[:2] + _ADOBE + jpeg[2:] if components(jpeg) == 4 and not has_marker else jpeg


def only_pixels(jpeg: bytes) -> bytes:
    """The same JPEG with only what pixels depend on, so that libjpeg complains of nothing else. Raises ValueError if no
    scan follows. Takes 2 % of the time of decoding it.

    Metadata and bytes between segments are left out. JFIF's revision becomes 1.1. A scan with all components of a
    sequential frame gets the only parameters that it can have: some phones write zeros, and decoders do not use them.
    """
    parts: list[bytes | memoryview] = [jpeg[:2]]
    try:
        for marker, at in segments(jpeg):
            end = at + 2 + (jpeg[at + 2] << 8 | jpeg[at + 3])
            if marker == _SOS:
                header = jpeg[at : end - 3] + b"\0\x3f\0" if _is_only_scan(jpeg) else jpeg[at:end]
                return b"".join([*parts, header, memoryview(jpeg)[end:]])
            if marker == _APP0:
                parts.append(_JFIF * (end - at >= len(_JFIF) and jpeg[at + 4 : at + 9] == b"JFIF\0"))
            elif marker not in _METADATA:
                parts.append(jpeg[at:end])
    except IndexError:
        pass
    raise ValueError("damaged or truncated: no pixels follow its header")


def _is_only_scan(jpeg: bytes) -> bool:
    """Whether the first scan has all pixels: all components of a sequential frame."""
    found = dict(segments(jpeg))
    frame = next((found[marker] for marker in _SEQUENTIAL if marker in found), None)
    scan = found.get(_SOS)
    if frame is None or scan is None:
        return False
    components = jpeg[scan + 4]
    return components == jpeg[frame + 9] and jpeg[scan + 2 : scan + 4] == bytes([0, 6 + 2 * components])


def with_plain_end(jpeg: bytes) -> bytes:
    """A JPEG without filling before its end marker. A missing end marker is added behind an only scan; of other JPEGs, a
    whole scan may be missing too. A zero behind 0xFF belongs to the pixels."""
    end = jpeg.rfind(_EOI)
    if end < 0 and not _is_only_scan(jpeg):
        return jpeg
    pixels = (jpeg[:end] if end >= 0 else jpeg).rstrip(_FILLING)
    return pixels + b"\0" * pixels.endswith(b"\xff") + _EOI
