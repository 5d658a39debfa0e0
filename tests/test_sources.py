"""Every kind of source that `make shards` takes: 200 photos in, the same bytes, labels and names out. And hostile ones."""

import bz2
import gzip
import json
import lzma
import os
import stat
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import prepare
from pictures import encoded, photo, pixels, tar_of, tree

from pipeline.shards import Shards

CLASSES = ("ash", "birch", "cedar", "elm")
PHOTOS = {f"{CLASSES[i % 4]}/{i:03d}.jpg": photo(i, 12, 16) for i in range(200)}
FEW = dict(list(PHOTOS.items())[:8])


def samples(folder: Path) -> dict[str, tuple[bytes, str]]:
    """{name: (photo, class)}, read as the trainer does."""
    shards = Shards(folder)
    named = [*shards.classes, ""]  # label -1 is the last
    rows = zip(shards.sources(), shards.index["label"], strict=True)
    return {name: (shards.read(i), named[int(label)]) for i, (name, label) in enumerate(rows)}


def expected(photos: dict[str, bytes], before: str = "") -> dict[str, tuple[bytes, str]]:
    return {before + name: (data, name.partition("/")[0]) for name, data in photos.items()}


def zip_of(files: dict[str, bytes], path: Path, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as opened:
        for name, data in files.items():
            opened.writestr(name, data)
    return path


def parquet_of(files: dict[str, bytes], path: Path, *, arrow: bool = False) -> Path:
    """As Hugging Face's `datasets` writes it."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    features = {"image": {"_type": "Image"}, "label": {"names": list(CLASSES), "_type": "ClassLabel"}}
    rows = [({"bytes": d, "path": n.replace("/", "_")}, CLASSES.index(n.partition("/")[0])) for n, d in files.items()]
    table = pa.table({"image": [image for image, _ in rows], "label": [label for _, label in rows]})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    if arrow:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    else:
        parquet.write_table(table, path)
    return path


# ---- each kind, 200 photos


def folder(at: Path) -> Path:
    return tree(at / "photos", PHOTOS)


def linked(at: Path) -> Path:
    (at / "links").mkdir()
    for name in CLASSES:
        (at / "links" / name).symlink_to(folder(at) / name)
    return at / "links"


def packed_tar(ending: str, pack: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    def make(at: Path) -> Path:
        (at / f"photos.tar{ending}").write_bytes(pack(tar_of(PHOTOS)))
        return at / f"photos.tar{ending}"

    return make


def zstd_tar(at: Path) -> Path:
    return packed_tar(".zst", pytest.importorskip("zstandard").compress)(at)


def class_tars(at: Path) -> Path:
    inside = {c: {n.partition("/")[2]: d for n, d in PHOTOS.items() if n.startswith(c)} for c in CLASSES}
    return tree(at / "tars", {f"{c}.tar": tar_of(files) for c, files in inside.items()})


def hugging_face(at: Path) -> Path:
    items = list(PHOTOS.items())
    parquet_of(dict(items[:120]), at / "hf/data/train-00000-of-00002.parquet")
    parquet_of(dict(items[120:]), at / "hf/data/train-00001-of-00002.parquet")
    return at / "hf"


def saved_to_disk(at: Path) -> Path:
    parquet_of(PHOTOS, at / "saved/data-00000-of-00001.arrow", arrow=True)
    return tree(at / "saved", {"state.json": b"{}", "dataset_info.json": b"{}"})


def table(name: str, write: Callable[[list[tuple[str, str]]], str]) -> Callable[[Path], Path]:
    def make(at: Path) -> Path:
        rows = [(f"photos/{n}", n.partition("/")[0]) for n in PHOTOS]
        return tree(folder(at).parent, {name: write(rows).encode()}) / name

    return make


def name_in_tar(name: str) -> str:
    return f"{name.partition('/')[0]}.tar/{name.partition('/')[2]}"


KINDS: dict[str, tuple[Callable[[Path], Path], tuple[str, ...], Callable[[str], str] | None]] = {
    # kind: (its maker, options, what becomes of a photo's name)
    "folder": (folder, (), None),
    "links": (linked, ("--follow-links",), None),
    "tar": (packed_tar("", bytes), (), None),
    "tar.gz": (packed_tar(".gz", gzip.compress), (), None),
    "tar.xz": (packed_tar(".xz", lambda data: lzma.compress(data, preset=0)), (), None),
    "tar.bz2": (packed_tar(".bz2", bz2.compress), (), None),
    "tar.zst": (zstd_tar, (), None),
    "class tars": (class_tars, (), name_in_tar),
    "zip": (lambda at: zip_of(PHOTOS, at / "p.zip"), (), None),
    "stored zip": (lambda at: zip_of(PHOTOS, at / "p.zip", zipfile.ZIP_STORED), (), None),
    "Hugging Face": (
        hugging_face,
        (),
        lambda n: f"data/train-0000{int(int(n[-7:-4]) >= 120)}-of-00002.parquet/{n.replace('/', '_')}",
    ),
    "save_to_disk": (saved_to_disk, (), lambda n: f"data-00000-of-00001.arrow/{n.replace('/', '_')}"),
    "csv": (
        table("l.csv", lambda rows: "path,label\n" + "".join(f"{p},{c}\n" for p, c in rows)),
        (),
        "photos/{}".format,
    ),
    "json": (table("l.json", lambda rows: json.dumps(dict(rows))), (), "photos/{}".format),
    "text": (table("l.txt", lambda rows: "".join(f"{p} {c}\n" for p, c in rows)), (), "photos/{}".format),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind: str, tmp_path: Path) -> None:
    """The shards are complete, and nothing that was unpacked is left."""
    make, options, renamed = KINDS[kind]
    output, error = prepare("make", make(tmp_path), tmp_path / "dst", "--shard-mb", "0.1", *options)
    assert error == ""
    assert "kept unchanged 200 (JPEG RGB 200)" in output
    wanted = {renamed(name) if renamed else name: value for name, value in expected(PHOTOS).items()}
    assert samples(tmp_path / "dst") == wanted
    assert Shards(tmp_path / "dst").classes == list(CLASSES)
    assert not (tmp_path / "dst/.make_shards").exists()


def test_shards_as_a_source(tmp_path: Path) -> None:
    """Split anew, they keep bytes, names and classes, and the folder that their photos were in."""
    prepare("make", folder(tmp_path), tmp_path / "made")
    output, error = prepare("make", tmp_path / "made", tmp_path / "again", "--shard-mb", "0.05", "--seed", "3")
    assert error == ""
    assert "1 shard: names are kept, 4 classes" in output
    assert samples(tmp_path / "again") == expected(PHOTOS)
    assert len(Shards(tmp_path / "again").shards) > 2
    assert Shards(tmp_path / "again").source(0).startswith(f"{tmp_path}/photos/")
    prepare("make", tmp_path / "photos/ash", tmp_path / "none")
    assert "--labels yes: " in prepare("make", tmp_path / "none", tmp_path / "x", "--labels", "yes")[1]


def test_what_was_unpacked_does_not_stay(tmp_path: Path) -> None:
    """Beside complete shards: after the same command, and after one with other settings."""
    src, dst = write(tmp_path / "p.tar.gz", gzip.compress(tar_of(FEW))), tmp_path / "dst"
    prepare("make", src, dst)
    before = sorted(os.listdir(dst))
    assert "already complete: 8 samples" in prepare("make", src, dst)[0]
    assert "made with other settings: seed" in prepare("make", src, dst, "--seed", "1")[1]
    assert sorted(os.listdir(dst)) == before


def test_a_list_of_paths_alone(tmp_path: Path) -> None:
    """The classes are the folders in the paths."""
    tree(tmp_path, FEW | {"l.txt": "\n".join(list(FEW)[:6]).encode()})
    assert prepare("make", tmp_path / "l.txt", tmp_path / "dst")[1] == ""
    assert samples(tmp_path / "dst") == expected(dict(list(FEW.items())[:6]))
    assert Shards(tmp_path / "dst").source(0).startswith(f"{tmp_path}/{Shards(tmp_path / 'dst').sources()[0]}")


def test_several_sources(tmp_path: Path) -> None:
    """A folder, a zip and shards in one call, in make's one word too; equal names of classes are one class."""
    items = list(PHOTOS.items())
    tree(tmp_path / "a b", dict(items[:70]))
    zip_of(dict(items[70:140]), tmp_path / "c.zip")
    prepare("make", tree(tmp_path / "d", dict(items[140:])), tmp_path / "shards")
    words = f"'{tmp_path}/a b' {tmp_path}/c.zip {tmp_path}/shards"
    output, error = prepare("make", words, tmp_path / "dst")
    assert error == ""
    assert output.startswith("200 photos, ")
    wanted = expected(dict(items[:70]), "a b/") | expected(dict(items[70:140]), "c.zip/")
    assert samples(tmp_path / "dst") == wanted | expected(dict(items[140:]), "d/")
    assert Shards(tmp_path / "dst").classes == list(CLASSES)
    assert "is given twice" in prepare("make", tmp_path / "d", tmp_path / "d", tmp_path / "x")[1]
    assert "would be read twice" in prepare("make", tmp_path / "d", tmp_path / "d/ash", tmp_path / "x")[1]
    assert not (tmp_path / "x").exists()


# ---- labels and names of classes


def test_labels_and_names_from_files(tmp_path: Path) -> None:
    src = tree(tmp_path / "src", {f"{i}.jpg": photo(i) for i in range(4)})
    rows = "id,breed\n0,1\n1,0\n2,1\n9,1\n"
    tree(tmp_path, {"labels.csv": rows.encode(), "names.txt": b"cat\ndog\n", "short.txt": b"cat\n"})
    words = ("--label-file", tmp_path / "labels.csv", "--class-names")
    output, error = prepare("make", src, tmp_path / "dst", *words, tmp_path / "names.txt")
    assert error == ""
    assert "classes: cat (1 photo), dog (2 photos)" in output
    assert "warning: 1 photo without a label" in output
    assert "warning: 1 line of" in output
    assert {n: label for n, (_, label) in samples(tmp_path / "dst").items()} == {
        "0.jpg": "dog", "1.jpg": "cat", "2.jpg": "dog", "3.jpg": "",
    }  # fmt: skip
    assert (
        "1 names, and the photos have 2 classes"
        in prepare("make", src, tmp_path / "x", *words, tmp_path / "short.txt")[1]
    )
    tree(tmp_path, {"chosen.jsonl": b'{"file_name": "src/2.jpg"}\n{"file_name": "src/0.jpg"}\n'})
    assert prepare("make", src, tmp_path / "two", "--list", tmp_path / "chosen.jsonl")[1] == ""
    assert sorted(samples(tmp_path / "two")) == ["0.jpg", "2.jpg"]
    prepare("make", src, tmp_path / "one", "--match", "[3-9]*")
    assert list(samples(tmp_path / "one")) == ["3.jpg"]


@pytest.mark.parametrize("form", ["n0000000{}_{}.JPEG", "ILSVRC2012_val_0000000{1}_n0000000{0}.JPEG"])
def test_flat_names_of_synsets(form: str, tmp_path: Path) -> None:
    """As the archives of Hugging Face's imagenet-1k have them."""
    src = tree(tmp_path / "src", {form.format(i % 2, i): photo(i) for i in range(6)})
    tree(tmp_path, {"synsets.txt": b"n00000000 tench, Tinca\nn00000001 crane\n"})
    output, _ = prepare("make", src, tmp_path / "dst", "--class-names", tmp_path / "synsets.txt")
    assert "2 classes: the synsets in the photos' names" in output
    assert {label for _, label in samples(tmp_path / "dst").values()} == {"tench, Tinca", "crane"}
    assert prepare("make", src, tmp_path / "none", "--labels", "no")[0].count("0 classes")


# ---- conversion


def test_avif_jpeg_2000_and_heic(tmp_path: Path) -> None:
    """Converted where a package reads them, and counted; else a line says what to install."""
    from PIL import features

    kinds = {"AVIF": features.check("avif"), "JPEG2000": features.check("jpg_2000")}
    files = {f"{k}.{k.lower()}": encoded(pixels(i), k) for i, (k, ok) in enumerate(kinds.items()) if ok}
    try:
        import pillow_heif

        pillow_heif.register_heif_opener()
        files["x.heic"] = encoded(pixels(9), "HEIF")
    except ImportError:
        heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(300)
        _, error = prepare("make", tree(tmp_path / "heic", {"x.heic": heic}), tmp_path / "no")
        assert "`.venv/bin/python -m pip install pillow-heif` makes HEIC readable" in error
    if not files:
        pytest.skip("this Pillow reads neither AVIF nor JPEG 2000")
    output, error = prepare("make", tree(tmp_path / "src", files), tmp_path / "dst")
    assert error == ""
    assert f"converted {len(files)} (" in output
    assert all(data.startswith(b"\xff\xd8\xff") for data, _ in samples(tmp_path / "dst").values())
    output, _ = prepare("make", tmp_path / "dst", tmp_path / "again")
    assert "to be converted" not in output  # they are JPEG by now, under their old names


# ---- hostile and damaged sources: a line each, and nothing is left


def cut(path: Path, share: float = 0.6) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def encrypted(at: Path) -> Path:
    data = bytearray(zip_of(FEW, at / "p.zip").read_bytes())
    central = data.index(b"PK\x01\x02")
    data[6] |= 1
    data[central + 8] |= 1
    (at / "p.zip").write_bytes(data)
    return at / "p.zip"


def zeros(size: int) -> bytes:
    return gzip.compress(bytes(size), 1)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "cut zip": (lambda at: cut(zip_of(FEW, at / "p.zip")), "p.zip: cut or damaged: File is not a zip file; copy"),
    "encrypted zip": (encrypted, "p.zip: encrypted (ash/000.jpg first); unpack it with its password, `7z x "),
    "zip bomb": (lambda at: zip_of({"x.bmp": bytes(70 << 20)}, at / "p.zip"), "p.zip: a bomb: its "),
    "gzip bomb": (lambda at: write(at / "p.tar.gz", zeros(70 << 20)), "p.tar.gz: a bomb: its "),
    "cut tar.gz": (lambda at: cut(packed_tar(".gz", gzip.compress)(at)), "photos.tar.gz: cut or damaged: Compressed file"),
    "cut tar.xz": (lambda at: cut(packed_tar(".xz", lzma.compress)(at)), "photos.tar.xz: cut or damaged: Compressed file"),
    "gzip of a text": (lambda at: write(at / "x.gz", gzip.compress(b"text " * 300)), "x.gz: text, not a tar"),
    "7z": (lambda at: write(at / "x.7z", b"7z\xbc\xaf\x27\x1c" + bytes(600)), "x.7z: compressed (7z), and photos are read"),
    "cut Parquet": (lambda at: cut(parquet_of(FEW, at / "x.parquet")), "cut, damaged, or not Parquet; copy"),
    "a missing photo": (lambda at: write(at / "l.csv", b"path\nno.jpg\n"), "l.csv:2: no.jpg: no such file in"),
    "one picture": (lambda at: write(at / "p.png", encoded(pixels(0), "PNG")), "p.png: one picture (PNG); give the folder"),
    "two labels": (lambda at: write(at / "l.csv", b"path,label\nx,a\nx,b\n"), "x has two labels: a (line 2) and b (line 3)"),
    "JSON of numbers": (lambda at: write(at / "l.json", b"[1]"), "l.json: not a table of photos: entry 1 names no photo: 1"),
    "an empty table": (lambda at: write(at / "l.txt", b"# none\n"), "l.txt: no photo in this table"),
    "archives only": (
        lambda at: zip_of(FEW, tree(at / "in", {}) / "p.zip").parent if (at / "in").mkdir() is None else at,
        "its archives can be SRC: `make shards SRC=",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_sources(case: str, tmp_path: Path) -> None:
    make, message = HOSTILE[case]
    _, error = prepare("make", make(tmp_path), tmp_path / "dst")
    assert message in error
    assert not (tmp_path / "dst").exists()


def test_members_of_a_zip_that_are_not_read(tmp_path: Path) -> None:
    """Names that lead out, links, equal names, a size that lies, changed bytes: listed, and the others are read."""
    path = tmp_path / "p.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as opened:
        for name in ("a/1.jpg", "../up.jpg", "__MACOSX/a/._1.jpg"):
            opened.writestr(name, photo(1))
        with pytest.warns(UserWarning, match="Duplicate name"):
            opened.writestr("a/1.jpg", photo(1))
        link = zipfile.ZipInfo("a/link.jpg")
        link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        opened.writestr(link, "/etc/passwd")
        opened.writestr("a/changed.jpg", photo(2))
        opened.writestr("a/lies.jpg", photo(3), zipfile.ZIP_DEFLATED)
        opened.writestr("b\\c.jpg", photo(4))
    data = bytearray(path.read_bytes())
    data[data.index(photo(2)) + 400] ^= 1
    entry = data.index(b"PK\x01\x02", data.rindex(b"a/changed.jpg"))
    data[entry + 24 : entry + 28] = struct.pack("<I", 100)
    path.write_bytes(data)
    _, error = prepare("make", path, tmp_path / "dst", "--max-bad", "0.9")
    assert error == ""
    assert {data for data, _ in samples(tmp_path / "dst").values()} == {photo(1), photo(4)}
    rows = [json.loads(line) for line in (tmp_path / "dst/skipped.jsonl").read_text().splitlines()]
    assert {(row["source"], row["kind"]) for row in rows} == {
        ("../up.jpg", "unsafe names"), ("a/link.jpg", "links"), ("a/1.jpg", "duplicate names"),
        ("__MACOSX/a/._1.jpg", "system folders"),
    }  # fmt: skip
    rejected = (tmp_path / "dst/rejected.jsonl").read_text()
    assert "its bytes do not have the checksum" in rejected
    assert "the zip says 100 bytes, and it unpacks to more" in rejected


def test_packages_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("zstandard", "pyarrow", "compression"):
        monkeypatch.setitem(sys.modules, name, None)
    for name, data in (("x.tar.zst", b"\x28\xb5\x2f\xfd" + bytes(600)), ("x.parquet", b"PAR1" + bytes(600))):
        _, error = prepare("make", write(tmp_path / name, data), tmp_path / "dst")
        assert "`.venv/bin/python -m pip install " in error


def test_parquet_of_several_splits_and_odd_rows(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for split in ("train", "test"):
        parquet_of(FEW, tmp_path / f"hf/data/{split}-00000-of-00001.parquet")
    _, error = prepare("make", tmp_path / "hf", tmp_path / "dst")
    assert "test (1 file), train (1 file)" in error
    assert "ARGS=\"--match 'train*'\"" in error
    assert prepare("make", tmp_path / "hf", tmp_path / "dst", "--match", "train*")[1] == ""
    assert len(samples(tmp_path / "dst")) == 8
    card = b"---\ndataset_info:\n  features:\n  - name: label\n    dtype:\n      class_label:\n        names:\n"
    tree(tmp_path / "plain", {"README.md": card + b"          '0': pine\n          '1': oak\n---\n# Trees"})
    images = [{"bytes": photo(1), "path": "../../up.jpg"}, {"bytes": None, "path": "/etc/passwd"}, {"bytes": photo(2)}]
    parquet.write_table(pa.table({"image": images, "label": [1, 0, None]}), tmp_path / "plain/x.parquet")
    output, _ = prepare("make", tmp_path / "plain", tmp_path / "odd")
    assert "skipped 2 (.md files 1, rows without bytes 1)" in output
    assert samples(tmp_path / "odd") == {
        "x.parquet/000000.jpg": (photo(1), "oak"),
        "x.parquet/000002.jpg": (photo(2), ""),
    }
    parquet.write_table(pa.table({"image": images, "label": [1, 0, None]}), tmp_path / "2.parquet")
    prepare("make", tmp_path / "2.parquet", tmp_path / "matched", "--match", "*2*")
    assert len(samples(tmp_path / "matched")) == 2  # the pattern chooses files, and no rows of them
    parquet.write_table(pa.table({"a": [b"1"], "b": [b"2"], "c": [3]}), tmp_path / "two.parquet")
    assert "several columns hold bytes: a, b" in prepare("make", tmp_path / "two.parquet", tmp_path / "x")[1]
    assert "--photo q: no such column" in prepare("make", tmp_path / "two.parquet", tmp_path / "x", "--photo", "q")[1]


# ---- index


def test_index_resumes_selects_and_writes_elsewhere(tmp_path: Path) -> None:
    tars = {f"train-{i}.tar": tar_of({f"{i}.jpg": photo(i), f"{i}.cls": b"%d" % i}) for i in range(3)}
    src = tree(tmp_path / "tars", tars | {"val-0.tar": tar_of({"9.jpg": photo(9)})})
    good = (src / "train-2.tar").read_bytes()
    (src / "train-2.tar").write_bytes(good.replace(b"2.cls", b"x.cls"))
    before = sorted(os.listdir(src))
    assert "ARGS=\"--match 'train-*'\"" in prepare("index", src)[1]
    words = ("index", src, "--match", "train-*", "--out", tmp_path / "out")
    assert "train-2.tar: byte " in prepare(*words)[1]
    (src / "train-2.tar").write_bytes(good)
    output, error = prepare(*words)
    assert error == ""
    assert "resuming: 2 of 3 tars read before" in output
    found = Shards(tmp_path / "out")
    assert [found.read(i) for i in range(len(found))] == [photo(i) for i in range(3)]
    assert found.index["label"].tolist() == [0, 1, 2]
    assert sorted(os.listdir(src)) == before
    assert sorted(os.listdir(tmp_path / "out")) == ["index.npy", "manifest.json", *sorted(tars)]
    assert (
        "holds other tars (train-0.tar first)" in prepare("index", src, "--match", "val*", "--out", tmp_path / "out")[1]
    )
    assert "is the folder of the tars" in prepare("index", src, "--match", "val*", "--out", src)[1]
    assert "none of its 4 tars matches 'no'" in prepare("index", src, "--match", "no")[1]
