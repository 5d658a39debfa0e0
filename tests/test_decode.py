"""One decoder: every format has the same pixels in each program that opens photos, and bad bytes give the same error.

docs/reference/formats.md says how each format is decoded. The references here do not come from pipeline/decode.py: they are
the arrays that a lossless file was written from, and Pillow's own conversion of a lossy one. Long: half of it writes the
files of odd formats that every case reads.
"""

import importlib.util
import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT, run_program
from pictures import encoded, lying_jpeg, pixels, png, png_bomb, tar_of, tree, webp_bomb
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as transform

from eval.datasets import LabeledPhotos, VocSegmentation, center_crop
from pipeline.decode import (
    MAX_PIXELS,
    DecodeError,
    check_header,
    decode,
    decode_array,
    for_dali,
    read_header,
)
from pipeline.plan import Plan
from pipeline.readers import webdataset
from pipeline.readers.worker import crop_resize
from pipeline.shards import Shards
from runtime.config import load_config
from runtime.errors import UserError
from tools.show.photos import read_photo
from tools.show.views import valid_samples

HEIGHT, WIDTH = 60, 80
RGB = pixels(1, HEIGHT, WIDTH)
GRAY = np.asarray(Image.fromarray(RGB).convert("L"))
RAMP = np.linspace(0, 255, WIDTH).astype(np.uint8)[None].repeat(HEIGHT, 0)  # transparency
MOVING = {"save_all": True, "append_images": [Image.fromarray(RGB).rotate(180)]}
SIZE = 32  # of a view, and of a picture for evaluation


class Odd(NamedTuple):
    data: bytes
    decoded: np.ndarray  # [H,W,3] for the readers, evaluation and the picture tools
    made: np.ndarray  # [H,W,3] in the shards of `make shards`, up to JPEG


# ----------------------------------------------------------------------------------------------- files with odd formats


def three(gray: np.ndarray) -> np.ndarray:
    return np.dstack([gray] * 3).astype(np.uint8)


def over_white(colors: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return np.round(colors * share + 255 * (1 - share)).astype(np.uint8)


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x0112] = orientation
    return made


