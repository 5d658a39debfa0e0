"""F21: a tar whose end is not its end. Tars joined by `cat` are read to the last one; zeros that overwrite headers are
refused, with the byte and how much lies behind. Nothing behind zeros is left out without a word.

`tar` and `tarfile` stop at the first two blocks of zeros; webdataset and DALI at the first one.
"""

import io
import os
import re
import tarfile
import time
from pathlib import Path

import pytest
from conftest import run_program
from pictures import photo, tar_of

from pipeline.prepare.tar import members
from pipeline.shards import Shards
from runtime.errors import UserError

PHOTOS = 24
PARTS = [{f"{i:02d}.jpg": photo(i), f"{i:02d}.cls": b"%d" % (i % 3)} for i in range(PHOTOS)]


def of(first: int, stop: int) -> dict[str, bytes]:
    return {name: data for part in PARTS[first:stop] for name, data in part.items()}


WHOLE, HALVES = tar_of(of(0, PHOTOS)), (tar_of(of(0, PHOTOS // 2)), tar_of(of(PHOTOS // 2, PHOTOS)))


def listed(tar: bytes) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        return opened.getmembers()


def end_of(tar: bytes) -> int:
    """The first byte behind the last member."""
    last = listed(tar)[-1]
    return last.offset_data + last.size + -last.size % 512


def bare(tar: bytes) -> bytes:
    """A tar with two blocks of zeros behind its last member and no more, as some programs write it."""
    return tar[: end_of(tar)] + bytes(1024)


def header(n: int) -> int:
    """Where the header of member n of WHOLE is."""
    return listed(WHOLE)[n].offset


def zeros(at: int, size: int) -> bytes:
    return WHOLE[:at] + bytes(size) + WHOLE[at + size :]


JOINED = {
    "cat a.tar b.tar": HALVES[0] + HALVES[1],
    "cat of tars without padding": bare(HALVES[0]) + bare(HALVES[1]),
    "cat of tars in records of 64 kB": HALVES[0].ljust(64 << 10, b"\0") + HALVES[1],
    "cat of tars with one block of zeros": bare(HALVES[0])[:-512] + HALVES[1],
    "cat of three, one of them empty": HALVES[0] + bytes(10240) + HALVES[1],
}
ORDINARY = {
    "megabytes of zeros at the end": WHOLE + bytes(64 << 20),
    "one block of zeros at the end": WHOLE[: end_of(WHOLE)] + bytes(512),
}
SIXTEEN = 16 << 10
DAMAGED = {  # the tar; the first zero byte that the message names
    "16 kB of zeros": (zeros(header(9) + 700, SIXTEEN), None),
    "zeros from a header to another": (zeros(header(8), header(11) - header(8)), header(8)),
    "one header of zeros": (zeros(header(20), 512), header(20)),
    "text behind the end": (WHOLE + b"<html>", end_of(WHOLE)),
    "cat of a tar and half a tar": (HALVES[0] + HALVES[1][700:], end_of(HALVES[0])),
}


def said_by_both(tar: bytes, folder: Path, expect: int) -> list[str]:
    """stdout and stderr of `make shards` and `make index`."""
    (folder / "tars").mkdir()
    (folder / "tars" / "some.tar").write_bytes(tar)
    programs = (("make", folder / "tars" / "some.tar", folder / "made"), ("index", folder / "tars"))
    done = [run_program("-m", "tools.make_shards", *words, "--processes", "1", expect=expect) for words in programs]
    return [d.stdout + d.stderr for d in done]


@pytest.mark.parametrize(
    "kind", [*(pytest.param(k, marks=[pytest.mark.fault("F21"), pytest.mark.fast]) for k in JOINED), *ORDINARY]
)
def test_all_of_it_is_read(kind, tmp_path):
    for text in said_by_both((JOINED | ORDINARY)[kind], tmp_path, expect=0):
        assert f"{PHOTOS} samples" in text
        assert ("some.tar: 2 tars behind each other, joined at byte " in text) == (kind in JOINED)
    indexed = Shards(tmp_path / "tars")
    photos = {indexed.read(i): int(indexed.index["label"][i]) for i in range(len(indexed))}
    assert photos == {part[f"{i:02d}.jpg"]: i % 3 for i, part in enumerate(PARTS)}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.fault("F21"), pytest.mark.fast]) for k in DAMAGED])
