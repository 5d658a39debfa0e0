"""All measures of several networks, side by side: one table, three files, nothing lost."""

import json

import pytest
import torch
from PIL import Image

from eval import compare as every
from eval.compare import labels_of, main, markdown_of, means_of, rows_of
from model.vit import ViT
from model.weights import load_backbone
from runtime.checkpoint import save_backbone
from runtime.errors import UserError
from tests.test_eval_knn import home  # noqa: F401 - a fixture
from tests.test_eval_linear_seg import painted, voc  # noqa: F401 - fixtures


@pytest.fixture
def run(home, voc, tmp_path, monkeypatch):  # noqa: F811
    """A run folder and a backbone file beside it, of small networks; protocols shortened to what seconds allow."""
    for seed, name in ((0, "run"), (1, "untrained")):
        torch.manual_seed(seed)
        network = ViT(width=24, depth=1, heads=2, patch=8, image_size=24)
        save_backbone(tmp_path / f"{name}.safetensors", network, {"heads": 2})

    def load(path, untrained=False):
        in_run = tmp_path / ("untrained.safetensors" if untrained else "run.safetensors")
        return load_backbone(path if path.is_file() else in_run)

    monkeypatch.setattr("eval.target.load_backbone", load)
    monkeypatch.setattr(every.linear.Protocol, "for_views", staticmethod(lambda _: every.linear.Protocol(False, 5, 32)))
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "config.yaml").write_text(
        f"data: {{shards: {home / 'shards'}, holdout: 0.2, views: [{{count: 2, size: 24, teacher: true}}]}}\n"
        "model: {arch: custom, width: 24, depth: 1, heads: 2, patch: 8}\noptim: {global_batch_size: 8}\n"
        f"eval: {{voc: {voc}, seg_epochs: 2, seg_lr: 0.5, k: 5}}\n"
    )
    return tmp_path / "demo"


def test_one_command_one_table(run, monkeypatch, capsys):
    real = every.cluster_seg.measure
    monkeypatch.setattr(every.cluster_seg, "measure", lambda n, s, m, k, **how: real(n, s, m, [50, k[1]], **how))
    other = run.parent / "run.safetensors"
    assert main([str(run), str(other), "--untrained", "--seeds", "1", "--limit", "60"]) == 0
    results = json.loads((run / "measures.json").read_text())
    assert list(results["networks"]) == ["demo", "demo, untrained", "run"]
    demo, untrained, same = results["networks"].values()
    assert set(every.ROWS) <= set(demo)
    for key in every.ROWS:
        assert 0 < demo[key] <= 100
        assert demo[key] == pytest.approx(same[key]), key  # the same weights, asked about the run's photos and scenes
    assert any(demo[key] != untrained[key] for key in every.ROWS)
    assert results["settings"]["source"] == str(run)
    lines = (run / "measures.md").read_text().splitlines()
    assert lines[0] == "| % | demo | demo, untrained | run |"
    assert len(lines) == 2 + len(every.ROWS)
    assert all(f"{demo[key]:.2f}" in line for key, line in zip(every.ROWS, lines[2:], strict=True))
    with Image.open(run / "measures.png") as picture:
        assert len(picture.convert("L").getcolors()) > 20  # letters on a ground
    screen = capsys.readouterr().out
    assert all(word in screen for word in ("k-NN top-1, [CLS]", "segmentation by retrieval", "written to"))


def test_what_is_measured_is_kept_when_the_next_measure_fails(run, monkeypatch):
    def fails(*_):
        raise UserError("the scenes are damaged")

    monkeypatch.setitem(every.MEASURES, "linear_seg", fails)
    with pytest.raises(UserError, match="the scenes are damaged"):
        main([str(run), "--measures", "knn,linear_seg"])
    assert json.loads((run / "measures.json").read_text())["networks"]["demo"]["knn_top1"] > 50


