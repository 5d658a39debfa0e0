"""Weights of others, ViT and ResNet, under every family's names: the same features, a line on what is unused, refusals."""

import argparse

import pytest
import timm
import torch
from torch import Tensor

from eval import points
from eval.features import normalized, tokens
from eval.target import EvalTarget
from model import methods
from model.backbone import Backbone
from model.resnet import ResNet
from model.vit import ViT
from model.weights import load_backbone, load_pretrained
from runtime.checkpoint import save_backbone
from runtime.config import load_config
from runtime.errors import UserError
from runtime.pixels import IMAGENET
from tools.export.__main__ import main as export
from tools.show import attention
from tools.show import points as picture_of_points

PARTS = {  # what the files of a family hold besides the backbone, and how a line sums it up
    "projection_head.0.weight": torch.ones(3, 3),
    "projection_head.1.running_mean": torch.ones(3),
    "projection_head.3.bias": torch.ones(3),
    "prototypes.weight": torch.ones(3, 3),
}


def small_resnet(**options) -> ResNet:
    """A ResNet of bottlenecks, narrow, whose norms have statistics."""
    torch.manual_seed(0)
    network = ResNet((1, 2, 1, 1), (4, 8, 16, 32), **options)
    for name, tensor in network.state_dict().items():
        if "bn" in name and tensor.is_floating_point():
            tensor.copy_(0.5 + torch.rand_like(tensor))
    return network.eval()


