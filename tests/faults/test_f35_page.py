"""F35, the page and the comparison: what is said of a run without labels, what a comparison checks first and prints, and
what a phone shows."""

import json
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_program, write_config
from pictures import tree
from test_eval_html import browser, open_page  # noqa: F401 - a fixture

from eval import __main__ as commands
from eval import features
from eval.html import page
from eval.tables import measure_rows
from eval.unlabeled import effective_rank
from model.weights.timm_hub import check_timm
from runtime.errors import UserError
from runtime.metrics import read_jsonl
from tests.runs import write_run

NAME = "vit_small_patch16_224.dino"  # timm's

# --------------------------------------------------------------------------------------------- a run without labels


@pytest.fixture(scope="module")
def unlabeled(photos, tmp_path_factory) -> Path:
    """A run on photos without classes, with all that `make pretrain` makes of it."""
    folder = tmp_path_factory.mktemp("unlabeled")
    run_program("-m", "tools.make_shards", "make", photos, folder / "shards", "--labels", "no", "--processes", "1")
    run_program("train.py", write_config(folder / "run.yaml", folder / "shards", folder / "run"))
    run_program("-m", "tools.finish_run", folder / "run", "--skip-existing")
    return folder / "run"


@pytest.mark.fault("F35")
def test_no_table_of_dashes(unlabeled):
    html = (unlabeled / "report.html").read_text()
    results = html[html.index("<h2>Results") : html.index("<h2>Learning")]
    assert "<table>" not in results
    assert "k-NN cannot be measured: these shards have no classes" in results
    assert "mIoU cannot be measured: no scenes to segment (--data FOLDER, or eval.voc in the config)" in results


@pytest.mark.fault("F35")
def test_the_collapse_check_is_on_the_page(unlabeled):
    html = (unlabeled / "report.html").read_text()
    assert re.search(r"Collapse check: passed\. The teacher&#x27;s probabilities have an entropy of [\d.]+ nats; 0 or "
                     r"log K = 3\.69 would be a collapse\.", html)  # fmt: skip


@pytest.mark.fault("F35")
def test_the_effective_rank_is_a_curve_and_a_figure(unlabeled):
    rows = [row for row in read_jsonl(unlabeled / "metrics.jsonl") if "effective_rank" in row]
    assert [row["step"] for row in rows] == list(range(2, 21, 2))  # 20 steps: at every row of the log
    assert all(1 <= row["effective_rank"] <= 15 for row in rows)  # of a batch of 16
    html = (unlabeled / "report.html").read_text()
    assert "<figcaption>Effective rank of the features</figcaption>" in html
    results = json.loads((unlabeled / "results.json").read_text())
    assert 1 <= results["effective_rank"] <= 24 != results["untrained"]["effective_rank"]
    ranks = f"{results['effective_rank']:.1f} trained, {results['untrained']['effective_rank']:.1f} untrained"
    assert f"Effective rank of [CLS]: {ranks}" in html


@pytest.mark.fault("F35")
def test_nearest_neighbors_are_on_the_page(unlabeled):
    html = (unlabeled / "report.html").read_text()
    assert "Photos, each beside those that the network finds most similar to it</figcaption>" in html
    assert (unlabeled / "pictures" / "neighbors.png").is_file()


@pytest.mark.fast
@pytest.mark.fault("F35")
def test_a_collapse_and_a_missing_evaluation_are_told(tiny_shards, tmp_path):
    run = write_run(tmp_path / "run", tiny_shards)
    rows = [{"step": step, "epoch": step / 10, "teacher_entropy": 3.688} for step in range(1, 8)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    html = page(run)
    assert "Collapse check: the teacher has collapsed. Its probabilities have an entropy of 3.69 nats, close to" in html
    assert f"not evaluated yet: `make eval RUN={run}`" in html


def test_the_effective_rank_by_hand():
    torch.manual_seed(0)
    directions, _ = torch.linalg.qr(torch.randn(8, 3))
    points = torch.linalg.qr(torch.randn(50, 3) - torch.randn(50, 3).mean(0))[0]
    points = torch.linalg.qr(points - points.mean(0))[0]  # three equal singular values, centered
    assert effective_rank(points @ directions.T) == pytest.approx(3, abs=0.05)
    assert effective_rank(7 + points[:, :1] @ directions.T[:1]) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.full((50, 8), 0.3)) == 0
    assert math.isnan(effective_rank(points.index_fill(0, torch.tensor(3), torch.inf)))  # overflowed, not an error
    a, b = 2.0, 1.0  # two singular values of 2 : 1
    expected = np.exp(-(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3)))
    assert effective_rank(points[:, :2] * torch.tensor([a, b])) == pytest.approx(expected, abs=0.02)


# ------------------------------------------------------------------------------------------------------- comparison


