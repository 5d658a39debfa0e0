"""Real runs of train.py: data wait and headspace; a run that is killed and resumed; its profile."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from pipeline.shards import Shards
from runtime.errors import RunError
from runtime.metrics import read_jsonl
from tools.gpu.machine import is_installed
from tools.gpu.parts import NotHere, Report, Setting

WAIT, HEADSPACE = 1, 0.97  # targets: percent of the time, and of the speed with a batch kept ready
# of a run that is killed, and between its checkpoints: long enough not to end while the first one is written
STEPS, EVERY, TINY_STEPS, TINY_EVERY = 96, 16, 24, 8

TINY = """
data: {views: [{count: 2, size: 32, scale: [0.4, 1.0], teacher: true}, {count: 2, size: 32, scale: [0.4, 1.0]}]}
model: {arch: custom, patch: 8, width: 24, depth: 2, heads: 2}
head: {hidden: 32, bottleneck: 16, prototypes: 64}
speed: {compile: false, workers: 1, prefetch: 2}
"""


def write_config(setting: Setting, batch: int) -> Path:
    """The main config with a batch for one device; with tiny networks and views in the tiny setting."""
    path = Path(setting.scratch, f"training-{batch}.yaml")
    base = Path(__file__).parents[2] / "configs" / "densedino_vits16.yaml"
    text = f"base: {base}\noptim: {{global_batch_size: {batch}, warmup_epochs: 0, freeze_last_layer_epochs: 0}}\n"
    path.write_text(text + (TINY if setting.tiny else ""))
    return path


def require_reader() -> None:
    """Raise NotHere if photos cannot be read for training."""
    if not (is_installed("nvidia.dali") or is_installed("webdataset")):
        raise NotHere("neither DALI nor webdataset is installed: pip install -e '.[dali13]' (or dali12 for CUDA 12)")


def training(setting: Setting, report: Report) -> None:
    """`python -m tools.bench all`: training with the loader, and with a batch kept ready, in turns."""
    require_reader()
    config, rows = write_config(setting, 8 if setting.tiny else 128), Path(setting.scratch, "training.jsonl")
    words = ["--rounds", "1", "--steps", "2"] if setting.tiny else ["--rounds", "3", "--steps", "30"]
    command = [sys.executable, "-m", "tools.bench", "all", "--config", str(config), "--shards", setting.shards]
    subprocess.run([*command, "--out", str(rows), *words], check=True)
    (row,) = read_jsonl(rows)
    report.row(
        "training",
        row["img_per_s"],
        "images/s",
        f"reader {row['reader']}, {'tiny' if setting.tiny else 'ViT-S, 128 images'}",
        bench=row,
    )
    report.row("data wait", row["data_wait_percent"], "%", at_most=WAIT)
    beside = f"{row['img_per_s_cached']} images/s with a batch kept ready"
    report.row("headspace", row["headspace"], "", beside, at_least=HEADSPACE)


# --------------------------------------------------------------------------------------------------- kill and resume


def resume(setting: Setting, report: Report) -> None:
    """Two undisturbed runs, and one that is killed after its first checkpoint and started again."""
    require_reader()
    batch, steps, every = (8, TINY_STEPS, TINY_EVERY) if setting.tiny else (64, STEPS, EVERY)
    epochs = steps / (len(Shards(setting.shards)) // batch)
    words = [
        str(write_config(setting, batch)), f"data.shards={setting.shards}", "data.val=null", "data.holdout=0",
        f"optim.epochs={epochs}", "eval.every=0", "run.log_every=4", f"run.checkpoint_every={every}",
    ]  # fmt: skip
    folders = {name: Path(setting.scratch, "runs", name) for name in ("whole", "again", "killed")}
    command = [sys.executable, "train.py", *words]
    start = time.monotonic()
    _finish([*command, f"run.folder={folders['whole']}", "run.profile=true"])
    report.row(f"an undisturbed run of {steps} steps", time.monotonic() - start, "s", "start and compilation included")
    _report_profile(folders["whole"] / "profile" / "table.txt", report)
    killed = [*command, f"run.folder={folders['killed']}"]
    _kill_after_checkpoint(killed, folders["killed"])
    start = time.monotonic()
    output = _finish(killed)
    begun = next(
        (line for line in output.splitlines() if line.startswith("resumed at step")), "no line says it resumed"
    )
    report.row("the killed run, started again", time.monotonic() - start, "s", begun.partition(" from ")[0])
    report.row("it resumed", int(begun.startswith("resumed")), "(1: yes)", at_least=1, required=True)
    _finish([*command, f"run.folder={folders['again']}"])
    expected = _samples(folders["whole"])
    for name, what in (("again", "a second undisturbed run"), ("killed", "the resumed run")):
        same = int(_samples(folders[name]) == expected)
        report.row(f"{what}: the same samples", same, "(1: yes)", at_least=1, required=True)
        share, most = _compare(folders["whole"], folders[name])
        # without a GPU that is a promise; on one, sums of some kernels depend on the order of their threads
        exact = not torch.cuda.is_available()
        report.row(
            f"{what}: tensors with the same bits", share, "%", f"largest difference {most:.2g}", at_least=100, required=exact
        )  # fmt: skip


def _finish(command: list[str]) -> str:
    """Run to the end and return the output. Raises RunError with its last lines if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr, flush=True)
    if done.returncode:
        raise RunError(f"train.py: exit code {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout


def _kill_after_checkpoint(command: list[str], folder: Path) -> None:
    """Kill a run that has written a checkpoint and is not finished. Raises RunError if it ends before."""
    process = subprocess.Popen(command)
    while not list(folder.glob("checkpoints/checkpoint-*")):
        if process.poll() is not None:
            raise RunError(f"train.py ended before it was killed, with exit code {process.returncode}")
        time.sleep(0.02)
    process.kill()
    if process.wait() != -signal.SIGKILL:
        raise RunError("train.py ended before it was killed: too few steps after its first checkpoint")


def _samples(folder: Path) -> list[list[int]]:
    """The samples of each step as logged; a step that was done twice counts once."""
    rows = {row["step"]: row["samples"] for row in read_jsonl(folder / "samples.jsonl")}
    return [rows[step] for step in sorted(rows)]


def _compare(a: Path, b: Path) -> tuple[float, float]:
    """Percent of the tensors of two runs' last checkpoints that have the same bits; the largest difference of the others."""
    first, second = (load_file(max(folder.glob("checkpoints/*.safetensors"))) for folder in (a, b))
    if first.keys() != second.keys():
        raise RunError(f"{b}: its last checkpoint has other tensors than that of {a}")
    different = [name for name in first if not torch.equal(first[name], second[name])]
    most = max((float((first[n].double() - second[n].double()).abs().max()) for n in different), default=0.0)
    return 100 * (1 - len(different) / len(first)), most


def _report_profile(table: Path, report: Report) -> None:
    """The operations with the most time of their own, of three steps; the whole table goes into the log."""
    text = table.read_text()
    print(text)
    cells = [re.split(r" {2,}", line.strip()) for line in text.splitlines() if line.strip() and line[0] != "-"]
    columns, *rows = cells
    own = columns.index("Self CUDA" if "Self CUDA" in columns else "Self CPU")
    share = columns.index(f"{columns[own]} %")
    rows = [row for row in rows if len(row) == len(columns) and not row[0].startswith("ProfilerStep")]
    for row in rows[:5]:
        report.row("profile of three steps", row[own], "", f"{row[share]} {row[0][:80]}")
    report.row("profile, in full", "log.txt", "", "beside the rows")
