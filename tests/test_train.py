"""Training as a user starts it: it learns, resumes exactly, refuses to mix runs; several processes equal one."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import difference, run_processes, run_program
from safetensors.torch import load_file

from runtime import distributed
from runtime.checkpoint import latest_valid
from tests.fork_server import Forked


def final(folder: Path) -> dict:
    found = latest_valid(folder / "checkpoints")
    assert found
    return found.tensors()


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_from_start_to_end(tiny_config, tmp_path):
    stdout = run_program("train.py", tiny_config).stdout
    run = tmp_path / "run"
    assert "finished: 20 steps" in stdout
    rows = metrics(run)
    assert [r["step"] for r in rows] == sorted({*range(2, 21, 2), 7, 14})  # a checkpoint is logged, too
    wanted = {"loss", "cls_loss", "reference_loss", "teacher_entropy", "lr", "images_per_second", "data_wait_percent"}
    assert wanted <= rows[0].keys()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "checkpoint-00000014.safetensors", "checkpoint-00000020.safetensors"
    ]  # fmt: skip
    assert list((run / "tensorboard").iterdir())
    assert json.loads((run / "versions.jsonl").read_text())["torch"]

    # the backbone file holds the teacher under timm's names
    backbone = load_file(run / "backbone.safetensors")
    state = final(run)
    assert set(backbone) == {n[17:] for n in state if n.startswith("teacher.backbone.")}
    assert all((backbone[n] == state[f"teacher.backbone.{n}"]).all() for n in backbone)

    # a finished run says so; other settings are refused; the same command gives the same result
    assert "is finished: 20 steps" in run_program("train.py", tiny_config).stdout
    refused = run_program("train.py", tiny_config, "loss.alpha=0.3", expect=2).stderr
    assert f"holds another run ({difference('loss.alpha', 0.5, 0.3)})" in refused
    run_program("train.py", tiny_config, f"run.folder={tmp_path / 'again'}", "speed.workers=1")
    again = final(tmp_path / "again")
    assert all((again[n] == state[n]).all() for n in state)


def test_stopped_and_resumed_is_equal_to_undisturbed(tiny_config, tmp_path):
    run_program("train.py", tiny_config, f"run.folder={tmp_path / 'whole'}")
    command = ["train.py", str(tiny_config), f"run.folder={tmp_path / 'cut'}", "speed.workers=1"]
    # a process group, as a terminal or torchrun makes one: the signal reaches the data workers too
    process = Forked(command)
    rows = tmp_path / "cut" / "metrics.jsonl"
    while not (rows.is_file() and len(rows.read_text().splitlines()) >= 2) and process.poll() is None:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("the run was over before the signal arrived")
    assert process.returncode == 130
    assert "the same command resumes from there" in out
    cut = int(max((tmp_path / "cut" / "checkpoints").iterdir()).stem.split("-")[1])
    assert 0 < cut < 20
    resumed = run_program(*command).stdout
    assert f"resumed at step {cut}" in resumed
    a, b = final(tmp_path / "whole"), final(tmp_path / "cut")
    assert a.keys() == b.keys()
    assert all((a[n] == b[n]).all() for n in a)


@pytest.mark.parametrize(("precision", "near"), [("float64", 1e-9), ("float32", 1e-5)])
def test_two_processes_and_accumulation_agree_with_one(tiny_config, tmp_path, precision, near):
    """Five steps, drop path off, last layers frozen for two: the same batches give the same weights, up to the order of
    additions."""
    words = [
        "model.drop_path=0",
        "optim.epochs=1",
        "optim.warmup_epochs=0",
        "run.log_every=1",
        f"speed.precision={precision}",
    ]
    words += ["optim.freeze_last_layer_epochs=0.4"]
    run_program("train.py", tiny_config, *words, f"run.folder={tmp_path / 'one'}")
    run_program("train.py", tiny_config, *words, f"run.folder={tmp_path / 'pieces'}", "speed.grad_accum_steps=2")
    run_processes("train.py", tiny_config, *words, f"run.folder={tmp_path / 'two'}")
    both = (f"run.folder={tmp_path / 'two-pieces'}", "speed.grad_accum_steps=2")
    run_processes("train.py", tiny_config, *words, *both)
    one, of_one = metrics(tmp_path / "one"), final(tmp_path / "one")
    assert len(one) == 5
    for other in ("pieces", "two", "two-pieces"):
        for a, b in zip(one, metrics(tmp_path / other), strict=True):
            for name in ("loss", "cls_loss", "reference_loss", "teacher_entropy"):
                assert b[name] == pytest.approx(a[name], rel=near), (other, a["step"])
        if precision == "float64":  # in float32 Adam's first step is a sign where a gradient is only rounding
            for name, t in final(tmp_path / other).items():
                assert (t - of_one[name]).abs().max() <= near * max(1.0, float(of_one[name].abs().max())), (other, name)


def test_bfloat16_trains(tiny_config, tmp_path):
    """Autocast: parameters, centers and losses stay float32, and losses are close to those of float32."""
    words = ["optim.epochs=1", "optim.warmup_epochs=0", "model.drop_path=0"]
    usual = run_program("train.py", tiny_config, *words, f"run.folder={tmp_path / 'exact'}").stdout
    stdout = run_program(
        "train.py", tiny_config, *words, f"run.folder={tmp_path / 'half'}", "speed.precision=bfloat16"
    ).stdout
    assert ("not in this device's hardware" in stdout) != distributed.has_bfloat16(torch.device("cpu"))
    assert ("bfloat16 is faster" in usual) == torch.cpu._is_avx512_bf16_supported()
    assert "bfloat16 is faster" not in stdout
    a, b = metrics(tmp_path / "exact"), metrics(tmp_path / "half")
    assert a[0]["loss"] != b[0]["loss"]
    assert b[-1]["loss"] == pytest.approx(a[-1]["loss"], rel=2e-2)
    assert all(t.dtype == torch.float32 for t in final(tmp_path / "half").values())


def test_a_profile_and_recomputed_activations(tiny_config, tmp_path):
    """run.profile leaves a trace and a table; speed.activation_checkpointing changes nothing but memory."""
    words = ["optim.epochs=3", "run.checkpoint_every=100", "model.drop_path=0.3"]
    run_program("train.py", tiny_config, *words, "run.profile=true")
    table = (tmp_path / "run" / "profile" / "table.txt").read_text()
    assert "Self CPU" in table
    assert "aten::" in table  # which of them are among the 15 depends on the machine
    assert json.loads((tmp_path / "run" / "profile" / "trace.json").read_text())["traceEvents"]
    run_program(
        "train.py", tiny_config, *words, "speed.activation_checkpointing=true", f"run.folder={tmp_path / 'again'}"
    )
    a, b = final(tmp_path / "run"), final(tmp_path / "again")
    assert all((a[n] == b[n]).all() for n in a)


def test_a_longer_run_logs_throughput(tiny_config, tmp_path):
    """In float64, too: the cost is counted before the network is moved to its device."""
    words = ["optim.epochs=41", "run.log_every=100", "run.checkpoint_every=1000", "speed.precision=float64"]
    run_program("train.py", tiny_config, *words)
    assert all(row["tflops"] > 0 and row["peak_memory_mb"] > 0 for row in metrics(tmp_path / "run"))


def test_dino_is_the_same_trainer_without_points(tiny_config, tmp_path):
    run_program("train.py", tiny_config, "method=dino", "data.min_overlap=0", "optim.epochs=1", "optim.warmup_epochs=0")
    rows = metrics(tmp_path / "run")
    assert "reference_loss" not in rows[0]
    assert rows[0]["loss"] == rows[0]["cls_loss"]
    assert not any("reference_head" in n for n in final(tmp_path / "run"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.shards=null"], "data.shards: which shards?"),
        (["data.shards=/nowhere"], "/nowhere: no such folder"),
        (["optim.global_batch_size=1024"], "fewer than one global batch of 1024"),
        (["speed.device=cuda"], "torch finds no CUDA device"),
    ],
)
def test_wrong_inputs(tiny_config, words, message):
    if "cuda" in words[0] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    stderr = run_program("train.py", tiny_config, *words, expect=2).stderr
    assert message in stderr
    assert "Traceback" not in stderr
    assert stderr.count("\n") == 1


def test_dry_run_touches_nothing(tiny_config, tmp_path):
    stdout = run_program("train.py", tiny_config, "--dry-run").stdout
    assert "steps        20 (5 an epoch)" in stdout
    assert "1 + 16 patches + 6 reference tokens" in stdout
    assert "GFLOP per image and step" in stdout
    assert "GiB of tensors on each device" in stdout
    assert not (tmp_path / "run").exists()


def test_damaged_samples_are_listed_and_limited(tiny_config, tiny_shards, tmp_path):
    """Every batch is full, damaged samples are in damaged.jsonl; above the limit the run stops and says so."""
    import shutil

    folder = tmp_path / "damaged"
    shutil.copytree(tiny_shards, folder)
    for shard in sorted(folder.glob("*.tar"))[:1]:
        content = bytearray(shard.read_bytes())
        for at in range(3 * 512, len(content), len(content) // 3):
            content[at] ^= 0x10
        shard.write_bytes(content)
    stderr = run_program("train.py", tiny_config, f"data.shards={folder}", expect=2).stderr
    assert "samples are damaged in one epoch, more than data.max_corrupt: 0.001" in stderr
    words = [
        f"data.shards={folder}",
        "data.max_corrupt=0.1",
        f"run.folder={tmp_path / 'b'}",
        "optim.epochs=1",
        "optim.warmup_epochs=0",
    ]
    assert "finished: 5 steps" in run_program("train.py", tiny_config, *words).stdout
    rows = [json.loads(line) for line in (tmp_path / "b" / "damaged.jsonl").read_text().splitlines()]
    assert rows
    assert all(row["planned"] != row["read"] for row in rows)


def test_a_killed_trainer_leaves_no_process(tiny_config, tmp_path):
    """kill -9 of the trainer only: its data worker, which ignores Ctrl-C and SIGTERM, exits by itself."""
    process = Forked(["train.py", str(tiny_config), "speed.workers=1", "optim.epochs=2000"])
    rows = tmp_path / "run" / "metrics.jsonl"
    until = time.monotonic() + 60
    while not rows.is_file() and time.monotonic() < until:
        time.sleep(0.05)
    process.kill()
    process.wait()
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            os.killpg(process.pid, 0)  # raises if no process of the group is left
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail("a process outlived the trainer")
