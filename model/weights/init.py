"""Networks from weights: the backbone of anything that contains one, and a method that starts from pretrained weights."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from model.architecture import ARCHS, Architecture, architecture, vit_options
from model.backbone import Backbone
from model.methods import Method, build
from model.resnet import IMAGE_SIZE, STRIDE, ResNet
from model.vit import ViT
from model.weights.fit import BIAS, FILTERS, fit, fit_channels
from model.weights.names import CENTERS, PARTS, is_resnet, load_strictly, select_part
from model.weights.pixels import different, pixels_of, take_pixels
from model.weights.read import is_plain, read_file, select_network
from model.weights.timm_hub import read_timm, rotary_of_timm
from pipeline.random import hash64
from runtime.config import ARCHS_OF_TIMM, LOCALITY, TIMM, Config, Reference, load_config, patch_of
from runtime.errors import UserError, suggest
from runtime.pixels import usual

CHANNELS = (1, 3)  # that evaluations can make of a photo


def load_backbone(path: str | Path, untrained: bool = False) -> Backbone:
    """The backbone (the teacher's, if there is a teacher; of a checkpoint of ours the one that its method evaluates) of

    a run folder (its newest checkpoint; untrained: the network that the run started with), a checkpoint of ours, a backbone
    file, weights in any format of names.py, or timm:NAME. A ViT; a ResNet if these are the
    weights of one. It is in eval mode. Raises UserError if there is none.
    """
    if untrained and (Path(path) / "config.yaml").is_file():
        config = load_config(Path(path) / "config.yaml")
        torch.manual_seed(weights_seed(config.seed))
        method = build(config)
        if config.model.init:
            load_pretrained(method, config.model.init)
        return method.backbone.eval()
    if str(path).startswith(TIMM) and (rotary := rotary_of_timm(str(path).removeprefix(TIMM))):
        return rotary.eval()
    tensors, about = read_network(path)
    source, notes = about.get("label", str(path)), []
    filters = tensors.get(FILTERS)
    channels = filters.shape[1] if filters is not None and filters.ndim == 4 and filters.numel() else 3
    own = pixels_of(about, channels, source)
    if filters is not None and channels not in CHANNELS:
        own, (tensors[FILTERS], note) = None, fit_channels(filters, 3)
        notes.append(note)
    from_tensors = _resnet_from_tensors if is_resnet(tensors) else _vit_from_tensors
    network = from_tensors(select_part(tensors, "backbone"), about, source)
    network.pixels = own or usual(channels if channels in CHANNELS else 3)
    if "attention" not in about and different(network.pixels, usual(network.pixels.channels)):
        notes.append(f"its pixels have the mean {list(network.pixels.mean)} and std {list(network.pixels.std)}")
    if about.get("unused"):
        notes.append(f"not used of this file: {_listed(about['unused'])}")
    if notes:
        network.note = f"{source}: a {type(network).__name__}; {'; '.join(notes)}"
    return network.eval()


def _listed(names: Iterable[str]) -> str:
    """The parts of a network that tensors are of, each with how many."""
    parts = Counter(name.partition(".")[0] for name in names)
    return ", ".join(f"{part} ({n} tensors)" if n > 1 else part for part, n in parts.items())


def read_network(path: str | Path, role: str | None = None) -> tuple[dict[str, Tensor], dict]:
    """(one network's tensors with our names, metadata) of a run, a checkpoint, a file in any checkpoint format, or
    `timm:NAME`.

    role: by default the one that the method of a checkpoint of ours evaluates, else the teacher. The other role's network if
    there is only that. Raises UserError if there is none, or it cannot be read safely.
    """
    contents, about = _read(str(path))
    role = role or ("student" if about.get("role") == "student" else "teacher")
    tensors, more = select_network(contents, role, str(path))
    return tensors, about | more


def _read(source: str) -> tuple[dict, dict]:
    """(all contents, metadata) of a path or `timm:NAME`."""
    return read_timm(source.removeprefix(TIMM)) if source.startswith(TIMM) else read_file(source)


def _resnet_from_tensors(backbone: dict[str, Tensor], about: dict, source: str) -> Backbone:
    """A ResNet of as many blocks as its tensors have, and of their channels."""
    layers, channels = [], []
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        layers.append(len({name.split(".")[1] for name in backbone if name.startswith(f"{stage}.")}))
        expanding = backbone.get(f"{stage}.0.conv3.weight")  # [4 times the channels,channels,1,1]
        if expanding is None or expanding.ndim != 4 or not expanding.numel():
            raise UserError(
                f"{source}: '{stage}.0.conv3.weight' is missing, or no filter: only ResNets of bottlenecks can be loaded, "
                "ResNet-50 and deeper"
            )
        channels.append(expanding.shape[1])
    size = about.get("image_size", IMAGE_SIZE)
    if not isinstance(size, int) or size < STRIDE or size % STRIDE:
        raise UserError(f"{source}: image_size: expected a multiple of {STRIDE}, found {size!r}")
    with torch.device("meta"):  # nothing is allocated before all shapes have been checked
        resnet = ResNet(tuple(layers), tuple(channels), size)
    load_strictly(resnet, backbone, source)
    return resnet


def _vit_from_tensors(backbone: dict[str, Tensor], about: dict, source: str) -> Backbone:
    """A ViT of the options that its tensors have, and `about` for what they do not tell."""
    if not backbone:
        raise UserError(f"{source}: contains no backbone")
    options = vit_options(backbone, about, source)
    for name, default in {"attention": "patches+self", "border": "zeros"}.items():
        known = get_args(get_type_hints(Reference)[name])
        options[name] = about.get(name, default)
        if options[name] not in known:
            raise UserError(f"{source}: {name}: one of {', '.join(known)}{suggest(options[name], known)}")
    locality = options["locality"] = about.get("locality")
    low, high = LOCALITY
    if locality is not None and not (isinstance(locality, int | float) and low <= locality <= high):
        raise UserError(f"{source}: locality: expected a number from {low:g} to {high:g} or null, found {locality!r}")
    with torch.device("meta"):  # nothing is allocated before all shapes have been checked
        vit = ViT(**options)
    load_strictly(vit, backbone, source)
    return vit


def about_backbone(vit: ViT, steps: int, method: str) -> dict:
    """The metadata of a backbone file."""
    return vit.about() | {"steps": steps, "method": method}


def load_pretrained(method: Method, source: str) -> str:
    """Load weights into a new method from a file in any checkpoint format, a checkpoint, a run or timm:NAME.

    Each of the method's networks gets the backbone of its role if the file has one, else the other role's; and the heads of
    the file, with their centers. If the file has no head for reference tokens, they get a copy of the [CLS] head, as the
    published --finetune does. Parts that the file lacks stay as initialized.
    Returns one line for the log: what was loaded and what was not. Raises UserError, with the differences, if the file is of
    another network.
    """
    contents, about = _read(source)
    loaded: dict[str, str] = {}  # our part: the file's part
    new: list[str] = []
    label, changed, unused = source, "", dict[str, None]()
    for role, module in method.networks().items():
        network: Any = module
        tensors, more = select_network(contents, role, source)
        label = more["label"]
        unused |= dict.fromkeys(more["unused"])
        check_compatible(network, tensors, about | more, label)
        grid = network.backbone.image_size // network.backbone.patch
        theirs = pixels_of(about | more, tensors[FILTERS].shape[1], label)
        tensors, lines = fit(tensors, network.state_dict(), grid)
        filters, bias, more_lines = take_pixels(
            tensors[FILTERS], tensors.get(BIAS), theirs, network.backbone.pixels, label
        )
        tensors |= {FILTERS: filters} | ({} if bias is None else {BIAS: bias})
        changed = ", ".join(lines + more_lines)
        in_file = {part: part for part in PARTS if part == "backbone" or select_part(tensors, part)}
        if "cls_head" in in_file:
            in_file.setdefault("reference_head", "cls_head")
        loaded = {part: origin for part, origin in in_file.items() if getattr(network, part, None) is not None}
        for part, origin in loaded.items():
            load_strictly(getattr(network, part), select_part(tensors, origin), f"{label}, {origin}")
        new += [name for name, _ in network.named_children() if name not in loaded and name not in new]
    _check_gains(method, label)

    centers = _centers(contents)
    with_center = [part for part, origin in loaded.items() if origin in centers and hasattr(method, CENTERS[part][0])]
    for part in with_center:
        own, center = getattr(method, CENTERS[part][0]), centers[loaded[part]]
        if not isinstance(center, Tensor) or not is_plain(center) or center.numel() != own.numel():
            raise UserError(f"{label}: its center of {loaded[part]} is not a tensor of {own.numel()} elements")
        own.copy_(center.flatten())
    parts = [part if part == origin else f"{part} (a copy of its {origin})" for part, origin in loaded.items()]
    if with_center:
        parts.append("centers")
    elif any(hasattr(method, own) for own, _ in CENTERS.values()):
        new.append("centers")
    more = {"new: ": ", ".join(new), "": changed, "not used: ": _listed(unused)}
    return "; ".join([f"initialized from {label}: {', '.join(parts)}", *(f"{a}{b}" for a, b in more.items() if b)])


def _centers(contents: dict) -> dict[str, Any]:
    """The center of each head in a file's contents, published or ours."""
    where = contents["dino_loss"] if isinstance(contents.get("dino_loss"), dict) else contents
    return {part: where[name] for part, names in CENTERS.items() for name in names if name in where}


def _check_gains(method: Method, source: str) -> None:
    """Raises UserError if prototypes that are configured with fixed gains of 1 were loaded with others."""
    student: Any = method.student
    if getattr(student, "cls_head", None) is None:
        return
    gain = student.cls_head.last_layer.weight_g
    if not gain.requires_grad and not torch.equal(gain, torch.ones_like(gain)):
        raise UserError(f"{source}: its prototypes have learned gains; set head.norm_last_layer=false to load them")


def check_compatible(network: Any, tensors: Mapping[str, Tensor], about: dict, source: str) -> None:
    """Raises UserError if the tensors are those of another kind of network, or of other dimensions. Another position grid,
    patch size or number of channels is no reason: `fit` resamples it."""
    wrong = []
    for name, (saved, current) in _differences(network.backbone.architecture, tensors, about, source).items():
        key = f"model.{name}" if name in ("width", "depth", "heads") else name
        wrong.append(f"{key}: {saved} saved, {current} current")
    advice = "; model.arch=null takes the architecture of the weights" if wrong else ""
    own, saved = _head_dimensions(network.state_dict()), _head_dimensions(tensors)
    heads = {key: n for key, n in saved.items() if n != own.get(key, n)}
    wrong += [f"{key}: {n} saved, {own[key]} current" for key, n in heads.items()]
    if heads:
        advice += f"; {' '.join(f'{key}={n}' for key, n in heads.items())} takes the heads' sizes"
    if (about.get("attention") == "all_query") != (network.backbone.attention == "all_query") and "attention" in about:
        wrong.append(f"reference.attention: {about['attention']} saved, {network.backbone.attention} current")
    if wrong:
        raise UserError(f"{source} does not fit this model ({'; '.join(wrong)}){advice}")


def _differences(
    own: Architecture, tensors: Mapping[str, Tensor], about: dict, source: str
) -> dict[str, tuple[object, object]]:
    """In what a file's ViT differs from one of ours, but for what `fit` resamples: {option: (saved, current)}. What the file
    does not tell (heads, activation) is taken to be equal, if the width is."""
    found = _architecture_of(tensors, about, source)
    if found.width == own.width:
        found = _architecture_of(tensors, own.not_in_tensors() | about, source)
    options = {
        which: asdict(replace(a, hidden=a.hidden or 4 * a.width)) for which, a in (("saved", found), ("own", own))
    }
    different = {
        name: (value, options["own"][name]) for name, value in options["saved"].items() if value != options["own"][name]
    }
    proportional = found.width != own.width  # then so is the MLP
    for name in ("patch", "channels", "name", *(("hidden",) if proportional else ())):
        different.pop(name, None)
    return different


def _architecture_of(tensors: Mapping[str, Tensor], about: dict, source: str) -> Architecture:
    """The architecture of a file's ViT. Raises UserError if it has none."""
    if is_resnet(tensors):
        raise UserError(f"{source} is a ResNet; this run trains a ViT, which cannot start from it")
    backbone = select_part(tensors, "backbone")
    if not backbone:
        raise UserError(f"{source}: contains no backbone")
    options = vit_options(backbone, about, source)
    return Architecture(**{name: value for name, value in options.items() if name != "image_size"})


def _head_dimensions(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The config values that follow from the shapes of a network's heads."""
    axes = {
        "head.hidden": ("cls_head.mlp.0.weight", 0),
        "head.bottleneck": ("cls_head.last_layer.weight_v", 1),
        "head.prototypes": ("cls_head.last_layer.weight_v", 0),
    }
    shapes = {key: (tensors[name].shape, axis) for key, (name, axis) in axes.items() if name in tensors}
    return {key: shape[axis] for key, (shape, axis) in shapes.items() if len(shape) > axis}


def with_architecture(config: Config, before: Config | None = None) -> Config:
    """The config with the architecture of the weights that it starts from, if it gives none (model.arch: null).

    before: the config of the run's checkpoint, which has it already. Raises UserError if the weights are not a ViT's, or if
    no value of `model.arch` means theirs.
    """
    model = config.model
    if model.arch is not None or model.init is None:
        return config
    if before:
        old = before.model
        return replace(config, model=replace(model, arch=old.arch, width=old.width, depth=old.depth, heads=old.heads))
    tensors, about = read_network(model.init)
    source = about.get("label", model.init)
    found = _architecture_of(tensors, about, source)
    shape: dict[str, Any] = {"width": found.width, "depth": found.depth, "heads": found.heads}
    candidates = [*(replace(model, arch=arch) for arch in ARCHS), replace(model, arch="custom", **shape)]
    for arch in (found.name, *ARCHS_OF_TIMM):
        if arch and patch_of(arch) == model.patch:
            candidates += [replace(model, arch=arch), replace(model, arch=arch, **shape)]
    for named in candidates:
        if not _differences(architecture(named), tensors, about, source):
            return replace(config, model=named)
    advice = f"set model.patch={found.patch}" if found.patch != model.patch else "give timm's name of it as model.arch"
    raise UserError(
        f"{source}: no known model.arch with patches of {model.patch} pixels is a ViT as this one; {advice}"
    )


def weights_seed(seed: int) -> int:
    """The seed for the initial weights of a run."""
    return int(hash64(seed, "weights") >> 1)
