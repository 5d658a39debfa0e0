"""F09: a faulty network. A download that can succeed does, bit for bit; one that cannot gives one message; nothing hangs.

Long: one case for each way in which a network fails.

A real HTTP server that fails on purpose (tests/faulty_server.py), and moto's S3, both on loopback.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.batch import Batch
from pipeline.plan import Plan
from pipeline.readers import webdataset
from pipeline.remote import download
from pipeline.shards import Shards
from runtime.config import Config, load_config
from runtime.errors import UserError
from tests import faulty_server as faulty
from tests.conftest import run_program
from tests.faulty_server import FaultyServer

F09 = pytest.mark.fault("F09")
STALL = 0.5  # seconds


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "MIN_BACKOFF", 0.002)


@pytest.fixture
def config(tiny_config, tmp_path) -> Config:
    config = load_config(tiny_config)
    config.speed.cache, config.speed.read_timeout = str(tmp_path / "cache"), STALL
    return config


@pytest.fixture
def server(tiny_shards) -> Iterator[FaultyServer]:
    with FaultyServer(tiny_shards) as server:
        yield server


def batches(config: Config, shards: str) -> list[Batch]:
    opened = Shards(shards, config.speed)
    plan = Plan(opened, batch=16, seed=config.seed, holdout=config.data.holdout)
    return list(webdataset.read(config, opened, plan, start=0, stop=3))


def check_download(config: Config, server: FaultyServer) -> None:
    """The reader's batches from the server are the folder's, and so are the files."""
    local, remote = batches(config, str(server.folder)), batches(config, server.address)
    for a, b in zip(local, remote, strict=True):
        assert torch.equal(a.ids, b.rows)
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
    tars = list(Path(str(config.speed.cache)).glob("*/*.tar"))
    assert tars
    assert all(tar.read_bytes() == (server.folder / tar.name).read_bytes() for tar in tars)


def message(config: Config, server: FaultyServer) -> str:
    """The reader's error message."""
    with pytest.raises(UserError) as error:
        batches(config, server.address)
    return str(error.value)


def needed_shard(config: Config, server: FaultyServer) -> dict:
    """The shard of the first sample of the first step."""
    local = Shards(server.folder)
    plan = Plan(local, batch=16, seed=config.seed, holdout=config.data.holdout)
    return local.shards[int(local.index["shard"][plan.samples_of(0)[0]])]


# --------------------------------------------------------------------------------------------------------------- HTTP


@F09
def test_http_404(config, server, tiny_config, tmp_path):
    """A shard of the manifest is missing: through the trainer."""
    shard = needed_shard(config, server)
    server.always(shard["name"], faulty.status(404))
    words = [f"data.shards={server.address}", f"speed.cache={tmp_path / 'cache'}", "speed.workers=2"]
    done = run_program("train.py", tiny_config, *words, expect=2)
    advice = "upload it from the folder in which the shards were made"
    assert done.stderr == f"error: {server.address}/{shard['name']}: is missing (404 Not Found); {advice}\n"
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    assert len(server.starts(shard["name"])) <= 3  # processes that waited do not request it again


@F09
@pytest.mark.fast
def test_http_503(config, server):
    shard = needed_shard(config, server)
    for name in ("manifest.json", "index.npy", shard["name"]):
        server.behave(name, *[faulty.status(code) for code in (503, 500, 429)])
    check_download(config, server)
    assert len(server.starts(shard["name"])) == 4

    config.speed.cache += "-2"
    server.always(shard["name"], faulty.status(503))
    error = message(config, server)
    assert f"{server.address}/{shard['name']}: download failed after 8 tries and " in error
    assert f"503 Service Unavailable (8 x); 0 of {shard['bytes']:,} bytes have arrived; check the address" in error
    server.always("manifest.json", faulty.status(503))
    assert "manifest.json: download failed after 4 tries" in message(config, server)


