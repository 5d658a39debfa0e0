"""F27: a run is where its config.yaml is. A copy trains in itself, a moved run resumes at its place, and both find the data
that the run was made with, whatever folder the program is started in."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import env_without_make, run_program, write_config

import train
from eval.target import EvalTarget
from runtime.checkpoint import latest_valid
from runtime.config import diff, dump_run_config, load_config, parse_config
from runtime.errors import UserError
from tests.conftest import ROOT
from tests.faults.program import equal, final
from tools.export.__main__ import main as export
from tools.show.__main__ import main as show


@pytest.fixture(scope="module")
def made(tiny_shards, tmp_path_factory) -> Path:
    """A folder in which runs/a was trained for 20 steps, from shards that its config names by a relative path."""
    home = tmp_path_factory.mktemp("made")
    shutil.copytree(tiny_shards, home / "shards")
    write_config(home / "tiny.yaml", Path("shards"), Path("runs/a"))
    words = ["run.keep_checkpoints=3"]
    run_program(ROOT / "train.py", "tiny.yaml", *words, cwd=home)
    return home


@pytest.fixture
def copy(made, tmp_path) -> Path:
    """A copy of the run without its last checkpoint."""
    run = Path(shutil.copytree(made / "runs" / "a", tmp_path / "b"))
    (run / "checkpoints" / "checkpoint-00000020.safetensors").unlink()
    (run / "backbone.safetensors").unlink()
    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.fault("F27")
@pytest.mark.fast
def test_a_run_s_config_names_no_folder_and_absolute_paths(made):
    for config in (
        load_config(made / "runs/a/config.yaml"),
        parse_config(latest_valid(made / "runs/a/checkpoints").config, "checkpoint"),
    ):
        assert config.data.shards == str(made / "shards")
        assert (config.data.val, config.eval.voc) == (None, None)
    assert "folder: null" in (made / "runs/a/config.yaml").read_text()


@pytest.mark.fault("F27")
@pytest.mark.fast
def test_the_config_of_a_run_means_its_folder(copy, tmp_path):
    """Even if the file names another one; unless the command line does."""
    file = copy / "config.yaml"
    file.write_text(file.read_text().replace("folder: null", "folder: runs/a"))
    assert load_config(file).run.folder == str(copy)
    assert load_config(file, ["run.folder=runs/c"]).run.folder == "runs/c"
    shutil.copy(file, tmp_path / "mine.yaml")  # a copy of the file alone is a config as any other
    assert load_config(tmp_path / "mine.yaml").run.folder == "runs/a"
    os.makedirs(tmp_path / "project" / "checkpoints")  # and so is a config.yaml beside other things
    shutil.copy(file, tmp_path / "project")
    assert load_config(tmp_path / "project" / "config.yaml").run.folder == "runs/a"


@pytest.mark.fault("F27")
def test_a_copy_trains_in_itself(made, copy):
    """From another folder: it resumes at its own step and ends with the bits of the first run, which stays as it is."""
    before = contents(made)
    stdout = run_program(ROOT / "train.py", "config.yaml", cwd=copy).stdout
    assert "resumed at step 14 from " in stdout
    assert equal(final(copy), final(made / "runs/a"))
    assert (copy / "backbone.safetensors").is_file()
    assert contents(made) == before


@pytest.mark.fault("F27")
def test_a_moved_run_resumes_at_its_place(made, copy, tmp_path):
    os.makedirs(tmp_path / "disk")
    moved = Path(shutil.move(copy, tmp_path / "disk" / "moved"))
    stdout = run_program("train.py", moved / "config.yaml", "optim.epochs=3", "--allow-change=optim.epochs").stdout
    assert f"resumed at step 14 from {moved}/checkpoints/" in stdout
    assert not copy.exists()
    assert not (tmp_path / "runs").exists()


@pytest.mark.fault("F27")
def test_make_passes_the_folder_of_the_config(copy, tmp_path):
    def refusal(*words: str) -> str:
        ready = ["-o", ".venv/.ready", "-o", "requirements.lock"]  # an environment is there
        words = ("make", *ready, "pretrain", f"CONFIG={copy}/config.yaml", *words)
        done = subprocess.run(words, cwd=ROOT, env=env_without_make(), capture_output=True, text=True, check=False)
        assert done.returncode == 2
        return done.stderr

    another = refusal("ARGS=loss.alpha=0.3")
    assert f"error: {copy} holds another run (loss.alpha: saved 0.5, current 0.3)" in another
    (tmp_path / "file").touch()
    assert f"error: {tmp_path}/file/run: cannot write there" in refusal(f"RUN={tmp_path}/file/run")


@pytest.mark.fault("F27")
@pytest.mark.fast
@pytest.mark.parametrize("path", ["", "checkpoints", "checkpoints/checkpoint-00000014.safetensors"])
def test_evaluation_finds_the_data_of_a_copy(made, copy, monkeypatch, path):
    monkeypatch.chdir(copy.parent)
    target = EvalTarget(Path("b") / path)
    sets = target.photo_sets()
    assert sets is not None
    assert sets.train.folder == made / "shards"
    assert (len(sets.train_ids), len(sets.val_ids)) == (88, 8)


@pytest.mark.fault("F27")
def test_pictures_and_exports_of_a_copy(copy, tmp_path, monkeypatch):
    """From another folder."""
    monkeypatch.chdir(tmp_path)
    show(["views", "b"])
    show(["pca", "b"])
    export(["b", "exported", "--to", "transformers"])
    assert (copy / "pictures" / "views.png").is_file()
    assert (copy / "pictures" / "pca.png").is_file()
    assert (tmp_path / "exported" / "model.safetensors").is_file()


@pytest.mark.fault("F27")
@pytest.mark.fast
@pytest.mark.parametrize("key", ["data.shards", "data.val", "eval.voc"])
def test_data_that_moved_is_named_with_its_key_and_file(made, copy, key):
    """By training and by evaluation, with the nearest name."""
    file = copy / "config.yaml"
    lost, near = f"{made}/shardss", f"{made}/shards"
    name = key.partition(".")[2]
    lines = [f"  {name}: {lost}" if line.startswith(f"  {name}: ") else line for line in file.read_text().split("\n")]
    file.write_text("\n".join(lines))
    problem = f"{file}: {key}: {lost}: no such folder, did you mean '{near}'?"
    with pytest.raises(UserError) as error:
        train.train(load_config(file, processes=1), dry_run=True)
    assert str(error.value).startswith(problem)
    target = EvalTarget(copy)
    with pytest.raises(UserError) as error:
        target.scenes_folder(None) if key == "eval.voc" else target.photo_sets()
    assert str(error.value) == f"{problem}; if it was moved, correct {key} there"


@pytest.mark.fault("F27")
@pytest.mark.fast
def test_the_first_weights_are_the_same_by_any_path(made, tmp_path, monkeypatch):
    """model.init decides the result: a relative path and the absolute one that a run keeps are no difference."""
    monkeypatch.chdir(made)
    config = load_config("tiny.yaml", ["model.init=runs/a"])
    saved = parse_config(dump_run_config(config), "saved")
    assert saved.model.init == f"{made}/runs/a"
    assert diff(saved, config) == {}
    monkeypatch.chdir(tmp_path)
    assert "model.init" in diff(saved, config)  # there it is another place
    timm = load_config(made / "tiny.yaml", ["model.init=timm:vit_tiny", "data.shards=s3://bucket/photos"])
    kept = parse_config(dump_run_config(timm), "saved")
    assert (kept.model.init, kept.data.shards) == ("timm:vit_tiny", "s3://bucket/photos")
