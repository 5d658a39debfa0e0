"""F24: photos that would be skipped without a word: formats that are not read, missing endings, links.
Keys, labels and tars of other programs: test_f24_tars.py."""

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import prepare
from pictures import encoded, iso, labels_of, listed, photo, pixels, tar_of, tree

from pipeline.prepare.kinds import INSTALL, PICTURES, kind_of, readable
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
