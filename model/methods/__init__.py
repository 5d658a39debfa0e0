"""The methods of pretraining, by the name that a config gives them."""

from importlib import import_module

from model.methods.base import Method, StepOutput
from runtime.config import Config
from runtime.errors import UserError

METHODS = {"dino": "model.methods.dino:DINO", "densedino": "model.methods.densedino:DenseDINO"}

__all__ = ["METHODS", "Method", "StepOutput", "build"]


def build(config: Config) -> Method:
    """The method that `config.method` names: one of METHODS, or module:Class for one of your own, where `import module`
    finds it. Raises UserError where it does not."""
    module, _, name = METHODS.get(config.method, config.method).partition(":")
    try:
        made = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"method: {config.method} is not found ({error})") from None
    return made(config)
