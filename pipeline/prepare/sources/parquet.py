"""Photos in Parquet files, or in the Arrow files of `datasets.save_to_disk`: a column of their bytes, and one of labels.

The layouts of Hugging Face: `data/train-00000-of-00002.parquet`, or `train/0000.parquet`; a photo is {"bytes", "path"}. The
names of classes are in the files' own metadata, in dataset_info.json, or in the head of README.md. Other files with a
column of bytes do as well.

A row has no offset of its own, so the photos are written once behind each other into the work folder, with what is known of
them: see unpack.py. Files that a row names, instead of holding their bytes, are not opened.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline.prepare.archives import AGAIN, refuse_bomb
from pipeline.prepare.kinds import HEAD, kind_of
from pipeline.prepare.names import matches, printable, split_of, splits_among
from pipeline.prepare.skipped import Skipped
from pipeline.prepare.sources.photos import Ask, Listing, Photo
from pipeline.prepare.sources.tables import classes_of
from pipeline.prepare.sources.unpack import require_room, work_file
from runtime.errors import UserError, plural, suggest
from runtime.files import atomic_path, write_atomic

ENDINGS = (".parquet", ".arrow")
MAGIC = b"PAR1"
ROWS = 64  # at a time in memory
PHOTO_COLUMNS = (
    "image",
    "img",
    "photo",
    "picture",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "image_bytes",
    "bytes",
    "pixel_values",
)
LABEL_COLUMNS = ("label", "labels", "class", "cls", "target", "fine_label", "category", "class_name")
MAX_CARD = 1 << 22  # bytes of README.md or dataset_info.json


def list_parquet(src: Path, names: list[str], ask: Ask, skipped: Skipped) -> Listing:
    """The photos in these files below SRC (one with an empty name is SRC itself). Raises UserError."""
    try:
        import pyarrow as pa
    except ImportError:
        raise UserError(
            f"{src}: Parquet, which needs the package pyarrow: `.venv/bin/python -m pip install pyarrow`"
        ) from None
    chosen = sorted(name for name in names if matches(name or src.name, ask.match))
    if not chosen:
        raise UserError(
            f"{src}: no file matches {ask.match!r}; it holds {', '.join(names[:3])}{', ...' * (len(names) > 3)}"
        )
    if not ask.match:
        _refuse_splits(src, chosen)
    files = [src / name if name else src for name in chosen]
    try:
        schema = next(_batches(files[0], None)).schema
        columns = _photo_column(files[0], schema, ask), _label_column(files[0], schema, ask)
        about, stored = _unpack(src, files, chosen, columns, ask, skipped)
    except (pa.ArrowException, OSError, StopIteration) as error:
        if getattr(error, "errno", None):
            raise
        raise UserError(f"{src}: {_first(error)}: cut, damaged, or not Parquet; {AGAIN}") from None
    values = [row[3] for row in about]
    label_of, classes = classes_of(values, _class_names(src, schema, columns[1]))
    found = [
        Photo(name, at, size, label, str(stored)) for (name, at, size, _), label in zip(about, label_of, strict=True)
    ]
    of = f"column {columns[0]} of {plural(len(files), 'file')}"
    count = plural(len(classes), "class")
    summary = f"{of}, {count} from column {columns[1]} (--labels no: none)" if columns[1] else f"{of}, no classes"
    return Listing(sorted(found), summary, classes, matched=True)


def _unpack(
    src: Path, files: list[Path], names: list[str], columns: tuple[str, str], ask: Ask, skipped: Skipped
) -> tuple[list[tuple[str, int, int, Any]], Path]:
    """([(name, offset, size, label) of each photo], the file of these offsets), written unless an earlier run has."""
    stored = work_file(ask.work, src, files, *columns)
    listed = stored.with_suffix(".json")
    if listed.exists() and stored.exists():
        about = json.loads(listed.read_bytes())
    else:
        print(
            f"{src}: Parquet, unpacked once into {ask.work}, which is deleted when the shards are complete", flush=True
        )
        ask.work.mkdir(parents=True, exist_ok=True)
        about = []
        with atomic_path(stored) as draft, draft.open("wb") as out:
            for path, name in zip(files, names, strict=True):
                begin, seen = out.tell(), set[str]()
                for row, (photo, inside, label) in enumerate(_rows(path, columns)):
                    at = out.tell()
                    refuse_bomb(str(path), at + len(photo) - begin, path.stat().st_size)
                    require_room(src, ask.work, len(photo))
                    if not inside or inside in seen:
                        inside = f"{row:06d}-{inside.rpartition('/')[2]}" if inside else f"{row:06d}{_ending(photo)}"
                    seen.add(inside)
                    out.write(photo)
                    about.append((f"{name}/{inside}" if name else inside, at, len(photo), label))
        write_atomic(listed, json.dumps(about))
    for name, *_ in (row for row in about if row[2] == 0):
        skipped.add(name, "rows without bytes", "its photo is null, or a path to a file that is not opened")
    return [row for row in about if row[2]], stored


def _ending(photo: bytes) -> str:
    kind = kind_of(photo[:HEAD], "")
    return ".jpg" if kind == "JPEG" else f".{kind.lower().replace(' ', '-')}" if kind else ""


def _rows(path: Path, columns: tuple[str, str]) -> Iterator[tuple[bytes, str, Any]]:
    """(bytes of the photo, its safe name if it has one, label) of each row."""
    photo, label = columns
    for batch in _batches(path, [photo, label] if label else [photo]):
        labels = batch.column(label).to_pylist() if label else [None] * len(batch)
        for value, of_row in zip(batch.column(photo).to_pylist(), labels, strict=True):
            data, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, "")
            parts = str(name or "").lstrip("/").split("/")
            safe = "" if ".." in parts else printable("/".join(parts))
            yield bytes(data or b""), safe, _plain_label(path, label, of_row)


def _plain_label(path: Path, column: str, value: Any) -> str | int | None:
    """A label as a number or text. Raises UserError for lists of them."""
    if isinstance(value, list | dict):
        raise UserError(f"{path}: column {column}: a row has several labels; choose another column, or --labels no")
    if isinstance(value, float):
        return int(value) if value.is_integer() else None if value != value else str(value)
    return value.decode(errors="replace") if isinstance(value, bytes) else value if value is None else _text(value)


def _text(value: Any) -> str | int:
    return value if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _batches(path: Path, columns: list[str] | None) -> Iterator[Any]:
    """Some rows at a time, as pyarrow's record batches; at first an empty one, for its schema, if `columns` is None."""
    import pyarrow as pa
    from pyarrow import parquet

    if path.suffix == ".arrow":
        with pa.memory_map(str(path)) as mapped, pa.ipc.open_stream(mapped) as stream:
            if columns is None:
                yield pa.RecordBatch.from_pylist([], schema=stream.schema)
            for batch in stream:
                for start in range(0, len(batch), ROWS):
                    yield batch.select(columns or batch.schema.names).slice(start, ROWS)
        return
    with parquet.ParquetFile(path) as file:
        if columns is None:
            yield pa.RecordBatch.from_pylist([], schema=file.schema_arrow)
        yield from file.iter_batches(ROWS, columns=columns)


