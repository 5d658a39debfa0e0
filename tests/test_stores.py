"""Stores that fsspec reads in ranges (gs://, az://, hf://), and `make shards` into an address.

The stores are in memory and misbehave on request (tests/faulty_store.py); S3 is moto's (tests/bucket.py).
"""

import json
import re
import signal
import subprocess
import sys
import time
from itertools import repeat
from pathlib import Path

import fsspec
import pytest

from pipeline.remote import client, download
from pipeline.shards import Shards
from runtime.config import Speed
from runtime.errors import UserError
from tests import faulty_store as faulty
from tests.conftest import ROOT, run_program
from tests.fake_hub import fake_hub
from tests.faulty_store import AsyncStore, FaultyStore
from tools import make_shards

RANGE = 20_000


@pytest.fixture(autouse=True)
def short_waits(monkeypatch, tmp_path):
    monkeypatch.setattr(download, "MIN_BACKOFF", 0.002)
    monkeypatch.setattr(client, "RANGE_BYTES", RANGE)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture(autouse=True)
def stores(tiny_shards):
    fsspec.register_implementation("gs", FaultyStore, clobber=True)
    fsspec.register_implementation("az", AsyncStore, clobber=True)
    FaultyStore.reset(tiny_shards)


def open_store(tmp_path: Path, address: str = "gs://bucket/tiny", timeout: float = 5.0) -> Shards:
    return Shards(address, Speed(cache=str(tmp_path / "cache"), read_timeout=timeout))


def check_bytes(remote: Shards, folder: Path) -> None:
    local = Shards(folder)
    assert all(local.read(i) == remote.read(i) for i in range(len(local)))


def first_shard(folder: Path) -> dict:
    return Shards(folder).shards[0]


# ------------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("scheme", ["gs", "az"])
def test_a_broken_range_is_read_again_from_its_first_byte(tmp_path, tiny_shards, scheme):
    name, size = first_shard(tiny_shards)["name"], first_shard(tiny_shards)["bytes"]
    FaultyStore.behave(name, bytes, faulty.status(503), faulty.status(429), faulty.none)
    check_bytes(open_store(tmp_path, f"{scheme}://bucket/tiny"), tiny_shards)
    assert FaultyStore.starts(name) == [0, RANGE, RANGE, RANGE, *range(RANGE, size, RANGE)]


