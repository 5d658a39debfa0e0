"""Configs: what is right is read, what is wrong is told in one list with the nearest right word, exit code 2."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.config import Config, differences, dump_config, leaves, load_config, parse_config
from runtime.errors import UserError

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
    (tmp_path / "base.yaml").write_text("optim: {lr: 1e-3, global_batch_size: 64}\nmodel: {arch: vit_tiny}\n")
    path = write(tmp_path, "base: base.yaml\noptim: {global_batch_size: 128}\n")
    config = load_config(
        path, ["seed=7", "data.views.1.size=96", "loss.teacher_temperature=[0.04, 0.07]", "data.val=null"]
    )
    assert (config.optim.lr, config.optim.global_batch_size, config.model.arch, config.seed) == (
        1e-3,
        128,
        "vit_tiny",
        7,
    )
    assert [v.size for v in config.views] == [224, 224, 96, 96]
    assert config.loss.teacher_temperature == (0.04, 0.07)
    assert config.run.folder == "runs/c"


WRONG = [
    ("optim: {lrr: 5}", [], r"optim\.lrr: no such key, did you mean 'lr'"),
    ("optm: {lr: 5}", [], r"optm: no such key, did you mean 'optim'"),
    ("", ["optim.bathc=3"], r"optim\.bathc: no such key, did you mean 'batch'"),
    ("", ["seed"], "an override is written"),
    (
        "optim: {global_batch_size: many}",
        [],
        r"optim\.global_batch_size: expected a whole number, this is the text 'many'",
    ),
    ("optim: {lr: '1e-3'}", [], r"optim\.lr: expected a number"),
    ("speed: {compile: no}", [], r"speed\.compile: expected true or false, this is the text 'no'"),
    ("seed: 1\nseed: 2", [], "'seed' stands there twice"),
    ("optim: {lr: -1}", [], r"optim\.lr: more than 0"),
    ("optim: {epochs: 5, warmup_epochs: 10}", [], r"optim\.warmup_epochs: 10 epochs of warm-up do not fit"),
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
    (
        "optim: {global_batch_size: 10}\nspeed: {grad_accum_steps: 3}",
        [],
        r"10 does not fall into speed\.grad_accum_steps: 3",
    ),
    ("data: {views: [{count: 4}]}", [], "0 teacher views, the method has 2"),
    ("a: &x [1]\nb: *x", [], r"line 2: aliases \(\*x\) are not taken"),
    ("a: !!python/object/apply:os.system [ls]", [], r"line 1: tags \(.*os\.system\) are not taken"),
    ("seed: !!int 5", [], r"line 1: tags \(.*int\) are not taken"),
    ("? [a, b]\n: 1", [], "line 1: a key is a word, this is sequence"),
    ("[" * 20_000, [], "too deep for a config"),
    ("a: \x00", [], "special characters are not allowed"),
    ("a: " + 100_000 * "b", [], "bytes are no config"),
    ("optim: {lr: 1e999}", [], r"optim\.lr: expected a number, this is inf"),
    ("optim: {lr: '1e-3'}", [], r"without quotes it is a number"),
    ("speed: {compile: off}", [], r"this is the text 'off', did you mean 'false'"),
    ("lr: 3", [], r"lr: no such key, did you mean 'optim\.lr'"),
    ("speed: {grad_accum_steps: 0}", [], r"speed\.grad_accum_steps: more than 0"),
    ("data: {views: []}", [], r"data\.views: no view at all"),
    ("model: {arch: custom, width: -24, depth: 2, heads: -2}", [], r"model\.width, .*: each more than 0"),
    ("seed: 9223372036854775808", [], r"seed: less than 2\^63"),
    ("method: dino\nloss: {alpha: 0}", [], r"loss\.alpha: 0 leaves no loss at all"),
    ("seed: ${oc.env:HOME}", [], "seed: expected a whole number"),
    ("data: {min_overlap: 0.3, views: [{count: 2, teacher: true, scale: [0.2, 0.5]}]}", [], "cannot share 0.6"),
    ("method: mae", [], "method: one of densedino, dino"),
    ("reference: {attention: patch}", [], r"reference\.attention: one of .* did you mean 'patches'"),
]


@pytest.mark.parametrize(("text", "overrides", "message"), WRONG)
def test_wrong_words(tmp_path, text, overrides, message):
    path = write(tmp_path, text if text or not overrides else "seed: 0")
    with pytest.raises(UserError, match=message):
        load_config(path, overrides)


def test_all_mistakes_in_one_list(tmp_path):
    path = write(tmp_path, "optim: {lrr: 1, global_batch_size: x}\nsede: 3\n")
    with pytest.raises(UserError) as told:
        load_config(path)
    assert all(word in str(told.value) for word in ("3 mistakes", "optim.lrr", "optim.global_batch_size", "sede"))


def test_mistakes_of_every_kind_in_one_list(tmp_path):
    """Words that stand twice, unknown words, wrong types, values that clash, wrong overrides; nothing that only follows from
    another mistake (a warm-up of 10 epochs would not fit into 5, but warmpu is meant to say 1)."""
    path = write(
        tmp_path,
        "seed: 1\nseed: 2\noptim: {epochs: 5, warmpu: 1, global_batch_size: x}\nhead: {prototypes: 1}\ndata: {flip: 3}\n",
    )
    with pytest.raises(UserError) as told:
        load_config(path, ["sed", "seed.a=1", "loss.alhpa=2"], processes=2, forced=["optim.lrr"])
    lines = str(told.value).splitlines()
    assert lines[0] == f"{path}: 10 mistakes"
    for line, words in zip(
        lines[1:],
        (
            "'seed' stands there twice (and in line 1)", "'sed': an override is written a.b=c", "'seed' is 2",
            "optim.warmpu: no such key, did you mean 'warmup'?", "optim.global_batch_size: expected a whole number",
            "loss.alhpa: no such key, did you mean 'alpha'?", "--allow-change optim.lrr: no such key, did you mean 'optim.lr'?",
            "data.flip: between 0 and 1, this is 3.0", "head.prototypes: at least 2", "data.shards: which shards?",
        ),
        strict=True,
    ):  # fmt: skip
        assert words in line


EXTREMES = [0, -1, 2**70, 1e-9, 1e18, "x", "", None, True, [], [1], [1, 2, 3], {}, {"a": 1}, [[1, 2]], [{"count": 1}]]


@pytest.mark.parametrize("name", sorted(leaves(Config())))
def test_no_value_breaks_the_check(tmp_path, name):
    """Whatever stands in a place: a config, or a UserError that names the place or one that depends on it."""
    path = write(tmp_path, "seed: 0")
    for value in EXTREMES:
        with contextlib.suppress(UserError):
            load_config(path, [f"{name}={json.dumps(value)}"], processes=2)


def test_what_differs_between_two_runs():
    a, b = Config(), Config()
    assert differences(a, b) == {}
    b.loss.alpha, b.data.views[1].size, b.speed.dali_threads, b.data.shards, b.data.max_corrupt = (
        0.3,
        96,
        9,
        "elsewhere",
        0.5,
    )
    assert differences(a, b) == {
        "data.views.1.size": "data.views.1.size: 224 there, 96 now",
        "loss.alpha": "loss.alpha: 0.5 there, 0.3 now",
    }
    b = Config()
    b.data.val = "val"  # nothing is kept out of the training shards any more: they are other samples
    assert differences(a, b) == {"data.val": "data.val: 0.02 of the training shards there, val now"}
    a.data.val = "another/val"
    assert differences(a, b) == {}
    del b.data.views[1]
    assert "data.views.1.count: 2 there, nothing now" in differences(a, b).values()


def test_missing_file_names_the_nearest():
    with pytest.raises(UserError, match=r"configs/dmeo\.yaml: no such config, did you mean 'configs/demo\.yaml'"):
        load_config("configs/dmeo.yaml")


def test_the_program_ends_with_2_and_one_message(tmp_path):
    path = write(tmp_path, "optim: {lrr: 5}\ndata: {shards: nowhere}")
    done = subprocess.run([sys.executable, "train.py", path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip() == f"error: {path}: optim.lrr: no such key, did you mean 'lr'?"


def test_no_torch_before_the_config_is_right(tmp_path):
    code = "import sys, train\ntrain.load_config('configs/demo.yaml')\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_defaults_are_right():
    assert parse_config(dump_config(Config()), "defaults") == Config()