def _photo_column(path: Path, schema: Any, ask: Ask) -> str:
    """The column of the photos' bytes: the one that was asked for, or the first with a usual name, or the only one."""
    from pyarrow import types

    def has_bytes(kind: Any) -> bool:
        if types.is_struct(kind):
            return any(field.name == "bytes" and has_bytes(field.type) for field in kind)
        return types.is_binary(kind) or types.is_large_binary(kind)

    found = [field.name for field in schema if has_bytes(field.type)]
    usual = [name for name in PHOTO_COLUMNS if name in found]
    if ask.photo:
        return _asked(path, "--photo", ask.photo, found)
    if not found:
        raise UserError(f"{path}: no column holds the bytes of photos; its columns are {', '.join(schema.names)}")
    if not usual and len(found) > 1:
        raise UserError(f"{path}: several columns hold bytes: {', '.join(found)}; ARGS='--photo {found[0]}' takes one")
    return (usual or found)[0]


def _label_column(path: Path, schema: Any, ask: Ask) -> str:
    """The column of the labels; "" without one."""
    if ask.labels == "no":
        return ""
    if ask.label:
        return _asked(path, "--label-column", ask.label, schema.names)
    found = next((name for name in LABEL_COLUMNS if name in schema.names), "")
    if not found and ask.labels == "yes":
        others = ", ".join(schema.names)
        raise UserError(
            f"{path}: --labels yes: no column is called label; ARGS='--label-column …' takes one of {others}"
        )
    return found


