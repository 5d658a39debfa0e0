"""The point probe (eval/points.py): where points are drawn, what it measures, that a token which knows its place wins."""

import math
from shutil import copytree

import numpy as np
import pytest
import torch
from conftest import run_program
from PIL import Image

from eval.attention import attention_weights, distance_from_points
from eval.datasets import VocSegmentation
from eval.features import normalized
from eval.points import draw_points, measure, point_features, ridge_accuracy
from model.vit import ViT
from runtime.errors import UserError


def network(**options) -> ViT:
    torch.manual_seed(0)
    return ViT(width=32, depth=2, heads=2, patch=8, image_size=32, **options).eval()


def test_points_lie_on_the_largest_thing_and_on_the_others():
    masks = torch.zeros(3, 8, 8, dtype=torch.uint8)
    masks[0, :4, :4], masks[0, 6:, 6:], masks[0, 0, 7] = 2, 3, 255
    masks[1, :2] = 5  # one thing: nothing small
    points, labels = draw_points(masks, 5, torch.Generator().manual_seed(0))
    assert points.shape == (3, 10, 2)
    assert labels[0].tolist() == [2] * 5 + [3] * 4 + [-1]  # four pixels only
    assert labels[1].tolist() == [5] * 5 + [-1] * 5
    assert (labels[2] == -1).all()  # nothing but ground
    at = (points * 8).long()
    known = labels >= 0
    scene = torch.arange(3)[:, None].expand_as(labels)
    assert torch.equal(masks[scene[known], at[known][:, 1], at[known][:, 0]].long(), labels[known])


def test_a_patch_token_is_that_under_the_point(scenes):
    """The probe's patch tokens are those of the patches that hold the points, and [CLS] is the scene's."""
    data, net = VocSegmentation(scenes, "val", 32), network()
    found = point_features(net, data, 2, batch=5)
    assert len(found.labels) == 12 * 4
    assert found.small.tolist() == [False, False, True, True] * 12
    by_class = {int(c): found.tokens["patch"][found.labels == c].std(0).mean() for c in found.labels.unique()}
    assert max(by_class.values()) < 0.5  # one color a class; only positions differ
    assert found.tokens["cls"].view(12, 4, -1).std(1).max() == 0


def test_locality_is_seen(scenes):
    """With a narrow prior a reference token reads its patch: it knows small things, its attention is at its point."""
    train, val = VocSegmentation(scenes, "train", 32), VocSegmentation(scenes, "val", 32)
    wide, local = measure(network(), train, val), measure(network(locality=0.3), train, val)
    assert local.distance < 0.6 < wide.distance
    assert local.entropy < wide.entropy <= math.log(16) + 1e-6
    assert local.knn["small"]["reference"] > wide.knn["small"]["reference"]
    assert local.knn["small"]["cls"] == wide.knn["small"]["cls"]
    assert 0 < wide.within < 1


def test_ridge_names_what_is_linear():
    torch.manual_seed(0)
    x = torch.randn(200, 6)
    labels = (x[:, 2] > 0).long()
    assert ridge_accuracy(x[:150], labels[:150], x[150:], labels[150:], 2).double().mean() > 0.9
    assert ridge_accuracy(x[:1], labels[:1], x[:1], labels[:1], 2).all()  # one point has no deviation
    shuffled = labels[torch.randperm(200)]
    assert ridge_accuracy(x[:150], shuffled[:150], x[150:], shuffled[150:], 2).double().mean() < 0.75


def test_attention_of_a_batch_is_that_of_each_image():
    net, images, points = network(locality=0.8), torch.randn(3, 3, 32, 32), torch.rand(3, 2, 2)
    cls, references = attention_weights(net, images, points)
    assert cls.shape == (3, 2, 16)
    assert references.shape == (3, 2, 2, 16)
    for i in range(3):
        one_cls, one = attention_weights(net, images[i : i + 1], points[i : i + 1])
        assert (one_cls[0] - cls[i]).abs().max() < 1e-6
        assert (one[0] - references[i]).abs().max() < 1e-6


def test_scenes_without_small_things(scenes, tmp_path):
    """They are left out of the results; scenes without any thing are refused."""
    folder = copytree(scenes, tmp_path / "one")

    def keep(classes: int) -> tuple[VocSegmentation, VocSegmentation]:
        for path in (folder / "SegmentationClass").iterdir():
            mask = np.array(Image.open(path))
            Image.fromarray(np.where(mask > classes, 0, mask).astype(np.uint8), "L").save(path)
        return VocSegmentation(folder, "train", 32), VocSegmentation(folder, "val", 32)

    assert set(measure(network(), *keep(2)).knn) == {"large"}
    train = VocSegmentation(scenes, "train", 32)
    with pytest.raises(UserError, match="no scene of 'val' has a thing to draw points on"):
        measure(network(), train, keep(0)[1])


def test_only_points_on_things_count(scenes, tmp_path):
    """Scenes of one thing, half of whose points lie anywhere: the figures of attention are those of the other half."""
    folder = copytree(scenes, tmp_path / "one")
    for path in (folder / "SegmentationClass").iterdir():
        mask = np.array(Image.open(path))
        Image.fromarray(np.where(mask == np.bincount(mask[mask > 0]).argmax(), mask, 0).astype(np.uint8)).save(path)
    data, net = VocSegmentation(folder, "val", 32), network(locality=0.8)
    found = point_features(net, data, 2)
    assert not found.small.any()
    images, masks = (torch.stack(x) for x in zip(*(data[i][:2] for i in range(len(data))), strict=True))
    points = draw_points(masks, 2, torch.Generator().manual_seed(0))[0][:, :2]
    pixels = normalized(images, net.pixels)
    tokens = net(pixels, points).references
    weights = attention_weights(net, pixels, points)[1].mean(1)
    assert found.distance == pytest.approx(float(distance_from_points(weights, points, 4, 4).mean()), rel=1e-5)
    within = (tokens - tokens.mean(1, keepdim=True)).square().sum() / (tokens - tokens.mean((0, 1))).square().sum()
    assert found.within == pytest.approx(within.item(), rel=1e-5)


def test_program(scenes, tiny_config, tmp_path):
    run_program("train.py", tiny_config, "optim.epochs=1", "optim.warmup_epochs=0")
    out = run_program("-m", "eval", "points", tmp_path / "run", "--data", scenes, "--untrained").stdout
    assert all(word in out for word in ("reference", "patch token", "[CLS]", "small"))
    assert "of their variance is within a scene" in out
    words = ("-m", "eval", "points", tmp_path / "run", "--data", scenes, "--points", 10_000)
    assert "error: --points 10000: a scene of" in run_program(*words, expect=2).stderr


def test_the_distance_of_attention_is_in_patches():
    weights = torch.zeros(1, 6)
    weights[0, 5] = 0.25  # of 2 x 3 patches the last, whose center is (2.5, 1.5)
    assert distance_from_points(weights, torch.tensor([[0.5 / 3, 0.75]]), 2, 3).tolist() == [2.0]
    weights[0, 3] = 0.75  # and the one that the point lies in
    assert distance_from_points(weights, torch.tensor([[0.5 / 3, 0.75]]), 2, 3).tolist() == [0.5]
