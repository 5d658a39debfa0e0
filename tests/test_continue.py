"""A DINOv2 (LayerScale, 4 registers, patches of 14 pixels, a 37 x 37 grid) is continued with points on painted scenes:
it trains, resumes bit-equal after a kill, is exported, and has the same features in timm and transformers."""

import signal
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import run_program
from PIL import Image

from model.weights import load_backbone
from tests.fork_server import Forked
from tests.test_export_formats import in_transformers
from tests.test_train import final

CONFIG = """
data:
  shards: {shards}
  holdout: 0.1
  views:
    - {{count: 2, size: 56, scale: [0.4, 1.0], teacher: true}}
    - {{count: 2, size: 28, scale: [0.1, 0.4]}}
model: {{arch: vit_small_patch14_reg4_dinov2, patch: 14, width: 64, depth: 2, heads: 2, init: {weights}}}
reference: {{points: 4}}
head: {{hidden: 32, bottleneck: 16, prototypes: 40}}
optim: {{global_batch_size: 8, epochs: 3, warmup_epochs: 1, lr: 1e-4, layer_decay: 0.9}}
speed: {{compile: false, workers: 0, device: cpu}}
run: {{log_every: 1, checkpoint_every: 2}}
"""


def write_dinov2(path: Path) -> None:
    """Random weights under the published names: registers without positions, [CLS] with one."""
    torch.manual_seed(0)
    shape = {"embed_dim": 64, "depth": 2, "num_heads": 2}
    vit = timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, **shape)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    tensors = dict(vit.state_dict())
    registers, patches = tensors.pop("reg_token"), tensors.pop("pos_embed")
    assert patches.shape == (1, 37 * 37, 64)
    positions = torch.cat([0.1 * torch.randn(1, 1, 64), patches], 1)
    torch.save(tensors | {"register_tokens": registers, "pos_embed": positions, "mask_token": torch.ones(1, 64)}, path)


def kill_after_a_checkpoint(command: list[str], run: Path) -> None:
    """Start a training and kill it, without a warning, once it has written a checkpoint."""
    process, until = Forked(command), time.monotonic() + 120
    while not any((run / "checkpoints").glob("checkpoint-*.safetensors")) and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run was over before it was killed"


@pytest.fixture(scope="module")
def continued(tmp_path_factory) -> Path:
    """A folder with the weights, and the run that was killed and resumed beside the undisturbed one."""
    folder = tmp_path_factory.mktemp("continued")
    run_program("-m", "tools.make_scenes", folder / "scenes", "--train", "96", "--val", "4", "--size", "64")
    run_program("-m", "tools.make_shards", "make", folder / "scenes/train", folder / "shards", "--processes", "1")
    write_dinov2(folder / "dinov2_reg4.pth")
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(shards=folder / "shards", weights=folder / "dinov2_reg4.pth"))
    whole = run_program("train.py", config, f"run.folder={folder / 'whole'}").stdout
    assert "dinov2_reg4.pth (DINOv2 with registers): backbone" in whole
    assert "its 37 x 37 positions resampled to 4 x 4 (bicubic)" in whole
    command = ["train.py", str(config), f"run.folder={folder / 'cut'}"]
    kill_after_a_checkpoint(command, folder / "cut")
    assert "resumed at step" in run_program(*command).stdout
    return folder


@pytest.mark.slow
def test_it_resumes_bit_equal_and_it_trained(continued):
    whole, cut = final(continued / "whole"), final(continued / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    start = load_backbone(continued / "whole", untrained=True).state_dict()
    for name in ("reg_token", "blocks.1.ls1.gamma", "pos_embed"):
        assert not torch.equal(start[name], whole[f"teacher.backbone.{name}"]), name


@pytest.fixture(scope="module")
def exported(continued) -> Path:
    """The folder of the run's export, `out`."""
    run_program("-m", "tools.export", continued / "cut", continued / "out", "--to", "transformers,card")
    return continued


def check_tokens(tokens: torch.Tensor, folder: Path, images: torch.Tensor) -> None:
    """[CLS], four registers and patches are those of the network here."""
    with torch.no_grad():
        cls, patches = load_backbone(folder / "cut")(images)[:2]
    torch.testing.assert_close(tokens[:, 0], cls, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tokens[:, 5:], patches, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_its_features_in_timm_and_its_card(exported):
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        tokens = timm.create_model(f"local-dir:{exported / 'out'}", pretrained=True).eval().forward_features(images)
    check_tokens(tokens, exported, images)
    card = (exported / "out" / "README.md").read_text()
    assert "Started from: dinov2_reg4.pth" in card
    assert ", 96 photos (sha256" in card


@pytest.mark.slow
def test_its_features_in_transformers(exported):
    images = torch.randn(2, 3, 56, 56)
    Image.fromarray(np.zeros((70, 60, 3), np.uint8)).save(exported / "photo.png")
    ((kind, tokens, _, _, loading),) = in_transformers(exported, images, "out/transformers")
    assert kind == "Dinov2WithRegistersModel"
    assert not any(loading.values())
    check_tokens(tokens, exported, images)
