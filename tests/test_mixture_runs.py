"""Training and evaluating on a mixture: photos and views of each source, classes by name, resume, remote sources."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_program

from eval.datasets import LabeledPhotos
from eval.online_process import Measures
from eval.preflight import why_no_knn
from eval.target import EvalTarget, is_part
from pipeline.mixture import Mixture, open_training
from pipeline.plan import Plan
from pipeline.readers import webdataset
from pipeline.shards import Shards
from runtime.checkpoint import find_resume, identify
from runtime.config import load_config
from runtime.distributed import DistributedContext
from runtime.errors import UserError
from runtime.metrics import read_jsonl
from tests.faulty_server import FaultyServer

SINGLE = DistributedContext(0, 1, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def others(photos, tmp_path_factory) -> Path:
    """Two folders of shards beside the tiny ones: 40 photos of classes 'cedar' and 'dogwood', 32 of 'x' alone."""
    folder = tmp_path_factory.mktemp("others")
    for n in range(72):
        kind = "x" if n >= 40 else ("cedar", "dogwood")[n % 2]
        place = folder / ("unlike" if n >= 40 else "alike") / kind
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(sorted(photos.glob("*/*.jpg"))[n], place / f"{n}.jpg")
    for name in ("alike", "unlike"):
        words = ("--labels", "yes", "--shard-mb", "0.03", "--processes", "1")
        run_program("-m", "tools.make_shards", "make", folder / name, folder / f"{name}-shards", *words)
    return folder


@pytest.fixture
def mixed(tiny_config, tiny_shards, others):
    """The config of a run on two sources, as words of the command line; the second one's photos come twice as often."""
    return f"data.shards=[{{path: {tiny_shards}, weight: 1.2}}, {{path: {others / 'alike-shards'}, weight: 1}}]"


def test_classes_of_the_same_name_are_one(tiny_shards, others):
    tiny, alike, unlike = (Shards(p) for p in (tiny_shards, others / "alike-shards", others / "unlike-shards"))
    both = Mixture([tiny, alike])
    assert both.classes == ["ash", "birch", "cedar", "dogwood"]
    names = [both.classes[label] for label in both.labels()]
    own = [part.classes[label] for part in (tiny, alike) for label in part.labels()]
    assert names == own
    assert both.labels(np.array([3, 100, 130])).tolist() == [both.labels()[i] for i in (3, 100, 130)]
    assert (both.incomparable, both.read(100), both.folder_of(100)) == ("", alike.read(4), alike.folder)
    apart = Mixture([tiny, unlike])
    assert apart.classes == []
    assert set(apart.labels().tolist()) == {-1}
    assert f"{unlike.folder} ('x', ...) are not comparable" in apart.incomparable
    assert Mixture([tiny, alike, unlike]).incomparable
    records = both.records(np.array([0, 99]))
    assert records["crc32"].tolist() == [tiny.index["crc32"][0], alike.index["crc32"][3]]
    damage = both.describe(99)
    assert damage["folder"] == str(alike.folder)


def test_the_reader_makes_the_views_of_each_source(tiny_config, mixed, tiny_shards):
    """A photo of a second pass has other views than in the first one, even in one epoch; alone or mixed, the same."""
    config = load_config(tiny_config, [mixed, "speed.workers=0"])
    shards = open_training(config)
    plan = Plan(shards, batch=16, seed=config.seed, holdout=0.1)
    batches = list(webdataset.read(config, shards, plan, start=0, stop=2 * plan.steps_per_epoch))
    windows: dict[int, set[str]] = {}
    for batch in batches:
        assert batch.ids.tolist() == batch.rows.tolist() == plan.samples_of(batch.step).tolist()
        for sample, window in zip(batch.ids.tolist(), batch.windows.tolist(), strict=True):
            windows.setdefault(sample, set()).add(str(window))
    times = np.bincount(np.concatenate([b.ids.tolist() for b in batches]), minlength=len(shards))
    assert times.max() > 2
    assert all(len(drawn) == times[sample] for sample, drawn in windows.items())
    resumed = next(iter(webdataset.read(config, shards, plan, start=5, stop=6)))
    assert all(a.equal(b) for a, b in zip(resumed.views, batches[5].views, strict=True))


def test_online_knn_of_a_mixture(tiny_config, mixed, others, tiny_shards):
    config = load_config(tiny_config, [mixed, "eval.every=1"])
    shards = open_training(config)
    plan = Plan(shards, batch=16, seed=config.seed, holdout=0.1)
    assert why_no_knn(config, shards, plan) == ""
    _, held_out = Measures(config, threads=1).photos
    assert sorted(held_out.ids.tolist()) == plan.held_out().tolist()
    assert {int(label) for _, label in held_out} <= {0, 1, 2, 3}
    apart = load_config(tiny_config, [f"data.shards=[{tiny_shards}, {others}/unlike-shards]", "eval.every=1"])
    shards = open_training(apart)
    assert why_no_knn(apart, shards, Plan(shards, batch=16, seed=0, holdout=0.1)).startswith("the labels of")
    val = load_config(tiny_config, [mixed, "eval.every=1", f"data.val={others / 'alike-shards'}"])
    assert is_part(val.data.val, open_training(val))


