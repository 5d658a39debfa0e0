"""Which photos have a class, and which one; `labels` is auto, yes or no.

auto   A folder: the folders directly in SRC are the classes if all photos are in them and there are at least two. If SRC
       holds only one folder, called train, val, test or similar, that folder's folders are used instead. Otherwise there are
       no classes. A tar: the same; a folder that all its members share (`imagenette/...`) is left out first.
       ILSVRC2012_val photos: the devkit's ground truth; classes are the sorted synsets, as for the training photos. Without
       the devkit: no classes.
yes    Every photo must have a class; one folder is enough.
no     No classes.
"""

import fnmatch
import io
import re
import tarfile
from pathlib import Path
from typing import NamedTuple

from pipeline.prepare.names import printable
from runtime.errors import UserError

SPLITS = {"train", "training", "val", "valid", "validation", "test"}
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
MAX_DEVKIT_MEMBER = 1 << 26  # bytes


class Labels(NamedTuple):
    """summary: one line that says how the classes were chosen."""

    label_of: list[int]  # of each photo: position in `classes`, or -1
    classes: list[str]
    summary: str


def label_photos(src: Path, names: list[str], labels: str, devkit: Path | None) -> Labels:
    """Labels of photos with these sorted names below SRC. Raises UserError if they cannot be labeled as asked."""
    if fnmatch.fnmatch(names[0], "ILSVRC2012_val_*") and not any("/" in name for name in names):
        return _imagenet_validation(src, names, labels, devkit)
    refuse_devkit(src, devkit)
    shared = "" if src.is_dir() else _shared_folder(names)
    return _folders_as_classes(src, shared, [name.removeprefix(shared) for name in names], labels)


def refuse_devkit(src: Path, devkit: Path | None) -> None:
    """Raise UserError if a devkit was given for other photos than ImageNet's validation photos."""
    if devkit:
        raise UserError(f"--devkit: {src} does not hold ImageNet's validation photos (ILSVRC2012_val_*.JPEG)")


def _shared_folder(names: list[str]) -> str:
    """The folder that all names begin with, if there are folders below it: `imagenette/`, or nothing."""
    top = names[0].partition("/")[0] + "/"
    return top if all(n.startswith(top) for n in names) and any(n.count("/") > 1 for n in names) else ""


def _folders_as_classes(src: Path, shared: str, names: list[str], labels: str) -> Labels:
    """A class per folder; names are below SRC/`shared`."""
    where = f"{src}/{shared}".rstrip("/")
    folder_of = [name.partition("/")[0] if "/" in name else "" for name in names]
    folders = sorted(set(folder_of))
    if labels != "no" and len(folders) == 1 and folders[0] in SPLITS and all(n.count("/") > 1 for n in names):
        where = f"{where}/{folders[0]}"
        folder_of = [name.split("/", 2)[1] for name in names]
        folders = sorted(set(folder_of))
    if labels == "auto" and len(folders) > 1 and set(folders) <= SPLITS:
        one = f"give one of them ({src}/{folders[0]})" if src.is_dir() else "make shards of one of them"
        raise UserError(f"{where} holds {' and '.join(folders)}: {one}, or --labels no for all of them without classes")
    direct = "" in folders
    if labels == "yes" and direct:
        stray = printable(names[folder_of.index("")])
        raise UserError(f"--labels yes: {stray} is directly in {where}; every photo must be in the folder of its class")
    if labels == "yes" or (labels == "auto" and not direct and len(folders) > 1):
        position = {folder: i for i, folder in enumerate(folders)}
        summary = f"{len(folders)} classes: the folders in {where} (--labels no: no classes)"
        return Labels([position[folder] for folder in folder_of], folders, summary)
    why = "--labels no" if labels == "no" else "photos are directly in it" if direct else "all are in one folder"
    return Labels([-1] * len(names), [], f"no classes in {where}: {why} (--labels yes: one class per folder)")


def _imagenet_validation(src: Path, names: list[str], labels: str, devkit: Path | None) -> Labels:
    """ImageNet's validation photos: line k of the devkit's ground truth is the class of ILSVRC2012_val_<k>.JPEG."""
    default = src.parent / DEVKIT
    if labels == "no" or (devkit is None and labels == "auto" and not default.is_file()):
        why = "--labels no" if labels == "no" else f"{DEVKIT} is not next to it (--devkit FILE gives the classes)"
        return Labels([-1] * len(names), [], f"ImageNet's validation photos without classes: {why}")
    devkit = devkit or default
    truth, synsets = _read_devkit(devkit)
    classes = sorted(synsets.values())
    position = {synset: i for i, synset in enumerate(classes)}
    label_of = []
    for name in names:
        match = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", name)
        if not match or not 1 <= int(match[1]) <= len(truth):
            raise UserError(f"{src}: {printable(name)} is not one of the {len(truth)} validation photos in {devkit}")
        label_of.append(position[synsets[truth[int(match[1]) - 1]]])
    return Labels(label_of, classes, f"ImageNet's validation photos: {len(classes)} classes from {devkit.name}")


def _read_devkit(devkit: Path) -> tuple[list[int], dict[int, str]]:
    """(ILSVRC2012 id of every validation photo, synset of every id that has no children: the 1000 classes)."""
    try:
        from scipy.io import loadmat  # meta.mat is the only file that maps ids to synsets
    except ImportError:
        raise UserError(f"reading {devkit.name} needs scipy: `pip install scipy`, or --labels no") from None
    contents = {"validation_ground_truth.txt": b"", "meta.mat": b""}
    try:
        with tarfile.open(devkit, "r:gz") as tar:
            for m in tar:
                for ending in contents:
                    if m.isreg() and m.name.endswith(ending) and m.size < MAX_DEVKIT_MEMBER:
                        contents[ending] = tar.extractfile(m).read()  # type: ignore[union-attr]  # a regular file
        synsets = loadmat(io.BytesIO(contents["meta.mat"]), squeeze_me=True)["synsets"]
        leaves = synsets[synsets["num_children"] == 0]
        ids = {int(i): str(wnid) for i, wnid in zip(leaves["ILSVRC2012_ID"], leaves["WNID"], strict=True)}
        truth = [int(line) for line in contents["validation_ground_truth.txt"].split()]
        if not truth or not set(truth) <= set(ids):
            raise ValueError("the ground truth has ids without a synset")
    except FileNotFoundError:
        raise UserError(f"{devkit}: no such file; --devkit takes ImageNet's {DEVKIT}") from None
    except Exception as error:  # anything that tarfile, zlib and loadmat raise for another kind of file
        raise UserError(f"{devkit}: not ImageNet's {DEVKIT}: {error}") from None
    return truth, ids
