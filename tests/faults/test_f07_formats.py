"""F07: unusual image formats. Each has a defined result, the table in docs/reference/formats.md, and the readers
agree on it.

`make` converts everything but plain upright JPEGs; `index` keeps a tar's JPEG, PNG and still WebP files unchanged, and lists
the rest as rejected. Views from DALI (on the CPU) and the WebDataset reader differ by at most 2 of 255 in the mean; so does
the whole image from what the table says.
"""

import importlib.util
import io
import json
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import run_program
from pictures import encoded, pixels, tar_of, tree
from PIL import Image

from pipeline import decode as decoding
from pipeline.plan import Plan
from pipeline.readers import webdataset
from pipeline.shards import Shards
from runtime.config import load_config


class Format(NamedTuple):
    data: bytes
    ending: str
    kind: str  # in the manifest, what it was
    made: np.ndarray  # [H,W,3] in the shards of `make`
    indexed: np.ndarray | str  # the same for `index`; or why it refuses the photo
    kept: bool = False  # byte for byte, by `make`


def formats() -> dict[str, Format]:
    rgb = pixels(1, 60, 80)
    image = Image.fromarray(rgb)
    gray = np.asarray(image.convert("L"))
    gray3 = np.asarray(image.convert("L").convert("RGB"))
    alpha = np.where(np.arange(80) < 40, 255, 0)[None].repeat(60, 0).astype(np.uint8)
    half = Image.fromarray(np.dstack([rgb, alpha]))
    over_white = np.where(alpha[..., None] > 0, rgb, 255)
    deep = np.linspace(0, 65535, 60 * 80).astype(np.uint16).reshape(60, 80)
    high = (deep >> 8).astype(np.uint8)[..., None].repeat(3, 2)
    palette = Image.fromarray(pixels(2, 1, 80).repeat(60, 0)).quantize(256)  # 80 colors, none of them lost
    of_palette = np.asarray(palette.convert("RGB"))
    rotated = Image.Exif()
    rotated[0x0112] = 6  # turn clockwise to view
    long = pixels(3, 5000, 1)
    moving = {"save_all": True, "append_images": [palette.rotate(180)]}
    convert = "readers accept JPEG, PNG and still WebP; `make` converts other formats"
    return {
        "png": Format(encoded(rgb, "PNG"), "png", "PNG RGB", rgb, rgb),
        "png called jpg": Format(encoded(rgb, "PNG"), "jpg", "PNG RGB", rgb, rgb),
        "cmyk": Format(encoded(image.convert("CMYK"), quality=95), "jpg", "JPEG CMYK", rgb, rgb),
        "gray": Format(encoded(gray, quality=95), "jpg", "JPEG L", gray3, gray3, True),
        "gray of 16 bits": Format(encoded(Image.fromarray(deep), "PNG"), "png", "PNG I;16", high, high),
        "rgba": Format(encoded(half, "PNG"), "png", "PNG RGBA", over_white, rgb),
        "palette": Format(encoded(palette, "PNG"), "png", "PNG P", of_palette, of_palette),
        "gif": Format(encoded(palette, "GIF"), "gif", "GIF P", of_palette, f"GIF P: {convert}"),
        "gif, animated": Format(
            encoded(palette, "GIF", **moving), "gif", "GIF P", of_palette, f"GIF P animated: {convert}"
        ),
        "webp": Format(encoded(rgb, "WEBP", quality=95), "webp", "WEBP RGB", rgb, rgb),
        "tiff": Format(encoded(rgb, "TIFF"), "tif", "TIFF RGB", rgb, f"TIFF RGB: {convert}"),
        "bmp": Format(encoded(rgb, "BMP"), "bmp", "BMP RGB", rgb, f"BMP RGB: {convert}"),
        "exif 6": Format(encoded(rgb, exif=rotated, quality=95), "jpg", "JPEG RGB rotated", np.rot90(rgb, -1), rgb),
        "progressive": Format(encoded(rgb, progressive=True, quality=95), "jpg", "JPEG RGB", rgb, rgb, True),
        "1 x 5000": Format(encoded(long, quality=95), "jpg", "JPEG RGB", long, long, True),
    }


FORMATS = formats()
CASES = [pytest.param(name, marks=[pytest.mark.fault("F07"), pytest.mark.fast]) for name in FORMATS]


class Seen(NamedTuple):
    photo: bytes
    views: dict[str, list[np.ndarray]]  # by reader


