"""What a network takes of a photo (data.mean, data.std, data.channels): one in training, its file, evaluation, export."""

import json

import pytest
import timm
import torch
from conftest import run_program
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config

from eval.features import normalized, tokens
from model.methods import build
from model.vit import ViT
from model.weights import load_backbone, load_pretrained, loading_lines
from pipeline.augment import numba_kernel, recipe
from pipeline.loader import Loader
from pipeline.plan import Plan
from pipeline.shards import Shards
from runtime.checkpoint import read_header, save_backbone
from runtime.config import load_config, parse_config
from runtime.errors import UserError
from runtime.pixels import GRAY, IMAGENET, Pixels

HALF = Pixels((0.5, 0.4, 0.3), (0.5, 0.25, 0.2))
SMALL = """
data: {{channels: {channels}, mean: {mean}, std: {std}, views: [{{count: 2, size: 32, teacher: true}}]}}
model: {{arch: custom, patch: 8, width: 24, depth: 1, heads: 2}}
head: {{hidden: 8, bottleneck: 4, prototypes: 5}}
"""


def small(pixels: Pixels):
    return parse_config(SMALL.format(channels=pixels.channels, mean=[*pixels.mean], std=[*pixels.std]), "small")


def a_vit(pixels: Pixels, **options) -> ViT:
    torch.manual_seed(0)
    options = {"width": 24, "depth": 1, "heads": 2, "patch": 8, "image_size": 32} | options
    return ViT(pixels=pixels, channels=pixels.channels, **options).eval()


@pytest.fixture
def images() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)