def test_what_lies_behind_zeros_is_named(kind, tmp_path):
    tar, at = DAMAGED[kind]
    for text in said_by_both(tar, tmp_path, expect=2):
        (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
        assert "some.tar: damaged: " in line
        first, zero_bytes, behind = numbers(line)
        assert at is None or first == at
        assert not any(tar[first : first + zero_bytes])
        assert tar[first + zero_bytes]
        assert behind == len(tar) - first - zero_bytes
    assert not (tmp_path / "tars" / "manifest.json").exists()


@pytest.mark.fault("F21")
@pytest.mark.fast
def test_zeros_like_a_joint_are_said(tmp_path):
    """They end where a record ends, at a header: as the zeros between joined tars."""
    sound = next(i for i in range(2, 2 * PHOTOS) if header(i) // 10240 > header(i - 1) // 10240)
    padding = 10240 - header(sound) % 10240  # so that the header is at the beginning of a record
    first = tarfile.TarInfo("note.txt")
    first.size = padding - 512
    whole = first.tobuf() + bytes(first.size) + WHOLE
    end = header(sound) + padding
    hole = end - (header(sound) - header(sound - 2))
    for text in said_by_both(whole[:hole] + bytes(end - hole) + whole[end:], tmp_path, expect=0):
        assert f"some.tar: 2 tars behind each other, joined at byte {end}; if they were not joined by `cat`" in text


TEXTS = {
    "a pointer of Git LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
        "`git lfs pull` downloads",
    ),
    "a web page": (b"<!DOCTYPE html>\n<html>" + b"sign in " * 100, "download it again"),
}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.fault("F21"), pytest.mark.fast]) for k in TEXTS])
def test_text_is_no_tar(kind, tmp_path):
    text, advice = TEXTS[kind]
    for said in said_by_both(text, tmp_path, expect=2):
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert f"some.tar: text, not a tar; it begins with '{text[:9].decode()}" in line
        assert advice in line


def numbers(line: str) -> tuple[int, int, int]:
    """(first zero byte, zero bytes, bytes behind them) of the message."""
    found = re.search(r"([\d,]+) zero bytes at byte (\d+) are not its end, because ([\d,]+) bytes? follow", line)
    assert found, line
    zero_bytes, first, behind = (int(number.replace(",", "")) for number in found.groups())
    return first, zero_bytes, behind


@pytest.mark.fault("F21")
@pytest.mark.fast
def test_tars_inside_a_tar(tmp_path):
    """ImageNet's tar of tars: inner tars that were joined are read whole, a damaged one is named."""
    tar_of({"n01.tar": HALVES[0] + HALVES[1], "n02.tar": HALVES[0]}, tmp_path / "train.tar")
    done = run_program("-m", "tools.make_shards", "make", tmp_path / "train.tar", tmp_path / "made", "--processes", "1")
    assert f"{PHOTOS + PHOTOS // 2} samples" in done.stdout
    assert Shards(tmp_path / "made").classes == ["n01", "n02"]
    inner = zeros(header(8), header(11) - header(8))
    outer = tar_of({"n01.tar": HALVES[0], "n02.tar": inner}, tmp_path / "damaged.tar")
    words = ("-m", "tools.make_shards", "make", tmp_path / "damaged.tar", tmp_path / "no", "--processes", "1")
    error = run_program(*words, expect=2).stderr
    assert "damaged.tar: n02.tar: damaged: " in error
    first, zero_bytes, behind = numbers(error)
    assert first == outer.rindex(inner) + header(8)
    assert behind == len(inner) - header(8) - zero_bytes


@pytest.mark.fault("F21")
@pytest.mark.fast
def test_verify_names_the_zeros(tmp_path):
    """A label's header was overwritten: no photo is lost, and the message has the byte."""
    said_by_both(WHOLE, tmp_path, expect=0)
    (tmp_path / "tars" / "some.tar").write_bytes(zeros(header(21), 512))
    text = run_program("-m", "tools.make_shards", "verify", tmp_path / "tars", expect=2).stdout
    assert numbers(text)[0] == header(21)
    assert "none of its 24 samples is lost" in text


@pytest.mark.fault("F21")
@pytest.mark.fast
def test_a_name_without_its_member(tmp_path):
    """A long name says that a member follows. If zeros do, the member is lost: this is not the tar's end."""
    named = tarfile.TarInfo("n" * 200 + ".jpg").tobuf(tarfile.GNU_FORMAT)[:1024]  # without the member's own header
    path = tmp_path / "tars" / "some.tar"
    path.parent.mkdir()
    path.write_bytes(WHOLE[: end_of(WHOLE)] + named + bytes(10240))
    error = run_program("-m", "tools.make_shards", "index", path.parent, "--processes", "1", expect=2).stderr
    assert f"some.tar: byte {end_of(WHOLE) + len(named)} is not a tar header" in error


@pytest.mark.fault("F21")
@pytest.mark.fast
def test_many_zeros_are_read_quickly(tmp_path):
    """Behind a tar, in a file that is sparse."""
    path = tmp_path / "sparse.tar"
    path.write_bytes(WHOLE)
    os.truncate(path, len(WHOLE) + (1 << 28))
    began = time.process_time()
    with path.open("rb") as tar:
        assert len([*members(tar, 0, path.stat().st_size, "sparse.tar")]) == 2 * PHOTOS
    assert time.process_time() - began < 1.5
    with path.open("r+b") as tar:
        tar.seek(-1, os.SEEK_END)
        tar.write(b"x")
        tar.flush()
        with pytest.raises(UserError, match="because 1 byte follows them"):
            [*members(tar, 0, path.stat().st_size, "sparse.tar")]
