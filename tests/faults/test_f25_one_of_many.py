"""F25: one odd thing among many, through `make` and `index`. Each cause is named with its own next step, and there is a way
on: an option, a command, or a warning.

The commands run in this process, except where the disk or the program's end matters.
"""

import bz2
import errno
import fcntl
import gzip
import json
import lzma
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import prepare, run_program
from pictures import encoded, photo, pixels, tar_of, tree

from pipeline.shards import Shards
from runtime import files, watchdog

PHOTO = [photo(i) for i in range(6)]
fault_case = [pytest.mark.fault("F25"), pytest.mark.fast]


def photos_of(folder: Path) -> set[bytes]:
    shards = Shards(folder)
    return {shards.read(i) for i in range(len(shards))}


def rejected(folder: Path) -> dict[str, str]:
    rows = map(json.loads, (folder / "rejected.jsonl").read_text().splitlines())
    return {row["source"]: row["reason"] for row in rows}


# ---- broken tars


def whole(i: int) -> bytes:
    return tar_of({f"{i}.jpg": PHOTO[i]})


def damaged() -> bytes:
    raw = bytearray(tar_of({"1.jpg": PHOTO[1], "2.jpg": PHOTO[2]}))
    raw[raw.index(b"2.jpg")] ^= 1
    return bytes(raw)


BROKEN = {
    "empty": (b"", "empty (0 bytes); copy or download it again"),
    "cut": (whole(1)[:1200], "truncated: the member at byte 0 has"),
    "endless": (whole(1)[: 512 + 512 * -(-len(PHOTO[1]) // 512)], "the end of the tar (two empty blocks"),
    "damaged": (damaged(), "is not a tar header: damaged, truncated, or not a tar; copy or download it again"),
    "no tar": (b"<html>no access</html>" * 100, "text, not a tar; it begins with '<html>no access"),
    "no photos": (tar_of({"1.txt": b"text"}), "no photos in this tar (jpg, jpeg, png or webp; found: txt (1))"),
    "gzip": (gzip.compress(whole(1)), "compressed (gzip)"),
}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=fault_case) for k in BROKEN])
def test_a_broken_tar_among_others(kind, tmp_path):
    """The message has the tar, the reason, and the command that goes on; that command indexes all others."""
    data, reason = BROKEN[kind]
    folder = tree(tmp_path / "tars", {"0.tar": whole(0), "1.tar": data, "3.tar": whole(3)})
    _, error = prepare("index", folder)
    assert error.startswith(f"{folder}/1.tar: ")
    assert reason in error
    assert rejected(folder)["1.tar"] in error
    assert not (folder / "manifest.json").exists()
    kept = sorted(path.name for path in folder.glob(".make_shards/*"))
    assert kept in ([], ["0.tar.json"])  # what was read before the broken tar was found
    assert (folder / ".make_shards").exists() == bool(kept)
    command = re.search(r"index the others: `make index DST=(\S+) ARGS=(\S+)`$", error)
    output, error = prepare("index", *command.groups())
    assert error == ""
    assert ("resuming: 1 of 3 tars read before" in output) == bool(kept)
    assert not (folder / ".make_shards").exists()
    assert "2 samples in 2 shards" in output
    assert "skipped 1 (broken tars 1)" in output
    assert "left out: 1 tar (rejected.jsonl): 1.tar: " in output
    assert photos_of(folder) == {PHOTO[0], PHOTO[3]}
    assert reason in rejected(folder)["1.tar"]
    assert [s["name"] for s in Shards(folder).shards] == ["0.tar", "3.tar"]


@pytest.mark.fault("F25")
@pytest.mark.fast
def test_all_broken_tars_are_named_before_anything_is_decoded(tmp_path):
    """Empty, cut and compressed ones, at once."""
    tars = {f"{i}.tar": whole(i) for i in range(3)} | {"5.tar": b"", "6.tar": whole(1)[:1200], "7.tar": b"BZh9" * 200}
    folder = tree(tmp_path / "tars", tars | {"8.tar/x": b""})
    _, error = prepare("index", folder)
    assert "4 of 7 tars cannot be used: 5.tar: empty" in error
    assert "7.tar: compressed (bzip2)" in error
    assert f"and 1 more ({folder}/rejected.jsonl lists all)" in error
    assert rejected(folder)["8.tar"] == "is a folder, not a tar"
    prepare("index", folder, "--skip-broken")
    assert photos_of(folder) == set(PHOTO[:3])


