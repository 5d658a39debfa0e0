"""Linear classification: probes trained together equal probes trained one by one."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from eval.__main__ import main, read_rates
from eval.datasets import LabeledPhotos
from eval.features import photo_features
from eval.linear import INPUTS, RATES, ProbeScore, Protocol, best_of, fit
from model.vit import ViT
from pipeline.shards import Shards
from runtime.errors import UserError
from tests.test_eval_knn import home, run  # noqa: F401 - fixtures

SMALL = Protocol(augment=False, epochs=20, batch=32, rates=(0.001, 0.1, 1.0))


@pytest.fixture
def network():
    torch.manual_seed(0)
    return ViT(width=24, depth=1, heads=2, patch=8, image_size=24).eval().requires_grad_(False)


@pytest.fixture
def photos(home):  # noqa: F811
    train = LabeledPhotos(Shards(home / "shards"), 24)
    return train, LabeledPhotos(Shards(home / "val"), 24, classes=train.classes)


def test_the_protocol_is_the_published_one_for_published_views():
    assert Protocol.for_views(224) == Protocol(True, 10, 1024, RATES, 0)
    assert RATES[:13] == (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
    assert Protocol.for_views(48) == Protocol(False, 100, 128, RATES, 0)


def test_probes_trained_together_equal_probes_trained_one_by_one(network, photos):
    """Against torch's SGD, with a layer and an optimizer of its own for each learning rate."""
    train, val = photos
    together = fit(network, train, val, SMALL)
    assert [(score.features, score.rate) for score in together] == [(f, r) for f in INPUTS for r in SMALL.rates]
    kinds = ("cls", "patches")
    features, labels = photo_features(network, train, kinds)
    val_features, val_labels = photo_features(network, val, kinds)
    torch.manual_seed(0)
    initial = {f: 0.01 * torch.randn(3, 24 * len(kinds_of), 3) for f, kinds_of in INPUTS.items()}
    for score in together:
        inputs = torch.cat([features[kind] for kind in INPUTS[score.features]], 1)
        head = nn.Linear(inputs.shape[1], 3)
        head.weight.data = initial[score.features][SMALL.rates.index(score.rate)].T.clone()
        nn.init.zeros_(head.bias)
        sgd = torch.optim.SGD(head.parameters(), score.rate * 32 / 256, momentum=0.9)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 20 * 3)
        draws = torch.Generator().manual_seed(0)
        for _ in range(20):
            for rows in torch.randperm(len(labels), generator=draws).split(32):
                sgd.zero_grad()
                F.cross_entropy(head(inputs[rows]), labels[rows]).backward()
                sgd.step()
                cosine.step()
        logits = head(torch.cat([val_features[kind] for kind in INPUTS[score.features]], 1))
        assert score.top1 == pytest.approx(100 * float((logits.argmax(1) == val_labels).float().mean())), score


def test_colors_are_linearly_separable(network, photos):
    before = torch.get_rng_state()
    scores = fit(network, *photos, SMALL)
    assert best_of(scores).top1 > 90
    assert best_of(scores).top5 == 100  # of three classes
    assert fit(network, *photos, SMALL) == scores
    assert torch.equal(torch.get_rng_state(), before)


def test_random_crops_differ_and_train_as_well(network, photos):
    train, val = photos
    augmented = LabeledPhotos(train.shards, 24, train.ids[:2], augment=True)
    torch.manual_seed(0)
    images = [augmented[0][0] for _ in range(8)]
    assert len({tuple(image.flatten().tolist()) for image in images}) == 8
    protocol = Protocol(augment=True, epochs=4, batch=32, rates=(0.1, 1.0))
    scores = fit(network, train, val, protocol)
    assert best_of(scores).top1 > 90
    assert fit(network, train, val, protocol) == scores


def test_the_best_is_the_first_among_equals():
    equal = [ProbeScore("cls", rate, top1, 100) for rate, top1 in ((0.1, 5.0), (0.2, 7.0), (0.3, 7.0))]
    assert best_of(equal).rate == 0.2


def test_the_command_prints_and_records(run, capsys):  # noqa: F811
    assert main(["linear", str(run), "--epochs", "10", "--batch", "16", "--rates", ".01,1"]) == 0
    assert "best: " in capsys.readouterr().out
    line = json.loads((run / "evaluations.jsonl").read_text())
    assert (line["what"], line["photos"], line["queries"], line["rates"]) == ("linear", 72, 18, [0.01, 1.0])
    assert len(line["maps"]) == 4
    assert line["best"]["top1"] == max(score["top1"] for score in line["maps"]) > 90


def test_shards_without_classes_are_reported(run, home, capsys):  # noqa: F811
    assert main(["linear", str(run), "--val", str(home / "unlabeled")]) == 0
    assert "skipped: these shards have no classes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rates", "a,1"], "must be numbers separated by commas"),
        (["--rates", "0,1"], "must be more than 0 and different"),
        (["--epochs", "0"], "--epochs 0: must be more than 0"),
        (["--size", "30"], "the nearest is 32"),
    ],
)
def test_wrong_options_are_refused(run, options, message):  # noqa: F811
    with pytest.raises(UserError, match=message):
        main(["linear", str(run), *options])
    assert read_rates(".1,2") == (0.1, 2.0)


def test_a_set_of_damaged_photos_is_refused(network, photos, monkeypatch):
    monkeypatch.setattr(Shards, "is_valid", lambda *_: False)
    with pytest.raises(UserError, match="none of the 10 photos is readable and has a known class"):
        fit(network, *photos, SMALL)
