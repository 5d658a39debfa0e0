"""F08: shards that are missing, empty, unreadable or few. The first three end the program before torch is loaded."""

import shutil
from pathlib import Path

import pytest
import torch

from pipeline.plan import Plan
from pipeline.readers import webdataset
from pipeline.shards import Shards
from runtime.config import load_config
from tests.conftest import run_program

pytestmark = [pytest.mark.fault("F08"), pytest.mark.fast]


@pytest.fixture
def copied(tiny_shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_shards, tmp_path / "shards"))


def refused(config: Path, shards: object) -> str:
    """The trainer's message for these shards: one line, code 2, torch not loaded, no run folder."""
    done = run_program("-X", "importtime", "train.py", config, f"data.shards={shards}", expect=2)
    imports = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    (message,) = (line for line in done.stderr.splitlines() if line not in imports)
    assert any(line.endswith(" numpy") for line in imports)
    assert not any(line.split("|")[-1].split(".")[0].strip() in ("torch", "model") for line in imports)
    assert done.stdout == ""
    assert not Path(load_config(config).run.folder).exists()
    return message


def test_a_missing_shard_is_named(tiny_config, copied):
    shard = Shards(copied).shards[2]
    (copied / shard["name"]).unlink()
    message = refused(tiny_config, copied)
    lost = f"{shard['samples']} of its {shard['samples']} samples are lost"
    assert message.startswith(
        f"error: {copied}/{shard['name']}: is missing, the manifest says {shard['bytes']:,} bytes: {lost}"
    )
    assert f"`make verify DST={copied}`" in message


def test_an_empty_folder_or_pattern_is_named(tiny_config, tiny_shards, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    no_shards = "no shards here (no manifest.json)"
    hint = f"`make shards SRC=photos/ DST={empty}` makes shards from a folder of photos"
    assert refused(tiny_config, empty) == f"error: {empty}: {no_shards}; {hint}"
    for pattern in (empty / "*.tar", tiny_shards / "shard-{000000..000004}.tar"):
        folder = f"give the folder of the tars: {pattern.parent}"
        assert refused(tiny_config, f"'{pattern}'") == f"error: {pattern}: {no_shards}; {folder}"


def test_a_folder_in_place_of_a_shard_is_named(tiny_config, copied):
    """Root ignores chmod; a folder cannot be read as a file by any user."""
    shard = Shards(copied).shards[1]
    (copied / shard["name"]).unlink()
    (copied / shard["name"]).mkdir()
    assert f"{copied}/{shard['name']}: is not a file, the manifest says {shard['bytes']:,} bytes" in refused(
        tiny_config, copied
    )


def test_fewer_shards_than_ranks_and_workers_give_the_same_samples(tiny_config, photos, tmp_path):
    made = run_program("-m", "tools.make_shards", "make", photos, tmp_path / "one", "--processes", "1")
    assert "96 samples in 1 shard " in made.stdout
    config = load_config(tiny_config, [f"data.shards={tmp_path / 'one'}", "speed.workers=2"])
    shards = Shards(config.data.shards)
    plan = Plan(shards, batch=16, seed=config.seed)
    read = [list(webdataset.read(config, shards, plan, start=0, stop=5, rank=rank, world_size=2)) for rank in range(2)]
    for step, batches in enumerate(zip(*read, strict=True)):
        for rank, batch in enumerate(batches):
            assert batch.step == step
            assert batch.ids.tolist() == plan.samples_of(step)[rank::2].tolist()
            assert torch.equal(batch.ids, batch.rows)
