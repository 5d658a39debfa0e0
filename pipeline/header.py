"""What a photo's header tells before anything is decoded: its size, and where EXIF is. JPEG, PNG, WebP.

What a header promises is what a decoder allocates: a PNG of 875 kB that promises 30000 x 30000 pixels took 12 GB and 41 s
from DALI. So a photo's size is read here when it is indexed, and here again before a reader decodes it.
"""

import struct
from collections.abc import Iterator

MAX_PIXELS = 10**8  # of a photo in a shard: 300 MB when decoded, and as many as the largest cameras have

_FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}  # SOF: the size stands there
_WITHOUT_LENGTH = {0x00, 0x01, *range(0xD0, 0xD8)}  # a stuffed byte, TEM, RST
_ENDS = {0xD8, 0xD9, 0xDA}  # SOI, EOI, SOS: here ends the header


def size_of(photo: bytes) -> tuple[int, int] | None:
    """(height, width) as the pixels are stored; None where there is no such header. 2 µs."""
    try:
        if photo.startswith(b"\xff\xd8"):
            for marker, at in _segments(photo):
                if marker in _FRAMES:
                    height, width = struct.unpack_from(">HH", photo, at + 5)
                    return height, width
        elif photo.startswith(b"\x89PNG\r\n\x1a\n") and photo[12:16] == b"IHDR":
            width, height = struct.unpack_from(">II", photo, 16)
            return height, width
        elif photo.startswith(b"RIFF") and photo[8:12] == b"WEBP":
            return _size_of_webp(photo)
    except (IndexError, struct.error):  # the header is cut
        pass
    return None


def without_exif(photo: bytes) -> bytes | None:
    """The same photo with its EXIF hidden from a decoder that would obey it: the same object where there is none, None for
    a PNG or WebP that has some. A JPEG's APP1 segments become APP15, whatever they hold: torchcodec takes the first one
    for EXIF without looking at its name. 3 µs where there is none."""
    if not photo.startswith(b"\xff\xd8"):
        return None if (b"eXIf" if photo.startswith(b"\x89PNG") else b"EXIF") in photo else photo
    try:
        places = [at for marker, at in _segments(photo) if marker == 0xE1]
    except IndexError:  # the header is cut, as the decoder will say
        return photo
    if places:
        changed = bytearray(photo)
        for at in places:
            changed[at + 1] = 0xEF
        photo = bytes(changed)
    return photo


def _segments(photo: bytes) -> Iterator[tuple[int, int]]:
    """(marker, where it stands) of a JPEG's header, as libjpeg goes: what lies between two segments is passed over."""
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


def _size_of_webp(photo: bytes) -> tuple[int, int] | None:
    """The canvas of an extended file (decoders refuse a still picture of another size in it), else the picture's size."""
    kind = photo[12:16]
    if kind == b"VP8X":
        return int.from_bytes(photo[27:30], "little") + 1, int.from_bytes(photo[24:27], "little") + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", photo, 26)
        return height & 0x3FFF, width & 0x3FFF
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", photo, 21)
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    return None
