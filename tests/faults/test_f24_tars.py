"""F24: what `index` would skip without a word: keys with dots, labels far from their photos or in other forms, tars that are
compressed or have other names."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest
from conftest import prepare
from pictures import encoded, iso, labels_of, listed, photo, pixels, tar_of, tree

from pipeline.prepare.tars.labels import parse_label
from pipeline.prepare.tars.samples import split_key, split_keys
from pipeline.shards import Shards

fault = [pytest.mark.fault("F24"), pytest.mark.fast]


def index(folder: Path, *options: str, expect: int = 0) -> str:
    output, error = prepare("index", folder, *options)
    assert bool(error) == bool(expect), error
    return error or output


# ---- keys


KEYS = {
    "a dot and a number": [f"v1.2-{i:03d}" for i in range(12)],
    "versions": [f"scan.{i}.{j}" for i in range(3) for j in range(2)],
    "times": [f"cam.2024-01-01T10.00.{i:02d}" for i in range(4)],
    "words and numbers that differ": [f"img.v{i}" for i in range(12)],
    "letters that differ": [f"cat.{letter}" for letter in "abcdefghijkl"],
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=fault) for c in KEYS])
def test_keys_with_a_dot(case: str, tmp_path: Path) -> None:
    files: dict[str, bytes] = {}
    for i, key in enumerate(KEYS[case]):
        files |= {f"{key}.jpg": photo(i), f"{key}.cls": b"%d" % (i % 3)}
        if "differ" not in case:
            files[f"{key}.seg.png"] = encoded(pixels(90), "PNG")
    tar_of(files, tmp_path / "0.tar")
    index(tmp_path)
    assert labels_of(tmp_path) == {photo(i): str(i % 3) for i in range(len(KEYS[case]))}


def test_split_key() -> None:
    """As WebDataset's (up to the first dot), but for parts that are no plain words."""
    for name in ("a/1.jpg", "1.seg.png", "x.y/2.left_eye.jpg", "k.mask0.png", "a.JPG", "noending"):
        key, ending = split_key(name)
        folder, _, base = name.rpartition("/")
        assert (key.rpartition("/")[2], ending) == (base.partition(".")[0], base.partition(".")[2].lower())
        assert key.rpartition("/")[0] == folder
    assert split_key("v1.2-000.jpg") == ("v1.2-000", "jpg")
    assert split_key("a/0.left-eye.jpg") == ("a/0.left-eye", "jpg")
    assert split_key("a/0.left-eye.jpg", "left-eye.jpg") == ("a/0", "left-eye.jpg")
    assert split_key("0.seg.jpg", "jpg") == split_key("0.seg.jpg", "seg.jpg") == ("0", "seg.jpg")
    assert split_key("a.b/IMG.Beach.001.seg.png") == ("a.b/IMG.Beach.001", "seg.png")


def test_split_keys() -> None:
    """A word belongs to the key if no other key has it and the key has no member without one; endings repeat."""
    views = [f"{key}.{view}.jpg" for key in "012" for view in ("left", "right", "top")]
    assert {key for key, _ in split_keys(views)} == {*"012"}
    assert split_keys(["0.jpg", "0.a.png", "0.b.png", "0.c.png"])[1] == ("0", "a.png")  # one sample with its masks
    assert split_keys(["0.left.jpg", "0.right.jpg"])[0] == ("0", "left.jpg")
    assert split_keys(["C.a.jpg", "C.b.jpg", "C.c.JPG"])[2] == ("C.c", "jpg")
    assert split_keys(["C.a.jpg", "C.b.jpg", "C.c.JPG"], "a.jpg")[0] == ("C", "a.jpg")


@pytest.mark.fault("F24")
@pytest.mark.fast
def test_pictures_that_are_not_used_are_warned_of(tmp_path: Path) -> None:
    """By their number, not by that of their keys."""
    tar_of(
        {f"{animal}.{letter}.jpg": photo(i) for animal in ("cat", "dog") for i, letter in enumerate("abcd")},
        tmp_path / "0.tar",
    )
    output = index(tmp_path, "--photo", "a.jpg")
    assert "2 samples in 1 shard" in output
    assert "warning: 6 pictures not used, by ending: 6 (.b.jpg files 2, .c.jpg files 2, .d.jpg files 2)" in output


JOINED = {  # case: (names in the first tar, in the second, which photos have a label)
    "labels only in the second": ("{}.jpg", "{}.cls {}.jpg", range(4, 8)),
    "photos, then labels": ("{}.jpg", "{}.cls", range(4)),
    "labels, then photos with masks": ("{}.cls", "{}.jpg {}.seg.png", range(4)),
    "photos without an ending": ("{}.image", "{}.cls {}.image", range(4, 8)),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=fault if JOINED[c][2][0] else ()) for c in JOINED])
