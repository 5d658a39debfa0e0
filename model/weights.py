"""Weights of other people's making, and of ours: whatever the file, one network's tensors under our names. Strict: a key
that no dialect knows, or one that is missing, is an error that names it.

    ours            backbone.<timm's name>, cls_head.*, reference_head.*
    timm, DINO's    <timm's name>                                  "backbone only" files; a classifier is left out
    DINO            {student, teacher}: [module.]backbone.*, head.*
    DenseDINO       the same with backbone.cls_pos_embed and .patch_pos_embed, ref_head.*
    Leopart         [teacher. | student.]<timm's name>, projection_head.*, prototypes.*  (its heads are left out)
    MoCo-v3         [module.]base_encoder.<timm's name>, momentum_encoder.*, predictor.*  (the first, as published)

`timm:NAME` instead of a file: timm's own pretrained weights, where NAME is such a ViT.
"""

import argparse
import json
import math
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from model.dense_dino import DenseDINO
from model.vit import ViT, build_vit
from pipeline.draws import hash64
from runtime.checkpoint import Checkpoint, newest_whole, open_checkpoint, read_header, read_tensors
from runtime.config import Reference, load_config, parse_config
from runtime.mistake import Mistake, nearest

TIMM = "timm:"

_BACKBONE = re.compile(
    r"cls_token|pos_embed|cls_pos_embed|patch_pos_embed|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)"
    r"|blocks\.\d+\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)"
)
_HEAD = re.compile(r"mlp\.\d+\.(weight|bias)|last_layer\.(weight_g|weight_v)")
_LEFT_OUT = re.compile(
    r"(head|fc_norm)\.(weight|bias)"  # a classifier
    r"|head\.\d+\.(weight|bias|running_mean|running_var|num_batches_tracked)"  # MoCo-v3's projection
    r"|projection_head\.\d+\.(weight|bias)|prototypes\.weight"  # Leopart's
    r"|backbone\.ref_learn_token"  # published, unused: the reference token's content is its position alone
    r"|(cls_head|reference_head|head|ref_head)\.mlp\.\d+\.(running_mean|running_var|num_batches_tracked)"
)
_MOCO = "base_encoder."
_HEADS = {"head": "cls_head", "cls_head": "cls_head", "ref_head": "reference_head", "reference_head": "reference_head"}


def our_names(tensors: Mapping[str, Tensor], source: str = "state dict") -> dict[str, Tensor]:
    """One network's tensors in any dialect -> ours. Raises Mistake for a key that no dialect knows."""
    ours: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        key = name.removeprefix("module.")
        key = key.replace("last_layer.parametrizations.weight.original0", "last_layer.weight_g")
        key = key.replace("last_layer.parametrizations.weight.original1", "last_layer.weight_v")
        where, _, rest = key.partition(".")
        if where == "backbone" and _BACKBONE.fullmatch(rest):
            ours[key] = tensor
        elif _BACKBONE.fullmatch(key):
            ours[f"backbone.{key}"] = tensor
        elif where in _HEADS and _HEAD.fullmatch(rest):
            ours[f"{_HEADS[where]}.{rest}"] = tensor
        elif not _LEFT_OUT.fullmatch(key):
            raise Mistake(f"{source}: '{name}' is no name of a ViT or of its projection heads")
    cls, patches = (ours.pop(f"backbone.{part}_pos_embed", None) for part in ("cls", "patch"))
    if (cls is None) != (patches is None):
        raise Mistake(f"{source}: cls_pos_embed and patch_pos_embed stand together, one is missing")
    if cls is not None and patches is not None:
        ours["backbone.pos_embed"] = torch.cat([cls, patches], 1)
    return ours


