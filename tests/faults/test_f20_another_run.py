"""F20: a folder that holds a run of other architecture, size, loss, data, batch or program is left alone, told in words.

Uncounted beside them: what may differ does, and what --allow-change lets pass, by name only.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import run_program, write_config
from safetensors.torch import load_file, save_file

from runtime.checkpoint import latest_valid
from runtime.config import load_config

FIVE_STEPS = ("optim.epochs=1", "optim.warmup_epochs=0", "run.checkpoint_every=2", "run.keep_checkpoints=3")
WHOLE = os.environ.get("FAULTS") == "all"


@pytest.fixture(scope="module")
def finished(tiny_shards, tmp_path_factory) -> Path:
    """A config whose run of five steps is in `run` beside it."""
    folder = tmp_path_factory.mktemp("finished")
    path = write_config(folder / "tiny.yaml", tiny_shards, folder / "run")
    run_program("train.py", path, *FIVE_STEPS)
    return path


@pytest.fixture(scope="module")
def other_shards(photos, tmp_path_factory) -> Path:
    """All photos but one."""
    folder = tmp_path_factory.mktemp("others")
    shutil.copytree(photos, folder / "photos")
    next((folder / "photos").rglob("*.jpg")).unlink()
    run_program("-m", "tools.make_shards", "make", folder / "photos", folder / "shards", "--processes", "1")
    return folder / "shards"


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the lock, which names who came last."""
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"}


ANOTHER = {
    "architecture": (
        ["model.arch=vit_tiny", "model.width=null", "model.depth=null", "model.heads=null"],
        ["model.arch: custom there, vit_tiny now", "model.width: 24 there, None now", "model.depth: 2 there, None now"],
    ),
    "dimensions": (
        ["model.depth=3", "head.prototypes=50", "data.views.1.size=24"],
        [
            "model.depth: 2 there, 3 now", "head.prototypes: 40 there, 50 now", "data.views.1.size: 16 there, 24 now",
        ],
    ),
    "loss": (
        ["loss.alpha=0.3", "reference.center=published"],
        ["loss.alpha: 0.5 there, 0.3 now", "reference.center: loss there, published now"],
    ),
    "data set": (["data.shards={others}"], ["data.shards: 96 samples in ", " shards there, 95 samples in "]),
    "global batch": (["optim.global_batch_size=8"], ["optim.global_batch_size: 16 there, 8 now"]),
    "older version": (
        ["run.folder={older}"], ["a checkpoint of format 1, this program goes on from format 2", "RUN=another/folder"]
    ),
}  # fmt: skip


@pytest.mark.fault("F20")
@pytest.mark.fast
@pytest.mark.parametrize("what", ANOTHER)
def test_another_run_is_refused_with_the_difference(finished, other_shards, tmp_path, what):
    words, told = ANOTHER[what]
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
    # naming another value forces nothing, and a section is no name
    forced = ["--allow-change", "optim.lr", "--allow-change", "seed"]
    message = run_program("train.py", finished, *FIVE_STEPS, *words, *forced, expect=2).stderr
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    for word in told:
        assert word in message
    if what != "older version":
        assert f"{run} holds another run (" in message
        assert "--allow-change NAME goes on in this one" in message
    assert contents(run) == before  # nothing is lost, or even touched


def test_a_section_cannot_be_forced(finished):
    message = run_program(
        "train.py", finished, *FIVE_STEPS, "--allow-change", "loss", "loss.alpha=0.3", expect=2
    ).stderr
    assert message.startswith(f"error: {finished}: --allow-change loss: no such key")


@pytest.mark.skipif(not WHOLE, reason="make faults runs it")
def test_where_the_photos_lie_makes_no_difference(finished, tiny_shards, tmp_path):
    """The same shards in another folder, another reader's settings, another budget: the same run."""
    shutil.copytree(tiny_shards, tmp_path / "moved")
    words = [f"data.shards={tmp_path / 'moved'}", "speed.prefetch=5", "data.max_corrupt=0.5"]
    assert "is finished: 5 steps" in run_program("train.py", finished, *FIVE_STEPS, *words).stdout


