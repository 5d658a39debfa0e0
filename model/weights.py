"""Weights of other people's making, and of ours: whatever the file, one network's tensors under our names. Strict: a key
that no dialect knows, or one that is missing, is an error that names it.

    ours            backbone.<timm's name>, cls_head.*, reference_head.*
    timm, DINO's    <timm's name>                                  "backbone only" files; a classifier is left out
    DINO            {student, teacher}: [module.]backbone.*, head.*
    DenseDINO       the same with backbone.cls_pos_embed and .patch_pos_embed, ref_head.*
    Leopart         [teacher. | student.]<timm's name>, projection_head.*, prototypes.*  (its heads are left out)
    MoCo-v3         [module.]base_encoder.<timm's name>, momentum_encoder.*, predictor.*  (the first, as published)

`timm:NAME` stands for the weights that timm knows by that name, wherever a file is taken, where NAME is such a ViT.
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

from model.methods import Method, build
from model.vit import ARCHS, ViT
from pipeline.random import hash64
from runtime.checkpoint import latest_valid, open_checkpoint, read_header, read_tensors
from runtime.config import Reference, load_config, parse_config
from runtime.errors import UserError, suggest

TIMM = "timm:"
_LOCAL = "local-dir:"

_BACKBONE = re.compile(
    r"cls_token|pos_embed|cls_pos_embed|patch_pos_embed|patch_embed\.proj\.(weight|bias)|norm\.(weight|bias)"
    r"|blocks\.\d+\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)"
)
_HEAD = re.compile(r"mlp\.\d+\.(weight|bias)|last_layer\.(weight_g|weight_v)")
IGNORED_KEYS = re.compile(
    r"(head|fc_norm)\.(weight|bias)"  # a classifier
    r"|head\.\d+\.(weight|bias|running_mean|running_var|num_batches_tracked)"  # MoCo-v3's projection
    r"|projection_head\.\d+\.(weight|bias)|prototypes\.weight"  # Leopart's
    r"|backbone\.ref_learn_token"  # published, unused: the reference token's content is its position alone
    r"|(cls_head|reference_head|head|ref_head)\.mlp\.\d+\.(running_mean|running_var|num_batches_tracked)"
)
_MOCO = "base_encoder."
_HEADS = {"head": "cls_head", "cls_head": "cls_head", "ref_head": "reference_head", "reference_head": "reference_head"}
_ROLES = ("student", "teacher")
_PARTS = ("backbone", "cls_head", "reference_head")
_CENTERS = {
    "cls_head": ("cls_center", "center"),
    "reference_head": ("reference_center", "ref_center"),
}  # ours, published


def remap_keys(tensors: Mapping[str, Tensor], source: str = "state dict") -> dict[str, Tensor]:
    """One network's tensors in any dialect -> ours. Raises UserError for a key that no dialect knows."""
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
        elif not IGNORED_KEYS.fullmatch(key):
            raise UserError(f"{source}: '{name}' is no name of a ViT or of its projection heads")
    cls, patches = (ours.pop(f"backbone.{part}_pos_embed", None) for part in ("cls", "patch"))
    if (cls is None) != (patches is None):
        raise UserError(f"{source}: cls_pos_embed and patch_pos_embed stand together, one is missing")
    if cls is not None and patches is not None:
        ours["backbone.pos_embed"] = torch.cat([cls, patches], 1)
    return ours


def load_strictly(module: torch.nn.Module, tensors: Mapping[str, Tensor], source: str = "state dict") -> None:
    """Copy tensors into a module's parameters and buffers. Raises UserError that names what is missing, over or misshapen.

    A module on the meta device comes to the CPU for them, after everything is found to fit.
    """
    own = module.state_dict()
    for what, names in (("is missing", own.keys() - tensors.keys()), ("is unknown", tensors.keys() - own.keys())):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(f"{source}: '{min(names)}' {what}{more}")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise UserError(f"{source}: '{name}' has shape {tuple(tensor.shape)}, expected {tuple(own[name].shape)}")
    if any(t.is_meta for t in own.values()):
        module.to_empty(device="cpu")
    module.load_state_dict(dict(tensors))


def read_network(path: str | Path, role: str = "teacher") -> tuple[dict[str, Tensor], dict]:
    """(one network's tensors under our names, what the file tells of itself) of a run, a checkpoint, a file of any
    dialect, or `timm:NAME`.

    Raises UserError where it is none. Nothing is unpickled but tensors and the options published checkpoints carry, and
    nothing takes more memory than the file has bytes.
    """
    contents, about = _read(str(path))
    tensors, more = _network(contents, role, str(path))
    return tensors, about | more


