"""Reads a file, a checkpoint or a run folder. Safe with any file: nothing is unpickled but tensors and the options that
published checkpoints contain, and nothing takes more memory than the file has bytes. Imports no timm."""

import argparse
import json
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from model.architecture import architecture
from model.weights.families import recognize
from model.weights.names import CENTERS, PARTS, ROLES, bare, is_unused, remap_keys, timm_name
from runtime.checkpoint import latest_valid, open_checkpoint, read_header, read_tensors
from runtime.config import parse_config
from runtime.errors import UserError, suggest
from runtime.methods import evaluated

SAVED = "model.safetensors"  # how transformers and timm call the weights in the folder of a model
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"  # what lies beside them
HUGGING_FACE_ACTIVATIONS = {  # transformers' name: timm's
    "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "quick_gelu": "quick_gelu", "silu": "silu",
}  # fmt: skip


def read_file(source: str) -> tuple[dict, dict]:
    """(all contents, metadata about the backbone) of a run folder (its newest checkpoint), a checkpoint (folder or file) or
    a file in any checkpoint format, or the folder that transformers saves a model in.

    Raises UserError if there is none, or if it cannot be read safely.
    """
    path, found, about = Path(source), None, {}
    if (path / SAVED).is_file():
        path, about = path / SAVED, _about_folder(path)
    elif path.name == SAVED and (path.parent / CONFIG).is_file():
        about = _about_folder(path.parent)
    elif path.is_dir():
        is_run = (path / "config.yaml").is_file()
        found = latest_valid(path / "checkpoints" if is_run else path)
        if found is None:
            kind = "a run without a checkpoint" if is_run else "neither a run nor a folder of checkpoints"
            raise UserError(f"{path}: {kind}")
    elif not path.is_file():
        siblings = path.parent.iterdir() if path.parent.is_dir() else ()
        raise UserError(f"{path}: no such file{suggest(source, map(str, siblings))}")
    elif path.name.startswith("checkpoint-") and path.suffix == ".safetensors":
        found = open_checkpoint(path)
    if found:  # a method from outside this repository may have other heads, which are ignored
        ours = tuple(f"{role}.{part}." for role in ("student", "teacher") for part in PARTS)
        centers = {name for names in CENTERS.values() for name in names}
        tensors = {n: t for n, t in found.tensors().items() if n.startswith(ours) or n in centers}
        return tensors, _about_config(found.config, str(found.path))
    if path.suffix == ".safetensors":
        metadata = read_header(path).get("__metadata__") or {}
        try:
            about |= dict(json.loads(metadata.get("densedino", "{}")))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: its metadata 'densedino' is not a JSON object ({error})") from None
        return read_tensors(path), about
    contents = _read_torch(path)
    if not isinstance(contents, dict):
        raise UserError(f"{path}: contains no state dict of a ViT or a ResNet")
    return contents, about


def _about_folder(folder: Path) -> dict:
    """What the JSON files beside weights of Hugging Face or timm say about them."""
    config = _read_json(folder / CONFIG)
    about = dict(exported) if isinstance(exported := config.get("densedino"), dict) else {}  # an export of ours has all
    activation = config.get("hidden_act")
    if isinstance(activation, str) and not config.get("use_swiglu_ffn"):  # a gated MLP has SiLU whatever it says
        about["activation"] = HUGGING_FACE_ACTIVATIONS.get(activation, activation)
    if "num_attention_heads" in config:
        about["heads"] = config["num_attention_heads"]
    if isinstance(of_timm := config.get("pretrained_cfg"), dict):
        about |= {name: of_timm.get(name) for name in ("mean", "std")}
    if (folder / PREPROCESSOR).is_file():
        prepared = _read_json(folder / PREPROCESSOR)
        about |= {name: prepared.get(f"image_{name}") for name in ("mean", "std")}
        if prepared.get("do_normalize") is False:
            about |= {"mean": 0, "std": 1}
    return about


def _read_json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _about_config(text: str, source: str) -> dict:
    """What a checkpoint's config says about its backbone."""
    config = parse_config(text, source)
    reference = config.reference
    return {
        **architecture(config.model).not_in_tensors(),
        **config.pixels._asdict(),
        "attention": reference.attention,
        "border": reference.border,
        "locality": reference.locality,
        "role": evaluated(config.method),
    }


