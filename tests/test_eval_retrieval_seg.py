"""Segmentation by retrieval: class distributions, weights of the neighbors, the size of the memory bank."""

import json

import pytest
import torch
import torch.nn.functional as F

from eval.__main__ import main
from eval.datasets import IGNORE, voc_splits
from eval.features import normalized, scene_batches
from eval.retrieval_seg import build_memory, class_distributions, measure, retrieve
from runtime.errors import UserError
from tests.test_eval_linear_seg import network, painted, run, voc  # noqa: F401 - fixtures


def test_class_distributions_by_hand():
    mask = torch.tensor([[0, 0, 2, 2], [0, 1, 2, 255], [255, 255, 1, 1], [255, 255, 9, 1]], dtype=torch.uint8)
    shares = class_distributions(mask[None], 2, 3)[0]  # 9 is not a class: ignored like 255
    assert shares.tolist() == [[0.75, 0.25, 0], [0, 0, 1], [0, 0, 0], [0, 1, 0]]


def test_retrieval_is_its_definition():
    torch.manual_seed(0)
    keys, queries = 3 * torch.randn(40, 6), torch.randn(9, 6)
    values = torch.rand(40, 4).softmax(1)
    retrieved = retrieve(queries, keys, values, k=5, temperature=0.1)
    for query, result in zip(queries, retrieved, strict=True):
        similar = F.cosine_similarity(query[None], keys)
        nearest = sorted(range(40), key=lambda i: -float(similar[i]))[:5]
        weights = torch.tensor([float(similar[i]) / 0.1 for i in nearest]).exp()
        expected = (weights[:, None] * values[nearest]).sum(0) / weights.sum()
        torch.testing.assert_close(result, expected)
    assert torch.equal(retrieve(keys, keys, values, k=1), values)  # each finds itself
    torch.testing.assert_close(retrieve(queries, keys, values, k=99, temperature=1e9), values.mean(0).expand(9, 4))


def test_a_memory_bank_keeps_its_size_and_is_deterministic(voc, network):  # noqa: F811
    train, _ = voc_splits(voc, 48)
    keys, values = build_memory(network, train)
    assert len(keys) == len(values) <= 40 * 36
    assert torch.allclose(values.sum(1), torch.ones(len(values)))  # patches without labels are left out
    few, few_values = build_memory(network, train, 200, seed=1)
    assert 190 <= len(few) <= 200
    assert few.shape[1:] == keys.shape[1:]
    again, _ = build_memory(network, train, 200, seed=1, batch=7)
    torch.testing.assert_close(again, few, rtol=1e-4, atol=1e-5)
    assert not torch.equal(build_memory(network, train, 200, seed=2)[1], few_values)
    assert len(build_memory(network, train, 3)[0]) <= 3


def test_colors_are_retrieved(voc, network):  # noqa: F811
    train, val = voc_splits(voc, 48)
    score = measure(network, train, val)
    assert score.miou > 60  # colors alone determine the classes; 8-pixel patches blur the borders
    assert measure(network, train, val, batch=3).miou == pytest.approx(score.miou, abs=0.1)
    assert measure(network, train, val, memory_size=80).miou < score.miou
    assert measure(network, train, val, pixels=True).miou > 60


def test_raw_pixels_are_on_their_grid(voc, network):  # noqa: F811
    train, _ = voc_splits(voc, 48)
    made = next(scene_batches(network, train, batch=2, pixels=True)).tokens
    image = normalized(train[1][0][None], network.pixels)[0]
    assert made.shape == (2, 192, 6, 6)
    torch.testing.assert_close(made[1, :, 2, 5].sort().values, image[:, 16:24, 40:48].flatten().sort().values)


def test_masks_without_a_class_are_refused(voc, network):  # noqa: F811
    from PIL import Image

    for mask in (voc / "SegmentationClass").glob("train*.png"):
        Image.new("L", (60, 48), IGNORE).save(mask)
    train, _ = voc_splits(voc, 48, classes=3)
    with pytest.raises(UserError, match="no pixel has a class in the split 'train'"):
        build_memory(network, train)


def test_the_command_prints_and_records(run, voc, capsys):  # noqa: F811
    (voc / "classes.txt").write_text("background\nred box\nblue box\n")
    assert main(["retrieval_seg", str(run), "--data", str(voc), "--k", "5"]) == 0
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
    assert main(["retrieval_seg", str(run), "--data", str(voc), "--k", "5", "--scenes", "4"]) == 0
    few = json.loads((run / "evaluations.jsonl").read_text().splitlines()[1])
    assert few["scenes"] == 4
    assert few["miou"] != line["miou"]


def test_a_subset_is_evenly_spaced(voc):  # noqa: F811
    train, _ = voc_splits(voc, 48)
    few = train.subset(4)
    assert [path.stem for path in few.images] == ["train0", "train10", "train20", "train30"]
    assert [path.stem for path in few.masks] == [path.stem for path in few.images]
    assert (few.classes, len(train), len(train.subset(99))) == (train.classes, 40, 40)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no scenes"),
        (["--data", "VOC", "--memory-size", "0"], "--memory-size 0: must be more than 0"),
        (["--data", "no"], "not in Pascal"),
    ],
)
def test_wrong_options_are_refused(run, voc, options, message):  # noqa: F811
    with pytest.raises(UserError, match=message):
        main(["retrieval_seg", str(run), *(str(voc) if option == "VOC" else option for option in options)])
