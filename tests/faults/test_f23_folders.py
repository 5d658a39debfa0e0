"""F23: folders that are not classes: splits, file systems' own folders, masks, and folders around the classes."""

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import prepare
from pictures import encoded, photo, pixels, tar_of, tree
from PIL import Image

from pipeline.prepare.names import split_of, splits_among
from pipeline.prepare.sources.listing import describe, list_photos
from pipeline.prepare.sources.photos import Ask
from pipeline.shards import Shards
from runtime.errors import UserError

fault = [pytest.mark.fault("F23"), pytest.mark.fast]


def make(src: Path, *options: str, expect: int = 0) -> str:
    """What `make_shards make src src-shards` prints, or its error."""
    output, error = prepare("make", src, f"{src}-shards", *options)
    assert bool(error) == bool(expect), error
    return error or output


def photos_of(*names: str) -> dict[str, bytes]:
    return {name: photo(i) for i, name in enumerate(names)}


def lines(src: Path, labels: str = "auto") -> str:
    """What `make` prints before the work begins."""
    found = list_photos([src], Ask(labels, dst=f"{src}-shards"))
    return "\n".join([found.summary, *describe(found, Path(f"{src}-shards"))]) + "\n"


def refused(src: Path, labels: str = "auto") -> str:
    with pytest.raises(UserError) as error:
        list_photos([src], Ask(labels, dst=f"{src}-shards"))
    return str(error.value)


def shell(command: str) -> None:
    subprocess.run(command, shell=True, check=True, executable="/bin/bash")


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
    "train, dev": (("dev/x/1.jpg", "train/x/2.jpg"), "train", "dev (1 photo)"),
    "trn, tst, holdout": (("trn/1.jpg", "tst/1.jpg", "holdout/1.jpg"), "trn", "holdout and 1 more (2 photos)"),
    "train, test_easy, test_hard": (
        ("train/1.jpg", "test_easy/1.jpg", "test_hard/1.jpg"), "train", "test_easy and 1 more (2 photos)",
    ),
    "train, eval, extra": (("eval/1.jpg", "extra/1.jpg", "train/1.jpg"), "train", "eval (1 photo), extra (1 photo)"),
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
    error = prepare("index", tmp_path)[1]
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
    for names in (
        ["bullet_train", "test_tube"],
        ["train", "bus", "car"],
        ["train1", "train2"],
        ["train_a", "train_0"],
        ["a", "b"],
    ):
        assert not splits_among(names), names


def test_parts_of_one_split_are_no_classes(tmp_path: Path) -> None:
    src = tree(tmp_path / "src", photos_of("train1/1.jpg", "train_b/2.jpg"))
    assert "no classes in" in make(src)


@pytest.mark.fault("F23")
@pytest.mark.fast
def test_a_split_in_several_folders(tmp_path: Path) -> None:
    """As Open Images has them: the command joins them, and works."""
    src = tree(tmp_path / "my src", photos_of("train_0/1.jpg", "train_f/2.jpg", "validation/3.jpg"))
    error = refused(src)
    assert "holds several splits: train_0 and 1 more (2 photos), validation (1 photo); train is in 2 folders" in error
    assert f"`mkdir '{src}/train' && mv '{src}/train_'* '{src}/train' && make shards SRC='{src}/train' DST=" in error
    shell(error.split("`")[1].partition(" && make")[0])
    assert "parts of one split" in lines(src / "train")


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
    "thumbnails", "Thumbs", "_thumbs",
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
        assert f"skipped 2 ({kind} 2), to be listed in {dst}/skipped.jsonl" in output
        listed = (dst / "skipped.jsonl").read_text()
        assert sorted(re.findall('"source": "([^"]*)"', listed)) == sorted([f"{name}/", f"a/{name}/"])


STRAY = {  # folder names below SRC, and where the stray photos are
    "beside the classes": ("", ["0.jpg", "1.jpg"]),
    "one folder down": ("images/", ["images/0.jpg"]),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=fault) for c in STRAY])
def test_a_stray_photo_beside_class_folders(case: str, tmp_path: Path) -> None:
    """It is named, and moving it gives the classes."""
    below, stray = STRAY[case]
    src = tree(tmp_path / "src", photos_of(*stray, f"{below}cat/1.jpg", f"{below}dog/2.jpg"))
    output = lines(src)
    assert f"warning: {len(stray)} photo" in output
    assert f" directly in {src}/{below}".rstrip("/") + f" ({stray[0]}" in output
    assert "beside 2 folders, so there are no classes" in output
    assert f"({stray[0]}" in refused(src, "yes")
    assert "warning" not in lines(src, "no")
    for name in stray:
        (src / name).unlink()
    assert "2 classes" in lines(src)


@pytest.mark.fault("F23")
@pytest.mark.fast
def test_a_flat_folder_gets_no_advice_about_classes(tmp_path: Path) -> None:
    src = tree(tmp_path / "src", photos_of("1.jpg", "2.jpg"))
    assert lines(src) == f"no classes in {src}: photos are directly in it\n"