def _read_torch(path: Path) -> object:
    """What torch.save wrote. Raises UserError if it is anything else, or would run code."""
    try:
        with open(path, "rb") as file:
            # as torch distinguishes them: older files are a bare pickle followed by the tensors
            zipped = file.read(4) == b"PK\x03\x04"
        if zipped:
            entries = zipfile.ZipFile(path).infolist()
            if any(e.compress_type != zipfile.ZIP_STORED for e in entries):
                raise ValueError("its entries are compressed, which torch.save never does")
            if sum(e.file_size for e in entries) > path.stat().st_size:
                raise ValueError("its entries claim more bytes than the file has")
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for a hostile or broken file
        reason = next(
            (line for line in str(error).splitlines() if " " in line), "neither a torch nor a safetensors file"
        )
        raise UserError(f"{path}: not weights that can be read safely ({reason})") from None


def select_network(contents: dict, role: str, source: str) -> tuple[dict[str, Tensor], dict]:
    """(one network's tensors with our names, metadata that follows from their names) of a file's contents.

    The other role's network if the file has only that, as the checkpoint of a method without a teacher. The metadata: the
    file and its family for messages ("label"), the pixels of this family ("pixels"), the tensors that are not used
    ("unused"), and perhaps the "heads". Raises UserError if there is no network, or if its tensors claim more bytes than the
    file has.
    """
    networks, others = _by_role(_unwrap(contents))
    tensors = networks.get(role) or next(iter(networks.values()))
    if not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError(f"{source}: contains no state dict of a {role}, of a ViT or of a ResNet")
    odd = [n for n, t in tensors.items() if not isinstance(n, str) or not is_plain(t)]
    if odd:
        raise UserError(f"{source}: '{odd[0]}' is not a dense tensor of a CPU")
    claimed = sum({(t.data_ptr(), t.shape): t.numel() * t.element_size() for t in tensors.values()}.values())
    size = Path(source).stat().st_size if Path(source).is_file() else claimed
    if claimed > size:  # a pickle may claim any shape for a storage of four bytes
        raise UserError(f"{source}: its tensors would take {claimed:,} bytes, the file has {size:,}")
    family = recognize([*map(str, _unwrap(contents)), *tensors])
    # DenseCL's extracted backbones have their author beside them
    name = family.name or str(contents.get("author") or "")
    label = f"{source} ({name})" if name else source
    if family.refusal:
        raise UserError(f"{source}: this is {family.name}; {family.refusal}")
    encoder = {n: t for n, t in tensors.items() if bare(n).startswith(family.encoder)}
    inside = {bare(n).removeprefix(family.encoder): t for n, t in encoder.items()} if family.encoder else encoder
    # DenseCL's training checkpoints name the query backbone twice
    others += [bare(n) for n in tensors if n not in encoder and bare(n) not in inside]
    about: dict = {
        "label": label,
        "pixels": family.pixels,
        "unused": others + [timm_name(n) for n in inside if is_unused(n)],
    }
    if family.heads:
        about["heads"] = family.heads
    return remap_keys(inside, label), about


def _by_role(tensors: dict) -> tuple[dict[str, dict], list[str]]:
    """({role: its state dict}, names of no role) of a state dict, or of a dict of state dicts. Without roles: {"": all}."""
    networks = {ROLES[key]: inner for key, inner in tensors.items() if key in ROLES and isinstance(inner, dict)}
    if networks:
        return networks, []
    others = []
    for name, tensor in tensors.items():
        word, _, rest = bare(str(name)).partition(".")
        if word in ROLES and word != "encoder":  # Hugging Face has it in the names of one network
            networks.setdefault(ROLES[word], {})[rest] = tensor
        else:
            others.append(bare(str(name)))
    centers = {center for names in CENTERS.values() for center in names}
    return (networks, [name for name in others if name not in centers]) if networks else ({"": tensors}, [])


def is_plain(t: Tensor) -> bool:
    return t.layout == torch.strided and t.device.type == "cpu"


def _unwrap(contents: dict) -> dict:
    """The state dict inside the dicts that trainers put around it."""
    for key in ("state_dict", "model"):
        if isinstance(contents.get(key), dict):
            contents = contents[key]
    return contents
