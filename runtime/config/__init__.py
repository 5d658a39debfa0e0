"""The config of a run: yaml (+ base) + a.b=c -> one typed, checked Config.

schema.py     every value: type, bounds, default, meaning; objectives.py: those of what a method learns
bounds.py     the types that it uses beside pydantic's
checks.py     rules between values
messages.py   errors in words, nearest keys
yaml.py       text <-> tree: YAML 1.2 scalars; no aliases, no tags, no repeated keys
load.py       base files, overrides, all errors in one list; the resolved copy; what differs between two configs
reference.py  writes docs/reference/config.md and configs/schema.json

Nothing here imports torch: an error is reported before anything heavy loads.
"""

from runtime.config.bounds import ARCH, ARCHS_OF_TIMM, LOCALITY, TIMM, patch_of
from runtime.config.checks import BLUR_RADIUS, MIN_TEMPERATURE, PUSHED, is_path, missing, shards_word, split_places
from runtime.config.load import diff, dump_config, dump_run_config, load_config, parse_config
from runtime.config.messages import ConfigErrors, flatten, suggest_key, unknown_option
from runtime.config.schema import (
    OTHER_SECTIONS,
    RESULT_SECTIONS,
    TEACHERS,
    Clustering,
    Config,
    Contrast,
    Data,
    Eval,
    Head,
    Jitter,
    Loss,
    Model,
    Optim,
    Reference,
    Run,
    Source,
    Speed,
    Views,
)
from runtime.methods import METHODS

__all__ = [
    "ARCH", "ARCHS_OF_TIMM", "BLUR_RADIUS", "LOCALITY", "METHODS", "MIN_TEMPERATURE", "OTHER_SECTIONS",
    "PUSHED", "RESULT_SECTIONS", "TEACHERS", "TIMM",
    "Clustering", "Config", "ConfigErrors", "Contrast", "Data", "Eval", "Head", "Jitter", "Loss", "Model", "Optim",
    "Reference", "Run", "Source", "Speed", "Views", "diff", "dump_config", "dump_run_config", "flatten", "is_path",
    "load_config", "missing", "parse_config", "patch_of", "shards_word", "split_places", "suggest_key",
    "unknown_option",
]  # fmt: skip
