"""F23: folders that are not classes: splits, file systems' own folders, masks, and folders around the classes."""

import re
from pathlib import Path

import numpy as np
import pytest
from conftest import run_program
from pictures import encoded, photo, tar_of, tree
from PIL import Image

from pipeline.prepare.names import split_of, splits_among
from pipeline.shards import Shards

fault = [pytest.mark.fault("F23"), pytest.mark.fast]


def make(src: Path, *options: str, expect: int = 0) -> str:
    """What `make_shards make src src-shards` prints: its output, or its error."""
    words = ("-m", "tools.make_shards", "make", src, f"{src}-shards", "--processes", "1", *options)
    done = run_program(*words, expect=expect)
    return done.stderr if expect else done.stdout


def photos_of(*names: str) -> dict[str, bytes]:
    return {name: photo(i) for i, name in enumerate(names)}


def mask() -> bytes:
    image = Image.fromarray(np.arange(1200, dtype=np.uint8).reshape(30, 40) % 3, "P")
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    return encoded(image, "PNG")


# ---- splits


SPLITS = {  # what lies in the source: the folder that the message offers first, and every split with its photos
    "Training, Testing": (("Training/a/1.jpg", "Training/b/1.jpg", "Testing/a/2.jpg"), "Training", "Testing (1 photo)"),
    "Train, Val": (("Val/a/1.jpg", "Train/a/2.jpg"), "Train", "Val (1 photo)"),
    "train, test, unlabeled": (
        ("unlabeled/1.jpg", "test/a/2.jpg", "train/a/3.jpg", "train/b/3.jpg"), "train",
        "train (2 photos), test (1 photo), unlabeled (1 photo)",
    ),
    "train2017, val2017": (("val2017/1.jpg", "train2017/2.jpg"), "train2017", "val2017 (1 photo)"),
    "images_train, images_valid": (("images_train/1.jpg", "images_valid/2.jpg"), "images_train", "images_valid"),
    "Kaggle's ImageNet": (
        tuple(f"ILSVRC/Data/CLS-LOC/{s}/1.jpg" for s in ("test", "train/n01", "train/n02", "val")),
        "ILSVRC/Data/CLS-LOC/train", "train (2 photos), val (1 photo), test (1 photo)",
    ),
    "beside a stray photo": (("cover.jpg", "train/a/1.jpg", "test/a/2.jpg"), "train", "test (1 photo)"),
}  # fmt: skip


@pytest.mark.parametrize("case", [pytest.param(c, marks=fault) for c in SPLITS])
def test_several_splits_are_refused(case: str, tmp_path: Path) -> None:
    """With the exact command for one of them, which works."""
    names, first, found = SPLITS[case]
    src = tree(tmp_path / "src", photos_of(*names))
    error = make(src, expect=2)
    assert "holds several splits: " in error
    assert found in error
    assert f"`make shards SRC={src}/{first} DST={src}-shards`" in error
    assert not Path(f"{src}-shards").exists()
    make(src / first)
    assert len(Shards(Path(f"{src / first}-shards"))) == sum(name.startswith(f"{first}/") for name in names)


@pytest.mark.fault("F23")
@pytest.mark.fast
def test_several_splits_in_a_tar(tmp_path: Path) -> None:
    tar_of(photos_of("data/train/a/1.jpg", "data/test/a/2.jpg"), tmp_path / "src.tar")
    error = make(tmp_path / "src.tar", expect=2)
    assert f"`mkdir -p {tmp_path}/src && tar -xf {tmp_path}/src.tar -C {tmp_path}/src && make shards " in error
    assert f"SRC={tmp_path}/src/data/train DST={tmp_path}/src.tar-shards`" in error
    inner = {f"{split}.tar": tar_of(photos_of("1.jpg")) for split in ("train", "val")}
    tar_of(inner, tmp_path / "of_tars.tar")
    assert "of_tars.tar holds several splits: train.tar, val.tar" in make(tmp_path / "of_tars.tar", expect=2)


@pytest.mark.fault("F23")
@pytest.mark.fast
def test_tars_of_several_splits_are_not_indexed_together(tmp_path: Path) -> None:
    for name in ("imagenet-train-000", "imagenet-train-001", "imagenet-validation-000"):
        tar_of(photos_of("1.jpg"), tmp_path / f"{name}.tar")
    error = run_program("-m", "tools.make_shards", "index", tmp_path, expect=2).stderr
    assert "train (2 tars, imagenet-train-000.tar first), val (1 tar, imagenet-validation-000.tar first)" in error
    command = f"`mkdir {tmp_path}/train && mv {tmp_path}/imagenet-train-00*.tar {tmp_path}/train && make index DST="
    assert command in error
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("labels", ["yes", "no"])
def test_the_user_decides_about_splits(labels: str, tmp_path: Path) -> None:
    src = tree(tmp_path / "src", photos_of("train/a/1.jpg", "test/a/2.jpg"))
    make(src, "--labels", labels)
    assert Shards(Path(f"{src}-shards")).classes == (["test", "train"] if labels == "yes" else [])


