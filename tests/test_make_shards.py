"""`make_shards`: every source and kind of photo, bad and hostile photos, kill -9, verify and index.

Long: all cases share the sources of photos made here.
"""

import fcntl
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import prepare
from pictures import encoded, lying_jpeg, photo, pixels, png_bomb, tar_of, tree
from PIL import Image

from pipeline.shards import Shards
from runtime.errors import UserError

REPO = Path(__file__).parent.parent


def tool(*words: object, ok: bool = True) -> str:
    """What the program prints; if it is not to end well, its error, which is one line, or what `verify` has found."""
    output, error = prepare(*words)
    assert ok == (not error), output + error
    assert "\n" not in error
    return output if error in ("", "exit code 2") else error


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def samples(folder: Path) -> list[tuple[bytes, int]]:
    """(photo, label) of every sample, read as the trainer does; all must be valid."""
    shards = Shards(folder)
    photos = [shards.read(i) for i in range(len(shards))]
    assert all(shards.is_valid(i, p) for i, p in enumerate(photos))
    return [(p, int(label)) for p, label in zip(photos, shards.index["label"], strict=True)]


CLASSES = {f"{c}/{i}.{e}": photo(10 * k + i) for k, c in enumerate("ab") for i, e in enumerate(["jpg", "JPEG", "jpeg"])}


# ---- sources


def test_class_folders(tmp_path: Path) -> None:
    src, dst = tree(tmp_path / "src", CLASSES | {"a/notes.txt": b"", "a/._0.jpg": b"junk"}), tmp_path / "dst"
    (src / "b/link.jpg").symlink_to(src / "a/0.jpg")
    (src / "c").symlink_to(src / "a")
    os.mkfifo(src / "b/fifo.jpg")
    output = tool("make", src, dst)
    assert "6 photos" in output
    assert "2 classes: the folders in" in output
    shards = Shards(dst)
    assert shards.classes == ["a", "b"]
    assert sorted(samples(dst)) == sorted((data, "ab".index(name[0])) for name, data in CLASSES.items())
    assert (shards.index["height"] == 30).all()
    assert (shards.index["width"] == 40).all()
    assert shards.manifest["kept"] == {"JPEG RGB": 6}
    assert shards.manifest["skipped"] == {"links": 2, ".txt files": 1, "hidden files": 1, "special files": 1}
    assert shards.manifest["photos"]["max_bytes"] == max(map(len, CLASSES.values()))
    assert sorted(os.listdir(dst)) == ["index.npy", "manifest.json", "shard-000000.tar", "skipped.jsonl", "sources.txt"]
    assert "already complete: 6 samples in 1 shard" in tool("make", src, dst)


@pytest.mark.parametrize(
    ("files", "options", "labels"),
    [
        (["x.jpg", "a/y.jpg", "b/z.jpg"], [], None),  # one is directly in it
        (["a/x.jpg", "a/b/y.jpg", "a/c/z.jpg"], [], None),  # one folder: nested, not classes
        (["a/x.jpg", "a/y.jpg"], ["--labels", "yes"], [0, 0]),
        (["a/x.jpg", "b/c/y.jpg"], [], [0, 1]),
        (["a/x.jpg", "b/y.jpg"], ["--labels", "no"], None),
        (["train/a/x.jpg", "train/b/y.jpg"], [], [0, 1]),
        (["train/a/x.jpg", "val/b/y.jpg"], ["--labels", "no"], None),
    ],
)
def test_which_photos_have_a_class(tmp_path: Path, files: list[str], options: list[str], labels: list | None) -> None:
    named = {name: photo(i) for i, name in enumerate(files)}
    tool("make", tree(tmp_path / "src", named), tmp_path / "folder", *options)
    tar_of(named, tmp_path / "src.tar")
    tool("make", tmp_path / "src.tar", tmp_path / "tar", *options)
    folder, tar = content(tmp_path / "folder"), content(tmp_path / "tar")
    places = [files.pop("sources.txt").partition(b"\n") for files in (folder, tar)]
    assert folder == tar  # the same photos give the same bytes
    assert places[0][2] == places[1][2]
    assert [line for line, _, _ in places] == [f"source\t{tmp_path}/src{end}".encode() for end in ("", ".tar")]
    expected = dict(zip(named.values(), labels or [-1] * len(files), strict=True))
    assert dict(samples(tmp_path / "folder")) == expected
    assert len(Shards(tmp_path / "folder").classes) == len(set(labels or []))


