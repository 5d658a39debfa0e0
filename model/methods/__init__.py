"""The pretraining methods. `runtime.methods.METHODS` lists them by the name that a config gives them."""

from model.methods.base import Method, StepOutput
from runtime.config import Config
from runtime.methods import METHODS, load_class

__all__ = ["METHODS", "Method", "StepOutput", "build"]


def build(config: Config) -> Method:
    """The method that `config.method` names: a key of METHODS, or module:Class of a class outside this repository.

    Raises UserError if it cannot be imported.
    """
    return load_class(config.method)(config)