@pytest.mark.fault("F23")
@pytest.mark.fast
def test_splits_below_classes_are_told(tmp_path: Path) -> None:
    src = tree(tmp_path / "src", photos_of("cup/train/1.jpg", "cup/test/2.jpg", "jar/train/1.jpg", "jar/test/2.jpg"))
    assert f"warning: {src}/cup holds several splits: train, test (and 1 more folder); the photos of all" in make(src)


def test_names_of_splits() -> None:
    for name in ("train", "Training", "TRAIN", "train2017", "images_train", "trainImages", "train-set", "train_01"):
        assert split_of(name) == ("train", ()), name
    assert split_of("imagenet-validation-000") == ("val", ("imagenet",))
    assert split_of("train_val") == ("trainval", ())
    for name in ("trainer", "contest", "n01440764", "validity", "image", ""):
        assert split_of(name)[0] == "", name
    for names in (["bullet_train", "test_tube"], ["train", "bus", "car"], ["train1", "train2"], ["a", "b"]):
        assert not splits_among(names), names


def test_parts_of_one_split_are_no_classes(tmp_path: Path) -> None:
    src = tree(tmp_path / "src", photos_of("train1/1.jpg", "train2/2.jpg"))
    assert "no classes in" in make(src)


# ---- which folders are the classes


DEPTHS = {
    "CUB: images": (("images/001.Albatross/1.jpg", "images/002.Finch/2.jpg"), "", ["001.Albatross", "002.Finch"]),
    "three deep": (("a/b/c/x/1.jpg", "a/b/c/y/2.jpg"), "", ["x", "y"]),
    "--labels yes": (("images/x/1.jpg", "images/y/2.jpg"), "yes", ["x", "y"]),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=fault) for c in DEPTHS])
def test_single_folders_are_passed_through(case: str, tmp_path: Path) -> None:
    names, labels, classes = DEPTHS[case]
    src = tree(tmp_path / "src", photos_of(*names) | {"README": b"text"})
    output = make(src, *(("--labels", labels) if labels else ()))
    assert Shards(Path(f"{src}-shards")).classes == classes
    assert f"classes: {classes[0]} (1 photo), {classes[1]} (1 photo)\n" in output


@pytest.mark.fault("F23")
@pytest.mark.fast
def test_the_first_classes_are_shown_before_the_work_begins(tmp_path: Path) -> None:
    src = tree(tmp_path / "src", photos_of(*(f"c{i:02d}/{n}.jpg" for i in range(12) for n in range(1 + (i == 0)))))
    lines = make(src).splitlines()
    assert f"12 classes: the folders in {src} (--labels no: no classes)" in lines[0]
    assert lines[1] == (
        "classes: c00 (2 photos), c01 (1 photo), c02 (1 photo), c03 (1 photo), c04 (1 photo), ... 7 more"
    )
    assert "in 1 shard" in lines[2]  # the summary, when the work is done


SYSTEM = (
    "@eaDir", "$RECYCLE.BIN", "lost+found", "System Volume Information", "__MACOSX", ".AppleDouble", ".Trashes", "#recycle",
)  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(n, marks=fault) for n in SYSTEM])
def test_folders_of_file_systems_are_skipped(name: str, tmp_path: Path) -> None:
    """In a folder and in a tar, at any depth; they are counted and listed."""
    files = photos_of("a/1.jpg", "b/2.jpg", f"{name}/3.jpg", f"a/{name}/4.jpg")
    tar_of(files, tmp_path / "tar.tar")
    for src in (tree(tmp_path / "folder", files), tmp_path / "tar.tar"):
        output = make(src)
        dst = Path(f"{src}-shards")
        assert (Shards(dst).classes, len(Shards(dst))) == (["a", "b"], 2)
        kind = "hidden folders" if name.startswith(".") else "system folders"
        assert f"skipped 2 ({kind} 2); {dst}/skipped.jsonl lists them" in output
        listed = (dst / "skipped.jsonl").read_text()
        assert sorted(re.findall('"source": "([^"]*)"', listed)) == sorted([f"{name}/", f"a/{name}/"])


# ---- masks


@pytest.mark.fault("F23")
@pytest.mark.fast
def test_pascal_voc(tmp_path: Path) -> None:
    """Its root has photos and masks: the photos' folder is named, at any depth."""
    files = {"JPEGImages/1.jpg": photo(1), "SegmentationClass/1.png": mask(), "Annotations/1.xml": b"<annotation>"}
    src = tree(tmp_path / "VOCdevkit/VOC2012", files)
    for given in (src, src.parent):
        error = make(given, expect=2)
        assert "SegmentationClass holds masks, JPEGImages the photos" in error
        assert f"`make shards SRC={src}/JPEGImages DST={given}-shards`" in error


@pytest.mark.fault("F23")
@pytest.mark.fast
def test_a_class_of_masks_is_warned_of(tmp_path: Path) -> None:
    src = tree(tmp_path / "src", {"images/1.jpg": photo(1), "images/2.jpg": photo(2), "labels/1.png": mask()})
    output = make(src)
    assert f"warning: {src}/labels holds 1 file like a mask, not a photo (palette PNG)" in output
    assert f"`make shards SRC={src}/images DST={src}-shards-images`" in output
    tree(tmp_path / "only", {"1.png": mask(), "2.png": mask(), "3.png": mask()})
    assert f"warning: {tmp_path}/only holds 3 files like masks, not photos (palette PNGs)" in make(tmp_path / "only")