@F09
@pytest.mark.fast
def test_http_cut_body(config, server):
    shard, size = needed_shard(config, server), needed_shard(config, server)["bytes"]
    server.always(shard["name"], faulty.cut(20_000))
    server.behave("index.npy", faulty.cut(100))
    server.behave("manifest.json", faulty.cut(10))
    check_download(config, server)
    assert server.starts(shard["name"]) == list(
        range(0, size, 20_000)
    )  # from the byte where it broke off, no byte twice
    assert server.sent[shard["name"]] == size
    assert server.starts("index.npy") == [0, 100]

    config.speed.cache += "-2"
    server.always(shard["name"], faulty.cut(0))
    error = message(config, server)
    assert f"{shard['name']}: download failed after 8 tries" in error
    assert f"0 of {size:,} bytes have arrived" in error


@F09
@pytest.mark.fast
def test_http_no_length(config, server):
    shard, size = needed_shard(config, server), needed_shard(config, server)["bytes"]
    for name in ("manifest.json", "index.npy"):
        server.behave(name, faulty.no_length(50), faulty.no_length())
    server.behave(shard["name"], faulty.no_length(30_000), faulty.no_length())
    check_download(config, server)
    assert server.starts(shard["name"]) == [0, 30_000]

    config.speed.cache += "-2"
    server.always(shard["name"], faulty.longer)
    assert f"more bytes than the manifest's {size} (8 x)" in message(config, server)
    assert server.sent[shard["name"]] < 100_000_000  # of 500 MB: the download was stopped


@F09
@pytest.mark.fast
def test_http_stall(config, server):
    shard = needed_shard(config, server)
    config.speed.read_timeout = 0.2
    server.behave(shard["name"], faulty.stall(25_000), faulty.stall(None))
    server.behave("manifest.json", faulty.stall(None))
    check_download(config, server)
    assert server.starts(shard["name"]) == [0, 25_000, 25_000]

    config.speed.cache += "-2"
    server.behave(shard["name"], faulty.stall(25_000), *[faulty.stall(0)] * 6, faulty.stall(10))
    error = message(config, server)
    assert f"{shard['name']}: download failed after 8 tries" in error
    assert f"no byte for 0.2 s (8 x); 25,010 of {shard['bytes']:,} bytes have arrived; check the address" in error
    assert error.endswith("check the address and the server; the same command resumes")


