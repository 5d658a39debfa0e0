"""Clusters of patch tokens: matched as published, standardized, reduced and grouped as defined."""

import json

import numpy as np
import pytest
import torch
from scipy.cluster.vq import kmeans2

from eval.cluster_seg import assign, hungarian, kmeans, main, majority, matched, measure, principal, read_clusters
from eval.datasets import VocSegmentation
from eval.miou import confusion, scored
from runtime.errors import UserError
from tests.test_eval_linear_seg import network, painted, run, voc  # noqa: F401 - fixtures


@pytest.mark.parametrize(
    ("case", "match"),
    [
        ("K21_hungarian", hungarian),
        ("K60_hungarian", hungarian),
        ("K21_many_to_one_precision", majority),
        ("K60_many_to_one_precision", majority),
    ],
)
def test_the_published_code_matches_the_same(oracle, oracle_json, case, match):
    told = oracle("g_leopart")
    truth, clusters = told["oc.gt"], told[f"oc.pred_{case.split('_')[0]}"]
    counts = confusion(truth, clusters, 21, int(clusters.max()) + 1)
    of_cluster = match(counts.numpy())
    assert torch.equal(torch.from_numpy(of_cluster)[clusters], told[f"oc.{case}_reordered"])
    if match is majority:
        assert (of_cluster == 0).mean() == pytest.approx(oracle_json("g_leopart")[f"overcluster_{case}"]["matched_bg"])
    score = scored(matched(counts, of_cluster))
    assert score.miou == pytest.approx(100 * oracle_json("g_leopart")[f"overcluster_{case}"]["miou"], abs=1e-6)


def test_matching_by_hand():
    counts = np.array([[5, 0, 3, 0], [4, 6, 3, 0]])  # two classes, four clusters, the last one empty
    assert majority(counts).tolist() == [0, 1, 0, 0]  # the lower class of equals, class 0 for nothing
    assert hungarian(counts).tolist() == [0, 1, 0, 0]  # the others are left over: class 0
    merged = matched(torch.from_numpy(counts), majority(counts))
    assert merged.tolist() == [[8, 0], [7, 6]]


def test_components_are_those_of_the_standardized_points():
    torch.manual_seed(0)
    points = torch.randn(300, 6) @ torch.randn(6, 6) + 3
    points[:, 4] = 7  # a dimension that tells nothing
    whole = points.double()
    whole = (whole - whole.mean(0)) / whole.std(0, unbiased=False).where(whole.std(0) > 0, 1)
    _, _, directions = torch.linalg.svd(whole, full_matrices=False)
    wanted = whole @ directions[:3].T
    made = principal(points.clone(), 3).double()
    assert made.shape == (300, 3)
    torch.testing.assert_close(made.abs(), wanted.abs(), rtol=1e-3, atol=1e-3)  # a direction has no sign
    assert (made.var(0).diff() < 0).all()


def test_kmeans_finds_what_is_apart_and_is_a_function_of_its_seed():
    torch.manual_seed(0)
    truth = torch.arange(7).repeat(40)
    points = 10 * torch.randn(7, 5)[truth] + 0.1 * torch.randn(280, 5)
    found = kmeans(points, 7, seed=0)
    assert len({(int(a), int(b)) for a, b in zip(truth, found, strict=True)}) == 7  # one to one
    assert torch.equal(kmeans(points, 7, seed=0), found)
    assert not torch.equal(kmeans(points, 7, seed=1), found)  # other numbers for the same clusters


def test_kmeans_ends_where_scipys_does():
    """From our answer, another hand's Lloyd iterations move nothing."""
    torch.manual_seed(1)
    points = torch.randn(400, 3)
    found = kmeans(points, 8, seed=3, iterations=1000)
    centers = torch.stack([points[found == c].mean(0) for c in range(8)])
    theirs, labels = kmeans2(points.double().numpy(), centers.double().numpy(), iter=20, minit="matrix")
    assert np.array_equal(labels, found.numpy())
    np.testing.assert_allclose(theirs, centers.numpy(), atol=1e-5)
    nearest, squared = assign(points, centers, rows=7)
    wanted = torch.cdist(points, centers)
    assert torch.equal(nearest, wanted.argmin(1))
    torch.testing.assert_close(squared, wanted.amin(1).square(), rtol=1e-3, atol=1e-4)


def test_no_cluster_stays_empty():
    """Of five points to begin with, some are copies of one: only the first of them would be anybody's nearest."""
    torch.manual_seed(0)
    points = torch.cat([torch.full((40, 2), -50.0), 5 + torch.randn(60, 2)])
    for seed in range(5):
        assert len(kmeans(points, 5, seed=seed, tries=1).unique()) == 5


def test_few_points_of_each_cluster_are_enough(monkeypatch):
    monkeypatch.setattr("eval.cluster_seg.POINTS", 5)
    torch.manual_seed(0)
    truth = torch.arange(4).repeat(100)
    points = 10 * torch.eye(4)[truth] + 0.1 * torch.randn(400, 4)
    assert len({(int(a), int(b)) for a, b in zip(truth, kmeans(points, 4, seed=0), strict=True)}) == 4


def test_colors_fall_into_their_clusters(voc, network):  # noqa: F811
    scenes = VocSegmentation(voc, "val", 48)
    many, few = measure(network, scenes, 24, [40, 3], seeds=2)
    assert (many.clusters, many.matching, few.clusters, few.matching) == (40, "majority", 3, "hungarian")
    assert min(many.miou, few.miou) > 60  # colors alone tell the classes; 8-pixel patches blur their borders
    for figures in (many, few):
        assert figures.spread[0] <= figures.miou <= figures.spread[1]
        assert figures.miou == pytest.approx(np.mean([score.miou for score in figures.scores]))


def test_the_program_tells_and_records(run, voc, capsys):  # noqa: F811
    assert main([str(run), "--data", str(voc), "--clusters", "30,3", "--seeds", "2"]) == 0
    assert "a class each" in capsys.readouterr().out
    line = json.loads((run / "evaluations.jsonl").read_text())
    assert (line["what"], line["size"], line["map_size"], line["seeds"], line["classes"]) == (
        "cluster_seg",
        48,
        24,
        2,
        3,
    )
    assert [one["clusters"] for one in line["figures"]] == [30, 3]
    assert len(line["figures"][0]["scores"]) == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "which scenes"),
        (["--data", "VOC", "--clusters", "1"], "at least 2"),
        (["--data", "VOC", "--clusters", "many"], "whole numbers with commas"),
        (["--data", "VOC", "--clusters", "361"], "361 clusters of 360 patch tokens"),
        (["--data", "VOC", "--seeds", "0"], "--seeds 0: more than 0"),
        (["--data", "VOC", "--split", "vall"], "did you mean 'val'"),
    ],
)
def test_a_wrong_word_is_told(run, voc, words, told):  # noqa: F811
    with pytest.raises(UserError, match=told):
        main([str(run), *(str(voc) if word == "VOC" else word for word in words)])
    assert read_clusters("500,21") == [500, 21]
