"""One photo on its way into a shard: probed, decoded whole, kept unchanged or converted to a plain JPEG.

An upright JPEG of 8 bits, gray or color, keeps its bytes. Everything else is converted to such a JPEG, with full color
resolution (4:4:4). The pixels are those of the readers' decoder (pipeline/decode.py), with two additions:
  EXIF rotation                  applied to the pixels
  transparency                   composited over white
TIFF, BMP and GIF are converted too; of all formats the first frame. Modes that `decode.to_8_bits` refuses are refused.
A photo in a tar of another program is kept unchanged or refused (`inspect_existing`). docs/reference/formats.md has both as
one table.
"""

import io
import re
import warnings
from typing import NamedTuple

from PIL import Image, ImageOps

from pipeline import decode

READ = (*decode.FORMATS, "MPO")  # what the readers decode; MPO is a JPEG with further images after it
FORMATS = (*decode.FORMATS, "TIFF", "BMP", "GIF")
MAX_SIDE = 65500  # pixels: libjpeg's limit
ORIENTATION = 0x0112  # EXIF tag; 2 to 8: rotated or mirrored


class Prepared(NamedTuple):
    """A photo as it is written into a shard."""

    data: bytes
    height: int
    width: int
    kind: str
    kept: bool  # whether the bytes are the source's


def limit_pixels(at_most: int) -> None:
    """From now on Image.open refuses headers with more pixels; other warnings are silenced."""
    Image.MAX_IMAGE_PIXELS = at_most
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", Image.DecompressionBombWarning)


def probe(data: bytes) -> tuple[Image.Image, str]:
    """The photo with only its header read, and its kind: "JPEG RGB", "PNG I;16", "JPEG RGB rotated"..."""
    image = decode.open_image(data, FORMATS)
    if max(image.size) > MAX_SIDE:
        raise ValueError(f"{image.width} x {image.height} pixels: a JPEG has at most {MAX_SIDE} on a side")
    kind = f"{'JPEG' if image.format == 'MPO' else image.format} {image.mode}"
    return image, kind + " rotated" * _is_rotated(image)


def prepare(data: bytes, resize_short: int | None = None, quality: int = 95) -> Prepared:
    """Decode a photo and convert it if necessary (see above). If its short side is longer than `resize_short` pixels, it is
    resized to that (Lanczos). Raises ValueError or anything that Pillow raises if the photo is bad."""
    image, kind = probe(data)
    image.load()
    resized = resize_short is not None and min(image.size) > resize_short
    if kind in ("JPEG L", "JPEG RGB") and not resized:
        return Prepared(_check_readable(data, image), image.height, image.width, kind, True)
    if kind.endswith("rotated"):
        image = ImageOps.exif_transpose(image)
    image = decode.to_8_bits(_over_white(image))
    if resize_short is not None and resized:
        scale = resize_short / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    image.info.clear()  # only pixels: no comment, no profile, no second rotation
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality, subsampling=0)
    data = _check_readable(out.getvalue(), image)
    return Prepared(data, image.height, image.width, kind + " resized" * resized, False)


def inspect_existing(data: bytes) -> tuple[Image.Image, str]:
    """The photo, decoded once, and its kind, if the readers accept it unchanged: JPEG, PNG, still WebP. Otherwise raises
    ValueError with the reason, or anything that Pillow raises."""
    image, kind = probe(data)
    if image.format not in READ or (image.format == "WEBP" and getattr(image, "is_animated", False)):
        animated = " animated" * getattr(image, "is_animated", False)
        raise ValueError(f"{kind}{animated}: readers accept JPEG, PNG and still WebP; `make` converts other formats")
    image.load()
    _check_readable(data, image)
    return image, kind


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


def _is_rotated(image: Image.Image) -> bool:
    try:
        return image.getexif().get(ORIENTATION, 1) in range(2, 9)
    except Exception:  # unreadable EXIF: not rotated
        return False


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
    text = re.sub(r" at 0x[0-9a-f]+", "", " ".join(str(error).split()))
    return text or type(error).__name__
