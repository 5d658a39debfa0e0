"""F15: twenty errors in a config. F19: five hostile yaml files. The program reports each before it imports torch."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]


class Result(NamedTuple):
    code: int
    message: str
    modules: set[str]  # imported


def start(*words: object, limits: str = "", **environment: str) -> Result:
    """train.py as a user starts it, with a list of its imports; limits: what the shell sets before ("ulimit -t 2;")."""
    python = [sys.executable, "-X", "importtime", "train.py", *map(str, words)]
    environment["PATH"] = os.environ["PATH"]
    command = ["sh", "-c", f'{limits} exec "$@"', "sh", *python]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    output, imports = [], set()
    for line in done.stderr.splitlines():
        if line.startswith("import time:"):
            imports.add(line.rpartition("|")[2].strip())
        else:
            output.append(line)
    return Result(done.returncode, "\n".join(output), imports)


def refused(result: Result, *words: str) -> None:
    """Exit code 2 and these words, without a traceback and before anything heavy is loaded."""
    assert result.code == 2, result.message
    assert result.message.startswith("error: "), result.message
    assert "Traceback" not in result.message
    for word in words:
        assert word in result.message, result.message
    assert "runtime.config" in result.modules
    assert "torch" not in result.modules


GOOD = """
data:
  shards: tests
  views:
    - {count: 2, size: 32, scale: [0.4, 1.0], teacher: true}
    - {count: 2, size: 16, scale: [0.2, 0.5]}