@pytest.mark.fault("F25")
@pytest.mark.fast
def test_a_broken_class_tar(tmp_path):
    """In a folder of class tars and in a tar of tars."""
    tars = {
        f"{c}.tar": tar_of({f"{c}_{i}.JPEG": PHOTO[3 * k + i] for i in range(3)}) for k, c in enumerate(("ash", "elm"))
    }
    tars["fir.tar"] = whole(1)[:1200]
    for src in (tree(tmp_path / "folder", tars), tmp_path / "all.tar"):
        tar_of(tars, tmp_path / "all.tar")
        dst = tmp_path / f"{src.name}-shards"
        _, error = prepare("make", src, dst)
        assert "fir.tar: truncated" in error
        assert error.endswith("or leave such tars out with ARGS=--skip-broken")
        output, _ = prepare("make", src, dst, "--skip-broken")
        assert "left out: 1 tar (rejected.jsonl): fir.tar: truncated" in output
        assert photos_of(dst) == set(PHOTO)
        assert list(rejected(dst)) == ["fir.tar"]
    (tmp_path / "folder" / "fir.tar").rename(tmp_path / "folder" / "ivy.tar.gz").write_bytes(gzip.compress(whole(1)))
    _, error = prepare("make", tmp_path / "folder", tmp_path / "other")
    assert "ivy.tar.gz: compressed (gzip), and photos" in error
    output, _ = prepare("make", tmp_path / "folder", tmp_path / "other", "--skip-broken")
    assert "skipped 1 (archive .gz 1); " in output


# ---- compressed archives, whatever their name


def packed(kind: str, folder: Path) -> bytes:
    data = whole(1)
    if kind == "zip":
        (folder / "1.jpg").write_bytes(PHOTO[1])
        subprocess.run([sys.executable, "-m", "zipfile", "-c", "made.zip", "1.jpg"], cwd=folder, check=True)
        return (folder / "made.zip").read_bytes()
    pack = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}
    first = {"zst": b"\x28\xb5\x2f\xfd", "7z": b"7z\xbc\xaf\x27\x1c", "rar": b"Rar!\x1a\x07\x00"}
    return pack[kind](data) if kind in pack else first[kind] + bytes(600)


@pytest.mark.parametrize(
    ("name", "kind", "command"),
    [
        pytest.param(*case, marks=fault_case)
        for case in (
            ("x.tar.gz", "gz", "gzip -d -k x.tar.gz"),
            ("x.tar", "gz", "mv x.tar x.tar.gz && gzip -d x.tar.gz"),
            ("my x.tar.xz", "xz", "xz -d -k 'my x.tar.xz'"),
            ("x.tar", "bz2", "mv x.tar x.tar.bz2 && bzip2 -d x.tar.bz2"),
            ("x.tar.zst", "zst", "zstd -d -k x.tar.zst"),
            ("x.zip", "zip", "unzip -q x.zip -d x"),
            ("x.tar", "7z", "7z x x.tar -ox"),
            ("x.rar", "rar", "unrar x x.rar x/"),
        )
    ],
)
def test_a_compressed_archive(name, kind, command, tmp_path, monkeypatch):
    """What `make` reads, a folder that holds it names; else it is named with the exact command, as for `index`, and the
    command works."""
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    data = packed(kind, tmp_path)
    Path(name).write_bytes(data)
    is_read = kind in ("gz", "xz", "bz2", "zip")
    if is_read:
        assert prepare("make", name, tmp_path / "read")[1] == ""
        assert photos_of(tmp_path / "read") == {PHOTO[1]}
        if name != "x.tar":  # a tar's name is a class's, in a folder
            hint = f"; its archives can be SRC: `make shards SRC={shlex.quote(str(Path(name).absolute()))} DST="
            assert hint in prepare("make", ".", tmp_path / "dst")[1]
    sources = (("make", name, "dst"), ("make", ".", tmp_path / "dst")) if not is_read and kind != "zst" else ()
    for words in (*sources, ("index", ".")):
        _, error = prepare(*words)
        assert "compressed (" in error, words
        shown = re.search(r"unpack it first: `([^`]*)`", error)[1]
        assert shown.replace(f"{tmp_path}/in/", "").replace(f"'{tmp_path}/in/my", "'my") == command, words
    if kind not in ("gz", "xz", "bz2") or not shutil.which(command.split(" -d")[0].split()[-1]):
        return  # a program that is not everywhere
    subprocess.run(shown, shell=True, check=True)
    prepare("index", ".")
    assert photos_of(Path()) == {PHOTO[1]}


