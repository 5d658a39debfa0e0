"""F24: photos, labels and keys that would be skipped without a word.

Formats that are not read, missing endings, links, keys with dots, labels far from their photos or in other forms, compressed
tars.
"""

import gzip
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import prepare
from pictures import encoded, photo, pixels, tar_of, tree

from pipeline.prepare.kinds import INSTALL, PICTURES, kind_of, readable
from pipeline.prepare.tars.labels import parse_label
from pipeline.prepare.tars.samples import split_key, split_keys
from pipeline.shards import Shards

fault = [pytest.mark.fault("F24"), pytest.mark.fast]


def make(src: Path, *options: str, expect: int = 0) -> str:
    """What `make_shards make src src-shards` prints, or its error."""
    output, error = prepare("make", src, f"{src}-shards", *options)
    assert bool(error) == bool(expect), error
    return error or output


def index(folder: Path, *options: str, expect: int = 0) -> str:
    output, error = prepare("index", folder, *options)
    assert bool(error) == bool(expect), error
    return error or output


def listed(folder: Path) -> dict[str, str]:
    """{name: kind} of skipped.jsonl."""
    rows = map(json.loads, (folder / "skipped.jsonl").read_text().splitlines())
    return {row["source"]: row["kind"] for row in rows}


def labels_of(folder: Path) -> dict[bytes, str | None]:
    """{photo: name of its class}, read as the trainer does."""
    shards = Shards(folder)
    named = [*shards.classes, None]  # label -1 is the last
    return {shards.read(i): named[int(label)] for i, label in enumerate(shards.index["label"])}


def iso(brand: bytes) -> bytes:
    return b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic" + bytes(300)


# ---- what a file is


KINDS = {  # kind: (ending, first bytes)
    "HEIC": (".HEIC", iso(b"heic")),
    "OpenEXR": (".exr", b"\x76\x2f\x31\x01" + bytes(300)),
    "DICOM": (".dcm", bytes(128) + b"DICM" + bytes(300)),
    "JPEG XL": (".jxl", b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(300)),
    "camera raw": (".nef", encoded(pixels(1), "TIFF")),
    "PSD": (".psd", b"8BPS\0\x01" + bytes(300)),
}


