"""The Plan: every sample once an epoch, the same order for any number of processes; and the hash it is made with."""

import numpy as np
import pytest

from pipeline.order import SAME_SHARD_TRIES
from pipeline.plan import MAX_TRIES, Plan
from pipeline.random import hash64, permute, uniform
from runtime.errors import UserError


class Folder:
    """What a Plan needs of Shards."""

    weights = None

    def __init__(self, counts, folder="shards"):
        self.folder, self.counts = folder, np.array(counts, np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])

    @property
    def parts(self):
        return [self]

    def __len__(self):
        return int(self.starts[-1])


def epoch_of(plan: Plan, epoch: int) -> np.ndarray:
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    return np.concatenate([plan.samples_of(s) for s in steps])


@pytest.mark.parametrize(("counts", "batch"), [([10, 7, 1, 30, 0, 3], 8), ([1000, 1000, 37], 32), ([97] * 50, 96)])
@pytest.mark.parametrize("holdout", [0.0, 0.1])
def test_every_sample_once_an_epoch(counts, batch, holdout):
    plan = Plan(Folder(counts), batch=batch, seed=3, holdout=holdout)
    out = plan.held_out()
    assert len(out) == round(sum(np.round(np.array(counts) * holdout)))
    epochs = [epoch_of(plan, e) for e in range(3)]
    for seen in epochs:
        assert len(np.unique(seen)) == len(seen) == plan.steps_per_epoch * batch
        assert plan.samples - len(seen) < batch
        assert not np.intersect1d(seen, out).size
        assert seen.min() >= 0
        assert seen.max() < sum(counts)
    assert not np.array_equal(epochs[0], epochs[1])
    if len(epochs[0]) < plan.samples:  # others are left over next time
        assert len(np.unique(np.concatenate(epochs))) > len(epochs[0])


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_share_a_step(world_size):
    plan = Plan(Folder([500] * 9), batch=64, seed=0)
    for step in (0, 3, plan.steps_per_epoch + 1):
        whole = plan.samples_of(step)
        parts = np.stack([plan.samples_of(step, rank, world_size) for rank in range(world_size)], 1)
        assert np.array_equal(parts.ravel(), whole)


def test_a_new_plan_resumes_at_any_step():
    folder = Folder([100, 150, 200])
    a, b = Plan(folder, batch=16, seed=5), Plan(folder, batch=16, seed=5)
    _ = [a.samples_of(s) for s in range(60)]
    assert np.array_equal(a.samples_of(41), b.samples_of(41))
    assert not np.array_equal(a.samples_of(41), Plan(folder, batch=16, seed=6).samples_of(41))


def test_a_rank_reads_few_shards_at_a_time():
    """Two processes, many shards: a rank's streams read its own shards, a few of them at a time."""
    plan = Plan(Folder([200] * 640), batch=64, seed=0)
    of_rank = [set(), set()]
    for step in range(plan.steps_per_epoch):
        for rank in range(2):
            of_rank[rank] |= set(plan.samples_of(step, rank, 2) // 200)
    assert len(of_rank[0] & of_rank[1]) <= 64  # shards at the ends of streams
    current = {shard for step in range(10) for shard in plan.samples_of(step) // 200}
    assert len(current) <= 64 * 6


def test_batches_are_mixed():
    """Neighbors in a shard do not stay neighbors."""
    seen = epoch_of(Plan(Folder([4000]), batch=32, seed=0), 0)
    assert abs(np.corrcoef(seen[:-1], seen[1:])[0, 1]) < 0.05
    assert np.std(seen.reshape(-1, 32).mean(1)) < 3 * 4000 / np.sqrt(12 * 32)


def test_replacements_come_from_the_same_shard_and_then_from_any():
    plan = Plan(Folder([50, 60, 70]), batch=8, seed=1, holdout=0.2)
    held_out = set(plan.held_out())
    for sample in (0, 49, 50, 109, 110, 179):
        drawn = [plan.replacement_id(sample, 7, attempt) for attempt in range(1, MAX_TRIES)]
        shards = np.searchsorted([50, 110, 180], [sample, *drawn], side="right")
        assert (shards[1 : SAME_SHARD_TRIES + 1] == shards[0]).all()
        assert set(shards[SAME_SHARD_TRIES + 1 :]) == {0, 1, 2}
        assert not held_out & set(drawn)
        assert len(set(drawn[:SAME_SHARD_TRIES])) > 5
        assert len(set(drawn)) > 50
        assert drawn == [plan.replacement_id(sample, 7, attempt) for attempt in range(1, MAX_TRIES)]


def test_too_few_samples():
    with pytest.raises(UserError, match="fewer than one global batch of 64"):
        Plan(Folder([10, 20]), batch=64, seed=0)


def test_permute_is_a_permutation():
    for size in (1, 2, 3, 7, 64, 65, 1000):
        for key in range(3):
            assert sorted(permute(np.arange(size), size, key)) == list(range(size))
    a = permute(np.arange(100_000), 100_000, 1)
    assert abs(np.corrcoef(a, np.arange(100_000))[0, 1]) < 0.02


def test_uniform_is_uniform_and_keyed():
    u = uniform(0, 1, np.arange(1000), "purpose", shape=(8, 25))
    assert u.shape == (1000, 8, 25)
    assert 0 <= u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    assert abs(u.mean() - 0.5) < 0.003
    assert abs(np.histogram(u, 20, (0, 1))[0] / u.size * 20 - 1).max() < 0.05
    flat = u.reshape(1000, -1)
    assert np.abs(np.corrcoef(flat[:, :10].T) - np.eye(10)).max() < 0.15
    assert hash64(1, 2) != hash64(2, 1)
    one = uniform(0, 1, np.array([17]), "purpose", shape=(8, 25))  # one key or many: the same numbers
    assert np.array_equal(one[0], u[17])