def test_joined_tars_with_equal_keys(case: str, tmp_path: Path) -> None:
    """No photo gets another one's label."""
    *parts, labeled = JOINED[case]
    photos, data = map(photo, range(8)), b""
    for names in parts:
        files = {}
        for name in [name.format(i) for i in range(4) for name in names.split()]:
            is_photo = name.endswith((".jpg", ".image"))
            files[name] = next(photos) if is_photo else b"1" if name.endswith(".cls") else encoded(pixels(90), "PNG")
        data += tar_of(files)
    (tmp_path / "0.tar").write_bytes(data)
    index(tmp_path)
    found = labels_of(tmp_path)
    assert len(found) == (8 if "labels only" in case or "ending" in case else 4)
    assert {k for k, label in found.items() if label == "1"} == {photo(i) for i in labeled}


@pytest.mark.fault("F24")
@pytest.mark.fast
@pytest.mark.parametrize("order", ["photos first", "labels first", "two tars joined"])
def test_labels_far_from_their_photos(order: str, tmp_path: Path) -> None:
    photos, labels = (
        {f"{i}.{e}": d(i) for i in range(6)} for e, d in (("jpg", photo), ("cls", lambda i: b"%d" % (i % 3)))
    )
    files = labels | photos if order == "labels first" else photos | labels
    expected = {photo(i): str(i % 3) for i in range(6)}
    if order == "two tars joined":  # with the same keys: what A reads as one tar
        again = {f"{i}.jpg": photo(i + 10) for i in range(6)} | {f"{i}.cls": b"5" for i in range(6)}
        write_members(tmp_path / "0.tar", [*files.items(), *again.items()])
        expected |= {photo(i + 10): "5" for i in range(6)}
    else:
        tar_of(files, tmp_path / "0.tar")
    output = index(tmp_path)
    assert labels_of(tmp_path) == expected
    assert output.endswith("skipped 0\n")


def write_members(path: Path, files: list[tuple[str, bytes]]) -> None:
    """A tar in which names may occur twice."""
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.mark.fault("F24")
@pytest.mark.fast
def test_keys_without_a_photo_are_warned_of(tmp_path: Path) -> None:
    tar_of(
        {f"{i}.{e}": photo(i) for i in range(4) for e in ("left.jpg", "right.jpg")} | {"9.jpg": photo(9)},
        tmp_path / "0.tar",
    )
    output = index(tmp_path)
    assert "warning: 4 of 5 keys have no photo; a photo ends in .jpg, .jpeg, .png or .webp" in output
    assert "; ARGS='--photo KEY' takes another ending (skipped.jsonl lists those of each key)" in output
    assert "; skipped.jsonl lists 4 of them\n" in output
    row = json.loads((tmp_path / "skipped.jsonl").read_text().splitlines()[0])
    assert row == {
        "source": "0.tar/0", "kind": "samples without a photo", "reason": "its members: .left.jpg, .right.jpg"
    }  # fmt: skip


@pytest.mark.fault("F24")
@pytest.mark.fast
def test_photos_in_tars_without_their_ending(tmp_path: Path) -> None:
    """One picture in a sample is its photo; of several, nobody can say which one is. HEIC is counted and warned of."""
    files = {"0": photo(0), "1.image": photo(1), "1.cls": b"3", "2.jpg": photo(2), "2.depth": encoded(pixels(9), "PNG")}
    files |= {
        "5.gif": encoded(pixels(5), "GIF"),
        "3.image": photo(3),
        "3.mask": encoded(pixels(9), "PNG"),
        "4.heic": iso(b"heic"),
    }
    tar_of(files, tmp_path / "0.tar")
    output = index(tmp_path)
    assert labels_of(tmp_path) == {photo(0): None, photo(1): "3", photo(2): None}
    assert "warning: 3 of 6 keys have no photo" in output
    assert "warning: 1 picture in formats that are not read: 1 (HEIC .heic 1)" in output
    assert set(listed(tmp_path)) == {"0.tar/3", "0.tar/4", "0.tar/4.heic", "0.tar/5", "0.tar/5.gif"}


# ---- labels


