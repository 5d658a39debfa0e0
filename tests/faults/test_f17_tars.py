"""F17: hostile tars, through `make SRC=tar` and through `index`. Members are read at their offset, by the headers alone:
only the shards are written, no link leads out of the tar, nothing is unpickled or executed, and no header makes memory grow.

webdataset executes a `.pyd` member when samples are decoded as its manual says; no trainer tests any of this.
"""

import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run_measured, run_program
from pictures import photo

from pipeline.shards import Shards

GOOD = [photo(1), photo(2)]
EVIL = b"cposix\nsystem\n(S'touch canary'\ntR."  # a pickle that runs a command when it is loaded
PROGRAM = "from tools.make_shards import main; code = main()"


class Tar:
    """A tar that is being written: two good photos, and between them what the case adds."""

    def __init__(self, path: Path, outside: Path):
        path.parent.mkdir(parents=True)
        self.path, self.outside = path, outside
        self.tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def add(self, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "", **pax: str) -> None:
        member = tarfile.TarInfo(name)
        member.type, member.linkname, member.pax_headers, member.size = kind, link, pax, len(data)
        self.tar.addfile(member, io.BytesIO(data))

    def add_raw(self, header: tarfile.TarInfo, change: Callable[[bytearray], None], data: bytes = b"") -> None:
        """A member whose header is changed after tarfile made it; its checksum is right."""
        raw = bytearray(header.tobuf(tarfile.GNU_FORMAT))[-512:]
        change(raw)
        raw[148:156] = b" " * 8
        raw[148:156] = b"%06o\0 " % sum(raw)
        file = self.tar.fileobj
        file.write(raw + data + bytes(-len(data) % 512))
        self.tar.offset = file.tell()


def leads_up(tar: Tar) -> None:
    tar.add("../out.jpg", photo(3))
    tar.add("a/../../out.jpg", photo(3))


def absolute(tar: Tar) -> None:
    tar.add(f"/{tar.outside}/out.jpg", photo(3))


def symlink(tar: Tar) -> None:
    tar.add("link.jpg", kind=tarfile.SYMTYPE, link="/etc/passwd")
    tar.add("folder", kind=tarfile.SYMTYPE, link=str(tar.outside))
    tar.add("folder/through.jpg", photo(3))  # extracting it would write outside; its bytes are a valid photo


def hardlink(tar: Tar) -> None:
    tar.add("hard.jpg", kind=tarfile.LNKTYPE, link="/etc/passwd")
    tar.add("harder.jpg", kind=tarfile.LNKTYPE, link="0.jpg")


def special(tar: Tar) -> None:
    for kind in (tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE):
        tar.add(f"special{kind.decode()}.jpg", kind=kind)


def twice(tar: Tar) -> None:
    tar.add("0.jpg", photo(3))


def odd_names(tar: Tar) -> None:
    tar.add("new\nline.jpg", b"no photo")
    tar.add("é" * 120 + "\u202egpj.jpg", photo(3))
    member = tarfile.TarInfo("bytes.jpg")
    member.size = len(photo(4))
    tar.add_raw(member, lambda raw: raw.__setitem__(slice(0, 5), b"\xff\xfe\x80/\x1b"), photo(4))


def huge_header(tar: Tar) -> None:
    tar.add("huge.jpg", photo(3), comment="x" * (64 << 20))


def sparse(tar: Tar) -> None:
    pax = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(10**12)}
    tar.add("new.jpg", photo(3), **pax)
    old = tarfile.TarInfo("old.jpg")

    def of_a_terabyte(raw: bytearray) -> None:
        raw[156:157] = tarfile.GNUTYPE_SPARSE
        raw[483:495] = b"\x80" + (10**12).to_bytes(11, "big")

    tar.add_raw(old, of_a_terabyte)


def code(tar: Tar) -> None:
    for ending in ("pyd", "pkl", "pth"):
        tar.add(f"0.{ending}", EVIL)
    tar.add("evil.jpg", EVIL)  # the name is wrong


# (what is added, what `make` reports as skipped, what `index` does, number of added photos that are kept, rejected)
CASES = {
    "../": (leads_up, "2 (unsafe names 2)", "2 (unsafe names 2)", 0, 0),
    "absolute": (absolute, "0", "0", 1, 0),  # the name only labels the sample
    "symlink": (symlink, "2 (links 2)", "2 (links 2)", 1, 0),
    "hardlink": (hardlink, "1 (links 1)", "1 (links 1)", 1, 0),  # a second name of 0.jpg is kept
    "fifo, devices": (special, "3 (special files 3)", "3 (special files 3)", 0, 0),
    "duplicate names": (twice, "1 (duplicate names 1)", "1 (duplicates in a sample 1)", 0, 0),
    "odd names": (odd_names, "0", "0", 2, 1),
    "huge PAX header": (huge_header, "1 (huge headers 1)", "1 (huge headers 1)", 0, 0),
    "sparse, 1 TB": (sparse, "2 (sparse members 2)", "2 (sparse members 2)", 0, 0),
    "code": (
        code,
        "3 (.pkl files 1, .pth files 1, .pyd files 1)",
        "3 (.pkl files 1, .pth files 1, .pyd files 1)",
        0,
        1,
    ),
}