def read(folder: Path, config_of: Path) -> dict[int, Seen]:
    """{label: what the readers return}, each photo a batch of its own, so that none replaces another."""
    config = load_config(
        config_of, ["optim.global_batch_size=1", "data.holdout=0", "speed.dali_threads=1", f"data.shards={folder}"]
    )
    shards = Shards(folder)
    plan = Plan(shards, batch=1, seed=0)
    views: dict[int, dict[str, list[np.ndarray]]] = {i: {} for i in range(len(shards))}
    readers = {"wds": webdataset.read}
    if importlib.util.find_spec("nvidia.dali"):
        from pipeline.readers import dali

        readers["dali"] = dali.read
    for name, reader in readers.items():
        for batch in reader(config, shards, plan, start=0, stop=len(shards)):
            assert batch.ids.tolist() == batch.rows.tolist(), f"{name} refuses a photo"
            views[int(batch.rows[0])][name] = [v.float().numpy() for v in batch.views]
    return {int(shards.index["label"][i]): Seen(shards.read(i), views[i]) for i in range(len(shards))}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_shards):
    """One `make` and one `index` of all formats, each a class of its own, and what the readers return."""
    folder = tmp_path_factory.mktemp("formats")
    names = sorted(FORMATS)
    tree(folder / "src", {f"{name}/0.{FORMATS[name].ending}": FORMATS[name].data for name in names})
    run_program("-m", "tools.make_shards", "make", folder / "src", folder / "made", "--processes", "1")
    files: dict[str, bytes] = {}
    for i, name in enumerate(names):
        ending = FORMATS[name].ending if FORMATS[name].ending in ("jpg", "png", "webp") else "jpg"
        files |= {f"{i}.{ending}": FORMATS[name].data, f"{i}.cls": b"%d" % i}
    tar_of(files, folder / "indexed" / "all.tar")
    output = run_program("-m", "tools.make_shards", "index", folder / "indexed", "--max-bad", "0.5", "--processes", "1")
    config = folder / "views.yaml"
    config.write_text(
        "data: {views: [{count: 2, size: 32, scale: [0.4, 1.0], teacher: true}, {count: 2, size: 16}]}\n"
        "model: {arch: custom, patch: 8, width: 24, depth: 2, heads: 2}\nspeed: {compile: false, workers: 0}\n"
    )
    made, indexed = read(folder / "made", config), read(folder / "indexed", config)
    return (
        folder,
        {n: made.get(i) for i, n in enumerate(names)},
        {n: indexed.get(i) for i, n in enumerate(names)},
        output,
    )


def check(seen: Seen, expected: np.ndarray) -> None:
    got = decoding.decode(seen.photo).permute(1, 2, 0).numpy()
    assert got.shape == expected.shape
    assert np.abs(got.astype(int) - expected).mean() <= 2
    for reader in seen.views:
        for ours, theirs in zip(seen.views["wds"], seen.views[reader], strict=True):
            assert np.abs(ours - theirs).mean((2, 3, 4)).max() <= 2, reader


@pytest.mark.parametrize("name", CASES)
def test_a_format(name, folders):
    folder, made, indexed, output = folders
    expected = FORMATS[name]
    check(made[name], expected.made)
    assert made[name].photo.startswith(b"\xff\xd8\xff")
    assert (made[name].photo == expected.data) == expected.kept
    manifest = Shards(folder / "made").manifest
    assert manifest["kept" if expected.kept else "converted"][expected.kind] >= 1
    if isinstance(expected.indexed, str):
        assert indexed[name] is None
        reasons = dict(json.loads(line).values() for line in (folder / "indexed/rejected.jsonl").open())
        assert reasons[f"all.tar/{sorted(FORMATS).index(name)}.jpg"] == expected.indexed
        assert "rejected 4 (rejected.jsonl)" in output.stdout
    else:
        assert indexed[name].photo == expected.data
        assert Shards(folder / "indexed").manifest["kept"][expected.kind] >= 1
        check(indexed[name], expected.indexed)


def test_index_reports_exif_rotation(folders):
    line = "1 photo with EXIF rotation, which the readers do not apply; `make` from photos does"
    assert line in folders[3].stdout


def exif(entries: bytes, count: int, marker: bytes = b"Exif\0\0") -> bytes:
    """A JPEG with this as the first of its segments: it says `count` EXIF entries and holds these bytes."""
    segment = marker + b"II*\0" + struct.pack("<IH", 8, count) + entries
    data = encoded(pixels(1, 60, 80), quality=95)
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:]


@pytest.mark.parametrize(
    "data",
    [
        exif(struct.pack("<HHIHHI", 0x0112, 3, 1, 6, 0, 0), 1),
        exif(struct.pack("<HHIHHI", 0x0112, 1, 1, 6, 0, 0), 1),  # as a byte
        exif(struct.pack("<HHIHHI", 0x0112, 3, 0, 6, 0, 0), 1),  # no value
        exif(struct.pack("<HHIHHI", 0x0112, 3, 1, 6, 0, 0), 30),  # cut
        exif(struct.pack("<HHIHHI", 0x0112, 3, 1, 6, 0, 0), 1, b"other\0"),
    ],
)
def test_readers_do_not_apply_exif(data):
    """Nor EXIF that Pillow, torchcodec and DALI each interpret differently."""
    expected = np.asarray(Image.open(io.BytesIO(encoded(pixels(1, 60, 80), quality=95))))
    assert np.array_equal(decoding.decode(data).permute(1, 2, 0).numpy(), expected)
