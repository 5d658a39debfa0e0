"""F20: a folder with a run of another architecture, size, loss, data set, batch or format is refused, with the differences.

Not counted: what may differ, and what --allow-change allows, by key only.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import difference, run_program, write_config
from safetensors.torch import load_file, save_file

from runtime.checkpoint import latest_valid
from runtime.config import load_config

FIVE_STEPS = ("optim.epochs=1", "optim.warmup_epochs=0", "run.checkpoint_every=2", "run.keep_checkpoints=3")
WHOLE = os.environ.get("FAULTS") == "all"


@pytest.fixture(scope="module")
def finished(tiny_shards, tmp_path_factory) -> Path:
    """A config, with its finished run of five steps in `run` beside it."""
    folder = tmp_path_factory.mktemp("finished")
    path = write_config(folder / "tiny.yaml", tiny_shards, folder / "run")
    run_program("train.py", path, *FIVE_STEPS)
    return path


@pytest.fixture(scope="module")
def other_shards(photos, tmp_path_factory) -> Path:
    """Shards of all photos but one."""
    folder = tmp_path_factory.mktemp("others")
    shutil.copytree(photos, folder / "photos")
    next((folder / "photos").rglob("*.jpg")).unlink()
    run_program("-m", "tools.make_shards", "make", folder / "photos", folder / "shards", "--processes", "1")
    return folder / "shards"


def contents(folder: Path) -> dict[str, bytes]:
    """All files except the lock, which names the last process."""
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"}


ANOTHER = {
    "architecture": (
        ["model.arch=vit_tiny", "model.width=null", "model.depth=null", "model.heads=null"],
        [
            difference("model.arch", "custom", "vit_tiny"), difference("model.width", 24, None),
            difference("model.depth", 2, None),
        ],
    ),
    "dimensions": (
        ["model.depth=3", "head.prototypes=50", "data.views.1.size=24"],
        [
            difference("model.depth", 2, 3), difference("head.prototypes", 40, 50), difference("data.views.1.size", 16, 24),
        ],
    ),
    "loss": (
        ["loss.alpha=0.3", "reference.center=published"],
        [difference("loss.alpha", 0.5, 0.3), difference("reference.center", "loss", "published")],
    ),
    "data set": (["data.shards={others}"], ["data.shards: saved 96 samples in ", ", current 95 samples in "]),
    "global batch": (["optim.global_batch_size=8"], [difference("optim.global_batch_size", 16, 8)]),
    "older version": (
        ["run.folder={older}"],
        ["a checkpoint of format 1, but this program resumes from format 2 only", "RUN=another/folder"],
    ),
}  # fmt: skip


@pytest.mark.fault("F20")
@pytest.mark.fast
@pytest.mark.parametrize("what", ANOTHER)
def test_another_run_is_refused_with_the_difference(finished, other_shards, tmp_path, what):
    words, messages = ANOTHER[what]
    run = finished.parent / "run"
    if what == "older version":  # a file as the first version wrote it
        found = latest_valid(run / "checkpoints")
        assert found
        shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
        header = {"format": "1", "step": str(found.step), "config": found.config, "sha256": "0" * 64}
        save_file(found.tensors(), tmp_path / "run" / "checkpoints" / found.path.name, header)
        run = tmp_path / "run"
    words = [word.format(others=other_shards, older=run) for word in words]
    before = contents(run)
    # another key allows nothing
    allowed = ["--allow-change", "optim.lr", "--allow-change", "seed"]
    message = run_program("train.py", finished, *FIVE_STEPS, *words, *allowed, expect=2).stderr
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    for expected in messages:
        assert expected in message
    if what != "older version":
        assert f"{run} holds another run (" in message
        allowing = f"or resume this one with the new values: `python train.py {finished} "
        other_shapes = "(its weights have other shapes, they cannot be resumed with these values)"
        assert (other_shapes if what in ("architecture", "dimensions") else allowing) in message
    assert contents(run) == before  # no file has changed


def test_allow_change_takes_no_section(finished):
    message = run_program(
        "train.py", finished, *FIVE_STEPS, "--allow-change", "loss", "loss.alpha=0.3", expect=2
    ).stderr
    assert message.startswith("error: command line: --allow-change loss: no such key")


@pytest.mark.skipif(not WHOLE, reason="make faults runs it")
def test_the_location_of_the_shards_does_not_matter(finished, tiny_shards, tmp_path):
    """The same shards in another folder, other reader settings, another limit: the same run."""
    shutil.copytree(tiny_shards, tmp_path / "moved")
    words = [f"data.shards={tmp_path / 'moved'}", "speed.prefetch=5", "data.max_corrupt=0.5"]
    assert "is finished: 5 steps" in run_program("train.py", finished, *FIVE_STEPS, *words).stdout


@pytest.mark.skipif(not WHOLE, reason="make faults runs it")
def test_allow_change_allows_the_keys_it_names(finished, tmp_path):
    """--allow-change twice: both differences are allowed and reported, and the run resumes. Shapes cannot be changed."""
    shutil.copytree(finished.parent / "run", tmp_path / "run")
    folder = f"run.folder={tmp_path / 'run'}"
    allowed = ["--allow-change", "data.jitter.hue", "--allow-change", "loss.alpha"]
    words = [*FIVE_STEPS, folder, "optim.epochs=1.2", "data.jitter.hue=0.05"]
    message = run_program("train.py", finished, *words, "loss.alpha=0.3", *allowed, expect=2).stderr
    assert f"holds another run ({difference('optim.epochs', 1.0, 1.2)})" in message
    stdout = run_program("train.py", finished, *words, "loss.alpha=0.3", *allowed, "--allow-change=optim.epochs").stdout
    for line in (
        "resumed at step 5 from ", f"allowed change: {difference('data.jitter.hue', 0.1, 0.05)}",
        f"allowed change: {difference('loss.alpha', 0.5, 0.3)}",
        "finished: 6 steps",
    ):  # fmt: skip
        assert line in stdout
    assert load_config(tmp_path / "run" / "config.yaml").loss.alpha == 0.3
    # from now on it is this run's value
    assert "finished: 6 steps" in run_program("train.py", finished, *words, "loss.alpha=0.3").stdout

    before = contents(tmp_path / "run")
    shape = ["head.prototypes=50", "--allow-change", "head.prototypes"]
    message = run_program("train.py", finished, *words, "loss.alpha=0.3", *shape, expect=2).stderr
    assert "the checkpoint does not fit the model, which --allow-change cannot change" in message
    assert "cls_center': saved (40,), current (50,)" in message
    assert contents(tmp_path / "run") == before


@pytest.mark.skipif(not WHOLE, reason="make faults runs it")
def test_a_changed_world_size_resumes_and_is_reported(finished, tmp_path):
    """From one process to two, and to another precision, at step 2: one line reports it."""
    shutil.copytree(finished.parent / "run", tmp_path / "run")
    for path in sorted((tmp_path / "run" / "checkpoints").iterdir())[1:]:
        path.unlink()
    (tmp_path / "run" / "backbone.safetensors").unlink()
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    words = [*FIVE_STEPS, f"run.folder={tmp_path / 'run'}", "speed.precision=bfloat16"]
    stdout = run_program(*launcher, "train.py", finished, *words).stdout
    changes = "world size: saved 1, current 2; precision: saved float32, current bfloat16"
    assert "resumed at step 2 from " in stdout
    assert f"rounding differs from before step 2: {changes}" in stdout.splitlines()
    assert "finished: 5 steps" in stdout
    found = latest_valid(tmp_path / "run" / "checkpoints")
    assert found
    assert found.environment["world size"] == "2"


def test_the_content_of_a_checkpoint(finished):
    """Student, teacher, both centers, AdamW's moments, step, config, data, versions; nothing else."""
    found = latest_valid(finished.parent / "run" / "checkpoints")
    assert found
    assert (found.step, found.data["samples"]) == (5, 96)
    assert {"world size", "precision", "device", "reader", "torch", "git"} <= found.environment.keys()
    tensors = load_file(found.path)  # with safetensors itself
    kinds = {name.partition(".")[0] for name in tensors}
    assert kinds == {"student", "teacher", "cls_center", "reference_center", "adamw"}
    assert {name.rpartition(".")[2] for name in tensors if name.startswith("adamw.")} == {
        "step",
        "exp_avg",
        "exp_avg_sq",
    }
    assert json.loads((finished.parent / "run" / "versions.jsonl").read_text())["torch"] == found.environment["torch"]


def test_another_run_is_refused_before_torch_is_imported(finished):
    """`python -X importtime` lists what was imported."""
    words = ("-X", "importtime", "train.py", finished, *FIVE_STEPS, "loss.alpha=0.3")
    imported = run_program(*words, expect=2).stderr
    assert "runtime.checkpoint" in imported
    assert "| torch\n" not in imported
