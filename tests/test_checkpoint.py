"""Checkpoints: written in the background and atomically; the newest valid one is loaded; damage is found in any byte."""

import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from runtime.checkpoint import (
    Writer,
    environment_changes,
    fingerprint,
    latest_valid,
    open_checkpoint,
    restore,
    save_tensors,
)
from runtime.checkpoint import writer as checkpoint_writer
from runtime.errors import UserError

HEADER = ("seed: 0\n", {"samples": 3}, {"world size": "1", "precision": "float32"})  # config, data, environment


@pytest.fixture
def trained():
    """A model of two layers after one step, and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    adamw = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(2, 5)).sum().backward()
    adamw.step()
    return model, adamw


def save(folder, trained, *steps, keep=2):
    writer = Writer(folder, keep, *HEADER)
    for step in steps:
        writer.save(step, *trained)
    writer.finish()
    return writer


def names(folder):
    return sorted(int(p.stem.split("-")[1]) for p in folder.glob("checkpoint-*"))


def corrupt(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_restores_model_and_optimizer(trained, tmp_path):
    model, adamw = trained
    save(tmp_path, trained, 5)
    found = latest_valid(tmp_path)
    assert (found.step, found.config, found.data, found.environment) == (5, *HEADER)
    again = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    adamw_again = torch.optim.AdamW(again.parameters(), fused=True)
    restore(again, adamw_again, found)
    for one, other in ((model, adamw), (again, adamw_again)):
        other.zero_grad()
        one(torch.full((2, 5), 0.5)).square().sum().backward()
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_step_waits_for_the_copy_only(trained, tmp_path, monkeypatch):
    """While the disk hangs, save returns, training continues, and the state at the time of the save is written. The next
    save waits for the previous one."""
    model, adamw = trained
    released = threading.Event()

    def slow_save(*args):
        released.wait()
        save_tensors(*args)

    monkeypatch.setattr(checkpoint_writer, "save_tensors", slow_save)
    writer = Writer(tmp_path, 2, *HEADER)
    before = model[0].weight.detach().clone()
    writer.save(1, model, adamw)
    assert names(tmp_path) == []
    with torch.no_grad():
        model[0].weight += 1
    writer.check()  # no error so far
    second = threading.Thread(target=writer.save, args=(2, model, adamw))
    second.start()
    second.join(0.05)
    assert second.is_alive()
    released.set()
    second.join()
    writer.finish()
    assert torch.equal(open_checkpoint(tmp_path / "checkpoint-00000001.safetensors").tensors()["0.weight"], before)
    assert torch.equal(latest_valid(tmp_path).tensors()["0.weight"], before + 1)


def test_corrupt_checkpoints_are_skipped_and_displace_no_valid_one(trained, tmp_path, capsys):
    save(tmp_path, trained, 1, 2, 3, keep=2)
    assert names(tmp_path) == [2, 3]
    corrupt(tmp_path / "checkpoint-00000003.safetensors")
    assert latest_valid(tmp_path).step == 2
    assert "skipped: " in capsys.readouterr().out
    (tmp_path / "checkpoint-00000009.safetensors").write_bytes(b"")  # the newest by name, of another process
    save(tmp_path, trained, 4, keep=2)
    assert names(tmp_path) == [2, 3, 4, 9]  # 2 and 4 are the two valid ones
    save(tmp_path, trained, 5, keep=2)
    assert names(tmp_path) == [4, 5, 9]
    for step in (4, 5):
        corrupt(tmp_path / f"checkpoint-{step:08d}.safetensors")
    with pytest.raises(UserError, match=r"sha256 differs.*no checkpoint in .* is valid: remove them to start"):
        latest_valid(tmp_path)
    assert latest_valid(tmp_path / "nothing") is None


def test_damage_in_any_byte_is_found(trained, tmp_path):
    save(tmp_path, trained, 1)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for at in np.random.default_rng(0).integers(0, len(whole), 200):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(UserError):
            open_checkpoint(path)
    for cut in (0, 7, 8, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError):
            open_checkpoint(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(UserError):
        open_checkpoint(path)
    path.write_bytes(whole)
    assert open_checkpoint(path).step == 1


def test_leftover_temporary_files_are_removed_and_never_loaded(trained, tmp_path):
    save(tmp_path, trained, 1)
    leftover = tmp_path / ".checkpoint-00000002.safetensors.tmp"
    leftover.write_bytes((tmp_path / "checkpoint-00000001.safetensors").read_bytes())
    assert latest_valid(tmp_path).step == 1
    Writer(tmp_path, 2, *HEADER)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-00000001.safetensors"]


def test_checkpoints_beyond_keep_are_pruned_at_the_next_start(trained, tmp_path):
    """As after several kills between writing a file and removing the oldest one."""
    save(tmp_path, trained, 1, 2, 3, 4, 5, keep=9)
    assert names(tmp_path) == [1, 2, 3, 4, 5]
    Writer(tmp_path, 2, *HEADER)
    assert names(tmp_path) == [4, 5]


def test_a_state_that_is_not_finite_is_not_saved(trained, tmp_path):
    writer = save(tmp_path, trained, 1)
    with torch.no_grad():
        trained[0][1].bias[2] = float("nan")
    writer.save(2, *trained)
    with pytest.raises(UserError, match=r"'1\.bias' is not finite at step 2: no checkpoint is written"):
        writer.finish()
    writer.finish()  # reported once
    assert names(tmp_path) == [1]


def test_safetensors_reads_every_dtype_that_is_written(tmp_path):
    kinds = (torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool)
    tensors = {str(k): torch.arange(6).to(k).reshape(2, 3).T for k in kinds}
    tensors |= {"scalar": torch.tensor(3.5), "none": torch.zeros(0, 4), "naïve": torch.ones(1, dtype=torch.uint8)}
    save_tensors(tmp_path / "t.safetensors", tensors, {"ünder": "line\n"})
    read = load_file(tmp_path / "t.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[n], t) and read[n].dtype == t.dtype for n, t in tensors.items())
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


def test_tensors_that_do_not_fit_are_named(trained, tmp_path):
    save(tmp_path, trained, 1)
    found = latest_valid(tmp_path)
    other = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 4), nn.Linear(4, 1))
    with pytest.raises(UserError, match=r"'2\.bias' is missing, .* \(and 1 more\)"):
        restore(other, torch.optim.AdamW(other.parameters()), found)


def test_a_changed_environment_is_reported(trained, tmp_path):
    save(tmp_path, trained, 4)
    found = latest_valid(tmp_path)
    assert environment_changes(found, HEADER[2]) == []
    assert environment_changes(None, HEADER[2]) == []
    (line,) = environment_changes(found, {"world size": "2", "precision": "float32"})
    assert line == "rounding differs from before step 4: world size: saved 1, current 2"


def test_fingerprint():
    shard = {"name": "a.tar", "samples": 3, "bytes": 100, "sha256": "x"}
    one = fingerprint({"shards": [shard, shard | {"sha256": "y"}]})
    assert (one["samples"], one["shards"]) == (6, 2)
    assert one == fingerprint({"shards": [shard | {"name": "b.tar"}, shard | {"sha256": "y"}]})  # names do not count
    assert one != fingerprint({"shards": [shard | {"sha256": "y"}, shard]})  # the order counts
