"""Configs: valid ones are read; errors are reported in one list, each with the nearest valid name, and exit code 2.

Long: most of it is one table of wrong inputs and their messages.
"""

import contextlib
import copy
import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import config as package
from runtime.config import (
    METHODS,
    OTHER_SECTIONS,
    RESULT_SECTIONS,
    Config,
    Head,
    Model,
    Speed,
    Views,
    diff,
    dump_config,
    flatten,
    load_config,
    parse_config,
    suggest_key,
    unknown_option,
    yaml,
)  # fmt: skip
from runtime.config.evaluation import Every
from runtime.config.reference import FILES
from runtime.config.schema import BY_VIEW, Data, Source
from runtime.errors import UserError

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_configs(path: Path):
    config = load_config(path)
    assert parse_config(dump_config(config), "again") == config
    text = path.read_text()
    assert text.startswith("# yaml-language-server: $schema=schema.json\n# ")
    assert "make pretrain" in text
    assert "hours:" in text.lower()
    assert "expected:" in text.lower()


def test_base_and_overrides(tmp_path):
    (tmp_path / "base.yaml").write_text("optim: {lr: 1e-3, global_batch_size: 64}\nmodel: {arch: vit_tiny}\n")
    path = write(tmp_path, "base: base.yaml\noptim: {global_batch_size: 128}\n")
    words = [
        "seed=7",
        "data.views.1.size=96",
        "loss.teacher_temperature=[0.04, 0.07]",
        "data.val=null",
        "run.keep_checkpoints=1",
    ]
    config = load_config(path, words)
    assert (config.optim.lr, config.optim.global_batch_size) == (1e-3, 128)
    assert (config.model.arch, config.seed, config.run.keep_checkpoints) == ("vit_tiny", 7, 1)
    assert [v.size for v in config.views] == [224, 224, 96, 96]
    assert config.loss.teacher_temperature == (0.04, 0.07)
    assert config.run.folder == "runs/c"


