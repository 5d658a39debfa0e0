"""Pictures: what they show is correct, existing ones are kept on request, and wrong inputs get a clear message."""

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_program
from PIL import Image, ImageColor
from safetensors.torch import load_file, save_file

from model.reference import MODES
from model.vit import ViT
from model.weights import load_backbone
from runtime.errors import run_cli
from tools.show.__main__ import main
from tools.show.attention import attention
from tools.show.figures import COLORS
from tools.show.pca import principal_components
from tools.show.photos import MAX_NAME, Photo, query_points, shorten
from tools.show.segmentation import patch_shares


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
optim: {{global_batch_size: 16, epochs: 1, warmup_epochs: 0}}
speed: {{compile: false, workers: 0, device: cpu}}
run: {{folder: {folder}}}
"""
    )
    run_program("train.py", config)
    return folder


def show(*commands: tuple[object, ...], expect: int = 0) -> list[str]:
    """Run command lines of `tools.show`, ("views", run, ...) each, in this process; returns what each prints on stdout, or
    on stderr if it should fail."""
    printed = []
    for words in commands:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
            run_cli(lambda words=words: main([str(word) for word in words]))
        assert end.value.code == expect, f"{words}: exit code {end.value.code}\n{err.getvalue()}"
        printed.append((err if expect else out).getvalue())
    return printed


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def share(picture: np.ndarray, color: str) -> float:
    return float((np.abs(picture - ImageColor.getrgb(color)).max(-1) <= 2).mean())


def test_views(run, tiny_shards, tmp_path):
    recipe = tmp_path / "dino.yaml"
    recipe.write_text(f"base: {run / 'config.yaml'}\nmethod: dino\nloss: {{alpha: 1.0}}\n")
    printed = show(
        ("views", run),
        ("views", run, "--out", tmp_path / "again.png"),
        ("views", run, "--out", tmp_path / "later.png", "--epoch", 1),
        ("views", run, "--out", tmp_path / "two.png", "--samples", 3, 5),
        ("views", tiny_shards, "--config", recipe, "--out", tmp_path / "dino.png"),
    )
    file = run / "pictures" / "views.png"
    assert printed[0] == f"views written to {file}\n"
    picture, later, two, dino = map(pixels, (file, *(tmp_path / f"{n}.png" for n in ("later", "two", "dino"))))
    assert all(share(picture, c) > 1e-3 for c in ("#0072B2", "#E69F00", "#009E73", "#CC79A7"))  # the color of each view
    assert share(picture, "#D55E00") < 1e-4
    assert (tmp_path / "again.png").read_bytes() == file.read_bytes()
    assert (later != picture).any()
    assert two.shape[0] < picture.shape[0]
    assert dino.shape == picture.shape
    assert 0 < share(dino, "#E69F00") < share(picture, "#E69F00")  # windows and frames, no points


def test_attention(run, photos, tmp_path):
    image = sorted(photos.rglob("*.jpg"))[0]
    backbone = run / "backbone.safetensors"
    # queries and keys of zero: the attention of [CLS] is uniform, in both heads and in their mean
    tensors = load_file(backbone)
    tensors["blocks.1.attn.qkv.weight"].zero_()
    tensors["blocks.1.attn.qkv.bias"].zero_()
    save_file(tensors, tmp_path / "uniform.safetensors", {"densedino": '{"heads": 2}'})
    printed = show(
        ("attention", run, "--images", 2),
        ("attention", backbone, image, "--out", tmp_path / "trained.png"),
        ("attention", tmp_path / "uniform.safetensors", image, "--out", tmp_path / "uniform.png"),
        ("attention", backbone, image, "--compare", run, "--out", tmp_path / "both.png"),
    )
    assert printed[0] == f"attention written to {run / 'pictures' / 'attention.png'}\n"
    assert (run / "pictures" / "attention.png").is_file()
    trained, uniform, both = (pixels(tmp_path / f"{name}.png") for name in ("trained", "uniform", "both"))
    assert len(maps(uniform)) == 3
    weights, _ = attention(load_backbone(tmp_path / "uniform.safetensors"), torch.zeros(3, 32, 32, dtype=torch.uint8))
    assert torch.equal(weights, torch.full_like(weights, 1 / 17))  # [CLS] and 16 patches, each the same
    assert not np.array_equal(*maps(trained)[:2])
    assert both.shape[0] > 1.5 * trained.shape[0]


def maps(picture: np.ndarray) -> list[np.ndarray]:
    """The images of a row after the first, without titles: what is between white columns in the lower part."""
    lower = picture[picture.shape[0] // 2 : picture.shape[0] * 3 // 4]
    drawn = (lower != 255).any((0, 2)).astype(int)
    edges = np.flatnonzero(np.diff(np.pad(drawn, 1)))
    cells = [lower[:, a + 2 : b - 2] for a, b in edges.reshape(-1, 2)][1:]
    width = min(cell.shape[1] for cell in cells)
    return [cell[:, :width] for cell in cells]


def test_an_existing_picture_is_kept(run):
    folder = run / "pictures"
    folder.mkdir(exist_ok=True)
    show(("attention", run))
    before = (folder / "attention.png").stat().st_mtime_ns
    (folder / "views.png").write_bytes(b"of nothing known")
    printed = show(("attention", run, "--skip-existing"), ("views", run, "--skip-existing"))
    assert printed == [
        f"{folder}/attention.png: already there\n",
        f"{folder}/views.png: of another network, or of an unknown one; drawn again\nviews written to {folder}/views.png\n",
    ]
    assert (folder / "attention.png").stat().st_mtime_ns == before
    Image.open(folder / "views.png").verify()
    assert sorted(p.name for p in folder.iterdir()) == ["attention.png", "views.png"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """A few painted scenes."""
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    run_program("-m", "tools.make_scenes", folder, "--train", 12, "--val", 4, "--size", 32)
    return folder


def test_all_pictures_of_a_run(run, scenes):
    """One command draws all of them; a row for each of the four scenes, and for each network."""
    config = (run / "config.yaml").read_text()
    with_scenes = run.with_name("with_scenes")
    with_scenes.mkdir()
    for part in ("checkpoints", "backbone.safetensors"):
        (with_scenes / part).symlink_to(run / part)
    (with_scenes / "config.yaml").write_text(config.replace("voc: null", f"voc: {scenes}"))
    without = run.with_name("without")  # no scenes, no points: two pictures fewer
    without.mkdir()
    (without / "config.yaml").write_text(
        config.replace("method: densedino", "method: dino").replace("alpha: 0.5", "alpha: 1.0")
    )
    (without / "checkpoints").symlink_to(run / "checkpoints")
    printed = show(
        ("run", without),
        ("run", with_scenes),
        ("run", with_scenes, "--skip-existing"),
        ("points", run, scenes, "--compare", run, "--block", 1, "--out", run / "two.png"),
        ("similarity", run, scenes, "--images", 2, "--points", ".5,.25", "--out", run / "two_photos.png"),
    )
    names = ["views", "attention", "pca", "similarity", "neighbors", "points", "segmentation"]
    folder = with_scenes / "pictures"
    assert printed[0] == "".join(f"{name} written to {without}/pictures/{name}.png\n" for name in names[:5])
    assert printed[1] == "".join(f"{name} written to {folder}/{name}.png\n" for name in names)
    assert printed[2] == "".join(f"{folder}/{name}.png: already there\n" for name in names)
    assert sorted(p.stem for p in folder.iterdir()) == sorted(names)
    assert pixels(run / "two.png").shape[0] > 1.7 * pixels(folder / "points.png").shape[0]
    assert pixels(run / "two_photos.png").shape[0] < pixels(folder / "similarity.png").shape[0]
    drawn = pixels(folder / "segmentation.png")
    truth = {int(k) for mask in (scenes / "SegmentationClass").glob("val_*.png") for k in np.unique(Image.open(mask))}
    for kind in range(1, 8):  # the true classes are drawn in their colors
        assert (share(drawn, COLORS[kind - 1]) > 1e-3) or kind not in truth


@pytest.mark.parametrize(("mode", "locality"), [*((mode, None) for mode in MODES), ("patches+self", 0.8)])
def test_attention_is_that_of_the_forward_pass(mode, locality):
    """The weights that the picture shows, times the values, give the output of the last block's attention."""
    torch.manual_seed(0)
    network = ViT(width=24, depth=2, heads=2, patch=8, image_size=32, attention=mode, locality=locality).eval()
    torch.nn.init.normal_(network.blocks[1].attn.qkv.weight, std=0.5)
    picture = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    points = torch.tensor([[0.2, 0.3], [0.8, 0.6]])
    captured: dict[str, torch.Tensor] = {}
    attn = network.blocks[1].attn
    hooks = [
        attn.qkv.register_forward_hook(lambda m, inputs, out: captured.update(qkv=out)),
        attn.proj.register_forward_pre_hook(lambda m, inputs: captured.update(output=inputs[0])),
    ]
    cls, references = attention(network, picture, points)
    for hook in hooks:
        hook.remove()
    q, k, v = captured["qkv"].flatten(0, -2).unflatten(-1, (3, 2, -1)).permute(1, 2, 0, 3)  # [H,1+N+R,d] each
    output = captured["output"].flatten(0, -2).unflatten(-1, (2, -1)).transpose(0, 1)
    scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    for token, weights in ((0, cls), (17, references[:, 0]), (18, references[:, 1])):
        # the weight that is not on the patches is on the other tokens that the mode allows, in proportion to their scores
        others = {
            "none": [0, 17, 18], "patches+cls": [0], "patches": [], "patches+self": [token], "all_query": [token]
        }[mode] if token else ([0, 17, 18] if mode == "none" else [0])  # fmt: skip
        rest = 1 - weights.sum(-1)
        expected = (weights[:, None] @ v[:, 1:17])[:, 0]
        if others:
            share_of = scores[:, token, others].softmax(-1) * rest[:, None]
            expected = expected + (share_of[:, None] @ v[:, others])[:, 0]
        assert torch.allclose(expected, output[:, token], atol=1e-5), token
        assert (rest.abs() < 1e-5).all() or others


