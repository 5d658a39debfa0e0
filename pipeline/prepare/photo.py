"""What becomes of one photo: looked at, decoded whole, kept as it is or made a plain JPEG.

Its bytes are kept where they are a JPEG of 8 bits, gray or color, that stands upright. All else is made such a JPEG, with
full color resolution (4:4:4). The pixels are those of the readers' own decoder (pipeline/decode.py), but that two things are
done to them that no reader does:
  EXIF rotation                  applied to the pixels
  transparency                   over white
TIFF, BMP and GIF are converted too, of all formats the first frame. Pixels that `decode.to_8_bits` refuses are refused.
A photo that others put into a tar stays as it is, or is refused: see `inspect_existing`. docs/data.md has both as one table.
"""

import io
import re
import warnings
from typing import NamedTuple

from PIL import Image, ImageOps

from pipeline import decode

READ = (*decode.FORMATS, "MPO")  # what the readers decode; MPO is a JPEG with more behind it
FORMATS = (*decode.FORMATS, "TIFF", "BMP", "GIF")
LONGEST_SIDE = 65500  # pixels that libjpeg takes


class Ready(NamedTuple):
    """A photo as it goes into a shard."""

    data: bytes
    height: int
    width: int
    kind: str
    kept: bool  # the bytes are the source's


def bound_pixels(at_most: int) -> None:
    """From here on Image.open refuses a header that promises more pixels, and says nothing else."""
    Image.MAX_IMAGE_PIXELS = at_most
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", Image.DecompressionBombWarning)


def look(data: bytes) -> tuple[Image.Image, str]:
    """The photo with only its header read, and its kind: "JPEG RGB", "PNG I;16", "JPEG RGB rotated"..."""
    image = decode.open_image(data, FORMATS)
    if max(image.size) > LONGEST_SIDE:
        raise ValueError(f"{image.width} x {image.height} pixels: a JPEG has at most {LONGEST_SIDE} on a side")
    kind = f"{'JPEG' if image.format == 'MPO' else image.format} {image.mode}"
    return image, kind + " rotated" * _is_rotated(image)


def prepare(data: bytes, resize_short: int | None = None, quality: int = 95) -> Ready:
    """Decode a photo and bring it into the form of a shard (see above); what is longer on its short side than
    `resize_short` pixels, to that (Lanczos). Raises whatever Pillow raises if the photo is bad."""
    image, kind = look(data)
    image.load()
    resized = resize_short is not None and min(image.size) > resize_short
    if kind in ("JPEG L", "JPEG RGB") and not resized:
        return Ready(_readable(data, image), image.height, image.width, kind, True)
    if kind.endswith("rotated"):
        image = ImageOps.exif_transpose(image)
    image = decode.to_8_bits(_over_white(image))
    if resize_short is not None and resized:
        scale = resize_short / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    image.info.clear()  # nothing but pixels: no comment, no profile, no second rotation
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality, subsampling=0)
    data = _readable(out.getvalue(), image)
    return Ready(data, image.height, image.width, kind + " resized" * resized, False)


def inspect_existing(data: bytes) -> tuple[Image.Image, str]:
    """The photo, decoded once, and its kind, where the readers take it as it is: JPEG, PNG, still WebP. Raises ValueError
    with the reason where they do not, or whatever Pillow raises if it is bad."""
    image, kind = look(data)
    if image.format not in READ or (image.format == "WEBP" and getattr(image, "is_animated", False)):
        moves = " animated" * getattr(image, "is_animated", False)
        raise ValueError(f"{kind}{moves}: readers take JPEG, PNG and still WebP; `make` of the photos converts it")
    image.load()
    _readable(data, image)
    return image, kind


def _readable(data: bytes, image: Image.Image) -> bytes:
    """The same bytes. Raises ValueError where a reader would refuse them (pipeline/shards.py, `fault`)."""
    if decode.read_header(data) != (image.height, image.width):
        raise ValueError(f"its header tells no size, or another one than the {image.height} x {image.width} decoded")
    if image.height * image.width > decode.MAX_PIXELS:
        told = f"{image.height} x {image.width} pixels, more than a reader takes ({decode.MAX_PIXELS:,})"
        raise ValueError(f"{told}; --resize-short makes it smaller")
    return data


def _is_rotated(image: Image.Image) -> bool:
    try:
        return image.getexif().get(0x0112, 1) in range(2, 9)  # 0x0112: orientation
    except Exception:  # EXIF that cannot be read rotates nothing
        return False


def _over_white(image: Image.Image) -> Image.Image:
    """The photo without transparency."""
    if not image.has_transparency_data or image.mode.startswith("I;16"):  # Pillow composites 8 bits only
        return image
    gray, image = image.mode in ("1", "L", "LA"), image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if gray else "RGB")


def decode_error(error: Exception) -> str:
    """The reason for rejected.jsonl: one line, the same in every run."""
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        pixels = re.search(r"\d+", str(error))
        return f"{pixels[0] if pixels else 'too many'} pixels by its header, more than --max-pixels"
    text = re.sub(r" at 0x[0-9a-f]+", "", " ".join(str(error).split()))
    return text or type(error).__name__
