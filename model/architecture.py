"""Which ViT: from a config, from a name of timm, or from the tensors of a file. All become one `Architecture`.

Letters: N patches, D width, R registers.
"""

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import timm
import torch
from timm.layers import Attention, LayerNorm, Mlp, PatchEmbed, SwiGLUPacked
from timm.models import is_model_in_modules
from timm.models.eva import Eva
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from runtime.config import ARCH, Model
from runtime.errors import UserError, suggest

ARCHS = {"vit_tiny": (192, 12, 3), "vit_small": (384, 12, 6), "vit_base": (768, 12, 12)}  # width, depth, heads
HEADS = {1280: 16, 1408: 16, 1664: 16}  # of the widths whose heads are not of 64 dimensions: timm's ViT-H, -g and -G
ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu"}  # class: timm's name
LAYER_SCALE = 1e-5  # what LayerScale starts from (DINOv2)
ROTARY = "its positions are rotary: there is no grid of learned ones that a point could be read from"
NOT_IN_TENSORS = ("heads", "class_position", "activation", "eps", "name")


@dataclass(frozen=True)
class Architecture:
    """A ViT of timm's VisionTransformer with [CLS] and learned positions, but for the size of its images."""

    width: int  # D
    depth: int
    heads: int
    patch: int
    channels: int = 3
    hidden: int = 0  # width of the MLP's first linear map; 0: 4 D
    swiglu: bool = False
    activation: str = "gelu"  # timm's name
    registers: int = 0  # R
    class_position: bool = True  # whether [CLS] and registers have positions of their own (timm: not no_embed_class)
    layer_scale: bool = False
    pre_norm: bool = False  # a norm before the first block, and no bias of the patch filter (CLIP)
    qkv_bias: bool = True
    qk_norm: bool = False
    scale_norms: bool = False  # norms in front of the last linear map of attention and MLP (BEiT-3)
    eps: float = 1e-6  # of all norms
    name: str = ""  # timm's, if it came from one

    @property
    def prefix(self) -> int:
        """Tokens in front of the patches: [CLS] and the registers."""
        return 1 + self.registers

    def for_timm(self) -> dict[str, Any]:
        """timm's own arguments, but for the module of the MLP and the norms' eps, which are no plain values. None of
        them is None, which timm.create_model would leave out."""
        hidden = self.hidden or 4 * self.width
        return {
            "embed_dim": self.width, "depth": self.depth, "num_heads": self.heads, "patch_size": self.patch,
            "in_chans": self.channels, "act_layer": self.activation,
            # timm takes int(D * ratio), which must not be one less than `hidden`
            "mlp_ratio": hidden / self.width if hidden % self.width == 0 else (hidden + 0.5) / self.width,
            "reg_tokens": self.registers, "no_embed_class": not self.class_position, "pre_norm": self.pre_norm,
            "init_values": LAYER_SCALE * self.layer_scale, "qkv_bias": self.qkv_bias, "qk_norm": self.qk_norm,
            "scale_attn_norm": self.scale_norms, "scale_mlp_norm": self.scale_norms,
        }  # fmt: skip

    def modules(self) -> dict[str, Any]:
        """The modules that `for_timm` leaves out, as timm's arguments."""
        norm = {} if self.eps == 1e-6 else {"norm_layer": functools.partial(LayerNorm, eps=self.eps)}
        return {"mlp_layer": SwiGLUPacked if self.swiglu else Mlp} | norm

    def not_in_tensors(self) -> dict[str, Any]:
        """What the shapes of its tensors do not tell: `heads`, and what is not the default. With registers, a small grid may
        be read in two ways, so `class_position` is among them."""
        default = {f.name: f.default for f in fields(self)} | ({"class_position": None} if self.registers else {})
        return {n: value for n in NOT_IN_TENSORS if (value := getattr(self, n)) != default[n]}


