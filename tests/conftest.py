"""Fixtures of several tests. One thread for each process: pytest-xdist uses the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import io
import socket
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from runtime.errors import UserError
from tests.fork_server import Forked

ROOT = Path(__file__).parents[1]
ORACLE = Path(os.environ.get("ORACLE", Path(__file__).parents[2] / "shared" / "oracle"))
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def oracle():
    """Reads a file of the published reference's tensors; skips the test if it is missing."""
    from safetensors.torch import load_file

    def read(name: str) -> dict[str, torch.Tensor]:
        path = ORACLE / f"{name}.safetensors"
        if not path.is_file():
            pytest.skip(f"no published reference: {path} does not exist (set ORACLE=folder)")
        return load_file(path)

    return read


@pytest.fixture(scope="session")
def oracle_json():
    import json

    def read(name: str) -> dict:
        path = ORACLE / f"{name}.json"
        if not path.is_file():
            pytest.skip(f"no published reference: {path} does not exist (set ORACLE=folder)")
        return json.loads(path.read_text())

    return read


def run_program(*words: object, expect: int = 0, **options) -> subprocess.CompletedProcess:
    """Run a program as a user would. Its output is shown if its exit code is not the expected one.

    It is forked from the warm server (tests/fork_server.py), or started afresh if it begins with an option of Python (-c,
    -X importtime) or gets an input.
    """
    command = [sys.executable, *(str(w) for w in words)]
    if "input" in options or (command[1].startswith("-") and command[1] != "-m"):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **options)
    else:
        process = Forked(command[1:], **options)
        stdout, stderr = process.communicate()
        done = subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
    assert done.returncode == expect, f"{command}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def prepare(*words: object) -> tuple[str, str]:
    """Run `tools.make_shards` in this process, in a tenth of a program's time: (what it prints; its error, or its exit code
    if that is not 0; else ""). What a killed or a second program does needs `run_program`."""
    from tools import make_shards as program

    out = io.TextIOWrapper(io.BytesIO(), write_through=True)
    argv = ["make_shards", *map(str, words), *([] if "--processes" in words else ["--processes", "1"])]
    limit = mock.patch.object(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # the program sets it
    with (
        mock.patch.object(sys, "argv", argv), limit, warnings.catch_warnings(), contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
    ):  # fmt: skip
        try:
            code = program.main()
            error = f"exit code {code}" if code else ""
        except UserError as end:
            error = str(end)
    return out.buffer.getvalue().decode(), error


def run_processes(*words: object, processes: int = 2) -> None:
    """Run a program in several processes that train together, with the variables that torchrun gives them: for tests of what
    they compute. Tests of restarts, signals and exit codes start torchrun itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    started = [Forked([str(w) for w in words], env=os.environ | job | rank) for rank in ranks]
    with ThreadPoolExecutor(processes) as pool:
        outputs = list(pool.map(lambda process: process.communicate(), started))
    assert all(process.returncode == 0 for process in started), outputs


def env_without_make() -> dict[str, str]:
    """The environment without what the make that runs these tests has put there: a make that a test starts would take it."""
    variables = {
        "ARGS", "CONFIG", "DST", "TO", "GPUS", "METHOD", "METHODS", "NODES", "OUT", "RESTARTS", "RUN", "SHARDS", "SHARD_MB",
        "SRC", "TORCH", "VAL", "WHAT", "TABLE", "SCALE", "SEEDS",
    }  # fmt: skip
    beginnings = ("MAKE", "MFLAGS", "GNUMAKE")
    return {n: v for n, v in os.environ.items() if not n.startswith(beginnings) and n not in variables}


def difference(key: str, saved: object, current: object) -> str:
    """How a message writes that a value of the saved config is not the current one (runtime.config)."""
    return f"{key}: saved {saved}, current {current}"


def losses_of(method, batch, temperature: float = 0.04):
    """({"loss" and the metrics}, statistics) of a method at a teacher temperature."""
    from runtime.schedule import StepValues

    out = method(batch, StepValues(teacher_temperature=temperature))
    return {"loss": out.loss} | out.metrics, out.statistics


MEASURED = """import re, sys
{program}
print("peak", re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
sys.exit(code)"""


def run_measured(program: str, *words: object, expect: int = 0, **options) -> tuple[subprocess.CompletedProcess, int]:
    """Run lines of Python that set `code`, as a program; returns it and its peak memory in MB (Linux)."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MEASURED.format(program=program), *(str(w) for w in words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **{"env": env, "cwd": ROOT} | options)
    assert done.returncode == expect, f"{command}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    done.stdout, _, peak = done.stdout.rpartition("peak ")
    return done, int(peak) // 1024


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """96 small photos of three classes, of several sizes and colors; folder/<class>/<n>.jpg."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for n in range(96):
        kind = ("ash", "birch", "cedar")[n % 3]
        height, width = rng.integers(40, 90, 2)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
        photo = coarse.resize((width, height), Image.Resampling.BICUBIC)
        (folder / kind).mkdir(exist_ok=True)
        (photo.convert("L") if n % 10 == 9 else photo).save(folder / kind / f"{n:03d}.jpg", quality=95)
    return folder


@pytest.fixture(scope="session")
def tiny_shards(photos: Path, tmp_path_factory) -> Path:
    """The photos as shards."""
    folder = tmp_path_factory.mktemp("shards") / "tiny"
    run_program("-m", "tools.make_shards", "make", photos, folder, "--shard-mb", "0.05", "--processes", "1")
    return folder


def write_config(path: Path, shards: Path, run: Path) -> Path:
    """Write the config of a network that trains 20 steps in seconds."""
    path.write_text(
        f"""
data:
  shards: {shards}
  holdout: 0.1
  views:
    - {{count: 2, size: 32, scale: [0.4, 1.0], teacher: true, blur: [1.0, 0.1], solarize: [0.0, 0.2]}}
    - {{count: 2, size: 16, scale: [0.2, 0.5]}}
model: {{arch: custom, patch: 8, width: 24, depth: 2, heads: 2}}
reference: {{points: 2}}
head: {{hidden: 32, bottleneck: 16, prototypes: 40}}
clustering: {{queue: 32}}
optim: {{global_batch_size: 16, epochs: 4, warmup_epochs: 1}}
speed: {{compile: false, workers: 0, device: cpu}}
run: {{folder: {run}, log_every: 2, checkpoint_every: 7}}
"""
    )
    return path


@pytest.fixture
def tiny_config(tiny_shards: Path, tmp_path: Path) -> Path:
    return write_config(tmp_path / "tiny.yaml", tiny_shards, tmp_path / "run")


@pytest.fixture
def bucket(tiny_shards, monkeypatch):
    """moto's S3 with the tiny shards in s3://photos/tiny."""
    pytest.importorskip("moto")
    from tests.bucket import Bucket

    bucket = Bucket(tiny_shards)
    for key, value in {
        "AWS_ENDPOINT_URL": bucket.endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "word",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(key, value)
    yield bucket
    bucket.close()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A folder in VOC's layout: 24 + 12 scenes of 32 px, a large square of one of two colors and a small one of the other
    two; without noise, so that a patch's pixels give its class."""
    folder = tmp_path_factory.mktemp("scenes")
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    colors = np.array([[0, 0, 0], [250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 0]], np.uint8)
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 12)):
        names = [f"{split}{i}" for i in range(count)]
        for i, name in enumerate(names):
            mask = np.zeros((32, 32), np.uint8)
            mask[:16, :16], mask[24:, 24:] = 1 + i % 2, 3 + i // 2 % 2
            turned = np.rot90(mask, rng.integers(4)).copy()
            Image.fromarray(colors[turned]).save(folder / "JPEGImages" / f"{name}.png")
            Image.fromarray(turned, "L").save(folder / "SegmentationClass" / f"{name}.png")
        (folder / "ImageSets/Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
    (folder / "classes.txt").write_text("ground\na\nb\nc\nd\n")
    return folder