INNER = {  # what: (name in the outer tar, its bytes, the message)
    "gzip named tar": ("b.tar", gzip.compress(whole(1)), "b.tar: compressed (gzip), and photos are read at"),
    "empty": ("b.tar", b"", "b.tar: empty (0 bytes); copy"),
    "all compressed": ("", gzip.compress(whole(1)), "no photos here (found: 2 archive .gz); unpack both: "),
}  # fmt: skip


@pytest.mark.parametrize("case", [pytest.param(c, marks=fault_case) for c in INNER])
def test_inner_tars_that_are_no_tars(case, tmp_path):
    """What they are, by their first bytes; the command unpacks the outer tar."""
    name, data, message = INNER[case]
    tar_of({"a.tar": whole(0), name: data} if name else {"a.tar.gz": data, "b.tar.gz": data}, tmp_path / "all.tar")
    _, error = prepare("make", tmp_path / "all.tar", tmp_path / "dst")
    assert message in error
    if case != "empty":
        subprocess.run(re.search(r"`([^`]*)`", error)[1], shell=True, check=True)
        assert (tmp_path / "all" / (name or "b.tar.gz")).read_bytes() == data


@pytest.mark.fault("F25")
@pytest.mark.fast
def test_a_tar_of_pictures_that_make_converts(tmp_path):
    folder = tree(tmp_path / "my tars", {"0.tar": tar_of({f"{i}.tiff": encoded(pixels(i), "TIFF") for i in range(3)})})
    _, error = prepare("index", folder)
    command = shlex.split(re.search(r"`make shards ([^`]*)` converts them", error)[1])
    src, dst = (word.partition("=")[2] for word in command)
    prepare("make", src, dst)
    assert len(photos_of(Path(dst))) == 3


# ---- the key of the photos


@pytest.mark.parametrize(
    ("keys", "words", "chosen"),
    [
        pytest.param(*case, marks=fault_case)
        for case in (
            (("input.jpg", "target.jpg"), (), "input.jpg"),
            (("left.JPG", "right.JPG"), ("--photo", "left.jgp"), "left.jpg"),
            (("image.png", "seg.png"), ("--photo", "image"), "image.png"),
        )
    ],
)
def test_photos_under_a_key_of_their_own(keys, words, chosen, tmp_path):
    """All keys are listed with their numbers, and the command that is printed takes one of them."""
    tars = {
        f"{t}.tar": tar_of({f"{i}.{k}": PHOTO[i + 3 * (k == keys[1])] for i in range(3) for k in keys}) for t in "ab"
    }
    folder = tree(tmp_path / "tars", tars)
    _, error = prepare("index", folder, *words)
    assert f"found: {keys[0].lower()} (3), {keys[1].lower()} (3))" in error
    assert chosen in prepare("index", folder, *words, "--skip-broken")[1]  # no tar is left
    command = re.search(r"`make index DST=(\S+) ARGS='(--photo \S+)'` takes", error)
    assert command[2] == f"--photo {chosen}"
    prepare("index", command[1], *shlex.split(command[2]))
    assert photos_of(folder) == set(PHOTO[:3])
    assert Shards(folder).manifest["settings"] == {"photo": chosen}