def png_files() -> dict[str, Odd]:
    noise = np.random.default_rng(0)
    gray16 = GRAY.astype(int) * 256 + noise.integers(0, 256, GRAY.shape)
    rgb16 = RGB.astype(int) * 256 + noise.integers(0, 256, RGB.shape)
    alpha16 = RAMP.astype(int) * 257
    gray, gray_clear, rgb_clear = three(GRAY), over_white(three(GRAY), RAMP), over_white(RGB, RAMP)
    # name: samples, color type, bits a value, decoded, made, chunks
    kinds: dict[str, tuple] = {
        "gray of 16 bits": (gray16[..., None], 0, 16, gray, gray),
        "color": (RGB, 2, 8, RGB, RGB),
        "color of 16 bits": (rgb16, 2, 16, RGB, RGB),
        "LA": (np.dstack([GRAY, RAMP]), 4, 8, gray, gray_clear),
        "LA of 16 bits": (np.dstack([gray16, alpha16]), 4, 16, gray, gray_clear),
        "RGBA": (np.dstack([RGB, RAMP]), 6, 8, RGB, rgb_clear),
        "RGBA of 16 bits": (np.dstack([rgb16, alpha16]), 6, 16, RGB, rgb_clear),
    }
    for bits in (1, 2, 4, 8):
        few = GRAY >> (8 - bits)
        shown = three(few * (255 // (2**bits - 1)))
        kinds[f"gray of {bits} bits"] = few[..., None], 0, bits, shown, shown
        palette = Image.fromarray(RGB).quantize(2**bits)
        index, shown = np.asarray(palette), np.asarray(palette.convert("RGB"))
        colors = np.array(palette.getpalette(), np.uint8)[: 3 * 2**bits]
        alpha = np.linspace(0, 255, len(colors) // 3).astype(np.uint8)
        plte, trns = (b"PLTE", colors.tobytes()), (b"tRNS", alpha.tobytes())
        kinds[f"palette of {bits} bits"] = index[..., None], 3, bits, shown, shown, plte
        clear = over_white(shown, alpha[index])
        kinds[f"palette of {bits} bits, transparent"] = index[..., None], 3, bits, shown, clear, plte, trns
    kinds |= {f"{name}, interlaced": (*kind, True) for name, kind in kinds.items()}

    # one transparent value
    clear = np.where(GRAY[3, 3] == GRAY, 255, GRAY)
    trns = b"tRNS", struct.pack(">H", GRAY[3, 3])
    kinds["gray, transparent"] = GRAY[..., None], 0, 8, gray, three(clear), trns
    trns = b"tRNS", struct.pack(">H", gray16[3, 3])  # of 16 bits: `make shards` drops it too
    kinds["gray of 16 bits, transparent"] = gray16[..., None], 0, 16, gray, gray, trns
    clear = np.where((RGB[3, 3] == RGB).all(-1, keepdims=True), 255, RGB)
    trns = b"tRNS", struct.pack(">HHH", *RGB[3, 3].tolist())
    kinds["color, transparent"] = RGB, 2, 8, RGB, clear, trns
    kinds["color of another gamma"] = RGB, 2, 8, RGB, RGB, (b"gAMA", struct.pack(">I", 100_000))

    found = {
        f"png {name}": Odd(
            png(samples, color, depth, *(c for c in more if c is not True), interlaced=True in more), seen, made
        )
        for name, (samples, color, depth, seen, made, *more) in kinds.items()
    }
    deep = Image.fromarray(gray16.astype(np.uint16))
    found["png, exif 6"] = Odd(encoded(RGB, "PNG", exif=exif(6)), RGB, np.rot90(RGB, -1))
    found["png gray of 16 bits, exif 6"] = Odd(encoded(deep, "PNG", exif=exif(6)), gray, np.rot90(gray, -1))
    found["png, animated"] = Odd(encoded(RGB, "PNG", **MOVING), RGB, RGB)
    return found


def cmyk_files() -> dict[str, bytes]:
    """CMYK and YCCK as Photoshop writes them, inverted behind Adobe's marker; and without the marker."""
    black = (255 - RGB).min(-1) // 2
    inks = np.dstack([255 - RGB - black[..., None], black]).astype(np.uint8)
    cmyk = encoded(Image.frombytes("CMYK", (WIDTH, HEIGHT), inks.tobytes()), quality=95)
    at = cmyk.index(b"\xff\xee")
    bare = cmyk[:at] + cmyk[at + 2 + struct.unpack_from(">H", cmyk, at + 2)[0] :]
    # In YCCK the first three values are those of the inverted inks, as Y, Cb and Cr. Pillow inverts what it writes.
    luma = np.asarray(Image.fromarray(255 - inks[..., :3]).convert("YCbCr"))
    stored = np.dstack([luma, 255 - inks[..., 3]])
    as_cmyk = bytearray(encoded(Image.frombytes("CMYK", (WIDTH, HEIGHT), (255 - stored).tobytes()), quality=95))
    as_cmyk[as_cmyk.index(b"Adobe") + 11] = 2  # the transform: YCCK
    return {"jpeg CMYK": cmyk, "jpeg CMYK without Adobe's marker": bare, "jpeg YCCK": bytes(as_cmyk)}


def lossy_files() -> dict[str, bytes]:
    rgba = Image.fromarray(np.dstack([RGB, RAMP]))
    jpeg = encoded(RGB, quality=95)
    return cmyk_files() | {
        "jpeg": jpeg,
        "jpeg 4:2:0": encoded(RGB[:57, :77], quality=90, subsampling=2),
        "jpeg 4:2:2": encoded(RGB, quality=90, subsampling=1),
        "jpeg gray": encoded(GRAY, quality=95),
        "jpeg progressive": encoded(RGB, quality=95, progressive=True),
        "jpeg with restarts": encoded(RGB, quality=95, restart_marker_blocks=4),
        "jpeg stored as RGB": encoded(RGB, quality=95, keep_rgb=True),
        "jpeg, two pictures": encoded(RGB, "MPO", quality=95, **MOVING),
        "jpeg, exif 6": encoded(RGB, quality=95, exif=exif(6)),
        "jpeg gray, exif 3": encoded(GRAY, quality=95, exif=exif(3)),
        "jpeg with bytes behind it": jpeg + bytes(100),
        "jpeg, broken color profile": jpeg[:2] + b"\xff\xe2\0\x14ICC_PROFILE\0\7\3    " + jpeg[2:],
        "jpeg with bytes between segments": jpeg[:20] + b"abc" + jpeg[20:],
        "webp": encoded(RGB, "WEBP", quality=95),
        "webp with alpha": encoded(rgba, "WEBP", quality=95, exact=True),
        "webp, lossless": encoded(RGB, "WEBP", lossless=True),
        "webp, lossless, with alpha": encoded(rgba, "WEBP", lossless=True, exact=True),
        "webp, exif 6": encoded(RGB, "WEBP", quality=95, exif=exif(6)),
        "webp, lossless, exif 6": encoded(RGB, "WEBP", lossless=True, exif=exif(6)),  # DALI refuses it
    }


def odd_files() -> dict[str, Odd]:
    found = png_files()
    for name, data in lossy_files().items():
        image = Image.open(io.BytesIO(data))
        seen = np.asarray(image.convert("RGB"))
        made = over_white(seen, np.asarray(image)[..., 3]) if image.mode == "RGBA" else seen
        made = np.rot90(made, -1) if "exif 6" in name else np.rot90(made, 2) if "exif 3" in name else made
        found[name] = Odd(data, seen, made)
    return dict(sorted(found.items()))


FILES = odd_files()
every_format = pytest.mark.parametrize("name", FILES)


def difference(ours: np.ndarray | Tensor, theirs: np.ndarray | Tensor) -> float:
    """The mean difference of two images of the same shape, of 255."""
    assert ours.shape == theirs.shape
    return float(np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).mean())


def tensor(picture: np.ndarray) -> Tensor:
    """[H,W,3] -> [3,H,W]"""
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)


class Programs(NamedTuple):
    folder: Path
    indexed: Shards  # sample i is file i
    made: dict[str, bytes]
    views: dict[str, dict[str, tuple[Tensor, Tensor]]]  # by reader and file: windows [V,4], views [V,S,S,3]


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Programs:
    """`make shards` and `make index` of all files, and each reader's views of the latter."""
    folder = tmp_path_factory.mktemp("decode")
    files, members = {}, {}
    for i, (name, odd) in enumerate(FILES.items()):
        ending = name[:4].strip(", ").replace("jpeg", "jpg")
        files[f"{i:03d}/{i:03d}.{ending}"] = odd.data
        members |= {f"{i:03d}.{ending}": odd.data, f"{i:03d}.cls": b"%d" % i}
    tree(folder / "source", files)
    one = ("--processes", "1")
    run_program("-m", "tools.make_shards", "make", folder / "source", folder / "made", "--quality", "100", *one)
    tar_of(members, folder / "indexed" / "all.tar")
    run_program("-m", "tools.make_shards", "index", folder / "indexed", *one)
    made, indexed = Shards(folder / "made"), Shards(folder / "indexed")
    assert len(made) == len(indexed) == len(FILES)

    names = list(FILES)
    photos = {names[label]: made.read(i) for i, label in enumerate(made.index["label"].tolist())}
    config = folder / "config.yaml"
    config.write_text(
        f"data: {{shards: {indexed.folder}, views: [{{count: 2, size: {SIZE}, scale: [0.4, 1.0], teacher: true}}]}}\n"
        "model: {arch: custom, patch: 8, width: 24, depth: 2, heads: 2}\nmethod: dino\n"
        "optim: {global_batch_size: 1}\nspeed: {compile: false, workers: 0, dali_threads: 1}\n"
    )
    readers = {"webdataset": webdataset.read}
    if importlib.util.find_spec("nvidia.dali"):
        from pipeline.readers import dali

        readers["dali"] = dali.read
    views: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for reader, read in readers.items():
        plan = Plan(indexed, batch=1, seed=0)  # each photo a batch of its own
        views[reader] = {}
        for batch in read(load_config(config), indexed, plan, start=0, stop=len(indexed)):
            assert torch.equal(batch.ids, batch.rows), f"{reader} replaces {names[int(batch.ids[0])]}"
            views[reader][names[int(batch.ids[0])]] = batch.windows[0], batch.views[0][0].clone()
    return Programs(folder, indexed, photos, views)


# ------------------------------------------------------------------------------------- the same pixels in every program


@every_format
def test_the_decoder(name):
    odd = FILES[name]
    pixels = decode(odd.data)
    assert pixels.dtype == torch.uint8
    assert np.array_equal(pixels.permute(1, 2, 0), odd.decoded)
    assert np.array_equal(decode_array(odd.data), odd.decoded)
    assert check_header(odd.data) == odd.decoded.shape[:2]


@every_format
def test_the_readers(name, programs):
    for reader, found in programs.views.items():
        windows, views = found[name]
        for window, view in zip(windows.numpy(), views, strict=True):
            expected = crop_resize(tensor(FILES[name].decoded), window, SIZE)
            if reader == "webdataset":
                assert torch.equal(view, expected)
            else:
                assert difference(view, expected) <= 2, reader


@every_format
def test_make_shards(name, programs):
    odd, photo = FILES[name], programs.made[name]
    if photo == odd.data:
        assert np.array_equal(decode(photo).permute(1, 2, 0), odd.decoded)
        assert np.array_equal(odd.made, odd.decoded)
    else:
        assert difference(decode(photo).permute(1, 2, 0), odd.made) <= 1


@every_format
def test_evaluation(name, programs, tmp_path):
    i, wanted = list(FILES).index(name), tensor(FILES[name].decoded)
    picture, label = LabeledPhotos(programs.indexed, SIZE)[i]
    assert label == i
    assert torch.equal(picture, center_crop(wanted, SIZE))

    ending = name[:4].strip(", ").replace("jpeg", "jpg")
    mask = encoded(np.zeros(wanted.shape[1:], np.uint8), "PNG")
    tree(
        tmp_path,
        {
            f"JPEGImages/a.{ending}": FILES[name].data,
            "SegmentationClass/a.png": mask,
            "ImageSets/Segmentation/val.txt": b"a",
        },
    )
    scene, _ = VocSegmentation(tmp_path, "val", SIZE)[0]
    bilinear = transform.InterpolationMode.BILINEAR
    assert torch.equal(scene, transform.resize(wanted, [SIZE, SIZE], bilinear, antialias=True))


@every_format
def test_the_picture_tools(name, programs):
    i, wanted = list(FILES).index(name), tensor(FILES[name].decoded)
    (path,) = (programs.folder / "source" / f"{i:03d}").iterdir()
    assert torch.equal(read_photo(path).picture, wanted)
    ((_, photo),) = valid_samples(programs.indexed, [i], 1)
    assert torch.equal(photo, wanted)


# ------------------------------------------------------------------------------------------------ what is not decoded

JPEG, PNG, WEBP = (FILES[name].data for name in ("jpeg", "png color", "webp"))
BAD = {
    "nothing": (b"", "neither JPEG, PNG nor WebP"),
    "text": (b"<!DOCTYPE html><html>", "neither JPEG, PNG nor WebP"),
    "gif": (encoded(RGB, "GIF"), "neither JPEG, PNG nor WebP"),
    "tiff": (encoded(RGB, "TIFF"), "neither JPEG, PNG nor WebP"),
    "bmp": (encoded(RGB, "BMP"), "neither JPEG, PNG nor WebP"),
    "animated webp": (encoded(RGB, "WEBP", **MOVING), "an animated WebP; only still ones are supported"),
    "jpeg of no height": (lying_jpeg(40, 0), "its header says 0 x 40 pixels"),
    "large jpeg": (lying_jpeg(65000, 65000), "65000 x 65000 pixels are more than the readers accept"),
    "large png": (png_bomb(30000, 30000), "30000 x 30000 pixels are more than the readers accept"),
    "large webp": (webp_bomb(), "16384 x 16384 pixels are more than the readers accept"),
    "cut jpeg": (JPEG[: len(JPEG) // 2], ""),
    "cut png": (PNG[: len(PNG) // 2], ""),
    "cut webp": (WEBP[: len(WEBP) // 2], ""),
    "cut header": (JPEG[: JPEG.index(b"\xff\xda")], ""),
    "png of 16 bits, cut": (FILES["png gray of 16 bits"].data[:200], ""),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_bytes_have_one_error(name, tmp_path):
    data, reason = BAD[name]
    for function in (decode, decode_array):
        with pytest.raises(DecodeError) as error:
            function(data)
        assert str(error.value).startswith(reason)
        assert 5 < len(str(error.value)) < 100
        assert not {"\n", "/", "0x"} & {*str(error.value)}
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"^{path}: cannot be decoded: {reason}"):
        read_photo(path)


def test_headers_truncated_at_any_byte():
    """No other error, and no other size."""
    for name in ("jpeg", "png RGBA", "webp", "webp, lossless", "webp with alpha", "jpeg CMYK"):
        odd = FILES[name]
        for size in range(min(len(odd.data), 700)):
            assert read_header(odd.data[:size]) in (None, odd.decoded.shape[:2]), (name, size)
            for_dali(odd.data[:size])
    assert read_header(JPEG[:2] + b"\xff\xff" + JPEG[2:]) == (HEIGHT, WIDTH)  # fill bytes
    assert MAX_PIXELS == 10_000**2
    assert check_header(lying_jpeg(10_000, 10_000)) == (10_000, 10_000)


def test_shards_refuse_what_the_decoder_would(programs, monkeypatch):
    """Even if the index holds the photo, so DALI does not get it either."""
    moving, _ = BAD["animated webp"]
    record = np.zeros(1, programs.indexed.index.dtype)
    record["size"], record["crc32"], record["height"], record["width"] = len(moving), zlib.crc32(moving), HEIGHT, WIDTH
    monkeypatch.setattr(programs.indexed, "index", record)
    assert programs.indexed.validation_error(0, moving) == "an animated WebP; only still ones are supported"


def test_adobes_marker_is_only_added_where_it_is_missing():
    for name, odd in FILES.items():
        marked = for_dali(odd.data)
        assert (b"Adobe" in marked) == (b"Adobe" in odd.data or name == "jpeg CMYK without Adobe's marker")
        assert np.array_equal(decode_array(marked), odd.decoded)


def test_the_header_and_the_indexer_need_no_torch():
    """They would cost a process of `make shards` 500 MB."""
    program = (
        "import sys, pipeline.shards, tools.make_shards\n"
        "from pipeline.decode import decode_array\n"
        "decode_array(open(sys.argv[1], 'rb').read())\n"
        "assert not 'torch' in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "/dev/stdin"], input=JPEG, cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