def test_ranges_that_are_not_what_was_asked_for(tmp_path, tiny_shards):
    name, size = first_shard(tiny_shards)["name"], first_shard(tiny_shards)["bytes"]
    whole = list(range(0, size, RANGE))
    for behavior, starts in {
        faulty.short: [0, RANGE // 2, *range(RANGE // 2 + RANGE, size, RANGE)],  # the next one begins where it ended
        faulty.longer: [0, *whole],
        faulty.damaged: [*whole, *whole],  # the sha256 shows it
    }.items():
        FaultyStore.requests.clear()
        FaultyStore.behave(name, behavior)
        cache = tmp_path / behavior.__name__
        assert open_store(cache).read(0) == Shards(tiny_shards).read(0)
        assert FaultyStore.starts(name) == starts, behavior


def test_a_store_that_does_not_answer_or_refuses(tmp_path, tiny_shards):
    name = first_shard(tiny_shards)["name"]
    for behavior, message in {
        faulty.status(503): rf"gs://bucket/tiny/{name}: download failed after 8 tries and .*: 503 \(8 x\); 0 of ",
        faulty.status(
            403
        ): rf"tiny/{name}: access denied \(403\); check the credentials: GOOGLE_APPLICATION_CREDENTIALS",
        faulty.status(404): rf"tiny/{name}: is missing \(404\); upload it",
        faulty.damaged: rf"tiny/{name}: downloaded 3 times, and its sha256 is not the manifest's",
    }.items():
        FaultyStore.behavior[name] = repeat(behavior)
        with pytest.raises(UserError, match=message):
            open_store(tmp_path / str(id(behavior))).read(0)
    FaultyStore.behave(name, faulty.stall)
    assert open_store(tmp_path, timeout=0.2).read(0) == Shards(tiny_shards).read(0)
    assert FaultyStore.starts(name)[-len(range(0, first_shard(tiny_shards)["bytes"], RANGE)) :][0] == 0
    with pytest.raises(UserError, match=r"gs://bucket/nowhere: no shards here \(no manifest.json: "):
        open_store(tmp_path, "gs://bucket/nowhere")


def test_a_data_set_on_hugging_face(monkeypatch, tmp_path, tiny_shards):
    """huggingface_hub's own file system, against a server on loopback."""
    shard = first_shard(tiny_shards)
    with fake_hub(tiny_shards) as hub:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": hub.endpoint})
        hub.failures[shard["name"]] = [500]
        check_bytes(open_store(tmp_path, "hf://datasets/name/set/mine"), tiny_shards)
        starts = {start for name, start in hub.starts if name == shard["name"]}
        assert sorted(starts) == list(range(0, shard["bytes"], RANGE))
        hub.failures[shard["name"]] = [403]
        with pytest.raises(UserError, match=r"access denied \(403 .*\); check the credentials: HF_TOKEN, or `hf"):
            open_store(tmp_path / "2", "hf://datasets/name/set/mine").read(0)
        with pytest.raises(UserError, match=r"hf://datasets/name/set/nowhere: no shards here \(no manifest.json: "):
            open_store(tmp_path, "hf://datasets/name/set/nowhere")


MISSING = """
import sys
from pipeline.shards import Shards
from runtime.errors import UserError
for package, address in (("gcsfs", "gs://b/p"), ("adlfs", "az://b/p"), ("huggingface_hub", "hf://datasets/a/b")):
    sys.modules[package] = None
    try:
        Shards(address)
    except UserError as error:
        print(error)
"""


def test_a_missing_package_is_named():
    lines = run_program("-c", MISSING).stdout.splitlines()
    for line, address, extra in zip(
        lines, ("gs://b/p", "az://b/p", "hf://datasets/a/b"), ("gs", "az", "hf"), strict=True
    ):
        assert re.match(rf"{address}: a package for remote shards is missing .*: pip install -e '.\[{extra}\]'$", line)


# ------------------------------------------------------------------------------------------------------------ writing


def make(monkeypatch, photos: Path, dst: object, *words: str) -> None:
    """`make_shards make` in this process, which has the stores."""
    argv = ["make_shards", "make", str(photos), str(dst), "--shard-mb", "0.05", "--processes", "1", *words]
    monkeypatch.setattr(sys, "argv", argv)
    make_shards.main()


def files_at(address: str) -> dict[str, bytes]:
    prefix = f"/{address}/"
    return {n.removeprefix(prefix): f.getvalue() for n, f in FaultyStore.store.items() if n.startswith(prefix)}


def test_an_address_gets_what_a_folder_gets(monkeypatch, photos, tiny_shards, tmp_path, capsys):
    make(monkeypatch, photos, "gs://bucket/mine")
    shards = [s["name"] for s in Shards(tiny_shards).shards]
    assert files_at("bucket/mine") == {p.name: p.read_bytes() for p in tiny_shards.iterdir()}
    written = [name for name in FaultyStore.written if ".make_shards" not in name]
    assert written == [*(f"mine/{name}" for name in shards), "mine/sources.txt", "mine/index.npy", "mine/manifest.json"]
    assert not list((tmp_path / "xdg").rglob("*.tar"))
    check_bytes(open_store(tmp_path, "gs://bucket/mine"), tiny_shards)
    capsys.readouterr()
    make(monkeypatch, photos, "gs://bucket/mine")
    assert "gs://bucket/mine: already complete: 96 samples" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"gs://bucket/mine holds shards made with other settings: seed"):
        make(monkeypatch, photos, "gs://bucket/mine", "--seed", "1")
    FaultyStore().pipe_file("bucket/tars/a.tar", b"tar")
    with pytest.raises(UserError, match=r"DST gs://bucket/tars: holds tars of another program"):
        make(monkeypatch, photos, "gs://bucket/tars")
    FaultyStore().rm_file(f"bucket/mine/{shards[1]}")
    with pytest.raises(UserError, match=rf"1 shards are missing or of another size, {shards[1]} first"):
        make(monkeypatch, photos, "gs://bucket/mine")


