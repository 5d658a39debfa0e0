"""Files of every family, written under its published names and shapes from a small random ViT of timm: the same features;
and what is refused, by whose weights they are."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from timm.layers import SwiGLUPacked, resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from model.backbone import Backbone
from model.methods import build
from model.weights import load_backbone, load_pretrained, with_architecture
from runtime.config import parse_config
from runtime.errors import UserError

ONE = torch.ones(1)


def a_vit(**options) -> VisionTransformer:
    """A ViT of two blocks on a grid of 4 x 4 patches. All its parameters are random."""
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1, "num_classes": 0}
    vit = VisionTransformer(**shape | options)
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.1)
    return vit.eval()


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def zeros(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def of_hugging_face(own: dict[str, Tensor], dinov2: bool) -> dict[str, Tensor]:
    """timm's names -> those of transformers' Dinov2Model (with registers), or ViTModel."""
    norms = ("norm1", "norm2") if dinov2 else ("layernorm_before", "layernorm_after")
    mlp = ("mlp.fc1", "mlp.fc2") if dinov2 else ("intermediate.dense", "output.dense")
    if dinov2 and len(own["blocks.0.mlp.fc1.weight"]) == 2 * own["blocks.0.mlp.fc2.weight"].shape[1]:
        mlp = ("mlp.weights_in", "mlp.weights_out")
    words = {
        "ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1", "norm1": norms[0], "norm2": norms[1],
        "attn.proj": "attention.output.dense", "mlp.fc1": mlp[0], "mlp.fc2": mlp[1],
    }  # fmt: skip
    theirs = {"embeddings.mask_token": torch.ones(1, 1, 64)}
    for name, tensor in own.items():
        part, _, rest = name.partition(".")
        if part == "blocks":
            block, _, inner = rest.partition(".")
            for word, other in words.items():
                inner = inner.replace(word, other)
            if "attn.qkv." in inner:
                for letter, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                    word = inner.replace("attn.qkv.", f"attention.attention.{letter}.")
                    theirs[f"encoder.layer.{block}.{word}"] = piece
            else:
                theirs[f"encoder.layer.{block}.{inner}"] = tensor
        elif part == "norm":
            theirs[f"layernorm.{rest}"] = tensor
        elif part == "patch_embed":
            theirs[f"embeddings.patch_embeddings.{rest.replace('proj', 'projection')}"] = tensor
        else:
            theirs[f"embeddings.{name.replace('pos_embed', 'position_embeddings')}"] = tensor
    return theirs


HEAD = {"mlp.0.weight": ONE, "mlp.0.bias": ONE, "last_layer.weight_g": ONE, "last_layer.weight_v": ONE}
SOLO = {"projector.0.weight": ONE, "classifier.weight": ONE, "momentum_projector.0.weight": ONE}
DECODER = {
    "mask_token": ONE,
    "decoder_pos_embed": ONE,
    "decoder_embed.weight": ONE,
    "decoder_blocks.0.norm1.weight": ONE,
}
LIGHTLY = {"student_head.layers.0.weight": ONE, "criterion.center": ONE}
FC = {"fc.fc1.weight": ONE, "fc.bn1.running_mean": ONE, "fc.fc2.bias": ONE}

PLAIN = {  # the file of a family: (its contents from timm's tensors, how a line calls the family, what it says is not used)
    "timm": (lambda own: own | {"head.weight": ONE, "fc_norm.bias": ONE}, "", "head, fc_norm"),
    "any prefixes": (lambda own: {"state_dict": prefixed("module._orig_mod.model.backbone.", own)}, "", ""),
    "iBOT": (
        lambda own: {
            "student": prefixed("module.backbone.", zeros(own)),
            "teacher": prefixed("backbone.", own | {"masked_embed": ONE})
            | prefixed("head.", HEAD | {"last_layer2.weight_g": ONE}),
        },
        "iBOT", "masked_embed, head",
    ),
    "MAE": (
        lambda own: {"model": own | DECODER},
        "MAE", "mask_token, decoder_pos_embed, decoder_embed, decoder_blocks",
    ),
    "MSN": (
        lambda own: {
            "encoder": prefixed("module.", zeros(own)), "target_encoder": prefixed("module.", own | FC),
            "prototypes": ONE, "opt": {}, "epoch": 3,
        },
        "MSN", "fc (3 tensors)",
    ),
    "solo-learn": (
        lambda own: {"state_dict": prefixed("backbone.", own) | prefixed("momentum_backbone.", zeros(own)) | SOLO},
        "solo-learn", "momentum_backbone ({n} tensors), projector, classifier, momentum_projector",
    ),
    "lightly": (
        lambda own: {
            "state_dict": prefixed("student_backbone.vit.", zeros(own)) | prefixed("teacher_backbone.vit.", own) | LIGHTLY
        },
        "lightly", "student_head, criterion",
    ),
    "lightly-train": (
        lambda own: {
            "state_dict": prefixed("student_embedding_model.wrapped_model._model.", zeros(own))
            | prefixed("teacher_embedding_model.wrapped_model._model.", own)
        },
        "lightly-train", "",
    ),
    "a ViT of Hugging Face": (
        lambda own: prefixed("vit.", of_hugging_face(own, dinov2=False)) | {"classifier.weight": ONE},
        "a ViT of Hugging Face", "mask_token, classifier",
    ),
    "MAE of Hugging Face": (
        lambda own: prefixed("vit.", of_hugging_face(own, dinov2=False)) | prefixed("decoder.", DECODER),
        "MAE of Hugging Face", "mask_token, decoder (4 tensors)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", PLAIN)
def test_plain_vits(tmp_path, family):
    eps = 1e-12 if "Hugging Face" in family else 1e-6
    theirs, (write, called, unused) = a_vit(norm_layer=partial(nn.LayerNorm, eps=eps)), PLAIN[family]
    path = tmp_path / "weights.pth"
    torch.save(write(theirs.state_dict()), path)
    ours = load_backbone(path)
    check_features(ours, theirs)
    unused = unused.format(n=len(theirs.state_dict()))
    label = f"{path} ({called})" if called else str(path)
    assert ours.note == (f"{label}: a ViT; not used of this file: {unused}" if unused else "")


@pytest.mark.parametrize("family", ["timm", "a ViT of Hugging Face", "MAE of Hugging Face"])
def test_safetensors(tmp_path, family):
    theirs = a_vit()
    tensors = PLAIN[family][0](theirs.state_dict())
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "weights.safetensors")
    check_features(load_backbone(tmp_path / "weights.safetensors"), theirs)


def check_features(ours: Backbone, theirs: VisionTransformer) -> None:
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens, features = ours(images), theirs.forward_features(images)
    assert tokens.patches is not None
    torch.testing.assert_close(torch.cat([tokens.cls[:, None], tokens.patches], 1), features, rtol=1e-5, atol=1e-5)


def test_torchvision(tmp_path):
    torch.manual_seed(0)
    theirs = torchvision.models.VisionTransformer(32, 8, 2, 1, 64, 256, num_classes=5).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.1)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    ours = load_backbone(tmp_path / "weights.pth")
    assert (
        ours.note == f"{tmp_path}/weights.pth (a ViT of torchvision): a ViT; not used of this file: heads (2 tensors)"
    )

    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        patches = theirs.conv_proj(images).flatten(2).mT
        features = theirs.encoder(torch.cat([theirs.class_token.expand(2, -1, -1), patches], 1))
        tokens = ours(images)
    assert tokens.patches is not None
    torch.testing.assert_close(torch.cat([tokens.cls[:, None], tokens.patches], 1), features, rtol=1e-5, atol=1e-5)


def test_a_folder_of_hugging_face_says_how_many_heads(tmp_path):
    theirs = a_vit(num_heads=4)
    save_file(
        {n: t.contiguous() for n, t in of_hugging_face(theirs.state_dict(), False).items()},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit", "num_attention_heads": 4}))
    check_features(load_backbone(tmp_path), theirs)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        load_backbone(tmp_path)


# -------------------------------------------------------------------------------------------------------------- DINOv2


def dinov2_tokens(vit: VisionTransformer, registers: Tensor | None, images: Tensor) -> Tensor:
    """The published forward pass: [CLS] and patches get positions, registers come in between and get none."""
    x = torch.cat([vit.cls_token.expand(len(images), -1, -1), vit.patch_embed(images)], 1) + vit.pos_embed
    if registers is not None:
        x = torch.cat([x[:, :1], registers.expand(len(images), -1, -1), x[:, 1:]], 1)
    return vit.norm(vit.blocks(x))


def chunked(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """As DINOv2's training saves it: one block in each chunk, which keeps its own number."""
    return {name.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1."): t for name, t in own.items()}


def swiglu(own: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.replace("mlp.fc1.", "mlp.w12.").replace("mlp.fc2.", "mlp.w3."): t for n, t in own.items()}


MASK = {"mask_token": torch.ones(1, 64)}
DINOV2 = {  # its contents from the published tensors, under timm's names but for register_tokens
    "DINOv2": lambda own: own | MASK,
    "DINOv2, in training": lambda own: {
        "teacher": prefixed("backbone.", chunked(own | MASK))
        | {"dino_head.mlp.0.weight": ONE, "ibot_head.mlp.0.bias": ONE}
    },
    "DINOv2 with registers": lambda own: own | MASK,
    "DINOv2 with SwiGLU": lambda own: swiglu(own | MASK),
    "DINOv2 of Hugging Face": lambda own: prefixed("dinov2.", of_hugging_face(own, dinov2=True)),
    "DINOv2 with registers of Hugging Face": lambda own: of_hugging_face(own, dinov2=True),
    "DINOv2 with SwiGLU of Hugging Face": lambda own: of_hugging_face(own, dinov2=True),
}


@pytest.mark.parametrize("family", DINOV2)
def test_dinov2(tmp_path, family):
    packed = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU} if "SwiGLU" in family else {}
    theirs, path = a_vit(init_values=1.0, **packed), tmp_path / "weights.pth"
    registers = torch.randn(1, 3, 64) if "registers" in family else None
    own = theirs.state_dict() | ({} if registers is None else {"register_tokens": registers})
    torch.save(DINOV2[family](own), path)
    ours: Any = load_backbone(path)
    name = family.partition(",")[0].replace(" with SwiGLU", "")
    assert ours.note.startswith(f"{path} ({name}): a ViT; not used of this file: mask_token")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens, expected = ours(images), dinov2_tokens(theirs, registers, images)
    torch.testing.assert_close(tokens.cls, expected[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokens.patches, expected[:, -16:], rtol=1e-5, atol=1e-5)


def test_a_run_continues_dinov2_with_registers(tmp_path):
    """The architecture is that of the file, the position grid that of the views; student and teacher start as the file."""
    theirs, path = a_vit(init_values=1.0, patch_size=14, img_size=70), tmp_path / "dinov2.pth"
    registers = torch.randn(1, 4, 64)
    torch.save(theirs.state_dict() | MASK | {"register_tokens": registers}, path)
    small = "head: {hidden: 4, bottleneck: 4, prototypes: 5}\ndata: {views: [{count: 2, size: 56, teacher: true}]}"
    config = with_architecture(parse_config(f"model: {{patch: 14, init: {path}}}\n{small}", "config"))
    assert config.model.arch == "vit_small_patch14_reg4_dinov2"
    method: Any = build(config)
    assert load_pretrained(method, str(path)) == (
        f"initialized from {path} (DINOv2 with registers): backbone; new: cls_head, reference_head, centers; its 5 x 5 "
        "positions resampled to 4 x 4 (bicubic); not used: mask_token"
    )
    positions = resample_abs_pos_embed(theirs.pos_embed.detach(), [4, 4])
    for network in (method.student, method.teacher):
        own = network.backbone
        torch.testing.assert_close(own.pos_embed, positions[:, 1:], check_dtype=True)
        assert torch.equal(own.reg_token, registers)
        assert torch.equal(own.blocks[1].ls2.gamma, theirs.blocks[1].ls2.gamma)
    plain = parse_config(f"model: {{arch: custom, patch: 14, width: 64, depth: 2, heads: 1}}\n{small}", "config")
    with pytest.raises(
        UserError, match=r"\(DINOv2 with registers\) does not fit this model \(.*registers: 4 saved, 0 current"
    ):
        load_pretrained(build(plain), str(path))


# ------------------------------------------------------------------------------------------------------------- refusals

OWN = a_vit().state_dict()
REFUSED = {  # why: (the contents, the message)
    "DINOv3": ({"rope_embed.periods": ONE, "storage_tokens": ONE}, "this is DINOv3; its positions are rotary: there is no"),
    "DINOv3 of Hugging Face": ({"layer.0.attention.q_proj.weight": ONE}, "this is DINOv3 of Hugging Face; its positions"),
    "EVA": (OWN | {"blocks.0.attn.rope.freqs_cos": ONE}, "this is EVA; its positions are rotary"),
    "BEiT": (OWN | {"blocks.0.attn.relative_position_bias_table": ONE}, "this is BEiT; its positions are relative"),
    "Swin": ({"layers.0.blocks.0.norm1.weight": ONE}, "this is a Swin Transformer; only ViTs and ResNets"),
    "distilled": (OWN | {"dist_token": ONE}, "this is a distilled DeiT; it has two class tokens"),
    "a decoder": ({"model": DECODER}, "weights.pth (MAE): contains no backbone"),
    "without a norm": (
        {n: t for n, t in OWN.items() if n != "norm.weight"} | DECODER, "weights.pth (MAE): 'norm.weight' is missing"
    ),
    "a third of qkv": (
        {n: t for n, t in of_hugging_face(OWN, False).items() if "0.attention.attention.key.weight" not in n},
        "(a ViT of Hugging Face): 'backbone.blocks.0.attn.key.weight' is missing",
    ),
    "one tensor twice": (
        OWN | {"model.norm.bias": ONE}, "'norm.bias' and 'model.norm.bias' are both the backbone.norm.bias of one network",
    ),
    "unknown": (OWN | MASK | {"blocks.0.ls1.gamma": ONE, "odd": ONE}, "weights.pth (DINOv2): 'odd' is not a parameter"),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_refused(tmp_path: Path, why):
    contents, message = REFUSED[why]
    torch.save(contents, tmp_path / "weights.pth")
    with pytest.raises(UserError) as error:
        load_backbone(tmp_path / "weights.pth")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