def load_strictly(module: torch.nn.Module, tensors: Mapping[str, Tensor], source: str = "state dict") -> None:
    """Copy tensors into a module's parameters and buffers. Raises Mistake that names what is missing, over or misshapen.

    A module on the meta device comes to the CPU for them, after everything is found to fit.
    """
    own = module.state_dict()
    for what, names in (("is missing", own.keys() - tensors.keys()), ("is unknown", tensors.keys() - own.keys())):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise Mistake(f"{source}: '{min(names)}' {what}{more}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise Mistake(f"{source}: '{name}' has shape {tuple(tensor.shape)}, expected {tuple(own[name].shape)}")
    if any(t.is_meta for t in own.values()):
        module.to_empty(device="cpu")
    module.load_state_dict(dict(tensors))


def read_network(path: Path, role: str = "teacher") -> tuple[dict[str, Tensor], dict]:
    """(one network's tensors under our names, what the file tells of itself) of a file of any dialect.

    Raises Mistake where it is no such file. Nothing is unpickled but tensors and the options published checkpoints carry,
    and nothing takes more memory than the file has bytes.
    """
    about: dict = {}
    tensors: Any
    if path.suffix == ".safetensors":
        metadata = read_header(path).get("__metadata__") or {}
        try:
            about = dict(json.loads(metadata.get("densedino", "{}")))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise Mistake(f"{path}: what it tells of itself is no JSON object ({error})") from None
        tensors = read_tensors(path)
    else:
        tensors = _read_torch(path)
        for key in ("state_dict", "model"):
            if isinstance(tensors, dict) and isinstance(tensors.get(key), dict):
                tensors = tensors[key]
        if isinstance(tensors, dict) and isinstance(tensors.get(role), dict):
            tensors = tensors[role]
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise Mistake(f"{path}: holds no state dict of a {role} or of a ViT")
    odd = [
        n for n, t in tensors.items() if not isinstance(n, str) or t.layout != torch.strided or t.device.type != "cpu"
    ]
    if odd:
        raise Mistake(f"{path}: '{odd[0]}' is no plain tensor")
    size = path.stat().st_size
    told = sum({(t.data_ptr(), t.shape): t.numel() * t.element_size() for t in tensors.values()}.values())
    if told > size:  # a pickle may claim any shape for a storage of four bytes
        raise Mistake(f"{path}: its tensors would take {told:,} bytes, the file has {size:,}")
    encoder = {n.removeprefix("module."): t for n, t in tensors.items()}
    encoder = {n.removeprefix(_MOCO): t for n, t in encoder.items() if n.startswith(_MOCO)}
    if encoder:
        return our_names(encoder, str(path)), {"heads": 12}  # as published, at every width
    of_role = {n.removeprefix(f"{role}."): t for n, t in tensors.items() if n.startswith(f"{role}.")}
    return our_names(of_role or tensors, str(path)), about


def _read_torch(path: Path) -> object:
    """What torch.save wrote, if it is harmless. Raises Mistake otherwise."""
    try:
        with open(path, "rb") as file:
            packed = (
                file.read(4) == b"PK\x03\x04"
            )  # torch's own question; older files are a bare pickle and its tensors
        if packed:
            entries = zipfile.ZipFile(path).infolist()
            if any(e.compress_type != zipfile.ZIP_STORED for e in entries):
                raise ValueError("its entries are compressed, which torch.save never does")
            if sum(e.file_size for e in entries) > path.stat().st_size:
                raise ValueError("its entries promise more bytes than the file has")
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch finds in a hostile or broken file
        told = str(error).splitlines() or [type(error).__name__]
        raise Mistake(f"{path}: not weights that can be read safely ({told[0]})") from None


def _backbone_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix("backbone."): t for n, t in tensors.items() if n.startswith("backbone.")}


