"""F30: to train a run longer. The refusal and the end of a run print the whole command; the new schedule is announced."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import run_program, write_config
from pictures import encoded, photo, tree

from runtime import command
from runtime.config import load_config
from runtime.schedule import describe_change, make_schedules
from tests.conftest import ROOT

FIVE_STEPS = ("optim.epochs=1", "optim.warmup_epochs=0")


@pytest.fixture(scope="module")
def finished(tiny_shards, tmp_path_factory) -> Path:
    """A config, with its finished run of five steps in `run` beside it."""
    folder = tmp_path_factory.mktemp("longer")
    path = write_config(folder / "tiny.yaml", tiny_shards, folder / "run")
    run_program("train.py", path, *FIVE_STEPS)
    return path


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished.parent / "run", tmp_path / "run"))


def scenes(folder: Path) -> Path:
    """A scene in Pascal VOC's layout, in both splits."""
    mask = np.tile(np.uint8([0, 1]), (12, 6))
    lists = {f"ImageSets/Segmentation/{split}.txt": b"a" for split in ("train", "val")}
    files = {"JPEGImages/a.jpg": photo(1, 12, 12), "SegmentationClass/a.png": encoded(mask, "PNG")}
    return tree(folder, lists | files)


def printed_command(message: str) -> str:
    return message.split("`")[1]


@pytest.mark.fault("F30")
def test_the_refusal_prints_a_command_that_resumes(finished, run):
    """As train.py's user typed it, and it says what the schedules do before the first step."""
    words = (finished, "optim.epochs=2", "optim.warmup_epochs=0", f"run.folder={run}")
    refused = run_program("train.py", *words, expect=2).stderr
    assert "optim.epochs: saved 1.0, current 2.0" in refused
    assert "see docs/howto/train-longer.md" in refused
    line = printed_command(refused)
    assert line == f"python train.py {shlex.join(map(str, words))} --allow-change optim.epochs"
    stdout = run_program(*shlex.split(line)[1:]).stdout
    lines = stdout.splitlines()
    announced = next(
        i for i, text in enumerate(lines) if text.startswith("the schedules change at step 5: 5 steps -> 10")
    )
    assert "every cosine is stretched to the new length" in lines[announced]
    assert "learning rate 3.89e-06 -> 1.61e-05" in lines[announced]
    assert announced < next(i for i, text in enumerate(lines) if text.startswith("step "))
    assert "finished: 10 steps" in stdout


@pytest.mark.fault("F30")
def test_a_dry_run_announces_the_schedule(finished, run):
    words = (finished, "optim.epochs=2", "optim.warmup_epochs=0", f"run.folder={run}", "--allow-change=optim.epochs")
    stdout = run_program("train.py", *words, "--dry-run").stdout
    assert "allowed change: optim.epochs: saved 1.0, current 2.0" in stdout
    assert "the schedules change at step 5: 5 steps -> 10 steps" in stdout


@pytest.mark.fault("F30")
def test_the_end_of_a_run_names_the_way_on(finished, run):
    stdout = run_program("train.py", finished, *FIVE_STEPS, f"run.folder={run}").stdout
    assert f"{run} is finished: 5 steps" in stdout
    line = printed_command(stdout)
    assert line.endswith(f"run.folder={run} optim.epochs=2 --allow-change optim.epochs")
    assert "optim.epochs=1 " not in line
    assert "finished: 10 steps" in run_program(*shlex.split(line)[1:]).stdout


@pytest.mark.fault("F30")
def test_a_finished_run_is_twice_its_own_length(finished, run):
    """Not twice what was typed; --allow-change is there once."""
    words = ("optim.epochs=0.6", "optim.warmup_epochs=0", f"run.folder={run}", "--allow-change", "optim.epochs")
    stdout = run_program("train.py", finished, *words).stdout
    assert "(0.6 epochs asked for, the run already has 1)" in stdout
    line = printed_command(stdout)
    assert "optim.epochs=2 --allow-change optim.epochs" in line
    assert line.count("--allow-change") == 1


@pytest.mark.fault("F30")
def test_a_finished_run_takes_new_values_of_eval(run, tmp_path):
    """Its config.yaml, which what follows reads, has them; nothing else changes there, and each is said."""
    file = run / "config.yaml"
    before = load_config(file)
    voc = scenes(tmp_path / "voc")
    stdout = run_program(
        "train.py", file, "eval.k=3", f"eval.voc={voc}", "optim.epochs=0.6", "--allow-change=optim.epochs"
    ).stdout
    assert f"{file}: eval.voc: was null, now {voc}\n" in stdout
    assert f"{file}: eval.k: was {before.eval.k}, now 3\n" in stdout
    after = load_config(file)
    assert after.eval.k == 3
    before.eval.k, before.eval.voc = 3, str(voc)
    assert after == before
    assert "eval.k" not in run_program("train.py", file).stdout


