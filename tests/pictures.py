"""Images, tars and damage for tests: every format, headers with wrong sizes, changed bytes."""

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.shards import Shards


def pixels(seed: int, height: int = 30, width: int = 40) -> np.ndarray:
    """Smooth colors that survive a JPEG: [height, width, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encoded(image: Image.Image | np.ndarray, kind: str = "JPEG", **options: object) -> bytes:
    out = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(out, kind, **options)
    return out.getvalue()


def photo(seed: int, height: int = 30, width: int = 40) -> bytes:
    return encoded(pixels(seed, height, width), quality=95, subsampling=0)


def tree(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def tar_of(files: dict[str, bytes], path: Path | None = None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(out.getvalue())
    return out.getvalue()


def iso(brand: bytes) -> bytes:
    """What begins a file of ISO's base media format: HEIC, AVIF, videos."""
    return b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic" + bytes(300)


# ---- what `make shards` has written


def listed(folder: Path) -> dict[str, str]:
    """{name: kind} of skipped.jsonl."""
    rows = map(json.loads, (folder / "skipped.jsonl").read_text().splitlines())
    return {row["source"]: row["kind"] for row in rows}


def labels_of(folder: Path) -> dict[bytes, str | None]:
    """{photo: name of its class}, read as the trainer does."""
    shards = Shards(folder)
    named = [*shards.classes, None]  # label -1 is the last
    return {shards.read(i): named[int(label)] for i, label in enumerate(shards.index["label"])}


# ---- PNG


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(samples: np.ndarray, color: int, depth: int, *chunks: tuple[bytes, bytes], interlaced: bool = False) -> bytes:
    """A PNG of samples [H,W,C]: its color type, bits a value, chunks before the pixels, and Adam7 or not."""

    def lines(part: np.ndarray) -> bytes:
        out = b""
        for line in part.reshape(len(part), -1):
            if depth == 16:
                packed = line.astype(">u2").tobytes()
            else:
                packed = np.packbits(((line[:, None] >> np.arange(depth)[::-1]) & 1).astype(np.uint8)).tobytes()
            out += b"\0" + packed
        return out

    adam7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    passes = adam7 if interlaced else [(0, 0, 1, 1)]
    body = b"".join(lines(samples[y::dy, x::dx]) for x, y, dx, dy in passes)
    head = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], depth, color, 0, 0, interlaced)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(body)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


# ---- headers with more pixels than the file holds


def packed_zeros(block: int, times: int) -> bytes:
    """zlib's stream of block x times zeros, a thousandth of that in bytes; made without compressing all of them."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    one = packer.compress(bytes(block)) + packer.flush(zlib.Z_FULL_FLUSH)  # after which a copy may follow
    adler = (block * times % 65521) << 16 | 1
    return b"\x78\xda" + one * times + b"\x03\0" + struct.pack(">I", adler)


def png_bomb(width: int, height: int) -> bytes:
    """A gray PNG of width x height black pixels, a thousandth of that in bytes: DALI took 12 GB for it."""

    lines = packed_zeros(100 * (1 + width), height // 100)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def lying_jpeg(width: int, height: int) -> bytes:
    """A small JPEG whose frame header says width x height pixels."""
    data = bytearray(photo(1))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def webp_bomb(side: int = 16384) -> bytes:
    """An animated WebP of one small frame on a canvas of side x side pixels."""
    three = lambda n: struct.pack("<I", n)[:3]  # noqa: E731
    frame = three(0) * 2 + three(39) + three(29) + bytes(4) + encoded(pixels(1), "WEBP", lossless=True)[12:]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + three(side - 1) * 2
    body += b"ANIM" + struct.pack("<I", 6) + bytes(6) + b"ANMF" + struct.pack("<I", len(frame)) + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff_bomb(side: int = 30000) -> bytes:
    """A TIFF of side x side pixels, all of them in one deflated strip of some kilobytes."""
    strip = packed_zeros(100 * side, side // 100)
    entries = [
        (256, 4, side), (257, 4, side), (258, 3, 8), (259, 3, 8), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 4, side),
        (279, 4, len(strip)),
    ]  # fmt: skip
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + directory


# ---- damage


def overwrite(folder: Path, sample: int, data: bytes, *, indexed: bool = False) -> bytes:
    """Overwrite a sample, padded with zeros to its size. `indexed`: write the index as if it had always held these bytes.
    Returns the bytes before."""
    shards = Shards(folder, max_missing=None)
    row = shards.index[sample]
    size = int(row["size"])
    assert len(data) <= size
    before = shards.read(sample)
    with (folder / shards.shards[int(row["shard"])]["name"]).open("r+b") as file:
        file.seek(int(row["offset"]))
        file.write(data.ljust(size, b"\0"))
    if indexed:
        index = np.load(folder / "index.npy")
        index["crc32"][sample] = zlib.crc32(data.ljust(size, b"\0"))
        np.save(folder / "index.npy", index)
    return before
