"""`make pretrain SHARDS=photos/`: the shards are made once, found again, and made again elsewhere when the photos change."""

import os
from pathlib import Path

import pytest
from conftest import run_program
from pictures import photo, tree

from pipeline.shards import Shards
from runtime.errors import UserError
from tools.photo_shards import is_photo_folder, shards_of


def test_made_once_and_again_after_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    photos = tree(tmp_path / "my photos", {f"{c}/{i}.jpg": photo(i) for c in "ab" for i in range(3)})
    assert is_photo_folder(str(photos))
    with pytest.raises(UserError, match=r"6 photos, and no shards of them yet; `make shards SRC='.*/my photos' DST="):
        shards_of("SHARDS", str(photos), make=False)
    assert not (tmp_path / "cache").exists()

    first = shards_of("SHARDS", str(photos), make=True)
    said = capfd.readouterr().out
    assert f"SHARDS={photos}: 6 photos, whose shards are made first, once, in {first} (`make shards" in said
    assert Path(first).parent == tmp_path / "cache/densedino/shards"
    assert len(Shards(first)) == 6
    assert not is_photo_folder(first)

    assert shards_of("VAL", str(photos), make=False) == first
    assert capfd.readouterr().out == f"VAL={photos}: 6 photos, whose shards are in {first}\n"

    os.utime(photos / "a/0.jpg", ns=(1, 1))  # another photo of the same size
    second = shards_of("SHARDS", str(photos), make=True)
    assert second != first
    said = capfd.readouterr().out
    assert f"has changed since its shards were made; `rm -r '{first}'` deletes the old ones" in said
    assert len(Shards(first)) == len(Shards(second)) == 6


def test_what_is_no_folder_of_photos(tmp_path: Path) -> None:
    tree(tmp_path, {"empty/x.txt": b"", "tars/x.tar": b"", "tars/x.jpg": b"", "above/shards/manifest.json": b"{}"})
    for name in ("empty", "tars", "above", "above/shards", "nowhere"):
        assert not is_photo_folder(str(tmp_path / name)), name


def test_a_check_makes_nothing(tmp_path: Path) -> None:
    photos = tree(tmp_path / "photos", {"0.jpg": photo(0)})
    done = run_program("-m", "tools.pretrain", "--shards", photos, "configs/demo.yaml", "--dry-run", expect=2)
    assert f"SHARDS={photos}: 1 photo, and no shards of them yet; `make shards SRC=" in done.stderr


def test_what_is_wrong_with_the_run_is_said_before_shards_are_made(tmp_path: Path) -> None:
    photos = tree(tmp_path / "photos", {"0.jpg": photo(0)})
    (tmp_path / "text.pth").write_text("no weights")
    text = tmp_path / "text.pth"
    for word, message in {
        "optim.epoch=3": "optim.epoch: no such key, did you mean 'optim.epochs'?",
        "model.init=nowhere.pth": "model.init: nowhere.pth: no such file",
        f"model.init={text}": str(text),
    }.items():
        done = run_program(
            "-m", "tools.pretrain", "--shards", photos, "--run", tmp_path / "run", "configs/demo.yaml", word,
            expect=2, env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
        )  # fmt: skip
        assert message in done.stderr
        assert not (tmp_path / "cache").exists()
        assert not (tmp_path / "run").exists()