LABELS = {  # how a class is written: (ending, the texts of three photos, the names of their classes)
    "text in .cls": ("cls", (b"tench", b"goldfish\n", b"tench"), ("tench", "goldfish", "tench")),
    "numbers in other forms": ("cls", (b"3\n", b"3.0", b" +1 "), ("3", "3", "1")),
    "quoted": ("cls", (b"b'tench'", b'"goldfish"', b"'tench'"), ("tench", "goldfish", "tench")),
    "json, cls": ("json", (b'{"cls": 2, "w": 3}', b'{"cls": "0"}', b'{"cls": 2.0}'), ("2", "0", "2")),
    "json, label": ("json", (b'{"label": "tench"}', b'{"label": "cat"}', b'{"label": "tench"}'), ("tench", "cat", "tench")),
    "json, class": ("json", (b'{"class": "b c"}', b'{"class": "a"}', b'{"class": null}'), ("b c", "a", None)),
    "text in .txt": ("txt", (b"tench", b"tench", b"tench"), ("tench", "tench", "tench")),
    "numbers in .txt": ("txt", (b"1\n", b"0\n", b"1\n"), ("1", "0", "1")),
    "UTF-8": ("cls", ("Schleie".encode("utf-8-sig"), "Grüße".encode(), "鯉".encode()), ("Schleie", "Grüße", "鯉")),
}  # fmt: skip


@pytest.mark.parametrize("case", [pytest.param(c, marks=fault) for c in LABELS])
def test_labels_in_other_forms(case: str, tmp_path: Path) -> None:
    """Classes are in sorted order over all tars, so that the positions do not depend on how samples are spread."""
    ending, texts, classes = LABELS[case]
    for i, text in enumerate(texts):
        tar_of({f"{i}.jpg": photo(i), f"{i}.{ending}": text}, tmp_path / f"{i}.tar")
    assert "warning" not in index(tmp_path)
    assert labels_of(tmp_path) == {photo(i): name for i, name in enumerate(classes)}
    assert Shards(tmp_path).classes == sorted(Shards(tmp_path).classes)


@pytest.mark.fault("F24")
@pytest.mark.fast
def test_labels_that_cannot_be_read_are_warned_of(tmp_path: Path) -> None:
    """Among ten numbers: an array, a list in JSON, a name. The photos stay, without a class."""
    files = {f"{i}.{e}": d for i in range(10) for e, d in (("jpg", photo(i)), ("cls", b"%d" % (i % 2)))}
    bad = {"10.cls": b"\x93NUMPY\x01\0", "11.json": b'{"label": [1, 2]}', "12.cls": b"tench"}
    tar_of(files | bad | {f"{i}.jpg": photo(i) for i in (10, 11, 12)}, tmp_path / "0.tar")
    output = index(tmp_path)
    assert (
        "warning: 3 of 13 labels cannot be read, so their photos have no class; a label is a number or a name" in output
    )
    assert {k: v for k, v in labels_of(tmp_path).items() if v is None} == dict.fromkeys(photo(i) for i in (10, 11, 12))
    rows = map(json.loads, (tmp_path / "skipped.jsonl").read_text().splitlines())
    assert {row["source"]: row["reason"] for row in rows} == {
        "0.tar/10.cls": "b'\\x93NUMPY\\x01\\x00' is neither a number nor the name of a class",
        "0.tar/11.json": "label: [1, 2] is neither a number nor the name of a class",
        "0.tar/12.cls": "'tench' is a name, and most labels are numbers",
    }


UNREAD = {  # what: (ending, text, how it is named)
    "a key of another name": ("json", b'{"w": 3, "class_id": 1}', ".json files with class_id 3"),
    "a number in .json": ("json", b"1", ".json files with only a number 3"),
    "another ending": ("label", b"1", ".label files 3"),
    "an array": ("cls.npy", b"\x93NUMPY\x01\0", ".cls.npy files 3"),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=fault) for c in UNREAD])
def test_what_looks_like_labels_is_warned_of(case: str, tmp_path: Path) -> None:
    ending, text, named = UNREAD[case]
    tar_of({f"{i}.{e}": d for i in range(3) for e, d in (("jpg", photo(i)), (ending, text))}, tmp_path / "0.tar")
    assert f"warning: no labels were found; what looks like some is not read: 3 ({named}); a label is" in index(
        tmp_path
    )


@pytest.mark.fault("F24")
@pytest.mark.fast
def test_labels_with_keys_of_their_own(tmp_path: Path) -> None:
    files = {f"images/{i}.jpg": photo(i) for i in range(3)} | {f"labels/{i}.cls": b"0" for i in range(3)}
    tar_of(files, tmp_path / "0.tar")
    output = index(tmp_path)
    assert "warning: 3 labels without a photo of the same key (0.tar/labels/0 first): labels are found by" in output
    assert "--photo" not in output


