"""Which photos have a class, and which one; `labels` is auto, yes or no.

Where to look: SRC; or, while a folder holds nothing but one folder, that one (`images/<class>/`, `ILSVRC/Data/CLS-LOC/`). A
tar is looked at as a folder is.

auto   The folders there are the classes if all photos are in them and there are at least two. Otherwise there are none.
       Several splits (train, val, test..., in any form), or the photos and masks of VOC, are refused.
       ILSVRC2012_val photos: the devkit's ground truth; classes are the sorted synsets, as for the training photos. Without
       the devkit: no classes.
yes    Every photo must have a class; one folder is enough.
no     No classes.
"""

import fnmatch
import io
import re
import tarfile
from collections import Counter
from pathlib import Path
from shlex import quote
from typing import NamedTuple

from pipeline.prepare.names import printable, split_of, splits_among
from pipeline.shards import plural
from runtime.errors import UserError

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
MAX_DEVKIT_MEMBER = 1 << 26  # bytes


SHOWN_CLASSES = 5  # before the work begins


def describe_classes(classes: list[str], photos: Counter[int]) -> str:
    """A line with the first classes that have photos. photos: how many have each label."""
    found = [f"{printable(name)} ({plural(photos[i], 'photo')})" for i, name in enumerate(classes) if photos[i]]
    more = len(found) - SHOWN_CLASSES
    return f"classes: {', '.join(found[:SHOWN_CLASSES])}{f', ... {more:,} more' if more > 0 else ''}"


class Labels(NamedTuple):
    """summary: one line that says how the classes were chosen."""

    label_of: list[int]  # of each photo: position in `classes`, or -1
    classes: list[str]
    summary: str
    below: str = ""  # the folder below SRC that was looked at: `images/`
    warnings: tuple[str, ...] = ()


def label_photos(src: Path, names: list[str], labels: str, devkit: Path | None, dst: str) -> Labels:
    """Labels of photos with these sorted names below SRC; dst: the shards' folder, for messages. Raises UserError if they
    cannot be labeled as asked."""
    if fnmatch.fnmatch(names[0], "ILSVRC2012_val_*") and not any("/" in name for name in names):
        return _imagenet_validation(src, names, labels, devkit)
    refuse_devkit(src, devkit)
    return _folders_as_classes(src, names, labels, dst)


def refuse_devkit(src: Path, devkit: Path | None) -> None:
    """Raise UserError if a devkit was given for other photos than ImageNet's validation photos."""
    if devkit:
        raise UserError(f"--devkit: {src} does not hold ImageNet's validation photos (ILSVRC2012_val_*.JPEG)")


def make_command(src: Path, folder: str, dst: str) -> str:
    """The command that makes shards of one folder of SRC; a tar is unpacked for it."""
    if src.is_dir():
        return f"`make shards SRC={_word(f'{src}/{folder}')} DST={_word(dst)}`"
    out = src.with_suffix("")
    unpack = f"mkdir -p {_word(str(out))} && tar -xf {_word(str(src))} -C {_word(str(out))}"
    return f"`{unpack} && make shards SRC={_word(f'{out}/{folder}')} DST={_word(dst)}`"


def _word(text: str) -> str:
    return quote(printable(text))


def _folders_as_classes(src: Path, names: list[str], labels: str, dst: str) -> Labels:
    """A class per folder of the folder that is looked at."""
    shared = _shared_folder(names)
    inside = _folders_in(names)
    if labels == "auto":
        _refuse_splits(src, shared, names, inside[shared], dst)
        _refuse_masks(src, inside, dst)
    if shared and any("/" not in name[len(shared) :] for name in names):
        shared = shared[:-1].rpartition("/")[0]  # photos are directly in it: it can only be a class itself
        shared += "/" if shared else ""
    where = printable(f"{src}/{shared}".rstrip("/"))
    below = [name[len(shared) :] for name in names]
    folder_of = [name.partition("/")[0] if "/" in name else "" for name in below]
    folders = sorted(set(folder_of))
    direct = "" in folders
    warnings = () if labels == "yes" else _warn_of_splits(src, shared, inside)
    if labels == "yes" and direct:
        stray = printable(below[folder_of.index("")])
        raise UserError(f"--labels yes: {stray} is directly in {where}; every photo must be in the folder of its class")
    if labels == "yes" or (labels == "auto" and not direct and len(folders) > 1 and not _are_parts(folders)):
        position = {folder: i for i, folder in enumerate(folders)}
        count = f"{len(folders):,} {'class' if len(folders) == 1 else 'classes'}"
        summary = f"{count}: the folders in {where} (--labels no: no classes)"
        return Labels([position[folder] for folder in folder_of], folders, summary, shared, warnings)
    if labels == "no":
        why = "--labels no"
    elif direct:
        why = "photos are directly in it"
    else:
        why = "all are in one folder" if len(folders) == 1 else "its folders are parts of one split"
    summary = f"no classes in {where}: {why} (--labels yes: one class per folder)"
    return Labels([-1] * len(names), [], summary, shared, warnings)


