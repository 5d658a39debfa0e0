"""F35: the first minutes, on the screen: what the first step does, how long the rest takes, and what comes after."""

import json
import os
import pty
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_program

from model.architecture import ARCHS
from model.vit import ViT
from model.weights import about_backbone, load_backbone, loading_lines
from runtime.checkpoint import save_backbone
from runtime.metrics import MetricLogger

pytestmark = pytest.mark.fault("F35")

COMPILES = "compiling: the first step takes a while"
LINE = re.compile(r"step (\d+)/20 · (\d+:\d\d|-:--) left · loss [\d.]+ · [\d.]+ images/s · data wait [\d.]+ %")
MEASURED = re.compile(r"measured at step (\d+) · k-NN [\d.]+ %")


@pytest.fixture(scope="module")
def finished(tiny_shards, tmp_path_factory):
    """(the output to a file of a whole run, its folder, whose name has a blank)."""
    from conftest import write_config

    folder = tmp_path_factory.mktemp("screen")
    config = write_config(folder / "tiny.yaml", tiny_shards, folder / "my run's")
    config.write_text(config.read_text().replace("log_every: 2", "log_every: 1") + "eval: {every: 2}\n")
    return run_program("train.py", config).stdout, folder / "my run's"


def printed(stdout: str) -> tuple[list[str], list[str]]:
    """The lines of Python and the commands after `finished`."""
    python, commands = stdout[stdout.index("finished: ") :].split("next:\n")
    return (
        [line.strip() for line in python.splitlines()[1:]],
        [line.partition("  #")[0].strip() for line in commands.splitlines()],
    )


# ------------------------------------------------------------------------------------------------------- while it runs


@pytest.mark.fast
def test_a_line_of_a_file_has_five_fields_with_units(finished):
    lines = [line for line in finished[0].splitlines() if line.startswith("step ")]
    assert len(lines) >= 2  # the first and the last are always printed
    assert all(LINE.fullmatch(line) for line in lines), lines
    rows = [json.loads(line) for line in (finished[1] / "metrics.jsonl").read_text().splitlines()]
    measured = [str(row["step"]) for row in rows if "knn_top1" in row]
    assert MEASURED.findall(finished[0]) == measured != []


def log_steps(logger: MetricLogger, first: float, others: float) -> None:
    """Eleven of 101 steps; the first takes `first` seconds, the others `others` each."""
    logger.begin(f"{COMPILES}")
    time.sleep(first)
    logger.first_step_done()
    for step in range(1, 12):
        logger.write(step, {"loss": 1.0, "images_per_second": 10.0})
        time.sleep(others)


@pytest.mark.fast
def test_the_time_left_does_not_count_the_first_step(tmp_path, capsys, monkeypatch):
    """90 steps of 10 ms are left. With the first step's 1.2 s it would be 11 s."""
    monkeypatch.setattr("runtime.metrics.PRINT_SECONDS", 0)
    logger = MetricLogger(tmp_path, 101, 10, 0, prototypes=200)
    log_steps(logger, 1.2, 0.01)
    logger.close()
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "the first step took 0:01; the time left does not count it"
    assert out[1].startswith("step 1/101 · -:-- left · loss 1 · 10 images/s")
    left = int(re.search(r"step 11/101 · 0:(\d\d) left", out[-1])[1])
    assert left <= 4


@pytest.mark.fast
def test_the_live_screen_says_that_the_first_step_compiles(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the output for a terminal
    monkeypatch.setenv("COLUMNS", "120")
    logger = MetricLogger(tmp_path, 101, 10, 0, prototypes=200)
    logger.begin(COMPILES)
    time.sleep(0.3)
    logger.first_step_done()
    before = capsys.readouterr().out
    logger.write(1, {"loss": 1.0})
    time.sleep(0.02)
    logger.write(2, {"loss": 1.0})
    time.sleep(0.3)
    logger.close()
    after = capsys.readouterr().out
    assert COMPILES in before
    assert "-:-- left" in before
    assert COMPILES not in after
    assert re.search(r"0:0[0-9] left", after)


@pytest.mark.fast
def test_a_run_folder_is_no_markup(tmp_path, capsys):
    (tmp_path / "[b").mkdir()
    logger = MetricLogger(tmp_path / "[b", 101, 10, 0, prototypes=200)
    logger.log("a new run in runs/[/b]")
    logger.close()
    assert capsys.readouterr().out == "a new run in runs/[/b]\n"


def test_the_program_says_on_a_terminal_that_the_first_step_compiles(tiny_config):
    """torch is told not to compile, which takes minutes; all else is as it is."""
    words = ["speed.compile=true", "optim.epochs=0.4", "optim.warmup_epochs=0"]
    env = os.environ | {"COLUMNS": "150", "TERM": "xterm", "TORCH_COMPILE_DISABLE": "1"}
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "train.py", str(tiny_config), *words],
        cwd=ROOT, stdout=slave, stderr=slave, env=env,
    )  # fmt: skip
    os.close(slave)
    shown = b""
    while True:
        try:
            block = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        if not block:
            break
        shown += block
    os.close(master)
    assert process.wait() == 0, shown
    text = shown.decode()
    assert text.count(COMPILES) > 1  # once as a line, and under the bar
    assert "-:-- left" in text
    assert "finished: 2 steps" in text