model: {arch: custom, patch: 8, width: 24, depth: 2, heads: 2}
optim: {global_batch_size: 16, epochs: 4, warmup_epochs: 1}
"""
ERRORS = {  # what: (text of the config, or {what to replace in GOOD: by what}; words after it; what is reported)
    "typo": ({"optim:": "optm:"}, [], ["optm: no such key, did you mean 'optim'?"]),
    "nested typo": (
        {"global_batch_size: 16": "global_bacth_size: 16"}, [],
        ["optim.global_bacth_size: no such key, did you mean 'optim.global_batch_size'?"],
    ),
    "typo on the command line": ({}, ["loss.aplha=1"], ["loss.aplha: no such key, did you mean 'loss.alpha'?"]),
    "abbreviation": (
        {}, ["--epoch", "3", "--dry"],
        [
            "--epoch: no such option, did you mean 'optim.epochs'?", "--dry: no such option, did you mean '--dry-run'?",
            "'3': an override is written a.b=c",
        ],
    ),
    "wrong type": (
        {"epochs: 4, ": "epochs: four, "}, [], ["optim.epochs: expected a number above 0, found the text 'four'"]
    ),
    "a number as text": (
        {"global_batch_size: 16": "global_batch_size: 16, lr: '1e-3'"}, [],
        ["optim.lr: expected a number above 0, found the text '1e-3' (without quotes it is a number)"],
    ),
    "no as text": (
        {}, ["speed.compile=no"],
        ["speed.compile: expected true or false, found the text 'no', did you mean 'false'?"],
    ),
    "key twice": (
        {"optim:": "seed: 1\nseed: 2\noptim:"}, [], ["run.yaml, line 9: 'seed' appears twice (first in line 8)"]
    ),
    "negative learning rate": ({}, ["optim.lr=-1e-3"], ["optim.lr: expected a number above 0, found -0.001"]),
    "epochs < warmup": (
        {"warmup_epochs: 1": "warmup_epochs: 10"}, [],
        ["optim.warmup_epochs: 10 epochs of warmup do not fit into optim.epochs: 4"],
    ),
    "no loss on": ({}, ["method=dino", "loss.alpha=0"], ["loss.alpha: 0 leaves no loss at all"]),
    "patch does not divide the size": (
        {"size: 32": "size: 33"}, [], ["data.views.0.size: 33 is not a multiple of model.patch: 8 (nearest: 32)"]
    ),
    "references > tokens": (
        {}, ["reference.points=500"], ["reference.points: 500 make 1500 reference tokens in a view of 16 patches"]
    ),
    "local crop < patch": (
        {"size: 16, scale": "size: 4, scale"}, [], ["data.views.1.size: 4 is not a multiple of model.patch: 8 (nearest: 8)"]
    ),
    "batch is not divisible by processes": (
        {"global_batch_size: 16": "global_batch_size: 17"}, [],
        ["optim.global_batch_size: 17 is not divisible by 4 processes x speed.grad_accum_steps: 1 (nearest: 16)"],
    ),
    "unknown architecture": (
        {}, ["model.arch=vit_smal"],
        ["model.arch: expected one of vit_tiny, vit_small, vit_base, custom, or a name of", "did you mean 'vit_small'?"],
    ),
    "missing file": (None, [], ["run.yml: no such config, did you mean ", "run.yaml'?"]),
    "empty": ("", [], ["a config is a mapping 'key: value', this file is empty"]),
    "a list": ("- optim\n", [], ["a config is a mapping 'key: value', this file is a list"]),
    "writes into its data": (
        {"shards: tests": "shards: {folder}/photos"}, ["run.folder={folder}/photos"],
        ["run.folder: {folder}/photos is data.shards: {folder}/photos. A run needs a folder of its own"],
    ),
}  # fmt: skip


pytestmark = pytest.mark.fast


@pytest.mark.fault("F15")
@pytest.mark.parametrize("what", ERRORS)
def test_an_error_is_reported(what, tmp_path):
    change, words, reported = ERRORS[what]
    text = change
    if not isinstance(change, str):
        text = GOOD
        for before, after in (change or {}).items():
            assert text.count(before) == 1
            text = text.replace(before, after)
    path = tmp_path / "run.yaml"
    path.write_text(text.replace("{folder}", str(tmp_path)))
    words = [word.replace("{folder}", str(tmp_path)) for word in words]
    reported = [word.replace("{folder}", str(tmp_path)) for word in reported]
    environment = {"WORLD_SIZE": "4"} if "processes" in what else {}
    result = start(path.with_suffix(".yml") if change is None else path, *words, **environment)
    refused(result, *reported)
    # the error is all there is: as many as expected, and one line for each
    several = len(reported) > 1 and what == "abbreviation"
    assert len(result.message.splitlines()) == (1 + len(reported) if several else 1)


def test_a_valid_config_gets_to_the_shards(tmp_path):
    """What ERRORS starts from is valid: the program gets to its shards, still without torch."""
    (tmp_path / "run.yaml").write_text(GOOD.replace("global_batch_size: 16", "global_batch_size: 16, lr: 1e-3"))
    refused(start(tmp_path / "run.yaml"), "tests: no shards here")


def test_errors_of_the_file_the_command_line_and_the_folders_in_one_list(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(GOOD.replace("optim:", "optm:").replace("size: 33", "size: 32"))
    result = start(path, "--dry", "loss.aplha=1", "model.arch=vit_smal", "data.flip=2", f"run.folder={ROOT}/tests/run")
    refused(result, "6 errors", "--dry:", "optm:", "loss.aplha:", "model.arch:", "data.flip:", "is inside data.shards:")


def alias_bomb(folder: Path) -> str:
    levels = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10))
    return f"a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n{levels}\n"


HOSTILE = {
    "alias bomb": (alias_bomb, ["line 2: aliases (*a0) are not allowed"]),
    "python tag": (
        lambda folder: f"seed: !!python/object/apply:os.system ['touch {folder}/canary']\n",
        ["line 1: tags (tag:yaml.org,2002:python/object/apply:os.system) are not allowed"],
    ),
    "environment": (
        lambda folder: GOOD.replace("shards: tests", "shards: '${oc.env:SECRET}'") + "seed: ${oc.env:SECRET}\n",
        ["seed: expected a whole number, 0 or more and below 2^63, found the text '${oc.env:SECRET}'"],
    ),
    "key twice": (
        lambda folder: GOOD + "seed: 1\n" + "model: {arch: vit_base}\n",
        ["line 10: 'model' appears twice (first in line 7)"],
    ),
    "50 MB": (lambda folder: "seed: 0 #" + 50_000_000 * "x", ["run.yaml: 50,000,009 bytes are too many for a config"]),
}  # fmt: skip


@pytest.mark.fault("F19")
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_yaml_is_refused(what, tmp_path):
    """Under a limit of 2 seconds of CPU and 100 MB of memory (OmegaConf takes 36.9 s and 414 MB for such aliases)."""
    text, words = HOSTILE[what]
    (tmp_path / "run.yaml").write_text(text(tmp_path))
    limits = "ulimit -t 2; ulimit -d 100000;"
    result = start(tmp_path / "run.yaml", limits=limits, SECRET="a word of the environment")
    refused(result, *words)
    assert "a word of the environment" not in result.message
    assert not (tmp_path / "canary").exists()


def test_the_environment_is_never_read(tmp_path):
    """Where a text is expected, ${...} is that text."""
    (tmp_path / "run.yaml").write_text(GOOD.replace("shards: tests", "shards: '${oc.env:SECRET}'"))
    refused(start(tmp_path / "run.yaml", SECRET="/tmp"), "error: ${oc.env:SECRET}: no shards here")
