"""All measures of several networks side by side: one table, three files, and no measure is lost."""

import json

import pytest
import torch
from PIL import Image

from eval import __main__ as command_line
from eval import cluster_seg, linear, measures
from eval.compare import short_names
from eval.tables import MEASURE_ROWS, mean_over_seeds, measure_markdown, measure_rows
from model.resnet import ResNet
from model.vit import ViT
from model.weights import load_backbone
from runtime.checkpoint import save_backbone
from runtime.errors import UserError
from tests.test_eval_knn import home  # noqa: F401 - a fixture
from tests.test_eval_linear_seg import painted, voc  # noqa: F401 - fixtures


def checkpoint(run, step: int) -> None:
    """A file in the place of a run's checkpoint; its step and hash are read, its tensors are not."""
    network = ViT(width=24, depth=1, heads=2, patch=8, image_size=24)
    save_backbone(run / "checkpoints" / f"checkpoint-{step:08d}.safetensors", network, {"steps": step})


@pytest.fixture
def run(home, voc, tmp_path, monkeypatch):  # noqa: F811
    """A run folder and a backbone file beside it, of small networks; protocols that take seconds."""
    for seed, name in ((0, "run"), (1, "untrained")):
        torch.manual_seed(seed)
        network = ViT(width=24, depth=1, heads=2, patch=8, image_size=24)
        save_backbone(tmp_path / f"{name}.safetensors", network, {"heads": 2})

    def load(path, untrained=False):
        in_run = tmp_path / ("untrained.safetensors" if untrained else "run.safetensors")
        return load_backbone(path if path.is_file() else in_run)

    monkeypatch.setattr("model.weights.load_backbone", load)
    monkeypatch.setattr(linear.Protocol, "for_views", staticmethod(lambda _: linear.Protocol(False, 5, 32)))
    checkpoint(tmp_path / "demo", 1)
    (tmp_path / "demo" / "config.yaml").write_text(
        f"data: {{shards: {home / 'shards'}, holdout: 0.2, views: [{{count: 2, size: 24, teacher: true}}]}}\n"
        "model: {arch: custom, width: 24, depth: 1, heads: 2, patch: 8}\noptim: {global_batch_size: 8}\n"
        f"eval: {{voc: {voc}, seg_epochs: 2, seg_lr: 0.5, k: 5}}\n"
    )
    return tmp_path / "demo"


def main(options: list[str]) -> int:
    return command_line.main(["compare", *options])


def test_one_command_makes_one_table(run, monkeypatch, capsys):
    real = cluster_seg.measure
    monkeypatch.setattr(cluster_seg, "measure", lambda n, s, m, k, **options: real(n, s, m, [50, k[1]], **options))
    other = run.parent / "run.safetensors"
    assert main([str(run), str(other), "--untrained", "--seeds", "1", "--limit", "60"]) == 0
    results = json.loads((run / "measures.json").read_text())
    assert list(results["networks"]) == ["demo", "demo, untrained", "run"]
    demo, untrained, same = results["networks"].values()
    rows = [key for key in MEASURE_ROWS if not key.endswith("_small")]  # these scenes have one thing each
    assert set(rows) <= set(demo)
    for key in rows:
        assert 0 < demo[key] <= 100
        assert demo[key] == pytest.approx(same[key]), key  # the same weights, the same photos and scenes
    assert any(demo[key] != untrained[key] for key in rows)
    assert results["settings"]["source"] == str(run)
    lines = (run / "measures.md").read_text().splitlines()
    assert lines[0] == "| % | demo | demo, untrained | run |"
    assert len(lines) == 2 + len(rows)
    assert all(f"{demo[key]:.2f}" in line for key, line in zip(rows, lines[2:], strict=True))
    with Image.open(run / "measures.png") as picture:
        assert len(picture.convert("L").getcolors()) > 20  # text, antialiased
    screen = capsys.readouterr().out
    assert all(word in screen for word in ("k-NN top-1, [CLS]", "segmentation by retrieval", "written to"))


def test_measures_are_kept_when_the_next_measure_fails(run, monkeypatch):
    def fails(*_):
        raise UserError("the scenes are damaged")

    monkeypatch.setitem(measures.MEASURES, "linear_seg", fails)
    with pytest.raises(UserError, match="the scenes are damaged"):
        main([str(run), "--measures", "knn,linear_seg"])
    assert json.loads((run / "measures.json").read_text())["networks"]["demo"]["knn_top1"] > 50


