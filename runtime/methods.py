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
    (tests/test_methods.py holds both equal)."""

    target: str
    uses_points: bool


METHODS = {
    "densedino": MethodEntry("model.methods.densedino:DenseDINO", uses_points=True),
    "dino": MethodEntry("model.methods.dino:DINO", uses_points=False),
}


def load_class(method: str) -> Any:
    """The class of a method. Raises UserError if its module cannot be imported or has no such class."""
    target = METHODS[method].target if method in METHODS else method
    module, _, name = target.partition(":")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"method: {method} is not found ({error})") from None


def uses_points(method: str) -> bool:
    """Whether the pipeline draws reference points for a method. Imports the module of a module:Class. Raises UserError as
    `load_class`."""
    return METHODS[method].uses_points if method in METHODS else bool(load_class(method).uses_points)