def architecture(model: Model) -> Architecture:
    """The ViT of a config's `model` section. Raises UserError if timm has no such ViT, or it cannot be trained here."""
    given = {n: value for n in ("width", "depth", "heads") if (value := getattr(model, n)) is not None}
    own: dict[str, Any] = {}
    if model.arch in ARCHS:
        own = dict(zip(("width", "depth", "heads"), ARCHS[model.arch], strict=True))
    elif model.arch != "custom":
        own = asdict(of_timm(model.arch)[0])
        if "width" in given:  # the MLP in proportion
            own["hidden"] = own["hidden"] * given["width"] // own["width"]
    found = Architecture(**own | {"patch": model.patch} | given)
    if found.width % found.heads:
        raise UserError(f"model.width: {found.width} is not divisible by model.heads: {found.heads} ({model.arch})")
    return found


@functools.cache
def of_timm(name: str) -> tuple[Architecture, int]:
    """(the ViT that timm has under a name, side of its images). No weights are made.

    Raises UserError if timm has none, or if it is not one of ours.
    """
    if not timm.is_model(name):
        known = [n for n in timm.list_models() if ARCH.fullmatch(n)]
        raise UserError(f"model.arch: timm has no model '{name}'{suggest(name, known)}")
    # drawing weights takes seconds, even where there are none
    skip: dict[str, Any] = {"weight_init": "skip"} if is_model_in_modules(name, ("vision_transformer", "deit")) else {}
    with torch.device("meta"):
        theirs: Any = timm.create_model(name, num_classes=0, **skip)
        if type(theirs) is VisionTransformer and theirs.cls_token is not None and theirs.global_pool != "token":
            skip["global_pool"] = "token"  # then its last norm is that of all tokens
            theirs = timm.create_model(name, num_classes=0, **skip)
    if reason := refusal(theirs):
        raise UserError(f"model.arch: {name} cannot be trained here: {reason}")
    return described(theirs, name), theirs.patch_embed.img_size[0]


def refusal(theirs: nn.Module) -> str | None:
    """Why a model of timm is not one of our ViTs; None if ours computes the same."""
    model: Any = theirs
    if isinstance(model, Eva):
        return ROTARY
    if type(model) is not VisionTransformer:
        return f"it is a {type(model).__name__}, not a VisionTransformer with learned positions"
    if model.cls_token is None:
        return "it has no [CLS]"
    if model.pos_embed is None:
        return "it has no learned positions"
    grid, block = model.patch_embed.grid_size, model.blocks[0]
    if type(model.patch_embed) is not PatchEmbed:
        return f"its patches come from a {type(model.patch_embed).__name__}"
    if grid[0] != grid[1]:
        return "its position grid is not square"
    if type(block) is not Block or type(block.attn) is not Attention:  # the others are as the first
        return f"its blocks are {type(block).__name__} with {type(getattr(block, 'attn', None)).__name__}"
    if not isinstance(model.norm, nn.LayerNorm):
        return "its tokens have no last LayerNorm"
    if type(block.mlp.act).__name__ not in ACTIVATIONS:
        return f"its activation is {block.mlp.act}"
    ours = replace(described(model), depth=1)
    with torch.device("meta"):
        image_size = model.patch_embed.img_size[0]
        again = VisionTransformer(
            img_size=image_size, num_classes=0, weight_init="skip", **ours.for_timm(), **ours.modules()
        )
    later = re.compile(r"head\.|blocks\.[1-9]")
    a, b = ({n: t.shape for n, t in m.state_dict().items() if not later.match(n)} for m in (model, again))
    different = sorted(n for n in a | b if a.get(n) != b.get(n))
    return f"'{different[0]}' is not that of a ViT" if different else None


def described(theirs: nn.Module, name: str = "") -> Architecture:
    """The architecture of a ViT of timm that `refusal` has nothing against."""
    model: Any = theirs
    block = model.blocks[0]
    about = {
        "heads": block.attn.num_heads, "class_position": not model.no_embed_class, "eps": model.norm.eps,
        "activation": ACTIVATIONS[type(block.mlp.act).__name__], "name": name,
    }  # fmt: skip
    options = vit_options(model.state_dict(), about, name)
    del options["image_size"]
    return Architecture(**options)