def test_an_upload_that_fails_is_resumed_from_any_machine(monkeypatch, photos, tiny_shards, tmp_path, capsys):
    original, left = FaultyStore.put_file, [7]

    def failing(self, lpath, rpath, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise faulty.ServerError(503)
        original(self, lpath, rpath, **kwargs)

    monkeypatch.setattr(FaultyStore, "put_file", failing)
    with pytest.raises(UserError, match=r"DST gs://bucket/mine: 503; check .* the same command resumes"):
        make(monkeypatch, photos, "gs://bucket/mine")
    assert "manifest.json" not in files_at("bucket/mine")
    with pytest.raises(UserError, match=r"gs://bucket/mine: no shards here"):
        open_store(tmp_path, "gs://bucket/mine")
    monkeypatch.setattr(FaultyStore, "put_file", original)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    FaultyStore.written.clear()
    make(monkeypatch, photos, "gs://bucket/mine")
    assert "resuming: 3 of " in capsys.readouterr().out
    assert not {"mine/shard-000000.tar", "mine/shard-000002.tar"} & {*FaultyStore.written}
    assert files_at("bucket/mine") == {p.name: p.read_bytes() for p in tiny_shards.iterdir()}


def test_addresses_that_cannot_be_written(monkeypatch, photos):
    with pytest.raises(
        UserError, match=r"DST https://host/x: cannot be written; give a folder, or one of s3://, gs://"
    ):
        make(monkeypatch, photos, "https://host/x")
    with pytest.raises(UserError, match=r"DST s3://bucket: give a folder in it, for example s3://bucket/mine"):
        make(monkeypatch, photos, "s3://bucket")
    with pytest.raises(UserError, match=r"not an address of shards"):
        make(monkeypatch, photos, "ftp://bucket/x")
    with pytest.raises(UserError, match=r"DST gs:/bucket/x: did you mean gs://bucket/x\?"):
        make(monkeypatch, photos, "gs:/bucket/x")
    monkeypatch.setattr(sys, "argv", ["make_shards", "verify", "s3://bucket/mine"])
    with pytest.raises(UserError, match=r"DST s3://bucket/mine: an address; verify and index read a folder"):
        make_shards.main()


@pytest.mark.slow
def test_a_killed_upload_to_s3_is_resumed(bucket, photos, tiny_shards, tmp_path):
    """With two processes; nothing half is there, and this machine holds no more than a shard for each process."""
    command = [sys.executable, "-m", "tools.make_shards", "make", str(photos), "s3://photos/mine", "--shard-mb", "0.05"]
    s3 = bucket.client("s3")

    def names() -> list[str]:
        return [o["Key"][5:] for o in s3.list_objects_v2(Bucket="photos", Prefix="mine/").get("Contents", [])]

    def objects() -> dict[str, bytes]:
        return {name: s3.get_object(Bucket="photos", Key=f"mine/{name}")["Body"].read() for name in names()}

    expected = {p.name: p.read_bytes() for p in tiny_shards.iterdir()}
    most = 0
    with subprocess.Popen([*command, "--processes", "2"], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None and sum(name.endswith(".tar") for name in names()) < 3:
            most = max(most, len([*(tmp_path / "xdg").rglob("*.draft"), *(tmp_path / "xdg").rglob("*.tar")]))
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    there = objects()
    assert most <= 3  # two shards and a record
    assert "manifest.json" not in there
    assert all(expected[name] == data for name, data in there.items() if name.endswith(".tar"))
    done = run_program(*command[1:], "--processes", "1")
    assert re.search(r"resuming: \d+ of", done.stdout)
    assert objects() == expected
    assert json.loads(objects()["manifest.json"])["samples"] == 96

    iam = bucket.client("iam")
    iam.create_user(UserName="guest")
    bucket.check_access()
    done = run_program("-m", "tools.make_shards", "make", photos, "s3://photos/other", expect=2)
    assert "DST s3://photos/other: 403 " in done.stderr
    assert "check the credentials: AWS_PROFILE" in done.stderr
