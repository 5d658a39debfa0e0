"""The parameter names of every checkpoint format, mapped to ours. Strict: a name that no format has, or a missing one, is
an error that names it.

    ours            backbone.<timm's name>, cls_head.*, reference_head.*
    timm, DINO      <timm's name>                                  "backbone only" files; a classifier is not used
    DINO, iBOT      {student, teacher}: [module.]backbone.*, head.*                    (iBOT: masked_embed)
    DenseDINO       the same with backbone.cls_pos_embed and .patch_pos_embed, ref_head.*
    DINOv2          <timm's name>, mask_token; with register_tokens [1,R,D], blocks.<chunk>.<i>.*, w12 and w3
    MAE             <timm's name>, mask_token, decoder_*
    MSN             {encoder, target_encoder}: module.<timm's name>, fc.*
    Leopart         [model. | teacher. | student.]<timm's name>, projection_head.*, prototypes.*  (released: model.*)
    SwAV            [module.]<timm's name>, projection_head.*, prototypes.*
    MoCo, MoCo-v2   [module.]encoder_q.<timm's name>, fc.*; encoder_k.*, queue         (the query network, as published)
    DenseCL         <timm's name>, or backbone.<timm's name>, encoder_q.0.<timm's name>; encoder_q.1.*, encoder_k.*, queue*
    MoCo-v3         [module.]base_encoder.<timm's name>, momentum_encoder.*, predictor.*   (the first, as published)
    solo-learn      backbone.<timm's name>, projector.*, classifier.*, momentum_backbone.* (the first, as published)
    lightly         [student_ | teacher_]backbone.[vit.]<timm's name>, heads of any name
    lightly-train   [student_ | teacher_]embedding_model.wrapped_model._model.<names of timm or DINOv2>
    torchvision     class_token, conv_proj.*, encoder.*, heads.*
    Hugging Face    [vit. | dinov2. | dinov2_with_registers.]embeddings.*, encoder.layer.<i>.*, layernorm.*

timm's names are those of its ViT, or of its ResNet, which are torchvision's. Letters: D width, R registers, N patches.
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
PARTLY = re.compile(r"register_tokens|blocks\.\d+\.attn\.(query|key|value)\.(weight|bias)")  # what `_assemble` takes
NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"  # of a BatchNorm
RESNET_KEYS = re.compile(
    rf"conv1\.weight|bn1\.{NORM}|layer[1-4]\.\d+\.((conv[123]|downsample\.0)\.weight|(bn[123]|downsample\.1)\.{NORM})"
)
HEAD_KEYS = re.compile(r"mlp\.\d+\.(weight|bias)|last_layer\.(weight_g|weight_v)")
UNUSED_KEYS = re.compile(
    r"(head|fc_norm|fc)\.(weight|bias)"  # a classifier
    rf"|(head|fc)\.\w+\.{NORM}|head\.last_layer2\..*"  # projections of MoCo and MSN; iBOT's head of patches
    r"|heads\.\w+\.(weight|bias)"  # a classifier of torchvision
    r"|(projection_head|prediction_head|prototypes)\w*\..*"  # heads of SwAV, Leopart and lightly
    r"|mask_token|masked_embed|(decoder|predictor|momentum_|backbone_momentum|queue|online_)\w*(\..*)?"  # of training alone
    r"|(projector|classifier|pooler|pre_logits|dino_head|ibot_head|criterion)\..*"
)
HEAD_STATISTICS = re.compile(
    r"(cls_head|reference_head|head|ref_head)\.mlp\.\d+\.(running_mean|running_var|num_batches_tracked)"
)
PREFIXES = re.compile(  # what wrappers put in front of a network's names, in any order and number
    r"((_orig_mod|module|model|_model|wrapped_model|embedding_model|backbone|vit|dinov2|dinov2_with_registers)\.)*"
)
RENAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in {
        r"\.parametrizations\.weight\.original0$": ".weight_g",  # torch's newer weight norm
        r"\.parametrizations\.weight\.original1$": ".weight_v",
        r"^embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",  # Hugging Face
        r"^embeddings\.position_embeddings$": "pos_embed",
        r"^embeddings\.": "",
        r"^(encoder\.)?layer\.": "blocks.",
        r"^layernorm\.": "norm.",
        r"\.layernorm_before\.": ".norm1.",
        r"\.layernorm_after\.": ".norm2.",
        r"\.attention\.attention\.": ".attn.",
        r"\.attention\.output\.dense\.": ".attn.proj.",
        r"\.intermediate\.dense\.": ".mlp.fc1.",
        r"\.output\.dense\.": ".mlp.fc2.",
        r"\.layer_scale([12])\.lambda1$": r".ls\1.gamma",
        r"^class_token$": "cls_token",  # torchvision
        r"^conv_proj\.": "patch_embed.proj.",
        r"^encoder\.pos_embedding$": "pos_embed",
        r"^encoder\.layers\.encoder_layer_": "blocks.",
        r"^encoder\.ln\.": "norm.",
        r"^(blocks\.\d+)\.ln_([12])\.": r"\1.norm\2.",
        r"^(blocks\.\d+)\.self_attention\.in_proj_": r"\1.attn.qkv.",
        r"^(blocks\.\d+)\.self_attention\.out_proj\.": r"\1.attn.proj.",
        r"^(blocks\.\d+)\.mlp\.(0|linear_1)\.": r"\1.mlp.fc1.",
        r"^(blocks\.\d+)\.mlp\.(3|linear_2)\.": r"\1.mlp.fc2.",
        r"^blocks\.\d+\.(\d+)\.": r"blocks.\1.",  # DINOv2 in chunks: the second number counts through all of them
        r"\.mlp\.(w12|weights_in)\.": ".mlp.fc1.",
        r"\.mlp\.(w3|weights_out)\.": ".mlp.fc2.",
        r"\.gamma_([12])$": r".ls\1.gamma",  # iBOT
    }.items()
)
LEARNED_TOKEN = re.compile(r"ref_learn_token")  # published DenseDINO, --with_learnable_token
HEADS = {"head": "cls_head", "cls_head": "cls_head", "ref_head": "reference_head", "reference_head": "reference_head"}
ROLES = {  # the words that trainers have for a network: its role
    "student": "student", "student_backbone": "student", "student_embedding_model": "student", "encoder": "student",
    "teacher": "teacher", "teacher_backbone": "teacher", "teacher_embedding_model": "teacher", "target_encoder": "teacher",
}  # fmt: skip
PARTS = ("backbone", "cls_head", "reference_head")
CENTERS = {  # the center of each head: our name, the published name
    "cls_head": ("cls_center", "center"),
    "reference_head": ("reference_center", "ref_center"),
}


def bare(name: str) -> str:
    """A name without the prefixes of wrappers."""
    return re.sub(PREFIXES, "", name.replace("_orig_mod.", ""), count=1)


def timm_name(name: str) -> str:
    """A backbone's parameter name in any format -> timm's."""
    name = bare(name)
    for pattern, replacement in RENAMES:
        name = pattern.sub(replacement, name)
    return name


def is_resnet(names: Iterable[str]) -> bool:
    """Whether the names, of any format, are those of a ResNet."""
    return any(bare(name) == "conv1.weight" for name in names)


def is_unused(name: str) -> bool:
    """Whether a tensor of a known format belongs to no part of ours."""
    name = timm_name(name)
    return not _is_of_head(name) and UNUSED_KEYS.fullmatch(name) is not None


def remap_keys(tensors: Mapping[str, Tensor], source: str = "state dict") -> dict[str, Tensor]:
    """One network's tensors in any checkpoint format -> with our names.

    Raises UserError for a name that no format has, and for a DenseDINO whose reference tokens have a learned content.
    """
    resnet = is_resnet(tensors)
    known = (RESNET_KEYS,) if resnet else (VIT_KEYS, PARTLY)
    ours: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for name, tensor in tensors.items():
        key = timm_name(name)
        if any(keys.fullmatch(key) for keys in known):
            key = f"backbone.{key}"
        elif _is_of_head(key):
            part, _, rest = key.partition(".")
            key = f"{HEADS[part]}.{rest}"
        elif LEARNED_TOKEN.fullmatch(key):
            _check_learned_token(name, tensor, source)
            continue
        elif UNUSED_KEYS.fullmatch(key) or HEAD_STATISTICS.fullmatch(key):
            continue
        else:
            network = "ResNet of bottlenecks" if resnet else "ViT"
            raise UserError(f"{source}: '{name}' is not a parameter of a {network} or of its projection heads")
        if key in ours:
            raise UserError(f"{source}: '{origin[key]}' and '{name}' are both the {key} of one network")
        ours[key], origin[key] = tensor, name
    return ours if resnet else _assemble(ours, source)


def _is_of_head(name: str) -> bool:
    part, _, rest = name.partition(".")
    return part in HEADS and HEAD_KEYS.fullmatch(rest) is not None


def _assemble(ours: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """What a format has in parts becomes timm's tensors: positions (DenseDINO), qkv (Hugging Face), registers (DINOv2)."""
    cls, patches = (ours.pop(f"backbone.{part}_pos_embed", None) for part in ("cls", "patch"))
    if (cls is None) != (patches is None):
        raise UserError(f"{source}: cls_pos_embed and patch_pos_embed belong together, one is missing")
    if cls is not None and patches is not None:
        ours["backbone.pos_embed"] = torch.cat([cls, patches], 1)
    for query in [name for name in ours if ".attn.query." in name]:
        parts = [query.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if missing := [part for part in parts if part not in ours]:
            raise UserError(f"{source}: '{missing[0]}' is missing")
        ours[query.replace(".query.", ".qkv.")] = torch.cat([ours.pop(part) for part in parts])
    registers = ours.pop("backbone.register_tokens", None)
    positions, token = ours.get("backbone.pos_embed"), ours.get("backbone.cls_token")
    if registers is not None and positions is not None and token is not None:
        # theirs have no positions, and [CLS] has a constant one: timm adds it to the token (no_embed_class)
        ours["backbone.reg_token"] = registers
        ours["backbone.cls_token"], ours["backbone.pos_embed"] = token + positions[:, :1], positions[:, 1:]
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
