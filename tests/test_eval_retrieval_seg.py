"""Segmentation by retrieval: shares of classes, the softmax of the nearest, a bank that stays in bounds."""

import json

import pytest
import torch
import torch.nn.functional as F

from eval.datasets import IGNORE, voc_splits
from eval.features import normalized, scene_batches
from eval.retrieval_seg import class_shares, main, measure, remember, retrieved
from runtime.errors import UserError
from tests.test_eval_linear_seg import network, painted, run, voc  # noqa: F401 - fixtures


def test_shares_by_hand():
    mask = torch.tensor([[0, 0, 2, 2], [0, 1, 2, 255], [255, 255, 1, 1], [255, 255, 9, 1]], dtype=torch.uint8)
    shares = class_shares(mask[None], 2, 3)[0]  # 9 is no class: ignored as 255 is
    assert shares.tolist() == [[0.75, 0.25, 0], [0, 0, 1], [0, 0, 0], [0, 1, 0]]


def test_retrieval_is_its_definition():
    torch.manual_seed(0)
    bank, queries = 3 * torch.randn(40, 6), torch.randn(9, 6)
    shares = torch.rand(40, 4).softmax(1)
    found = retrieved(queries, bank, shares, k=5, temperature=0.1)
    for query, mine in zip(queries, found, strict=True):
        similar = F.cosine_similarity(query[None], bank)
        nearest = sorted(range(40), key=lambda i: -float(similar[i]))[:5]
        weights = torch.tensor([float(similar[i]) / 0.1 for i in nearest]).exp()
        wanted = (weights[:, None] * shares[nearest]).sum(0) / weights.sum()
        torch.testing.assert_close(mine, wanted)
    assert torch.equal(retrieved(bank, bank, shares, k=1), shares)  # each finds itself
    torch.testing.assert_close(retrieved(queries, bank, shares, k=99, temperature=1e9), shares.mean(0).expand(9, 4))


def test_a_bank_stays_in_bounds_and_is_a_function_of_its_seed(voc, network):  # noqa: F811
    train, _ = voc_splits(voc, 48)
    tokens, shares = remember(network, train)
    assert len(tokens) == len(shares) <= 40 * 36
    assert torch.allclose(shares.sum(1), torch.ones(len(shares)))  # patches of nothing but 255 are left out
    few, of_few = remember(network, train, 200, seed=1)
    assert 190 <= len(few) <= 200
    assert few.shape[1:] == tokens.shape[1:]
    again, _ = remember(network, train, 200, seed=1, batch=7)
    torch.testing.assert_close(again, few, rtol=1e-4, atol=1e-5)
    assert not torch.equal(remember(network, train, 200, seed=2)[1], of_few)
    assert len(remember(network, train, 3)[0]) <= 3


def test_colors_are_found_again(voc, network):  # noqa: F811
    train, val = voc_splits(voc, 48)
    score = measure(network, train, val)
    assert score.miou > 60  # colors alone tell the classes; 8-pixel patches blur their borders
    assert measure(network, train, val, batch=3).miou == pytest.approx(score.miou, abs=0.1)
    assert measure(network, train, val, bank=80).miou < score.miou
    assert measure(network, train, val, pixels=True).miou > 60


def test_raw_pixels_lie_on_their_grid(voc, network):  # noqa: F811
    train, _ = voc_splits(voc, 48)
    made = next(scene_batches(network, train, batch=2, pixels=True)).tokens
    picture = normalized(train[1][0][None])[0]
    assert made.shape == (2, 192, 6, 6)
    torch.testing.assert_close(made[1, :, 2, 5].sort().values, picture[:, 16:24, 40:48].flatten().sort().values)


def test_masks_without_a_class_are_told(voc, network):  # noqa: F811
    from PIL import Image

    for mask in (voc / "SegmentationClass").glob("train*.png"):
        Image.new("L", (60, 48), IGNORE).save(mask)
    train, _ = voc_splits(voc, 48, classes=3)
    with pytest.raises(UserError, match="no pixel of a class in the split 'train'"):
        remember(network, train)


def test_the_program_tells_and_records(run, voc, capsys):  # noqa: F811
    (voc / "classes.txt").write_text("ground\nred box\nblue box\n")
    assert main([str(run), "--data", str(voc), "--k", "5"]) == 0
    assert "red box" in capsys.readouterr().out
    line = json.loads((run / "evaluations.jsonl").read_text())
    assert (line["what"], line["k"], line["temperature"], line["size"], line["scenes"]) == (
        "retrieval_seg",
        5,
        0.02,
        48,
        40,
    )
    assert line["miou"] > 60
    assert len(line["iou"]) == 3
    assert main([str(run), "--data", str(voc), "--k", "5", "--scenes", "4"]) == 0
    few = json.loads((run / "evaluations.jsonl").read_text().splitlines()[1])
    assert few["scenes"] == 4
    assert few["miou"] != line["miou"]


def test_few_scenes_are_spread_over_the_list(voc):  # noqa: F811
    train, _ = voc_splits(voc, 48)
    few = train.few(4)
    assert [path.stem for path in few.pictures] == ["train0", "train10", "train20", "train30"]
    assert [path.stem for path in few.masks] == [path.stem for path in few.pictures]
    assert (few.classes, len(train), len(train.few(99))) == (train.classes, 40, 40)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "which scenes"),
        (["--data", "VOC", "--bank", "0"], "--bank 0: more than 0"),
        (["--data", "no"], "not in Pascal"),
    ],
)
def test_a_wrong_word_is_told(run, voc, words, told):  # noqa: F811
    with pytest.raises(UserError, match=told):
        main([str(run), *(str(voc) if word == "VOC" else word for word in words)])