def _shared_folder(names: list[str]) -> str:
    """The deepest folder that holds all of these sorted names: `ILSVRC/Data/CLS-LOC/`, or nothing."""
    shared = ""
    for folder, other in zip(names[0].split("/")[:-1], names[-1].split("/")[:-1], strict=False):
        if folder != other:
            break
        shared += folder + "/"
    return shared


def _folders_in(names: list[str]) -> dict[str, list[str]]:
    """{folder: names of the folders in it}, sorted: {"": ["a"], "a/": ["b"], "a/b/": []}."""
    folders = set[str]()
    for folder in {name.rpartition("/")[0] for name in names}:
        while folder and folder not in folders:
            folders.add(folder)
            folder = folder.rpartition("/")[0]
    inside: dict[str, list[str]] = {"": [], **{f"{folder}/": [] for folder in folders}}
    for folder in sorted(folders):
        above, _, last = folder.rpartition("/")
        inside[f"{above}/" if above else ""].append(last)
    return inside


def _are_parts(folders: list[str]) -> bool:
    """Whether all folders are parts of one split, as train1 and train2, and no classes."""
    return all(split and not others for split, others in map(split_of, folders))


def _refuse_splits(src: Path, shared: str, names: list[str], folders: list[str], dst: str) -> None:
    """Raise UserError if these folders of SRC/shared hold several splits."""
    splits = splits_among(folders)
    if not splits:
        return
    photos = Counter(name[len(shared) :].partition("/")[0] for name in names)
    found = [f"{printable(f)} ({plural(photos[f], 'photo')})" for folder in splits.values() for f in folder]
    first = next(iter(splits.values()))[0]
    raise UserError(
        f"{printable(f'{src}/{shared}'.rstrip('/'))} holds several splits: {', '.join(found)}; make shards of one of them: "
        f"{make_command(src, shared + first, dst)}; or with ARGS='--labels no' of all of them, without classes; or with "
        "ARGS='--labels yes' if these are names of classes"
    )


def _refuse_masks(src: Path, inside: dict[str, list[str]], dst: str) -> None:
    """Raise UserError if a folder is laid out as Pascal VOC, where masks lie beside the photos."""
    for folder, folders in sorted(inside.items()):
        masks = [f for f in folders if f in ("SegmentationClass", "SegmentationObject", "SegmentationClassAug")]
        if "JPEGImages" in folders and masks:
            where = printable(f"{src}/{folder}".rstrip("/"))
            raise UserError(
                f"{where}: a folder of Pascal VOC; {masks[0]} holds masks, JPEGImages the photos: "
                f"{make_command(src, folder + 'JPEGImages', dst)}"
            )


def _warn_of_splits(src: Path, shared: str, inside: dict[str, list[str]]) -> tuple[str, ...]:
    """A warning if folders further down hold several splits (`bottle/train`, `bottle/test`)."""
    mixed = [f for f, folders in sorted(inside.items()) if f.startswith(shared) and splits_among(folders)]
    if not mixed:
        return ()
    found = [name for names in splits_among(inside[mixed[0]]).values() for name in names]
    more = f" (and {plural(len(mixed) - 1, 'more folder')})" if len(mixed) > 1 else ""
    where = printable(f"{src}/{mixed[0]}".rstrip("/"))
    splits = printable(", ".join(found))
    return (
        f"{where} holds several splits: {splits}{more}; the photos of all are used; to leave one out, move it elsewhere",
    )


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