def test_imagenet_as_it_is(tmp_path: Path) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    synsets = ["n03", "n01", "n02"]  # ILSVRC2012 ids 1, 2, 3; the classes are sorted
    inner = {f"{s}.tar": tar_of({f"{s}_{i}.JPEG": photo(i + 10 * k) for i in range(2)}) for k, s in enumerate(synsets)}
    tar_of(inner, tmp_path / "ILSVRC2012_img_train.tar")
    tool("make", tmp_path / "ILSVRC2012_img_train.tar", tmp_path / "train")
    assert Shards(tmp_path / "train").classes == sorted(synsets)
    assert dict(samples(tmp_path / "train")) == {photo(i + 10 * k): [2, 0, 1][k] for k in range(3) for i in range(2)}

    val = {f"ILSVRC2012_val_{i:08d}.JPEG": photo(i) for i in range(1, 5)}
    tar_of(val, tmp_path / "ILSVRC2012_img_val.tar")
    assert "ILSVRC2012_devkit_t12.tar.gz is not next to it" in tool(
        "make", tmp_path / "ILSVRC2012_img_val.tar", tmp_path / "none"
    )
    assert {label for _, label in samples(tmp_path / "none")} == {-1}

    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    rows = [(i + 1, s, 0) for i, s in enumerate(synsets)] + [(1001, "n00", 3)]
    meta = io.BytesIO()
    scipy_io.savemat(meta, {"synsets": np.array(rows, fields).reshape(-1, 1)}, do_compression=True)
    data = "ILSVRC2012_devkit_t12/data/"
    kit = {data + "meta.mat": meta.getvalue(), data + "ILSVRC2012_validation_ground_truth.txt": b"3\n1\n1\n2\n"}
    with tarfile.open(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        for name, text in kit.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    tool("make", tmp_path / "ILSVRC2012_img_val.tar", tmp_path / "val")
    assert Shards(tmp_path / "val").classes == Shards(tmp_path / "train").classes
    assert dict(samples(tmp_path / "val")) == {photo(1): 1, photo(2): 2, photo(3): 2, photo(4): 0}
    assert "not ImageNet's" in tool(
        "make",
        tmp_path / "ILSVRC2012_img_val.tar",
        tmp_path / "x",
        "--devkit",
        tmp_path / "ILSVRC2012_img_val.tar",
        ok=False,
    )


# ---- conversion


def test_rarer_kinds_of_photo(tmp_path: Path) -> None:
    """The common ones: tests/faults/test_f07_formats.py."""
    rgb = pixels(1)
    image = Image.fromarray(rgb)
    gray = np.asarray(image.convert("L"))
    half = Image.fromarray(np.dstack([rgb, np.where(np.arange(40) < 20, 255, 0)[None].repeat(30, 0).astype(np.uint8)]))
    on_white = np.where(np.arange(40)[None, :, None] < 20, rgb, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to view
    upright = Image.Exif()
    upright[0x0112] = 1
    kept = {"upright": (encoded(rgb, exif=upright), rgb)}
    converted = {
        "PNG L": (encoded(gray, "PNG"), gray),
        "PNG LA": (encoded(half.convert("LA"), "PNG"), np.where(np.arange(40) < 20, gray, 255)),
        "WEBP RGBA": (encoded(half, "WEBP", lossless=True, exact=True), on_white),
        "TIFF I;16": (encoded(gray.astype(np.uint16) * 257, "TIFF"), gray),
        "PNG 1": (encoded(image.convert("1", dither=Image.Dither.NONE), "PNG"), (gray > 127) * 255),
        "TIFF RGB rotated": (encoded(rgb, "TIFF", exif=exif), np.rot90(rgb, -1)),
    }
    bad = {"TIFF F": encoded(Image.fromarray(gray.astype(np.float32)), "TIFF")}
    every = {f"{i}.jpg": data for i, (data, _) in enumerate((kept | converted).values())}  # names may be wrong
    src = tree(tmp_path / "src", every | {"bad.tif": bad["TIFF F"]})
    dst = tmp_path / "dst"
    tool("make", src, dst, "--max-bad", 0.2)
    shards = Shards(dst)
    by_bytes = {shards.read(i): shards.index[i] for i in range(len(shards))}
    for data, _ in kept.values():
        assert data in by_bytes
    rest = [(data, row) for data, row in by_bytes.items() if data not in [d for d, _ in kept.values()]]
    for kind, (_, wanted) in converted.items():
        wanted = np.asarray(wanted)
        candidates = []
        for data, row in rest:
            got = Image.open(io.BytesIO(data))
            assert got.format == "JPEG"
            assert (got.height, got.width) == (row["height"], row["width"])
            if np.asarray(got).shape == wanted.shape:
                candidates.append(np.abs(np.asarray(got).astype(int) - wanted).mean())
        assert min(candidates) < (8 if "1" in kind.split() else 2), kind
    assert shards.manifest["converted"] == dict.fromkeys(converted, 1)
    assert shards.manifest["kept"] == {"JPEG RGB": 1}
    assert "mode F" in (dst / "rejected.jsonl").read_text()
    assert all(Image.open(io.BytesIO(shards.read(i))).getexif().get(0x0112, 1) == 1 for i in range(len(shards)))


def test_resizing_on_request(tmp_path: Path) -> None:
    big, small = photo(1, 90, 120), photo(2, 30, 50)
    tool("make", tree(tmp_path / "src", {"big.jpg": big, "small.jpg": small}), tmp_path / "dst", "--resize-short", 45)
    found = [data for data, _ in samples(tmp_path / "dst")]
    assert small in found
    (resized,) = [Image.open(io.BytesIO(data)) for data in found if data != small]
    assert resized.size == (60, 45)
    assert np.abs(np.asarray(resized).astype(int) - pixels(1, 45, 60)).mean() < 3
    assert Shards(tmp_path / "dst").manifest["converted"] == {"JPEG RGB resized": 1}


def test_bad_photos_are_listed_and_bounded(tmp_path: Path) -> None:
    bad = {
        "html.jpg": (b"<!DOCTYPE html><html>", "begins with b'<!DOCTYPE html><'"),
        "empty.jpg": (b"", "empty"),
        "cut.jpg": (photo(1)[: len(photo(1)) // 2], "truncated"),
        "header.jpg": (photo(1)[:200], "no pixels follow its header"),
        "garbage.jpg": (bytes(range(256)), "not a JPEG"),
        "bomb.png": (png_bomb(30000, 30000), "its header says 900000000 pixels"),
        "bomb.jpg": (lying_jpeg(65000, 65000), "its header says 4225000000 pixels"),
        "thin.png": (png_bomb(70000, 100), "at most 65500"),
        "\u2028line\n\udcff.jpg": (b"GIF89a", ""),
    }
    good = {f"good{i}.jpg": photo(i) for i in range(6)}
    src, dst = tmp_path / "src", tmp_path / "dst"
    tree(src, good | {name: data for name, (data, _) in bad.items()})
    output = tool("make", src, dst, "--max-bad", 0.5, ok=False)
    assert "9 of the first 15 photos are bad, more than --max-bad 0.5 of all 15" in output
    assert not (dst / "manifest.json").exists()
    output = tool("make", src, dst, "--max-bad", 0.7)  # the finished shard is kept
    assert "resuming: 1 of 1 shard finished" in output
    assert sorted(data for data, _ in samples(dst)) == sorted(good.values())
    reasons = {r["source"]: r["reason"] for r in map(json.loads, (dst / "rejected.jsonl").read_text().splitlines())}
    assert set(reasons) == {name for name in bad if name.isascii()} | {"\\u2028line\\n\\xff.jpg"}
    for name, (_, reason) in bad.items():
        assert reason in reasons.get(name, ""), name
    again = tmp_path / "again"
    tool("make", src, again, "--max-bad", 0.7, "--shard-mb", 0.004)
    assert (again / "rejected.jsonl").read_text().count("\n") == 9
    assert Shards(again).manifest["samples"] == 6  # shards without a valid photo are not written


# ---- the same bytes, for any number of processes, and after kill -9


def test_the_bytes_depend_on_the_seed_and_not_on_processes(tmp_path: Path) -> None:
    src = tree(tmp_path / "src", {f"{c}/{i}.jpg": photo(10 * c + i) for c in range(4) for i in range(10)})
    for dst, *options in (("one", "--processes", 1), ("three", "--processes", 3), ("seed", "--seed", 1)):
        tool("make", src, tmp_path / dst, "--shard-mb", 0.02, *options)
    one = content(tmp_path / "one")
    assert len(one) > 4
    assert one == content(tmp_path / "three")
    assert [p for p, _ in samples(tmp_path / "one")] != [p for p, _ in samples(tmp_path / "seed")]
    shards = Shards(tmp_path / "one")
    mixed = [len(set(shards.index["label"][a:b])) for a, b in zip(shards.starts, shards.starts[1:], strict=False)]
    assert np.mean(mixed) > 2  # every shard holds several classes
    assert max(s["bytes"] for s in shards.shards) < 20_000 + 2 * 1024 + max(
        len(p) for p, _ in samples(tmp_path / "one")
    )


def test_killed_at_any_moment_the_same_command_resumes(tmp_path: Path) -> None:
    src = tree(tmp_path / "src", {f"{i}.jpg": photo(i, 300, 400) for i in range(60)} | {"bad.jpg": b"bad"})
    options = ["--shard-mb", "0.05", "--max-bad", "0.1"]
    tool("make", src, tmp_path / "uninterrupted", *options)
    dst = tmp_path / "dst"
    kills = 0
    for shards_before in (0, 1, 4, 9, 14):
        command = [sys.executable, "-m", "tools.make_shards", "make", str(src), str(dst), *options, "--processes", "2"]
        with subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
            while run.poll() is None and not (dst.exists() and len(list(dst.glob("*.tar"))) > shards_before):
                time.sleep(0.001)
            run.send_signal(signal.SIGKILL)
        kills += not (dst / "manifest.json").exists()
    assert kills >= 3
    for name in ("shard-000000.tar.1.draft", "index.npy.1.draft"):
        (dst / ".make_shards" / name).write_bytes(b"half a file")
    cut = dst / "shard-000000.tar"
    cut.write_bytes(cut.read_bytes()[:-1000])  # not the size in its record: made again
    output = tool("make", src, dst, *options)
    assert "resuming:" in output
    assert content(dst) == content(tmp_path / "uninterrupted")


def test_a_full_disk_is_one_line_and_can_be_resumed(tmp_path: Path) -> None:
    src, dst = tree(tmp_path / "src", {f"{i}.jpg": photo(i) for i in range(20)}), tmp_path / "dst"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
    try:
        output = tool("make", src, dst, ok=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in output
    assert not list(dst.glob("*.tar"))
    tool("make", src, dst)
    assert len(samples(dst)) == 20


def test_other_photos_or_settings_are_refused(tmp_path: Path) -> None:
    src, dst = tree(tmp_path / "src", CLASSES), tmp_path / "dst"
    tool("make", src, dst)
    assert "seed (saved: 0, current: 1)" in tool("make", src, dst, "--seed", 1, ok=False)
    assert "shard_mb (saved: 256.0, current: 1.0)" in tool("make", src, dst, "--shard-mb", 1, ok=False)
    (src / "a/0.jpg").unlink()
    assert "(saved: 6 photos, current: 5)" in tool("make", src, dst, ok=False)
    fd = os.open(dst, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    assert "another make_shards is writing here" in tool("make", src, dst, ok=False)
    os.close(fd)


# ---- other programs


def test_webdataset_reads_it(tmp_path: Path) -> None:
    tool("make", tree(tmp_path / "src", CLASSES), tmp_path / "dst", "--shard-mb", 0.005)
    tars = sorted(map(str, (tmp_path / "dst").glob("*.tar")))
    assert len(tars) > 1
    import webdataset  # imports torch, which takes seconds

    read = [(s["jpg"], int(s["cls"])) for s in webdataset.WebDataset(tars, shardshuffle=False)]
    assert read == samples(tmp_path / "dst")
    keys = [s["__key__"] for s in webdataset.WebDataset(tars, shardshuffle=False)]
    assert keys == [f"{i:08d}" for i in range(6)]
    with tarfile.open(tars[0]) as tar:
        assert all((m.mtime, m.uid, m.gid, m.mode) == (0, 0, 0, 0o644) for m in tar)


def test_verify_lists_what_is_damaged(tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    tool("make", tree(tmp_path / "src", CLASSES), dst, "--shard-mb", 0.005)
    shards = Shards(dst)
    n = len(shards.shards)
    assert f"{n} shards, 6 samples: all agree" in tool("verify", dst, "--processes", 2)
    intact = content(dst)

    def after(name: str, change: "object") -> str:
        raw = bytearray(intact[name])
        (dst / name).write_bytes(change(raw) or raw)  # type: ignore[operator]
        output = tool("verify", dst, ok=False)
        (dst / name).write_bytes(intact[name])
        return output

    row = shards.index[5]
    last = shards.shards[row["shard"]]["name"]

    def flip(at: int) -> "object":
        return lambda raw: raw.__setitem__(at, raw[at] ^ 1)

    output = after(last, flip(int(row["offset"]) + 100))
    photo_of_5 = shards.source(5)
    assert Path(photo_of_5).read_bytes() == shards.read(5)
    assert f"{last}: sample 5 (00000005.jpg, made from {photo_of_5}) is damaged: {row['size']} bytes at byte" in output
    assert "1 problem;" in output
    assert "photos are intact" in after(last, flip(-1))
    cut = after(last, lambda raw: raw[: int(row["offset"]) + 100])
    assert "the manifest says" in cut
    assert f"1 of its 1 sample is lost, from sample 5 (byte {row['offset']}) on" in cut
    assert "index.npy: differs from 1 sample of" in after("index.npy", flip(-1))
    (dst / last).unlink()
    assert "1 of its 1 sample is lost" in tool("verify", dst, ok=False)
    with pytest.raises(UserError, match="is missing"):
        Shards(dst)


# ---- tars of other programs


def test_index_of_foreign_tars(tmp_path: Path) -> None:
    png = encoded(pixels(5), "PNG")
    canary = tmp_path / "canary"
    evil = b"cposix\nsystem\n(S'touch %s'\ntR." % os.fsencode(canary)
    tar_of(
        {
            "x/1.jpg": photo(1), "x/1.cls": b"7\n", "x/1.json": b"{}",
            "x/2.cls": b"3", "x/2.seg.png": png, "x/2.png": png, "x/2.pyd": evil, "x/2.pkl": evil,
            "3.jpeg": photo(3), "3.jpg": photo(4), "3.cls": b"seven",
            "4.cls": b"1", "4.txt": b"no photo",
        },
        tmp_path / "b.tar",
    )  # fmt: skip
    tar_of({"v1.2.webp": encoded(pixels(1), "WEBP"), "5.webp": encoded(pixels(6, 20, 10), "WEBP")}, tmp_path / "a.tar")
    output = tool("index", tmp_path)
    assert "5 samples in 2 shards" in output
    assert samples(tmp_path)[2:] == [(photo(1), 7), (png, 3), (photo(3), -1)]
    shards = Shards(tmp_path)
    assert tuple(shards.index[1])[3:6] == (20, 10, -1)
    assert shards.classes == [str(i) for i in range(8)]
    assert shards.manifest["skipped"] == {
        "labels that cannot be read": 1,
        ".json files": 1, ".pyd files": 1, ".pkl files": 1, ".seg.png files": 1,
        "labels without a photo": 1,
        "duplicates in a sample": 1,
    }  # fmt: skip
    assert not canary.exists()
    assert "all agree" in tool("verify", tmp_path)


def test_index_keeps_the_names_of_classes(tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    tool("make", tree(tmp_path / "src", CLASSES), dst, "--shard-mb", 0.005)
    index = (dst / "index.npy").read_bytes()
    (dst / "index.npy").unlink()
    tool("index", dst, "--processes", 2)
    assert (dst / "index.npy").read_bytes() == index
    assert Shards(dst).classes == ["a", "b"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:1500], "the member at byte 0 has"),
        (lambda raw: raw[: raw.index(b"b.jpg") + 300], "truncated at byte"),
        (lambda raw: raw[: raw.index(b"b.jpg")], "(two empty blocks of 512 bytes) is missing"),
        (lambda raw: raw.replace(b"b.jpg", b"x.jpg"), "is not a tar header"),
        (lambda raw: b"", "empty (0 bytes)"),
        (lambda raw: bytes(10240), "no photos in this tar"),
        (lambda raw: b"\x1f\x8b" + raw, "compressed (gzip)"),
    ],
)
def test_damaged_tars_are_refused(tmp_path: Path, damage: "object", message: str) -> None:
    raw = tar_of({"a.jpg": photo(1), "b.jpg": photo(2)})
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "intact.tar").write_bytes(raw)
    (tmp_path / "x" / "bad.tar").write_bytes(damage(raw))  # type: ignore[operator]
    output = tool("index", tmp_path / "x", ok=False)
    assert "bad.tar: " in output
    assert message in output
    assert not (tmp_path / "x" / "manifest.json").exists()


# ---- wrong inputs


WRONG = {
    "make photo dst": "did you mean 'photos'?",
    "make empty dst": "no photos here (found: nothing)",
    "make texts dst": "no photos here (found: 1 .txt files); photos end in .jpg",
    "make links dst": "links are not followed",
    "make text.tar dst": "not a tar",
    "make zipped.tar.gz dst": "zipped.tar.gz: damaged: ",
    "make zero.tar dst": "empty (0 bytes)",
    "make none.tar dst": "no photos here",
    "make tars dst": "`make index DST=",
    "make photos photos/dst": "is inside SRC",
    "make photos .": "is inside SRC",
    "make photos text.tar": "text.tar: is a file, not a folder; give another DST",
    "make photos text.tar/dst": "text.tar: is a file, not a folder; give another DST",
    "make photos tars": "holds tars of another program",
    "make photos dst --shard-mb 0": "--shard-mb 0",
    "make photos dst --shard-mb nan": "--shard-mb nan",
    "make photos dst --quality 101": "--quality 101",
    "make photos dst --max-bad 2": "--max-bad 2",
    "make photos dst --processes 0": "--processes 0",
    "make photos dst --labels yes": "1 photo directly in",
    "make photos dst --devkit x": "does not hold ImageNet's validation photos",
    "make splits dst": "holds several splits: train (1 photo), val (1 photo); make shards of one of them: `make shards SRC=",
    "verify nowhere": "no such folder",
    "verify tars": "make index",
    "index nowhere": "no such folder",
    "index empty": "no *.tar here",
    "index photos --processes 0": "--processes 0",
}


def test_wrong_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path / "photos", {"x.jpg": photo(1)})
    tree(tmp_path / "texts", {"x.txt": b""})
    tree(tmp_path / "splits", {"train/a/x.jpg": photo(1), "val/a/x.jpg": photo(2)})
    tree(tmp_path / "tars", {"x.tar": tar_of({"x.jpg": photo(1)}), "y.txt": b""})
    (tmp_path / "empty").mkdir()
    (tmp_path / "links").mkdir()
    (tmp_path / "links/x").symlink_to(tmp_path / "photos")
    (tmp_path / "text.tar").write_bytes(b"no tar at all " * 100)
    (tmp_path / "zero.tar").write_bytes(b"")
    (tmp_path / "zipped.tar.gz").write_bytes(b"\x1f\x8b" + bytes(1000))
    tar_of({"x.txt": b""}, tmp_path / "none.tar")
    monkeypatch.chdir(tmp_path)
    for words, message in WRONG.items():
        assert message in tool(*words.split(), ok=False), words
    assert not (tmp_path / "dst").exists()