def test_a_run_on_a_mixture(tiny_config, tiny_shards, others, mixed, tmp_path):
    run, short = tmp_path / "run", ("optim.epochs=1", "optim.warmup_epochs=0.5")
    dry = run_program("train.py", tiny_config, mixed, *short, "--dry-run").stdout
    assert "tiny          88 samples to train on, 54.5 % of the images (8.7 of a batch), each photo 0.69" in dry
    assert "alike-shards  " in dry
    run_program("train.py", tiny_config, mixed, *short)
    last = read_jsonl(run / "metrics.jsonl")[-1]
    drawn = {name: last[f"images/{name}"] for name in ("tiny", "alike-shards")}
    assert sum(drawn.values()) == 16 * last["step"]
    assert abs(drawn["tiny"] - 1.2 / 2.2 * 16 * last["step"]) < 2
    assert [source["name"] for source in read_jsonl(run / "versions.jsonl")[-1]["sources"]] == [*drawn]
    run_program("-m", "eval", "html", run)
    page = (run / "report.html").read_text()
    assert "Sources of photos" in page
    assert f">{drawn['alike-shards']}</td>" in page
    assert "images/tiny" not in page

    sets = EvalTarget(run).photo_sets()  # the held-out photos of both sources
    assert (len(sets.train_ids), len(sets.val_ids)) == (88 + 34, 8 + 6)
    assert isinstance(sets.at_size(16)[1], LabeledPhotos)
    one = EvalTarget(run).photo_sets(train=str(others / "alike-shards"))  # those of one
    assert np.array_equal(one.val_ids, sets.val_ids[sets.val_ids >= 96] - 96)

    def resume(word, allowed=()):
        config = load_config(tiny_config, [word, *short])
        return find_resume(run, config, identify(open_training(config)), allowed)

    alike, unlike = others / "alike-shards", others / "unlike-shards"
    reweighted = mixed.replace("weight: 1.2", "weight: 2")
    for word, difference in {
        reweighted: f"weight of {tiny_shards}: saved 1.2, current 2",
        f"data.shards={tiny_shards}": f"without {alike} (40 samples)",
        f"data.shards=[{tiny_shards}, {alike}, {unlike}]": f"with {unlike} (32 samples), weight of {tiny_shards}: saved 1.2",
        f"data.shards=[{{path: {alike}, weight: 1}}, {{path: {tiny_shards}, weight: 1.2}}]": "sources are in another order",
    }.items():
        with pytest.raises(UserError) as error:
            resume(word)
        assert "data.shards: the mixture differs from the saved one: " in str(error.value)
        assert difference in str(error.value)
    assert "--allow-change data.shards" in str(error.value)
    assert resume(reweighted, ["data.shards"])[1][0].startswith("allowed change: data.shards: the mixture differs")
    moved = shutil.copytree(tiny_shards, tmp_path / "moved")
    assert resume(mixed.replace(str(tiny_shards), str(moved)))[1] == []  # the same photos elsewhere


def test_a_remote_source_beside_a_local_one(tiny_config, tiny_shards, others, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    alike = others / "alike-shards"
    with FaultyServer(others) as server:
        words = [f"speed.cache={tmp_path / 'cache'}", "speed.read_timeout=5"]
        local = load_config(tiny_config, [f"data.shards=[{tiny_shards}, {alike}]"])
        remote = load_config(tiny_config, [f"data.shards=[{tiny_shards}, {server.address}/alike-shards]", *words])
        here, there = (open_training(config) for config in (local, remote))
        assert identify(here)["sha256"] == identify(there)["sha256"]
        plans = [Plan(shards, batch=16, seed=1, holdout=0.1) for shards in (here, there)]
        read = (
            webdataset.read(local, here, plans[0], start=3, stop=9),
            webdataset.read(remote, there, plans[1], start=3, stop=9),
        )
        for a, b in zip(*read, strict=True):
            assert torch.equal(a.ids, b.ids)
            assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
        largest = max(s["bytes"] for s in there.parts[1].shards)
        both = f"data.shards=[{server.address}/alike-shards, {server.address}/unlike-shards]"
        small = load_config(tiny_config, [both, *words, f"speed.cache_gb={2.5 * largest / 1e9}"])
        shards = open_training(small)
        with pytest.raises(UserError, match="cannot hold the shards that are read at the same time"):
            Plan(shards, batch=8, seed=0).prefetch(shards, 0)


@pytest.mark.slow  # three runs
def test_killed_and_resumed_on_a_mixture_is_equal_to_undisturbed(tiny_config, mixed, tmp_path):
    whole, cut = ([f"run.folder={tmp_path / name}", mixed, "run.log_samples=true"] for name in ("whole", "cut"))
    run_program("train.py", tiny_config, *whole)
    # ends in step 12 as a kill would: no checkpoint since step 7
    program = (
        "import os, sys; sys.argv[0] = 'train.py'; import train; step = train.train_step\n"
        "def killed(batch, *rest):\n    os._exit(9) if batch.step == 12 else None\n    return step(batch, *rest)\n"
        "train.train_step = killed; train.main()"
    )
    run_program("-c", program, tiny_config, *cut, expect=9)
    resumed = run_program("train.py", tiny_config, *cut).stdout
    assert "resumed at step 7" in resumed
    a, b = ((tmp_path / name / "backbone.safetensors").read_bytes() for name in ("whole", "cut"))
    assert a == b
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("whole", "cut")]
    assert [json.loads(line) for line in samples[0].splitlines()] == [
        json.loads(line) for line in samples[1].splitlines()
    ]
