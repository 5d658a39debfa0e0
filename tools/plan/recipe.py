"""Which config suits a number of photos, and the values that follow from it. Each rule names its source.

The sources: the paper (Yuan et al. 2023) and DINO (Caron et al. 2021); lightly-train's automatic values of DINO
(`_methods/dino/dino.py`, read 2026-11), in fewer steps for the prototypes; solo-learn's recipes. None of the scaled values
was tuned or run by us.
"""

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from runtime.config import Config, load_config
from runtime.config.yaml import dump, parse
from runtime.errors import UserError, suggest_path

IMAGENET = 1_281_167
LARGE = 500_000  # photos from which the paper's own recipe is proposed
SMALL_CONFIG, LARGE_CONFIG, CPU_CONFIG = (
    "configs/photos_10k.yaml",
    "configs/densedino_vits16.yaml",
    "configs/photos64.yaml",
)
CONTINUE_CONFIG = "configs/continue_dino_vits16.yaml"
FEW = 2_000  # photos below which training from random weights is not proposed
STEPS_OF_IMAGENET = {"warmup": 12_500, "frozen": 1_250}  # 10 epochs and one, at DINO's batch of 1,024
EPOCHS = ((50_000, 1000), (126_689, 400), (IMAGENET, 300))  # photos, epochs of published runs
PROTOTYPES = ((20_000, 1024), (100_000, 4096), (LARGE, 16384), (math.inf, 65536))  # photos up to which, K


class Value(NamedTuple):
    """A value that follows from the number of photos."""

    key: str
    value: Any
    why: str


def choose(images: int, device: str) -> tuple[str, str]:
    """(the config for so many photos, why)."""
    if device == "cpu":
        return CPU_CONFIG, "a CPU trains views of 64 pixels in hours, and views of 224 in weeks"
    if images < FEW:
        return CONTINUE_CONFIG, f"less than {FEW:,} photos are too few to learn from random weights"
    if images < LARGE:
        return SMALL_CONFIG, f"less than {LARGE:,} photos: smaller heads, a sharper teacher, a longer run"
    return LARGE_CONFIG, f"{LARGE:,} photos and more: the paper's own recipe"


