"""Weights of other people's making, and of ours: whatever the file, one network's tensors under our names. Strict: a key
that no dialect knows, or one that is missing, is an error that names it.

    ours            backbone.<timm's name>, cls_head.*, reference_head.*
    timm, DINO's    <timm's name>                                  "backbone only" files; a classifier is left out
    DINO            {student, teacher}: [module.]backbone.*, head.*
    DenseDINO       the same with backbone.cls_pos_embed and .patch_pos_embed, ref_head.*
    Leopart         [teacher. | student.]<timm's name>, projection_head.*, prototypes.*  (its heads are left out)

`timm:NAME` stands for the weights that timm knows by that name, wherever a file is taken.
"""

import argparse
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.dense_dino import DenseDINO
from model.vit import ARCHS, ViT
from pipeline.draws import hash64
from runtime.checkpoint import newest_checkpoint, read_checkpoint
from runtime.config import load_config, parse_config
from runtime.mistake import Mistake, nearest

_BACKBONE = re.compile(
    r"cls_token|pos_embed|cls_pos_embed|patch_pos_embed|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)"
    r"|blocks\.\d+\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)"
)
_HEAD = re.compile(r"mlp\.\d+\.(weight|bias)|last_layer\.(weight_g|weight_v)")
_LEFT_OUT = re.compile(
    r"(head|fc_norm)\.(weight|bias)"  # a classifier
    r"|projection_head\.\d+\.(weight|bias)|prototypes\.weight"  # Leopart's
    r"|backbone\.ref_learn_token"  # published, unused: the reference token's content is its position alone
    r"|(cls_head|reference_head|head|ref_head)\.mlp\.\d+\.(running_mean|running_var|num_batches_tracked)"
)
_HEADS = {"head": "cls_head", "cls_head": "cls_head", "ref_head": "reference_head", "reference_head": "reference_head"}
_ROLES = ("student", "teacher")
_PARTS = ("backbone", "cls_head", "reference_head")
_CENTERS = {
    "cls_head": ("cls_center", "center"),
    "reference_head": ("reference_center", "ref_center"),
}  # ours, published


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
    """Copy tensors into a module's parameters and buffers. Raises Mistake that names what is missing, over or misshapen."""
    own = module.state_dict()
    for what, names in (("is missing", own.keys() - tensors.keys()), ("is unknown", tensors.keys() - own.keys())):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise Mistake(f"{source}: '{min(names)}' {what}{more}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise Mistake(f"{source}: '{name}' has shape {tuple(tensor.shape)}, expected {tuple(own[name].shape)}")
    module.load_state_dict(dict(tensors))


def read_network(path: str | Path, role: str = "teacher") -> tuple[dict[str, Tensor], dict]:
    """(one network's tensors under our names, what the file tells of itself) of a run, a checkpoint, a file of any
    dialect, or `timm:NAME`.

    Raises Mistake where it is none. Nothing is unpickled but tensors and the options published checkpoints carry.
    """
    contents, about = _read(str(path))
    return _network(contents, role, str(path)), about


def _read(source: str) -> tuple[dict, dict]:
    """(all that it holds, what it tells of itself) of a run folder (its newest checkpoint), a checkpoint (folder or
    file), a file of any dialect, or `timm:NAME`."""
    if source.startswith("timm:"):
        return _read_timm(source.removeprefix("timm:"))
    path = Path(source)
    if path.is_dir():
        is_run = (path / "config.yaml").is_file()
        found = newest_checkpoint(path / "checkpoints" if is_run else path)
        if found is None:
            raise Mistake(f"{path}: {'a run without a checkpoint yet' if is_run else 'neither a run nor checkpoints'}")
        return found[3], _about_config(found[2], source)
    if not path.is_file():
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        raise Mistake(f"{path}: no such file{nearest(source, map(str, beside))}")
    if path.name.startswith("checkpoint-") and path.suffix == ".safetensors":
        _, text, tensors = read_checkpoint(path)
        return tensors, _about_config(text, source)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {}).get("densedino", "{}"))
                return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError, ValueError) as error:
            raise Mistake(f"{path}: {error}") from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch finds in a hostile or broken file
        raise Mistake(f"{path}: not weights that can be read safely ({str(error).splitlines()[0]})") from None
    return contents if isinstance(contents, dict) else {"": contents}, {}


