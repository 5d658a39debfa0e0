"""What the folders of a source are, by their names: splits, masks beside photos, parts of one split, or classes."""

from collections import Counter
from functools import cached_property
from pathlib import Path
from shlex import quote

from pipeline.prepare.archives import stream_kind
from pipeline.prepare.names import in_command, masks_among, printable, split_of, splits_among
from runtime.errors import UserError, plural

INSIST = "or with ARGS='--labels yes' if these are names of classes"
SHOWN = 3  # folders in a message


def make_command(src: Path, folder: str, dst: str) -> str:
    """The command that makes shards of one folder of SRC; a tar is unpacked for it, and of a compressed
    archive the photos that match are taken."""
    if src.is_dir():
        return f"`make shards SRC={word(f'{src}/{folder}')} DST={word(dst)}`"
    if stream_kind(src):
        return f"`make shards SRC={word(str(src))} DST={word(dst)} ARGS=\"--match '{printable(folder)}/*'\"`"
    out = src.with_suffix("")
    if out.is_file():  # as a tar without an ending is
        out = src.with_name(f"{src.name}-photos")
    unpack = f"mkdir -p {word(str(out))} && tar -xf {word(str(src))} -C {word(str(out))}"
    return f"`{unpack} && make shards SRC={word(f'{out}/{folder}')} DST={word(dst)}`"


def word(text: str) -> str:
    return quote(printable(text))


