"""Labels in tars of other programs: numbers or names of classes, in `.cls`, `.json` (key cls, label or class) or `.txt`."""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from typing import BinaryIO, NamedTuple

from pipeline.prepare.names import printable
from pipeline.prepare.skipped import BAD_LABELS, LABEL_LIKE, Skipped
from pipeline.prepare.tar import Member

LABEL_ENDINGS = ("cls", "json", "txt")  # in the order in which they are looked at
JSON_KEYS = ("cls", "label", "class")
MAX_CLASSES = 100_000  # a number is a position in a list of classes
MAX_LABEL = 1 << 16  # bytes; a larger member holds something else
MAX_NAME = 100  # characters of a class name; captions are longer


class Written(NamedTuple):
    """A label as it is written in a tar. value: a number, a name, or None for a sample without a class."""

    source: str = ""  # the member's name
    ending: str = ""
    value: int | str | None = None


def read_label(tar: BinaryIO, parts: Mapping[str, Member], skipped: Skipped, where: str) -> Written:
    """The label among a sample's members; without a value if there is none, or none that can be read, which is counted.

    where: the tar's name. A `.json` without such a key, or a `.txt` of several lines, is no label.
    """
    bad = Written()
    label = Written()
    for ending in LABEL_ENDINGS:
        if ending not in parts:
            continue
        m = parts[ending]
        data = os.pread(tar.fileno(), min(m.size, MAX_LABEL), m.offset)
        source = f"{where}/{m.name}"
        kind = f".{ending} files"
        try:
            value, other = _json_label(data) if ending == "json" else (parse_label(data), "")
            kind += f" with {other}" if other else ""
        except ValueError as error:
            value, bad = None, Written(source, str(error)) if ending != "txt" and not bad.source else bad
        if label.value is None and value is not None:
            label = Written(source, ending, value)
        elif ending != "cls":
            skipped.counts[kind] += 1
    if bad.source and label.value is None:
        skipped.add(bad.source, BAD_LABELS, bad.ending)
    return label


def parse_label(data: bytes) -> int | str | None:
    """3 for `3`, `3.0` and b'3'; a name for any other text; None for -1, which means no class. Raises ValueError."""
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        text = ""
    if quoted := re.fullmatch(r"b?(['\"])(.*)\1", text):  # a text that Python wrote with its quotes
        text = quoted[2]
    if re.fullmatch(r"[+-]?\d{1,12}(\.0*)?", text):
        number = int(float(text))
        if number >= MAX_CLASSES:
            raise ValueError(f"{number} is above the highest label, {MAX_CLASSES - 1}")
        return number if number >= 0 else None
    if not text.isprintable() or not re.search(r"[^\W\d_]", text) or len(text) > MAX_NAME:
        raise ValueError(f"{data[:20]!r} is neither a number nor the name of a class")
    return text


def _json_label(data: bytes) -> tuple[int | str | None, str]:
    """The label in a JSON object, None if it has none; and then what may be one (`class_id`, `only a number`). Raises
    ValueError if the label is neither a number nor a name."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None, ""
    if not isinstance(found, dict):
        return None, "only a number" if isinstance(found, int | float) else ""
    key = next((k for k in JSON_KEYS if k in found), None)
    if key is None:
        return None, next((printable(k)[:MAX_NAME] for k in found if LABEL_LIKE.search(k)), "")
    value = found[key]
    if value is None:
        return None, ""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{key}: {json.dumps(value)[:20]} is neither a number nor the name of a class")
    return parse_label(str(value).encode()), ""


def resolve_labels(written: list[Written], skipped: Skipped) -> tuple[list[int], list[str], str]:
    """(position in the classes of each label, -1 for none; names of the classes; what was decided, or nothing).

    If most labels are numbers, a class is its number and has no name here: the names are empty. Otherwise the classes are
    the texts in sorted order. Texts in `.txt` of which most occur once are captions.
    """
    captions = Counter(w.value for w in written if w.ending == "txt" and isinstance(w.value, str))
    is_caption = 2 * len(captions) > captions.total()
    if is_caption:
        written = [Written() if w.ending == "txt" and isinstance(w.value, str) else w for w in written]
        skipped.counts[".txt files"] += captions.total()
    texts = [w for w in written if isinstance(w.value, str)]
    numbers = sum(isinstance(w.value, int) for w in written)
    said = ""
    if captions:
        what = "captions, no classes" if is_caption else "names of classes, no captions"
        said = f"the .txt members are {what}: {len(captions):,} texts of {captions.total():,} differ"
    if numbers >= len(texts):
        for w in texts:
            skipped.add(w.source, BAD_LABELS, f"{w.value!r} is a name, and most labels are numbers")
        return [w.value if isinstance(w.value, int) else -1 for w in written], [], said
    names = sorted({str(w.value) for w in written if w.value is not None})
    position = {name: i for i, name in enumerate(names)}
    return [-1 if w.value is None else position[str(w.value)] for w in written], names, said