def _read_timm(name: str) -> tuple[dict, dict]:
    """Weights by timm's name; timm fetches them, or has them in its cache."""
    try:
        theirs: Any = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # a wrong name, or whatever the way to the weights ends in
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        known = timm.list_models("*vit_*", pretrained=True)
        hint = "" if name in known or name.startswith("local-dir:") else nearest(name, known)
        raise Mistake(f"timm:{name}: {reason}{hint}") from None
    return theirs.state_dict(), {"heads": theirs.blocks[0].attn.num_heads} if hasattr(theirs, "blocks") else {}


def _network(contents: dict, role: str, source: str) -> dict[str, Tensor]:
    """One network's tensors under our names, of all that a file holds."""
    tensors: Any = contents
    for key in ("state_dict", "model", role):
        if isinstance(tensors, dict) and isinstance(tensors.get(key), dict):
            tensors = tensors[key]
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise Mistake(f"{source}: holds no state dict of a {role} or of a ViT")
    of_role = {n.removeprefix(f"{role}."): t for n, t in tensors.items() if n.startswith(f"{role}.")}
    return our_names(of_role or tensors, source)


def _holds(contents: dict, role: str) -> bool:
    return role in contents or any(str(name).startswith(f"{role}.") for name in contents.get("state_dict", contents))


def _of_part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {n.removeprefix(f"{part}."): t for n, t in tensors.items() if n.startswith(f"{part}.")}


def _depth(tensors: Mapping[str, Tensor]) -> int:
    blocks = [int(n.split(".")[2]) for n in tensors if n.startswith("backbone.blocks.")]
    return 1 + max(blocks, default=-1)