def _asked(path: Path, option: str, name: str, known: list[str]) -> str:
    if name not in known:
        raise UserError(f"{path}: {option} {name}: no such column{suggest(name, known)}; it has {', '.join(known)}")
    return name


def _class_names(src: Path, schema: Any, column: str) -> list[str]:
    """The names of Hugging Face's ClassLabel, in the order of its numbers; none if nothing says them."""
    if not column:
        return []
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"][column]
        return _names(info)
    except (ValueError, KeyError, TypeError):
        pass
    folder = src if src.is_dir() else src.parent
    for path in (folder / "dataset_info.json", folder / "README.md", folder.parent / "README.md"):
        try:
            text = path.read_text("utf-8")[:MAX_CARD]
            found = yaml.safe_load(text.split("---")[1] if path.suffix == ".md" else text)
            if names := next(_find(found, column), []):
                return names
        except (OSError, ValueError, IndexError, yaml.YAMLError, RecursionError):
            continue
    return []


def _find(found: Any, column: str, depth: int = 6) -> Iterator[list[str]]:
    """The names of a column's classes, wherever they are in a data set's card: {"features": {column: {"names": ...}}}, or
    {"features": [{"name": column, "dtype": {"class_label": {"names": ...}}}]}."""
    inside = found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()
    if isinstance(found, dict):
        about = found.get(column)
        if found.get("name") == column and isinstance(found.get("dtype"), dict):
            about = found["dtype"].get("class_label")
        if isinstance(about, dict) and about.get("names"):
            yield _names(about)
    for value in inside if depth else ():
        yield from _find(value, column, depth - 1)


def _names(about: dict) -> list[str]:
    """The names in {"names": ["cat", ...]} or {"names": {"0": "cat", ...}}."""
    names = about["names"]
    if isinstance(names, dict):
        names = [name for _, name in sorted(names.items(), key=lambda item: int(item[0]))]
    return [str(name) for name in names]


def _refuse_splits(src: Path, names: list[str]) -> None:
    """Raise UserError if the files are of several splits: train-00000-of-2.parquet beside test-..., or train/0.parquet."""
    parts = [name.removesuffix(Path(name).suffix).rpartition("/") for name in names]
    keys = [base if split_of(base)[0] else above.rpartition("/")[2] for above, _, base in parts]
    splits = splits_among(keys)
    if not splits:
        return
    of_key = {key: split for split, found in splits.items() for key in found}
    count = Counter(of_key[key] for key in keys if key in of_key)
    first = next(name for name, key in zip(names, keys, strict=True) if of_key.get(key) == next(iter(splits)))
    base = keys[names.index(first)]
    pattern = f"{base[: len(base.rstrip('0123456789-of'))]}*" if base in first.rpartition("/")[2] else f"*{base}/*"
    found = ", ".join(f"{split} ({plural(n, 'file')})" for split, n in count.items())
    raise UserError(f"{src} holds several splits: {found}; make shards of one of them: ARGS=\"--match '{pattern}'\"")


def _first(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
