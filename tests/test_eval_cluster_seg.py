"""Clusters of patch tokens: matched as published; standardized, reduced and clustered as defined."""

import json

import numpy as np
import pytest
import torch
from scipy.cluster.vq import kmeans2

from eval.__main__ import main, read_clusters
from eval.cluster_seg import assign, hungarian, kmeans, majority, match_clusters, measure, principal_components
from eval.datasets import VocSegmentation
from eval.miou import confusion, score_of
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
def test_matching_equals_the_published_code_s(oracle, oracle_json, case, match):
    published = oracle("g_leopart")
    truth, clusters = published["oc.gt"], published[f"oc.pred_{case.split('_')[0]}"]
    counts = confusion(truth, clusters, 21, int(clusters.max()) + 1)
    of_cluster = match(counts.numpy())
    assert torch.equal(torch.from_numpy(of_cluster)[clusters], published[f"oc.{case}_reordered"])
    if match is majority:
        assert (of_cluster == 0).mean() == pytest.approx(oracle_json("g_leopart")[f"overcluster_{case}"]["matched_bg"])
    score = score_of(match_clusters(counts, of_cluster))
    assert score.miou == pytest.approx(100 * oracle_json("g_leopart")[f"overcluster_{case}"]["miou"], abs=1e-6)


def test_matching_by_hand():
    counts = np.array([[5, 0, 3, 0], [4, 6, 3, 0]])  # two classes, four clusters, the last one empty
    assert majority(counts).tolist() == [0, 1, 0, 0]  # the lower class among equals, class 0 if empty
    assert hungarian(counts).tolist() == [0, 1, 0, 0]  # clusters without a class get class 0
    merged = match_clusters(torch.from_numpy(counts), majority(counts))
    assert merged.tolist() == [[8, 0], [7, 6]]


def test_components_are_those_of_the_standardized_points():
    torch.manual_seed(0)
    points = torch.randn(300, 6) @ torch.randn(6, 6) + 3
    points[:, 4] = 7  # a constant dimension
    whole = points.double()
    whole = (whole - whole.mean(0)) / whole.std(0, unbiased=False).where(whole.std(0) > 0, 1)
    _, _, directions = torch.linalg.svd(whole, full_matrices=False)
    expected = whole @ directions[:3].T
    components = principal_components(points.clone(), 3).double()
    assert components.shape == (300, 3)
    torch.testing.assert_close(components.abs(), expected.abs(), rtol=1e-3, atol=1e-3)  # up to the sign
    assert (components.var(0).diff() < 0).all()


def test_kmeans_separates_distant_clusters_and_is_deterministic():
    torch.manual_seed(0)
    truth = torch.arange(7).repeat(40)
    points = 10 * torch.randn(7, 5)[truth] + 0.1 * torch.randn(280, 5)
    clusters = kmeans(points, 7, seed=0)
    assert len({(int(a), int(b)) for a, b in zip(truth, clusters, strict=True)}) == 7  # one to one
    assert torch.equal(kmeans(points, 7, seed=0), clusters)
    assert not torch.equal(kmeans(points, 7, seed=1), clusters)  # the same clusters in another order


def test_kmeans_converges_to_a_fixed_point_of_scipy():
    """Starting from our result, scipy's Lloyd iterations change nothing."""
    torch.manual_seed(1)
    points = torch.randn(400, 3)
    clusters = kmeans(points, 8, seed=3, iterations=1000)
    centers = torch.stack([points[clusters == c].mean(0) for c in range(8)])
    theirs, labels = kmeans2(points.double().numpy(), centers.double().numpy(), iter=20, minit="matrix")
    assert np.array_equal(labels, clusters.numpy())
    np.testing.assert_allclose(theirs, centers.numpy(), atol=1e-5)
    nearest, squared = assign(points, centers, rows=7)
    expected = torch.cdist(points, centers)
    assert torch.equal(nearest, expected.argmin(1))
    torch.testing.assert_close(squared, expected.amin(1).square(), rtol=1e-3, atol=1e-4)


def test_no_cluster_stays_empty():
    """Some of the five initial centers are the same point: only the first of them gets any points."""
    torch.manual_seed(0)
    points = torch.cat([torch.full((40, 2), -50.0), 5 + torch.randn(60, 2)])
    for seed in range(5):
        assert len(kmeans(points, 5, seed=seed, tries=1).unique()) == 5


def test_kmeans_works_on_a_sample_of_the_points(monkeypatch):
    monkeypatch.setattr("eval.cluster_seg.POINTS", 5)
    torch.manual_seed(0)
    truth = torch.arange(4).repeat(100)
    points = 10 * torch.eye(4)[truth] + 0.1 * torch.randn(400, 4)
    assert len({(int(a), int(b)) for a, b in zip(truth, kmeans(points, 4, seed=0), strict=True)}) == 4


def test_clusters_find_the_colors(voc, network):  # noqa: F811
    scenes = VocSegmentation(voc, "val", 48)
    many, few = measure(network, scenes, 24, [40, 3], seeds=2)
    assert (many.clusters, many.matching, few.clusters, few.matching) == (40, "majority", 3, "hungarian")
    assert min(many.miou, few.miou) > 60  # colors alone determine the classes; 8-pixel patches blur the borders
    for result in (many, few):
        assert result.spread[0] <= result.miou <= result.spread[1]
        assert result.miou == pytest.approx(np.mean([score.miou for score in result.scores]))


def test_the_command_prints_and_records(run, voc, capsys):  # noqa: F811
    assert main(["cluster_seg", str(run), "--data", str(voc), "--clusters", "30,3", "--seeds", "2"]) == 0
    assert "hungarian" in capsys.readouterr().out
    line = json.loads((run / "evaluations.jsonl").read_text())
    assert (line["what"], line["size"], line["map_size"], line["seeds"], line["classes"]) == (
        "cluster_seg",
        48,
        24,
        2,
        3,
    )
    assert [score["clusters"] for score in line["figures"]] == [30, 3]
    assert len(line["figures"][0]["scores"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no scenes"),
        (["--data", "VOC", "--clusters", "1"], "at least 2"),
        (["--data", "VOC", "--clusters", "many"], "whole numbers separated by commas"),
        (["--data", "VOC", "--clusters", "361"], "--clusters 361: there are only 360 patch tokens"),
        (["--data", "VOC", "--seeds", "0"], "--seeds 0: must be more than 0"),
        (["--data", "VOC", "--split", "vall"], "did you mean 'val'"),
    ],
)
def test_wrong_options_are_refused(run, voc, options, message):  # noqa: F811
    with pytest.raises(UserError, match=message):
        main(["cluster_seg", str(run), *(str(voc) if option == "VOC" else option for option in options)])
    assert read_clusters("500,21") == [500, 21]
