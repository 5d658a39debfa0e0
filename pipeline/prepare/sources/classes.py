"""Which photos have a class, and which one; `labels` is auto, yes or no.

Where to look: SRC; or, while a folder holds nothing but one folder, that one (`images/<class>/`, `ILSVRC/Data/CLS-LOC/`). A
tar is looked at as a folder is.

auto   Photos named by ImageNet's synsets, all directly in one folder (`n01440764_10026.JPEG`): the synsets are the classes.
       The folders there are the classes if all photos are in them and there are at least two. Otherwise there are none.
       Several splits (train, val, test..., in any form), or folders of masks beside photos, are refused.
       ILSVRC2012_val photos: the devkit's ground truth; classes are the sorted synsets, as for the training photos. Without
       the devkit: no classes.
yes    Every photo must have a class; one folder is enough.
no     No classes.
"""

import io
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from pipeline.prepare.names import printable
from pipeline.prepare.sources.layout import INSIST, Layout, are_parts
from runtime.errors import UserError, plural

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
MAX_DEVKIT_MEMBER = 1 << 26  # bytes
SYNSET = re.compile(r"(?:ILSVRC2012_val_\d{8}_)?(n\d{8})(?:_\d+)?(?:_n\d{8})?\.\w+")  # a flat photo's name


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
    folder = names[0][: names[0].rfind("/") + 1]
    if labels != "no" and (synsets := _synsets(names, folder, at_least=1 if labels == "yes" else 2)):
        refuse_devkit(src, devkit)
        classes = sorted(set(synsets))
        position = {synset: i for i, synset in enumerate(classes)}
        count = plural(len(classes), "class")
        summary = f"{count}: the synsets in the photos' names (--labels no: no classes)"
        return Labels([position[synset] for synset in synsets], classes, summary, folder)
    if all(name.startswith(f"{folder}ILSVRC2012_val_") for name in names):
        return _imagenet_validation(src, folder, names, labels, devkit)
    refuse_devkit(src, devkit)
    return _folders_as_classes(src, names, labels, dst)


def _synsets(names: list[str], folder: str, at_least: int) -> list[str]:
    """The synset in the name of each photo, if all lie directly in this folder and have one; otherwise none."""
    found = []
    for name in names:
        match = SYNSET.fullmatch(name, len(folder))
        if not match:
            return []
        found.append(match[1])
    return found if len(set(found)) >= at_least else []


def refuse_devkit(src: Path, devkit: Path | None) -> None:
    """Raise UserError if a devkit was given for other photos than ImageNet's validation photos."""
    if devkit:
        raise UserError(f"--devkit: {src} does not hold ImageNet's validation photos (ILSVRC2012_val_*.JPEG)")


def _folders_as_classes(src: Path, names: list[str], labels: str, dst: str) -> Labels:
    """A class per folder of the folder that is looked at."""
    layout = Layout(src, names, dst)
    masks = layout.masks() if labels != "yes" else ""
    if labels == "auto":
        if masks:
            raise UserError(f"{masks}; {INSIST}")
        layout.refuse_splits()
    shared = layout.classes_in
    where = layout.where(shared)
    folder_of = [name[len(shared) :].partition("/")[0] if "/" in name[len(shared) :] else "" for name in names]
    folders = sorted({*folder_of} - {""})
    stray = layout.stray(shared)
    if labels == "yes" and stray:
        raise UserError(
            f"--labels yes: {stray}; every photo must be in the folder of its class: move such photos, or use --labels no"
        )
    why = "--labels no" if labels == "no" else "" if labels == "yes" else _why_none(layout, shared, folders)
    if why:
        warnings = [masks, layout.splits_below(shared)]
        if labels == "auto" and stray and len(folders) > 1:
            warnings.append(
                f"{stray}, beside {len(folders):,} folders, so there are no classes; if the folders are classes, move such "
                "photos elsewhere or into one of them; if not, ARGS='--labels no'"
            )
        summary = f"no classes in {where}: {why}"
        return Labels([-1] * len(names), [], summary, shared, tuple(filter(None, warnings)))
    position = {folder: i for i, folder in enumerate(folders)}
    count = plural(len(folders), "class")
    summary = f"{count}: the folders in {where} (--labels no: no classes)"
    warnings = layout.warnings(shared) if labels == "auto" else []
    return Labels([position[folder] for folder in folder_of], folders, summary, shared, tuple(warnings))


def _why_none(layout: Layout, shared: str, folders: list[str]) -> str:
    """Why the folders in SRC/shared are no classes, empty if they are."""
    if layout.direct[shared]:
        return "photos are directly in it"
    insist = " (--labels yes: one class per folder)"
    if len(folders) == 1:
        return f"all are in one folder{insist}"
    if are_parts(folders):
        return f"its folders are parts of one split{insist}"
    return f"its folders are those of Pascal VOC{insist}" if layout.is_voc(shared) else ""


def _imagenet_validation(src: Path, folder: str, names: list[str], labels: str, devkit: Path | None) -> Labels:
    """ImageNet's validation photos, all in SRC/folder: line k of the devkit's ground truth is the class of
    ILSVRC2012_val_<k>.JPEG."""
    beside = [src.parent / DEVKIT, (src / folder).parent / DEVKIT]
    default = next((path for path in beside if path.is_file()), beside[0])
    if labels == "no" or (devkit is None and labels == "auto" and not default.is_file()):
        why = "--labels no" if labels == "no" else f"{DEVKIT} is not next to it (--devkit FILE gives the classes)"
        return Labels([-1] * len(names), [], f"ImageNet's validation photos without classes: {why}")
    devkit = devkit or default
    truth, synsets = _read_devkit(devkit)
    classes = sorted(synsets.values())
    position = {synset: i for i, synset in enumerate(classes)}
    label_of = []
    for name in names:
        match = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", name[len(folder) :])
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