@F09
@pytest.mark.fast
def test_http_slow(config, server):
    """Slower than `read_timeout` as a whole, but never silent for so long: accepted."""
    shard = needed_shard(config, server)
    config.speed.read_timeout = 0.4
    server.behave(shard["name"], faulty.slow(shard["bytes"] // 15, 0.05))
    check_download(config, server)
    assert server.starts(shard["name"]) == [0]

    config.speed.cache += "-2"
    config.speed.read_timeout = 0.1
    server.always(shard["name"], faulty.slow(shard["bytes"], 0.3))
    assert "no byte for 0.1 s (8 x)" in message(config, server)


@F09
@pytest.mark.fast
def test_http_wrong_range(config, server):
    shard, size = needed_shard(config, server), needed_shard(config, server)["bytes"]
    name = shard["name"]
    for behavior, starts in {
        faulty.other_range: [0, 20_000, 0],  # the header shows it: the whole file is requested, without ranges
        faulty.lying_range: [0, 20_000, 0],  # the sha256 shows it
        faulty.no_ranges: [0, 20_000],  # the whole file is sent again, and the bytes that have arrived are skipped
        faulty.status(416): [0, 20_000, 0],
    }.items():
        server.requests.clear()
        server.behave(name, faulty.cut(20_000), behavior)
        check_download(config, server)
        assert server.starts(name) == starts, behavior
        config.speed.cache += "-2"

    server.always(name, faulty.damaged)
    assert (
        f"{server.address}/{name}: downloaded 3 times, and its sha256 is not the manifest's; run `make verify` where"
        in message(config, server)
    )
    (server_file := server.folder / name).rename(server.folder / "kept")
    try:
        server_file.write_bytes(b"<html>another file</html>")
        server.behave(name)
        assert f"{name}: has 25 bytes, the manifest says {size} bytes; upload it again" in message(config, server)
    finally:
        (server.folder / "kept").rename(server_file)


# ----------------------------------------------------------------------------------------------------------------- S3


@F09
def test_s3_5xx(config, bucket, tiny_shards, tiny_config, tmp_path):
    """A bucket that is sometimes too busy: the trainer's weights are those of the folder, bit for bit."""
    words = ["speed.workers=1", "optim.epochs=2", f"speed.cache={tmp_path / 'cache'}"]
    run_program("train.py", tiny_config, f"run.folder={tmp_path / 'local'}", *words)
    bucket.failing = 5
    done = run_program(
        "train.py", tiny_config, f"run.folder={tmp_path / 'remote'}", "data.shards=s3://photos/tiny", *words
    )
    assert "finished: " in done.stdout
    assert done.stderr == ""
    assert bucket.failing == 0
    local, remote = ((tmp_path / run / "backbone.safetensors").read_bytes() for run in ("local", "remote"))
    assert local == remote
    assert len(bucket.requests) == 5 + len(Shards(tiny_shards).shards)

    bucket.failing = 10**6
    config.speed.cache += "-2"
    with pytest.raises(
        UserError,
        match=r"s3://photos/tiny/shard-\d+.tar: download failed after 8 tries and .*503 SlowDown: Please.* \(8 x\)",
    ):
        batches(config, "s3://photos/tiny")


@F09
def test_s3_denied(config, bucket, monkeypatch):
    iam = bucket.client("iam")
    iam.create_user(UserName="guest")
    guest = iam.create_access_key(UserName="guest")["AccessKey"]
    with pytest.raises(UserError, match=r"s3://photos/nowhere: no shards here \(no manifest.json: 404 NoSuchKey"):
        batches(config, "s3://photos/nowhere")
    with pytest.raises(UserError, match=r"s3://missing: no shards here \(no manifest.json: 404 NoSuchBucket"):
        batches(config, "s3://missing")
    bucket.check_access()
    credentials = "check the credentials: AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; AWS_ENDPOINT_URL"
    with pytest.raises(
        UserError, match=rf"tiny/manifest.json: access denied \(403 InvalidAccessKeyId: .*\); {credentials}"
    ):
        batches(config, "s3://photos/tiny")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", guest["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", guest["SecretAccessKey"])
    with pytest.raises(UserError, match=rf"tiny/manifest.json: access denied \(403 AccessDenied: .*\); {credentials}"):
        batches(config, "s3://photos/tiny")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match=rf"access denied \(Unable to locate credentials\); {credentials}"):
        batches(config, "s3://photos/tiny")


# ------------------------------------------------------------------------------------- not counted among the nine cases


@pytest.mark.skipif(os.environ.get("FAULTS") != "all", reason="starts DALI's processes; part of make faults")
def test_dali_with_a_faulty_network(config, server):
    dali = pytest.importorskip("pipeline.readers.dali")
    shard = needed_shard(config, server)
    config.speed.dali_threads = config.speed.workers = 1

    def read(shards: str) -> list[Batch]:
        opened = Shards(shards, config.speed)
        return list(dali.read(config, opened, Plan(opened, batch=16, seed=0, holdout=0.1), start=0, stop=3))

    server.always(shard["name"], faulty.cut(20_000))
    for a, b in zip(read(str(server.folder)), read(server.address), strict=True):
        assert torch.equal(a.ids, b.rows)
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
    config.speed.cache += "-2"
    server.requests.clear()
    server.always(shard["name"], faulty.status(404))
    with pytest.raises(UserError, match=rf"{shard['name']}: is missing \(404 Not Found\)"):
        read(server.address)
    assert len(server.starts(shard["name"])) <= 6  # once for each batch in flight, not for each sample
