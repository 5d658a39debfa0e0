"""Names of source files and folders: photos, splits, what systems leave behind; and how a name is printed."""

import os
import re
from collections.abc import Iterable

ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")

# Folders of file systems, network disks and programs; in lower case
SYSTEM = {
    "@eadir", "@recycle", "@tmp", "#recycle", "#snapshot", "$recycle.bin", "recycler", "lost+found",
    "system volume information", "__macosx", "__pycache__",
}  # fmt: skip

SPLITS = ("train", "trainval", "val", "test", "unlabeled")  # in the order in which they are offered
_SPLIT_WORDS = {
    "train": "train", "training": "train", "trainset": "train", "trainval": "trainval",
    "val": "val", "valid": "val", "validation": "val", "valset": "val",
    "test": "test", "testing": "test", "testset": "test",
    "unlabeled": "unlabeled", "unlabelled": "unlabeled",
}  # fmt: skip
_WORDS_FOR_PHOTOS = {"image", "images", "img", "imgs", "photo", "photos", "data", "dataset", "set", "split"}


def has_photo_ending(name: str) -> bool:
    return name.lower().endswith(ENDINGS)


def ending(name: str) -> str:
    """`.heic` of a/b.HEIC; empty if the name has no ending."""
    match = re.search(r"[^/](\.\w{1,12})$", name, re.ASCII)
    return match[1].lower() if match else ""


def is_hidden(base: str) -> bool:
    return base.startswith(".")  # ._x.jpg: macOS writes it next to a photo


def folder_to_skip(base: str) -> str:
    """Why a folder with this name is skipped, empty if it is not."""
    return "hidden folders" if is_hidden(base) else "system folders" if base.lower() in SYSTEM else ""


def skipped_folder(name: str) -> tuple[str, str]:
    """(the first folder in a member's name that is skipped, why): (`a/@eaDir/`, "system folders"). Empty without one."""
    parts = name.split("/")[:-1]
    for depth, part in enumerate(parts, 1):
        if why := folder_to_skip(part):
            return "/".join(parts[:depth]) + "/", why
    return "", ""


def split_of(name: str) -> tuple[str, tuple[str, ...]]:
    """(split, the other words) of a folder's or file's name, in any case and form. `train2017` and `images_Train` are
    ("train", ()); `imagenet-validation-000001` is ("val", ("imagenet",)). The split is empty if the name has none."""
    words = re.findall("[a-z]+", re.sub("(?<=[a-z])(?=[A-Z])", " ", name).lower())
    splits = dict.fromkeys(_SPLIT_WORDS[w] for w in words if w in _SPLIT_WORDS)
    split = "".join(splits)  # train_val is trainval
    others = tuple(w for w in words if w not in _SPLIT_WORDS and w not in _WORDS_FOR_PHOTOS)
    return (split, others) if split in SPLITS else ("", others)


def splits_among(names: Iterable[str]) -> dict[str, list[str]]:
    """{split: its names} if the names hold at least two splits of one data set, otherwise empty.

    Names belong together if they differ in the split only. So `bullet_train` and `test_tube` are classes.
    """
    by_others: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for name in sorted(names):
        split, others = split_of(name)
        if split:
            by_others.setdefault(others, {}).setdefault(split, []).append(name)
    for found in by_others.values():
        if len(found) > 1:
            return dict(sorted(found.items(), key=lambda item: SPLITS.index(item[0])))
    return {}


def printable(name: str) -> str:
    """A name as valid UTF-8 on one line: control characters and undecodable bytes are escaped."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