# ---- one tar per class


@pytest.mark.fault("F25")
@pytest.mark.fast
@pytest.mark.parametrize("form", ["folder", "folder/train", "tar with train/"])
def test_class_tars(form, tmp_path):
    """The same shards as from class folders, byte for byte."""
    classes = {
        c: {f"{c}_{i}.JPEG": PHOTO[3 * k + i] for i in range(3)} for k, c in enumerate(("n01440764", "n01443537"))
    }
    below = "train/" if "train" in form else ""
    tars = {f"{below}{c}.tar": tar_of(inside) for c, inside in classes.items()}
    src = tmp_path / "src"
    if form.startswith("folder"):
        tree(src, tars)
    else:
        tar_of(tars, src)
    output, error = prepare("make", src, tmp_path / "dst")
    assert error == ""
    assert f"a {form[:6].split()[0]} of 2 tars, one class each" in output
    folders = tree(
        tmp_path / "folders", {f"{c}/{name}": d for c, inside in classes.items() for name, d in inside.items()}
    )
    prepare("make", folders, tmp_path / "same")
    for name in ("shard-000000.tar", "index.npy"):
        assert (tmp_path / "dst" / name).read_bytes() == (tmp_path / "same" / name).read_bytes()
    assert Shards(tmp_path / "dst").classes == list(classes)


@pytest.mark.parametrize(
    ("tars", "message"),
    [
        pytest.param(*case, marks=fault_case)
        for case in (
            (
                {"a.tar": {"0.jpg": PHOTO[0], "0.cls": b"1"}, "b.tar": {"1.jpg": PHOTO[1]}},
                "`make index DST={src}` uses",
            ),
            (
                {f"s-{i:03d}.tar": {f"{i}.jpg": PHOTO[i]} for i in range(3)},
                "`make index DST={src}` uses them as they are",
            ),
            ({"train.tar": {"0.jpg": PHOTO[0]}, "val.tar": {"1.jpg": PHOTO[1]}}, "parts of a data set, not classes"),
            ({"a/x.tar": {"0.jpg": PHOTO[0]}, "b/x.tar": {"1.jpg": PHOTO[1]}}, "several places (a/ and b/): give one"),
        )
    ],
)
def test_tars_that_are_not_classes(tars, message, tmp_path):
    src = tree(tmp_path / "src", {name: tar_of(inside) for name, inside in tars.items()})
    _, error = prepare("make", src, tmp_path / "dst")
    assert message.format(src=src) in error
    assert not (tmp_path / "dst").exists()
    if "numbered in a row" in error:
        output, _ = prepare("make", src, tmp_path / "dst", "--labels", "yes")
        assert "3 classes" in output


# ---- disks


def mounted(folder: Path, *options: str):
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no mount here: {done.stderr.strip()}")


@pytest.mark.fault("F25")
@pytest.mark.fast
def test_a_read_only_disk(tmp_path, monkeypatch):
    """Found before anything is decoded; for `index` the printed command works with links."""
    monkeypatch.chdir(tmp_path)
    disk = tmp_path / "disk"
    mounted(disk, "-t", "tmpfs", "-o", "size=4m", "tmpfs")
    try:
        tree(disk, {"0.tar": whole(0), "1.tar": tar_of({"x.jpg": b"not read yet"})})
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        _, error = prepare("index", disk)
        assert f"{disk}: cannot be written: its disk is mounted read-only; write the index elsewhere" in error
        command = re.search(r"`make index DST=(\S+) ARGS='--out (\S+)'`", error)
        output, _ = prepare("index", command[1], "--out", command[2], "--max-bad", "0.5")
        assert "1 sample in 1 shard" in output
        _, error = prepare("make", tree(tmp_path / "src", {"0.jpg": PHOTO[0]}), disk / "below" / "dst")
        assert error == f"{disk}: cannot be written: its disk is mounted read-only; give another DST"
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=False)


