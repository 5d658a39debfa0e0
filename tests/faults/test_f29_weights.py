"""F29: every derived file carries the step and the hash of its weights, and is made again when they differ.

Times of files are set against it: what was made from the old network is newer than the new checkpoint, and what is
current is older than its own.
"""

import json
import os
from pathlib import Path

import pytest
from conftest import run_program, write_config
from PIL import Image

from eval import __main__ as commands
from runtime.checkpoint import read_header
from tests.runs import write_run
from tools import finish_run

PICTURES = ("views", "attention", "pca", "similarity", "neighbors", "points")
DERIVED = ("results.json", "measures.json", "report.html", *(f"pictures/{name}.png" for name in PICTURES))


def newest(run: Path) -> dict:
    """The step and the hash that the newest checkpoint records."""
    header = read_header(max(run.glob("checkpoints/*.safetensors")))["__metadata__"]
    return {"step": int(header["step"]), "sha256": header["sha256"]}


def carried(file: Path) -> dict:
    """The step and the hash that a derived file carries."""
    if file.suffix == ".png":
        with Image.open(file) as picture:
            (weights,) = json.loads(picture.text["densedino"])
        return weights
    if file.suffix == ".html":
        content = file.read_text().partition('<meta name="densedino" content="')[2].partition('"')[0]
        (weights,) = json.loads(content.replace("&quot;", '"'))
        return weights
    content = json.loads(file.read_text())
    return content["weights"] if file.stem == "results" else next(iter(content["networks"].values()))["weights"]


def derive(run: Path, *more: str) -> None:
    assert commands.main(["compare", str(run), "--measures", "knn", *more]) == 0
    assert finish_run.main([str(run), *more]) == 0


@pytest.fixture(scope="module")
def extended(tiny_shards, tmp_path_factory) -> tuple[Path, dict[str, dict], dict[str, bytes]]:
    """(a finished run that was trained further, the weights that its files carried before and the files themselves): between
    the two all files were copied, so that they are newer than any checkpoint."""
    run = write_run(tmp_path_factory.mktemp("extended") / "run", tiny_shards, step=7)
    derive(run)
    before = {name: carried(run / name) for name in DERIVED}
    files = {name: (run / name).read_bytes() for name in DERIVED}
    write_run(run, tiny_shards, step=20)
    for name in DERIVED:
        os.utime(run / name, (4e9, 4e9))
    derive(run, "--skip-existing")
    return run, before, files


@pytest.mark.fault("F29")
@pytest.mark.parametrize("name", DERIVED)
def test_what_follows_training_is_of_the_new_network(extended, name):
    run, before, files = extended
    assert before[name]["step"] == 7
    assert carried(run / name) == newest(run)
    assert carried(run / name)["step"] == 20
    if name != "pictures/views.png":  # the same photos and windows
        assert (run / name).read_bytes() != files[name]


@pytest.mark.fault("F29")
def test_what_is_of_these_weights_is_kept_whatever_its_time(extended, capsys):
    run, *_ = extended
    kept = [name for name in DERIVED if name not in ("report.html", "measures.json")]
    before = {name: (run / name).read_bytes() for name in kept}
    for name in kept:
        os.utime(run / name, (1, 1))  # as a copy or a restored backup may have it
    derive(run, "--skip-existing")
    assert {name: (run / name).read_bytes() for name in kept} == before
    out = capsys.readouterr().out
    assert out.count(": already there\n") == len(PICTURES)
    assert f"from {run}/results.json, of step 20\n" in out
    assert "1 of" not in out  # no measure of `compare` was taken again


