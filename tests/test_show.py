"""The pictures: views with their points, attention of [CLS]; made anew or left alone, and clear about wrong inputs."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import run_program
from PIL import Image, ImageColor
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def run(tiny_shards, tmp_path_factory) -> Path:
    """A run of a few steps with four views in two sizes."""
    folder = tmp_path_factory.mktemp("show") / "run"
    config = folder.with_suffix(".yaml")
    config.write_text(
        f"""
data:
  shards: {tiny_shards}
  holdout: 0.1
  views:
    - {{count: 2, size: 32, scale: [0.4, 1.0], teacher: true}}
    - {{count: 2, size: 16, scale: [0.2, 0.5]}}
model: {{arch: custom, patch: 8, width: 24, depth: 2, heads: 2}}
reference: {{points: 2}}
head: {{hidden: 32, bottleneck: 16, prototypes: 40}}
optim: {{batch: 16, epochs: 1, warmup: 0}}
speed: {{compile: false, workers: 0, device: cpu}}
run: {{folder: {folder}}}
"""
    )
    run_program("train.py", config)
    return folder


# Runs command lines one after the other in one interpreter: starting it, with torch, takes longer than any picture.
_IN_TURN = """
import contextlib, io, json, runpy, sys
told = []
for what, *words in json.load(sys.stdin):
    sys.argv = [what, *words]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_module(f"tools.show_{what}", run_name="__main__")
        except SystemExit as end:
            told.append([end.code, out.getvalue(), err.getvalue()])
json.dump(told, sys.stdout)
"""


def show(*commands: tuple[object, ...], expect: int = 0) -> list[str]:
    """What each command says: ("views" or "attention", its words ...); on stdout, or on stderr where it should fail."""
    done = run_program("-c", _IN_TURN, input=json.dumps([[str(w) for w in words] for words in commands]))
    told = json.loads(done.stdout)
    assert len(told) == len(commands)
    for words, (code, _, err) in zip(commands, told, strict=True):
        assert code == expect, f"{words}: exit code {code}\n{err}"
    return [err if expect else out for _, out, err in told]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def share(picture: np.ndarray, colour: str) -> float:
    return float((np.abs(picture - ImageColor.getrgb(colour)).max(-1) <= 2).mean())


def test_views(run, tiny_shards, tmp_path):
    recipe = tmp_path / "dino.yaml"
    recipe.write_text(f"base: {run / 'config.yaml'}\nmethod: dino\nloss: {{alpha: 1.0}}\n")
    told = show(
        ("views", run),
        ("views", run, "--out", tmp_path / "again.png"),
        ("views", run, "--out", tmp_path / "later.png", "--epoch", 1),
        ("views", run, "--out", tmp_path / "two.png", "--samples", 3, 5),
        ("views", tiny_shards, "--config", recipe, "--out", tmp_path / "dino.png"),
    )
    file = run / "pictures" / "views.png"
    assert told[0] == f"views written to {file}\n"
    picture, later, two, dino = map(pixels, (file, *(tmp_path / f"{n}.png" for n in ("later", "two", "dino"))))
    assert all(share(picture, c) > 1e-3 for c in ("#0072B2", "#E69F00", "#009E73", "#CC79A7"))  # one for each view
    assert share(picture, "#D55E00") < 1e-4
    assert (tmp_path / "again.png").read_bytes() == file.read_bytes()
    assert (later != picture).any()
    assert two.shape[0] < picture.shape[0]
    assert dino.shape == picture.shape
    assert 0 < share(dino, "#E69F00") < share(picture, "#E69F00")  # windows and frames, no points


def test_attention(run, photos, tmp_path):
    image = sorted(photos.rglob("*.jpg"))[0]
    backbone = run / "backbone.safetensors"
    # queries and keys of zero: [CLS] looks everywhere alike, in each of the two heads and in their mean
    tensors = load_file(backbone)
    tensors["blocks.1.attn.qkv.weight"].zero_()
    tensors["blocks.1.attn.qkv.bias"].zero_()
    save_file(tensors, tmp_path / "blind.safetensors", {"densedino": '{"heads": 2}'})
    told = show(
        ("attention", run, "--images", 2),
        ("attention", backbone, image, "--out", tmp_path / "trained.png"),
        ("attention", tmp_path / "blind.safetensors", image, "--out", tmp_path / "blind.png"),
        ("attention", backbone, image, "--beside", run, "--out", tmp_path / "both.png"),
    )
    assert told[0] == f"attention written to {run / 'pictures' / 'attention.png'}\n"
    assert (run / "pictures" / "attention.png").is_file()
    trained, blind, both = (pixels(tmp_path / f"{name}.png") for name in ("trained", "blind", "both"))
    heads = maps(blind)
    assert len(heads) == 3
    assert all(abs(heads[0].mean() - m.mean()) < 8 for m in heads[1:])  # alike but for where a map is drawn
    assert not np.array_equal(*maps(trained)[:2])
    assert both.shape[0] > 1.5 * trained.shape[0]


def maps(picture: np.ndarray) -> list[np.ndarray]:
    """The pictures of a row after the first, without titles: what stands between white columns in its lower part."""
    lower = picture[picture.shape[0] // 2 : picture.shape[0] * 3 // 4]
    painted = (lower != 255).any((0, 2)).astype(int)
    edges = np.flatnonzero(np.diff(np.pad(painted, 1)))
    cells = [lower[:, a + 2 : b - 2] for a, b in edges.reshape(-1, 2)][1:]
    width = min(cell.shape[1] for cell in cells)
    return [cell[:, :width] for cell in cells]


def test_a_picture_that_is_there_is_left_alone(run):
    files = {what: run / "pictures" / f"{what}.png" for what in ("views", "attention")}
    (run / "pictures").mkdir(exist_ok=True)
    for file in files.values():
        file.write_bytes(b"mine")
    told = show(*((what, run, "--if-missing") for what in files))
    assert told == [f"{file}: already there\n" for file in files.values()]
    assert all(file.read_bytes() == b"mine" for file in files.values())
    for file in files.values():
        file.unlink()
    show(*((what, run, "--if-missing") for what in files))
    for file in files.values():
        Image.open(file).verify()
    assert sorted(p.name for p in (run / "pictures").iterdir()) == ["attention.png", "views.png"]


WRONG = {
    "views {none}": "no shards here",
    "views {photos}": "make shards",
    "views {run} --config x.yaml": "a run with a config of its own",
    "views {run} --samples 1000": "holds samples 0 to 95",
    "views {run} --images 0": "--images: at least 1",
    "views {run} --epoch -1": "--epoch: at least 0",
    "views {run} --out {photos}/ash/000.jpg/x.png": "000.jpg/x.png: File exists",
    "attention {none}": "no such run",
    "attention {run} {none}": "no such image",
    "attention {run} {run}/config.yaml": "no picture",
    "attention {run} {photos}": "neither photos nor",
    "attention {run} --images 0": "--images: at least 1",
    "attention {run} --size 20": "not a multiple of the patch size 8",
}


def test_wrong_inputs(run, photos, tmp_path):
    never = tmp_path / "never.png"
    commands = [words.format(run=run, photos=photos, none=tmp_path / "none").split() for words in WRONG]
    commands = [words if "--out" in words else [*words, "--out", str(never)] for words in commands]
    for (words, message), error in zip(WRONG.items(), show(*commands, expect=2), strict=True):
        assert error.startswith("error: "), words
        assert message in error, words
        assert error.count("\n") == 1, words
    assert not never.exists()
