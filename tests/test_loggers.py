"""run.loggers: the same curves everywhere, from one run that was killed and resumed; one that fails never stops training.

TensorBoard is always tested; W&B (offline) and MLflow (its file store) where they are installed. Each is read back with its
own reader, or where it has none, from its file.
"""

import json
import os
import shutil
import socket
import struct
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT, run_program, write_config

from runtime.config import load_config
from runtime.loggers import Loggers, read_ids
from runtime.metrics import read_jsonl
from tests.fork_server import Forked

EXTERNAL = [name for name in ("wandb", "mlflow") if find_spec(name)]
Curves = dict[str, dict[int, list[float]]]  # metric: step: values, of which there must be one


def store(folder: Path) -> dict[str, str]:
    """The environment that keeps W&B and MLflow on this disk."""
    return {
        "WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": f"file:{folder}/mlruns", "MLFLOW_ALLOW_FILE_STORE": "true",
    }  # fmt: skip


def add(curves: Curves, name: str, step: int, value: float) -> None:
    curves.setdefault(name, {}).setdefault(step, []).append(value)


def tensorboard_curves(run: Path) -> Curves:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}, purge_orphaned_data=True)
    events.Reload()
    curves: Curves = {}
    for name in events.Tags()["scalars"]:
        for point in events.Scalars(name):
            add(curves, name, point.step, point.value)
    return curves


def records(data: bytes, at: int = 7, block: int = 32768) -> Iterator[bytes]:
    """Records of a file in LevelDB's log format, behind W&B's header of 7 bytes."""
    whole = b""
    while at + 7 <= len(data):
        if block - at % block < 7:  # too little for a record's header
            at += block - at % block
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield whole
            whole = b""


def wandb_curves(run: Path) -> Curves:
    from wandb.proto import wandb_internal_pb2

    curves: Curves = {}
    files = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    assert len({file.name for file in files}) == 1  # one run, started several times
    for file in files:
        for data in records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                for name in items.keys() - {"_step", "_runtime", "_timestamp"}:
                    add(curves, name, items["_step"], items[name])
    return curves


