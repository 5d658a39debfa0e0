"""The parameter names of every checkpoint format, mapped to ours. Strict: a name that no format has, or a missing one, is
an error that names it.

    ours            backbone.<timm's name>, cls_head.*, reference_head.*
    timm, DINO      <timm's name>                                  "backbone only" files; a classifier is not used
    DINO            {student, teacher}: [module.]backbone.*, head.*
    DenseDINO       the same with backbone.cls_pos_embed and .patch_pos_embed, ref_head.*
    Leopart         [model. | teacher. | student.]<timm's name>, projection_head.*, prototypes.*  (released: model.*)
    SwAV            [module.]<timm's name>, projection_head.*, prototypes.*
    MoCo, MoCo-v2   [module.]encoder_q.<timm's name>, fc.*; encoder_k.*, queue         (the query network, as published)
    DenseCL         <timm's name>, or backbone.<timm's name>, encoder_q.0.<timm's name>; encoder_q.1.*, encoder_k.*, queue*
    MoCo-v3         [module.]base_encoder.<timm's name>, momentum_encoder.*, predictor.*   (the first, as published)

timm's names are those of its ViT, or of its ResNet, which are torchvision's.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from runtime.errors import UserError

VIT_KEYS = re.compile(
    r"cls_token|pos_embed|cls_pos_embed|patch_pos_embed|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)"
    r"|blocks\.\d+\.(norm1|norm2|attn\.(qkv|proj|q_norm|k_norm|norm)|mlp\.(fc1|fc2|norm))\.(weight|bias)"
    r"|reg_token|norm_pre\.(weight|bias)|blocks\.\d+\.ls[12]\.gamma"
)
NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"  # of a BatchNorm
RESNET_KEYS = re.compile(
    rf"conv1\.weight|bn1\.{NORM}|layer[1-4]\.\d+\.((conv[123]|downsample\.0)\.weight|(bn[123]|downsample\.1)\.{NORM})"
)
HEAD_KEYS = re.compile(r"mlp\.\d+\.(weight|bias)|last_layer\.(weight_g|weight_v)")
UNUSED_KEYS = re.compile(
    r"(head|fc_norm|fc)\.(weight|bias)"  # a classifier
    rf"|(head|fc)\.\d+\.{NORM}"  # projections of MoCo
    rf"|projection_head(\.\d+)?\.{NORM}|prototypes(\.prototypes\d+)?\.weight"  # heads of SwAV and Leopart
)
HEAD_STATISTICS = re.compile(
    r"(cls_head|reference_head|head|ref_head)\.mlp\.\d+\.(running_mean|running_var|num_batches_tracked)"
)
LEARNED_TOKEN = re.compile(r"(backbone\.)?ref_learn_token")  # published DenseDINO, --with_learnable_token
ENCODERS = {  # prefix of the network that is evaluated: whose files have it
    "base_encoder.": "MoCo-v3",
    "encoder_q.0.": "DenseCL",
    "encoder_q.": "MoCo",
    "model.": "Leopart",
}
HEADS = {"head": "cls_head", "cls_head": "cls_head", "ref_head": "reference_head", "reference_head": "reference_head"}
ROLES = ("student", "teacher")
PARTS = ("backbone", "cls_head", "reference_head")
CENTERS = {  # the center of each head: our name, the published name
    "cls_head": ("cls_center", "center"),
    "reference_head": ("reference_center", "ref_center"),
}


def find_encoder(names: Iterable[str]) -> tuple[str, str]:
    """(whose file has these names, "" if nothing tells; the prefix of the network that is evaluated, "" without one)."""
    bare = {name.removeprefix("module.") for name in names}
    for prefix, family in ENCODERS.items():
        if any(name.startswith(prefix) for name in bare):
            return family, prefix
    parts = {name.partition(".")[0] for name in bare}
    if "prototypes" in parts:  # SwAV's head has two linear maps, 0 and 3; Leopart's three, 0, 2 and 4
        return ("Leopart" if "projection_head.2.weight" in bare else "SwAV"), ""
    if "ref_head" in parts:
        return "DenseDINO", ""
    return ("DINO" if any(name.startswith("head.last_layer") for name in bare) else ""), ""


def is_resnet(names: Iterable[str]) -> bool:
    """Whether the names, of any format, are those of a ResNet."""
    return any(name.removeprefix("module.").removeprefix("backbone.") == "conv1.weight" for name in names)


def is_unused(name: str) -> bool:
    """Whether a tensor of a known format belongs to no part of ours."""
    return UNUSED_KEYS.fullmatch(name.removeprefix("module.")) is not None


def remap_keys(tensors: Mapping[str, Tensor], source: str = "state dict") -> dict[str, Tensor]:
    """One network's tensors in any checkpoint format -> with our names.

    Raises UserError for a name that no format has, and for a DenseDINO whose reference tokens have a learned content.
    """
    keys, network = (RESNET_KEYS, "ResNet of bottlenecks") if is_resnet(tensors) else (VIT_KEYS, "ViT")
    ours: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        key = name.removeprefix("module.")
        key = key.replace("last_layer.parametrizations.weight.original0", "last_layer.weight_g")
        key = key.replace("last_layer.parametrizations.weight.original1", "last_layer.weight_v")
        part, _, rest = key.partition(".")
        if part == "backbone" and keys.fullmatch(rest):
            ours[key] = tensor
        elif keys.fullmatch(key):
            ours[f"backbone.{key}"] = tensor
        elif part in HEADS and HEAD_KEYS.fullmatch(rest):
            ours[f"{HEADS[part]}.{rest}"] = tensor
        elif LEARNED_TOKEN.fullmatch(key):
            _check_learned_token(name, tensor, source)
        elif not (is_unused(key) or HEAD_STATISTICS.fullmatch(key)):
            raise UserError(f"{source}: '{name}' is not a parameter of a {network} or of its projection heads")
    cls, patches = (ours.pop(f"backbone.{part}_pos_embed", None) for part in ("cls", "patch"))
    if (cls is None) != (patches is None):
        raise UserError(f"{source}: cls_pos_embed and patch_pos_embed belong together, one is missing")
    if cls is not None and patches is not None:
        ours["backbone.pos_embed"] = torch.cat([cls, patches], 1)
    return ours


def _check_learned_token(name: str, tensor: Tensor, source: str) -> None:
    """Published code has this parameter only if it was trained with --with_learnable_token (VT:240-248). A zero vector adds
    nothing to the positions, so it can be ignored. Raises UserError for any other."""
    if tensor.to(torch.float64).any():
        raise UserError(
            f"{source}: '{name}' is the learned content of reference tokens (published code, --with_learnable_token); "
            "a reference token here is its position alone, so this network cannot be loaded"
        )


def load_strictly(module: torch.nn.Module, tensors: Mapping[str, Tensor], source: str = "state dict") -> None:
    """Copy tensors into a module's parameters and buffers. Raises UserError that names a missing or unknown tensor, or one
    of another shape.

    A module on the meta device is moved to the CPU, after all shapes have been checked.
    """
    own = module.state_dict()
    for problem, names in (("is missing", own.keys() - tensors.keys()), ("is unknown", tensors.keys() - own.keys())):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(f"{source}: '{min(names)}' {problem}{more}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise UserError(f"{source}: '{name}' has shape {tuple(tensor.shape)}, expected {tuple(own[name].shape)}")
    if any(t.is_meta for t in own.values()):
        module.to_empty(device="cpu")
    module.load_state_dict(dict(tensors))


def select_part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The tensors of one part (backbone, a head, a role), without its prefix."""
    return {n.removeprefix(f"{part}."): t for n, t in tensors.items() if n.startswith(f"{part}.")}
