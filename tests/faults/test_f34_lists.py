"""F34: lists and reasons of shards: rejected.jsonl is there whenever a message names it, one bad photo among a few is no
error, `… | head -1` ends quietly, and a damaged sample is named as the photo that the user gave."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, prepare, run_program, write_config
from pictures import overwrite, photo, tar_of, tree

from pipeline.shards import Shards
from tests.fork_server import Forked

BAD = b"no photo at all"
fault_case = [pytest.mark.fault("F34"), pytest.mark.fast]


def rejected(folder: Path) -> list[str]:
    return [json.loads(line)["source"] for line in (folder / "rejected.jsonl").read_text().splitlines()]


# ---- rejected.jsonl


@pytest.mark.parametrize(
    ("command", "max_bad"),
    [
        ("make", 0.01),
        *(pytest.param(*case, marks=fault_case) for case in (("make", 1), ("index", 0.01), ("index", 1))),
    ],
)
def test_more_bad_photos_than_allowed(command, max_bad, tmp_path):
    """--max-bad 1: every photo is bad, and nothing is left to be indexed."""
    files = {f"{i}.jpg": BAD if i < 3 or max_bad == 1 else photo(i) for i in range(6)}
    src, dst = tree(tmp_path / "src", files), tmp_path / "dst"
    if command == "index":
        tar_of(files, dst / "0.tar")
    _, error = (
        prepare("make", src, dst, "--max-bad", max_bad)
        if command == "make"
        else prepare("index", dst, "--max-bad", max_bad)
    )
    assert f"{dst}/rejected.jsonl " in error
    prefix = "0.tar/" if command == "index" else ""
    assert sorted(rejected(dst)) == [f"{prefix}{name}" for name, data in files.items() if data == BAD]
    assert not (dst / "manifest.json").exists()


@pytest.mark.fault("F34")
@pytest.mark.fast
def test_a_broken_tar_after_bad_photos(tmp_path):
    """What was found before the exit is listed."""
    broken = bytearray(tar_of({"2.jpg": photo(2), "3.jpg": photo(3)}))
    broken[broken.index(b"3.jpg")] ^= 1
    tree(tmp_path, {"0.tar": tar_of({"0.jpg": photo(0), "1.jpg": BAD}), "1.tar": bytes(broken)})
    _, error = prepare("index", tmp_path)
    assert "1.tar: byte " in error
    assert rejected(tmp_path) == ["1.tar", "0.tar/1.jpg"] or rejected(tmp_path) == ["0.tar/1.jpg", "1.tar"]


@pytest.mark.fault("F34")
def test_stopped_by_ctrl_c(tmp_path):
    good = photo(0, 300, 400)
    src = tree(tmp_path / "src", {f"{i}.jpg": BAD if i % 2 else good for i in range(1500)})  # seconds of work
    words = "make", src, tmp_path / "dst", "--shard-mb", "0.05", "--max-bad", "1", "--processes", "1"
    process = Forked(["-m", "tools.make_shards", *map(str, words)])
    until = time.monotonic() + 60
    while len(list((tmp_path / "dst").glob("*.tar"))) < 3 and time.monotonic() < until:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (130, "stopped by Ctrl-C\n")
    assert not (tmp_path / "dst" / "manifest.json").exists()
    assert len(rejected(tmp_path / "dst")) > 2


# ---- one bad photo among a few


@pytest.mark.fault("F34")
@pytest.mark.fast
@pytest.mark.parametrize(
    ("photos", "bad", "max_bad"), [(2, 1, 0.01), (99, 1, 0.01), (99, 2, 0.01), (120, 2, 0.01), (9, 1, 0)]
)
def test_one_bad_photo_is_allowed(photos, bad, max_bad, tmp_path):
    """The share is rounded up; 0 allows none."""
    good = photo(0)
    files = {f"{i}.jpg": BAD if i < bad else good for i in range(photos)}
    tar_of(files, tmp_path / "tars" / "0.tar")
    allowed = (photos, bad, max_bad) in ((2, 1, 0.01), (99, 1, 0.01), (120, 2, 0.01))
    for words in (("make", tmp_path / "tars" / "0.tar", tmp_path / "dst"), ("index", tmp_path / "tars")):
        output, error = prepare(*words, "--max-bad", max_bad)
        assert (f"{photos - bad} samples" in output.replace("1 sample ", "1 samples ")) == allowed
        assert ("are bad, more than --max-bad" in error) != allowed
        assert len(rejected(Path(words[-1]))) == bad


# ---- … | head -1


def through_a_closed_pipe(*words: object, both: bool = False) -> subprocess.CompletedProcess:
    """Run a program whose output nothing reads any more."""
    read, write = os.pipe()
    os.close(read)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    stderr = write if both else subprocess.PIPE
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, stdout=write, stderr=stderr, text=True, check=False, env=env
    )
    os.close(write)
    return done


@pytest.mark.parametrize(
    ("words", "code"),
    [
        pytest.param(*case, marks=fault_case)
        for case in (
            ("-m tools.make_shards make {photos} {dst} --processes 1", 141),  # stopped at its first line
            ("-m tools.make_shards verify {shards} --processes 1", 0),  # all its work was done
            ("-m tools.make_shards --help", 0),
            ("-m eval knn --help", 0),
            ("train.py --help", 0),
        )
    ]
    + [("-m tools.make_shards verify {nowhere}", 2)],
)
def test_nothing_reads_the_output(words, code, tiny_shards, photos, tmp_path):
    places = {"photos": photos, "dst": tmp_path / "dst", "shards": tiny_shards, "nowhere": tmp_path / "nowhere"}
    done = through_a_closed_pipe(*words.format(**places).split())
    assert done.returncode == code
    assert done.stderr.startswith("error: ") if code == 2 else done.stderr == ""
    if code == 141:
        run_program(*words.format(**places).split())  # the same command resumes


@pytest.mark.fault("F34")
def test_nothing_reads_output_and_errors(tmp_path):
    """`… 2>&1 | head -1`."""
    assert through_a_closed_pipe("-m", "eval", "knn", tmp_path / "nowhere", both=True).returncode == 141


def test_another_broken_pipe_is_no_quiet_end():
    """A connection that is closed is an error as before."""
    program = "import socket; from runtime.errors import run_cli; a, b = socket.socketpair(); b.close()\n"
    done = run_program("-c", program + "run_cli(lambda: a.send(b'x'))", expect=1)
    assert "BrokenPipeError" in done.stderr


# ---- what a sample was made from


def damage(folder: Path, sample: int) -> None:
    overwrite(folder, sample, b"damaged")


@pytest.mark.parametrize(
    "form", [pytest.param(f, marks=fault_case) for f in ("folder", "tar", "tar of tars", "folder of tars")]
)
def test_verify_names_the_photo(form, tmp_path):
    """For each form of source; rejected photos do not shift the lines."""
    files = {
        f"{c}/{i}.jpg": BAD if i == 3 else photo(10 * k + i) for k, c in enumerate(("ash", "elm")) for i in range(6)
    }
    tars = {f"{c}.tar": tar_of({n[4:]: d for n, d in files.items() if n.startswith(c)}) for c in ("ash", "elm")}
    src, dst = tmp_path / "src", tmp_path / "dst"
    if form.startswith("folder"):
        tree(src, tars if "tars" in form else files)
    else:
        tar_of(tars if "tars" in form else files, src)
    prepare("make", src, dst, "--max-bad", 0.5, "--shard-mb", 0.006)
    shards = Shards(dst)
    assert len(shards.shards) > 1
    name_of = {data: name for name, data in files.items()}
    places = [f"{src}/{name_of[shards.read(i)]}" for i in range(len(shards))]
    if "tars" in form:
        places = [place.replace("/ash/", "/ash.tar/").replace("/elm/", "/elm.tar/") for place in places]
    assert [shards.source(i) for i in range(len(shards))] == places
    for sample in (0, 9):
        damage(dst, sample)
    output, _ = prepare("verify", dst)
    for sample in (0, 9):
        assert f"sample {sample} (000000" in output
        assert f", made from {places[sample]}) is damaged" in output
    assert shards.describe(9)["source"] == places[9]


@pytest.mark.fault("F34")
@pytest.mark.fast
def test_what_verify_advises_works(tmp_path):
    """For a damaged shard of `make` in a folder whose name has a blank: the command deletes what `make` wrote, no more."""
    src, dst = tree(tmp_path / "src", {f"{i}.jpg": photo(i) for i in range(6)}), tmp_path / "my shards"
    prepare("make", src, dst, "--shard-mb", 0.005)
    (dst / "notes.txt").write_text("mine")
    damage(dst, 1)
    assert "already complete" in prepare("make", src, dst, "--shard-mb", 0.005)[0]
    output, _ = prepare("verify", dst)
    subprocess.run(output.split("make all shards again: `")[1].split("`")[0], shell=True, check=True)
    prepare("make", src, dst, "--shard-mb", 0.005)
    assert "all agree" in prepare("verify", dst)[0]
    assert (dst / "notes.txt").read_text() == "mine"


@pytest.mark.fault("F34")
@pytest.mark.fast
def test_commands_quote_a_blank(tmp_path):
    folder = tree(tmp_path / "my shards", {"0.tar": tar_of({"0.jpg": photo(0)})})
    quoted = f"`make index DST='{folder}'`"
    assert quoted in prepare("verify", folder)[1]
    assert quoted in prepare("make", tree(tmp_path / "src", {"0.jpg": photo(0)}), folder)[1]
    prepare("index", folder)
    (folder / "index.npy").unlink()
    assert quoted in prepare("verify", folder)[1]


@pytest.mark.fault("F34")
@pytest.mark.fast
def test_a_new_index_keeps_the_sources(tmp_path):
    """Of shards that `make` made, also if a photo is damaged meanwhile, and beside a tar of another program."""
    src, dst = tree(tmp_path / "src", {f"{i}.jpg": photo(i) for i in range(6)}), tmp_path / "dst"
    prepare("make", src, dst, "--shard-mb", 0.005)
    places = {Shards(dst).read(i): Shards(dst).source(i) for i in range(6)}
    damage(dst, 1)
    tar_of({"x.jpg": photo(9)}, dst / "other.tar")
    for name in ("index.npy", "manifest.json"):
        (dst / name).unlink()
    prepare("index", dst)
    shards = Shards(dst)
    assert len(shards) == 6
    assert {shards.read(i): shards.source(i) for i in range(6)}.items() >= {
        photo(9): "other.tar/x.jpg", **{shards.read(i): places[shards.read(i)] for i in range(1, 6)}
    }.items()  # fmt: skip
    assert "all agree" in prepare("verify", dst)[0]


@pytest.mark.fault("F34")
@pytest.mark.fast
def test_tars_of_other_programs_and_older_folders(tmp_path):
    """Without sources.txt a sample is named by its member, and nothing else changes. Another program's file of that name is
    left as it is; a damaged one is named."""
    tree(tmp_path, {"0.tar": tar_of({"a/0.jpg": photo(0), "a/1.jpg": photo(1)}), "sources.txt": b"mine\n"})
    prepare("index", tmp_path)
    assert Shards(tmp_path).source(1) == "0.tar/a/1.jpg"
    assert (tmp_path / "sources.txt").read_text() == "mine\n"
    damage(tmp_path, 1)
    assert "sample 1 (a/1.jpg) is damaged" in prepare("verify", tmp_path)[0]

    dst = tmp_path / "dst"
    prepare("make", tree(tmp_path / "src", {"0.jpg": photo(0)}), dst)
    listed = (dst / "sources.txt").read_text()
    assert listed == f"source\t{tmp_path}/src\n00000000\t0.jpg\n"
    (dst / "sources.txt").write_text(listed.replace("0.jpg", "1.jpg"))
    assert "sources.txt: differs from the manifest's sha256" in prepare("verify", dst)[0]
    (dst / "sources.txt").unlink()
    assert "sources.txt: No such file or directory: no photo is lost" in prepare("verify", dst)[0]
    assert Shards(dst).source(0) == "shard-000000.tar/00000000.jpg"
    manifest = json.loads((dst / "manifest.json").read_text())
    del manifest["sources"], manifest["shards"][0]["sources"]
    (dst / "manifest.json").write_text(json.dumps(manifest))
    assert "all agree" in prepare("verify", dst)[0]
    assert Shards(dst).source(0) == "shard-000000.tar/00000000.jpg"


def test_a_work_folder_of_an_older_version(tmp_path):
    """Its records have no sources: those shards are made again."""
    src, dst = tree(tmp_path / "src", {f"{i}.jpg": BAD if i > 2 else photo(i) for i in range(6)}), tmp_path / "dst"
    prepare("make", src, dst)
    for path in (dst / ".make_shards").glob("*.json"):
        record = json.loads(path.read_text())
        del record["sources"]
        path.write_text(json.dumps(record))
    prepare("make", src, dst, "--max-bad", 0.5)
    shards = Shards(dst)
    assert [Path(shards.source(i)).read_bytes() for i in range(3)] == [shards.read(i) for i in range(3)]


@pytest.mark.fault("F34")
def test_training_names_the_photo(tiny_shards, photos, tmp_path):
    """In damaged.jsonl of the run folder."""
    shards = shutil.copytree(tiny_shards, tmp_path / "shards")
    damaged = range(0, 96, 7)
    for sample in damaged:
        damage(shards, sample)
    config = write_config(tmp_path / "c.yaml", shards, tmp_path / "run")
    run_program("train.py", config, "data.max_corrupt=1", "optim.epochs=1", "optim.warmup_epochs=0")
    rows = [json.loads(line) for line in (tmp_path / "run" / "damaged.jsonl").read_text().splitlines()]
    assert rows
    for row in rows:
        assert row["planned"] in damaged
        assert Path(row["source"]).read_bytes() == Shards(tiny_shards).read(row["planned"])
        assert Path(row["source"]).is_relative_to(photos)
