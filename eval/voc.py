"""A folder in Pascal VOC's layout, read without torch: its splits, files and class names.

folder/JPEGImages/<id>.jpg  SegmentationClass/<id>.png  ImageSets/Segmentation/<split>.txt
folder/SegmentationClassAug/<id>.png    optional: the masks of `trainaug` (VOC's own where one is missing)
folder/classes.txt                      optional: the names of the classes, one per line

A list has one name a line. The name may hold blanks, end in the photo's extension, or differ from the file's in case;
nothing outside the folder is opened. What the masks hold: eval/masks.py.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from runtime.errors import UserError, suggest

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
LISTS = Path("ImageSets") / "Segmentation"
NO_JPEG = "a mask must be a PNG, because a JPEG changes the numbers of pixels: write the masks again, as PNG"
PATHS = re.compile(
    r"(/?\S+\.(?:jpe?g|png|webp))\s+(/?\S+\.png)\s*", re.IGNORECASE
)  # a line of DeepLab's and SBD's lists
FLAG = re.compile(r"(\S+)\s+(-?[01])\s*")  # a line of VOC's lists of one class


class Listed(NamedTuple):
    """A line of a split's list."""

    name: str
    place: str  # file and line, as a message names it


def read_split(folder: str | Path, split: str) -> list[Listed]:
    """The scenes of a split, in the order of the list; empty lines are skipped.

    Raises UserError if the folder does not have VOC's layout, if the split is missing or empty, or if a name leads out of
    the folder.
    """
    lists = Path(folder) / LISTS
    if not lists.is_dir():
        raise UserError(f"{folder}: not in Pascal VOC's layout (no ImageSets/Segmentation/)")
    file = lists / f"{split}.txt"
    if file.parent != lists or not file.is_file():
        known = sorted(path.stem for path in lists.glob("*.txt"))
        raise UserError(f"{lists}: no split '{split}'{suggest(split, known)} (available: {', '.join(known)})")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: byte {error.start} is not UTF-8 text; a list has one name a line") from None
    # split at line ends only: a name may begin or end with a blank
    lines = enumerate(text.replace("\r\n", "\n").split("\n"), 1)
    names = [Listed(line, f"{file}, line {number}") for number, line in lines if line.strip()]
    if not names:
        raise UserError(f"{file}: the split is empty")
    for name, place in names:
        if wrong := name.startswith("/") and _columns(Listed(name, place)):
            raise UserError(wrong)
        if name.startswith(("/", "\\")) or ".." in PurePosixPath(name).parts or "\0" in name:
            raise UserError(f"{place}: '{name}' leads out of {folder}; a list names files below JPEGImages/")
    return names


def default_train_split(folder: str | Path) -> str:
    """`trainaug` if the folder has it, else `train`."""
    return "trainaug" if (Path(folder) / LISTS / "trainaug.txt").is_file() else "train"


def scene_files(folder: str | Path, split: str) -> list[tuple[Path, Path]]:
    """(image, mask) of each scene of a split. Splits named `...aug` prefer SegmentationClassAug.

    Raises UserError, with the list's file and line, if an image or a mask is missing; else as `read_split`.
    """
    folder = Path(folder)
    masks = ["SegmentationClassAug", "SegmentationClass"] if split.endswith("aug") else ["SegmentationClass"]
    find_image = _Finder([folder / "JPEGImages"], IMAGE_SUFFIXES, "image")
    find_mask = _Finder([folder / name for name in masks], (".png",), "mask")
    return [(find_image(scene), find_mask(scene)) for scene in read_split(folder, split)]


def class_names(folder: Path) -> list[str]:
    """The names in classes.txt; empty if there is no such file."""
    file = folder / "classes.txt"
    lines = file.read_text().split("\n") if file.is_file() else []
    return [line.strip() for line in lines if line.strip()]


