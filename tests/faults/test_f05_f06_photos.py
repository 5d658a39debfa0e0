"""F05, F06: corrupt photos, and samples without a photo: when shards are made, when tars are indexed, and in training, where
a corrupt photo is replaced until there are too many.

DALI loses the whole batch, lightly-train silently uses a gray image, webdataset stops.
"""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_program
from pictures import overwrite, photo, tar_of, tree

from pipeline.plan import Plan
from pipeline.readers import webdataset
from pipeline.shards import Shards
from runtime.config import load_config

SHORT = ["optim.epochs=1", "optim.warmup_epochs=0"]
HTML = b"<!DOCTYPE html><html><title>404 Not Found</title></html>"
READERS = ["wds"] + ["dali"] * (importlib.util.find_spec("nvidia.dali") is not None)


def flipped(data: bytes) -> bytes:
    """One bit of the scan is flipped, where no decoder notices it."""
    return bytes([*data[: len(data) * 3 // 4], data[len(data) * 3 // 4] ^ 0x10, *data[len(data) * 3 // 4 + 1 :]])


# the change; why `make` and `index` refuse the bytes (empty: no decoder notices); why training refuses them if they were
# indexed like this
CORRUPT = {
    "truncated": (
        lambda data: data[: len(data) // 2],
        "truncated: Premature end",
        "the decoder refuses it: truncated",
    ),
    "header only": (
        lambda data: data[: data.index(b"\xff\xda")],
        "no pixels follow its header",
        "the decoder refuses it: damaged or truncated",
    ),
    "garbage": (
        lambda data: np.random.default_rng(1).bytes(len(data)),
        "not a JPEG, PNG, WEBP, TIFF, BMP, GIF: it begins with b'",
        "it is not a JPEG, PNG or WebP",
    ),
    "html": (lambda data: HTML, "it begins with b'<!DOCTYPE html><'", "it is not a JPEG, PNG or WebP"),
    "flipped bytes": (flipped, "", ""),
    "zero bytes": (lambda data: b"", "empty", "it is not a JPEG, PNG or WebP"),
    "no photo": (lambda data: b'{"caption": "x"}', None, "it is not a JPEG, PNG or WebP"),
}
CASES = [pytest.param(kind, marks=pytest.mark.fault("F06" if kind in ("zero bytes", "no photo") else "F05"))
         for kind in CORRUPT]  # fmt: skip


def refused(folder: Path) -> list[tuple[str, str]]:
    path = folder / "rejected.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(row["source"], row["reason"]) for row in rows]


def check_made(tmp_path: Path, good: dict[str, bytes], bad: bytes, ending: str, why: str | None) -> None:
    """`make shards` of nine good photos and this one."""
    src = tree(tmp_path / "src", {f"{n}.jpg": data for n, data in good.items()} | {f"bad.{ending}": bad})
    dst = tmp_path / "made"
    output = run_program("-m", "tools.make_shards", "make", src, dst, "--max-bad", "0.2", "--processes", "1").stdout
    made = Shards(dst)
    if why is None:  # not a photo at all
        assert f"skipped 1 (.{ending} files 1)" in output
        assert (len(made), refused(dst)) == (9, [])
    elif why:
        assert "rejected 1 (rejected.jsonl)" in output
        ((source, reason),) = refused(dst)
        assert source == "bad.jpg"
        assert why in reason
        assert len(made) == 9
        stopped = ("-m", "tools.make_shards", "make", src, tmp_path / "no", "--processes", "1", "--max-bad", "0")
        assert "more than --max-bad 0 of all 10" in run_program(*stopped, expect=2).stderr
    else:  # flipped before its checksum was computed: a valid photo
        assert (len(made), refused(dst)) == (10, [])
        assert bad in [made.read(i) for i in range(10)]


def check_indexed(tmp_path: Path, good: dict[str, bytes], bad: bytes, ending: str, why: str | None) -> None:
    """`make index` of a tar with nine good photos and this one."""
    tars = tmp_path / "tars"
    files = {f"{n}.jpg": data for n, data in good.items()} | {f"bad.{ending}": bad, "bad.cls": b"1"}
    tar_of(files, tars / "some.tar")
    output = run_program("-m", "tools.make_shards", "index", tars, "--max-bad", "0.2", "--processes", "1").stdout
    if why is None:
        assert "labels without a photo 1" in output
        assert len(Shards(tars)) == 9
    elif why:
        assert "rejected 1 (rejected.jsonl)" in output
        ((source, reason),) = refused(tars)
        assert source == "some.tar/bad.jpg"
        assert why in reason
        assert len(Shards(tars)) == 9
    else:
        assert len(Shards(tars)) == 10


@pytest.mark.parametrize("kind", CASES)
def test_a_corrupt_photo(kind, tiny_shards, tiny_config, tmp_path):
    corrupt, why, why_in_training = CORRUPT[kind]
    good = {f"{i}": photo(i) for i in range(9)}
    bad = corrupt(photo(9))
    ending = "json" if why is None else "jpg"
    check_made(tmp_path, good, bad, ending, why)
    check_indexed(tmp_path, good, bad, ending, why)

    # at two samples of shards, whose bytes are no longer those that were indexed; one is accepted, two are too many
    folder = Path(shutil.copytree(tiny_shards, tmp_path / "shards"))
    shards, config = Shards(folder), load_config(tiny_config, SHORT)
    plan = Plan(shards, batch=16, seed=config.seed, holdout=config.data.holdout)
    sample, later = int(plan.samples_of(1)[3]), int(plan.samples_of(3)[5])
    changed = corrupt(shards.read(sample))
    overwrite(folder, sample, changed)
    before = overwrite(folder, later, corrupt(shards.read(later)))
    reader = READERS[list(CORRUPT).index(kind) % len(READERS)]
    words = [*SHORT, f"data.shards={folder}", f"speed.reader={reader}", "run.log_every=1", "data.max_corrupt=0.011"]
    error = run_program("train.py", tiny_config, *words, expect=2).stderr
    assert f"2 of {plan.samples} samples are damaged in one epoch, more than data.max_corrupt: 0.011" in error
    assert f"{tmp_path / 'run'}/damaged.jsonl lists them" in error
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]  # past the first one, and up to the second
    rows = [json.loads(line) for line in (tmp_path / "run" / "damaged.jsonl").read_text().splitlines()]
    for row, (step, planned) in zip(rows, ((1, sample), (3, later)), strict=True):
        record = shards.index[planned]
        assert row == {
            "step": step, "planned": planned, "read": plan.replacement_id(planned, step, 1),
            "shard": shards.shards[record["shard"]]["name"], "byte": record["offset"],
            "source": shards.source(planned),
            "why": "its bytes are not those that were indexed (crc32)",
        }  # fmt: skip

    # indexed like this: the header check or the decoder refuses them
    overwrite(folder, later, before)
    overwrite(folder, sample, changed, indexed=True)
    config.data.shards = str(folder)
    shards = Shards(folder)
    read_instead = []
    for reader in READERS:
        if reader == "dali":
            from pipeline.readers import dali
        read = webdataset.read if reader == "wds" else dali.read
        (batch,) = read(config, shards, plan, start=1, stop=2)
        assert [len(v) for v in batch.views] == [16, 16]
        read_instead.append(batch.rows)
    assert all(torch.equal(r, read_instead[0]) for r in read_instead)
    if why_in_training:
        assert why_in_training in str(shards.describe(sample)["why"])
        assert read_instead[0][3] == plan.replacement_id(sample, 1, 1)
    else:
        assert read_instead[0][3] == sample
