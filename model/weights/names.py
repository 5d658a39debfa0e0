"""The parameter names of every checkpoint format, mapped to ours. Strict: a name that no format has, or a missing one, is
an error that names it.

    ours            backbone.<timm's name>, cls_head.*, reference_head.*
    timm, DINO      <timm's name>                                  "backbone only" files; a classifier is ignored
    DINO            {student, teacher}: [module.]backbone.*, head.*
    DenseDINO       the same with backbone.cls_pos_embed and .patch_pos_embed, ref_head.*
    Leopart         [teacher. | student.]<timm's name>, projection_head.*, prototypes.*  (its heads are ignored)
    MoCo-v3         [module.]base_encoder.<timm's name>, momentum_encoder.*, predictor.*  (the first, as published)
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from runtime.errors import UserError

BACKBONE_KEYS = re.compile(
    r"cls_token|pos_embed|cls_pos_embed|patch_pos_embed|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)"
    r"|blocks\.\d+\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)"
)
HEAD_KEYS = re.compile(r"mlp\.\d+\.(weight|bias)|last_layer\.(weight_g|weight_v)")
IGNORED_KEYS = re.compile(
    r"(head|fc_norm)\.(weight|bias)"  # a classifier
    r"|head\.\d+\.(weight|bias|running_mean|running_var|num_batches_tracked)"  # projection of MoCo-v3
    r"|projection_head\.\d+\.(weight|bias)|prototypes\.weight"  # heads of Leopart
    r"|(cls_head|reference_head|head|ref_head)\.mlp\.\d+\.(running_mean|running_var|num_batches_tracked)"
)
LEARNED_TOKEN = re.compile(r"(backbone\.)?ref_learn_token")  # published DenseDINO, --with_learnable_token
MOCO = "base_encoder."
HEADS = {"head": "cls_head", "cls_head": "cls_head", "ref_head": "reference_head", "reference_head": "reference_head"}
ROLES = ("student", "teacher")
PARTS = ("backbone", "cls_head", "reference_head")
CENTERS = {  # the center of each head: our name, the published name
    "cls_head": ("cls_center", "center"),
    "reference_head": ("reference_center", "ref_center"),
}


def remap_keys(tensors: Mapping[str, Tensor], source: str = "state dict") -> dict[str, Tensor]:
    """One network's tensors in any checkpoint format -> with our names.

    Raises UserError for a name that no format has, and for a DenseDINO whose reference tokens have a learned content.
    """
    ours: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        key = name.removeprefix("module.")
        key = key.replace("last_layer.parametrizations.weight.original0", "last_layer.weight_g")
        key = key.replace("last_layer.parametrizations.weight.original1", "last_layer.weight_v")
        part, _, rest = key.partition(".")
        if part == "backbone" and BACKBONE_KEYS.fullmatch(rest):
            ours[key] = tensor
        elif BACKBONE_KEYS.fullmatch(key):
            ours[f"backbone.{key}"] = tensor
        elif part in HEADS and HEAD_KEYS.fullmatch(rest):
            ours[f"{HEADS[part]}.{rest}"] = tensor
        elif LEARNED_TOKEN.fullmatch(key):
            _check_learned_token(name, tensor, source)
        elif not IGNORED_KEYS.fullmatch(key):
            raise UserError(f"{source}: '{name}' is not a parameter of a ViT or of its projection heads")
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


def count_blocks(tensors: Mapping[str, Tensor]) -> int:
    """The number of different blocks; an index in a name is not trusted, it may be any number."""
    return len({n.split(".")[2] for n in tensors if n.startswith("backbone.blocks.")})