def run(folder: Path, *words: object) -> tuple[str, int]:
    """(the program's output, its peak memory in MB), run in `folder`, where anything it writes would be found."""
    done, peak = run_measured(PROGRAM, *words, "--max-bad", "0.5", "--processes", "1", cwd=folder, timeout=60)
    assert done.stderr == ""
    return done.stdout, peak


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory) -> int:
    """Peak memory, in MB, for a tar that holds only photos."""
    folder = tmp_path_factory.mktemp("ordinary")
    tar = Tar(folder / "tars" / "t.tar", folder)
    for i, data in enumerate(GOOD):
        tar.add(f"{i}.jpg", data)
    tar.tar.close()
    return max(run(folder, "make", tar.path, folder / "dst")[1], run(folder, "index", folder / "tars")[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to measure the peak")
@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.fault("F17"), pytest.mark.fast]) for k in CASES])
def test_a_hostile_tar(kind, ordinary, tmp_path):
    add, skipped_by_make, skipped_by_index, kept, rejected = CASES[kind]
    home = tmp_path / "a" / "b" / "home"  # paths that lead outside lead into tmp_path
    (tmp_path / "outside").mkdir()
    tar = Tar(home / "tars" / "hostile.tar", tmp_path / "outside")
    tar.add("0.jpg", GOOD[0])
    add(tar)
    tar.add("1.jpg", GOOD[1])
    tar.tar.close()
    before = files(tmp_path)

    made, peak = run(home, "make", tar.path, home / "made")
    indexed, peak_of_index = run(home, "index", home / "tars")

    new = {
        "made",
        "made/manifest.json",
        "made/index.npy",
        "made/shard-000000.tar",
        "made/sources.txt",
        "tars/manifest.json",
        "tars/index.npy",
    }
    new |= {"made/rejected.jsonl", "tars/rejected.jsonl"} if rejected else set()
    new |= {"made/skipped.jsonl"} if skipped_by_make != "0" else set()
    new |= {"tars/skipped.jsonl"} if skipped_by_index != "0" and add is not code else set()  # beside a photo: no loss
    assert files(tmp_path) - before == {f"a/b/home/{name}" for name in new}
    assert max(peak, peak_of_index) < ordinary + 50

    for output, folder, skipped in ((made, "made", skipped_by_make), (indexed, "tars", skipped_by_index)):
        assert f"{2 + kept} samples in 1 shard " in output
        assert re.search(rf"rejected {rejected}\b", output)
        assert re.search(rf"skipped {re.escape(skipped)}(; skipped.jsonl lists .*them)?$", output, re.MULTILINE)
        shards = Shards(home / folder)
        photos = [shards.read(i) for i in range(len(shards))]
        assert all(shards.is_valid(i, p) for i, p in enumerate(photos))
        assert {*photos} >= {*GOOD}
        assert {*photos} <= {*GOOD, photo(3), photo(4)}
        if rejected:
            (line,) = (home / folder / "rejected.jsonl").read_text().splitlines()
            row = json.loads(line)
            assert (
                row["source"].removeprefix("hostile.tar/") == {"odd names": "new\\nline.jpg", "code": "evil.jpg"}[kind]
            )
            assert "it begins with b'" in row["reason"]


@pytest.mark.parametrize(
    "size", [b"77777777777\0", b"\x80" + bytes(5) + b"\x01" + bytes(5), b"-0000000512\0", b"\xff" * 12]
)
def test_a_false_size(size, tmp_path):
    """More than the tar holds, or negative: the tar is refused, and the message has the byte."""
    tar = Tar(tmp_path / "tars" / "hostile.tar", tmp_path)
    tar.add("0.jpg", GOOD[0])
    at = tar.tar.offset
    tar.add_raw(tarfile.TarInfo("1.jpg"), lambda raw: raw.__setitem__(slice(124, 136), size))
    tar.tar.close()
    for words in (("make", tar.path, tmp_path / "dst"), ("index", tar.path.parent)):
        done = run_program("-m", "tools.make_shards", *words, "--processes", "1", expect=2)
        assert done.stderr.startswith("error: ")
        assert "hostile.tar: " in done.stderr
        assert f"byte {at}" in done.stderr