@pytest.mark.parametrize("apply_color", [recipe.apply_color, numba_kernel.apply_color])
@pytest.mark.parametrize("pixels", [HALF, GRAY])
def test_the_recipe_is_the_same_for_every_network(apply_color, pixels, images):
    """Mean, deviation and gray come after the colors, which are those of the default network."""
    if apply_color is numba_kernel.apply_color and not numba_kernel.available:
        pytest.skip("numba is not installed")
    draws = torch.tensor([5, 1.3, 0.8, 0.7, 0.05, 0, 0.9, 1]).expand(2, 1, -1)  # every operation but gray
    views = images.permute(0, 2, 3, 1)[:, None]
    mean, std = (torch.tensor(c).view(1, 3, 1, 1) for c in IMAGENET)
    colors = apply_color(views, draws)[0] * std + mean  # 0 to 1
    made = apply_color(views, draws, pixels=pixels)[0]
    if pixels.channels == 1:
        colors = (colors * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    mean, std = (torch.tensor(c).view(1, -1, 1, 1) for c in pixels)
    torch.testing.assert_close(made, (colors - mean) / std, rtol=1e-5, atol=1e-5)


def test_a_gray_photo_is_one_of_three_equal_channels(images):
    gray = images[:, :1].expand(-1, 3, -1, -1)
    torch.testing.assert_close(normalized(gray, GRAY), (gray[:, :1] / 255 - 0.449) / 0.226)


def test_a_file_has_its_pixels(tmp_path, images):
    for pixels in (HALF, GRAY, IMAGENET):
        vit = a_vit(pixels)
        save_backbone(tmp_path / "b.safetensors", vit, vit.about())
        again = load_backbone(tmp_path / "b.safetensors")
        assert (again.pixels, again.note) == (pixels, "")
        assert torch.equal(tokens(again, images)[0], tokens(vit, images)[0])


@pytest.mark.parametrize(
    ("theirs", "ours"), [(HALF, IMAGENET), (HALF, Pixels((0.3,), (0.7,))), (Pixels((0.3,), (0.7,)), GRAY)]
)
def test_init_gives_the_tokens_that_the_weights_gave(tmp_path, images, theirs, ours):
    """The run's network sees other numbers, and its tokens are those that the file's network has of the photo: in color, or
    in gray."""
    vit = a_vit(theirs)
    save_backbone(tmp_path / "b.safetensors", vit, vit.about())
    method = build(small(ours))
    line = load_pretrained(method, str(tmp_path / "b.safetensors"))
    assert "its pixels have the mean [" in line
    assert ("added up" in line) == (theirs.channels > ours.channels)
    gray = images[:, :1].expand(-1, 3, -1, -1)
    seen = images if ours.channels == theirs.channels else gray
    own = method.networks()["teacher"].backbone.eval()
    for a, b in zip(tokens(own, seen), tokens(vit, seen), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_lines_that_load_a_file_say_so(tmp_path):
    assert len(loading_lines(a_vit(IMAGENET), tmp_path)) == 2
    line = loading_lines(a_vit(GRAY), tmp_path)[-1]
    assert line == "# vit takes (x - [0.449]) / [0.226], x from 0 to 1: not ImageNet's"


def test_init_with_the_same_pixels_changes_nothing(tmp_path):
    vit = a_vit(HALF)
    save_backbone(tmp_path / "b.safetensors", vit, vit.about())
    method = build(small(HALF))
    assert "its pixels" not in load_pretrained(method, str(tmp_path / "b.safetensors"))
    assert torch.equal(method.backbone.patch_embed.proj.weight, vit.patch_embed.proj.weight)


def test_clip_has_its_own_and_no_bias(tmp_path, images):
    """Known by its norm in front of the blocks. Without a bias its filters cannot take another mean."""
    vit = a_vit(IMAGENET, pre_norm=True)
    save_file(vit.state_dict(), tmp_path / "clip.safetensors")
    found = load_backbone(tmp_path / "clip.safetensors")
    assert found.pixels.mean == timm.data.OPENAI_CLIP_MEAN
    assert "its pixels have the mean [0.48145466, 0.4578275, 0.40821073]" in found.note
    method = build(small(IMAGENET))
    method.networks()["student"].backbone = method.networks()["teacher"].backbone = a_vit(IMAGENET, pre_norm=True)
    with pytest.raises(
        UserError, match=r"has no bias .*set data\.mean=\[0\.48145466,0\.4578275,0\.40821073\] data\.std="
    ):
        load_pretrained(method, str(tmp_path / "clip.safetensors"))


def test_what_lies_beside_the_weights(tmp_path):
    """preprocessor_config.json of Hugging Face, pretrained_cfg of timm; the folder or the file in it."""
    save_file(a_vit(IMAGENET).state_dict(), tmp_path / "model.safetensors")
    config, preprocessor = tmp_path / "config.json", tmp_path / "preprocessor_config.json"
    for beside, expected in (
        ({"config.json": {"num_attention_heads": 2}}, IMAGENET),
        ({"config.json": {"pretrained_cfg": {"mean": HALF.mean, "std": HALF.std}}}, HALF),
        (
            {"preprocessor_config.json": {"image_mean": 0.5, "image_std": [0.5, 0.5, 0.5]}},
            Pixels((0.5,) * 3, (0.5,) * 3),
        ),
        ({"preprocessor_config.json": {"image_mean": [9], "do_normalize": False}}, Pixels((0.0,) * 3, (1.0,) * 3)),
    ):
        config.write_text("{}")
        for name, contents in beside.items():
            (tmp_path / name).write_text(json.dumps(contents))
        for path in (tmp_path, tmp_path / "model.safetensors"):
            assert load_backbone(path).pixels == expected
    for wrong in ([123.7, 116.3, 103.5], [0.5, 0.5], "half", [0.5, None, 0.5]):
        preprocessor.write_text(json.dumps({"image_mean": wrong, "image_std": 0.5}))
        with pytest.raises(UserError, match="mean: expected 3 numbers from 0 to 1"):
            load_backbone(tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.channels=4"], "data.channels: expected one of 1, 3, found 4"),
        (
            ["data.channels=1", "data.mean=[0.5,0.5,0.5]"],
            r"data.mean: 3 given, data.channels: 1 needs 1 \(such as \[0.449\]\)",
        ),
        (["data.mean=0.5"], "data.mean: 1 given, data.channels: 3 needs 3"),
        (["data.std=[1,1,0]"], "data.std.2: expected a number above 0, 1 or less, found 0"),
        (["data.mean=[123,116,103]"], "data.mean.0: expected a number from 0 to 1, found 123"),
    ],
)
def test_wrong_values_are_named(tiny_config, words, message):
    with pytest.raises(UserError, match=message):
        load_config(tiny_config, words)


@pytest.mark.slow
def test_both_are_refused_in_a_resume(tiny_config):
    run_program("train.py", tiny_config, "optim.epochs=1.1", "data.mean=[0.5,0.5,0.5]")
    error = run_program("train.py", tiny_config, "optim.epochs=1.1", expect=2).stderr
    assert "data.mean: saved [0.5, 0.5, 0.5], current [0.485, 0.456, 0.406]" in error


WORDS = ["data.channels=1", "data.mean=0.4", "data.std=0.3"]


def test_the_loader_makes_them(tiny_config):
    config = load_config(tiny_config, WORDS)
    shards = Shards(str(config.data.shards))
    plan = Plan(shards, batch=16, seed=0, holdout=0.1)
    loader = Loader(config, shards, plan, device=torch.device("cpu"), dtype=torch.float32, start=0, stop=1)
    batch = next(loader)
    loader.close()
    assert [v.shape[2] for v in batch.views] == [1, 1]


@pytest.mark.slow
def test_a_network_of_gray_photos(tiny_config, tmp_path):
    """Trained, evaluated, shown, exported for timm: all see the same gray."""
    run_program("train.py", tiny_config, *WORDS, "eval.every=2")
    run = tmp_path / "run"
    assert json.loads(read_header(run / "backbone.safetensors")["__metadata__"]["densedino"])["mean"] == [0.4]
    networks = [load_backbone(run), load_backbone(run / "backbone.safetensors"), load_backbone(run, untrained=True)]
    assert {n.pixels for n in networks} == {Pixels((0.4,), (0.3,))}
    assert networks[0].patch_embed.proj.weight.shape == (24, 1, 8, 8)
    run_program("-m", "eval", "knn", run)
    run_program("-m", "tools.show", "views", run, "--out", tmp_path / "views.png")
    run_program("-m", "tools.export", run, tmp_path / "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path}/timm", pretrained=True).eval()
    normalize = create_transform(**resolve_data_config(model=theirs)).transforms[-1]
    photo = torch.randint(256, (1, 32, 32), dtype=torch.uint8)
    images = normalize(photo / 255)[None]
    with torch.no_grad():
        expected = theirs(images)
    torch.testing.assert_close(tokens(networks[0], photo.expand(3, -1, -1)[None])[0], expected, rtol=1e-4, atol=1e-4)
