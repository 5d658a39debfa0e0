"""Names of source files and folders: photos, splits, what systems leave behind; and how a name is printed."""

import fnmatch
import os
import re
from collections.abc import Iterable
from pathlib import Path
from shlex import quote

ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")

# Folders of file systems, network disks and programs; in lower case
SYSTEM = {
    "@eadir", "@recycle", "@tmp", "#recycle", "#snapshot", "$recycle.bin", "recycler", "lost+found",
    "system volume information", "__macosx", "__pycache__", "thumbnails", "_thumbnails", "thumbs", "_thumbs",
}  # fmt: skip

SPLITS = ("train", "trainval", "val", "test", "extra", "unlabeled")  # in the order in which they are offered
_SPLIT_WORDS = {
    "train": "train", "training": "train", "trainset": "train", "trn": "train", "trainval": "trainval",
    "val": "val", "valid": "val", "validation": "val", "valset": "val", "dev": "val", "devset": "val",
    "test": "test", "testing": "test", "testset": "test", "tst": "test", "eval": "test", "evaluation": "test",
    "holdout": "test", "heldout": "test",
    "extra": "extra",
    "unlabeled": "unlabeled", "unlabelled": "unlabeled",
}  # fmt: skip
_WORDS_FOR_PHOTOS = {
    "image", "images", "img", "imgs", "jpegimages", "photo", "photos", "data", "dataset", "set", "split",
}  # fmt: skip
_WORDS_FOR_MASKS = {"mask", "masks", "label", "labels", "annotation", "annotations", "annot", "annots"}
# Names that are of no class, and so of masks whatever lies beside them; letters only
_NAMES_OF_MASKS = {
    "annotations", "trimaps", "segmentations", "segmentationclass", "segmentationobject", "segmentationclassaug",
    "groundtruth", "groundtruths", "gt", "gts", "gtfine", "gtcoarse", "stuffthingmaps", "labelids",
}  # fmt: skip


# of formats that are converted where a package reads them (kinds.py)
CONVERTED_ENDINGS = (".heic", ".heif", ".hif", ".avif", ".jp2", ".j2k", ".jpf", ".jpx")


def matches(name: str, pattern: str) -> bool:
    """Whether a path or its last part matches a pattern as a shell has them; everything matches an empty one."""
    return not pattern or any(fnmatch.fnmatchcase(n, pattern) for n in (name, name.rpartition("/")[2]))


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
    """(split, the other words) of a folder's or file's name, in any case and form. `train2017`, `images_Train` and `train_a`
    are ("train", ()); `imagenet-validation-000001` is ("val", ("imagenet",)). The split is empty if the name has none."""
    words = _words(name)
    splits = dict.fromkeys(_SPLIT_WORDS[w] for w in words if w in _SPLIT_WORDS)
    split = "".join(splits)  # train_val is trainval
    others = tuple(w for w in words if w not in _SPLIT_WORDS and w not in _WORDS_FOR_PHOTOS)
    if split not in SPLITS:
        return "", others
    return split, others[:-1] if others and len(words[-1]) == 1 else others  # the letter of a part


def _words(name: str) -> list[str]:
    return re.findall("[a-z]+", re.sub("(?<=[a-z])(?=[A-Z])", " ", name).lower())


def split_order(name: str) -> tuple[int, str]:
    """A key that sorts names by their split, train first, and those without one last."""
    return (*SPLITS, "").index(split_of(name)[0]), name


def splits_among(names: Iterable[str]) -> dict[str, list[str]]:
    """{split: its names} if the names hold at least two splits of one data set, otherwise empty.

    Names belong together if they differ in the split only, or if all have a split and one is nothing else (`train`,
    `test_easy`, `test_hard`). So `bullet_train` and `test_tube` are classes.
    """
    by_others: dict[tuple[str, ...], dict[str, list[str]]] = {}
    together: dict[str, list[str]] = {}
    names = sorted(names)
    for name in names:
        split, others = split_of(name)
        if split:
            by_others.setdefault(others, {}).setdefault(split, []).append(name)
            together.setdefault(split, []).append(name)
    groups = list(by_others.values())
    if () in by_others and sum(map(len, together.values())) == len(names):
        groups = [together]
    for found in groups:
        if len(found) > 1:
            return dict(sorted(found.items(), key=lambda item: SPLITS.index(item[0])))
    return {}


def masks_among(folders: list[str]) -> tuple[list[str], str] | None:
    """(folders of masks, the folder of photos) among folders beside each other; None if no name says so.

    Both are nothing but words for masks, photos and splits: `images` and `masks`, `train` and `train_labels`. Beside a name
    that no class has (`gtFine`), the photos' folder may have any name. So `mask` and `face`, or `with_mask` and
    `without_mask`, are classes.
    """
    alone = {f for f in folders if "".join(_words(f)) in _NAMES_OF_MASKS}
    masked = {f for f in folders if _WORDS_FOR_MASKS.intersection(_words(f))} | alone
    rest = {f: _WORDS_FOR_MASKS.union(_SPLIT_WORDS).issuperset(split_of(f)[1]) for f in folders}
    masks = [f for f in folders if f in alone or (f in masked and rest[f])]
    others = [f for f in folders if f not in masked]
    photos = [f for f in others if rest[f] and _words(f)]
    if not photos:
        masks, photos = sorted(alone), others
    if not masks or not photos:
        return None
    return masks, min(photos, key=split_order)


def in_command(folder: Path, names: list[str], ending: str = "") -> str:
    """These files of a folder in a command: as a pattern if it matches no other file there."""
    if len(names) > 1:
        beginning = os.path.commonprefix(names).removesuffix(ending)  # noqa: RUF071  # of letters, not of folders
        matched = [p.name for p in folder.iterdir() if p.name.startswith(beginning) and p.name.endswith(ending)]
        if (beginning or ending) and sorted(matched) == sorted(names):
            return f"{quote(f'{folder}/{beginning}')}*{ending}"
    return " ".join(quote(str(folder / name)) for name in names)


def printable(name: str) -> str:
    """A name as valid UTF-8 on one line: control characters and undecodable bytes are escaped."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
