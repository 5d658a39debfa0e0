"""Tables that users bring: lists of photos, their labels, names of classes. CSV, TSV, JSON, JSON lines, or text.

    path,label          a/1.jpg cat         {"a/1.jpg": "cat"}         [{"file_name": "a/1.jpg", "label": "cat"}]
    a/1.jpg,cat         a/2.jpg dog

A first line that names its columns is read as such; without one, the first column is the photo, the second the label. A
table may have no labels. Photos are found by their path below SRC, with or without its ending, or by the base name if only
one photo has it.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.prepare.names import ENDINGS, printable
from pipeline.prepare.tars.labels import MAX_CLASSES
from runtime.errors import UserError, suggest, suggest_path

PATHS = (
    "path", "file_name", "filename", "file", "filepath", "image_path", "image", "img", "photo", "name", "image_id", "id",
)  # fmt: skip
LABELS = ("label", "labels", "class", "class_name", "cls", "target", "category", "species", "breed", "y")
MAX_TABLE = 1 << 30  # bytes
KINDS = (".csv", ".tsv", ".json", ".jsonl", ".txt", ".lst", ".list")
_WITH_ENDING = re.compile(
    rf"(.*?(?:{'|'.join(map(re.escape, (*ENDINGS, '.heic', '.avif', '.jp2')))}))(?:[\s,;]+(.*))?", re.IGNORECASE
)


class Row(NamedTuple):
    line: int
    photo: str
    label: str | int | None


def is_table(path: Path) -> bool:
    return path.suffix.lower() in KINDS


def read_table(path: Path) -> list[Row]:
    """The rows of a table. Raises UserError if it is none, or if a photo has two labels."""
    try:
        if path.stat().st_size > MAX_TABLE:
            raise UserError(f"{path}: {path.stat().st_size:,} bytes are more than a table of photos has")
        text = path.read_text("utf-8-sig")
        rows = list(_from_json(path, text) if path.suffix.lower() in (".json", ".jsonl") else _from_text(path, text))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}{suggest_path(path)}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: a table of photos is UTF-8: CSV, TSV, JSON, or a path and a label a line") from None
    except (ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"{path}: not a table of photos: {error}") from None
    if not rows:
        raise UserError(f"{path}: no photo in this table")
    first: dict[str, Row] = {}
    for row in rows:
        before = first.setdefault(row.photo, row)
        if before.label != row.label:
            raise UserError(
                f"{path}: {printable(row.photo)} has two labels: {before.label} (line {before.line}) and {row.label} "
                f"(line {row.line})"
            )
    return list(first.values())


def _from_json(path: Path, text: str) -> Iterator[Row]:
    if path.suffix.lower() == ".jsonl":
        found: Any = [json.loads(line) for line in text.splitlines() if line.strip()]
    else:
        found = json.loads(text)
    if isinstance(found, dict):
        found = list(found.items())
    if not isinstance(found, list):
        raise ValueError("neither a list nor an object")
    for line, item in enumerate(found, 1):
        if isinstance(item, dict):
            keys = {str(key).lower(): key for key in item}
            photo = next((item[keys[key]] for key in PATHS if key in keys), None)
            label = next((item[keys[key]] for key in LABELS if key in keys), None)
        else:
            photo, label = (*item, None)[:2] if isinstance(item, list | tuple) and item else (item, None)
        if not isinstance(photo, str):
            raise ValueError(f"entry {line} names no photo: {str(item)[:60]}")
        yield Row(line, photo, _label(line, label))


def _from_text(path: Path, text: str) -> Iterator[Row]:
    lines = text.splitlines()
    if path.suffix.lower() not in (".csv", ".tsv") and not any("\t" in line for line in lines[:10]):
        for number, line in enumerate(lines, 1):
            if line.strip() and not line.startswith("#"):
                found = _WITH_ENDING.fullmatch(line.strip())
                photo, label = found.groups() if found else (*line.strip().split(None, 1), None)[:2]
                yield Row(number, str(photo), _label(number, label))
        return
    first = lines[0] if lines else ""
    delimiter = max("\t,;", key=first.count) if any(c in first for c in "\t,;") else ","
    head = [cell.strip().lower() for cell in next(csv.reader([first], delimiter=delimiter), [])]
    photo_at = next((head.index(name) for name in PATHS if name in head), None)
    label_at = next((head.index(name) for name in LABELS if name in head), None)
    begin = 0 if photo_at is None and label_at is None else 1
    photo_at = photo_at or 0
    if label_at is None and begin == 0 and len(head) > 1:
        label_at = 1
    for cells in (reader := csv.reader(lines[begin:], delimiter=delimiter)):
        if any(cell.strip() for cell in cells):
            number = reader.line_num + begin
            if photo_at >= len(cells) or not cells[photo_at].strip():
                raise ValueError(f"line {number} names no photo")
            label = cells[label_at].strip() if label_at is not None and label_at < len(cells) else None
            yield Row(number, cells[photo_at].strip(), _label(number, label))


def _label(line: int, value: Any) -> str | int | None:
    if value is None or value == "" or value == -1:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"the label of entry {line} is neither a number nor a name: {str(value)[:40]}")
    return value


def classes_of(values: Sequence[Any], names: Sequence[str] = ()) -> tuple[list[int], list[str]]:
    """(position in the classes of each label, -1 for none; the classes). Numbers are positions: their classes are `names`,
    or the numbers. Otherwise the classes are the texts in sorted order."""
    texts = ["" if value is None else printable(str(value).strip()) for value in values]
    given = sorted({text for text in texts if text})
    if all(re.fullmatch(r"-?\d{1,9}", text) for text in given):
        label_of = [int(text) if text and int(text) >= 0 else -1 for text in texts]
        count = 1 + max(label_of, default=-1)
        if count > MAX_CLASSES:
            raise UserError(f"label {count - 1} is above the highest, {MAX_CLASSES - 1}")
        return label_of, list(names) if len(names) >= count else [str(i) for i in range(count)]
    position = {text: i for i, text in enumerate(given)}
    return [position.get(text, -1) for text in texts], given


class Match(NamedTuple):
    """row_of: of each photo, its row, or None. unused: rows that name no photo."""

    row_of: list[Row | None]
    unused: list[Row]


def match(rows: Sequence[Row], names: Sequence[str], sources: Sequence[Path]) -> Match:
    """Which row is of which photo. sources: of each photo; the paths of a table may begin with its name, or be absolute."""
    exact = {row.photo.removeprefix("./").lstrip("/"): row for row in rows}
    bases = Counter(name.rpartition("/")[2] for name in names)
    row_of = []
    for name, src in zip(names, sources, strict=True):
        base, below = name.rpartition("/")[2], str(src).lstrip("/")
        keys = [name, name.rpartition(".")[0], f"{src.name}/{name}", f"{below}/{name}"]
        keys += [base, base.rpartition(".")[0]] if bases[base] == 1 else []
        row_of.append(next((exact[key] for key in keys if key in exact), None))
    used = {row.line for row in row_of if row}
    return Match(row_of, [row for row in rows if row.line not in used])


def refuse_missing(path: Path, rows: Sequence[Row], found: Match, names: Sequence[str], all_rows: bool) -> None:
    """Raise UserError if no photo is in the table; all_rows: or if a row names no photo."""
    if len(found.unused) == len(rows) or (all_rows and found.unused):
        row = found.unused[0]
        n = len(found.unused)
        what = "none of its photos is" if n == len(rows) else f"{n:,} of its photos {'is' if n == 1 else 'are'} not"
        near = suggest(row.photo, names[:5000]) or f"; the first photo in SRC is {printable(names[0])}"
        raise UserError(f"{path}:{row.line}: {what} in SRC: {printable(row.photo)}{near}")


def name_classes(path: Path, classes: list[str]) -> list[str]:
    """The classes under the names of a file: a line a class in their order, or a number or present name and the new one
    (`n01440764 tench`, `0,tench`, {"0": ["n01440764", "tench"]}). Raises UserError."""
    try:
        text = path.read_text("utf-8-sig")
        pairs = _named(json.loads(text) if path.suffix.lower() == ".json" else text.splitlines(), set(classes))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}{suggest_path(path)}") from None
    except (ValueError, RecursionError, TypeError) as error:
        raise UserError(f"{path}: no names of classes: {error}") from None
    if isinstance(pairs, list):
        if len(pairs) != len(classes):
            raise UserError(f"{path}: {len(pairs):,} names, and the photos have {len(classes):,} classes")
        named = pairs
    else:
        missing = [name for i, name in enumerate(classes) if not {name, str(i)} & pairs.keys()]
        if missing:
            raise UserError(f"{path}: no name for {len(missing):,} of {len(classes):,} classes: {missing[0]} first")
        named = [pairs.get(name) or pairs[str(i)] for i, name in enumerate(classes)]
    twice = Counter(named)  # ImageNet has two cranes
    return [f"{new} ({old})" if twice[new] > 1 else new for new, old in zip(named, classes, strict=True)]


def _named(found: Any, known: set[str]) -> list[str] | dict[str, str]:
    """Names in order, or {present name: new name}."""
    if isinstance(found, dict):
        return {
            key: printable(str(name))
            for number, value in found.items()
            for key, name in [(str(number), value[-1] if isinstance(value, list) else value)]
            + ([(str(value[0]), value[-1])] if isinstance(value, list) else [])
        }
    lines = [printable(str(line).strip()) for line in found if str(line).strip()]
    pairs = [re.split(r"[\t,;]\s*|\s+", line, maxsplit=1) for line in lines]
    if all(len(pair) == 2 and (pair[0] in known or pair[0].isdecimal()) for pair in pairs):
        return dict(pairs)  # type: ignore[arg-type]
    return lines