class Layout:
    """The folders of a source's photos. Folders are named below SRC with a slash behind, `a/b/`; SRC itself is "".

    shared: the deepest folder that holds all photos. inside: {folder: sorted names of the folders in it}.
    """

    def __init__(self, src: Path, names: list[str], dst: str):
        """names: of the photos, sorted. dst: the shards' folder, for messages."""
        self.src, self.names, self.dst = src, names, dst
        self.shared = _shared_folder(names)
        self.inside = _folders_in(names)

    @cached_property
    def direct(self) -> Counter[str]:
        """Photos directly in each folder."""
        return Counter(name[: name.rfind("/") + 1] for name in self.names)

    def where(self, folder: str) -> str:
        return printable(f"{self.src}/{folder}".rstrip("/"))

    def refuse_splits(self) -> None:
        """Raise UserError if the folders of SRC/shared hold several splits."""
        splits = splits_among(self.inside[self.shared])
        if not splits:
            return
        photos = Counter(name[len(self.shared) :].partition("/")[0] for name in self.names)
        found = [
            f"{_some(folders, 1)} ({plural(sum(photos[f] for f in folders), 'photo')})" for folders in splits.values()
        ]
        split, folders = next(iter(splits.items()))
        how = f"make shards of one of them: {make_command(self.src, self.shared + folders[0], self.dst)}"
        if len(folders) > 1:
            how = self._join(split, folders)
        raise UserError(
            f"{self.where(self.shared)} holds several splits: {', '.join(found)}; {how}; or with ARGS='--labels no' of all "
            f"of them, without classes; {INSIST}"
        )

    def _join(self, split: str, folders: list[str]) -> str:
        """How to make shards of a split that is in several folders."""
        one = f"{split} is in {len(folders)} folders; move them into one"
        if not self.src.is_dir():
            return f"{one} where the tar is unpacked"
        here = self.src / self.shared
        into = here / (split if not (here / split).exists() else f"all-{split}")
        moved = in_command(here, folders)
        to = word(str(into))
        return f"{one}: `mkdir {to} && mv {moved} {to} && make shards SRC={to} DST={word(self.dst)}`"

    def masks(self) -> str:
        """The folders of masks that lie beside those of photos, and the command for the photos; empty without them."""
        found = [(f, *pair) for f, folders in sorted(self.inside.items()) if (pair := masks_among(folders))]
        if not found:
            return ""
        folder, masks, photos = found[0]
        which = f"{_some(masks)} {'holds' if len(masks) == 1 else 'hold'} masks, {printable(photos)} the photos"
        photos = folder + photos
        while splits := splits_among(self.inside[f"{photos}/"]):  # whose command would be refused
            photos += f"/{next(iter(splits.values()))[0]}"
        right = make_command(self.src, photos, self.dst)
        if len(found) > 1:
            more = plural(len(found) - 1, "more such folder")
            right = f"{right} (and {more}: {self.where(found[1][0])}); or move the masks elsewhere"
        return f"{self.where(folder)}: {which}: {right}"

    def is_voc(self, folder: str) -> bool:
        """Whether its folders are those of Pascal VOC: VOC2007/JPEGImages, VOC2012/JPEGImages."""
        return all("JPEGImages" in self.inside[f"{folder}{f}/"] for f in self.inside[folder])

    @property
    def classes_in(self) -> str:
        """The folder whose folders may be classes: `shared`, or the one above if it holds photos and no
        folders of them: it can only be a class itself."""
        shared = self.shared
        if shared and self.direct[shared] and len(self.inside[shared]) < 2:
            return shared[: shared.rfind("/", 0, -1) + 1]
        return shared

    def stray(self, folder: str) -> str:
        """The photos directly in a folder, for messages; empty if there are none."""
        if not self.direct[folder]:
            return ""
        first = next(name for name in self.names if name.startswith(folder) and "/" not in name[len(folder) :])
        which = printable(first) + (" first" if self.direct[folder] > 1 else "")
        return f"{plural(self.direct[folder], 'photo')} directly in {self.where(folder)} ({which})"

    def warnings(self, folder: str) -> list[str]:
        """Warnings about the folders in this one, which are taken as classes."""
        found = (self.splits_below(folder), self._classes_below(folder), self._same_names(folder))
        return [warning for warning in found if warning]

    def splits_below(self, folder: str) -> str:
        """A warning if folders further down hold several splits (`bottle/train`, `bottle/test`)."""
        mixed = [f for f, folders in sorted(self.inside.items()) if f.startswith(folder) and splits_among(folders)]
        if not mixed:
            return ""
        found = [name for names in splits_among(self.inside[mixed[0]]).values() for name in names]
        more = f" (and {plural(len(mixed) - 1, 'more folder')})" if len(mixed) > 1 else ""
        return (
            f"{self.where(mixed[0])} holds several splits: {printable(', '.join(found))}{more}; the photos of all are used; "
            "to leave one out, move it elsewhere"
        )

    def _classes_below(self, folder: str) -> str:
        """Class folders that hold several folders: `a/abbey`, `a/airfield`."""
        tops = self.inside[folder]
        deep = [f for f in tops if len(self.inside[f"{folder}{f}/"]) > 1]
        deep = [f for f in deep if not splits_among(self.inside[f"{folder}{f}/"])]
        if not deep:
            return ""
        first = deep[0]
        inner = _some(self.inside[f"{folder}{first}/"])
        how = "give each a folder of its own in one folder"
        names = Counter(name for f in tops for name in self.inside[f"{folder}{f}/"])
        if self.src.is_dir() and names.total() == len(names) and not any(self.direct[f"{folder}{f}/"] for f in tops):
            links = f"{self.src}-classes"
            how = (
                f"`mkdir {word(links)} && ln -s {word(f'{self.src}/{folder}'.rstrip('/'))}/*/* {word(links)} && make shards "
                f"SRC={word(links)} DST={word(self.dst)} ARGS=--follow-links`"
            )
        return (
            f"{len(deep):,} of {len(tops):,} class folders hold folders ({printable(first)}: {inner}), whose photos all "
            f"count as one class; if the inner folders are the classes: {how}; if none are, ARGS='--labels no'"
        )

    def _same_names(self, folder: str) -> str:
        """Two folders of files with the same names, of one JPEG and of the other another format: photos and their masks."""
        if len(self.inside[folder]) != 2:
            return ""
        names: dict[str, set[str]] = {}
        are_jpeg: dict[str, set[bool]] = {}
        for name in self.names:
            top, _, below = name[len(folder) :].partition("/")
            names.setdefault(top, set()).add(below.rpartition(".")[0])
            are_jpeg.setdefault(top, set()).add(name.lower().endswith((".jpg", ".jpeg")))
        photos, other = sorted(names, key=lambda top: True not in are_jpeg[top])
        if names[photos] != names[other] or are_jpeg[photos] != {True} or are_jpeg[other] != {False}:
            return ""
        right = make_command(self.src, folder + photos, f"{self.dst}-{photos}")
        return (
            f"{self.where(folder)}: {printable(other)} and {printable(photos)} hold files of the same names; if "
            f"{printable(other)} holds masks, take the photos alone: {right}"
        )


def are_parts(folders: list[str]) -> bool:
    """Whether all folders are parts of one split, as train1 and train2, and no classes."""
    return all(split and not others for split, others in map(split_of, folders))


def _some(names: list[str], shown: int = SHOWN) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return printable(", ".join(names[:shown])) + more


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
