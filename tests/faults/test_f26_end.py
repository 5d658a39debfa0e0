"""F26: what the end of a run needs is opened in its first seconds: photos, classes, scenes, the files that it writes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import run_program
from PIL import Image

import train
from eval.__main__ import main as evaluate
from runtime.config import load_config
from runtime.errors import UserError
from runtime.summary import describe_end


def write_photos(folder: Path, **classes: int) -> Path:
    """So many noisy photos of each class."""
    rng = np.random.default_rng(1)
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for n in range(count):
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(folder / name / f"{n}.jpg")
    return folder


@pytest.fixture(scope="module")
def val(tmp_path_factory) -> Path:
    """Shards of photos of a known class, and of two that tiny_shards do not have."""
    folder = tmp_path_factory.mktemp("val")
    photos = write_photos(folder / "photos", ash=6, birhc=2, oak=2)
    run_program("-m", "tools.make_shards", "make", photos, folder / "shards", "--processes", "1")
    return folder / "shards"


@pytest.fixture
def voc(tmp_path) -> Path:
    """A folder in Pascal VOC's layout: three scenes to train on, one to test on."""
    folder = tmp_path / "voc"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    for split, scenes in {"train": "abc", "val": "d"}.items():
        (folder / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(scenes) + "\n")
        for scene in scenes:
            Image.new("RGB", (48, 48)).save(folder / f"JPEGImages/{scene}.jpg")
            mask = Image.new("L", (48, 48))
            mask.paste(1, (10, 10, 30, 30))
            mask.save(folder / f"SegmentationClass/{scene}.png")
    return folder


def dry_run(config: Path, *words: str) -> None:
    """`train.py --dry-run` in this process."""
    train.train(load_config(config, words, processes=1), dry_run=True)


def without(path: Path) -> Path:
    path.unlink()
    return path


MISSING = {  # what: (words, what is made or removed before, parts of the message)
    "no validation shards": ("data.val={shards}x", None, ["data.val: {shards}x: no such folder, did you mean '{shards}'"]),
    "photos as validation shards": (
        "data.val={photos}", None,
        ["{photos}: photos, not shards; `make shards SRC={photos} DST={photos}-shards`"],
    ),
    "a validation shard is gone": (
        "data.val={copy}", lambda f: without(next(f["copy"].glob("*.tar"))), ["is missing, the manifest says"],
    ),
    "classes that only the validation set has": (
        "data.val={val}", None,
        ["{val}: 2 classes that {shards} does not have: 'birhc', 'oak'", "eval.ignore_classes=[birhc,oak]"],
    ),
    "a class to ignore that there is not": (
        "data.val={val} eval.ignore_classes=[birhc,oka]", None,
        ["'oka' is to be left out, but no class of {shards} or {val} has this name", "did you mean 'oak'?"],
    ),
    "no scenes": ("eval.voc={voc}2", None, ["eval.voc: {voc}2: no such folder, did you mean '{voc}'", "eval.voc=null"]),
    "no layout of scenes": ("eval.voc={photos}", None, ["{photos}: not in Pascal VOC's layout"]),
    "no split of scenes": (
        "eval.voc={voc}", lambda f: without(f["voc"] / "ImageSets/Segmentation/val.txt"), ["no split 'val'"],
    ),
    "an image is gone": (
        "eval.voc={voc}", lambda f: without(f["voc"] / "JPEGImages/d.jpg"),
        ["val.txt, line 1: no image of 'd' in {voc}/JPEGImages"],
    ),
    "a mask is gone": (
        "eval.voc={voc}", lambda f: without(f["voc"] / "SegmentationClass/b.png"),
        ["train.txt, line 2: no mask of 'b' in {voc}/SegmentationClass"],
    ),
    "scenes that are no whole patches": (
        "eval.voc={voc} model.patch=12 data.views.0.size=132 data.views.1.size=24", None,
        ["eval.voc: scenes are measured at 448 pixels, which are not whole patches of model.patch: 12"],
    ),
    "the run folder is inside a file": (
        "run.folder={file}/run", None, ["{file}/run: cannot write there ({file} is no folder); name another folder"],
    ),
    "no file can be made in the run folder": (
        "run.folder=/proc/nope/x", None, ["/proc/nope/x: cannot write there (/proc: no file can be made there); name"],
    ),
    "one of two classes left out": (
        "data.val={val} eval.ignore_classes=[oak]", None, ["does not have: 'birhc'", "eval.ignore_classes=[oak,birhc]"],
    ),
    "all classes left out": (
        "data.val={val} eval.ignore_classes=[ash,birhc,oak]", None,
        ["{val}: eval.ignore_classes leaves out all of its 3 classes, so no photo is left to measure"],
    ),
    "checkpoints is a file": (
        "", lambda f: f["run"].mkdir() or (f["run"] / "checkpoints").touch(),
        ["{run}/checkpoints: no checkpoint can be written"],
    ),
    "the backbone is a folder": (
        "", lambda f: (f["run"] / "backbone.safetensors").mkdir(parents=True),
        ["{run}/backbone.safetensors: the run cannot write this file (it is a folder); move it away"],
    ),
    "no weights to begin with": (
        "model.init={file}x", None, ["model.init: {file}x: no such file or folder, did you mean '{file}'?"],
    ),
    "votes that overflow": ("eval.temperature=0.01", None, ["eval.temperature: 0.01 lets a vote of k-NN overflow float32"]),
}  # fmt: skip