def test_measures_without_data_are_reported_and_skipped(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([str(run.parent / "run.safetensors"), "--measures", "knn,retrieval_seg"]) == 0
    screen = capsys.readouterr().out
    assert "knn cannot be measured: no photos (--train SHARDS --val SHARDS" in screen
    assert "retrieval_seg cannot be measured: no scenes to segment (--data FOLDER" in screen
    assert "nothing was measured" in screen
    assert not (tmp_path / "evaluation").exists()


def test_the_best_of_a_row_is_marked_and_the_spread_is_shown():
    networks = {
        "a": {"knn_top1": 50.0, "cluster_seg_miou": 9.0, "spread": {"cluster_seg_miou": [8.0, 10.0]}},
        "b": {"knn_top1": 60.0, "linear_top1": 7.0},
    }
    rows = measure_rows({"networks": networks})
    assert rows == [
        (MEASURE_ROWS["knn_top1"], ["50.00", "60.00"], 1),
        (MEASURE_ROWS["linear_top1"], ["not yet", "7.00"], None),  # a single value is not marked
        (MEASURE_ROWS["cluster_seg_miou"], ["9.00 (8.0 – 10.0)", "not yet"], None),
    ]
    assert "| k-NN top-1, [CLS] | 50.00 | **60.00** |" in measure_markdown({"networks": networks})


def test_seeds_share_a_column_on_request():
    networks = {
        "dino-0": {"knn_top1": 50.0, "linear_top1": 7.0, "spread": {"cluster_seg_miou": [8.0, 10.0]}},
        "dino-0, untrained": {"knn_top1": 20.0},
        "dino-12": {"knn_top1": 53.0, "spread": {}},
        "dino-12, untrained": {"knn_top1": 24.0},
        "224": {"knn_top1": 9.0},  # only a number: not a seed
    }
    means = mean_over_seeds(networks)
    assert {name: column.get("of", 1) for name, column in means.items()} == {"dino": 2, "dino, untrained": 2, "224": 1}
    assert means["dino"]["knn_top1"] == 51.5
    assert "linear_top1" not in means["dino"]  # one of the two lacks it
    assert measure_rows({"networks": networks, "means": means}) == [
        (MEASURE_ROWS["knn_top1"], ["51.50 (50.0 – 53.0)", "22.00 (20.0 – 24.0)", "9.00"], 0)
    ]


def test_the_mean_over_seeds_is_written(run):
    other = run.rename(run.with_name("run-1"))
    assert main([str(other), str(run.parent / "run.safetensors"), "--measures", "knn", "--aggregate-seeds"]) == 0
    results = json.loads((other / "measures.json").read_text())
    assert list(results["networks"]) == ["run-1", "run"]
    assert results["means"]["run"]["of"] == 2
    assert (other / "measures.md").read_text().startswith("| % | run |\n")


def test_existing_measures_are_not_taken_again_on_request(run, monkeypatch):
    calls: list[str] = []

    def knn(network, _):
        calls.append("knn")
        return {"knn_top1": 50.0 + len(calls)}

    monkeypatch.setitem(measures.MEASURES, "knn", knn)
    monkeypatch.setitem(measures.MEASURES, "linear", lambda *_: {"linear_top1": 9.0})
    options = [str(run), "--measures", "knn,linear"]
    assert main([*options[:2], "knn"]) == 0
    assert main([*options, "--skip-existing", "--aggregate-seeds"]) == 0
    column = json.loads((run / "measures.json").read_text())["networks"]["demo"]
    assert (column["knn_top1"], column["linear_top1"], len(calls)) == (51.0, 9.0, 1)
    assert main([*options, "--skip-existing", "--limit", "7"]) == 0  # other settings
    assert len(calls) == 2
    checkpoint(run, 9)  # the run was trained further
    assert main([*options, "--skip-existing", "--limit", "7"]) == 0
    assert len(calls) == 3
    (run / "measures.json").write_text('{"networks": {"de')  # cut off
    assert main([*options, "--skip-existing", "--limit", "7"]) == 0
    assert len(calls) == 4


def test_equal_untrained_networks_are_measured_once(run, capsys):
    other = run.with_name("dino")
    checkpoint(other, 1)
    (other / "config.yaml").write_text((run / "config.yaml").read_text())
    assert main([str(run), str(other), "--untrained", "--measures", "knn", "--limit", "20"]) == 0
    networks = json.loads((run / "measures.json").read_text())["networks"]
    assert list(networks) == ["demo", "demo, untrained", "dino"]
    assert "dino, untrained: the same network as demo, untrained" in capsys.readouterr().out


def test_a_resnet_beside_a_vit(run, capsys):
    """The dense protocols on its last map; k-NN on its mean; no probe of reference tokens, which it does not have."""
    torch.manual_seed(0)
    resnet = ResNet((1, 1, 1, 1), (4, 8, 16, 32), 64)
    save_backbone(run.parent / "resnet.safetensors", resnet, resnet.about())
    options = [str(run), str(run.parent / "resnet.safetensors"), "--measures", "knn,linear_seg,retrieval_seg,points"]
    assert main(options) == 0
    results = json.loads((run / "measures.json").read_text())
    vit, column = results["networks"].values()
    assert column["knn_top1"] == column["knn_top1_patches"] > 0  # both are the mean of its map
    assert all(0 < column[key] <= 100 for key in ("linear_seg_miou", "retrieval_seg_miou"))
    assert column["skipped"] == {"points": "a ResNet has no reference tokens"}
    assert "points_patch_large" in vit
    page = (run / "measures.md").read_text()
    assert f"| {MEASURE_ROWS['points_patch_large']} | {vit['points_patch_large']:.2f} | – |" in page
    assert "points cannot be measured: resnet: a ResNet has no reference tokens" in capsys.readouterr().out
    assert main([options[1], "--measures", "points", "--data", results["settings"]["data"]]) == 0
    assert "nothing was measured" in capsys.readouterr().out


def test_untrained_networks_alone(run, monkeypatch):
    monkeypatch.setitem(measures.MEASURES, "knn", lambda *_: {"knn_top1": 9.0})
    assert main([str(run), "--measures", "knn", "--only-untrained"]) == 0
    assert list(json.loads((run / "measures.json").read_text())["networks"]) == ["demo, untrained"]
    with pytest.raises(UserError, match="--untrained needs a run folder"):
        main([str(run.parent / "run.safetensors"), "--measures", "knn", "--only-untrained"])


def test_another_size_is_measured_again(run):
    """--skip-existing keeps the measures of the same size only."""
    measured = []
    for words in ([], ["--size", "32"], ["--size", "32"], ["--size", "24"]):
        assert main([str(run), "--measures", "knn", "--skip-existing", *words]) == 0
        column = json.loads((run / "measures.json").read_text())["networks"]["demo"]
        measured.append((column["image_size"], column["knn_top1"], column["knn_seconds"]))
    assert [size for size, *_ in measured] == [24, 32, 32, 24]
    assert measured[1] == measured[2]
    assert measured[3][1] == measured[0][1]


def test_names_are_short_if_they_stay_unique():
    assert short_names(["runs/demo", "w/dino.pth", "timm:vit_x.dino"]) == ["demo", "dino", "timm:vit_x.dino"]
    assert short_names(["a/b.pth", "c/b.pth"]) == ["a/b.pth", "c/b.pth"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--measures", "knn,retrieval"], "did you mean 'retrieval_seg'"),
        (["--seeds", "0"], "--seeds 0: must be more than 0"),
        (["--size", "30"], "size 30: not a multiple of the patch size 8; the nearest is 32"),
        (["--size", "24x32"], "--size 24x32: this measure is defined on squares: one number, as in --size 32"),
        (["RUN"], "given more than once"),
        (["RUN/"], "given more than once"),
        (["--out", "README.md/x"], "--out README.md/x: nothing can be written there .*README.md is no folder"),
        (["nowhere.pth"], "nowhere.pth: no such run"),
        (["--data", "nowhere"], "nowhere: not in Pascal VOC's layout"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_measured(run, options, message):
    with pytest.raises(UserError, match=message):
        main([str(run), *(option.replace("RUN", str(run)) for option in options)])
    assert not (run / "measures.json").exists()


def test_a_run_that_continued_is_shown_before_and_after(run, monkeypatch, capsys):
    """By itself, under the name of the file; one line if the file is gone, an error if it was asked for."""
    monkeypatch.setitem(measures.MEASURES, "knn", lambda *_: {"knn_top1": 9.0})
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("patch: 8}", f"patch: 8, init: {run.parent / 'dino.pth'}}}"))
    options = [str(run), "--measures", "knn"]
    assert main(options) == 0
    networks = json.loads((run / "measures.json").read_text())["networks"]
    assert {name: column["untrained"] for name, column in networks.items()} == {
        "demo": False, "demo, start: dino.pth": True,
    }  # fmt: skip
    assert main([*options, "--only-trained"]) == 0
    assert list(json.loads((run / "measures.json").read_text())["networks"]) == ["demo"]
    (run.parent / "untrained.safetensors").unlink()  # what the fixture loads for it
    capsys.readouterr()
    assert main(options) == 0
    assert list(json.loads((run / "measures.json").read_text())["networks"]) == ["demo"]
    assert "demo, start: dino.pth: left out, the weights cannot be loaded (" in capsys.readouterr().out
    with pytest.raises(UserError, match="no such file"):
        main([*options, "--untrained"])
