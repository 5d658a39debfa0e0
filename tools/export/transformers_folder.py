"""A backbone as a folder that `transformers` loads, written without that package.

    FOLDER/config.json, model.safetensors, preprocessor_config.json

A plain ViT becomes a ViTModel; one with LayerScale or SwiGLU a Dinov2Model, one with registers a Dinov2WithRegistersModel.
What the config of these cannot say is refused. The names of tensors are those of published files.

D width · P tokens in front of the patches: [CLS] and registers · N patches.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.datasets import shorter_side
from model.architecture import Architecture
from model.vit import ViT
from model.weights.read import HUGGING_FACE_ACTIVATIONS
from runtime.checkpoint import save_tensors
from runtime.files import write_atomic

FILES = ("config.json", "model.safetensors", "preprocessor_config.json")
CLASSES = {"vit": "ViTModel", "dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}
BLOCK = {  # timm's name in a block: (a ViTModel's, a Dinov2Model's, the latter's with SwiGLU)
    "norm1": ("layernorm_before", "norm1", "norm1"),
    "attn.proj": ("attention.output.dense",) * 3,
    "norm2": ("layernorm_after", "norm2", "norm2"),
    "mlp.fc1": ("intermediate.dense", "mlp.fc1", "mlp.weights_in"),
    "mlp.fc2": ("output.dense", "mlp.fc2", "mlp.weights_out"),
}
IN_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(\w+)")


def model_type(a: Architecture) -> str:
    """The kind of model that an architecture is called there."""
    return "dinov2_with_registers" if a.registers else "dinov2" if a.layer_scale or a.swiglu else "vit"


def refusal(a: Architecture) -> str | None:
    """Why no model of transformers can have these features; None if one has."""
    if a.pre_norm:
        return "it has a norm before the first block (pre_norm), which ViTModel and Dinov2Model lack"
    if a.qk_norm:
        return "its queries and keys are normalized (qk_norm), those of ViTModel and Dinov2Model are not"
    if a.scale_norms:
        return "it has norms inside attention and MLP (scale_norms), which ViTModel and Dinov2Model lack"
    if a.swiglu and a.activation != "silu":
        return f"its gated MLP has the activation {a.activation}, that of Dinov2Model is silu"
    if model_type(a) != "vit" and _mlp_ratio(a) is None:
        return f"its MLP has {_hidden(a)} units for a width of {a.width}, and Dinov2Model takes a whole multiple only"
    return None


def _hidden(a: Architecture) -> int:
    return a.hidden or 4 * a.width


def _mlp_ratio(a: Architecture) -> int | None:
    """The whole number from which Dinov2Model computes the MLP's width; None if there is none."""
    for ratio in range(1, _hidden(a) // a.width + 2):
        units = ratio * a.width
        if (2 * ((units * 2 // 3 + 7) // 8 * 8) if a.swiglu else units) == _hidden(a):
            return ratio
    return None


def config_of(vit: ViT) -> dict[str, Any]:
    """The contents of config.json. "densedino": what our own reader takes from it."""
    a = vit.architecture
    kind = model_type(a)
    config: dict[str, Any] = {
        "model_type": kind, "architectures": [CLASSES[kind]], "torch_dtype": "float32", "hidden_size": a.width,
        "num_hidden_layers": a.depth, "num_attention_heads": a.heads, "image_size": vit.image_size,
        "patch_size": a.patch, "num_channels": a.channels, "qkv_bias": a.qkv_bias, "layer_norm_eps": a.eps,
        "hidden_act": next(theirs for theirs, ours in HUGGING_FACE_ACTIVATIONS.items() if ours == a.activation),
    }  # fmt: skip
    if (
        kind == "vit"
    ):  # its pooled output would be a random map of [CLS]; with these and `tensors_of` it is [CLS] itself
        config |= {"intermediate_size": _hidden(a), "pooler_act": "linear", "pooler_output_size": a.width}
    else:
        config |= {"mlp_ratio": _mlp_ratio(a), "use_swiglu_ffn": a.swiglu}
    if kind == "dinov2_with_registers":
        config["num_register_tokens"] = a.registers
    return config | {"densedino": _about(vit)}


def _about(vit: ViT) -> dict[str, Any]:
    """`ViT.about` of the network that comes back from `tensors_of`: there only [CLS] has a position, or no token has."""
    back = replace(vit.architecture, class_position=not vit.architecture.registers)
    return {**vit.about(), **back.not_in_tensors(), "class_position": back.class_position}


def tensors_of(vit: ViT) -> dict[str, Tensor]:
    """The network's tensors under the names of transformers. With registers, what has no place there is added up: their
    positions to the registers. LayerScale that the network lacks is 1."""
    a, own = vit.architecture, vit.state_dict()
    kind = model_type(a)
    column = 0 if kind == "vit" else 2 if a.swiglu else 1
    positions, n = own["pos_embed"], vit.front_positions
    front = positions[:, :n] if n else positions.new_zeros(1, a.prefix, a.width)  # [1,P,D]
    theirs = {
        "embeddings.cls_token": own["cls_token"],
        "embeddings.position_embeddings": torch.cat([front[:, :1], positions[:, n:]], 1),  # [1,1+N,D]
    }
    for part in ("weight", "bias"):
        theirs[f"embeddings.patch_embeddings.projection.{part}"] = own[f"patch_embed.proj.{part}"]
        theirs[f"layernorm.{part}"] = own[f"norm.{part}"]
    if kind == "vit":
        theirs |= {"pooler.dense.weight": torch.eye(a.width), "pooler.dense.bias": torch.zeros(a.width)}
    else:
        theirs["embeddings.mask_token"] = torch.zeros(1, a.width)
        for i in range(a.depth):
            for branch in (1, 2):
                gamma = own.get(f"blocks.{i}.ls{branch}.gamma", torch.ones(a.width))
                theirs[f"encoder.layer.{i}.layer_scale{branch}.lambda1"] = gamma
    if a.registers:
        theirs["embeddings.register_tokens"] = own["reg_token"] + front[:, 1:]
    for name, tensor in own.items():
        if not (found := IN_BLOCK.fullmatch(name)):
            continue
        block, module, part = found.groups()
        if module == "attn.qkv":
            for word, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                theirs[f"encoder.layer.{block}.attention.attention.{word}.{part}"] = piece
        elif module in BLOCK:
            theirs[f"encoder.layer.{block}.{BLOCK[module][column]}.{part}"] = tensor
    return theirs


def preprocessor_of(vit: ViT) -> dict[str, Any]:
    """The contents of preprocessor_config.json: photos are cropped and normalized as eval/datasets.py does."""
    side = vit.image_size
    return {
        "image_processor_type": "BitImageProcessor", "do_convert_rgb": vit.pixels.channels == 3,
        "do_resize": True, "resample": 3,
        "size": {"shortest_edge": shorter_side(side)}, "do_center_crop": True,
        "crop_size": {"height": side, "width": side}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(vit.pixels.mean), "image_std": list(vit.pixels.std),
    }  # fmt: skip


def write_transformers(vit: ViT, folder: Path) -> None:
    """Write the three files."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors_of(vit).items()}
    save_tensors(folder / "model.safetensors", tensors, {"format": "pt", "densedino": json.dumps(_about(vit))})
    for name, contents in (("config.json", config_of(vit)), ("preprocessor_config.json", preprocessor_of(vit))):
        write_atomic(folder / name, json.dumps(contents, indent=1) + "\n")