def small_vit(heads: int = 1) -> ViT:
    torch.manual_seed(0)
    return ViT(width=96, depth=2, heads=heads, patch=32, image_size=64).eval()


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def zeros(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def contents_of(family: str, own: dict[str, Tensor]) -> dict:
    """The contents of a family's file: `own` under its names, and what else it holds. Other networks are zeros."""
    fc = {"fc.0.weight": torch.ones(3, 3), "fc.0.bias": torch.ones(3), "fc.2.weight": torch.ones(3, 3)}
    queue = {"queue": torch.ones(3, 4), "queue_ptr": torch.ones(1, dtype=torch.long)}
    if family == "timm":
        return own
    if family == "DINO":
        teacher = prefixed("backbone.", own) | {"head.last_layer.weight_g": torch.ones(5, 1)}
        student = prefixed("module.", zeros(teacher))
        return {"student": student, "teacher": teacher, "args": argparse.Namespace(arch="resnet50")}
    if family == "SwAV":
        return prefixed("module.", own | PARTS)
    if family == "Leopart":
        return {"state_dict": prefixed("model.", own | {"projection_head.2.weight": torch.ones(3, 3)} | PARTS)}
    if family == "MoCo":
        others = prefixed("module.encoder_k.", zeros(own)) | prefixed("module.", queue)
        return {"arch": "resnet50", "state_dict": prefixed("module.encoder_q.", own | fc) | others}
    if family == "MoCo-v3":
        others = prefixed("module.momentum_encoder.", zeros(own)) | {"module.predictor.0.weight": torch.ones(3, 3)}
        return {"state_dict": prefixed("module.base_encoder.", own | fc) | others}
    if family == "DenseCL, released":
        return {"state_dict": own, "author": "DenseCL"}
    assert family == "DenseCL"
    head = {"encoder_q.1.mlp.0.weight": torch.ones(3, 3)}
    others = prefixed("encoder_k.0.", zeros(own)) | head | queue | {"queue2": torch.ones(3, 4)}
    return {"state_dict": prefixed("encoder_q.0.", own) | prefixed("backbone.", own) | others}


UNUSED = {  # of each family: (of a ResNet, of a ViT)
    "timm": ("", ""),
    "DINO": ("", ""),
    "SwAV": ("projection_head (3 tensors), prototypes",) * 2,
    "Leopart": ("projection_head (4 tensors), prototypes",) * 2,
    "MoCo": ("encoder_k ({n} tensors), queue, queue_ptr, fc (3 tensors)",) * 2,
    "MoCo-v3": ("momentum_encoder ({n} tensors), predictor, fc (3 tensors)",) * 2,
    "DenseCL, released": ("", ""),
    "DenseCL": ("encoder_k ({n} tensors), encoder_q, queue, queue_ptr, queue2",) * 2,
}


@pytest.mark.parametrize("family", UNUSED)
@pytest.mark.parametrize("make", [small_resnet, small_vit])
def test_every_family(make, family, tmp_path):
    twelve_heads = make is small_vit and family == "MoCo-v3"  # as published, for every width
    network: Backbone = make(heads=12) if twelve_heads else make()
    own = dict(network.state_dict())
    path = tmp_path / "weights.pth"
    torch.save(contents_of(family, own), path)
    loaded = load_backbone(path)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(loaded(images)[:2], network(images)[:2], strict=True):
            assert torch.equal(ours, theirs)
    kind = type(network).__name__
    unused = UNUSED[family][isinstance(network, ViT)].format(n=len(own))
    assert loaded.note == (f"{path} ({family}): a {kind}; not used of this file: {unused}" if unused else "")


def test_resnet50_has_timms_features(tmp_path):
    """Tokens are the last feature map, [CLS] is timm's pooled feature."""
    torch.manual_seed(0)
    theirs = timm.create_model("resnet50", num_classes=0).eval()
    torch.save({"state_dict": prefixed("module.encoder_q.", theirs.state_dict())}, tmp_path / "moco.pth.tar")
    network = load_backbone(tmp_path / "moco.pth.tar")
    assert (network.width, network.patch, network.image_size) == (2048, 32, 224)
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    cls, patches = tokens(network, images)
    with torch.no_grad():
        maps = theirs.forward_features(normalized(images, IMAGENET))  # [n,D,2,3]
        assert torch.equal(patches, maps.flatten(2).transpose(1, 2))
        torch.testing.assert_close(cls, theirs(normalized(images, IMAGENET)), rtol=1e-5, atol=1e-6)
    assert torch.equal(patches[:, 4], maps[:, :, 1, 1])  # row by row


def test_the_line_on_what_is_not_used_is_printed(tmp_path, capsys):
    torch.save(contents_of("SwAV", dict(small_resnet().state_dict())), tmp_path / "swav.pth")
    network = EvalTarget(tmp_path / "swav.pth").network()
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    [line] = capsys.readouterr().out.splitlines()
    assert line.endswith("swav.pth (SwAV): a ResNet; not used of this file: projection_head (3 tensors), prototypes")


def test_our_own_file_keeps_its_image_size(tmp_path):
    path = tmp_path / "resnet.safetensors"
    save_backbone(path, small_resnet(), {"image_size": 64})
    assert load_backbone(path).about()["image_size"] == 64
    save_backbone(path, small_resnet(), {"image_size": 60})
    with pytest.raises(UserError, match="image_size: expected a multiple of 32, found 60"):
        load_backbone(path)


# ------------------------------------------------------------------------------------------------------------- refusals


def test_errors_name_the_family_and_what_is_wrong(tmp_path):
    path = tmp_path / "weights.pth"
    own = dict(small_resnet().state_dict())
    wrong = {
        "layer1.0.se.fc1.weight": r"\(SwAV\): 'module\.layer1\.0\.se\.fc1\.weight' is not a parameter of a ResNet",
        "layer3.0.conv3.weight": r"\(SwAV\): 'layer3\.0\.conv3\.weight' is missing, .* ResNet-50 and deeper",
        "layer2.1.bn2.bias": r"\(SwAV\): 'layer2\.1\.bn2\.bias' is missing",
    }
    for name, message in wrong.items():
        changed = {n: t for n, t in own.items() if n != name} if name in own else own | {name: torch.ones(1)}
        torch.save(contents_of("SwAV", changed), path)
        with pytest.raises(UserError, match=message):
            load_backbone(path)
    torch.save(own | {"layer1.0.conv2.weight": torch.ones(4, 2, 3, 3)}, path)  # groups: a ResNeXt
    with pytest.raises(
        UserError, match=r"'layer1\.0\.conv2\.weight' has shape \(4, 2, 3, 3\), expected \(4, 4, 3, 3\)"
    ):
        load_backbone(path)
    torch.save(contents_of("MoCo", dict(small_vit().state_dict()) | {"blocks.0.gate.weight": torch.ones(1)}), path)
    with pytest.raises(UserError, match=r"\(MoCo\): 'blocks\.0\.gate\.weight' is not a parameter of a ViT"):
        load_backbone(path)


def test_what_needs_a_vit_refuses_a_resnet(tmp_path):
    path = tmp_path / "resnet.safetensors"
    save_backbone(path, small_resnet(), {"image_size": 64})
    networks, options = [("mine", small_resnet())], argparse.Namespace(points=None, block=None)
    needs = {
        "the point probe": lambda: points.run(EvalTarget(path), "no scenes are opened"),
        "an export": lambda: export([str(path), str(tmp_path / "exported")]),
        "a picture of attention": lambda: attention.draw(networks, [], options),
        "a picture of reference tokens": lambda: picture_of_points.draw(networks, [], options),
    }
    for what, start in needs.items():
        with pytest.raises(UserError, match=f"is a ResNet; {what} needs a ViT: a ResNet has no attention"):
            start()


def test_a_run_cannot_start_from_a_resnet(tmp_path):
    torch.save(contents_of("SwAV", dict(small_resnet().state_dict())), tmp_path / "swav.pth")
    method = methods.build(load_config("configs/demo.yaml"))
    with pytest.raises(UserError, match=r"swav\.pth \(SwAV\) is a ResNet; this run trains a ViT, which cannot"):
        load_pretrained(method, str(tmp_path / "swav.pth"))