def test_components_are_shared_by_all_photos():
    """Two photos whose tokens vary in two known directions, one with three times the standard deviation of the other."""
    torch.manual_seed(0)
    a, b = torch.zeros(40, 6), torch.zeros(60, 6)
    a[:, 2], b[:, 2] = torch.linspace(-3, 0, 40), torch.linspace(0.1, 3, 60)
    a[::2, 4], b[::2, 4] = 1.0, 1.0
    (first, second), shares = principal_components([a, b])
    assert first.shape == (40, 3)
    both = torch.cat([first, second])
    assert both.min() == 0
    assert both.max() == 1
    steps = both[3:-3, 0].diff()  # the first component is monotonic across both photos
    assert (steps >= -1e-6).all() or (steps <= 1e-6).all()
    assert len(both[:, 1].round(decimals=1).unique()) <= 4
    variance = torch.cat([a, b]).double().var(0)
    assert torch.allclose(shares[:2], (variance[[2, 4]] / variance.sum()), atol=0.03)


def test_query_points_are_object_centers(tmp_path):
    mask = np.zeros((40, 80), np.uint8)
    mask[5:15, 5:15], mask[10:36, 40:66], mask[38:, :] = 3, 7, 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    photo = Photo("p", torch.zeros(3, 40, 80, dtype=torch.uint8), tmp_path / "m.png")
    largest, small, ground = query_points(photo, 4)
    assert largest == pytest.approx([53 / 80, 23 / 40], abs=0.02)
    assert small == pytest.approx([10 / 80, 10 / 40], abs=0.02)
    assert mask[int(ground[1] * 40), int(ground[0] * 80)] == 0
    assert np.array_equal(query_points(photo, 2), [largest, ground])
    assert np.array_equal(query_points(photo, 1), [largest])
    assert query_points(photo._replace(mask=None), 1).tolist() == [[0.5, 0.5]]