def mlflow_curves(run: Path) -> Curves:
    import mlflow

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        client = mlflow.MlflowClient(store(run.parent)["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("densedino")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == (run.name, "FINISHED")
    assert found.data.params["optim.global_batch_size"] == "16"
    curves: Curves = {}
    for name in found.data.metrics:
        for point in client.get_metric_history(found.info.run_id, name):
            add(curves, name, point.step, point.value)
    return curves


READERS = {"tensorboard": tensorboard_curves, "wandb": wandb_curves, "mlflow": mlflow_curves}


@pytest.fixture(scope="module")
def run(tiny_shards, tmp_path_factory) -> Path:
    """A run with every logger that is installed: killed, resumed from a step before the kill, trained to its end."""
    folder = tmp_path_factory.mktemp("loggers") / "run"
    config = write_config(folder.with_name("tiny.yaml"), tiny_shards, folder)
    loggers = ",".join(["jsonl", "tensorboard", *EXTERNAL])
    command = ["train.py", str(config), f"run.loggers=[{loggers}]", "optim.epochs=30", "run.checkpoint_every=50"]
    env = os.environ | store(folder.parent)
    process = Forked(command, env=env)
    until = time.monotonic() + 600
    while len(read_jsonl(folder / "metrics.jsonl")) < 40 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    process.kill()
    out, err = process.communicate()
    rows = read_jsonl(folder / "metrics.jsonl")
    assert rows, f"{out}\n{err}"
    assert 50 < rows[-1]["step"] < 150
    (folder / "killed").write_text(str(rows[-1]["step"]))
    resumed = run_program(*command, env=env).stdout
    assert "resumed at step" in resumed
    for name in EXTERNAL:
        assert f"{name}: " in out  # where the curves are
        assert f"{name}: " in resumed
    return folder


@pytest.mark.parametrize("name", READERS)
def test_every_logger_has_the_same_curves(run, name):
    if name != "tensorboard":
        pytest.importorskip(name, reason=f"{name} is not installed: pip install {name}")
    rows = read_jsonl(run / "metrics.jsonl")
    assert rows[-1]["step"] == 150
    curves, killed = READERS[name](run), int((run / "killed").read_text())
    names = {key for row in rows for key in row} - {"step"}
    assert curves.keys() == names
    for metric in names:
        wanted = {row["step"]: row[metric] for row in rows if metric in row}
        found = {step: values[0] for step, values in curves[metric].items()}
        assert all(len(values) == 1 for values in curves[metric].values()), metric  # no step is there twice
        lost = wanted.keys() - found.keys()
        if name == "wandb":  # what was on its way to W&B's process when ours was killed
            assert lost == {step for step in wanted if min(lost, default=killed + 1) <= step <= killed}, metric
            assert len(lost) < len(wanted) / 4, metric
            wanted = {step: value for step, value in wanted.items() if step not in lost}
        assert found.keys() == wanted.keys(), metric
        if metric in ("loss", "lr", "teacher_entropy", "epoch"):  # speeds differ where steps were made twice
            assert list(found.values()) == pytest.approx(list(wanted.values()), rel=1e-6)


def test_a_logger_that_is_added_later_has_the_whole_curve(tiny_config, tmp_path):
    run = tmp_path / "run"
    run_program("train.py", tiny_config, "run.loggers=jsonl")
    assert not (run / "tensorboard").exists()
    run_program("train.py", tiny_config, "run.loggers=tensorboard", "optim.epochs=6", "--allow-change", "optim.epochs")
    rows = read_jsonl(run / "metrics.jsonl")
    assert sorted(tensorboard_curves(run)["loss"]) == [row["step"] for row in rows]
    assert rows[-1]["step"] == 30


def test_a_logger_that_fails_says_so_once_and_is_completed_later(tiny_config, tmp_path):
    """A disk is full under TensorBoard. The run ends well, and the next start sends the rest."""
    run = tmp_path / "run"
    script = tmp_path / "failing.py"
    script.write_text(
        f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train
from runtime.loggers import TensorBoard

def write(self, step, values, original=TensorBoard.write):
    if step >= 9:
        raise OSError("No space left on device")
    original(self, step, values)

TensorBoard.write = write
train.run_cli(train.main)
"""
    )
    out = run_program(script, tiny_config).stdout
    assert out.count("warning: tensorboard failed after step 8 (OSError: No space left on device)") == 1
    assert "finished: 20 steps" in out
    assert read_ids(run)["tensorboard"]["sent"] == 8
    assert read_jsonl(run / "metrics.jsonl")[-1]["step"] == 20
    more = ("optim.epochs=6", "--allow-change", "optim.epochs")
    assert "warning" not in run_program("train.py", tiny_config, *more).stdout
    assert sorted(tensorboard_curves(run)["loss"]) == [row["step"] for row in read_jsonl(run / "metrics.jsonl")]
    assert "sent" not in read_ids(run)["tensorboard"]


def test_a_measurement_is_at_its_step(tiny_config, tmp_path):
    """Its row comes after later ones, and after a resume it is not sent again."""
    config = load_config(tiny_config, ["run.loggers=tensorboard"])
    rows: list[dict[str, float]] = [{"step": step, "epoch": step / 10, "loss": 9.0 - step} for step in (2, 4, 6)]
    first = [*rows[:2], {"step": 3, "epoch": 0.3, "knn_top1": 30.0}, {"step": 2, "epoch": 0.2, "knn_top1": 20.0}]
    for start, kept, new in ((0, [], first), (4, first, rows[2:])):
        loggers = Loggers(tmp_path, config, start, start, kept)
        for row in new:
            loggers.write(row)
        assert loggers.close(finished=False) == []
    assert tensorboard_curves(tmp_path) == {
        "epoch": {2: [pytest.approx(0.2)], 4: [pytest.approx(0.4)], 6: [pytest.approx(0.6)]},
        "loss": {2: [7.0], 4: [5.0], 6: [3.0]}, "knn_top1": {3: [30.0], 2: [20.0]},
    }  # fmt: skip


def test_a_server_that_does_not_answer_delays_no_step(tiny_config, tmp_path):
    """An address that accepts and is silent, in the place of MLflow's file store when the run resumes."""
    pytest.importorskip("mlflow", reason="mlflow is not installed: pip install mlflow")
    words = ("train.py", tiny_config, "run.loggers=mlflow")
    run_program(*words, env=os.environ | store(tmp_path))
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)
        env = os.environ | {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        fast = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "1", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
        more = ("optim.epochs=6", "--allow-change", "optim.epochs")
        out = run_program(*words, *more, env=env | fast).stdout
    assert "warning: mlflow failed after step 20" in out
    assert "finished: 30 steps" in out
    run_program(*words, "optim.epochs=7", "--allow-change", "optim.epochs", env=os.environ | store(tmp_path))
    assert sorted(mlflow_curves(tmp_path / "run")["loss"])[-1] == 35
    assert len(mlflow_curves(tmp_path / "run")["loss"]) == len(read_jsonl(tmp_path / "run" / "metrics.jsonl"))


def test_the_process_of_wandb_dies(tmp_path):
    """W&B sends from a process of its own, here killed: one message, and what it lacks is known."""
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    script = f"""
import os, signal, sys, time
from pathlib import Path
from runtime.config import Config
from runtime.loggers import Loggers
config = Config()
config.run.loggers = ["wandb"]
loggers = Loggers(Path({str(tmp_path)!r}), config, 0, 0, [])
messages = loggers.write({{"step": 1, "loss": 1.0}})
for child in Path("/proc").glob("[0-9]*/stat"):
    name, _, fields = child.read_text().partition("(")[2].rpartition(")")
    if name == "wandb-core" and int(fields.split()[1]) == os.getpid():
        os.kill(int(child.parent.name), signal.SIGKILL)
for step in range(2, 1000):
    messages += loggers.write({{"step": step, "loss": 1.0}})
    time.sleep(0.01 if not messages else 0)
messages += loggers.close(True)
print(len(messages), *messages)
"""
    out = run_program("-c", script, env=os.environ | store(tmp_path) | {"PYTHONPATH": str(ROOT)}).stdout
    assert out.startswith("1 warning: wandb failed after step ")
    assert read_ids(tmp_path)["wandb"]["sent"] < 900


def test_a_logger_that_cannot_be_opened_stops_a_new_run(tiny_config, tmp_path):
    pytest.importorskip("mlflow", reason="mlflow is not installed: pip install mlflow")
    (tmp_path / "mlruns").write_text("a file")
    err = run_program("train.py", tiny_config, "run.loggers=mlflow", expect=2, env=os.environ | store(tmp_path)).stderr
    assert err.startswith("error: run.loggers: mlflow cannot be opened (")
    assert "run.loggers=[jsonl] trains without it" in err


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("run.loggers=[jsonl,tensorbord]", "did you mean 'tensorboard'?"),
        ("run.loggers=[wandb,wandb]", "run.loggers: wandb: named twice"),
        ("run.wandb=true", "run.wandb: no such key, did you mean 'run.loggers'?"),
        ("--tensorboard", "--tensorboard: no such option, did you mean 'run.loggers'?"),
        ("run.loggers={a: 1}", "run.loggers.0: expected one of jsonl, tensorboard, wandb, mlflow, found a mapping"),
    ],
)
def test_wrong_words(tiny_config, word, message):
    assert message in run_program("train.py", tiny_config, word, expect=2).stderr


@pytest.mark.skipif(len(EXTERNAL) == 2, reason="wandb and mlflow are both installed")
def test_a_logger_that_is_not_installed_is_named(tiny_config):
    (name, *_) = [name for name in ("wandb", "mlflow") if name not in EXTERNAL]
    err = run_program("train.py", tiny_config, f"run.loggers={name}", expect=2).stderr
    assert f"run.loggers: {name} is not installed: `" in err
    assert f"-m pip install {name}`" in err


def test_a_copy_of_a_run_has_curves_of_its_own(tmp_path):
    """A moved run keeps its id, a copy beside the original does not."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    tree = {"folder": str(tmp_path / "a"), "wandb": {"id": "x"}}
    (tmp_path / "a" / "loggers.json").write_text(json.dumps(tree))
    shutil.copy(tmp_path / "a" / "loggers.json", tmp_path / "b")
    assert read_ids(tmp_path / "a") == {"wandb": {"id": "x"}}
    assert read_ids(tmp_path / "b") == {}
    shutil.rmtree(tmp_path / "a")
    assert read_ids(tmp_path / "b") == {"wandb": {"id": "x"}}