def test_what_cannot_be_asked_is_said_and_left_out(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([str(run.parent / "run.safetensors"), "--measures", "knn,retrieval_seg"]) == 0
    screen = capsys.readouterr().out
    assert "no photos (--bank SHARDS --val SHARDS" in screen
    assert "retrieval_seg skipped: no scenes to segment (--data FOLDER" in screen
    assert "nothing was measured" in screen
    assert not (tmp_path / "evaluation").exists()


def test_the_best_of_a_row_is_marked_and_a_spread_is_told():
    networks = {
        "a": {"knn_top1": 50.0, "cluster_seg_miou": 9.0, "spread": {"cluster_seg_miou": [8.0, 10.0]}},
        "b": {"knn_top1": 60.0, "linear_top1": 7.0},
    }
    rows = rows_of({"networks": networks})
    assert rows == [
        (every.ROWS["knn_top1"], ["50.00", "60.00"], 1),
        (every.ROWS["linear_top1"], ["–", "7.00"], None),  # alone is not best
        (every.ROWS["cluster_seg_miou"], ["9.00 (8.0 – 10.0)", "–"], None),
    ]
    assert "| k-NN top-1, [CLS] | 50.00 | **60.00** |" in markdown_of({"networks": networks})


def test_seeds_share_a_column_where_that_is_asked():
    networks = {
        "dino-0": {"knn_top1": 50.0, "linear_top1": 7.0, "spread": {"cluster_seg_miou": [8.0, 10.0]}},
        "dino-0, untrained": {"knn_top1": 20.0},
        "dino-12": {"knn_top1": 53.0, "spread": {}},
        "dino-12, untrained": {"knn_top1": 24.0},
        "224": {"knn_top1": 9.0},  # nothing but a number: a name
    }
    means = means_of(networks)
    assert {name: column.get("of", 1) for name, column in means.items()} == {"dino": 2, "dino, untrained": 2, "224": 1}
    assert means["dino"]["knn_top1"] == 51.5
    assert "linear_top1" not in means["dino"]  # one of the two lacks it
    assert rows_of({"networks": networks, "means": means}) == [
        (every.ROWS["knn_top1"], ["51.50 (50.0 – 53.0)", "22.00 (20.0 – 24.0)", "9.00"], 0)
    ]


def test_the_mean_of_runs_is_written(run):
    other = run.rename(run.with_name("run-1"))
    assert main([str(other), str(run.parent / "run.safetensors"), "--measures", "knn", "--aggregate-seeds"]) == 0
    results = json.loads((other / "measures.json").read_text())
    assert list(results["networks"]) == ["run-1", "run"]
    assert results["means"]["run"]["of"] == 2
    assert (other / "measures.md").read_text().startswith("| % | run |\n")


def test_what_is_measured_is_not_measured_again_where_that_is_asked(run, monkeypatch):
    asked: list[str] = []

    def knn(network, _):
        asked.append("knn")
        return {"knn_top1": 50.0 + len(asked)}

    monkeypatch.setitem(every.MEASURES, "knn", knn)
    monkeypatch.setitem(every.MEASURES, "linear", lambda *_: {"linear_top1": 9.0})
    words = [str(run), "--measures", "knn,linear"]
    assert main([*words[:2], "knn"]) == 0
    assert main([*words, "--skip-existing", "--aggregate-seeds"]) == 0
    figures = json.loads((run / "measures.json").read_text())["networks"]["demo"]
    assert (figures["knn_top1"], figures["linear_top1"], len(asked)) == (51.0, 9.0, 1)
    assert main([*words, "--skip-existing", "--limit", "7"]) == 0  # asked in another way
    assert len(asked) == 2
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "checkpoint-00000009.safetensors").touch()  # the run has gone on
    assert main([*words, "--skip-existing", "--limit", "7"]) == 0
    assert len(asked) == 3
    (run / "measures.json").write_text('{"networks": {"de')  # cut off
    assert main([*words, "--skip-existing", "--limit", "7"]) == 0
    assert len(asked) == 4


def test_the_same_beginning_is_measured_once(run, capsys):
    other = run.with_name("dino")
    other.mkdir()
    (other / "config.yaml").write_text((run / "config.yaml").read_text())
    assert main([str(run), str(other), "--untrained", "--measures", "knn", "--limit", "20"]) == 0
    told = json.loads((run / "measures.json").read_text())["networks"]
    assert list(told) == ["demo", "demo, untrained", "dino"]
    assert "dino, untrained: the same network as demo, untrained" in capsys.readouterr().out


def test_names_are_short_where_that_is_enough():
    assert labels_of(["runs/demo", "w/dino.pth", "timm:vit_x.dino"]) == ["demo", "dino", "timm:vit_x.dino"]
    assert labels_of(["a/b.pth", "c/b.pth"]) == ["a/b.pth", "c/b.pth"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--measures", "knn,retrieval"], "did you mean 'retrieval_seg'"),
        (["--seeds", "0"], "--seeds 0: more than 0"),
        (["RUN"], "named twice"),
        (["RUN/"], "named twice"),
        (["--out", "README.md/x"], "--out README.md/x: .*README.md is no folder that can be written to"),
        (["nowhere.pth"], "nowhere.pth: no such run"),
        (["--data", "nowhere"], "nowhere: not in Pascal VOC's layout"),
    ],
)
def test_a_wrong_word_is_told_before_anything_is_measured(run, words, told):
    with pytest.raises(UserError, match=told):
        main([str(run), *(word.replace("RUN", str(run)) for word in words)])
    assert not (run / "measures.json").exists()
