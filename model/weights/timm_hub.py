"""timm and us: `timm:NAME`, the pretrained weights that timm knows by this name, if they are those of a ViT with [CLS] and
learned positions; and the call of timm that loads a backbone of ours."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch

from model.architecture import ARCHS, ROTARY, Architecture, described, of_timm, refusal
from model.rotary import Rotary
from model.vit import ViT
from runtime.errors import UserError, suggest
from runtime.pixels import IMAGENET, Pixels

_LOCAL = "local-dir:"
HUB_TIMEOUT = 5  # seconds


def read_timm(name: str) -> tuple[dict, dict]:
    """(backbone tensors with our names, metadata) of timm's pretrained ViT.

    Raises UserError as `check_timm` and `_pretrained`, and for a ViT with rotary positions.
    """
    check_timm(name)
    theirs = _pretrained(name)
    if reason := refusal(theirs):
        raise UserError(f"timm:{name} can be evaluated, but not trained: {reason}")
    named = "" if name.startswith(_LOCAL) else name.partition(".")[0]
    tensors = {f"backbone.{n}": t for n, t in theirs.state_dict().items()}
    return tensors, described(theirs, named).not_in_tensors() | _pixels(theirs)._asdict()


def rotary_of_timm(name: str) -> Rotary | None:
    """timm's pretrained ViT if its positions are rotary, else None. Raises UserError as `check_timm`."""
    check_timm(name)
    if refusal(_empty(name)) != ROTARY:
        return None
    theirs = _pretrained(name, dynamic_img_size=True)
    return Rotary(theirs, _pixels(theirs))


def _pixels(theirs: Any) -> Pixels:
    return Pixels(*(tuple(theirs.pretrained_cfg[name]) for name in ("mean", "std")))


def _pretrained(name: str, **options: Any) -> Any:
    """timm's pretrained model, from timm's cache, the network or a folder (local-dir:PATH). Raises UserError
    if the weights cannot be fetched."""
    try:
        return timm.create_model(name, pretrained=True, num_classes=0, **options)
    except Exception as error:  # the hub's client raises many types without a network
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"timm:{name}: its weights are not cached and cannot be downloaded ({reason}); "
            "download the file elsewhere and give its path instead"
        ) from None


def check_timm(name: str) -> None:
    """Raises UserError, in seconds, if timm knows no such pretrained model, if it is neither one of our ViTs nor one with
    rotary positions, or if its weights are not in the hub's cache and the hub does not answer (its client would try again
    for a minute)."""
    known = timm.list_models("vit_*", pretrained=True)
    local = name.startswith(_LOCAL)
    if local and not (Path(name.removeprefix(_LOCAL)) / "config.json").is_file():
        raise UserError(f"timm:{name}: not a folder in timm's hub format (config.json is missing)")
    if not local and not timm.is_model(name):
        raise UserError(f"timm:{name}: timm has no such model{suggest(name, known)}")
    if not local and not timm.models.is_model_pretrained(name):
        raise UserError(f"timm:{name}: timm has no pretrained weights for it{suggest(name, known)}")
    if (reason := refusal(_empty(name))) and reason != ROTARY:
        raise UserError(f"timm:{name}: not a ViT with [CLS] and learned positions: {reason}")
    pretrained = None if local else timm.models.get_pretrained_cfg(name)
    if pretrained is None or not pretrained.hf_hub_id or _is_cached(str(pretrained.hf_hub_id)):
        return
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception as error:  # the client's own types, of several packages
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"timm:{name}: its weights are not in the cache ({huggingface_hub.constants.HF_HUB_CACHE}) and "
            f"{huggingface_hub.constants.ENDPOINT} does not answer ({reason}); run the same command with a "
            "network connection, or download the file elsewhere and give its path instead"
        ) from None


def _empty(name: str) -> Any:
    """timm's model without weights."""
    try:
        with torch.device("meta"):
            return timm.create_model(name, num_classes=0)
    except Exception as error:  # a folder's config.json may contain anything
        raise UserError(f"timm:{name}: timm cannot build it ({' '.join(str(error).split())[:200]})") from None


def _is_cached(hub: str) -> bool:
    """Whether the hub's cache holds weights of this repository."""
    files = ("model.safetensors", "pytorch_model.bin")
    return any(isinstance(huggingface_hub.try_to_load_from_cache(hub, file), str) for file in files)


def timm_model(vit: ViT) -> tuple[str, dict[str, Any]]:
    """(timm's name, its further arguments) of a backbone."""
    ours = vit.architecture
    name = ours.name or _nearest_name(ours)
    theirs, image_size = of_timm(name)
    arguments = {"img_size": vit.image_size} if vit.image_size != image_size else {}
    own, known = ours.for_timm(), theirs.for_timm()
    return name, {key: value for key, value in own.items() if value != known[key]} | arguments


def _nearest_name(ours: Architecture) -> str:
    """A model of timm that differs from ours in plain arguments only: it has the same module of the MLP and eps."""
    if ours.swiglu:
        return "vit_giant_patch14_dinov2"
    if ours.eps != 1e-6:
        return "vit_base_patch16_clip_224"
    dimensions = (ours.width, ours.depth, ours.heads)
    names = [name for name, known in ARCHS.items() if known == dimensions]
    return f"{names[0] if names else 'vit_tiny'}_patch16_224"


def timm_call(vit: ViT, path: Path) -> str:
    """The call of timm, as Python, that loads a backbone's file."""
    name, arguments = timm_model(vit)
    keywords = "".join(f", {key}={value!r}" for key, value in arguments.items())
    return f'timm.create_model("{name}", num_classes=0{keywords}, checkpoint_path={_literal(path)})'


def loading_lines(vit: ViT, path: Path) -> list[str]:
    """The lines of Python that load a backbone's file: with timm alone, or with this repository if a plain ViT would have
    other features."""
    if vit.attention == "all_query":  # its patches never attend to [CLS], those of a plain ViT do
        return ["from model.weights import load_backbone", f"vit = load_backbone({_literal(path)})"]
    mean, std = map(list, vit.pixels)
    takes = [f"# vit takes (x - {mean}) / {std}, x from 0 to 1: not ImageNet's"] if vit.pixels != IMAGENET else []
    return ["import timm", f"vit = {timm_call(vit, path)}", *takes]


def _literal(path: Path) -> str:
    """A path as a string of Python, in double quotes."""
    return json.dumps(str(path), ensure_ascii=False)
