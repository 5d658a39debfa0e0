"""Painted scenes: the same bytes every time, masks that match their class, and classes that raw pixels do not give away."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_program
from PIL import Image

from runtime.errors import UserError
from tools.scenes import folder as folder_of_scenes
from tools.scenes.folder import _same_file, _work_folder, make_scenes


def paint(folder: Path, *words: object, expect: int = 0) -> subprocess.CompletedProcess:
    return run_program("-m", "tools.make_scenes", folder, *words, expect=expect)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("painted") / "scenes"
    paint(folder, "--train", 800, "--val", 200)
    return folder


def classes_of(folder: Path, split: str) -> dict[str, int]:
    """Class number, from 1, of each scene of a split, by the folder it is in."""
    names = (folder / "classes.txt").read_text().splitlines()
    return {p.stem: names.index(p.parent.name) for p in sorted(folder.glob(f"{split}/*/*.jpg"))}


def test_layout(scenes):
    names = (scenes / "classes.txt").read_text().splitlines()
    assert len(names) == len(set(names)) == 9
    total = 0
    for split, count in (("train", 800), ("val", 200)):
        ids = (scenes / f"ImageSets/Segmentation/{split}.txt").read_text().split()
        assert len(ids) == len(set(ids)) == count
        assert set(ids) == classes_of(scenes, split).keys()
        assert {p.name for p in (scenes / split).iterdir()} == set(names[1:])
        for photo in scenes.glob(f"{split}/*/*.jpg"):
            assert photo.read_bytes() == (scenes / "JPEGImages" / photo.name).read_bytes()
        total += count
    assert len(list((scenes / "JPEGImages").iterdir())) == len(list((scenes / "SegmentationClass").iterdir())) == total
    settings = json.loads((scenes / "scenes.json").read_text())
    assert (settings["train"], settings["val"], settings["size"], settings["seed"]) == (800, 200, 48, 0)


def test_masks_agree_with_the_class(scenes):
    voc = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128, 128, 0, 128, 0, 128, 128, 128, 128, 128, 64, 0, 0]
    kinds = classes_of(scenes, "val")
    most = 0
    for name, kind in kinds.items():
        with Image.open(scenes / "SegmentationClass" / f"{name}.png") as mask:
            assert (mask.mode, mask.size) == ("P", (48, 48))
            assert mask.getpalette()[:27] == voc
            pixels = np.bincount(np.asarray(mask).ravel(), minlength=9)
        assert len(pixels) == 9  # no class above 8, no 255
        assert (pixels[1:] > 0).sum() == 2  # three things of the class, one of another
        assert pixels[0] > 0
        most += pixels[1:].argmax() + 1 == kind
    assert most == len(kinds)
    assert np.bincount(list(kinds.values()), minlength=9)[1:].min() > 10


def test_the_same_scenes_every_time(scenes, tmp_path):
    paint(tmp_path / "again", "--train", 800, "--val", 200)
    assert content(tmp_path / "again") == content(scenes)
    # scene n is the same however many there are, wherever the chunks end
    paint(tmp_path / "fewer", "--train", 70, "--val", 3)
    fewer, all_of_them = content(tmp_path / "fewer"), content(scenes)
    pictures = [name for name in fewer if name.endswith((".jpg", ".png"))]
    assert len(pictures) == 3 * 73
    assert all(fewer[name] == all_of_them[name] for name in pictures)
    paint(tmp_path / "other", "--train", 70, "--val", 3, "--seed", 1)
    other = content(tmp_path / "other")
    assert all(other[n] != fewer[n] for n in pictures if n.startswith("JPEGImages"))


def test_splits_share_no_picture(scenes):
    photos = [p.read_bytes() for p in (scenes / "JPEGImages").iterdir()]
    assert len(set(photos)) == len(photos)


def test_raw_pixels_do_badly(scenes):
    """k-NN, k 20, by the cosine of whole pictures, every pixel standardized over the train set.

    This does not bound every comparison of pixels: the correlation of center crops (eval/features.py) sees more, so a
    network is compared with that (eval/report.py).
    """

    def read(split: str) -> tuple[np.ndarray, np.ndarray]:
        kinds = classes_of(scenes, split)
        photos = [np.asarray(Image.open(scenes / "JPEGImages" / f"{name}.jpg"), np.float32) for name in kinds]
        return np.stack(photos).reshape(len(photos), -1), np.array(list(kinds.values()))

    (train, train_kinds), (val, kinds) = read("train"), read("val")
    mean, deviation = train.mean(0), train.std(0)
    train, val = (train - mean) / deviation, (val - mean) / deviation
    train, val = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, val))
    nearest = np.argsort(-val @ train.T, axis=1)[:, :20]
    votes = np.stack([(train_kinds[nearest] == k).sum(1) for k in range(9)], axis=1)
    assert (votes.argmax(1) == kinds).mean() < 0.5


def test_other_sizes(tmp_path):
    paint(tmp_path / "large", "--train", 3, "--val", 1, "--size", 96)
    paint(tmp_path / "small", "--train", 3, "--val", 1)
    for name in ("train_000000", "train_000002", "val_000000"):
        large, small = (Image.open(tmp_path / s / "SegmentationClass" / f"{name}.png") for s in ("large", "small"))
        assert large.size == (96, 96)
        halved = np.asarray(large)[::2, ::2]
        assert (halved == np.asarray(small)).mean() > 0.95  # the same scene at a higher resolution


def test_a_complete_set_is_kept(scenes):
    before = {p: p.stat().st_mtime_ns for p in scenes.rglob("*")}
    stdout = paint(scenes, "--train", 800, "--val", 200).stdout
    assert "already painted" in stdout
    assert stdout.count("\n") == 1
    error = paint(scenes, "--train", 800, "--val", 200, "--seed", 1, expect=2).stderr
    assert "seed 0 saved, 1 given" in error
    assert {p: p.stat().st_mtime_ns for p in scenes.rglob("*")} == before


def test_a_killed_program_leaves_no_partial_set(tmp_path):
    folder = tmp_path / "scenes"
    command = [sys.executable, "-m", "tools.make_scenes", str(folder), "--train", "20000"]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not list(tmp_path.glob("*/JPEGImages/*.jpg")) and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not folder.exists()
    paint(folder, "--train", 20, "--val", 5)
    assert len(list((folder / "JPEGImages").iterdir())) == 25
    assert [p.name for p in tmp_path.iterdir()] == ["scenes"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("new", "--train", 0), "--train: at least 1, this is 0"),
        (("new", "--val", -3), "--val: at least 1, this is -3"),
        (("new", "--size", 4), "--size: at least 16, this is 4"),
        (("new", "--seed", -1), "--seed: at least 0, this is -1"),
        (("new", "--seed", 2**63), "--seed: below 2^63"),
        (("mine",), "is not empty"),
        (("file",), "name another folder"),
        (("file/new",), "Not a directory"),
    ],
)
def test_wrong_inputs(tmp_path, words, message):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("dear")
    error = paint(tmp_path / words[0], *words[1:], expect=2).stderr
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "letter.txt", "mine"]


@pytest.mark.parametrize("text", ["", '{"version": 2, "tr', "[]", "\xff"])
def test_a_damaged_scenes_json(tmp_path, text):
    (tmp_path / "scenes.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"scenes\.json: not the settings of painted scenes; name another folder"):
        make_scenes(tmp_path, train=1, val=1, size=16, seed=0)


def test_the_folder_one_is_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is the folder you are in; name another one, such as scenes"):
        make_scenes(Path(), train=1, val=1, size=16, seed=0)
    assert tmp_path.is_dir()


def test_links_are_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    for name, target in (("empty", "disk"), ("new", "elsewhere")):
        (tmp_path / name).symlink_to(target)
        make_scenes(tmp_path / name, train=1, val=1, size=16, seed=0)
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / target / "scenes.json").is_file()


def test_two_programs_do_not_paint_one_folder(tmp_path):
    with _work_folder(tmp_path / "scenes") as work:
        (work / "classes.txt").touch()
        with pytest.raises(UserError, match="scenes: another process is painting it; wait until it ends"):
            make_scenes(tmp_path / "scenes", train=1, val=1, size=16, seed=0)
        assert (work / "classes.txt").exists()


def test_a_disk_without_links_or_space(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", refuse)
    _same_file(ROOT / "Makefile", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (ROOT / "Makefile").read_bytes()
    monkeypatch.setattr(folder_of_scenes, "_paint_all", refuse)
    with pytest.raises(UserError, match="scenes: No space left on device"):
        make_scenes(tmp_path / "scenes", train=1, val=1, size=16, seed=0)


def refuse(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_large_scenes_are_painted_a_few_at_once():
    """Their memory: 50 of 1,024 pixels a side take gigabytes in each process."""
    sizes = {48: 50, 256: 50, 512: 12, 1024: 3, 4000: 1}
    assert {size: folder_of_scenes.at_once(size) for size in sizes} == sizes


def test_wrong_options(tmp_path):
    for words in (("--tra", 5), ("--size", "big"), ("--color",)):
        assert "Traceback" not in paint(tmp_path / "new", *words, expect=2).stderr
    assert not (tmp_path / "new").exists()
