"""Photos of twelve formats, and mutations of them as disks, networks and broken programs make them."""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from tests.pictures import chunk, encoded, pixels, png

HEIGHT, WIDTH = 48, 64


def photos() -> dict[str, bytes]:
    """A photo of each format: colors and a little noise, so that its pixels take more bytes than its header."""
    noise = np.random.default_rng(0).integers(-20, 20, (HEIGHT, WIDTH, 3))
    rgb = np.clip(pixels(1, HEIGHT, WIDTH) + noise, 0, 255).astype(np.uint8)
    image = Image.fromarray(rgb)
    gray = image.convert("L")
    rotated = Image.Exif()
    rotated[0x0112] = 6
    return {
        "jpeg": encoded(rgb, quality=90, subsampling=2),
        "jpeg progressive": encoded(rgb, quality=90, progressive=True),
        "jpeg gray": encoded(gray, quality=90),
        "jpeg CMYK": encoded(image.convert("CMYK"), quality=90),
        "jpeg rotated": encoded(rgb, quality=90, exif=rotated),
        "jpeg with restarts": encoded(rgb, quality=90, restart_marker_blocks=4),
        "png": encoded(rgb, "PNG"),
        "png palette": encoded(image.quantize(64), "PNG"),
        "png of 16 bits": encoded(Image.fromarray(np.asarray(gray).astype(np.uint16) * 257), "PNG"),
        "png interlaced": png(rgb, 2, 8, interlaced=True),
        "webp": encoded(rgb, "WEBP", quality=90),
        "webp lossless": encoded(rgb, "WEBP", lossless=True),
    }


def mutations(number: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """(what was done to which photo, its bytes), `number` of them, the same for the same seed."""
    found = photos()
    for i in range(number):
        rng = np.random.default_rng((seed, i))
        name = [*found][i % len(found)]
        turn = i // len(found)
        how, data = _mutate(found[name], turn % 5, rng)
        if name.startswith("png") and turn % 2:
            how, data = f"{how}, checksums made right", with_right_checksums(data)
        yield f"mutation {i}: {name}, {how}", data


def _mutate(photo: bytes, kind: int, rng: np.random.Generator) -> tuple[str, bytes]:
    data = bytearray(photo)
    at = int(rng.integers(2, len(data)))
    if kind == 0:
        data[at] = int(rng.integers(256))
        return f"byte {at} is {data[at]}", bytes(data)
    if kind == 1:
        data[at] ^= 1 << int(rng.integers(8))
        return f"a bit of byte {at} is flipped", bytes(data)
    if kind == 2:
        return f"cut at byte {at}", bytes(data[:at])
    size = int(min(2 ** rng.integers(1, 10), len(data) - at))
    if kind == 3:
        data[at : at + size] = bytes(size)
        return f"{size} zeros at byte {at}", bytes(data)
    other = int(rng.integers(2, len(data) - size + 1))
    data[at : at + size], data[other : other + size] = data[other : other + size], data[at : at + size]
    return f"{size} bytes at byte {at} exchanged with those at byte {other}", bytes(data[: len(photo)])


def with_right_checksums(png: bytes) -> bytes:
    """A mutated PNG as a broken program writes it: whatever its chunks hold, their checksums agree."""
    out, at = png[:8], 8
    while at + 12 <= len(png):
        end = at + 8 + int.from_bytes(png[at : at + 4], "big")
        if end + 4 > len(png):
            break
        out, at = out + chunk(png[at + 4 : at + 8], png[at + 8 : end]), end + 4
    return out + png[at:]
