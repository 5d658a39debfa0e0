"""One photo on its way into a shard: probed, decoded whole, kept unchanged or converted to a plain JPEG.

An upright JPEG of 8 bits, gray or color, keeps its bytes. Everything else is converted to such a JPEG, with full color
resolution (4:4:4). The readers' decoder (pipeline/decode.py) decodes and judges, with three additions:
  EXIF rotation                  applied to the pixels
  transparency                   composited over white
  a JPEG's end                   zeros and line ends before it removed, a missing one added: decoders complain of them
TIFF, BMP and GIF are converted too, and HEIC, AVIF and JPEG 2000 where a package reads them; of all formats the first
frame. Modes that `decode.to_8_bits` refuses are refused.
A photo in a tar of another program is kept unchanged or refused (`inspect_existing`). docs/reference/formats.md has both as
one table.
"""

import io
import re
import warnings
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, JpegImagePlugin, PngImagePlugin, UnidentifiedImageError

from pipeline import decode, jpeg
from pipeline.prepare.kinds import HEAD, kind_of, readable

OTHER_FORMATS = ("TIFF", "BMP", "GIF")  # that `make shards` converts, and no reader decodes
BY_PACKAGES = {"AVIF": "AVIF", "JPEG 2000": "JPEG2000", "HEIC": "HEIF"}  # those too, where it can: Pillow's names
MAX_SIDE = 65500  # pixels: libjpeg's limit
ORIENTATION = 0x0112  # EXIF tag
UPRIGHT = {  # by the tag's value, how pixels become upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Prepared(NamedTuple):
    """A photo as it is written into a shard."""

    data: bytes
    height: int
    width: int
    kind: str
    kept: bool  # whether the bytes are the source's


class Source(NamedTuple):
    """A photo as it came."""

    image: Image.Image  # a JPEG's is decoded; of other formats perhaps only the header has been read
    kind: str  # "JPEG RGB", "PNG I;16", "JPEG RGB rotated"...
    upright: Image.Transpose | None  # what EXIF wants to be done to the pixels


def limit_pixels(at_most: int) -> None:
    """From now on headers with more pixels are refused; other warnings are silenced."""
    Image.MAX_IMAGE_PIXELS = at_most
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", Image.DecompressionBombWarning)


def open_source(data: bytes) -> Source:
    """The photo and what it is. Raises DecodeError or anything that Pillow raises if the photo is bad."""
    if size := decode.read_header(data):
        height, width = size
        if height * width > (Image.MAX_IMAGE_PIXELS or decode.MAX_PIXELS):
            raise decode.DecodeError(f"its header says {height * width} pixels, more than --max-pixels")
        _check_sides(height, width)
    if jpeg.is_jpeg(data):
        pixels, components = decode.decode_array(data, max_pixels=MAX_SIDE**2), jpeg.components(data)
        image = Image.fromarray(pixels[..., 0] if components == 1 else pixels)
        kind = f"JPEG {'CMYK' if components == 4 else image.mode}"
    elif decode.is_known(data):
        image = decode.open_image(data)
        kind = f"{image.format} {image.mode}"
    else:
        image = _open_other(data)
        kind = f"{image.format} {image.mode}"
        _check_sides(image.height, image.width)
    upright = UPRIGHT.get(_orientation(data, image))
    return Source(image, kind + " rotated" * bool(upright), upright)


def prepare(data: bytes, resize_short: int | None = None, quality: int = 95) -> Prepared:
    """Decode a photo and convert it if necessary (see above). If its short side is longer than `resize_short` pixels, it is
    resized to that (Lanczos). Raises DecodeError or anything that Pillow raises if the photo is bad."""
    image, kind, upright = open_source(data)
    resized = resize_short is not None and min(image.size) > resize_short
    if kind in ("JPEG L", "JPEG RGB") and not resized:
        plain = decode.mend_end(data)
        kind += " mended" * (plain is not data)
        return Prepared(_check_readable(plain, image), image.height, image.width, kind, plain is data)
    image = _as_seen(image, upright)
    if resize_short is not None and resized:
        scale = resize_short / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    image.info.clear()  # only pixels: no comment, no profile, no second rotation
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality, subsampling=0)
    data = _check_readable(out.getvalue(), image)
    return Prepared(data, image.height, image.width, kind + " resized" * resized, False)


