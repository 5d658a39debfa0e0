"""F34, the part of training: photos or no folder in the place of shards, schedules that do not fit into a short run."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import run_program, write_config
from PIL import Image

from pipeline.shards import Shards
from runtime.config import load_config
from runtime.errors import UserError
from runtime.notes import notes


def photo(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32)).save(path, "JPEG")


PLACES = {  # what: (files that there are, the name given as shards, the message)
    "photos": (
        ["photos/a.jpg"], "photos",
        "{home}/photos: photos, not shards; `make shards SRC={home}/photos DST={home}/photos-shards` makes shards of them",
    ),
    "photos deep inside": (
        ["my photos/train/ash/images/A.JPEG"], "my photos/",
        "`make shards SRC='{home}/my photos' DST='{home}/my photos-shards'` makes shards of them",
    ),
    "photos whose shards are beside them": (
        ["photos/a.jpg", "photos-shards/manifest.json"], "photos",
        "{home}/photos: photos, not shards, which seem to be in {home}/photos-shards",
    ),
    "the folder above": (
        ["mine/train/manifest.json", "mine/val/manifest.json"], "mine",
        "no shards here (no manifest.json), but in {home}/mine/train and {home}/mine/val: name one of them",
    ),
    "a wrong name": (
        ["imagenette/train/manifest.json"], "imagenete/train",
        "{home}/imagenete/train: no such folder, did you mean '{home}/imagenette/train'?",
    ),
    "two wrong names": (
        ["imagenette/train/manifest.json"], "imagenete/trian",
        "{home}/imagenete/trian: no such folder, did you mean '{home}/imagenette/train'?",
    ),
}  # fmt: skip


@pytest.mark.fault("F34")
@pytest.mark.fast
@pytest.mark.parametrize("what", PLACES)
def test_what_is_no_folder_of_shards_is_named(what, tmp_path):
    files, given, message = PLACES[what]
    for name in files:
        photo(tmp_path / name)
    with pytest.raises(UserError) as error:
        Shards(f"{tmp_path}/{given}")
    assert message.format(home=tmp_path) in str(error.value)


@pytest.mark.fault("F34")
def test_the_printed_command_makes_shards_to_train_on(photos, tmp_path):
    """A photo folder in the place of shards: the command of the message, and the folder that it names, work."""
    (tmp_path / "photos").symlink_to(photos)
    config = write_config(tmp_path / "tiny.yaml", tmp_path / "photos", tmp_path / "run")
    message = run_program("train.py", config, expect=2).stderr
    words = dict(word.split("=") for word in shlex.split(message.split("`")[1])[2:])
    run_program("-m", "tools.make_shards", "make", words["SRC"], words["DST"], "--processes", "1")
    assert (
        "96 samples"
        in run_program("train.py", config, f"data.shards={words['DST']}", "data.holdout=0", "--dry-run").stdout
    )


@pytest.mark.fault("F34")
@pytest.mark.fast
@pytest.mark.parametrize("epochs", ["5", "0.3", "10"])
def test_the_warmup_that_fits_is_in_the_refusal(tiny_config, epochs):
    with pytest.raises(UserError, match=r"epochs of warmup do not fit into optim\.epochs: ") as error:
        load_config(tiny_config, [f"optim.epochs={epochs}", "optim.warmup_epochs=10"])
    word = re.search(r"optim\.warmup_epochs=\S+", str(error.value))
    assert word
    config = load_config(tiny_config, [f"optim.epochs={epochs}", word[0]])
    assert config.optim.warmup_epochs == pytest.approx(float(epochs) / 10)


TWO_VIEWS = "data.views=[{count: 2, size: 32, scale: [0.4, 1.0], teacher: true}]"
NOTES = {  # what: (words, the note)
    "warm-up": (["optim.warmup_epochs=3"], "the learning rate warms up in 15 of 20 steps; optim.warmup_epochs=0.4"),
    "frozen": (
        ["optim.freeze_last_layer_epochs=4"],
        "the heads' last layer is frozen in all 20 steps; optim.freeze_last_layer_epochs=0.4",
    ),
    "temperature": (
        ["loss.teacher_temperature=[0.04,0.07]", "loss.teacher_temperature_warmup=30"],
        "the teacher's temperature never gets to 0.07; loss.teacher_temperature_warmup=0",
    ),
    "late queue": (
        ["method=swav", "clustering.queue_start_epochs=15"],
        "the queue is used in none of the 20 steps: it starts after 75 steps, and 2 fill its 32 rows; "
        "clustering.queue_start_epochs=0.4 uses it",
    ),
    "long queue": (
        ["method=swav", "clustering.queue=320"],
        "the queue is used in none of the 20 steps: it starts after 0 steps, and 20 fill its 320 rows; "
        "clustering.queue=160 uses it",
    ),
    "queue of patches": (
        ["method=leopart", "clustering.mask=all", "clustering.queue_start_epochs=2", "clustering.queue=3200"],
        "the queue is used in none of the 20 steps: it starts after 10 steps, and 20 fill its 3,200 rows; "
        "clustering.queue_start_epochs=0.4 clustering.queue=1600 uses it",
    ),
    "own keys": (
        ["method=mocov2", TWO_VIEWS, "contrast.queue=48"],
        "the queue has 48 keys and an epoch 80 images: many images meet their own older key as a negative; "
        "contrast.queue=16",
    ),
}  # fmt: skip


@pytest.mark.fault("F34")
@pytest.mark.fast
@pytest.mark.parametrize("what", NOTES)
def test_a_schedule_that_fills_a_short_run_is_noted(tiny_config, what):
    words, note = NOTES[what]
    assert notes(load_config(tiny_config), 5) == []
    (found,) = notes(load_config(tiny_config, words), 5)
    assert found.startswith(note)
    assert notes(load_config(tiny_config, [*words, *re.findall(r"\w+\.\w+=[\d.]+", found)]), 5) == []


@pytest.mark.fault("F34")
@pytest.mark.fast
def test_notes_are_about_what_the_method_has(tiny_config):
    """A queue that is used in the last step; heads without prototypes; a foreground from random weights."""
    for words, found in {
        ("method=swav", "clustering.queue=304"): [],
        ("method=leopart", "model.init=file", "clustering.queue=3040"): [],
        ("method=dino", "contrast.queue=48", "clustering.queue_start_epochs=15"): [],
        ("method=mocov3", TWO_VIEWS, "contrast.queue=48", "optim.freeze_last_layer_epochs=9"): [],
        ("method=leopart", "clustering.mask=background"): ["method: leopart starts from random weights"],
    }.items():
        got = notes(load_config(tiny_config, words), 5)
        assert [note[: len(start)] for note, start in zip(got, found, strict=True)] == found