@pytest.mark.fault("F23")
@pytest.mark.fast
def test_class_folders_that_hold_folders(tmp_path: Path) -> None:
    """Places365: the command makes a class of each inner folder, and works."""
    src = tree(tmp_path / "src", photos_of("a/abbey/1.jpg", "a/airfield/2.jpg", "b/bar/3.jpg"))
    output = lines(src)
    assert "warning: 1 of 2 class folders hold folders (a: abbey, airfield)" in output
    shell(output.split("`")[1].partition(" && make")[0])
    made = list_photos([Path(f"{src}-classes")], Ask(follow_links=True))
    assert made.classes == ["abbey", "airfield", "bar"]
    tree(src, photos_of("b/abbey/4.jpg"))  # the links' names would collide
    assert "give each a folder of its own" in lines(src)
    one = tree(tmp_path / "one", photos_of("n01/images/1.jpg", "n02/images/2.jpg"))
    assert "warning" not in lines(one)


@pytest.mark.fault("F23")
@pytest.mark.fast
def test_several_folders_of_voc_are_no_classes(tmp_path: Path) -> None:
    src = tree(tmp_path / "src", photos_of("VOC2007/JPEGImages/1.jpg", "VOC2012/JPEGImages/2.jpg"))
    assert "no classes in" in lines(src)
    tree(src, {"VOC2007/SegmentationClass/1.png": mask(), "VOC2012/SegmentationClass/2.png": mask()})
    assert f"(and 1 more such folder: {src}/VOC2012)" in refused(src)


@pytest.mark.fault("F23")
@pytest.mark.fast
def test_validation_photos_one_folder_down(tmp_path: Path) -> None:
    """ImageNet's: the message names the devkit."""
    src = tree(tmp_path / "src", photos_of("val/ILSVRC2012_val_00000001.JPEG"))
    assert "ILSVRC2012_devkit_t12.tar.gz is not next to it" in lines(src)


@pytest.mark.fault("F23")
@pytest.mark.fast
def test_the_command_for_a_tar_without_an_ending(tmp_path: Path) -> None:
    src = tmp_path / "photos"
    tar_of(photos_of("train/1.jpg", "val/2.jpg"), src)
    error = refused(src)
    shell(error.split("`")[1].partition(" && make")[0])
    assert f"make shards SRC={src}-photos/train " in error
    assert (tmp_path / "photos-photos/train/1.jpg").exists()


# ---- masks


MASKS = {  # where photos and masks are; the folder that the message names
    "Oxford pets": ("images/{}.jpg", "annotations/trimaps/{}.png", "images"),
    "Cityscapes": ("leftImg8bit/train/a/{}.png", "gtFine/train/a/{}_labelIds.png", "leftImg8bit"),
    "ADE20K": ("ADE/images/training/{}.jpg", "ADE/annotations/training/{}.png", "ADE/images"),
    "CUB": ("CUB_200/images/001.A/{}.jpg", "segmentations/001.A/{}.png", "CUB_200"),
    "COCO-stuff": ("train2017/{}.jpg", "stuffthingmaps/train2017/{}.png", "train2017"),
    "Carvana": ("train/{}.jpg", "train_masks/{}_mask.gif", "train"),
    "salt": ("train/images/{}.png", "train/masks/{}.png", "train/images"),
    "CamVid": ("train/{}.png", "train_labels/{}_L.png", "train"),
    "ground truth": ("imgs/{}.jpg", "ground_truth/{}.jpg", "imgs"),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=fault) for c in MASKS])
def test_masks_beside_photos_are_refused(case: str, tmp_path: Path) -> None:
    """Gray or RGB ones, which no header tells from photos: by the names of the folders. --labels yes insists."""
    photos, masks, folder = MASKS[case]
    src = tree(tmp_path / "src", {form.format(i): photo(i) for form in (photos, masks) for i in range(3)})
    error = refused(src)
    assert f"make shards SRC={src}/{folder} DST=" in error
    assert " masks, " in error
    assert lines(src, "yes").startswith(("2 classes: ", "1 class: "))
    assert "warning: " in lines(src, "no")
    assert "hold" not in lines(src / folder)


NO_MASKS = (
    ("with_mask", "without_mask"), ("mask", "no_mask"), ("face", "face_mask"), ("mask", "car", "dog"),
    ("Ford GT Coupe 2006", "Ford Focus 2007"), ("label", "box"), ("gas", "gas mask"),
)  # fmt: skip


@pytest.mark.parametrize("names", NO_MASKS, ids=", ".join)
def test_classes_with_words_for_masks(names: tuple[str, ...], tmp_path: Path) -> None:
    src = tree(tmp_path / "src", {f"{name}/{i}.png": encoded(pixels(i), "PNG") for name in names for i in (1, 2)})
    assert list_photos([src]).classes == sorted(names)


@pytest.mark.fault("F23")
@pytest.mark.fast
def test_two_folders_with_the_same_names(tmp_path: Path) -> None:
    """Photos and maybe their masks, in a folder of any name: a warning."""
    src = tree(tmp_path / "src", {f"rgb/{i}.jpg": photo(i) for i in range(3)})
    tree(src, {f"seg/{i}.png": encoded(pixels(i), "PNG") for i in range(3)})
    assert f"warning: {src}: seg and rgb hold files of the same names; if seg holds masks" in lines(src)


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
    src = tree(tmp_path / "src", {"images/1.jpg": photo(1), "images/2.jpg": photo(2), "numbers/1.png": mask()})
    output = make(src)
    assert f"warning: {src}/numbers holds 1 file like a mask, not a photo (palette PNG)" in output
    assert f"`make shards SRC={src}/images DST={src}-shards-images`" in output
    tree(tmp_path / "only", {"1.png": mask(), "2.png": mask(), "3.png": mask()})
    assert f"warning: {tmp_path}/only holds 3 files like masks, not photos (palette PNGs)" in make(tmp_path / "only")