def test_a_long_name_keeps_its_beginning_and_its_end():
    assert shorten("2007_000033.jpg") == "2007_000033.jpg"
    short = shorten("holiday-2025-" + 40 * "x" + "-0001.jpeg")
    assert len(short) == MAX_NAME
    assert short.startswith("holiday-2025…")
    assert short.endswith("-0001.jpeg")


def test_shares_of_classes_in_patches():
    masks = torch.tensor([[0, 0, 1, 2], [0, 1, 255, 2], [2, 2, 255, 255], [2, 2, 255, 255]], dtype=torch.uint8)[None]
    shares = patch_shares(masks, 3, 2, 2)[0]  # [C,2,2]
    assert shares[:, 0, 0].tolist() == [0.75, 0.25, 0]
    assert shares[:, 0, 1].tolist() == [0, 0.25, 0.5]
    assert shares[:, 1, 0].tolist() == [0, 0, 1]
    assert shares[:, 1, 1].tolist() == [0, 0, 0]


WRONG = {
    "views {none}": "no such folder",
    "views {photos}": "make shards",
    "views {run} --config x.yaml": "a run with a config of its own",
    "views {run} --samples 1000": "holds samples 0 to 95",
    "views {run} --images 0": "--images: at least 1",
    "views {run} --epoch -1": "--epoch: at least 0",
    "views {run} --out {photos}/ash/000.jpg/x.png": "000.jpg/x.png: File exists",
    "attention {none}": "no such run",
    "attention {run} {none}": "no such image",
    "attention {run} {run}/config.yaml": "cannot be decoded: neither JPEG, PNG nor WebP",
    "attention {run} {photos}": "neither photos nor",
    "attention {run} --images 0": "--images: at least 1",
    "attention {run} --size 20": "not a multiple of the patch size 8",
    "attention {run} --size 100000": "--size 100000: at most 128 patches, 1024 pixels",
    "attention {run} --block 3": "has blocks 1 to 2",
    "points {run} --points 0.5": "write each point as x,y",
    "points {run} --points 0.5,1.5": "shares of the photo's width and height",
    "similarity {run} --points 0.5,0.5 0.2,0.2": "give one point, the same in each photo",
    "segmentation {run}": "segmentation needs scenes with masks",
    "segmentation {run} --scenes 0": "--scenes: at least 1",
    "misalignment {none}": "no such folder; `make scenes`",
    "misalignment {photos}": "not in Pascal VOC's layout",
    "misalignment --min-share 2": "--min-share: between 0 and 1",
    "misalignment --draws 0": "--draws: at least 1",
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
