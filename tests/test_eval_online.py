"""k-NN while training: the figure of the program, on what no step sees, and no trace in the run."""

import pytest
import torch

from eval.knn import photo_knn
from eval.online import OnlineKnn
from model.vit import ViT
from pipeline.shards import Plan, Shards
from runtime.config import load_config
from runtime.distributed import DistributedContext
from runtime.errors import UserError
from tests.test_eval_knn import home  # noqa: F401 - a fixture

ALONE = DistributedContext(0, 1, torch.device("cpu"), torch.float32)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return ViT(width=24, depth=1, heads=2, patch=8, image_size=24)


@pytest.fixture
def online(home, tmp_path):  # noqa: F811
    """Makes an OnlineKnn of photos of three colors, a fifth held out; takes changes of the config."""

    def make(*changes: str, shards: str = "shards") -> OnlineKnn:
        path = tmp_path / "colors.yaml"
        path.write_text(
            f"data: {{shards: {home / shards}, holdout: 0.2, views: [{{count: 2, size: 24, teacher: true}}]}}\n"
            "model: {arch: custom, width: 24, depth: 1, heads: 2, patch: 8}\noptim: {global_batch_size: 8}\n"
            "eval: {every: 0.5, k: 5}\n"
        )
        config = load_config(path, changes)
        shards_of = Shards(home / shards)
        holdout = 0.0 if config.data.val else config.data.holdout
        return OnlineKnn(config, shards_of, Plan(shards_of, batch=8, seed=0, holdout=holdout), ALONE)

    return make


def test_the_figure_is_the_programs_on_what_no_step_sees(online, network):
    ask = online()
    assert (ask.skipped, len(ask.bank), len(ask.val)) == (None, 72, 18)
    assert not set(ask.bank.rows) & set(ask.val.rows)
    assert ask(network) == photo_knn(network.eval(), ask.bank, ask.val, k=5)["cls"][0]
    assert ask(network) > 90  # three colors: a third by guessing


def test_it_asks_every_so_many_epochs(online):
    assert [done for done in range(1, 20) if online().due(done)] == [4, 8, 12, 16]  # 9 steps an epoch, half of one
    never = online("eval.every=0")  # and nothing is said about it
    assert never.skipped is None
    assert not any(never.due(done) for done in range(1, 20))


def test_it_leaves_no_trace(online, network):
    network.train()
    before = torch.get_rng_state()
    ask = online()
    ask(network)
    assert network.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in network.parameters())


def test_a_limit_spreads_over_both_sets(online, home):  # noqa: F811
    ask = online("eval.limit=9", f"data.val={home / 'val'}")
    assert (len(ask.bank), len(ask.val)) == (9, 9)
    assert set(ask.bank.shards.index["label"][ask.bank.rows]) == {0, 1, 2}
    assert ask.val.shards.folder == home / "val"


@pytest.mark.parametrize(
    ("changes", "shards", "why"),
    [
        ((), "bare", "no classes"),
        (("data.holdout=0",), "shards", "keeps no photo out"),
    ],
)
def test_what_is_skipped_is_said(online, changes, shards, why):
    ask = online(*changes, shards=shards)
    assert why in ask.skipped
    assert not any(ask.due(done) for done in range(1, 20))


def test_nothing_but_damage_stops_no_run(online, network, monkeypatch):
    monkeypatch.setattr(Shards, "is_valid", lambda *_: False)
    assert online()(network) is None


def test_what_cannot_be_is_told_before_anything_starts(online):
    with pytest.raises(UserError, match=r"eval\.every: not below 0, this is -1"):
        online("eval.every=-1")
    with pytest.raises(UserError, match=r"eval\.limit: more than 0, this is 0"):
        online("eval.limit=0")
