"""F15: twenty mistakes in a config. F19: five hostile yaml files. The program tells each before it imports torch."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]


class Told(NamedTuple):
    code: int
    message: str
    modules: set[str]  # imported


def start(*words: object, limits: str = "", **environment: str) -> Told:
    """train.py as a user starts it, with a list of what it imports; limits: what the shell sets before ("ulimit -t 2;")."""
    python = [sys.executable, "-X", "importtime", "train.py", *map(str, words)]
    environment["PATH"] = os.environ["PATH"]
    command = ["sh", "-c", f'{limits} exec "$@"', "sh", *python]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    told, imports = [], set()
    for line in done.stderr.splitlines():
        if line.startswith("import time:"):
            imports.add(line.rpartition("|")[2].strip())
        else:
            told.append(line)
    return Told(done.returncode, "\n".join(told), imports)


def refused(told: Told, *words: str) -> None:
    """Exit code 2 and these words, without a traceback and before anything heavy is loaded."""
    assert told.code == 2, told.message
    assert told.message.startswith("error: "), told.message
    assert "Traceback" not in told.message
    for word in words:
        assert word in told.message, told.message
    assert "runtime.config" in told.modules
    assert "torch" not in told.modules


GOOD = """
data:
  shards: nowhere
  views:
    - {count: 2, size: 32, scale: [0.4, 1.0], teacher: true}
    - {count: 2, size: 16, scale: [0.2, 0.5]}
