"""What a source holds and its shards will not: counted by kind and ending, and listed by name."""

import re
from collections import Counter
from collections.abc import Collection, Container
from dataclasses import dataclass, field

from pipeline.prepare.kinds import ARCHIVE, PICTURES
from pipeline.prepare.names import ending, printable

MAX_KINDS = 8  # in a line

READ_BEFORE = "folders read before"
BAD_LABELS, NO_PHOTO, DUPLICATES = "labels that cannot be read", "samples without a photo", "duplicates in a sample"
LONE_LABELS = "labels without a photo"
LABEL_LIKE = re.compile(
    "cls|class|label|target|categor|only a number", re.IGNORECASE
)  # a member or key that may be a label


@dataclass
class Skipped:
    """counts: by kind (`links`) or by kind and ending (`HEIC .heic`, `.txt files`). listed: rows of skipped.jsonl,
    {"source": name, "kind": kind, "reason": why}. joined: of each tar, the bytes where another one begins behind it: what
    zeros have overwritten may look like that."""

    counts: Counter[str] = field(default_factory=Counter)
    listed: list[dict[str, str]] = field(default_factory=list)
    joined: dict[str, list[int]] = field(default_factory=dict)

    def add(self, name: str, kind: str, reason: str) -> None:
        """A file, link or folder that is skipped as a whole."""
        self.counts[kind] += 1
        self.listed.append({"source": printable(name), "kind": kind, "reason": reason})

    def add_file(self, name: str, kind: str) -> None:
        """A file that no photo is read from; `kind` is what `kind_of` says."""
        if kind:
            which = "may hold photos, but is not opened" if kind == ARCHIVE else f"{kind} is not read"
            self.add(name, f"{kind} {ending(name) or 'without ending'}", which)
        else:
            last = ending(name)
            self.add(name, f"{last} files" if last else "files without ending", "its first bytes are not a photo's")

    def remove(self, names: Collection[str]) -> None:
        """Files that were counted as skipped, and are a source of photos after all."""
        chosen = set(names)
        self.counts -= Counter(row["kind"] for row in self.listed if row["source"] in chosen)
        self.listed = [row for row in self.listed if row["source"] not in chosen]

    def joints(self, tar: str) -> list[int]:
        """The list in `joined` of a tar, to be filled."""
        return self.joined.setdefault(tar, [])

    def update(self, other: "Skipped") -> None:
        self.counts.update(other.counts)
        self.listed += other.listed
        self.joined |= other.joined

    def pictures(self, photos: Container[str] = ()) -> Counter[str]:
        """Counts of the pictures in formats that are not read, by kind and ending, but for those that `convert_command` has
        converted: `x.heic` beside `x.heic.jpg` among the photos."""
        found = (row for row in self.listed if row["kind"].startswith(PICTURES))
        return Counter(row["kind"] for row in found if f"{row['source']}.jpg" not in photos)

    def archives(self) -> Counter[str]:
        return Counter({kind: n for kind, n in self.counts.items() if kind.startswith(ARCHIVE)})


def counts(kinds: Counter[str]) -> str:
    """The total, and how many of each kind: 3 (links 2, .txt files 1)."""
    most = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))[:MAX_KINDS]
    by_kind = ", ".join(f"{kind} {n:,}" for kind, n in most)
    more = f", {len(kinds) - MAX_KINDS} more kinds" if len(kinds) > MAX_KINDS else ""
    return f"{kinds.total():,}" + (f" ({by_kind}{more})" if by_kind else "")
