"""The plan and the config of a mixture: shares, passes, any number of processes, and what is refused."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from pipeline.mixture import short_names
from pipeline.plan import Plan, deal, quotas
from runtime.config import dump_run_config, load_config, parse_config, split_places
from runtime.errors import UserError
from tests.test_plan import Folder


class Folders:
    """What a Plan needs of a Mixture."""

    folder = "several"

    def __init__(self, *counts, weights=None):
        self.parts, self.weights = [Folder(c, str(i)) for i, c in enumerate(counts)], weights

    def __len__(self):
        return sum(map(len, self.parts))


SIZES = ([300, 311], [90] * 12, [7, 200])  # samples of the shards of three sources: 611, 1080, 207
MIXTURES = {
    "by samples": Folders(*SIZES),
    "weights": Folders(*SIZES, weights=[1, 2, 0.5]),
    "small ones more often": Folders(*SIZES, weights=[10, 1, 10]),
    "tiny share": Folders(*SIZES, weights=[1, 0.004, 1]),
}


def steps_of(plan: Plan, epochs: int) -> np.ndarray:
    return np.stack([plan.samples_of(step) for step in range(epochs * plan.steps_per_epoch)])  # [steps,B]


# ------------------------------------------------------------------------------------------------------------- the plan


def test_one_source_is_drawn_as_ever():
    """Written by the commit before mixtures (1720217): ids, order, held-out samples and shards ahead of one source."""
    found = hashlib.sha256()
    for counts, batch, holdout in (([10, 7, 1, 30, 0, 3], 8, 0), ([1000, 1000, 37], 32, 0.1), ([97] * 50, 96, 0.02)):
        plan = Plan(Folder(counts), batch=batch, seed=3, holdout=holdout)
        found.update(plan.held_out().tobytes())
        for step in range(2 * plan.steps_per_epoch + 1):
            for rank in (0, 1):
                found.update(plan.samples_of(step, rank, 2).tobytes())
                found.update(repr(plan.shards_ahead(step, rank, 2)).encode())
            assert set(plan.passes_of(step).tolist()) == {plan.epoch(step)}
        found.update(repr([plan.replacement_id(4, 7, attempt) for attempt in (1, 5, 10, 11, 50)]).encode())
    assert found.hexdigest() == "b5d23ef187de0aa5c4e2817f5560359aac5ad4d584de12d0299fb06a91ed97c9"


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("holdout", [0.0, 0.1])
def test_shares_and_passes(name, holdout):
    mixture, batch = MIXTURES[name], 48
    plan = Plan(mixture, batch=batch, seed=3, holdout=holdout)
    steps = steps_of(plan, 2)
    firsts = np.cumsum([0, *map(len, mixture.parts)])
    source = np.searchsorted(firsts, steps, side="right") - 1
    shares = np.array(mixture.weights or [order.samples for order in plan.orders], float)
    shares /= shares.sum()
    counts = np.cumsum([np.bincount(row, minlength=3) for row in source], 0)  # [steps,S] images after each step
    assert [plan.images_before(step + 1) for step in range(len(steps))] == counts.tolist()
    expected = shares * batch * np.arange(1, len(steps) + 1)[:, None]
    assert np.abs(counts - expected).max() < 8  # at any step; an epoch's own rounding is below one image
    passes = np.stack([plan.passes_of(step) for step in range(len(steps))])
    out = plan.held_out()
    for s, order in enumerate(plan.orders):
        drawn, number = steps[source == s], passes[source == s]
        for n in range(number.max() + 1):  # a pass is every sample of the source once; the last one is not over
            seen = drawn[number == n]
            assert len(np.unique(seen)) == len(seen)
            assert len(seen) == order.samples or n == number.max()
        assert not np.intersect1d(drawn, out).size
        assert drawn.min() >= firsts[s]
        assert drawn.max() < firsts[s + 1]
    of_step = [set(row.tolist()) for row in number_of_steps(passes, source)]
    assert all(len(seen) <= 2 for seen in of_step)  # passes follow each other


def number_of_steps(passes: np.ndarray, source: np.ndarray) -> list[np.ndarray]:
    return [p[s == one] for p, s in zip(passes, source, strict=True) for one in range(3)]


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_any_number_of_processes_draws_the_same_steps(world_size):
    plan, again = (Plan(MIXTURES["weights"], batch=48, seed=5) for _ in range(2))
    before = steps_of(again, 1)  # what a plan was asked before changes nothing
    for step in (0, 3, plan.steps_per_epoch - 1, plan.steps_per_epoch + 5):
        for ask in ("samples_of", "passes_of"):
            parts = np.stack([getattr(plan, ask)(step, rank, world_size) for rank in range(world_size)], 1)
            assert np.array_equal(parts.ravel(), getattr(again, ask)(step))
    assert not np.array_equal(before[3], Plan(MIXTURES["weights"], batch=48, seed=6).samples_of(3))


def test_every_process_has_photos_of_every_source():
    plan = Plan(Folders([400], [400], weights=[1, 1]), batch=32, seed=0)
    for rank in (0, 1):
        sources = np.concatenate([plan.samples_of(step, rank, 2) for step in range(5)]) < 400
        assert 0.2 < sources.mean() < 0.8


def test_a_source_holds_out_the_same_samples_alone_and_mixed():
    alone = Plan(Folder(SIZES[1]), batch=48, seed=3, holdout=0.1).held_out()
    mixed = Plan(MIXTURES["weights"], batch=48, seed=3, holdout=0.1).held_out() - sum(SIZES[0])
    assert np.array_equal(mixed[(mixed >= 0) & (mixed < sum(SIZES[1]))], alone)


def test_a_replacement_is_of_the_same_source():
    plan = Plan(MIXTURES["weights"], batch=48, seed=3, holdout=0.1)
    out, (first, last) = set(plan.held_out().tolist()), plan.firsts[1:3]
    drawn = [plan.replacement_id(700, 4, attempt) for attempt in range(1, 60)]
    assert all(first <= sample < last and sample not in out for sample in drawn)
    assert len({(sample - first) // 90 for sample in drawn}) > 1  # other shards of it, too


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_shards_ahead_are_those_that_are_read(world_size):
    plan = Plan(MIXTURES["small ones more often"], batch=48, seed=3, streams=8, shuffle_shards=1)
    for step in range(0, 3 * plan.steps_per_epoch, 5):
        for rank in range(world_size):
            ids = plan.samples_of(step, rank, world_size)
            for s, part in enumerate(MIXTURES["weights"].parts):
                own = ids[(ids >= plan.firsts[s]) & (ids < plan.firsts[s + 1])] - plan.firsts[s]
                read = np.searchsorted(part.starts, own, side="right") - 1
                assert set(read.tolist()) <= set(plan.shards_ahead(step, rank, world_size, s)[0])


def test_images_are_dealt_by_quotas():
    for shares in ([5, 3, 2], [1, 98, 1], [7], [1] * 9):
        images = 1000
        counts = quotas(shares, images)
        assert sum(counts) == images
        source, turn = deal(np.arange(images), counts)
        for s, count in enumerate(counts):
            assert np.array_equal(turn[source == s], np.arange(count))


def test_too_small_a_source_is_refused():
    with pytest.raises(UserError, match=r"^1: 10 samples to train on are fewer than its share of a .*, 16\.0 of 32"):
        Plan(Folders([500], [10], weights=[1, 1]), batch=32, seed=0)
    with pytest.raises(UserError, match=r"^1: a share of an epoch below one image"):
        Plan(Folders([500], [10], weights=[1, 1e-6]), batch=32, seed=0)
    with pytest.raises(UserError, match=r"^1: no sample to train on"):
        Plan(Folders([500], [0]), batch=32, seed=0)
    with pytest.raises(UserError, match=r"several: 30 samples to train on"):
        Plan(Folders([20], [10]), batch=64, seed=0)


def test_a_hundred_million_samples_in_ten_sources_are_never_listed():
    counts = [[2400] * (758 * (i + 1)) for i in range(10)]  # in all 100 million
    plan = Plan(Folders(*counts), batch=1024, seed=0, holdout=0.001)
    assert plan.samples > 99_000_000
    ids = plan.samples_of(plan.steps_per_epoch + 7)
    assert len(np.unique(ids)) == 1024
    arrays = [value for order in plan.orders for value in vars(order).values() if isinstance(value, np.ndarray)]
    arrays += [a for order in plan.orders for pair in order._orders.values() for a in pair]
    assert sum(a.nbytes for a in arrays) < 10e6


# ----------------------------------------------------------------------------------------------------------- the config


def test_sources_in_a_config(tiny_config):
    def sources(word):
        config = load_config(tiny_config, [f"data.shards={word}"])
        assert parse_config(dump_run_config(config), "copy").data.sources == _absolute(config).data.sources
        return [(s.path, s.weight) for s in config.data.sources]

    def _absolute(config):
        for source in config.data.sources if isinstance(config.data.shards, list) else []:
            source.path = source.path if "://" in source.path else str(Path.cwd() / source.path)
        if isinstance(config.data.shards, str):
            config.data.shards = str(Path.cwd() / config.data.shards)
        return config

    assert [p.rpartition("/")[2] for p, _ in sources("[a, {path: b}, 2026]")] == ["a", "b", "2026"]
    assert sources("[{path: s3://a/b, weight: 2}, {path: https://c/d, weight: 0.5}]")[1] == ("https://c/d", 0.5)
    assert sources("{path: s3://a/b, weight: 3}") == [("s3://a/b", 3)]
    assert len(sources("a")) == 1


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("[]", "data.shards: this list is empty"),
        ("[{path: a, weigth: 1}]", "data.shards.0.weigth: no such key, did you mean 'weight'?"),
        ("[{path: a, weight: -1}]", "data.shards.0.weight: expected a number above 0, found -1"),
        ("[{weight: 1}]", "data.shards.0: a source needs a path"),
        ("[a, {path: b, weight: 2}]", "a has no weight, others have one; give all sources a weight, or none"),
        ("[a, ./a/]", "a and ./a/ are the same place"),
        ("true", "data.shards: expected a text or a list of sources, found true"),
    ],
)
def test_wrong_sources(tiny_config, word, message):
    with pytest.raises(UserError) as error:
        load_config(tiny_config, [f"data.shards={word}"])
    assert message in str(error.value)


def test_a_missing_source_is_named(tiny_config, tiny_shards):
    with pytest.raises(UserError, match=r"data\.shards\.1: .*tinny: no such folder, did you mean '.*tiny'\?"):
        load_config(tiny_config, [f"data.shards=[{tiny_shards}, {tiny_shards.parent}/tinny]"], processes=1)
    with pytest.raises(UserError, match=r"tiny:2: no such folder.*; a weight is given by .*tiny, weight: 2}, …"):
        load_config(tiny_config, [f"data.shards=[{tiny_shards.parent}, '{tiny_shards}:2']"], processes=1)


def test_places_of_the_command_line(tmp_path):
    a, b = tmp_path / "a", tmp_path / "my photos"
    for folder in (a, b):
        folder.mkdir()
    assert split_places(f"{a}") == [f"{a}"]
    assert split_places(f"{b}") == [f"{b}"]  # a folder with a blank is one
    assert split_places(f"{a} s3://x/y") == [f"{a}", "s3://x/y"]
    assert split_places(f"{a} '{b}'") == [f"{a}", f"{b}"]
    assert split_places(f"{a}:2 {tmp_path}:1") == [f"{a}:2", f"{tmp_path}:1"]  # the message says how weights are given
    assert split_places("no such photos") == ["no such photos"]  # the message names what was written
    assert split_places(f"{a} it's") == [f"{a} it's"]


def test_short_names():
    assert short_names(["/a/train", "/b/train", "s3://c/train/"]) == ["a/train", "b/train", "c/train"]
    assert short_names(["/a/x", "/b/y"]) == ["x", "y"]