def vit_options(
    tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None, source: str = "state dict"
) -> dict[str, Any]:
    """The arguments of `ViT` that a backbone's tensors, with timm's names, have: `image_size` and those of `Architecture`.

    about: what they do not tell (`Architecture.not_in_tensors`), from a file's metadata, unchecked. Without it, heads have
    64 dimensions (DeiT's). Raises UserError if the tensors are no ViT's, or if `about` cannot be true.
    """
    about = about or {}
    for name, axes in {"pos_embed": 3, "patch_embed.proj.weight": 4}.items():
        if name not in tensors:
            raise UserError(f"{source}: '{name}' is missing")
        if tensors[name].ndim != axes or not tensors[name].numel():
            raise UserError(f"{source}: '{name}' has shape {tuple(tensors[name].shape)}, expected {axes} axes")
    positions, width = tensors["pos_embed"].shape[1:]
    _, channels, _, patch = tensors["patch_embed.proj.weight"].shape
    first, second = (_shape(tensors, f"blocks.0.mlp.{part}.weight") for part in ("fc1", "fc2"))
    registers = _shape(tensors, "reg_token", axes=3)[1]
    class_position, side = _grid(positions, registers, about.get("class_position"), source)
    swiglu = 0 < first[0] == 2 * second[1]
    return {
        "width": width, "depth": count_blocks(tensors), "heads": _heads(width, about, source), "patch": patch,
        "channels": channels, "image_size": side * patch, "hidden": first[0], "swiglu": swiglu, "registers": registers,
        "class_position": class_position, "layer_scale": "blocks.0.ls1.gamma" in tensors,
        "pre_norm": "norm_pre.weight" in tensors, "qkv_bias": "blocks.0.attn.qkv.bias" in tensors or not first[0],
        "qk_norm": "blocks.0.attn.q_norm.weight" in tensors, "scale_norms": "blocks.0.attn.norm.weight" in tensors,
        **_checked(about, swiglu, source),
    }  # fmt: skip


def count_blocks(tensors: Mapping[str, Tensor], prefix: str = "") -> int:
    """The number of different blocks of a ViT; an index in a name is not trusted, it may be any number."""
    blocks = f"{prefix}blocks."
    return len({n.removeprefix(blocks).partition(".")[0] for n in tensors if n.startswith(blocks)})


def _shape(tensors: Mapping[str, Tensor], name: str, axes: int = 2) -> tuple[int, ...]:
    """A tensor's shape; zeros if there is none, or if it has other axes (`load_strictly` names it)."""
    shape = tuple(tensors[name].shape) if name in tensors else ()
    return shape if len(shape) == axes else (0,) * axes


def _grid(positions: int, registers: int, class_position: object, source: str) -> tuple[bool, int]:
    """(whether [CLS] and registers have positions, side of the patches' grid). Small grids may fit both: then
    `class_position` decides, and without it they have none."""
    sides = {own: math.isqrt(max(0, positions - own * (1 + registers))) for own in (False, True)}
    fitting = {own: side for own, side in sides.items() if side and own * (1 + registers) + side * side == positions}
    if not fitting:
        prefix = f"[CLS] and {registers} registers" if registers else "[CLS]"
        raise UserError(
            f"{source}: {positions} positions, expected {1 + registers} for {prefix} (or none) and a square number for the "
            "patches"
        )
    own = class_position if isinstance(class_position, bool) and class_position in fitting else min(fitting)
    return own, fitting[own]


def _heads(width: int, about: Mapping[str, Any], source: str) -> int:
    heads = about.get("heads", HEADS.get(width, max(1, width // 64)))
    if not isinstance(heads, int) or not 1 <= heads <= width or width % heads:
        raise UserError(f"{source}: a width of {width} is not divisible by {heads!r} heads")
    return heads


def _checked(about: Mapping[str, Any], swiglu: bool, source: str) -> dict[str, Any]:
    """Those of a file's metadata that any JSON value may be."""
    known = tuple(ACTIVATIONS.values())
    activation, eps = about.get("activation", "silu" if swiglu else "gelu"), about.get("eps", 1e-6)
    if activation not in known:
        raise UserError(f"{source}: activation: one of {', '.join(known)}{suggest(activation, known)}")
    if not isinstance(eps, float) or not 0 < eps < 1:
        raise UserError(f"{source}: eps: expected a number between 0 and 1, found {eps!r}")
    name = about.get("name", "")
    if not isinstance(name, str):
        raise UserError(f"{source}: name: expected a text, found {name!r}")
    return {"activation": activation, "eps": eps, "name": name}