@pytest.mark.fault("F26")
@pytest.mark.fast
@pytest.mark.parametrize("what", MISSING)
def test_what_is_missing_is_named_before_the_first_step(what, tiny_config, tiny_shards, photos, val, voc, tmp_path):
    words, prepare, parts = MISSING[what]
    places = {"shards": tiny_shards, "photos": photos, "val": val, "voc": voc, "run": tmp_path / "run"}
    places |= {"copy": tmp_path / "copy", "file": tmp_path / "file"}
    shutil.copytree(tiny_shards, places["copy"])
    places["file"].touch()
    if prepare:
        prepare(places)
    before = {str(path) for path in tmp_path.rglob("*")}
    with pytest.raises(UserError) as error:
        dry_run(tiny_config, *words.format(**places).split())
    for part in parts:
        assert part.format(**places) in str(error.value)
    assert "\n" not in str(error.value)
    assert {str(path) for path in tmp_path.rglob("*")} == before  # nothing was written


@pytest.mark.fault("F26")
@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_the_program_ends_before_torch_is_loaded(tiny_config, tiny_shards, val, tmp_path, options):
    words = ("-X", "importtime", "train.py", tiny_config, f"data.val={val}", *options)
    stderr = run_program(*words, expect=2).stderr
    assert "| torch\n" not in stderr
    lines = [line for line in stderr.splitlines() if not line.startswith("import time:")]
    assert len(lines) == 1
    assert lines[0].startswith(f"error: {val}: 2 classes that {tiny_shards} does not have: 'birhc', 'oak'")
    assert not (tmp_path / "run").exists()


@pytest.mark.fault("F26")
def test_classes_are_left_out_by_name(tiny_config, tiny_shards, val, tmp_path, capsys):
    """The run's report leaves out what the config names, while training too; `eval` what --ignore-class names."""
    words = ["optim.epochs=1", "optim.warmup_epochs=0", "eval.every=1", f"data.val={val}"]
    run_program("train.py", tiny_config, *words, "eval.ignore_classes=[birhc,oak]")
    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert "knn_top1" in rows[-1]
    assert evaluate(["report", str(run)]) == 0
    results = json.loads((run / "results.json").read_text())
    assert results["settings"]["knn"]["queries"] == 6
    assert results["settings"]["knn"]["ignored_classes"] == ["birhc", "oak"]

    config = run / "config.yaml"  # as if it had been trained without the name
    config.write_text(config.read_text().replace("  ignore_classes:\n  - birhc\n  - oak\n", ""))
    with pytest.raises(UserError, match=r"'birhc', 'oak'; .*`--ignore-class birhc --ignore-class oak`"):
        evaluate(["knn", str(run)])
    with pytest.raises(UserError, match=r"'birhc', did .*`--ignore-class oak --ignore-class birhc`"):
        evaluate(["knn", str(run), "--ignore-class", "oak"])
    assert evaluate(["knn", str(run), "--ignore-class", "birhc", "--ignore-class", "oak"]) == 0
    row = json.loads((run / "evaluations.jsonl").read_text())
    assert (row["queries"], row["ignored_classes"]) == (6, ["birhc", "oak"])
    assert row["top1"] == results["knn_top1"] == rows[-1]["knn_top1"]


@pytest.mark.fault("F26")
def test_a_run_that_holds_no_photo_out_has_a_report(tiny_config, tmp_path):
    """It is announced before the first step; the report has everything else."""
    words = ["optim.epochs=1", "optim.warmup_epochs=0", "data.holdout=0"]
    announced = "the report will have no k-NN: all photos are trained on"
    assert announced in run_program("train.py", tiny_config, *words, "--dry-run").stdout
    assert announced in run_program("train.py", tiny_config, *words).stdout
    stdout = run_program("-m", "eval", "report", tmp_path / "run").stdout
    assert "k-NN cannot be measured: " in stdout
    assert "none is left to test on" in stdout
    assert json.loads((tmp_path / "run" / "results.json").read_text())["knn_top1"] is None


@pytest.mark.fault("F26")
@pytest.mark.fast
@pytest.mark.parametrize("labeled", [True, False])
def test_the_last_lines_name_what_measures_something(labeled):
    lines = describe_end(Path("runs/a"), 5, [], labeled)
    assert ("k-NN and segmentation" in lines) == ("eval compare" in lines) == labeled
    assert ("no labels: the effective rank" in lines) == ("tools.show run runs/a" in lines) == (not labeled)
