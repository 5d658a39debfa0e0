"""Linear classification: many maps trained at once are the maps trained one by one."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from eval.datasets import LabeledPhotos
from eval.features import photo_features
from eval.linear import INPUTS, RATES, Figures, Protocol, best_of, fit, main, read_rates
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
    bank = LabeledPhotos(Shards(home / "shards"), 24)
    return bank, LabeledPhotos(Shards(home / "val"), 24, classes=bank.classes)


def test_the_protocol_is_the_published_one_for_published_views():
    assert Protocol.for_views(224) == Protocol(True, 10, 1024, RATES, 0)
    assert RATES[:13] == (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
    assert Protocol.for_views(48) == Protocol(False, 100, 128, RATES, 0)


def test_maps_trained_together_are_maps_trained_one_by_one(network, photos):
    """Against torch's own SGD, a map and an optimizer of its own for each rate."""
    bank, val = photos
    together = fit(network, bank, val, SMALL)
    assert [(one.features, one.rate) for one in together] == [(f, r) for f in INPUTS for r in SMALL.rates]
    kinds = ("cls", "patches")
    seen, labels = photo_features(network, bank, kinds)
    asked, answers = photo_features(network, val, kinds)
    torch.manual_seed(0)
    first = {f: 0.01 * torch.randn(3, 24 * len(kinds_of), 3) for f, kinds_of in INPUTS.items()}
    for one in together:
        inputs = torch.cat([seen[kind] for kind in INPUTS[one.features]], 1)
        head = nn.Linear(inputs.shape[1], 3)
        head.weight.data = first[one.features][SMALL.rates.index(one.rate)].T.clone()
        nn.init.zeros_(head.bias)
        sgd = torch.optim.SGD(head.parameters(), one.rate * 32 / 256, momentum=0.9)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 20 * 3)
        draws = torch.Generator().manual_seed(0)
        for _ in range(20):
            for rows in torch.randperm(len(labels), generator=draws).split(32):
                sgd.zero_grad()
                F.cross_entropy(head(inputs[rows]), labels[rows]).backward()
                sgd.step()
                cosine.step()
        logits = head(torch.cat([asked[kind] for kind in INPUTS[one.features]], 1))
        assert one.top1 == pytest.approx(100 * float((logits.argmax(1) == answers).float().mean())), one


def test_colors_are_linear(network, photos):
    before = torch.get_rng_state()
    figures = fit(network, *photos, SMALL)
    assert best_of(figures).top1 > 90
    assert best_of(figures).top5 == 100  # of three classes
    assert fit(network, *photos, SMALL) == figures
    assert torch.equal(torch.get_rng_state(), before)


def test_windows_are_drawn_anew_and_teach_as_well(network, photos):
    bank, val = photos
    moved = LabeledPhotos(bank.shards, 24, bank.rows[:2], augment=True)
    torch.manual_seed(0)
    pictures = [moved[0][0] for _ in range(8)]
    assert len({tuple(picture.flatten().tolist()) for picture in pictures}) == 8
    protocol = Protocol(augment=True, epochs=4, batch=32, rates=(0.1, 1.0))
    figures = fit(network, bank, val, protocol)
    assert best_of(figures).top1 > 90
    assert fit(network, bank, val, protocol) == figures


def test_the_best_is_the_first_of_equals():
    equal = [Figures("cls", rate, top1, 100) for rate, top1 in ((0.1, 5.0), (0.2, 7.0), (0.3, 7.0))]
    assert best_of(equal).rate == 0.2


def test_the_program_tells_and_records(run, capsys):  # noqa: F811
    assert main([str(run), "--epochs", "10", "--batch", "16", "--rates", ".01,1"]) == 0
    assert "best: " in capsys.readouterr().out
    line = json.loads((run / "evaluations.jsonl").read_text())
    assert (line["what"], line["photos"], line["queries"], line["rates"]) == ("linear", 72, 18, [0.01, 1.0])
    assert len(line["maps"]) == 4
    assert line["best"]["top1"] == max(one["top1"] for one in line["maps"]) > 90


def test_shards_without_classes_are_said(run, home, capsys):  # noqa: F811
    assert main([str(run), "--val", str(home / "bare")]) == 0
    assert "skipped: these shards have no classes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--rates", "a,1"], "numbers with commas between"),
        (["--rates", "0,1"], "each more than 0"),
        (["--epochs", "0"], "--epochs 0: more than 0"),
        (["--size", "30"], "the nearest is 32"),
    ],
)
def test_a_wrong_word_is_told(run, words, told):  # noqa: F811
    with pytest.raises(UserError, match=told):
        main([str(run), *words])
    assert read_rates(".1,2") == (0.1, 2.0)


def test_nothing_but_damage_is_told(network, photos, monkeypatch):
    monkeypatch.setattr(Shards, "is_valid", lambda *_: False)
    with pytest.raises(UserError, match="no sound photo of a known class among 10"):
        fit(network, *photos, SMALL)