model: {arch: custom, patch: 8, width: 24, depth: 2, heads: 2}
optim: {global_batch_size: 16, epochs: 4, warmup_epochs: 1}
"""
MISTAKES = {  # what: (text of the config; {what to change of GOOD: into what}, words after it, what is told)
    "typo": ({"optim:": "optm:"}, [], ["optm: no such key, did you mean 'optim'?"]),
    "nested typo": ({"global_batch_size: 16": "bacth: 16"}, [], ["optim.bacth: no such key, did you mean 'batch'?"]),
    "typo on the command line": ({}, ["loss.aplha=1"], ["loss.aplha: no such key, did you mean 'alpha'?"]),
    "abbreviation": (
        {}, ["--epoch", "3", "--dry"],
        [
            "--epoch: no such option, did you mean 'optim.epochs'?", "--dry: no such option, did you mean '--dry-run'?",
            "'3': an override is written a.b=c",
        ],
    ),
    "wrong type": ({"epochs: 4": "epochs: four"}, [], ["optim.epochs: expected a number, this is the text 'four'"]),
    "a number as text": (
        {"global_batch_size: 16": "global_batch_size: 16, lr: '1e-3'"}, [],
        ["optim.lr: expected a number, this is the text '1e-3' (without quotes it is a number)"],
    ),
    "no as text": (
        {}, ["speed.compile=no"],
        ["speed.compile: expected true or false, this is the text 'no', did you mean 'false'?"],
    ),
    "key twice": ({"optim:": "seed: 1\nseed: 2\noptim:"}, [], ["line 9: 'seed' stands there twice (and in line 8)"]),
    "negative learning rate": ({}, ["optim.lr=-1e-3"], ["optim.lr: more than 0, this is -0.001"]),
    "epochs < warm-up": (
        {"warmup_epochs: 1": "warmup_epochs: 10"}, [], ["optim.warmup_epochs: 10 epochs of warm-up do not fit into optim.epochs: 4"]
    ),
    "no loss on": ({}, ["method=dino", "loss.alpha=0"], ["loss.alpha: 0 leaves no loss at all"]),
    "patch does not divide the size": (
        {"size: 32": "size: 33"}, [], ["data.views.0.size: 33 is no multiple of model.patch: 8 (nearest: 32)"]
    ),
    "references > tokens": (
        {}, ["reference.points=500"], ["reference.points: 500 make 1500 reference tokens in a view of 16 patches"]
    ),
    "local crop < patch": (
        {"size: 16": "size: 4"}, [], ["data.views.1.size: 4 is no multiple of model.patch: 8 (nearest: 8)"]
    ),
    "batch does not fall into processes": (
        {"global_batch_size: 16": "global_batch_size: 17"}, [],
        ["optim.global_batch_size: 17 images do not fall into 4 processes x speed.accumulate: 1 equal pieces (nearest: 16)"],
    ),
    "unknown architecture": ({}, ["model.arch=vit_smal"], ["model.arch: one of vit_tiny, ", "did you mean 'vit_small'?"]),
    "missing file": (None, [], ["run.yml: no such config, did you mean ", "run.yaml'?"]),
    "empty": ("", [], ["a config is a mapping 'key: value', this file is empty"]),
    "a list": ("- optim\n", [], ["a config is a mapping 'key: value', this file is a list"]),
    "writes into its data": (
        {"nowhere": "{folder}/photos"}, ["run.folder={folder}/photos"],
        ["run.folder: {folder}/photos is data.shards: {folder}/photos; a run writes into a folder of its own"],
    ),
}  # fmt: skip


pytestmark = pytest.mark.fast


@pytest.mark.fault("F15")
@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_told(what, tmp_path):
    change, words, told = MISTAKES[what]
    text = change
    if not isinstance(change, str):
        text = GOOD
        for before, after in (change or {}).items():
            assert text.count(before) == 1
            text = text.replace(before, after)
    path = tmp_path / "run.yaml"
    path.write_text(text.replace("{folder}", str(tmp_path)))
    words = [word.replace("{folder}", str(tmp_path)) for word in words]
    told = [word.replace("{folder}", str(tmp_path)) for word in told]
    environment = {"WORLD_SIZE": "4"} if "processes" in what else {}
    result = start(path.with_suffix(".yml") if change is None else path, *words, **environment)
    refused(result, *told)
    # the mistake is all there is: as many as expected, and one line for each
    several = len(told) > 1 and what == "abbreviation"
    assert len(result.message.splitlines()) == (1 + len(told) if several else 1)


def test_without_a_mistake_the_photos_are_asked_for(tmp_path):
    """What MISTAKES starts from is right: the program goes on to the next question, still without torch."""
    (tmp_path / "run.yaml").write_text(GOOD.replace("global_batch_size: 16", "global_batch_size: 16, lr: 1e-3"))
    refused(start(tmp_path / "run.yaml"), "nowhere: no shards here")


def test_mistakes_of_the_file_the_words_and_the_surroundings_in_one_list(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(GOOD.replace("optim:", "optm:").replace("size: 33", "size: 32"))
    told = start(path, "--dry", "loss.aplha=1", "model.arch=vit_smal", "data.flip=2", f"run.folder={ROOT}/nowhere/run")
    refused(told, "6 mistakes", "--dry:", "optm:", "loss.aplha:", "model.arch:", "data.flip:", "lies in data.shards:")


def alias_bomb(folder: Path) -> str:
    levels = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10))
    return f"a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n{levels}\n"


HOSTILE = {
    "alias bomb": (alias_bomb, ["line 2: aliases (*a0) are not taken"]),
    "python tag": (
        lambda folder: f"seed: !!python/object/apply:os.system ['touch {folder}/canary']\n",
        ["line 1: tags (tag:yaml.org,2002:python/object/apply:os.system) are not taken"],
    ),
    "environment": (
        lambda folder: GOOD.replace("nowhere", "'${oc.env:SECRET}'") + "seed: ${oc.env:SECRET}\n",
        ["seed: expected a whole number, this is the text '${oc.env:SECRET}'"],
    ),
    "key twice": (
        lambda folder: GOOD + "seed: 1\n" + "model: {arch: vit_base}\n",
        ["line 10: 'model' stands there twice (and in line 7)"],
    ),
    "50 MB": (lambda folder: "seed: 0 #" + 50_000_000 * "x", ["run.yaml: 50,000,009 bytes are no config"]),
}  # fmt: skip


@pytest.mark.fault("F19")
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_yaml_is_refused(what, tmp_path):
    """Under a limit of 2 seconds of CPU and 100 MB of memory (OmegaConf takes 36.9 s and 414 MB for such aliases)."""
    text, words = HOSTILE[what]
    (tmp_path / "run.yaml").write_text(text(tmp_path))
    limits = "ulimit -t 2; ulimit -d 100000;"
    told = start(tmp_path / "run.yaml", limits=limits, SECRET="a word of the environment")
    refused(told, *words)
    assert "a word of the environment" not in told.message
    assert not (tmp_path / "canary").exists()


def test_the_environment_is_never_read(tmp_path):
    """Where a text is expected, ${...} is that text."""
    (tmp_path / "run.yaml").write_text(GOOD.replace("nowhere", "'${oc.env:SECRET}'"))
    refused(start(tmp_path / "run.yaml", SECRET="/tmp"), "error: ${oc.env:SECRET}: no shards here")