def is_jpeg(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(3) == b"\xff\xd8\xff"


def _columns(listed: Listed) -> str:
    """What is wrong with a line of more than a name, and the command that mends its list; "" if it is another line."""
    file = shlex.quote(listed.place.rpartition(", line ")[0])
    if paths := PATHS.fullmatch(listed.name):
        name = re.sub(r"^/?JPEGImages/", "", paths[1]).rpartition(".")[0]
        what = f"two paths, '{paths[1]}' and '{paths[2]}'; a list has one name a line, here '{name}'"
        mend = r"s#^/?(JPEGImages/)?([^[:space:]]+)\.[[:alpha:]]+[[:space:]].*#\2#"
    elif flag := FLAG.fullmatch(listed.name):
        what = (
            f"'{flag[1]}' and a flag '{flag[2]}', as in VOC's lists of one class; a list has one name a line, of the scenes "
            "that are meant. Without all flags"
        )
        mend = r"s/[[:space:]]+-?[01][[:space:]]*$//"
    else:
        return ""
    return f"{listed.place}: {what}: `sed -i.bak -E '{mend}' {file}`"


class _Finder:
    """Finds the files that a list names in some folders, the first one first."""

    def __init__(self, folders: list[Path], suffixes: tuple[str, ...], kind: str):
        self.folders, self.suffixes, self.kind = folders, suffixes, kind
        self._listings: dict[Path, dict[str, list[str]]] = {}

    def __call__(self, listed: Listed) -> Path:
        """The file of a name. As it is written goes before another case, without an extension before with one.

        Raises UserError if there is none, or if several differ from the name in case only.
        """
        for name in self._readings(listed.name):
            for folder in self.folders:
                for suffix in self.suffixes:
                    found = self._files(folder / (name + suffix), len(suffix))
                    if len(found) > 1:
                        both = " or ".join(path.name for path in found)
                        raise UserError(f"{listed.place}: '{listed.name}' may be {both} in {found[0].parent}")
                    if found:
                        return found[0]
        if wrong := _columns(listed):
            raise UserError(wrong)
        last = self.folders[-1] / listed.name
        if other := self._with_another_ending(listed.name):
            endings = (
                NO_JPEG if is_jpeg(other) and self.kind == "mask" else f"it must end in {' or '.join(self.suffixes)}"
            )
            raise UserError(f"{listed.place}: the {self.kind} of '{listed.name}' is {other}; {endings}")
        known = [Path(name).stem for names in self._names_in(last.parent).values() for name in names]
        near = suggest(last.name, known, cutoff=0.8)
        raise UserError(f"{listed.place}: no {self.kind} of '{listed.name}' in {last.parent}{near}")

    def _with_another_ending(self, name: str) -> Path | None:
        """A file of this name that is not read, because of its ending."""
        for text in self._readings(name):
            for folder in self.folders:
                path = folder / text
                names = [name for same in self._names_in(path.parent).values() for name in same]
                near = (
                    name for name in names if Path(name).suffix and Path(name).stem.casefold() == path.name.casefold()
                )
                if found := next(near, None):
                    return path.parent / found
        return None

    def _readings(self, name: str) -> Iterator[str]:
        """What a line may mean: the name, without blanks around it, each without the extension of an image."""
        for text in dict.fromkeys((name, name.strip())):
            yield text
            if Path(text).suffix.lower() in IMAGE_SUFFIXES:
                yield text[: -len(Path(text).suffix)]

    def _files(self, path: Path, suffix: int) -> list[Path]:
        """The files that may be meant by a path whose extension has `suffix` letters: those that come nearest in case."""
        names = self._names_in(path.parent).get(path.name.casefold(), [])
        same = [name for name in names if name == path.name]
        same = same or [name for name in names if name[:-suffix] == path.name[:-suffix]]
        return [path.parent / name for name in same or names]

    def _names_in(self, folder: Path) -> dict[str, list[str]]:
        """The names in a folder, by the name in lower case."""
        if folder not in self._listings:
            names: dict[str, list[str]] = {}
            for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                names.setdefault(path.name.casefold(), []).append(path.name)
            self._listings[folder] = names
        return self._listings[folder]
