"""What every source of photos is read into: where each photo is, and how the source was interpreted."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pipeline.prepare.names import printable
from pipeline.prepare.skipped import Skipped


class Photo(NamedTuple):
    """Where one photo is: a file of its own below its source, or bytes of a file that holds many."""

    name: str  # below the source; undecodable bytes as surrogates
    offset: int
    size: int
    label: int = -1  # position in the classes; -1: none
    file: str = (
        ""  # below the source, or absolute: what holds the bytes; "": the source itself, or the photo's own file
    )
    packed: int = 0  # bytes in that file, if they are deflated (a zip's); 0: they are the photo's own
    crc: int | None = None  # crc32 of the photo, where its source knows it
    shown: str = ""  # where a user finds it, if that is not `name`: tar/member
    root: int = 0  # of several sources, which one

    @property
    def place(self) -> str:
        return printable(self.shown or self.name)


class Root(NamedTuple):
    """One source. prefix: what comes before the names of its photos, where there are several sources."""

    path: Path
    follow_links: bool = False
    prefix: str = ""


@dataclass(frozen=True)
class Ask:
    """What the user asks of the sources."""

    labels: str = "auto"  # auto, yes, no: classes.py
    devkit: Path | None = None
    follow_links: bool = False
    skip_broken: bool = False  # of several tars, leave out those that cannot be read
    match: str = ""  # a pattern: only photos, or files of Parquet, whose name or path below SRC matches
    listed: Path | None = None  # only the photos of this table, with its labels: tables.py
    label_file: Path | None = None  # a table of labels
    class_names: Path | None = None  # a table of names of classes
    photo: str = ""  # the column of the photos, in Parquet
    label: str = ""  # the column of the labels, in Parquet
    dst: str = "DST"  # the shards' folder, for messages
    work: Path = Path(".make_shards", "unpacked")  # where sources without offsets are unpacked


@dataclass
class Listing:
    """The photos of one source. classes: their names, if the source itself has labels; None: names of folders may be."""

    photos: list[Photo]
    summary: str = ""  # one line: how the classes were chosen
    classes: list[str] | None = None
    origin: str = ""  # the folder or file that the photos' names are below, if it is not the source
    matched: bool = False  # whether `Ask.match` has chosen its files already, as of Parquet
    warnings: list[str] = field(default_factory=list)
    broken: list[dict] = field(default_factory=list)  # rows of rejected.jsonl: tars that were left out


@dataclass
class SourceIndex:
    """All photos of all sources, each source's sorted by name, and how they were interpreted."""

    photos: list[Photo]
    classes: list[str]
    summary: str
    skipped: Skipped
    roots: list[Root]
    origin: str = ""  # first line of sources.txt
    warnings: list[str] = field(default_factory=list)
    broken: list[dict] = field(default_factory=list)

    def digest(self) -> str:
        """sha256 of names, sizes and labels: equal for the same photos as a folder and as a tar."""
        sha = hashlib.sha256()
        for p in self.photos:
            name = self.roots[p.root].prefix + p.name
            sha.update(f"{name}\0{p.size} {p.label}\n".encode("utf-8", "surrogateescape"))
        return sha.hexdigest()