# ------------------------------------------------------------------------------------------------------------ the end

_SAME = """
import sys, torch
images = torch.load("images.pt")
{lines}
with torch.no_grad():
    torch.save(vit.eval().forward_features(images), "tokens.pt")
assert {plain} != ("model" in sys.modules)
"""


def assert_loads(vit: ViT, lines: list[str], folder: Path, plain: bool = True) -> None:
    """The lines, run by another process, load a network with the same features."""
    torch.manual_seed(1)
    images = torch.randn(2, 3, vit.image_size, vit.image_size)
    torch.save(images, folder / "images.pt")
    program = _SAME.format(lines="\n".join(lines), plain=plain)
    if not plain:
        program = program.replace("vit.eval().forward_features(images)", "vit.eval()(images).cls")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {} if plain else {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        ours = vit(images)
    theirs = torch.load(folder / "tokens.pt")
    assert torch.allclose(theirs[:, 0] if plain else theirs, ours.cls, atol=1e-4, rtol=1e-4)


def test_the_printed_lines_load_the_backbone(finished, tmp_path):
    stdout, run = finished
    lines, _ = printed(stdout)
    assert lines[0] == "import timm"
    assert_loads(load_backbone(str(run / "backbone.safetensors")).eval(), lines, tmp_path)


@pytest.mark.parametrize(
    ("shape", "patch", "size", "attention"),
    [
        ((48, 3, 4), 16, 64, "patches+self"),
        (ARCHS["vit_tiny"], 16, 224, "none"),
        (ARCHS["vit_tiny"], 8, 48, "patches+self"),
        ((48, 2, 2), 8, 32, "all_query"),  # no plain ViT has its features
    ],
)
def test_lines_for_other_sizes(tmp_path, shape, patch, size, attention):
    torch.manual_seed(0)
    width, depth, heads = shape
    vit = ViT(width=width, depth=depth, heads=heads, patch=patch, image_size=size, attention=attention).eval()
    torch.nn.init.normal_(vit.pos_embed)  # far apart, so that a misread position shows
    path = tmp_path / 'a "b".safetensors'
    save_backbone(path, vit, about_backbone(vit, 1, "densedino"))
    plain = attention != "all_query"
    assert_loads(vit, loading_lines(vit, path), tmp_path, plain)


@pytest.mark.fast
def test_three_commands_with_this_run(finished):
    stdout, run = finished
    _, commands = printed(stdout)
    assert [shlex.split(command)[:2] for command in commands[:2]] == [["make", "eval"], ["make", "export"]]
    assert shlex.split(commands[0])[2] == f"RUN={run}"
    assert shlex.split(commands[2])[1:] == ["-m", "eval", "compare", str(run), "--untrained"]
    assert len(commands) == 3


def test_the_commands_work(finished, tmp_path):
    """As printed, but with another folder for the export and without the linear probes, which take a minute."""
    stdout, run = finished
    _, (evaluate, export, compare) = printed(stdout)
    python, *words = shlex.split(compare)
    assert (ROOT / python).exists()
    assert "k-NN" in run_program(*words, "--measures", "knn").stdout
    _, _, given, _ = shlex.split(export)
    run_program("-m", "tools.export", given.removeprefix("RUN="), tmp_path / "out", "--to", "card")
    assert (tmp_path / "out/model.safetensors").is_file()
    run_program("-m", "eval", "report", shlex.split(evaluate)[2].removeprefix("RUN="))
    assert (run / "results.json").is_file()