@pytest.mark.fault("F25")
@pytest.mark.fast
def test_a_disk_without_room_for_the_files(tmp_path):
    disk = tmp_path / "disk"
    mounted(disk, "-t", "tmpfs", "-o", "size=4m,nr_inodes=20", "tmpfs")
    try:
        src = tree(tmp_path / "src", {f"{i}.jpg": PHOTO[i] for i in range(6)})
        _, error = prepare("make", src, disk / "dst", "--shard-mb", "0.002")
        assert re.search(
            r"20 files will be written, and its disk has room for \d+ more \(`df -i .*give a larger", error
        )
        assert not list((disk / "dst").iterdir())
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=False)


@pytest.mark.fault("F25")
@pytest.mark.fast
@pytest.mark.skipif(os.geteuid() == 0 and not Path("/usr/bin/setpriv").exists(), reason="needs a user that is not root")
def test_a_folder_of_another_user(tmp_path):
    dst, src = tmp_path / "dst", tree(tmp_path / "src", {"0.jpg": PHOTO[0]})
    dst.mkdir()
    dst.chmod(0o555)
    for folder in (tmp_path, *tmp_path.parents):
        if (mode := folder.stat().st_mode) & 0o555 != 0o555:
            folder.chmod(mode | 0o555)
    command = [sys.executable, "-m", "tools.make_shards", "make", src, dst, "--processes", "1"]
    if os.geteuid() == 0:
        command = ["setpriv", "--reuid=65534", "--clear-groups", *command]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 2, done.stderr
    assert f"error: {dst}: cannot be written: no permission for " in done.stderr
    assert done.stderr.endswith("; give another DST\n")


@pytest.fixture
def network_disk(monkeypatch):
    """Locks and the sync of folders fail as on some network disks; no disk of this machine does that."""
    fsync = os.fsync

    def lock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    def sync(file):
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(file)

    monkeypatch.setattr(fcntl, "flock", lock)
    monkeypatch.setattr(os, "fsync", sync)
    files._warn_once.cache_clear()


@pytest.mark.fault("F25")
@pytest.mark.fast
@pytest.mark.parametrize("command", ["make", "index"])
def test_a_disk_without_locks_and_sync_of_folders(command, network_disk, tmp_path):
    """One warning for each, and the shards are written."""
    src, dst = tree(tmp_path / "src", {"0.jpg": PHOTO[0], "1.jpg": PHOTO[1]}), tmp_path / "dst"
    if command == "index":
        tree(dst, {"0.tar": tar_of({"0.jpg": PHOTO[0], "1.jpg": PHOTO[1]})})
    output, error = prepare("make", src, dst) if command == "make" else prepare("index", dst)
    assert error == ""
    assert f"warning: {dst}: this disk has no file locks (No locks available): nothing stops a second" in output
    assert f"warning: {dst}: this disk cannot sync a folder (Invalid argument)" in output
    assert output.count("no file locks") == 1
    assert photos_of(dst) == {PHOTO[0], PHOTO[1]}


@pytest.mark.fault("F25")
@pytest.mark.fast
def test_a_run_folder_without_locks(network_disk, tmp_path, capsys):
    with watchdog.lock(tmp_path / "run") as held:
        assert held.name.endswith(".lock")
        files.write_atomic(tmp_path / "run" / "a", "text")
    warnings = capsys.readouterr().err
    assert f"warning: {tmp_path / 'run'}: this disk has no file locks" in warnings
    assert f"warning: {tmp_path / 'run'}: this disk cannot sync a folder" in warnings


@pytest.mark.fault("F25")
def test_the_real_program(tmp_path):
    """`index` with several processes: an error with exit code 2, then all tars but the broken one."""
    tars = {f"{i}.tar": whole(i) for i in range(5)} | {"5.tar": damaged()}
    folder = tree(tmp_path / "tars", tars)
    words = "-m", "tools.make_shards", "index", folder, "--processes", "2"
    stderr = run_program(*words, expect=2).stderr
    assert stderr.startswith(f"error: {folder}/5.tar: byte ")
    assert stderr.count("\n") == 1
    assert "5 samples in 5 shards" in run_program(*words, "--skip-broken").stdout