def seen_pixels(data: bytes) -> NDArray[np.uint8]:
    """A photo's pixels as `prepare` would write them, without what a JPEG loses: upright, over white, uint8 [H,W,3], RGB.
    Raises DecodeError if the photo is bad."""
    try:
        image, _, upright = open_source(data)
        return np.array(_as_seen(image, upright).convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # hostile bytes can make a decoder raise anything
        raise decode.DecodeError(decode_error(error)) from None


def inspect_existing(data: bytes) -> tuple[Image.Image, str]:
    """The photo, decoded once, and its kind, if the readers accept it unchanged: JPEG, PNG, still WebP. Otherwise raises
    DecodeError with the reason, or anything that Pillow raises."""
    image, kind, _ = open_source(data)
    animated = getattr(image, "is_animated", False)
    if animated or not decode.is_known(data):
        kind += " animated" * animated
        raise decode.DecodeError(f"{kind}: readers accept JPEG, PNG and still WebP; `make` converts other formats")
    decode.to_8_bits(image)  # which decodes a PNG or WebP
    _check_readable(data, image)
    return image, kind


def _open_other(data: bytes) -> Image.Image:
    """Pillow's image of another format, of which only the header has been read."""
    kind = kind_of(data[:HEAD], "")
    if kind in BY_PACKAGES and readable(kind):
        if kind == "HEIC":
            import pillow_heif  # the extra `sources`

            pillow_heif.register_heif_opener()
        return Image.open(io.BytesIO(data), formats=(BY_PACKAGES[kind],))
    try:
        return Image.open(io.BytesIO(data), formats=OTHER_FORMATS)
    except UnidentifiedImageError:
        if not data:
            raise decode.DecodeError("empty") from None
        formats = ", ".join(("JPEG", "PNG", "WEBP", *OTHER_FORMATS))
        raise decode.DecodeError(f"not a {formats}: it begins with {data[:16]!r}") from None


def _check_sides(height: int, width: int) -> None:
    if max(height, width) > MAX_SIDE:
        raise decode.DecodeError(f"{width} x {height} pixels: a JPEG has at most {MAX_SIDE} on a side")


def _check_readable(data: bytes, image: Image.Image) -> bytes:
    """The same bytes. Raises ValueError if a reader would refuse them (`Shards.validation_error`)."""
    if decode.read_header(data) != (image.height, image.width):
        raise ValueError(f"its header does not have the size of the decoded image, {image.height} x {image.width}")
    if image.height * image.width > decode.MAX_PIXELS:
        size = f"{image.height} x {image.width} pixels"
        raise ValueError(
            f"{size} are more than the readers accept ({decode.MAX_PIXELS:,}); --resize-short makes it smaller"
        )
    return data


def _orientation(data: bytes, image: Image.Image) -> int:
    """EXIF's orientation; 1 (upright) if there is none, or none that can be read. Decodes no pixels: of a damaged photo
    Pillow would report that here, and not again where it counts."""
    try:
        if jpeg.is_jpeg(data):
            image = JpegImagePlugin.JpegImageFile(io.BytesIO(data))
        elif decode.is_png(data):
            exif = decode.select_chunks(data, {b"eXIf"})
            metadata = exif or decode.select_chunks(data, {b"tEXt", b"zTXt", b"iTXt"})  # perhaps more than Pillow reads
            image = PngImagePlugin.PngImageFile(io.BytesIO(metadata))
        return Image.Image.getexif(image).get(ORIENTATION, 1)
    except Exception:
        return 1


def _as_seen(image: Image.Image, upright: Image.Transpose | None) -> Image.Image:
    """The photo turned upright, over white, with 8 bits a value."""
    if upright and image.format != "TIFF":  # which Pillow turns upright when it decodes it
        image = image.transpose(upright)
    return decode.to_8_bits(_over_white(image))


def _over_white(image: Image.Image) -> Image.Image:
    """The photo without transparency, composited over white."""
    if not image.has_transparency_data or image.mode.startswith("I;16"):  # Pillow composites 8 bits only
        return image
    gray, image = image.mode in ("1", "L", "LA"), image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if gray else "RGB")


def decode_error(error: Exception) -> str:
    """The reason for rejected.jsonl: one line, the same in every run."""
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        pixels = re.search(r"\d+", str(error))
        return f"its header says {pixels[0] if pixels else 'too many'} pixels, more than --max-pixels"
    return re.sub(r" at 0x[0-9a-f]+", "", decode.reason(error))