def _read(source: str) -> tuple[dict, dict]:
    """(all that it holds, what it tells of itself) of a run folder (its newest checkpoint), a checkpoint (folder or
    file), a file of any dialect, or `timm:NAME`."""
    if source.startswith(TIMM):
        return _read_timm(source.removeprefix(TIMM))
    path = Path(source)
    found = None
    if path.is_dir():
        is_run = (path / "config.yaml").is_file()
        found = latest_valid(path / "checkpoints" if is_run else path)
        if found is None:
            told = "a run without a checkpoint yet" if is_run else "neither a run nor a folder of checkpoints"
            raise UserError(f"{path}: {told}")
    elif not path.is_file():
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        raise UserError(f"{path}: no such file{suggest(source, map(str, beside))}")
    elif path.name.startswith("checkpoint-") and path.suffix == ".safetensors":
        found = open_checkpoint(path)
    if found:  # a method of somebody's own may have other heads, which are not looked at
        ours = tuple(f"{role}.{part}." for role in _ROLES for part in _PARTS)
        centers = {name for names in _CENTERS.values() for name in names}
        tensors = {n: t for n, t in found.tensors().items() if n.startswith(ours) or n in centers}
        return tensors, _about_config(found.config, str(found.path))
    if path.suffix == ".safetensors":
        metadata = read_header(path).get("__metadata__") or {}
        try:
            about = dict(json.loads(metadata.get("densedino", "{}")))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: what it tells of itself is no JSON object ({error})") from None
        return read_tensors(path), about
    contents = _read_torch(path)
    if not isinstance(contents, dict):
        raise UserError(f"{path}: holds no state dict of a ViT")
    return contents, {}


def _unwrapped(contents: dict) -> dict:
    """Without the covers that trainers put around state dicts."""
    for key in ("state_dict", "model"):
        if isinstance(contents.get(key), dict):
            contents = contents[key]
    return contents


def _holds(contents: dict, role: str) -> bool:
    inside = _unwrapped(contents)
    return isinstance(inside.get(role), dict) or any(str(name).startswith(f"{role}.") for name in inside)


def _network(contents: dict, role: str, source: str) -> tuple[dict[str, Tensor], dict]:
    """(one network's tensors under our names, what their names tell of it) of all that a file holds."""
    tensors = _unwrapped(contents)
    if isinstance(tensors.get(role), dict):
        tensors = tensors[role]
    if not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError(f"{source}: holds no state dict of a {role} or of a ViT")
    odd = [n for n, t in tensors.items() if not isinstance(n, str) or not _is_plain(t)]
    if odd:
        raise UserError(f"{source}: '{odd[0]}' is no plain tensor")
    told = sum({(t.data_ptr(), t.shape): t.numel() * t.element_size() for t in tensors.values()}.values())
    size = Path(source).stat().st_size if Path(source).is_file() else told
    if told > size:  # a pickle may claim any shape for a storage of four bytes
        raise UserError(f"{source}: its tensors would take {told:,} bytes, the file has {size:,}")
    encoder = {n.removeprefix("module."): t for n, t in tensors.items()}
    encoder = {n.removeprefix(_MOCO): t for n, t in encoder.items() if n.startswith(_MOCO)}
    if encoder:
        return remap_keys(encoder, source), {"heads": 12}  # as published, at every width
    return remap_keys(_of_part(tensors, role) or tensors, source), {}


def _is_plain(t: Tensor) -> bool:
    return t.layout == torch.strided and t.device.type == "cpu"


def _read_torch(path: Path) -> object:
    """What torch.save wrote, if it is harmless. Raises UserError otherwise."""
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
        told = next((line for line in str(error).splitlines() if " " in line), "no file of torch's or of safetensors")
        raise UserError(f"{path}: not weights that can be read safely ({told})") from None


def _of_part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {n.removeprefix(f"{part}."): t for n, t in tensors.items() if n.startswith(f"{part}.")}


def _depth(tensors: Mapping[str, Tensor]) -> int:
    """Blocks that there are; a number in a name, which may be any, is not believed."""
    return len({n.split(".")[2] for n in tensors if n.startswith("backbone.blocks.")})


