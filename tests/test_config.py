"""Configs: what is right is read, what is wrong is told in one list with the nearest right word, exit code 2."""

import subprocess
import sys
from pathlib import Path

import pytest

from runtime.config import Config, dump_config, load_config, parse_config
from runtime.mistake import Mistake

ROOT = Path(__file__).parents[1]


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configs(path: Path):
    config = load_config(path)
    assert parse_config(dump_config(config), "again") == config
    opening = path.read_text().split("\n\n")[0].lower()
    assert opening.startswith("#")
    text = path.read_text().lower()
    assert "make pretrain" in text
    assert "hours:" in text
    assert "expected:" in text


def test_base_and_overrides(tmp_path):
    (tmp_path / "base.yaml").write_text("optim: {lr: 1e-3, batch: 64}\nmodel: {arch: vit_tiny}\n")
    path = write(tmp_path, "base: base.yaml\noptim: {batch: 128}\n")
    config = load_config(
        path, ["seed=7", "data.views.1.size=96", "loss.teacher_temperature=[0.04, 0.07]", "data.val=null"]
    )
    assert (config.optim.lr, config.optim.batch, config.model.arch, config.seed) == (1e-3, 128, "vit_tiny", 7)
    assert [v.size for v in config.views] == [224, 224, 96, 96]
    assert config.loss.teacher_temperature == (0.04, 0.07)
    assert config.run.folder == "runs/c"


WRONG = [
    ("optim: {lrr: 5}", [], r"optim\.lrr: no such key, did you mean 'lr'"),
    ("optm: {lr: 5}", [], r"optm: no such key, did you mean 'optim'"),
    ("", ["optim.bathc=3"], r"optim\.bathc: no such key, did you mean 'batch'"),
    ("", ["seed"], "an override is written"),
    ("optim: {batch: many}", [], r"optim\.batch: expected a whole number, this is the text 'many'"),
    ("optim: {lr: '1e-3'}", [], r"optim\.lr: expected a number"),
    ("speed: {compile: no}", [], r"speed\.compile: expected true or false, this is the text 'no'"),
    ("seed: 1\nseed: 2", [], "'seed' stands there twice"),
    ("optim: {lr: -1}", [], r"optim\.lr: more than 0"),
    ("optim: {epochs: 5, warmup: 10}", [], r"optim\.warmup: 10 epochs of warm-up do not fit"),
    (
        "data: {views: [{count: 2, size: 50, teacher: true}]}",
        [],
        r"no multiple of model\.patch: 16 \(nearest: 48\)",
    ),
    (
        "data: {views: [{count: 2, size: 8, teacher: true}]}",
        [],
        r"no multiple of model\.patch: 16 \(nearest: 16\)",
    ),
    ("reference: {points: 5000}", [], r"reference\.points: 5000 make"),
    ("model: {arch: vit_smal}", [], r"model\.arch: one of .* did you mean 'vit_small'"),
    ("", [], "a config is a mapping 'key: value', this file is empty"),
    ("- a", [], "a config is a mapping"),
    ("head: {prototypes: 1}", [], r"head\.prototypes: at least 2"),
    ("optim: {batch: 10}\nspeed: {accumulate: 3}", [], r"10 does not fall into speed\.accumulate: 3"),
    ("data: {views: [{count: 4}]}", [], "0 teacher views, the method has 2"),
    ("a: &x [1]\nb: *x", [], r"aliases \(\*name\) are not taken"),
    ("a: !!python/object/apply:os.system [ls]", [], "could not determine a constructor"),
    ("seed: ${oc.env:HOME}", [], "seed: expected a whole number"),
    ("data: {min_overlap: 0.3, views: [{count: 2, teacher: true, scale: [0.2, 0.5]}]}", [], "cannot share 0.6"),
    ("method: mae", [], "method: one of densedino, dino"),
    ("reference: {attention: patch}", [], r"reference\.attention: one of .* did you mean 'patches'"),
]


@pytest.mark.parametrize(("text", "overrides", "message"), WRONG)
def test_wrong_words(tmp_path, text, overrides, message):
    path = write(tmp_path, text if text or not overrides else "seed: 0")
    with pytest.raises(Mistake, match=message):
        load_config(path, overrides)


def test_all_mistakes_in_one_list(tmp_path):
    path = write(tmp_path, "optim: {lrr: 1, batch: x}\nsede: 3\n")
    with pytest.raises(Mistake) as told:
        load_config(path)
    assert all(word in str(told.value) for word in ("3 mistakes", "optim.lrr", "optim.batch", "sede"))


def test_missing_file_names_the_nearest():
    with pytest.raises(Mistake, match=r"configs/dmeo\.yaml: no such config, did you mean 'configs/demo\.yaml'"):
        load_config("configs/dmeo.yaml")


def test_the_program_ends_with_2_and_one_message(tmp_path):
    path = write(tmp_path, "optim: {lrr: 5}")
    done = subprocess.run([sys.executable, "train.py", path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip() == f"error: {path}: optim.lrr: no such key, did you mean 'lr'?"


def test_no_torch_before_the_config_is_right(tmp_path):
    code = "import sys, train\ntrain.load_config('configs/demo.yaml')\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_defaults_are_right():
    assert parse_config(dump_config(Config()), "defaults") == Config()
