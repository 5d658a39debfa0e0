"""F07: odd picture formats. Each has a defined result, docs/data.md's table, and the readers agree on it.

`make` turns what is no plain upright JPEG into one; `index` adopts a tar's JPEG, PNG and still WebP files as they are, and
refuses the rest by name. Every view of what is in a shard differs by at most 2 of 255 in the mean between DALI (on the CPU)
and the WebDataset reader; so does the whole picture from what the table says.
"""

import importlib.util
import io
import json
import struct
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import run_program
from pictures import encoded, pixels, tar_of, tree
from PIL import Image

from pipeline import decode as decoding
from pipeline.readers import webdataset
from pipeline.shards import Plan, Shards
from runtime.config import load_config


class Format(NamedTuple):
    data: bytes
    ending: str
    kind: str  # in the manifest, what it was
    made: np.ndarray  # [H,W,3] what is in the shards that `make` made
    adopted: np.ndarray | str  # the same for `index`; or why it refuses
    kept: bool = False  # byte for byte, by `make`


def formats() -> dict[str, Format]:
    rgb = pixels(1, 60, 80)
    image = Image.fromarray(rgb)
    gray = np.asarray(image.convert("L"))
    gray3 = np.asarray(image.convert("L").convert("RGB"))
    see_through = np.where(np.arange(80) < 40, 255, 0)[None].repeat(60, 0).astype(np.uint8)
    half = Image.fromarray(np.dstack([rgb, see_through]))
    over_white = np.where(see_through[..., None] > 0, rgb, 255)
    deep = np.linspace(0, 65535, 60 * 80).astype(np.uint16).reshape(60, 80)
    high = (deep >> 8).astype(np.uint8)[..., None].repeat(3, 2)
    palette = Image.fromarray(pixels(2, 1, 80).repeat(60, 0)).quantize(256)  # 80 colors, none of them lost
    of_palette = np.asarray(palette.convert("RGB"))
    turned = Image.Exif()
    turned[0x0112] = 6  # turn clockwise to view
    long = pixels(3, 5000, 1)
    moving = {"save_all": True, "append_images": [palette.rotate(180)]}
    convert = "readers take JPEG, PNG and still WebP; `make` of the photos converts it"
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
        "exif 6": Format(encoded(rgb, exif=turned, quality=95), "jpg", "JPEG RGB rotated", np.rot90(rgb, -1), rgb),
        "progressive": Format(encoded(rgb, progressive=True, quality=95), "jpg", "JPEG RGB", rgb, rgb, True),
        "1 x 5000": Format(encoded(long, quality=95), "jpg", "JPEG RGB", long, long, True),
    }


FORMATS = formats()
CASES = [pytest.param(name, marks=[pytest.mark.fault("F07"), pytest.mark.fast]) for name in FORMATS]


class Seen(NamedTuple):
    photo: bytes
    views: dict[str, list[np.ndarray]]  # by reader


def read(folder: Path, config_of: Path) -> dict[int, Seen]:
    """{label: what the readers make of the photo}, each photo a batch of its own, so that none stands in for another."""
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
    """One `make` and one `index` of all formats, each a class of its own, and what the readers see."""
    folder = tmp_path_factory.mktemp("formats")
    names = sorted(FORMATS)
    tree(folder / "src", {f"{name}/0.{FORMATS[name].ending}": FORMATS[name].data for name in names})
    run_program("-m", "tools.make_shards", "make", folder / "src", folder / "made", "--processes", "1")
    files: dict[str, bytes] = {}
    for i, name in enumerate(names):
        ending = FORMATS[name].ending if FORMATS[name].ending in ("jpg", "png", "webp") else "jpg"
        files |= {f"{i}.{ending}": FORMATS[name].data, f"{i}.cls": b"%d" % i}
    tar_of(files, folder / "adopted" / "all.tar")
    told = run_program("-m", "tools.make_shards", "index", folder / "adopted", "--max-bad", "0.5", "--processes", "1")
    config = folder / "views.yaml"
    config.write_text(
        "data: {views: [{count: 2, size: 32, scale: [0.4, 1.0], teacher: true}, {count: 2, size: 16}]}\n"
        "model: {arch: custom, patch: 8, width: 24, depth: 2, heads: 2}\nspeed: {compile: false, workers: 0}\n"
    )
    made, adopted = read(folder / "made", config), read(folder / "adopted", config)
    return folder, {n: made.get(i) for i, n in enumerate(names)}, {n: adopted.get(i) for i, n in enumerate(names)}, told


def check(seen: Seen, wanted: np.ndarray) -> None:
    got = webdataset.decode(seen.photo).permute(1, 2, 0).numpy()
    assert got.shape == wanted.shape
    assert np.abs(got.astype(int) - wanted).mean() <= 2
    for reader in seen.views:
        for ours, theirs in zip(seen.views["wds"], seen.views[reader], strict=True):
            assert np.abs(ours - theirs).mean((2, 3, 4)).max() <= 2, reader


@pytest.mark.parametrize("name", CASES)
def test_a_format(name, folders, monkeypatch):
    folder, made, adopted, told = folders
    wanted = FORMATS[name]
    check(made[name], wanted.made)
    assert made[name].photo.startswith(b"\xff\xd8\xff")
    assert (made[name].photo == wanted.data) == wanted.kept
    manifest = Shards(folder / "made").manifest
    assert manifest["kept" if wanted.kept else "converted"][wanted.kind] >= 1
    if isinstance(wanted.adopted, str):
        assert adopted[name] is None
        reasons = dict(json.loads(line).values() for line in (folder / "adopted/rejected.jsonl").open())
        assert reasons[f"all.tar/{sorted(FORMATS).index(name)}.jpg"] == wanted.adopted
        assert "rejected 4 (rejected.jsonl)" in told.stdout
    else:
        assert adopted[name].photo == wanted.data
        assert Shards(folder / "adopted").manifest["kept"][wanted.kind] >= 1
        check(adopted[name], wanted.adopted)
        with monkeypatch.context() as patch, warnings.catch_warnings():  # Pillow stands in where torchcodec is missing
            patch.setattr(decoding, "load_torchcodec", lambda: None)
            check(adopted[name], wanted.adopted)


def test_what_adopted_photos_lack_is_said(folders):
    assert "1 photos carry an EXIF rotation that no reader here applies; `make` of the photos does" in folders[3].stdout


def exif(entries: bytes, count: int, marker: bytes = b"Exif\0\0") -> bytes:
    """A JPEG with this as the first of its segments: `count` EXIF entries are promised, these bytes come."""
    told = marker + b"II*\0" + struct.pack("<IH", 8, count) + entries
    data = encoded(pixels(1, 60, 80), quality=95)
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(told) + 2) + told + data[2:]


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
def test_exif_turns_no_photo_in_a_reader(data):
    """Nor does EXIF that Pillow, torchcodec and DALI understand each in another way."""
    want = np.asarray(Image.open(io.BytesIO(encoded(pixels(1, 60, 80), quality=95))))
    assert np.array_equal(webdataset.decode(data).permute(1, 2, 0).numpy(), want)