@pytest.mark.fault("F24")
@pytest.mark.fast
def test_classes_and_samples_without_one_are_counted(tmp_path: Path) -> None:
    files = {f"{i}.jpg": photo(i) for i in range(8)} | {f"{i}.cls": b"%d" % (1 + i % 3) for i in range(6)}
    tar_of(files, tmp_path / "0.tar")
    output = index(tmp_path)
    assert "classes: 1 (2 photos), 2 (2 photos), 3 (2 photos)\n" in output
    assert "samples in only 3 of 4 classes: labels are positions in the list of classes, from 0 on" in output
    assert "2 of 8 samples have no label\n" in output


def test_captions_are_no_classes(tmp_path: Path) -> None:
    """img2dataset's tars: a caption and a JSON object beside each photo."""
    beside = {"txt": lambda i: b"a dog, number %d" % i, "json": lambda i: b'{"caption": "a dog", "width": %d}' % i}
    files = {f"{i:09d}.jpg": photo(i) for i in range(6)}
    tar_of(files | {f"{i:09d}.{e}": d(i) for i in range(6) for e, d in beside.items()}, tmp_path / "00000.tar")
    output = index(tmp_path)
    assert "the .txt members are captions, no classes: 6 texts of 6 differ" in output
    assert "warning" not in output
    assert set(labels_of(tmp_path).values()) == {None}
    assert Shards(tmp_path).manifest["skipped"] == {".json files": 6, ".txt files": 6}


def test_parse_label() -> None:
    assert parse_label(b"99999") == 99999
    assert parse_label(b"-1") is None  # no class
    for bad in (b"", b"100000", b"3.5", b"0 0.5 0.5 0.1", b"a\nb", b"x" * 101, b"\xff\xfe", b"\x03" + bytes(7)):
        with pytest.raises(ValueError):
            parse_label(bad)


# ---- tars that are left out


@pytest.mark.fault("F24")
@pytest.mark.fast
def test_a_compressed_tar_beside_others(tmp_path: Path) -> None:
    tar_of({"0.jpg": photo(0)}, tmp_path / "0.tar")
    for i in (1, 2):
        (tmp_path / f"{i}.tar.gz").write_bytes(gzip.compress(tar_of({f"{i}.jpg": photo(i)})))
    error = index(tmp_path, expect=2)
    assert f"{tmp_path}/1.tar.gz: compressed, and would be left out of the index (2 such files)" in error
    assert f"`gzip -d -k {tmp_path}/*.tar.gz`, then the same command again" in error
    assert f"or index the others: `make index DST={tmp_path} ARGS=--skip-broken`" in error
    assert "left out: 2 tars (rejected.jsonl): 1.tar.gz: compressed (gzip)" in index(tmp_path, "--skip-broken")
    for i in (1, 2):
        (tmp_path / f"{i}.tar").write_bytes(gzip.decompress((tmp_path / f"{i}.tar.gz").read_bytes()))
    assert "3 samples in 3 shards" in index(tmp_path)  # the compressed ones may stay beside them


LEFT_OUT = {  # name: what is said of it
    "1.tar.gz": "1.tar.gz: a tar, but its name does not end in .tar",
    "1.tar.part": "1.tar.part: a tar, but its name does not end in .tar: if it is whole, `mv {home}/1.tar.part {home}/",
    "1": "1: a tar, but its name does not end in .tar",
    "more/1.tar": "more/1.tar: in a folder below; move the tars here, or `make index DST={home}/more` writes an index there",
    "1.zip": "1.zip: not opened; compressed (zip)",
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=fault) for n in LEFT_OUT])
def test_what_an_index_leaves_out_is_named(name: str, tmp_path: Path) -> None:
    """Beside a tar, and alone."""
    data = tar_of({"1.jpg": photo(1)}) if name != "1.zip" else b"PK\x03\x04" + bytes(300)
    tree(tmp_path, {"0.tar": tar_of({"0.jpg": photo(0)}), name: data})
    said = LEFT_OUT[name].format(home=tmp_path)
    assert f"warning: left out: {said}" in index(tmp_path)
    (tmp_path / "0.tar").unlink()
    error = index(tmp_path, expect=2)
    assert error.startswith(f"{tmp_path}: no *.tar here; ")
    assert said.partition("not opened; ")[2] in error if "zip" in name else said in error


@pytest.mark.fault("F24")
@pytest.mark.fast
def test_tars_in_capitals(tmp_path: Path) -> None:
    for i in range(2):
        tar_of({f"{i}.jpg": photo(i)}, tmp_path / ("0.TAR", "1.tar")[i])
    index(tmp_path)
    assert set(labels_of(tmp_path)) == {photo(0), photo(1)}