def _from_tensors(tensors: dict[str, Tensor], about: dict, source: str) -> ViT:
    """A ViT of the dimensions that its tensors have; heads of 64 dimensions (DeiT's) where the file does not tell."""
    backbone = _of_part(tensors, "backbone")
    if "pos_embed" not in backbone or "patch_embed.proj.weight" not in backbone:
        raise Mistake(
            f"{source}: '{'pos_embed' if 'pos_embed' not in backbone else 'patch_embed.proj.weight'}' is missing"
        )
    side = math.isqrt(backbone["pos_embed"].shape[1] - 1)
    if side * side != backbone["pos_embed"].shape[1] - 1:
        raise Mistake(
            f"{source}: {backbone['pos_embed'].shape[1]} positions are not one of [CLS] and a square of patches"
        )
    width, patch = backbone["pos_embed"].shape[-1], backbone["patch_embed.proj.weight"].shape[-1]
    vit = ViT(
        width=width,
        depth=_depth(tensors),
        heads=about.get("heads", max(1, width // 64)),
        patch=patch,
        image_size=side * patch,
        attention=about.get("attention", "patches+self"),
        border=about.get("border", "zeros"),
    )
    load_strictly(vit, backbone, source)
    return vit


def _about_config(text: str, source: str) -> dict:
    """What a checkpoint's config tells of its backbone."""
    config = parse_config(text, source)
    heads = config.model.heads or ARCHS[config.model.arch][2]
    return {"heads": heads, "attention": config.reference.attention, "border": config.reference.border}


def about_backbone(vit: ViT, steps: int, method: str) -> dict:
    """What a backbone file tells of itself beside its tensors."""
    return {"heads": vit.heads, "attention": vit.attention, "border": vit.border, "steps": steps, "method": method}


def load_backbone(path: str | Path, untrained: bool = False) -> ViT:
    """The backbone (a teacher's, where there are two) in eval mode, of

    a run folder (its newest checkpoint; untrained: the same network before training), a checkpoint of ours, a backbone
    file, or weights of timm, DINO, DenseDINO or Leopart. Raises Mistake where there is none.
    """
    if untrained and (Path(path) / "config.yaml").is_file():
        config = load_config(Path(path) / "config.yaml")
        torch.manual_seed(weights_seed(config.seed))
        model = DenseDINO(config)
        if config.model.init:
            initialise(model, config.model.init)
        return model.teacher.backbone.eval()
    tensors, about = read_network(path)
    return _from_tensors(tensors, about, str(path)).eval()


def initialise(model: DenseDINO, source: str) -> str:
    """Begin with weights that others made, of any dialect; returns one line: what came from there, and what did not.

    The backbone is taken for student and teacher (each its own, where the file holds both), and so are the heads that are
    there, with their centres. A head of [CLS] serves points too where the file has none for them, as the published
    --finetune does it. What the file lacks stays new. Raises Mistake, with the difference, where it is another network's.
    """
    contents, about = _read(source)
    roles = [role for role in _ROLES if _holds(contents, role)] or ["teacher"]
    origin: dict[str, str] = {}
    for role in _ROLES:
        network: Any = getattr(model, role)
        tensors = _network(contents, role if role in roles else roles[0], source)
        _refuse_another(network, tensors, about, source)
        origin = {part: part for part in _PARTS if part == "backbone" or _of_part(tensors, part)}
        if "cls_head" in origin:
            origin.setdefault("reference_head", "cls_head")
        origin = {part: came for part, came in origin.items() if getattr(network, part) is not None}
        for part, came in origin.items():
            load_strictly(getattr(network, part), _of_part(tensors, came), f"{source}, {came}")
    gain = model.student.cls_head.last_layer.weight_g
    if not gain.requires_grad and not torch.equal(gain, torch.ones_like(gain)):
        raise Mistake(f"{source}: its prototypes have gains of their own; head.unit_prototypes=false goes on with them")

    loss = contents.get("dino_loss") or contents  # published, or ours
    centers = {part: loss[name] for part, names in _CENTERS.items() for name in names if name in loss}
    for part, came in origin.items():
        if came in centers:
            getattr(model, _CENTERS[part][0]).copy_(centers[came].flatten())
    told = [part if part == came else f"{part} (a copy of its {came})" for part, came in origin.items()]
    told += ["centres"] if centers.keys() & origin.values() else []
    new = [part for part in _PARTS if part not in origin and getattr(model.teacher, part) is not None]
    new += [] if centers.keys() & origin.values() else ["centres"]
    return f"begins with {source}: {', '.join(told)}" + (f"; new: {', '.join(new)}" if new else "")


def _refuse_another(network: Any, tensors: Mapping[str, Tensor], about: dict, source: str) -> None:
    """Raises Mistake where tensors are those of a network of other dimensions."""
    own = {"model.heads": network.backbone.heads, **_dimensions(network.state_dict())}
    theirs = {"model.heads": about.get("heads", own["model.heads"]), **_dimensions(tensors)}
    wrong = [f"{what}: {n} there, {own[what]} here" for what, n in theirs.items() if n != own.get(what, n)]
    if (about.get("attention") == "all_query") != (network.backbone.attention == "all_query") and "attention" in about:
        wrong.append(f"reference.attention: {about['attention']} there, {network.backbone.attention} here")
    if wrong:
        raise Mistake(f"{source} does not fit this model ({'; '.join(wrong)})")


def _dimensions(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """What a network's tensors tell of its config."""
    places = {
        "model.width": ("backbone.pos_embed", -1),
        "model.patch": ("backbone.patch_embed.proj.weight", -1),
        "head.hidden": ("cls_head.mlp.0.weight", 0),
        "head.bottleneck": ("cls_head.last_layer.weight_v", 1),
        "head.prototypes": ("cls_head.last_layer.weight_v", 0),
    }
    found = {what: tensors[name].shape[axis] for what, (name, axis) in places.items() if name in tensors}
    if depth := _depth(tensors):
        found["model.depth"] = depth
    if "backbone.pos_embed" in tensors:
        found["patches of the largest view"] = tensors["backbone.pos_embed"].shape[1] - 1
    return found


def weights_seed(seed: int) -> int:
    """The seed of a run's first weights."""
    return int(hash64(seed, "weights") >> 1)