WRONG = [
    ("optim: {lrr: 5}", [], r"optim\.lrr: no such key, did you mean 'optim\.lr'"),
    ("optm: {lr: 5}", [], r"optm: no such key, did you mean 'optim'"),
    ("", ["optim.bathc=3"], r"optim\.bathc: no such key, did you mean 'optim\.global_batch_size'"),
    ("optim: {grad_accum_steps: 2}", [], r"no such key, did you mean 'speed\.grad_accum_steps'"),
    ("data: {size: 96}", [], r"data\.size: no such key, did you mean 'data\.views\.0\.size'"),
    ("", ["lr=0.1"], r"lr: no such key, did you mean 'optim\.lr'"),
    ("lr: 3", [], r"lr: no such key, did you mean 'optim\.lr'"),
    ("", ["seed"], "command line: 'seed': an override is written a.b=c"),
    ("", ["data.views.2.size=32"], "'data.views' has places 0 to 1, not '2'"),
    ("optim: {global_batch_size: many}", [], r"expected a whole number above 0, found the text 'many'"),
    ("optim: {epochs: [1]}", [], r"optim\.epochs: expected a number above 0, found \[1\]"),
    ("optim: 3", [], "optim: expected a mapping, found 3"),
    ("optim:", [], "optim: expected a mapping, found no value"),
    ("optim: {lr: '1e-3'}", [], r"optim\.lr: expected a number .*, found the text '1e-3' \(without quotes it is a number\)"),
    ("optim: {lr: 1e999}", [], r"optim\.lr: expected a number above 0, found inf"),
    ("optim: {lr: -1}", [], r"optim\.lr: expected a number above 0, found -1"),
    ("optim: {weight_decay: 0.1}", [], r"optim\.weight_decay: expected 2 numbers, 0 or more, found 0\.1"),
    ("speed: {compile: no}", [], r"expected true or false, found the text 'no', did you mean 'false'"),
    ("speed: {compile: 1}", [], r"speed\.compile: expected true or false, found 1, did you mean 'true'"),
    ("speed: {workers: true}", [], r"speed\.workers: expected a whole number, 0 or more, found true"),
    ("speed: {grad_accum_steps: 0}", [], r"speed\.grad_accum_steps: expected a whole number above 0, found 0"),
    ("seed: 1\nseed: 2", [], r"c\.yaml, line 2: 'seed' appears twice \(first in line 1\)"),
    ("optim: {epochs: 5, warmup_epochs: 10}", [], r"10 epochs of warmup do not fit into optim\.epochs: 5"),
    ("data: {views: [{count: 2, size: 50, teacher: true}]}", [], r"not a multiple of model\.patch: 16 \(nearest: 48\)"),
    ("data: {views: [{count: 2, size: 8, teacher: true}]}", [], r"not a multiple of model\.patch: 16 \(nearest: 16\)"),
    ("data: {views: [{count: 4}]}", [], "0 teacher views, the method has 2"),
    ("data: {views: []}", [], r"data\.views: a config needs views"),
    ("data: {views: {count: 2, teacher: true, blur: [1, 2, 0]}}", [], r"blur\.1: expected a number from 0 to 1, found 2"),
    ("data: {views: {count: 2, teacher: true, blur: [1, 1, 0]}}", [], r"blur: expected one probability or 2 .*, found 3"),
    ("data: {views: {scale: [0.5, 0.2]}}", [], r"scale: expected two numbers 0 < low <= high <= 1, found \[0\.5"),
    ("data: {min_overlap: 0.3, views: [{count: 2, teacher: true, scale: [0.2, 0.5]}]}", [], "cannot share 0.6"),
    ("data: {holdout: 1}", [], r"data\.holdout: expected a number, 0 or more and below 1, found 1"),
    ("data: {jitter: {hue: 0.6}}", [], r"data\.jitter\.hue: expected a number from 0 to 0\.5, found 0\.6"),
    ("reference: {points: 5000}", [], r"reference\.points: 5000 make"),
    ("method: DenseCL", [], r"expected one of .*, did you mean 'densecl'"),
    ("reference: {attention: patch}", [], r"reference\.attention: expected one of .* did you mean 'patches'"),
    ("model: {arch: vit_smal}", [], r"model\.arch: expected one of .* did you mean 'vit_small'"),
    ("", ["model.arch=vit_large"], r"one of vit_tiny, vit_small, vit_base, custom, or a name of timm.*'vit_large'$"),
    ("model: {arch: custom, width: -24, depth: 2, heads: 2}", [], r"width: expected a whole number above 0, found -24"),
    ("model: {arch: custom, width: 24}", [], r"model\.width, .*: model\.arch: custom needs all three"),
    ("model: {arch: vit_smal_patch14-dinov2}", [], r"model\.arch: expected .* did you mean 'vit_small_patch14_dinov2'"),
    ("model: {arch: vit_base_patch14_dinov2, patch: 16}", [], r"model\.patch: 16, but model\.arch: .* has 14; leave"),
    ("model: {arch: vit_base_patch32_224}\ndata: {views: {count: 2, size: 48, teacher: true}}", [], r"model\.patch: 32"),
    ("model: {width: 24}", [], r"model\.arch: vit_small has its own"),
    ("model: {width: 24, init: a.pth}", [], r"model\.arch: null has those of model\.init\. Only model\.arch: custom"),
    ("model: {arch: custom, width: 25, depth: 1, heads: 2}", [], r"25 is not divisible by model\.heads: 2"),
    ("head: {prototypes: 1}", [], r"head\.prototypes: expected a whole number, 2 or more, found 1"),
    ("optim: {global_batch_size: 10}\nspeed: {grad_accum_steps: 3}", [], r"10 is not divisible by speed"),
    ("seed: 9223372036854775808", [], r"a whole number, 0 or more and below 2\^63, found 9223372036854775808"),
    ("seed: ${oc.env:HOME}", [], "seed: expected a whole number"),
    ("method: dino\nloss: {alpha: 0}", [], r"loss\.alpha: 0 leaves no loss at all"),
    ("method: leopart\nspeed: {grad_accum_steps: 2}", [], r"speed\.grad_accum_steps: 2 pieces .* method: leopart"),
    ("method: leopart\ndata: {min_overlap: 0}", [], r"data\.min_overlap: must be above 0, or views may share no place"),
    ("method: leopart\nmodel: {patch: 112}", [], r"clustering\.mask: foreground needs more than 3 patches a side, .* has 2"),
    ("method: swav\nclustering: {queue: 300}", [], r"300 is not a multiple of optim\.global_batch_size: 256 \(nearest: 256"),
    ("clustering: {epsilon: 0.001}", [], r"clustering\.epsilon: expected a number, 0\.02 or more, found 0\.001"),
    ("method: mae", [], f"method: expected one of {', '.join(METHODS)}, or module:Class, found the text 'mae'"),
    ("method: desnedino", [], "did you mean 'densedino'"),
    ("", [], "a config is a mapping 'key: value', this file is empty"),
    ("- a", [], "a config is a mapping 'key: value', this file is a list"),
    ("base: c.yaml", [], "base: c.yaml leads in a circle"),
    ("base: d.yaml", [], "base: d.yaml: no such config, did you mean 'c.yaml'"),
    ("base: [c.yaml]", [], "base: expected the path of another config, found "),
    ("1: 2", [], "1: no such key$"),
    ("a: &x [1]\nb: *x", [], r"line 2: aliases \(\*x\) are not allowed"),
    ("a: !!python/object/apply:os.system [ls]", [], r"line 1: tags \(.*os\.system\) are not allowed"),
    ("seed: !!int 5", [], r"line 1: tags \(.*int\) are not allowed"),
    ("? [a, b]\n: 1", [], "line 1: a key must be a word, this is a sequence"),
    ("[" * 20_000, [], "too deep for a config"),
    ("a: \x00", [], "special characters are not allowed"),
    ("a: " + 100_000 * "b", [], "bytes are too many for a config"),
    ('run: {folder: "\\ud800"}', [], "half a character"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "overrides", "message"), WRONG)