@pytest.fixture
def silent_hub(tmp_path, monkeypatch) -> Path:
    """No address of timm's hub answers (its client would try again for a minute); the hub's cache, which is empty."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.fault("F35")
def test_a_name_of_timm_fails_before_anything_is_loaded(tiny_shards, tmp_path, monkeypatch, silent_hub):
    run = write_run(tmp_path / "run", tiny_shards)
    monkeypatch.setattr("model.weights.load_backbone", lambda *_, **__: pytest.fail("a network was loaded"))
    start = time.perf_counter()
    with pytest.raises(UserError) as refused:
        commands.main(["compare", str(run), f"timm:{NAME}", "--measures", "knn"])
    assert time.perf_counter() - start < 20  # less than a second, and what the machine is busy with
    assert str(refused.value).startswith(
        f"timm:{NAME}: its weights are not in the cache ({silent_hub}) and http://127.0.0.1:9 does not answer ("
    )


@pytest.mark.fault("F35")
def test_weights_of_timm_in_the_cache_need_no_network(silent_hub):
    repository = silent_hub / f"models--timm--{NAME}"
    tree(repository, {"refs/main": b"0", "snapshots/0/model.safetensors": b""})
    check_timm(NAME)


@pytest.mark.fast
@pytest.mark.fault("F35")
def test_every_network_is_checked_before_any_is_loaded(tiny_shards, tmp_path, monkeypatch):
    run, empty = write_run(tmp_path / "run", tiny_shards), tmp_path / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_text((run / "config.yaml").read_text())
    monkeypatch.setattr("model.weights.load_backbone", lambda *_, **__: pytest.fail("a network was loaded"))
    with pytest.raises(UserError, match=f"{empty}: a run without a checkpoint"):
        commands.main(["compare", str(run), str(empty), "--measures", "knn"])


@pytest.mark.fast
@pytest.mark.fault("F35")
def test_progress_is_told_to_a_file(tiny_shards, tmp_path, capfd, monkeypatch):
    run = write_run(tmp_path / "run", tiny_shards)
    monkeypatch.setattr(features, "LINE_SECONDS", -1)
    monkeypatch.setattr("eval.features.batches", slow(features.batches))
    assert commands.main(["compare", str(run), "--untrained", "--measures", "knn"]) == 0
    out, _ = capfd.readouterr()
    assert "1 of 2: knn of run …\n" in out
    assert "2 of 2: knn of run, untrained …\n" in out
    lines = list(features.progress_bar(range(3), 3, "photos"))
    assert lines == [0, 1, 2]
    assert re.findall(r"  photos: (\d of 3), \d+ s left\n", capfd.readouterr().err) == ["1 of 3", "2 of 3"]


def slow(batches):
    """The same with batches of a few photos, so that there are several."""
    return lambda photos, batch, *rest, **options: batches(photos, 8, *rest, **options)


@pytest.mark.fast
@pytest.mark.fault("F35")
def test_what_cannot_be_measured_is_told_from_what_was_not_yet(tiny_shards, tmp_path, capsys):
    run = write_run(tmp_path / "run", tiny_shards)
    assert commands.main(["compare", str(run), "--measures", "knn,retrieval_seg"]) == 0
    reason = "no scenes to segment (--data FOLDER, or eval.voc in the config)"
    results = json.loads((run / "measures.json").read_text())
    assert results["skipped"] == {"retrieval_seg": reason}
    assert f"retrieval_seg cannot be measured: {reason}\n" in capsys.readouterr().out
    assert f"retrieval_seg cannot be measured: {reason}\n" in (run / "measures.md").read_text()
    results["measures"] = ["knn", "linear", "retrieval_seg"]  # as a stopped comparison leaves it
    labels = {label: cells for label, cells, _ in measure_rows(results)}
    assert labels["linear top-1, best probe"] == ["not yet"]
    assert "segmentation by retrieval, mIoU" not in labels
    (run / "measures.json").write_text(json.dumps(results))
    html = page(run)
    assert ">not yet</td>" in html
    assert f"retrieval_seg cannot be measured: {reason}" in html


# ----------------------------------------------------------------------------------------------------------- a phone


@pytest.fixture(scope="module")
def wide(unlabeled) -> Path:
    """The page of that run with tables of many and long columns."""
    networks = {f"a_network_with_a_long_name_{n}": {"path": "x" * 90, "knn_top1": 50.0 + n} for n in range(5)}
    (unlabeled / "measures.json").write_text(json.dumps({"networks": networks}))
    rows = [{"time": f"2026-01-0{n}", "what": "knn", "network": "y" * 90, "top1": 12.5} for n in range(1, 7)]
    (unlabeled / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert commands.main(["html", str(unlabeled)]) == 0
    return unlabeled / "report.html"


@pytest.mark.fault("F35")
@pytest.mark.parametrize("width", [320, 390])
def test_no_table_is_cut_on_a_phone(browser, wide, width):  # noqa: F811
    open_page(browser, wide, width)
    cut = """return [...document.querySelectorAll('.scroll, table, td')].filter(e => e.scrollWidth > e.clientWidth + 1
        || e.getBoundingClientRect().right > window.innerWidth).map(e => e.outerHTML.slice(0, 90))"""
    assert browser.execute_script(cut) == []
    named = "return getComputedStyle(document.querySelector('td.n:not(:first-child)'), '::before').content"
    assert browser.execute_script(named) == '"a_network_with_a_long_name_0"'


@pytest.mark.fault("F35")
def test_a_picture_opens_at_its_full_size(browser, wide):  # noqa: F811
    open_page(browser, wide, 390)
    picture = browser.find_element("css selector", ".zoom img")
    shown = "const r = arguments[0].getBoundingClientRect(); return [r.width, arguments[0].naturalWidth]"
    width, natural = browser.execute_script(shown, picture)
    assert width < 390 < natural
    picture.click()
    time.sleep(0.1)
    assert browser.execute_script(shown, picture) == [natural, natural]
    at_corner = "return document.elementFromPoint(2, 2).closest('.full') !== null"
    assert browser.execute_script(at_corner)  # over the page, from edge to edge
    picture.click()
    time.sleep(0.1)
    assert browser.execute_script(shown, picture)[0] == width
