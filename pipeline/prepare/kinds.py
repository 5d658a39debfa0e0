"""What a file is, by its first bytes. Endings lie: photos come without one, and iPhones' HEIC files as `.jpg`."""

import importlib.util
from functools import cache

from PIL import features

from pipeline.prepare.archives import ARCHIVE_ENDINGS, ARCHIVES
from pipeline.prepare.names import ending

HEAD = 264  # bytes of a file that `kind_of` looks at
PHOTOS = ("JPEG", "PNG", "WebP", "GIF", "TIFF", "BMP")  # `make` reads them
# pictures that are no photos for a reader
PICTURES = ("HEIC", "AVIF", "JPEG 2000", "JPEG XL", "camera raw", "PSD", "OpenEXR", "PNM", "DICOM")
INSTALL = {  # those that `make` converts where Pillow reads them: what makes it read them
    "HEIC": "`.venv/bin/python -m pip install pillow-heif` makes HEIC readable",
    "AVIF": "`.venv/bin/python -m pip install 'pillow>=11.3'` makes AVIF readable",
    "JPEG 2000": "`.venv/bin/python -m pip install --force-reinstall pillow` brings one that reads JPEG 2000",
}
ARCHIVE = "archive"

_RAW_ENDINGS = {".dng", ".nef", ".nrw", ".arw", ".sr2", ".srw", ".pef", ".3fr", ".iiq", ".dcr", ".kdc", ".erf", ".rwl"}
_BEGINNINGS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
    b"FUJIFILMCCD-RAW": "camera raw",
    b"IIRO": "camera raw",
    b"IIRS": "camera raw",
    b"MMOR": "camera raw",
    b"IIU\0": "camera raw",
    b"FOVb": "camera raw",
    b"\0MRM": "camera raw",
    b"8BPS": "PSD",
    b"\x76\x2f\x31\x01": "OpenEXR",
}
_BRANDS = {  # of ISO files: what follows `ftyp`
    b"avif": "AVIF", b"avis": "AVIF", b"crx ": "camera raw",
    b"heic": "HEIC", b"heix": "HEIC", b"heim": "HEIC", b"heis": "HEIC", b"hevc": "HEIC", b"mif1": "HEIC", b"msf1": "HEIC",
}  # fmt: skip


def kind_of(head: bytes, name: str) -> str:
    """The kind of a file that begins with these bytes: one of PHOTOS or PICTURES, ARCHIVE, or empty for anything else.

    The name decides only between formats with the same first bytes: a camera's raw file and TIFF, an archive and a
    document that is one inside.
    """
    for beginning, kind in _BEGINNINGS.items():
        if head.startswith(beginning):
            return kind
    if head[4:8] == b"ftyp":
        return "AVIF" if b"avif" in head[8:40] else _BRANDS.get(head[8:12], "")
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "camera raw" if head[8:10] == b"CR" or ending(name) in _RAW_ENDINGS else "TIFF"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WebP"
    if head.startswith(b"BM") and head[14:18] in (b"\x0c\0\0\0", b"\x28\0\0\0", b"\x6c\0\0\0", b"\x7c\0\0\0"):
        return "BMP"
    if head[:2] in (b"P4", b"P5", b"P6") and head[2:3].isspace():
        return "PNM"
    if head[128:132] == b"DICM":
        return "DICOM"
    if (head.startswith(tuple(ARCHIVES)) or head[257:262] == b"ustar") and ending(name) in ARCHIVE_ENDINGS:
        return ARCHIVE
    return ""


@cache
def readable(kind: str) -> bool:
    """Whether `make` converts pictures of this kind here: HEIC with pillow-heif, AVIF and JPEG 2000 with most Pillows."""
    if kind == "HEIC":
        return importlib.util.find_spec("pillow_heif") is not None
    return kind in ("AVIF", "JPEG 2000") and bool(features.check("avif" if kind == "AVIF" else "jpg_2000"))


def is_photo(kind: str) -> bool:
    return kind in PHOTOS or readable(kind)


def unread_reason(data: bytes, name: str) -> str:
    """Why a photo cannot be read, if its bytes are of a format that nothing here reads: an iPhone's HEIC named `x.jpg`."""
    kind = kind_of(data, name)
    if kind not in PICTURES or readable(kind):
        return ""
    return f"it is {kind}, which is not read; convert it to JPEG" + (f", or {INSTALL[kind]}" if kind in INSTALL else "")


def is_palette_png(head: bytes) -> bool:
    """Whether a PNG's pixels are numbers of a palette, as those of segmentation masks are."""
    return head.startswith(b"\x89PNG\r\n\x1a\n") and head[25:26] == b"\x03"