@pytest.mark.fault("F30")
def test_make_prints_the_command_of_make(finished, run, tiny_shards):
    """Whole: with the variables that the user gave."""
    ready = ["-o", ".venv/.ready", "-o", "requirements.lock"]  # an environment is there
    variables = [f"CONFIG={finished}", f"SHARDS={tiny_shards}", f"RUN={run}"]
    arguments = "ARGS=optim.epochs=2 optim.warmup_epochs=0"
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(
        ["make", *ready, "pretrain", *variables, arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=env,
    )
    assert done.returncode == 2
    allowed = "ARGS='optim.epochs=2 optim.warmup_epochs=0 --allow-change optim.epochs'"
    assert printed_command(done.stderr) == f"make pretrain {' '.join(variables)} {allowed}"


COMMANDS = {  # what: (environment, words of train.py, more words, the command)
    "train.py": (
        {}, ["train.py", "my config.yaml", "seed=1", "--allow-change", "seed"], ["--allow-change", "optim.epochs"],
        "python train.py 'my config.yaml' seed=1 --allow-change seed --allow-change optim.epochs",
    ),
    "allowed before": (
        {}, ["train.py", "a.yaml", "--allow-change", "optim.epochs", "--allow-change=seed", "optim.epochs=1"],
        ["optim.epochs=2", "--allow-change", "optim.epochs"],
        "python train.py a.yaml --allow-change seed optim.epochs=2 --allow-change optim.epochs",
    ),
    "torchrun": (
        {"TORCHELASTIC_RUN_ID": "1"}, ["train.py", "a.yaml", "optim.epochs=1"], ["optim.epochs=2"],
        "torchrun … train.py a.yaml optim.epochs=2",
    ),
    "make": (
        {"STARTED_BY": "make pretrain", "CONFIG": "my config.yaml", "GPUS": "2"}, ["train.py", "my config.yaml"],
        ["optim.epochs=20", "--allow-change", "optim.epochs"],
        "make pretrain CONFIG='my config.yaml' GPUS=2 ARGS='optim.epochs=20 --allow-change optim.epochs'",
    ),
    "make, with lists and dollars": (
        {"STARTED_BY": "make pretrain", "SHARDS": "$HOME/x", "ARGS": "'data.views.0.scale=[0.4, 1]' optim.epochs=3"},
        ["train.py", "a.yaml"], ["optim.epochs=20"],
        """make pretrain SHARDS='$HOME/x' ARGS="'data.views.0.scale=[0.4, 1]' optim.epochs=20\"""",
    ),
}  # fmt: skip


@pytest.mark.fault("F30")
@pytest.mark.fast
@pytest.mark.parametrize("what", COMMANDS)
def test_the_command_is_the_user_s_own(what, monkeypatch):
    environment, words, more, expected = COMMANDS[what]
    for name in (*command.VARIABLES, "ARGS", "STARTED_BY", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", words)
    assert command.again(*more) == expected


CHANGES = {  # what: (words, step, parts of the message; none: no message)
    "longer, at the end": (
        ["optim.epochs=8"], 20,
        ["20 steps -> 40 steps", "stretched", "learning rate 1.33e-06 -> 1.95e-05", "teacher momentum 0.99998 -> 0.99800"],
    ),
    "longer, in the middle": (["optim.epochs=8"], 10, ["20 steps -> 40 steps", "learning rate 2.62e-05 -> 2.98e-05"]),
    "shorter": (["optim.epochs=3"], 10, ["20 steps -> 15 steps", "shortened"]),
    "shorter than what is done": (["optim.epochs=2"], 12, ["20 steps -> 10 steps, and 12 are done"]),
    "another rate": (["optim.lr=1e-3"], 10, ["from the last step to the next: learning rate 2.62e-05 -> 4.71e-05"]),
    "another value of the past": (["optim.freeze_last_layer_epochs=0"], 10, []),
    "nothing": ([], 10, []),
}  # fmt: skip


@pytest.mark.fault("F30")
@pytest.mark.fast
@pytest.mark.parametrize("what", CHANGES)
def test_a_change_of_the_schedules_in_words(what, tiny_config):
    words, step, parts = CHANGES[what]
    before, after = (make_schedules(load_config(tiny_config, w), 5) for w in ([], words))
    message = describe_change(before, after, step)
    assert bool(message) == bool(parts)
    for part in parts:
        assert part in message
