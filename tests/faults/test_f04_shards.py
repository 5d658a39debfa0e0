"""F04: shards that are truncated, overwritten or empty. The manifest shows it before a run starts; a run that accepts the
loss (data.max_missing) continues and lists every lost sample.

webdataset ends silently after 10 of 20 samples (truncated between members or in a header, a header of random bytes). Here
only missing bytes are lost, because photos are read by offset.
"""

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import run_program

from pipeline.plan import Plan
from pipeline.shards import Shards
from runtime.config import load_config
from runtime.errors import UserError
from tests.fork_server import Forked

SHORT = ["optim.epochs=1", "optim.warmup_epochs=0"]
KINDS = ["truncated in a photo", "truncated between members", "truncated in a header", "random header", "empty"]


class Damage:
    """A copy of the shards with one of them damaged, at its middle sample; and the expected message."""

    def __init__(self, intact: Path, folder: Path, kind: str):
        self.kind, self.folder = kind, Path(shutil.copytree(intact, folder))
        shards = Shards(folder)
        self.samples = len(shards)
        self.shard, (a, b) = shards.shards[1], shards.starts[1:3]
        sample = (a + b) // 2
        at = int(shards.index["offset"][sample])
        self.path = folder / self.shard["name"]
        raw = self.path.read_bytes()
        rng = np.random.default_rng(0)
        damaged, first = {
            "truncated in a photo": (raw[: at + int(shards.index["size"][sample]) // 2], sample),
            "truncated between members": (raw[: at - 512], sample),
            "truncated in a header": (raw[: at - 256], sample),
            "random header": (raw[: at - 512] + rng.bytes(512) + raw[at:], b),
            "empty": (b"", a),
        }[kind]
        self.path.write_bytes(damaged)
        self.lost = set(range(first, b))
        self.header = at - 512
        sizes = f"has {len(damaged):,} bytes, the manifest says {len(raw):,} bytes"
        since = f"from sample {first} (byte {shards.index['offset'][min(first, b - 1)]}) on"
        self.message = f"{self.path}: {sizes}: {b - first} of its {b - a} samples are lost, {since}"


@pytest.fixture(params=KINDS)
def damage(request, tiny_shards, tmp_path) -> Damage:
    return Damage(tiny_shards, tmp_path / "shards", request.param)


@pytest.mark.fault("F04")
def test_strict(damage, tiny_config, tmp_path):
    """At the start of a run, before anything is built, and by `verify`: shard, byte, lost samples."""
    if damage.lost:
        error = run_program("train.py", tiny_config, f"data.shards={damage.folder}", expect=2).stderr
        assert damage.message in error
        assert f"{len(damage.lost)} of all {damage.samples} samples are lost" in error
        assert "data.max_missing=" in error
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert not (tmp_path / "run").exists()
    verify = ("-m", "tools.make_shards", "verify", damage.folder, "--processes", "1")
    output = run_program(*verify, expect=2).stdout
    if damage.lost:
        assert damage.message.partition(f"{damage.folder}/")[2] in output
    else:
        assert f"{damage.shard['name']}: byte {damage.header} is not a tar header" in output
        assert f"none of its {damage.shard['samples']} samples is lost" in output
    assert "1 problem;" in output


def ids_of_an_epoch(config: Path, shards: Path) -> list[int]:
    c = load_config(config, SHORT)
    plan = Plan(Shards(shards), batch=c.optim.global_batch_size, seed=c.seed, holdout=c.data.holdout)
    return [int(i) for step in range(plan.steps_per_epoch) for i in plan.samples_of(step)]


@pytest.mark.fault("F04")
def test_tolerant(damage, tiny_shards, tiny_config, tmp_path):
    """Every lost sample of the plan is replaced and listed, no other one. Above data.max_missing no run starts."""
    words = [*SHORT, "run.log_every=1", f"data.shards={damage.folder}"]
    if damage.lost:
        with pytest.raises(UserError, match=f"{len(damage.lost)} of all {damage.samples} samples are lost"):
            Shards(damage.folder, max_missing=0.01)
    output = run_program("train.py", tiny_config, *words, "data.max_missing=0.6").stdout
    assert "finished: 5 steps" in output
    planned = ids_of_an_epoch(tiny_config, tiny_shards)
    listed = tmp_path / "run" / "damaged.jsonl"
    rows = [json.loads(line) for line in listed.read_text().splitlines()] if listed.exists() else []
    assert sorted(row["planned"] for row in rows) == sorted(damage.lost & set(planned))
    assert not {row["read"] for row in rows} & damage.lost
    assert {row["shard"] for row in rows} <= {damage.shard["name"]}
    assert all("bytes could be read" in row["why"] for row in rows)
    if damage.lost:
        assert rows
        assert damage.message in output
    else:  # nothing is lost: the run equals one with intact shards, bit for bit
        run_program("train.py", tiny_config, *SHORT, "run.log_every=1", f"run.folder={tmp_path / 'intact'}")
        losses = [
            [json.loads(line)["loss"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
            for run in ("run", "intact")
        ]
        assert len(losses[0]) == 5
        assert losses[0] == losses[1]


def test_damage_during_a_run(tiny_shards, tiny_config, tmp_path):
    """The photos' first bytes are overwritten during training: crc32 shows it, and the run stops at data.max_corrupt."""
    folder = Path(shutil.copytree(tiny_shards, tmp_path / "shards"))
    shards = Shards(folder)
    trainer = Forked(["train.py", str(tiny_config), f"data.shards={folder}", "optim.epochs=2000"])
    rows, until = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 60
    while not rows.is_file() and time.monotonic() < until:
        time.sleep(0.05)
    shard, records = shards.shards[0]["name"], shards.index[: shards.starts[1]]
    with (folder / shard).open("r+b") as file:
        for record in records:
            file.seek(int(record["offset"]))
            file.write(bytes(20))
    try:
        _, error = trainer.communicate(timeout=60)
    finally:
        trainer.send_signal(signal.SIGKILL)
    assert trainer.returncode == 2
    assert "samples are damaged in one epoch, more than data.max_corrupt: 0.001" in error
    listed = [json.loads(line) for line in (tmp_path / "run" / "damaged.jsonl").read_text().splitlines()]
    assert {row["planned"] for row in listed} <= set(range(len(records)))
    assert {(row["shard"], row["why"]) for row in listed} == {
        (shard, "its bytes are not those that were indexed (crc32)")
    }