@pytest.mark.skipif(not WHOLE, reason="make faults runs it")
def test_force_lets_pass_what_it_names(finished, tmp_path):
    """--allow-change twice: both differences pass and are told, and the run goes on; what no name can force are shapes."""
    shutil.copytree(finished.parent / "run", tmp_path / "run")
    folder = f"run.folder={tmp_path / 'run'}"
    forced = ["--allow-change", "data.jitter.hue", "--allow-change", "loss.alpha"]
    words = [*FIVE_STEPS, folder, "optim.epochs=1.2", "data.jitter.hue=0.05"]
    message = run_program("train.py", finished, *words, "loss.alpha=0.3", *forced, expect=2).stderr
    assert "holds another run (optim.epochs: 1.0 there, 1.2 now)" in message
    told = run_program("train.py", finished, *words, "loss.alpha=0.3", *forced, "--allow-change=optim.epochs").stdout
    for line in (
        "resumed at step 5 from ", "forced: data.jitter.hue: 0.1 there, 0.05 now", "forced: loss.alpha: 0.5 there, 0.3 now",
        "finished: 6 steps",
    ):  # fmt: skip
        assert line in told
    assert load_config(tmp_path / "run" / "config.yaml").loss.alpha == 0.3
    # the next time it is this run's own value
    assert "finished: 6 steps" in run_program("train.py", finished, *words, "loss.alpha=0.3").stdout

    before = contents(tmp_path / "run")
    shape = ["head.prototypes=50", "--allow-change", "head.prototypes"]
    message = run_program("train.py", finished, *words, "loss.alpha=0.3", *shape, expect=2).stderr
    assert "another model's, which nothing can force" in message
    assert "cls_center' is (40,) there, (50,) here" in message
    assert contents(tmp_path / "run") == before


@pytest.mark.skipif(not WHOLE, reason="make faults runs it")
def test_a_changed_world_size_resumes_and_is_told(finished, tmp_path):
    """From one process to two, and to another arithmetic, at step 2: one line says so."""
    shutil.copytree(finished.parent / "run", tmp_path / "run")
    for path in sorted((tmp_path / "run" / "checkpoints").iterdir())[1:]:
        path.unlink()
    (tmp_path / "run" / "backbone.safetensors").unlink()
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    words = [*FIVE_STEPS, f"run.folder={tmp_path / 'run'}", "speed.precision=bfloat16"]
    told = run_program(*launcher, "train.py", finished, *words).stdout
    line = "rounded otherwise than before step 2: world size 1 there, 2 now; precision float32 there, bfloat16 now"
    assert "resumed at step 2 from " in told
    assert line in told.splitlines()
    assert "finished: 5 steps" in told
    found = latest_valid(tmp_path / "run" / "checkpoints")
    assert found
    assert found.environment["world size"] == "2"


def test_what_a_checkpoint_holds(finished):
    """Student, teacher, both centers, AdamW's moments, step, config, data, versions; and nothing else."""
    found = latest_valid(finished.parent / "run" / "checkpoints")
    assert found
    assert (found.step, found.data["samples"]) == (5, 96)
    assert {"world size", "precision", "device", "reader", "torch", "git"} <= found.environment.keys()
    tensors = load_file(found.path)  # by the library itself
    kinds = {name.partition(".")[0] for name in tensors}
    assert kinds == {"student", "teacher", "cls_center", "reference_center", "adamw"}
    assert {name.rpartition(".")[2] for name in tensors if name.startswith("adamw.")} == {
        "step",
        "exp_avg",
        "exp_avg_sq",
    }
    assert json.loads((finished.parent / "run" / "versions.jsonl").read_text())["torch"] == found.environment["torch"]


def test_no_torch_before_a_run_is_refused(finished):
    """The refusal comes without torch: `python -X importtime` lists what was imported."""
    words = ("-X", "importtime", "train.py", finished, *FIVE_STEPS, "loss.alpha=0.3")
    imported = run_program(*words, expect=2).stderr
    assert "runtime.checkpoint" in imported
    assert "| torch\n" not in imported