def scale(config: Config, images: int, name: str) -> list[Value]:
    """The values that differ from the config's for so many photos. name: the config's file. Only a config that `choose`
    proposes is scaled: of others the recipe is their own."""
    batch = _batch(images) if name == SMALL_CONFIG else min(config.optim.global_batch_size, _batch(images))
    if images < 8 * batch:
        batch = max(2, 2 ** int(math.log2(max(1, images / 8.2))))  # of a power of 2; 2 % may be held out
    steps = max(1, images // batch)  # an epoch
    if name == SMALL_CONFIG:
        values = _small(images, batch, steps)
    elif name == CONTINUE_CONFIG:
        epochs = _round(min(100, max(20, 1_000_000 / images)))
        values = [
            Value("optim.epochs", epochs, "1 M images seen, between 20 and 100 epochs: our choice"),
            Value("optim.warmup_epochs", _round(epochs / 10), "a tenth of the run"),
        ]
    else:
        values = []
    if batch != config.optim.global_batch_size:
        values.insert(0, Value("optim.global_batch_size", batch, _why_batch(batch)))
    return [v for v in values if v.value != _current(config, v.key)]


def _batch(images: int) -> int:
    return 128 if images <= 20_000 else 256 if images < 200_000 else 512


def _why_batch(batch: int) -> str:
    published = {128: "lightly-train's default", 256: "DINO's reference batch", 512: "the paper's (section 4.1)"}
    return published.get(batch, "eight steps an epoch, at least: our choice")


def _small(images: int, batch: int, steps: int) -> list[Value]:
    epochs = _epochs(images)
    share = max(0.0, min(1.0, (images - 20_000) / (IMAGENET - 20_000)))  # 0: a small set, 1: ImageNet
    temperature = round(0.02 + 0.02 * share, 3)
    k = next(k for most, k in PROTOTYPES if images <= most)
    frozen = _round(max(0.1, min(STEPS_OF_IMAGENET["frozen"] / steps, epochs / 50)))
    warmup = _round(max(0.1, min(STEPS_OF_IMAGENET["warmup"] / steps, epochs / 10)))
    return [
        Value("optim.epochs", epochs, "solo-learn: 1,000 for CIFAR, 400 for ImageNet-100; the paper: 300 for ImageNet"),
        Value("optim.warmup_epochs", warmup, "12,500 steps, at most a tenth of the run (lightly-train)"),
        Value("optim.freeze_last_layer_epochs", frozen, "1,250 steps, one epoch of ImageNet (DINO, lightly-train)"),
        Value("optim.teacher_momentum", round(0.99 + 0.006 * share, 4), "0.99 (20,000 photos) to 0.996 (lightly-train)"),
        Value("loss.teacher_temperature", [temperature] * 2, "0.02 (20,000 photos, lightly-train) to the paper's 0.04"),
        Value("head.prototypes", k, "fewer than photos: 1,024 up to 20,000 photos, then more (lightly-train)"),
    ]  # fmt: skip


def _epochs(images: int) -> float:
    """Epochs of published runs on the nearest numbers of photos, straight lines between them in logarithms."""
    (n, epochs), *more = EPOCHS
    if images <= n:
        return epochs
    for after, fewer in more:
        if images <= after:
            part = math.log(images / n) / math.log(after / n)
            return _round(epochs * (fewer / epochs) ** part)
        n, epochs = after, fewer
    return epochs


def _round(x: float) -> float:
    """To two digits."""
    rounded = float(f"{x:.2g}")
    return int(rounded) if rounded.is_integer() else rounded


def _current(config: Config, key: str) -> Any:
    section, _, name = key.partition(".")
    value = getattr(getattr(config, section), name)
    return list(value) if isinstance(value, tuple) else value


def words(values: list[Value]) -> list[str]:
    """The values as the overrides a.b=c of a command line."""
    return [f"{v.key}={json.dumps(v.value, separators=(',', ':'))}" for v in values]


def write(path: Path, base: str, values: list[Value], words: list[str], images: int, hours: str, place: str) -> None:
    """Write a config of these values and the user's words over `base`, for photos at `place`. Raises UserError if there is a
    file already, or it cannot be written."""
    inside = path.absolute().is_relative_to(Path.cwd())
    tree: dict[str, Any] = {"base": os.path.relpath(base, path.parent) if inside else os.path.abspath(base)}
    given = [(key, parse(text, key)[0]) for key, _, text in (word.partition("=") for word in words)]
    for key, value in [*((v.key, v.value) for v in values), *given]:
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    reasons = "".join(f"#   {v.key}: {v.why}\n" for v in values)
    text = (
        f"# {images:,} photos. Written by `make plan`.\n#\n#   make pretrain CONFIG={path} SHARDS={place}\n#\n"
        f"# Hours: {hours}. Expected: not known.\n{'# Where values come from:' + chr(10) if values else ''}{reasons}\n"
        f"{dump(tree)}"
    )
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"WRITE={path}: there is a file already, and it stays; name another") from None
    except OSError as error:
        raise UserError(f"WRITE={path}: {error.strerror or error}") from None
    load_config(path)  # a written config is a valid one


def refuse(path: Path, words: list[str]) -> None:
    """Raise UserError, before any work, if a config with these words cannot be written there."""
    if path.exists():
        raise UserError(f"WRITE={path}: there is a file already, and it stays; name another")
    if path.suffix != ".yaml":
        raise UserError(f"WRITE={path}: a config ends with .yaml, for example WRITE={path.with_suffix('.yaml')}")
    if not path.parent.is_dir():
        raise UserError(f"WRITE={path}: no such folder{suggest_path(path.parent)}")
    for key in (word.partition("=")[0] for word in words):
        if any(part.isdecimal() for part in key.split(".")):
            raise UserError(
                f"WRITE={path}: {key} is a place in a list, which a file has whole; write it without, and edit it"
            )