def _from_tensors(tensors: dict[str, Tensor], about: dict, source: str) -> ViT:
    """A ViT of the dimensions that its tensors have; heads of 64 dimensions (DeiT's) where the file does not tell."""
    backbone = _of_part(tensors, "backbone")
    for name, axes in {"pos_embed": 3, "patch_embed.proj.weight": 4}.items():
        if name not in backbone:
            raise UserError(f"{source}: '{name}' is missing")
        if backbone[name].ndim != axes or not backbone[name].numel():
            raise UserError(f"{source}: '{name}' has shape {tuple(backbone[name].shape)}, expected {axes} axes")
    width, patch = backbone["pos_embed"].shape[-1], backbone["patch_embed.proj.weight"].shape[-1]
    positions = backbone["pos_embed"].shape[1]
    side = math.isqrt(max(1, positions - 1))
    if 1 + side * side != positions:
        raise UserError(f"{source}: {positions} positions are not one of [CLS] and a square of patches")
    heads = about.get("heads", max(1, width // 64))
    if not isinstance(heads, int) or not 1 <= heads <= width or width % heads:
        raise UserError(f"{source}: {heads!r} heads do not share a width of {width}")
    chosen = {}
    for what, default in {"attention": "patches+self", "border": "zeros"}.items():
        known = get_args(get_type_hints(Reference)[what])
        chosen[what] = about.get(what, default)
        if chosen[what] not in known:
            raise UserError(f"{source}: {what}: one of {', '.join(known)}{suggest(chosen[what], known)}")
    with torch.device("meta"):  # nothing is allocated before every shape is known to fit
        vit = ViT(
            width=width,
            depth=_depth(tensors),
            heads=heads,
            patch=patch,
            image_size=side * patch,
            **chosen,
        )
    load_strictly(vit, backbone, source)
    return vit


def _read_timm(name: str) -> tuple[dict, dict]:
    """timm's pretrained ViT, from timm's cache, the network or a folder (local-dir:PATH); it takes pictures normalized as
    ours are.

    Raises UserError where timm knows no such model, it is no plain pre-norm ViT with [CLS], or its weights are out of reach.
    """
    known = timm.list_models("vit_*", pretrained=True)
    local = name.startswith(_LOCAL)
    if local and not (Path(name.removeprefix(_LOCAL)) / "config.json").is_file():
        raise UserError(f"timm:{name}: no folder of timm's hub format (no config.json)")
    if not local and not timm.is_model(name):
        raise UserError(f"timm:{name}: timm has no such model{suggest(name, known)}")
    if not local and not timm.models.is_model_pretrained(name):
        raise UserError(f"timm:{name}: timm has no weights for it{suggest(name, known)}")
    try:
        with torch.device("meta"):
            plan: Any = timm.create_model(name, num_classes=0)
    except Exception as error:  # whatever a folder's config.json asks for
        raise UserError(f"timm:{name}: timm cannot make it ({' '.join(str(error).split())[:200]})") from None
    if why := _other_than_plain(plan):
        raise UserError(f"timm:{name}: no plain pre-norm ViT with [CLS]: {why}")
    try:
        theirs: Any = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # whatever the hub's client raises without a network
        told = " ".join(str(error).split())[:200]
        raise UserError(
            f"timm:{name}: its weights are not here and cannot be fetched ({told}); a file of them does as well"
        ) from None
    tensors = {f"backbone.{n}": t for n, t in theirs.state_dict().items()}
    # their colors, (p - mean) / std, from ours: a map of each channel, which the patch filter takes in
    about = theirs.pretrained_cfg
    mean, std = (torch.tensor(about[key], dtype=torch.float64) for key in ("mean", "std"))
    ours_mean, ours_std = (torch.tensor(c, dtype=torch.float64) for c in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    weight, bias = (tensors[f"backbone.patch_embed.proj.{part}"].double() for part in ("weight", "bias"))
    tensors["backbone.patch_embed.proj.weight"] = (weight * (ours_std / std).view(1, 3, 1, 1)).float()
    shift = (weight * ((ours_mean - mean) / std).view(1, 3, 1, 1)).sum((1, 2, 3))
    tensors["backbone.patch_embed.proj.bias"] = (bias + shift).float()
    return tensors, {"heads": theirs.blocks[0].attn.num_heads}


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
    file, weights of timm, DINO, DenseDINO, Leopart or MoCo-v3, or timm:NAME. Raises UserError where there is none.
    """
    if untrained and (Path(path) / "config.yaml").is_file():
        config = load_config(Path(path) / "config.yaml")
        torch.manual_seed(weights_seed(config.seed))
        model = build(config)
        if config.model.init:
            load_pretrained(model, config.model.init)
        return model.backbone.eval()
    tensors, about = read_network(path)
    return _from_tensors(tensors, about, str(path)).eval()


def load_pretrained(model: Method, source: str) -> str:
    """Begin with weights that others made, of any dialect; returns one line: what came from there, and what did not.

    The backbone is taken for student and teacher (each its own, where the file holds both), and so are the heads that are
    there, with their centers. A head of [CLS] serves points too where the file has none for them, as the published
    --finetune does it. What the file lacks stays new. Raises UserError, with the difference, where it is another network's.
    """
    contents, about = _read(source)
    roles = [role for role in _ROLES if _holds(contents, role)] or ["teacher"]
    origin: dict[str, str] = {}
    for role in _ROLES:
        network: Any = getattr(model, role)
        tensors, more = _network(contents, role if role in roles else roles[0], source)
        check_compatible(network, tensors, about | more, source)
        origin = {part: part for part in _PARTS if part == "backbone" or _of_part(tensors, part)}
        if "cls_head" in origin:
            origin.setdefault("reference_head", "cls_head")
        origin = {part: came for part, came in origin.items() if getattr(network, part, None) is not None}
        for part, came in origin.items():
            load_strictly(getattr(network, part), _of_part(tensors, came), f"{source}, {came}")
    student: Any = model.student
    gain = student.cls_head.last_layer.weight_g
    if not gain.requires_grad and not torch.equal(gain, torch.ones_like(gain)):
        raise UserError(
            f"{source}: its prototypes have gains of their own; head.norm_last_layer=false goes on with them"
        )

    loss = contents["dino_loss"] if isinstance(contents.get("dino_loss"), dict) else contents  # published, or ours
    centers = {part: loss[name] for part, names in _CENTERS.items() for name in names if name in loss}
    for part, came in origin.items():
        if came in centers:
            own, center = getattr(model, _CENTERS[part][0]), centers[came]
            if not isinstance(center, Tensor) or not _is_plain(center) or center.numel() != own.numel():
                raise UserError(f"{source}: its center of {came} is no tensor of {own.numel()} prototypes")
            own.copy_(center.flatten())
    told = [part if part == came else f"{part} (a copy of its {came})" for part, came in origin.items()]
    told += ["centers"] if centers.keys() & origin.values() else []
    new = [part for part in _PARTS if part not in origin and getattr(model.teacher, part, None) is not None]
    new += [] if centers.keys() & origin.values() else ["centers"]
    return f"begins with {source}: {', '.join(told)}" + (f"; new: {', '.join(new)}" if new else "")


def check_compatible(network: Any, tensors: Mapping[str, Tensor], about: dict, source: str) -> None:
    """Raises UserError where tensors are those of a network of other dimensions."""
    own = {"model.heads": network.backbone.heads, **_dimensions(network.state_dict())}
    theirs = {"model.heads": about.get("heads", own["model.heads"]), **_dimensions(tensors)}
    wrong = [f"{what}: {n} there, {own[what]} here" for what, n in theirs.items() if n != own.get(what, n)]
    if (about.get("attention") == "all_query") != (network.backbone.attention == "all_query") and "attention" in about:
        wrong.append(f"reference.attention: {about['attention']} there, {network.backbone.attention} here")
    if wrong:
        raise UserError(f"{source} does not fit this model ({'; '.join(wrong)})")


def _dimensions(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """What a network's tensors tell of its config."""
    places = {
        "model.width": ("backbone.pos_embed", -1),
        "model.patch": ("backbone.patch_embed.proj.weight", -1),
        "head.hidden": ("cls_head.mlp.0.weight", 0),
        "head.bottleneck": ("cls_head.last_layer.weight_v", 1),
        "head.prototypes": ("cls_head.last_layer.weight_v", 0),
    }
    found = {
        what: tensors[name].shape[axis]
        for what, (name, axis) in places.items()
        if name in tensors and tensors[name].ndim > axis >= -tensors[name].ndim
    }
    if depth := _depth(tensors):
        found["model.depth"] = depth
    if "backbone.pos_embed" in tensors and tensors["backbone.pos_embed"].ndim == 3:
        found["patches of the largest view"] = tensors["backbone.pos_embed"].shape[1] - 1
    return found


def weights_seed(seed: int) -> int:
    """The seed of a run's first weights."""
    return int(hash64(seed, "weights") >> 1)
