"""The registry of pretraining methods: where each class is, and what it needs of the input pipeline. Imports no torch.

A config names a method by its key in METHODS, or as module:Class for a class outside this repository.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from runtime.errors import UserError


@dataclass(frozen=True)
class MethodEntry:
    """Where a method's class is (module:Class), and its class attributes that are needed before torch is loaded
    (model/methods/base.py says what they mean; tests/test_methods.py holds both equal)."""

    target: str
    uses_points: bool = False
    accumulates: bool = True
    evaluated: str = "teacher"
    keys: tuple[str, ...] = ()
    """The keys that it uses, of the sections of the config that say what is learned (runtime/config/objectives.py)."""


_PROJECTION = ("head.hidden", "head.bottleneck")
_CLUSTERS = (
    *_PROJECTION, "head.prototypes", "head.layers", "head.activation", "head.norm", "loss.student_temperature",
    "clustering.epsilon", "clustering.iterations", "clustering.queue", "clustering.queue_start_epochs",
    "clustering.head_lr_factor",
)  # fmt: skip
_DINO = (
    *_PROJECTION, "head.prototypes", "head.norm", "head.norm_last_layer", "loss.cls_views", "loss.student_temperature",
    "loss.teacher_temperature", "loss.teacher_temperature_warmup", "loss.center_momentum",
)  # fmt: skip
_REFERENCE = tuple(f"reference.{name}" for name in ("points", "attention", "locality", "border", "views", "center"))
_MOCO = (*_PROJECTION, "contrast.temperature")

METHODS = {
    "densecl": MethodEntry(
        "model.methods.densecl:DenseCL",
        evaluated="student",
        keys=(*_MOCO, "head.norm", "contrast.queue", "contrast.feature", "contrast.dense_weight"),
    ),
    "densedino": MethodEntry(
        "model.methods.densedino:DenseDINO", uses_points=True, keys=(*_DINO, *_REFERENCE, "head.shared", "loss.alpha")
    ),
    "dino": MethodEntry("model.methods.dino:DINO", keys=_DINO),
    "leopart": MethodEntry(
        "model.methods.leopart:Leopart", accumulates=False, evaluated="student", keys=(*_CLUSTERS, "clustering.mask")
    ),
    "mocov2": MethodEntry(
        "model.methods.mocov2:MoCoV2",
        evaluated="student",
        keys=(*_MOCO, "head.norm", "contrast.queue", "contrast.feature"),
    ),
    "mocov3": MethodEntry(
        "model.methods.mocov3:MoCoV3", accumulates=False, evaluated="student", keys=(*_MOCO, "contrast.feature")
    ),
    "swav": MethodEntry(
        "model.methods.swav:SwAV", accumulates=False, evaluated="student", keys=(*_CLUSTERS, "clustering.feature")
    ),
}


def load_class(method: str) -> Any:
    """The class of a method. Raises UserError if its module cannot be imported or has no such class."""
    target = METHODS[method].target if method in METHODS else method
    module, _, name = target.partition(":")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"method: {method} is not found ({error})") from None


def users(key: str) -> tuple[str, ...]:
    """The registered methods that use a key of the config; none for a key that every method uses."""
    return tuple(name for name, entry in METHODS.items() if key in entry.keys)


def uses_points(method: str) -> bool:
    """Whether the pipeline draws reference points for a method. Imports the module of a module:Class. Raises UserError as
    `load_class`."""
    return bool(_entry(method).uses_points)


def accumulates(method: str) -> bool:
    """Whether a step of the method may be processed in pieces. Imports and raises as `uses_points`."""
    return bool(_entry(method).accumulates)


def evaluated(method: str) -> str:
    """The role of the network that is evaluated. "teacher" for a class that cannot be imported here: its checkpoint can
    still be read."""
    try:
        return str(_entry(method).evaluated)
    except UserError:
        return "teacher"


def _entry(method: str) -> Any:
    return METHODS[method] if method in METHODS else load_class(method)