@pytest.mark.fast
@pytest.mark.fault("F29")
def test_a_page_says_what_is_of_another_step(tiny_shards, tmp_path, capsys):
    """`eval html` makes no results and no pictures; it names those that are not of the run's weights."""
    run = write_run(tmp_path / "run", tiny_shards, step=7)
    assert commands.main(["report", str(run)]) == 0
    finish_run.show.main(["attention", str(run), "--images", "1"])
    write_run(run, tiny_shards, step=20)
    capsys.readouterr()
    assert commands.main(["html", str(run)]) == 0
    html = (run / "report.html").read_text()
    assert f"results.json is of step 7, the run is at step 20: `make eval RUN={run}`" in html
    assert html.count("(of step 7, the run is at step 20)</figcaption>") == 1


@pytest.mark.fast
@pytest.mark.fault("F29")
@pytest.mark.parametrize("content", ["mine", "no mark"])
def test_a_picture_of_unknown_origin_is_drawn_again_and_told(tiny_shards, tmp_path, capsys, content):
    run = write_run(tmp_path / "run", tiny_shards)
    picture = run / "pictures" / "attention.png"
    picture.parent.mkdir()
    Image.new("RGB", (3, 3)).save(picture)
    if content == "mine":
        picture.write_bytes(b"no picture")
    show = finish_run.show.main
    show(["attention", str(run), "--skip-existing"])
    out = capsys.readouterr().out
    assert out.startswith(f"{picture}: of another network, or of an unknown one; drawn again\n")
    assert carried(picture) == newest(run)


@pytest.mark.fast
@pytest.mark.fault("F29")
def test_an_evaluation_records_its_weights(tiny_shards, tmp_path):
    run = write_run(tmp_path / "run", tiny_shards)
    assert commands.main(["knn", str(run)]) == 0
    assert json.loads((run / "evaluations.jsonl").read_text())["weights"] == newest(run)


@pytest.mark.fault("F29")
def test_a_run_that_is_continued_gets_its_new_pictures(tiny_shards, tmp_path):
    """The real programs: train, finish, train longer, finish as `make pretrain` does."""
    config = write_config(tmp_path / "tiny.yaml", tiny_shards, tmp_path / "run")
    run = tmp_path / "run"
    run_program("train.py", config, "optim.epochs=2")
    run_program("-m", "tools.finish_run", run, "--skip-existing")
    before = (run / "pictures" / "pca.png").read_bytes()
    run_program("train.py", config, "optim.epochs=4", "--allow-change", "optim.epochs")
    done = run_program("-m", "tools.finish_run", run, "--skip-existing")
    step = newest(run)["step"]
    assert step == 20
    assert f"{run}/pictures/pca.png: of step 10; drawn again\n" in done.stdout
    assert (run / "pictures" / "pca.png").read_bytes() != before
    assert (
        carried(run / "results.json")
        == carried(run / "report.html")
        == carried(run / "pictures/pca.png")
        == newest(run)
    )


OTHER_SETTINGS = {  # what: (words of the first report, changes of config.yaml, why it is measured again)
    "a limit": (["--limit", "10"], ("", ""), "limit was 10, now none"),
    "neighbors": ([], ("k: 5", "k: 3"), "k was 5, now 3"),
    "classes": ([], ("k: 5", "k: 5, ignore_classes: [ash]"), "ignore_classes was none, now ['ash']"),
}


@pytest.mark.fast
@pytest.mark.fault("F29")
@pytest.mark.parametrize("what", OTHER_SETTINGS)
def test_results_of_other_settings_are_measured_again(tiny_shards, tmp_path, capsys, what):
    words, (old, new), why = OTHER_SETTINGS[what]
    run = write_run(tmp_path / "run", tiny_shards)
    assert commands.main(["report", str(run), *words]) == 0
    limited = "k-NN with at most 10 photos of each set (--limit 10), not with all"
    assert (limited in capsys.readouterr().out) == bool(words)
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(old, new))
    assert commands.main(["report", str(run), "--skip-existing"]) == 0
    assert f"{run}/results.json is measured again: {why}\n" in capsys.readouterr().out
    assert commands.main(["report", str(run), "--skip-existing"]) == 0
    assert f"from {run}/results.json" in capsys.readouterr().out