def _from_tensors(tensors: dict[str, Tensor], about: dict, source: str) -> ViT:
    """A ViT of the dimensions that its tensors have; heads of 64 dimensions (DeiT's) where the file does not tell."""
    backbone = _backbone_of(tensors)
    for name, axes in {"pos_embed": 3, "patch_embed.proj.weight": 4}.items():
        if name not in backbone:
            raise Mistake(f"{source}: '{name}' is missing")
        if backbone[name].ndim != axes or not backbone[name].numel():
            raise Mistake(f"{source}: '{name}' has shape {tuple(backbone[name].shape)}, expected {axes} axes")
    width, patch = backbone["pos_embed"].shape[-1], backbone["patch_embed.proj.weight"].shape[-1]
    heads = about.get("heads", max(1, width // 64))
    if not isinstance(heads, int) or not 1 <= heads <= width or width % heads:
        raise Mistake(f"{source}: {heads!r} heads do not share a width of {width}")
    chosen = {}
    for what, default in {"attention": "patches+self", "border": "zeros"}.items():
        known = get_args(get_type_hints(Reference)[what])
        chosen[what] = about.get(what, default)
        if chosen[what] not in known:
            raise Mistake(f"{source}: {what}: one of {', '.join(known)}{nearest(chosen[what], known)}")
    with torch.device("meta"):  # nothing is allocated before every shape is known to fit
        vit = ViT(
            width=width,
            depth=len({n.split(".")[1] for n in backbone if n.startswith("blocks.")}),
            heads=heads,
            patch=patch,
            image_size=math.isqrt(max(1, backbone["pos_embed"].shape[1] - 1)) * patch,
            **chosen,
        )
    load_strictly(vit, backbone, source)
    return vit


def timm_backbone(name: str) -> ViT:
    """timm's pretrained ViT, from timm's cache or the network; it takes pictures normalised as ours are.

    Raises Mistake where timm knows no such model, it is no plain pre-norm ViT with [CLS], or its weights are out of reach.
    """
    known = timm.list_models("vit_*", pretrained=True)
    if not timm.is_model(name):
        raise Mistake(f"timm:{name}: timm has no such model{nearest(name, known)}")
    if not timm.models.is_model_pretrained(name):
        raise Mistake(f"timm:{name}: timm has no weights for it{nearest(name, known)}")
    with torch.device("meta"):
        plan: Any = timm.create_model(name, num_classes=0)
    if why := _other_than_plain(plan):
        raise Mistake(f"timm:{name}: no plain pre-norm ViT with [CLS]: {why}")
    try:
        theirs: Any = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # whatever the hub's client raises without a network
        told = " ".join(str(error).split())[:200]
        raise Mistake(
            f"timm:{name}: its weights are not here and cannot be fetched ({told}); a file of them does as well"
        ) from None
    tensors = {f"backbone.{n}": t for n, t in theirs.state_dict().items()}
    # their colours, (p - mean) / std, from ours: a map of each channel, which the patch filter takes in
    about = theirs.pretrained_cfg
    mean, std = (torch.tensor(about[key], dtype=torch.float64) for key in ("mean", "std"))
    ours_mean, ours_std = (torch.tensor(c, dtype=torch.float64) for c in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    weight, bias = (tensors[f"backbone.patch_embed.proj.{part}"].double() for part in ("weight", "bias"))
    tensors["backbone.patch_embed.proj.weight"] = (weight * (ours_std / std).view(1, 3, 1, 1)).float()
    shift = (weight * ((ours_mean - mean) / std).view(1, 3, 1, 1)).sum((1, 2, 3))
    tensors["backbone.patch_embed.proj.bias"] = (bias + shift).float()
    return _from_tensors(tensors, {"heads": theirs.blocks[0].attn.num_heads}, f"timm:{name}")


def _other_than_plain(theirs: torch.nn.Module) -> str | None:
    """What a timm model has, or lacks, that our ViT lacks, or has; None where they compute the same."""
    if type(theirs) is not VisionTransformer:
        return f"it is a {type(theirs).__name__}"
    model: Any = theirs
    names = {name for name, _ in model.named_parameters()}
    wanted = re.compile(_BACKBONE.pattern.replace("|cls_pos_embed|patch_pos_embed", ""))
    if over := sorted(name for name in names if not wanted.fullmatch(name)):
        return f"it has '{over[0]}'"
    needed = {"cls_token", "pos_embed", "patch_embed.proj.bias", "norm.weight", "blocks.0.attn.qkv.bias"}
    if missing := sorted(needed - names):
        return f"it lacks '{missing[0]}'"
    if model.pos_embed.shape[1] != 1 + model.patch_embed.num_patches:
        return "its positions leave out [CLS]"
    if model.patch_embed.grid_size[0] != model.patch_embed.grid_size[1]:
        return "its position grid is no square"
    act, norm = model.blocks[0].mlp.act, model.norm
    if type(act) is not torch.nn.GELU or act.approximate != "none":
        return f"its activation is {act}"
    if norm.eps != 1e-6:
        return f"its norms' eps is {norm.eps:g}, not 1e-06"
    return None


def _from_checkpoint(checkpoint: Checkpoint) -> ViT:
    """The teacher's backbone, in eval mode."""
    config = parse_config(checkpoint.config, str(checkpoint.path))
    reference = config.reference
    vit = build_vit(config.model, config.image_size, reference.attention, reference.border, 0.0)
    teacher = {n.removeprefix("teacher."): t for n, t in checkpoint.tensors().items() if n.startswith("teacher.")}
    load_strictly(vit, _backbone_of(teacher), str(checkpoint.path))
    return vit.eval()


def about_backbone(vit: ViT, steps: int, method: str) -> dict:
    """What a backbone file tells of itself beside its tensors."""
    return {"heads": vit.heads, "attention": vit.attention, "border": vit.border, "steps": steps, "method": method}


def load_backbone(path: str | Path, untrained: bool = False) -> ViT:
    """The backbone (a teacher's, where there are two) in eval mode, of

    a run folder (its newest checkpoint; untrained: the same network before training), a checkpoint of ours, a backbone
    file, weights of timm, DINO, DenseDINO, Leopart or MoCo-v3, or timm:NAME. Raises Mistake where there is none.
    """
    if str(path).startswith(TIMM):
        return timm_backbone(str(path).removeprefix(TIMM)).eval()
    path = Path(path)
    if path.is_dir() and (path / "config.yaml").is_file():
        config = load_config(path / "config.yaml")
        if untrained:
            torch.manual_seed(weights_seed(config.seed))
            return DenseDINO(config).teacher.backbone.eval()
        found = newest_whole(path / "checkpoints")
        if found is None:
            raise Mistake(f"{path}: a run without a checkpoint yet")
        return _from_checkpoint(found)
    if path.is_dir():
        found = newest_whole(path)
        if found is None:
            raise Mistake(f"{path}: neither a run nor a folder of checkpoints")
        return _from_checkpoint(found)
    if not path.is_file():
        raise Mistake(f"{path}: no such file")
    if path.name.startswith("checkpoint-") and path.suffix == ".safetensors":
        return _from_checkpoint(open_checkpoint(path))
    tensors, about = read_network(path)
    return _from_tensors(tensors, about, str(path)).eval()


def weights_seed(seed: int) -> int:
    """The seed of a run's first weights."""
    return int(hash64(seed, "weights") >> 1)