def test_errors(tmp_path, text, overrides, message):
    path = write(tmp_path, text if text or not overrides else "seed: 0")
    with pytest.raises(UserError, match=message) as error:
        load_config(path, overrides)
    assert str(error.value).startswith("command line: " if overrides else str(path))
    assert len(str(error.value).splitlines()) == 1


OLD_NAMES = (
    "speed.accumulate", "speed.recompute", "speed.threads", "speed.stall_seconds", "optim.batch", "optim.clip",
    "optim.warmup", "optim.freeze_last_layer", "head.unit_prototypes", "data.grey", "data.max_bad", "data.max_lost",
    "run.keep", "run.max_skipped",
)  # fmt: skip


@pytest.mark.parametrize("key", OLD_NAMES)
def test_no_old_names(tmp_path, key):
    with pytest.raises(UserError, match=f"{key}: no such key"):
        load_config(write(tmp_path, "seed: 0"), [f"{key}=1"])


def test_each_error_names_its_file(tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text("optim: {lrr: 1, min_lr: x}\ndata: {views: [{count: 2, teacher: true}]}")
    path = write(tmp_path, "base: base.yaml\nsede: 3\noptim: {min_lr: y}\n")
    with pytest.raises(UserError) as error:
        load_config(path, ["data.views.0.size=50", "optim.k=3"])
    assert [line.rpartition(": no such")[0] or line for line in str(error.value).splitlines()] == [
        f"{path}: 5 errors",
        f"  {base}: optim.lrr",
        f"  {path}: optim.min_lr: expected a number, 0 or more, found the text 'y'",
        "  command line: optim.k",
        f"  {path}: sede",
        "  command line: data.views.0.size: 50 is not a multiple of model.patch: 16 (nearest: 48)",
    ]


def test_errors_of_every_kind_in_one_list(tmp_path):
    """Repeated keys, unknown keys, wrong types, values that clash, wrong overrides; nothing that only follows from another
    error (a warmup of 10 epochs would not fit into 5, but `warmpu` was meant to say 1)."""
    path = write(
        tmp_path,
        "seed: 1\nseed: 2\noptim: {epochs: 5, warmpu: 1, global_batch_size: x}\nhead: {prototypes: 1}\ndata: {flip: 3}\n"
        "method: dino\nmodel: {arch: custom}\n",
    )
    with pytest.raises(UserError) as error:
        load_config(
            path,
            ["sed", "seed.a=1", "loss.alhpa=2"],
            processes=2,
            allowed=["optim.lrr"],
            errors=["--x: no such option"],
        )
    lines = str(error.value).splitlines()
    assert lines[0] == f"{path}: 12 errors"
    for line, words in zip(
        lines[1:],
        (
            "command line: --x: no such option",
            "'seed' appears twice (first in line 1)", "'sed': an override is written a.b=c",
            "'seed' is 2, it has no 'a'", "optim.warmpu: no such key, did you mean 'optim.warmup_epochs'?",
            "optim.global_batch_size: expected a whole number", "head.prototypes: expected a whole number, 2 or more",
            "data.flip: expected a number from 0 to 1, found 3", "loss.alhpa: no such key, did you mean 'loss.alpha'?",
            "command line: --allow-change optim.lrr: no such key, did you mean 'optim.lr'?", "custom needs all three",
            "data.shards: which shards?",
        ),
        strict=True,
    ):  # fmt: skip
        assert words in line


EXTREMES = [
    0, -1, 2**70, 2**2000, 1e-9, 1e18, float("inf"), "x", "", None, True, [], [1], [1, 2, 3], {}, {"a": 1}, [[1, 2]],
    [{"count": 1}],
]  # fmt: skip
SECTIONS = {name.rpartition(".")[0] for name in flatten(Config())} - {""} | {"data.views"}


@pytest.mark.parametrize("name", sorted(SECTIONS | set(flatten(Config()))))
def test_no_value_breaks_the_check(tmp_path, name):
    """Whatever a key is set to: a config, or a UserError."""
    path = write(tmp_path, "seed: 0")
    for value in EXTREMES:
        with contextlib.suppress(UserError):
            load_config(path, [f"{name}={json.dumps(value).replace('Infinity', '1e999')}"], processes=2)


def test_words_that_were_probably_meant():
    for word, key in {
        "optim.grad_accum_steps": "speed.grad_accum_steps", "data.size": "data.views.0.size", "--lr=0.1": "optim.lr",
        "lr=0.1": "optim.lr", "heads": "model.heads", "--batch-size": "optim.global_batch_size", "dta.flip": "data.flip",
        "data.views.3.sise": "data.views.3.size", "data.hue": "data.jitter.hue", "optim.batch": "optim.global_batch_size",
        "threads": "speed.dali_threads", "epoch": "optim.epochs", "zzz": "", "": "",
    }.items():  # fmt: skip
        assert suggest_key(word) == key, word


def test_unknown_options():
    options = ("--dry-run", "--help")
    for word, end in {
        "--resume": ". The same command resumes a run by itself", "--dry": ", did you mean '--dry-run'?",
        "--lr=0.1": ", did you mean 'optim.lr=0.1'?", "--epoch": ", did you mean 'optim.epochs'?", "--zzz": "",
    }.items():  # fmt: skip
        assert unknown_option(word, options) == f"{word}: no such option{end}"


def test_what_differs_between_two_runs():
    a, b = Config(), Config()
    assert diff(a, b) == {}
    b.loss.alpha, b.data.views[1].size, b.speed.dali_threads, b.data.shards = 0.3, 96, 9, "elsewhere"
    b.data.max_corrupt = 0.5
    assert diff(a, b) == {
        "data.views.1.size": "data.views.1.size: saved 224, current 96",
        "loss.alpha": "loss.alpha: saved 0.5, current 0.3",
    }
    b = Config()
    b.data.val = "val"  # nothing is held out of the training shards any more: they are other samples
    assert diff(a, b) == {"data.val": "data.val: saved 0.02 of the training shards, current val"}
    a.data.val = "another/val"
    assert diff(a, b) == {}
    del b.data.views[1]
    assert "data.views.1.count: saved 2, current nothing" in diff(a, b).values()


def test_sections_are_dataclasses():
    """Positional construction, assignment, replace, copies and pickle."""
    config = Config(model=Model("custom", 8, 16, 2, 2, 0.1), head=Head(24, 12, 20), speed=Speed(workers=0))
    config.data.views = [Views(2, 32, teacher=True), Views(1, 32), Views(2, 16)]
    config.optim.global_batch_size = 8
    assert [v.size for v in config.views] == [32, 32, 32, 16, 16]
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
    assert dataclasses.replace(config.model, depth=3).depth == 3
    assert dataclasses.asdict(config)["optim"]["global_batch_size"] == 8
    assert parse_config(dump_config(config), "again") == config


def test_texts_survive_the_resolved_copy():
    for text in ("1e-3", "no", "null", "2026", "1.", "true", "~", "é", "a: b"):
        config = Config()
        config.run.folder = text
        assert parse_config(dump_config(config), "again").run.folder == text


def test_a_number_may_name_a_folder(tmp_path):
    assert load_config(write(tmp_path, "run: {folder: 2026}")).run.folder == "2026"


def test_missing_file_names_the_nearest():
    with pytest.raises(UserError, match=r"configs/dmeo\.yaml: no such config, did you mean 'configs/demo\.yaml'"):
        load_config("configs/dmeo.yaml")


def test_the_program_ends_with_2_and_one_message(tmp_path):
    path = write(tmp_path, "optim: {lrr: 5}\ndata: {shards: tests}")
    done = subprocess.run([sys.executable, "train.py", path], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip() == f"error: {path}: optim.lrr: no such key, did you mean 'optim.lr'?"


def test_a_config_loads_fast_and_without_torch():
    code = (
        "import sys, time\nfrom runtime.config import load_config\nload_config('configs/official_release.yaml')\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\nprint(time.process_time())"
    )
    times = [
        float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout)
        for _ in range(3)
    ]
    assert min(times) < 0.5  # seconds of CPU, Python's own start included


def test_train_loads_the_config_before_torch():
    code = "import sys, train\ntrain.load_config('configs/demo.yaml')\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_defaults_are_valid():
    assert parse_config(dump_config(Config()), "defaults") == Config()


@pytest.mark.parametrize("name", FILES)
def test_reference_is_current(name):
    assert (ROOT / name).read_text(encoding="utf-8") == FILES[name](), "run `make docs-reference`"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_the_json_schema_accepts_shipped_configs(path):
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft7Validator(json.loads((ROOT / "configs/schema.json").read_text()))
    validator.check_schema(validator.schema)
    tree, _ = yaml.parse(path.read_text(), path.name)
    assert list(validator.iter_errors(tree)) == []
    assert list(validator.iter_errors(yaml.parse(dump_config(load_config(path)), path.name)[0])) == []
    for wrong in (
        "optim: {lrr: 1}",
        "optim: {lr: '1'}",
        "method: mae",
        "data: {views: {size: 0}}",
        "data: {aspect: [1]}",
    ):
        assert list(validator.iter_errors(yaml.parse(wrong, "wrong")[0])), wrong


def test_every_value_is_documented():
    """A full sentence for each, by `make docs-reference`."""
    rows = [line.split(" | ") for line in FILES["docs/reference/config.md"]().splitlines() if line.startswith("| `")]
    described = {row[0].strip("| `").replace(".N.", ".0.") for row in rows}
    keys = flatten(Config(data=Data(shards=[Source()])))
    measures = {*flatten(Every(), "eval.every")}
    assert {key.replace("views.1.", "views.0.") for key in keys} | {"data.views", "data.shards"} | measures == described
    for row in rows:
        assert row[-1].rstrip(" |").endswith("."), row[0]
        assert len(row[-1]) > 20, row[0]


def test_exports():
    assert all(hasattr(package, name) for name in package.__all__)


def test_every_section_changes_results_or_does_not():
    """Or a resume would not notice a changed value of a new section."""
    names = [field.name for field in dataclasses.fields(Config)]
    assert sorted(names) == sorted([*RESULT_SECTIONS, *OTHER_SECTIONS])


def test_values_by_view_reach_each_view(tmp_path):
    """Every list of probabilities of a group: one for all its views, or one for each."""
    assert {"blur", "solarize"} <= set(BY_VIEW)
    for name in BY_VIEW:
        group = f"{{count: 3, size: 32, {name}: [0.1, 0.2, 0.3]}}"
        text = f"data: {{views: [{{count: 2, size: 32, teacher: true, {name}: 0.5}}, {group}]}}"
        config = load_config(write(tmp_path, text), ["model.patch=8"])
        assert [getattr(view, name) for view in config.views] == [[0.5], [0.5], [0.1], [0.2], [0.3]]
        with pytest.raises(
            UserError, match=rf"data\.views\.1\.{name}: expected one probability or 3 \(count\), found 2"
        ):
            load_config(write(tmp_path, text.replace("[0.1, 0.2, 0.3]", "[0.1, 0.2]")), ["model.patch=8"])
