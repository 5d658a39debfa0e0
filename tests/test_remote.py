"""Remote shards: downloaded once for a machine, complete or not at all, within the cache's bound, equal to a folder's.

Long: all cases share the servers and the caches made here.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_program

from eval.datasets import LabeledPhotos
from eval.features import batches
from eval.target import open_shards, same_folder
from pipeline.plan import Plan
from pipeline.readers import webdataset
from pipeline.remote import Remote, download
from pipeline.shards import Shards
from runtime.config import Config, Speed, load_config
from runtime.errors import UserError
from tests import faulty_server as faulty
from tests.faulty_server import FaultyServer


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server(tiny_shards):
    with FaultyServer(tiny_shards.parent) as server:
        server.address += f"/{tiny_shards.name}"
        yield server


def speed(tmp_path: Path, **words) -> Speed:
    return Speed(**{"cache": str(tmp_path / "cache"), "read_timeout": 5.0, "workers": 0} | words)


def tars(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("*/*.tar"))


def wait_for(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition was not met in time"
        time.sleep(0.01)


def test_samples_and_bytes_are_those_of_the_folder(server, tiny_shards, tmp_path):
    local, remote = Shards(tiny_shards), Shards(server.address + "/", speed(tmp_path))
    assert remote.folder == server.address
    assert np.array_equal(local.index, remote.index)
    assert not tars(tmp_path)
    assert all(local.read(i) == remote.read(i) for i in range(len(local)))
    for path in tars(tmp_path):
        assert path.read_bytes() == (tiny_shards / path.name).read_bytes()
    names = ["manifest.json", "index.npy", *(s["name"] for s in local.shards)]
    assert [name for name, _ in server.requests] == names


def test_batches_are_those_of_the_folder_in_workers_too(server, tiny_config, tmp_path):
    config = load_config(tiny_config)
    local = Shards(config.data.shards)
    config.speed = speed(tmp_path, workers=2)
    remote = Shards(server.address, config.speed)
    plans = [Plan(s, batch=16, seed=1) for s in (local, remote)]
    for a, b in zip(
        webdataset.read(config, local, plans[0], start=2, stop=6),
        webdataset.read(config, remote, plans[1], start=2, stop=6),
        strict=True,
    ):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.rows, b.rows)
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
    requested = [name for name, _ in server.requests]
    assert len(requested) == len(set(requested)) == 2 + len(local.shards)


def program(address: str, speed: Speed, code: str) -> str:
    """A program that runs `code` with `shards`, those at an address."""
    return (
        "from runtime.config import Speed\n"
        "from pipeline.shards import Shards\n"
        f"shards = Shards({address!r}, {speed!r})\n{code}"
    )


def test_a_machine_downloads_a_shard_once(server, tiny_shards, tmp_path):
    """Three processes need all shards at the same moment, from a slow server."""
    local = Shards(tiny_shards)
    for s in local.shards:
        server.always(s["name"], faulty.slow(s["bytes"] // 8, 0.01))
    code = "input()\nprint(sum(shards.is_valid(i, shards.read(i)) for i in range(len(shards))))"
    command = [sys.executable, "-c", program(server.address, speed(tmp_path), code)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    readers = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(3)]
    wait_for(lambda: len(server.starts("manifest.json")) == 3)
    for reader in readers:
        reader.stdin.write("go\n")
        reader.stdin.flush()
    outputs = [reader.communicate(timeout=60) for reader in readers]
    assert outputs == [(f"{len(local)}\n", "")] * 3
    assert sorted(name for name, _ in server.requests if name.endswith(".tar")) == [s["name"] for s in local.shards]
    assert len(server.starts("index.npy")) == 1


def test_waiting_readers_get_the_failure_that_they_waited_for(server, tiny_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MIN_BACKOFF", 0.005)
    name = Shards(tiny_shards).shards[0]["name"]
    server.always(name, faulty.status(503))
    shards = Shards(server.address, speed(tmp_path))
    errors: list[str] = []

    def read(own: Shards) -> None:
        try:
            own.read(0)
        except UserError as error:
            errors.append(str(error))

    # opened one after the other: Python 3.11's parser, with which numpy reads a header, is not thread-safe
    readers = [threading.Thread(target=read, args=[Shards(shards._remote)]) for _ in range(3)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert len(errors) == 3
    assert len(set(errors)) == 1
    assert len(server.starts(name)) == download.MAX_TRIES  # not three times as many
    server.behave(name)
    assert Shards(shards._remote).read(0) == Shards(tiny_shards).read(0)  # a later reader tries again


def test_the_cache_keeps_its_bound_and_evicts_the_least_recently_used(server, tiny_shards, tmp_path):
    local = Shards(tiny_shards)
    largest = max(s["bytes"] for s in local.shards)
    metadata = sum((tiny_shards / name).stat().st_size for name in download.METADATA)
    bound = metadata + 3 * largest
    remote = Shards(server.address, speed(tmp_path, cache_gb=bound / 1e9))
    first = [int(i) for i in local.starts[:-1]]
    assert len(first) > 4
    for i in (0, 1, 2, 0, 3):  # 0 is used again, so 1 is the oldest when 3 is downloaded
        assert remote.read(first[i]) == local.read(first[i])
        remote._files.clear()
        time.sleep(0.01)
    assert [p.name for p in tars(tmp_path)] == [local.shards[i]["name"] for i in (0, 2, 3)]
    for i in np.random.default_rng(0).integers(0, len(local), 25).tolist():
        assert remote.read(i) == local.read(i)
        on_disk = sum(p.stat().st_size for p in (tmp_path / "cache").glob("*/*") if not p.is_dir())
        still_open = sum(os.fstat(f.fileno()).st_nlink == 0 for f in remote._files.values())
        assert on_disk <= bound
        assert still_open <= 1  # what was evicted in this call


def test_the_cache_deletes_only_its_own_files(server, tiny_shards, tmp_path):
    local = Shards(tiny_shards)
    largest = max(s["bytes"] for s in local.shards)
    own = tmp_path / "cache" / "photos" / "mine.jpg"
    own.parent.mkdir(parents=True)
    own.write_bytes(bytes(100_000))
    (own.parent / "mine.jpg.lock").touch()
    os.utime(own, (0, 0))
    remote = Shards(server.address, speed(tmp_path, cache_gb=1.5 * largest / 1e9))
    assert all(remote.read(i) == local.read(i) for i in range(len(local)))
    assert len(tars(tmp_path)) == 1
    assert own.stat().st_size == 100_000


def test_an_evicted_shard_is_read_to_its_end(server, tiny_shards, tmp_path):
    local, remote = Shards(tiny_shards), Shards(server.address, speed(tmp_path))
    remote.read(0)
    (path,) = tars(tmp_path)
    path.unlink()
    assert remote.read(1) == local.read(1)
    assert len(server.starts(path.name)) == 1
    remote.read(len(remote) - 1)  # another shard is opened, and the evicted one is closed
    assert remote.read(0) == local.read(0)
    assert len(server.starts(path.name)) == 2


def test_a_bound_that_is_too_small_is_refused(server, tiny_shards, tmp_path):
    with pytest.raises(UserError, match=r"speed.cache_gb: 1e-06 GB cannot hold one shard of http.*\(\S+ GB\)"):
        Shards(server.address, speed(tmp_path, cache_gb=1e-6))
    largest = max(s["bytes"] for s in Shards(tiny_shards).shards)
    remote = Shards(server.address, speed(tmp_path, cache_gb=2 * largest / 1e9))
    with pytest.raises(
        UserError, match=r"cannot hold the shards that are read at the same time, .*set speed.cache_gb=\S+, or"
    ):
        Plan(remote, batch=16, seed=0).prefetch(remote, 0)


def test_the_next_shards_are_downloaded_ahead(server, tiny_shards, tmp_path):
    local, remote = Shards(tiny_shards), Shards(server.address, speed(tmp_path))
    plan = Plan(remote, batch=4, seed=3, streams=2, shuffle_shards=1)
    for step in (0, plan.steps_per_epoch - 1):
        current, upcoming = plan.shards_ahead(step)
        assert {int(i) for i in np.searchsorted(remote.starts, plan.samples_of(step), side="right") - 1} <= set(current)
        assert 0 < len(current) < len(local.shards)
        plan.prefetch(remote, step)
        names = {remote.shards[i]["name"] for i in {*current, *upcoming}}
        wait_for(lambda: names <= {p.name for p in tars(tmp_path)})  # noqa: B023
        if step == 0:  # and no others
            assert {p.name for p in tars(tmp_path)} == names
    requests = len(server.requests)
    for sample in plan.samples_of(plan.steps_per_epoch - 1).tolist():
        assert remote.read(sample) == local.read(sample)
    assert len(server.requests) == requests


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_the_shards_ahead_are_those_that_are_read(tiny_shards, world_size):
    shards = Shards(tiny_shards)
    plan = Plan(shards, batch=24, seed=3, holdout=0.1, streams=8, shuffle_shards=1)
    for step in range(3 * plan.steps_per_epoch):
        for rank in range(world_size):
            read = np.searchsorted(shards.starts, plan.samples_of(step, rank, world_size), side="right") - 1
            current, _ = plan.shards_ahead(step, rank, world_size)
            assert set(read.tolist()) <= set(current)
            if step:
                before = plan.shards_ahead(step - 1, rank, world_size)
                assert set(current) <= {*before[0], *before[1]}  # they were ahead one step before


def test_a_killed_download_leaves_no_shard(server, tiny_shards, tmp_path):
    local = Shards(tiny_shards)
    name, size = local.shards[0]["name"], local.shards[0]["bytes"]
    server.behave(name, faulty.stall(size - 100))
    words = speed(tmp_path, read_timeout=60.0)
    code = program(server.address, words, "shards.read(0)")
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as process:
        wait_for(lambda: server.sent[name] == size - 100)
        wait_for(lambda: list((tmp_path / "cache").glob("*/*.tar.part")))
        process.send_signal(signal.SIGKILL)
    assert not tars(tmp_path)
    left = list((tmp_path / "cache").glob("*/*.part"))
    assert [p.name for p in left] == [name + ".part"]
    remote = Shards(server.address, speed(tmp_path, cache_gb=(left[0].stat().st_size + 20_000) / 1e9))
    assert remote.read(int(local.starts[1])) == local.read(int(local.starts[1]))  # the abandoned file was evicted
    assert not left[0].exists()
    assert remote.read(0) == local.read(0)
    assert tars(tmp_path)[0].read_bytes() == (tiny_shards / tars(tmp_path)[0].name).read_bytes()


def test_a_truncated_shard_in_the_cache_is_downloaded_again(server, tiny_shards, tmp_path):
    local, remote = Shards(tiny_shards), Shards(server.address, speed(tmp_path))
    remote.read(0)
    os.truncate(tars(tmp_path)[0], 1000)
    assert Shards(remote._remote).read(0) == local.read(0)


def test_an_index_that_was_changed_on_the_way_is_refused(tiny_shards, tmp_path):
    """If the manifest has its checksum; older manifests do not."""
    site = tmp_path / "site"
    shutil.copytree(tiny_shards, site)
    content = bytearray((site / "index.npy").read_bytes())
    content[-1] ^= 1
    (site / "index.npy").write_bytes(content)
    assert "index.npy: differs from the manifest's sha256" in run_program(
        "-m", "tools.make_shards", "verify", site, expect=2
    ).stdout  # fmt: skip
    with FaultyServer(site) as server:
        with pytest.raises(UserError, match=r"index.npy: downloaded 3 times, and its sha256 is not the manifest's"):
            Shards(server.address, speed(tmp_path))
        manifest = json.loads((site / "manifest.json").read_text())
        del manifest["index"]  # as in older manifests
        (site / "manifest.json").write_text(json.dumps(manifest))
        assert len(Shards(server.address, speed(tmp_path))) == 96


def test_other_shards_at_the_same_address_are_not_mixed_up(tiny_shards, tmp_path):
    site = tmp_path / "site"
    shutil.copytree(tiny_shards, site)
    with FaultyServer(site) as server:
        before = Shards(server.address, speed(tmp_path))
        before.read(0)
        manifest = json.loads((site / "manifest.json").read_text())
        (site / "manifest.json").write_text(json.dumps(manifest | {"classes": ["a", "b", "c"]}))
        after = Shards(server.address, speed(tmp_path))
        assert after.classes == ["a", "b", "c"]
        assert Shards(before._remote).classes == before.classes  # as worker processes open it
        shutil.rmtree(before._remote.folder)
        with pytest.raises(UserError, match=r"manifest.json has changed since the start of this run"):
            Remote(*before._remote.__reduce__()[1])


@pytest.mark.parametrize("name", ["../canary.tar", "/tmp/canary.tar", ".hidden", "a/b.tar"])
def test_a_manifest_names_no_place_outside(tiny_shards, tmp_path, name):
    site = tmp_path / "site"
    shutil.copytree(tiny_shards, site)
    manifest = json.loads((site / "manifest.json").read_text())
    manifest["shards"][0]["name"] = name
    (site / "manifest.json").write_text(json.dumps(manifest))
    with FaultyServer(site) as server, pytest.raises(UserError, match=r"is not the name of a shard"):
        Shards(server.address, speed(tmp_path)).read(0)
    assert not any("canary" in name for name, _ in server.requests)


def test_wrong_addresses(tmp_path, tiny_shards, monkeypatch):
    monkeypatch.setattr(download, "MIN_BACKOFF", 0.01)
    with pytest.raises(
        UserError, match=r"ftp://host/path: not an address of shards; .* s3://bucket/path or https://host/path"
    ):
        Shards("ftp://host/path", speed(tmp_path))
    for wrong in ("http://", "s3:///path", "http://host:99999/path", "http://[::1"):
        with pytest.raises(
            UserError, match=rf"{re.escape(wrong)}: not an address of shards; .* s3://bucket/path or https"
        ):
            Shards(wrong, speed(tmp_path))
    with pytest.raises(UserError, match=r"http://a..b/path/manifest.json: .*label empty"):
        Shards("http://a..b/path", speed(tmp_path))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "nowhere")
    with pytest.raises(UserError, match=r"s3://b/path: Invalid endpoint: nowhere; see AWS_ENDPOINT_URL"):
        Shards("s3://b/path", speed(tmp_path))
    with FaultyServer(tiny_shards) as server:
        with pytest.raises(UserError, match=r"/nowhere: no shards here \(no manifest.json: 404 Not Found\)"):
            Shards(server.address + "/nowhere", speed(tmp_path))
        closed = server.address
    with pytest.raises(UserError, match=r"download failed after 4 tries and .*Connect call failed.*\(4 x\)"):
        Shards(closed, speed(tmp_path))
    assert not list((tmp_path / "cache").glob("*/*"))


def test_a_cache_that_cannot_be_written_is_a_disk_error(server, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(
        UserError, match=r"cache: Not a directory.*speed.cache=another/folder|cache: File exists.*another/folder"
    ):
        Shards(server.address, speed(tmp_path))


@pytest.mark.parametrize(("package", "address"), [("s3fs", "s3://bucket/path"), ("aiohttp", "https://host/path")])
def test_a_missing_package_is_named(tmp_path, package, address):
    missing = f"import sys\nsys.modules[{package!r}] = None\nfrom runtime.errors import run_cli\ndef main():\n"
    code = missing + textwrap.indent(program(address, speed(tmp_path), ""), "  ") + "\nrun_cli(main)"
    done = run_program("-c", code, expect=2)
    assert re.match(
        rf"error: {address}: a package for remote shards is missing .*: pip install -e '.\[remote\]'\n$", done.stderr
    )


def test_secrets_of_an_address_are_not_shown(tiny_shards, tmp_path):
    with FaultyServer(tiny_shards.parent) as server:
        host = server.address.removeprefix("http://")
        remote = Shards(f"http://name:word@{host}/{tiny_shards.name}?token=secret", speed(tmp_path))
        assert remote.folder == f"http://{host}/{tiny_shards.name}"
        assert remote.read(0) == Shards(tiny_shards).read(0)
        assert not any("secret" in p.name or "word" in p.name for p in (tmp_path / "cache").rglob("*"))


def test_evaluation_reads_remote_shards(server, tiny_shards, tmp_path):
    """Its worker processes are forked from one that has already read from the server."""
    shards = open_shards(server.address + "/", Config(speed=speed(tmp_path)))
    assert shards.folder == server.address
    assert same_folder(server.address + "/", shards.folder)
    assert not same_folder(server.address + "/other", shards.folder)
    shards.read(0)
    cpu = torch.device("cpu")
    local, remote = (list(batches(LabeledPhotos(s, 24), 16, cpu, workers=2)) for s in (Shards(tiny_shards), shards))
    for (pictures, labels), (remote_pictures, remote_labels) in zip(local, remote, strict=True):
        assert torch.equal(pictures, remote_pictures)
        assert torch.equal(labels, remote_labels)
    assert len(server.requests) == 2 + len(shards.shards)