@pytest.fixture
def without_heif(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """pillow-heif is not installed."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    readable.cache_clear()
    yield
    readable.cache_clear()


@pytest.mark.usefixtures("without_heif")
@pytest.mark.parametrize("kind", [pytest.param(k, marks=fault) for k in KINDS])
def test_pictures_of_other_formats_are_named(kind: str, tmp_path: Path) -> None:
    """By their first bytes: counted, listed, warned of with the command that converts them; also under the name .jpg."""
    last, data = KINDS[kind]
    install = f"{INSTALL[kind]}; or " if kind in INSTALL else ""
    src = tree(tmp_path / "src", {f"{i}.jpg": photo(i) for i in range(9)} | {f"IMG{last}": data, f"b/IMG{last}": data})
    output, dst, counted = make(src), Path(f"{src}-shards"), f"2 ({kind} {last.lower()} 2)"
    assert f"skipped {counted}, to be listed in {dst}/skipped.jsonl" in output
    assert (
        f"warning: 2 of 11 pictures are in formats that are not read: {counted}; {install}convert them to JPEG"
        in output
    )
    assert f"`find {src} -iname '*{last.lower()}' -exec magick {{}} -auto-orient -quality 95 {{}}.jpg \\;`" in output
    assert listed(dst) == dict.fromkeys((f"IMG{last}", f"b/IMG{last}"), f"{kind} {last.lower()}")
    if kind != "camera raw":  # which only its ending tells from TIFF
        wrong = tree(tmp_path / "wrong", {f"{i}.jpg": photo(i) for i in range(3)} | {"wrong.jpg": data})
        make(wrong, "--max-bad", "0.5")
        (row,) = map(json.loads, Path(f"{wrong}-shards/rejected.jsonl").read_text().splitlines())
        assert row["source"] == "wrong.jpg"
        assert row["reason"].startswith(f"it is {kind}, which is not read; convert it to JPEG")
        assert ("pip install" in row["reason"]) == (kind in INSTALL)


@pytest.mark.fault("F24")
@pytest.mark.fast
def test_a_phone_folder(tmp_path: Path) -> None:
    """Thirty JPEGs beside sixty JPEG XL, five PSD, three JPEGs without an ending, and other things."""
    files = {f"{i}.jpg": photo(i) for i in range(30)} | {f"IMG_{i}.JXL": KINDS["JPEG XL"][1] for i in range(60)}
    files |= {f"{i}.psd": KINDS["PSD"][1] for i in range(5)} | {f"DSC_{i}": photo(i + 30) for i in range(3)}
    files |= {
        "notes.txt": b"BM and other text",
        "clip.mov": b"\0\0\0\x14ftypqt  ",
        "old.zip": b"PK\x03\x04",
        ".DS_Store": b"",
    }
    src = tree(tmp_path / "src", files)
    dst = Path(f"{src}-shards")
    lines = make(src).splitlines()
    assert lines[0].startswith("33 photos, ")
    assert lines[1] == "by their first bytes, not by their ending: 3 (no ending 3)"
    kinds = "JPEG XL .jxl 60, PSD .psd 5"
    others = {"archive .zip 1", ".txt files 1", ".mov files 1", "hidden files 1"}
    start, _, rest = lines[2].partition(f"skipped 69 ({kinds}, ")
    assert (start, set(rest.partition(")")[0].split(", "))) == ("", others)
    assert lines[3].startswith(
        f"warning: 65 of 98 pictures are in formats that are not read: 65 ({kinds}); convert them"
    )
    assert rf"`find {src} \( -iname '*.jxl' -o -iname '*.psd' \) -exec magick " in lines[3]
    assert lines[4] == (
        "warning: 1 (archive .zip 1) not opened: old.zip; if they hold photos, unpack them first: "
        f"`unzip -q {src}/old.zip -d {src}/old`"
    )
    assert len(listed(dst)) == 69
    assert Shards(dst).manifest["skipped"]["JPEG XL .jxl"] == 60
    assert {photo(i + 30) for i in range(3)} < set(labels_of(dst))


def test_below_one_percent_there_is_no_warning(tmp_path: Path) -> None:
    files = {f"{i}.jpg": photo(i % 9) for i in range(100)} | {"IMG.JXL": KINDS["JPEG XL"][1]}
    output = make(tree(tmp_path / "src", files))
    assert "skipped 1 (JPEG XL .jxl 1); " in output
    assert "warning" not in output


def test_converted_pictures_are_no_loss(tmp_path: Path) -> None:
    """After the command of the warning. A JPEG of the same name may be another photo."""
    src = tree(
        tmp_path / "src",
        {f"{i}.jxl": KINDS["JPEG XL"][1] for i in range(3)} | {"0.jxl.jpg": photo(0), "1.jpg": photo(1)},
    )
    assert "warning: 2 of 4 pictures are in formats that are not read: 2 (JPEG XL .jxl 2)" in make(src)


def test_only_pictures_of_other_formats(tmp_path: Path) -> None:
    error = make(tree(tmp_path / "src", {f"{i}.jxl": KINDS["JPEG XL"][1] for i in range(3)}), expect=2)
    assert "no photos here (found: 3 JPEG XL .jxl); convert them to JPEG" in error


ODD = {"JPEG": "", "PNG": ".bin", "WEBP": ".image", "GIF": "", "TIFF": ".dat", "BMP": ".x"}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=fault) for k in ODD])
def test_photos_without_their_ending(kind: str, tmp_path: Path) -> None:
    """In a folder and in a tar; the shards are the same."""
    files = {f"{i}{ODD[kind]}": encoded(pixels(i), kind) for i in range(3)}
    src = tree(tmp_path / "src", files)
    tar_of(files, tmp_path / "src.tar")
    assert "3 photos, " in make(src)
    make(tmp_path / "src.tar")
    for name in ("shard-000000.tar", "index.npy"):
        assert (tmp_path / "src-shards" / name).read_bytes() == (tmp_path / "src.tar-shards" / name).read_bytes()


def test_kinds() -> None:
    assert kind_of(b"", "x") == kind_of(b"text", "x.jpg") == kind_of(b"BMW and others", "x") == ""
    assert kind_of(b"PK\x03\x04", "x.docx") == ""
    assert kind_of(b"PK\x03\x04", "x.ZIP") == kind_of(tar_of({"a": b""}), "x.tar") == "archive"
    assert kind_of(iso(b"mp42").replace(b"heic", b"isom"), "x.mp4") == ""
    assert kind_of(encoded(pixels(1), "TIFF"), "x.DNG") in PICTURES


# ---- links


@pytest.mark.fault("F24")
@pytest.mark.fast
def test_links_are_followed_on_request(tmp_path: Path) -> None:
    """To photos and to folders of photos, into other folders too; each real folder once, no circle, and all counted."""
    tree(tmp_path / "disk", {"b/1.jpg": photo(1), "b/deep/2.jpg": photo(2), "one.jpg": photo(3)})
    src = tree(tmp_path / "src", {"a/0.jpg": photo(0)})
    (src / "b").symlink_to(tmp_path / "disk/b")
    (src / "a/linked.jpg").symlink_to(tmp_path / "disk/one.jpg")
    (src / "c").symlink_to("b")  # the same folder again
    (src / "a/up").symlink_to(src)
    (tmp_path / "disk/b/deep/loop").symlink_to(tmp_path)
    (src / "a/self.jpg").symlink_to("self.jpg")
    (src / "a/nowhere.jpg").symlink_to("missing.jpg")
    output = make(src)
    assert "warning: 6 links are not followed; ARGS=--follow-links reads what links point to" in output
    assert "1 photo, " in output

    (src / "z").mkdir()
    src = src.rename(tmp_path / "again")  # another DST
    (src / "a/up").unlink()
    (src / "a/up").symlink_to(src)
    make(src, "--follow-links")
    dst = Path(f"{src}-shards")
    assert labels_of(dst) == {photo(0): "a", photo(3): "a", photo(1): "b", photo(2): "b"}
    assert listed(dst) == {
        "c/": "folders read before", "a/up/": "links in a circle", "b/deep/loop/": "links in a circle",
        "a/self.jpg": "broken links", "a/nowhere.jpg": "broken links",
    }  # fmt: skip


@pytest.mark.fault("F24")
@pytest.mark.fast
def test_a_folder_of_links(tmp_path: Path) -> None:
    src = tree(tmp_path / "disk", {f"{i}.jpg": photo(i) for i in range(3)}).with_name("src")
    src.mkdir()
    for i in range(3):
        (src / f"{i}.jpg").symlink_to(tmp_path / f"disk/{i}.jpg")
    assert "found: 3 links); links are not followed: ARGS=--follow-links reads what links point to" in make(
        src, expect=2
    )
    make(src, "--follow-links")
    assert set(labels_of(Path(f"{src}-shards"))) == {photo(i) for i in range(3)}


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


@pytest.mark.fault("F24")
@pytest.mark.fast
def test_class_folders_that_are_links(tmp_path: Path) -> None:
    """Class folders that are all links, as data sets are put together from several disks."""
    src = tmp_path / "src"
    src.mkdir()
    for i, name in enumerate(("ash", "birch")):
        tree(tmp_path / f"disk{i}" / name, {"1.jpg": photo(i)})
        (src / name).symlink_to(tmp_path / f"disk{i}" / name)
    make(src, "--follow-links")
    assert labels_of(Path(f"{src}-shards")) == {photo(0): "ash", photo(1): "birch"}


@pytest.mark.parametrize("form", [pytest.param(f, marks=fault) for f in ("gnu", "pax")])
def test_hard_links_in_a_tar(form: str, tmp_path: Path) -> None:
    """`tar` writes the second name of a file as a link to the first; long names are in headers of their own."""
    long = "n" * 120
    files = {f"ash/0{long}.jpg": photo(0), f"ash/0{long}.cls": b"ash", "elm/1.jpg": photo(1), "elm/1.cls": b"elm"}
    src = tree(tmp_path / "src", {**files, "ash/2.jpg": photo(2), "elm/3.jpg": photo(3)})
    (src / "ash" / "2.cls").hardlink_to(src / f"ash/0{long}.cls")
    (src / "elm" / "3.cls").hardlink_to(src / "elm" / "1.cls")
    (src / "both").mkdir()
    for i, name in enumerate((f"ash/0{long}.jpg", "elm/1.jpg")):
        (src / "both" / f"{i}.jpg").hardlink_to(src / name)

    def pack(path: Path, *what: str) -> Path:
        path.parent.mkdir(exist_ok=True)
        subprocess.run(["tar", "--sort=name", f"--format={form}", "-C", src, "-cf", path, *what], check=True)
        return path

    output = index(pack(tmp_path / "tars" / "0.tar", "ash", "elm").parent)
    assert "skipped 0" in output
    assert labels_of(tmp_path / "tars") == {photo(0): "ash", photo(2): "ash", photo(1): "elm", photo(3): "elm"}
    output = make(pack(tmp_path / "photos.tar", "ash", "elm", "both"))
    assert "6 samples" in output
    assert "skipped 4 (.cls files 4)" in output
    made = Shards(f"{tmp_path / 'photos.tar'}-shards")
    both = made.classes.index("both")
    assert {made.read(i) for i, label in enumerate(made.index["label"]) if label == both} == {photo(0), photo(1)}


# ---- what `make shards` does not read, and what to do instead


@pytest.mark.fault("F24")
@pytest.mark.fast
def test_absolute_names_in_a_tar(tmp_path: Path) -> None:
    """`tar -P` keeps the leading slash. Nothing is extracted: the names only label samples."""
    files = {f"/data/{c}/{i}.jpg": photo(i) for c, i in (("ash", 0), ("elm", 1))}
    tar_of(files, tmp_path / "photos.tar")
    make(tmp_path / "photos.tar")
    assert labels_of(tmp_path / "photos.tar-shards") == {photo(0): "ash", photo(1): "elm"}
    tar_of({**files, "/data/ash/0.cls": b"3"}, tmp_path / "tars" / "0.tar")
    assert "skipped 0" in index(tmp_path / "tars")
    assert labels_of(tmp_path / "tars") == {photo(0): "3", photo(1): None}


@pytest.mark.fault("F24")
@pytest.mark.fast
def test_samples_with_labels_given_to_make(tmp_path: Path) -> None:
    """In a tar and in a folder: the command that keeps the labels, which works."""
    samples = {f"{i}.{e}": data for i in range(2) for e, data in (("jpg", photo(i)), ("cls", b"%d" % i))}
    (tmp_path / "a b").mkdir()
    tar_of(samples, tmp_path / "a b/x.tar")
    assert f"warning: {tmp_path}/a b/x.tar holds WebDataset samples (0.jpg with 0.cls)" in make(tmp_path / "a b/x.tar")
    assert f"`make index DST='{tmp_path}/a b'`" in make(tmp_path / "a b/x.tar", "--labels", "auto")
    src = tree(tmp_path / "loose", samples)
    command, _, _ = make(src).split("`")[1].partition(" && make index")
    subprocess.run(command, shell=True, check=True)
    index(Path(f"{src}-shards-labeled"))
    assert labels_of(Path(f"{src}-shards-labeled")) == {photo(i): str(i) for i in range(2)}


@pytest.mark.fault("F24")
@pytest.mark.fast
def test_a_file_that_may_hold_the_labels(tmp_path: Path) -> None:
    """Tiny ImageNet's validation photos."""
    src = tree(tmp_path / "val", {"images/1.jpg": photo(1), "val_annotations.txt": b"1.jpg\tn01"})
    assert f"warning: {src}/val_annotations.txt may hold labels, which are not read" in make(src)


@pytest.mark.fault("F24")
@pytest.mark.fast
def test_archives_are_named_train_first(tmp_path: Path) -> None:
    """Kaggle's: beside photos, and alone."""
    zips = {f"{name}.zip": b"PK\x03\x04" + bytes(300) for name in ("test", "train")}
    src = tree(tmp_path / "src", zips | {"test/1.jpg": photo(1)})
    assert (
        f"not opened: train.zip, test.zip; if they hold photos, unpack them first: `unzip -q {src}/train.zip"
        in make(src)
    )
    only = tree(tmp_path / "only", zips)
    error = make(only, expect=2)
    assert f"; its archives can be SRC: `make shards SRC={only}/train.zip DST={only}-shards`" in error


@pytest.mark.fault("F24")
@pytest.mark.fast
def test_class_tars_that_are_all_compressed(tmp_path: Path) -> None:
    """One command unpacks all, and works."""
    src = tree(
        tmp_path / "src", {f"{c}.tar.gz": gzip.compress(tar_of({"1.jpg": photo(i)})) for i, c in enumerate("ab")}
    )
    error = make(src, expect=2)
    assert f"`gzip -d -k {src}/*.tar.gz`" in error
    subprocess.run(error.split("`")[1], shell=True, check=True)
    make(src)
    assert Shards(Path(f"{src}-shards")).classes == ["a", "b"]


@pytest.mark.fault("F24")
@pytest.mark.fast
def test_two_links_to_one_folder(tmp_path: Path) -> None:
    tree(tmp_path / "real", {"1.jpg": photo(1)})
    (tmp_path / "src").mkdir()
    for name in ("p", "q"):
        (tmp_path / "src" / name).symlink_to(tmp_path / "real")
    output = make(tmp_path / "src", "--follow-links")
    assert "warning: 1 folder read once, under another name" in output
    assert "q/ is no folder or class of its own" in output
