"""k-NN while training: the result of `python -m eval knn`, on held-out photos, without side effects on the run."""

import pytest
import torch

from eval.knn import photo_knn
from eval.online import OnlineKnn
from model.vit import ViT
from pipeline.plan import Plan
from pipeline.shards import Shards
from runtime.config import load_config
from runtime.distributed import DistributedContext
from runtime.errors import UserError
from tests.test_eval_knn import home  # noqa: F401 - a fixture

SINGLE = DistributedContext(0, 1, torch.device("cpu"), torch.float32)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return ViT(width=24, depth=1, heads=2, patch=8, image_size=24)


@pytest.fixture
def online(home, tmp_path):  # noqa: F811
    """Makes an OnlineKnn on photos of three colors, a fifth held out; takes changes of the config."""

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
        return OnlineKnn(config, shards_of, Plan(shards_of, batch=8, seed=0, holdout=holdout), SINGLE)

    return make


def test_the_result_is_that_of_photo_knn_on_held_out_photos(online, network):
    knn = online()
    assert (knn.skipped, len(knn.train), len(knn.val)) == (None, 72, 18)
    assert not set(knn.train.ids) & set(knn.val.ids)
    assert knn(network) == {"knn_top1": photo_knn(network.eval(), knn.train, knn.val, k=5)["cls"][0]}
    assert knn(network)["knn_top1"] > 90  # three colors: chance is a third


def test_it_is_due_every_so_many_epochs(online):
    assert [done for done in range(1, 20) if online().due(done)] == [4, 8, 12, 16]  # 9 steps an epoch, half of one
    never = online("eval.every=0")  # and that is not reported as skipped
    assert never.skipped is None
    assert not any(never.due(done) for done in range(1, 20))


def test_it_has_no_side_effects(online, network):
    network.train()
    before = torch.get_rng_state()
    online()(network)
    assert network.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in network.parameters())


def test_a_limit_holds_for_both_sets(online, home):  # noqa: F811
    knn = online("eval.limit=9", f"data.val={home / 'val'}")
    assert (len(knn.train), len(knn.val)) == (9, 9)
    assert set(knn.train.shards.index["label"][knn.train.ids]) == {0, 1, 2}
    assert knn.val.shards.folder == home / "val"


@pytest.mark.parametrize(
    ("changes", "shards", "why"),
    [
        ((), "unlabeled", "no classes"),
        (("data.holdout=0",), "shards", "keeps no photo out"),
    ],
)
def test_the_reason_for_skipping_is_given(online, changes, shards, why):
    knn = online(*changes, shards=shards)
    assert why in knn.skipped
    assert not any(knn.due(done) for done in range(1, 20))


def test_damaged_photos_do_not_stop_a_run(online, network, monkeypatch):
    monkeypatch.setattr(Shards, "is_valid", lambda *_: False)
    assert online()(network) == {}


def test_wrong_settings_are_refused(online):
    with pytest.raises(UserError, match=r"eval\.every: expected a number, 0 or more, found -1"):
        online("eval.every=-1")
    with pytest.raises(UserError, match=r"eval\.limit: expected a whole number above 0, found 0"):
        online("eval.limit=0")
