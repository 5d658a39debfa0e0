"""What is wrong with a config, in words: what a key expects, what was found, and which key was probably meant."""

import dataclasses
import difflib
import functools
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator
from pydantic_core import ErrorDetails

from runtime.config.bounds import LOGGERS, TAGS
from runtime.config.evaluation import Every
from runtime.config.schema import Config, Source, Views
from runtime.config.yaml import NUMBER
from runtime.errors import UserError, suggest

COMMAND_LINE = "command line"
NAMES_OF_LOGGERS = {*LOGGERS} - {"jsonl"}


class Problem(NamedTuple):
    """Something wrong with the value of a key, or with several values together."""

    key: str  # or several: "model.width, model.depth"
    text: str
    uses: tuple[str, ...] = ()  # other keys whose values it depends on


class ConfigErrors:
    """All errors of a config, and the keys whose values are unknown because of them. `found`: those of the command line."""

    def __init__(self, config: str, found: Iterable[str] = ()):
        self.config = config
        self.messages = [f"{COMMAND_LINE}: {message}" for message in found]
        self.unknown: set[str] = set()

    def add(self, where: str, key: str, text: str, meant: str = "") -> None:
        """An error of `key` in the file `where`; `meant`: the key that was probably meant by it."""
        self.messages.append(f"{where}: {key}: {text}")
        self.unknown |= {key, meant} - {""}

    def add_problems(self, problems: Iterable[Problem], where: Callable[[str], str]) -> None:
        """Problems of values that are each valid, but not those that may only follow from an error found before."""
        for problem in problems:
            keys = (*problem.key.split(", "), *problem.uses)
            if not any(is_inside(a, b) or is_inside(b, a) for a in keys for b in self.unknown):
                self.messages.append(f"{where(keys[0])}: {problem.key}: {problem.text}")

    def raise_any(self) -> None:
        """Raise one UserError that lists all errors, if there are any."""
        if len(self.messages) == 1:
            raise UserError(self.messages[0])
        if self.messages:
            raise UserError("\n  ".join([f"{self.config}: {len(self.messages)} errors", *self.messages]))


def is_inside(key: str, section: str) -> bool:
    """Whether a key is that of a section, or of a value in it."""
    return key == section or key.startswith(f"{section}.")


# ----------------------------------------------------------------------------------------------- what a key expects


def choices(hint: Any) -> list[Any]:
    """The types that a type without `| None` may be, with what Annotated says of each: several for a union."""
    inner = hint
    while typing.get_origin(inner) is Annotated:
        inner = typing.get_args(inner)[0]
    if typing.get_origin(inner) not in (types.UnionType, typing.Union):
        return [hint]
    return [kind for one in typing.get_args(inner) if one is not type(None) for kind in choices(one)]


def section_of(hint: Any) -> Any:
    """The section that a type is, or may be."""
    return next(kind for kind, _ in map(unwrap, choices(hint)) if dataclasses.is_dataclass(kind))


def unwrap(hint: Any) -> tuple[Any, list[Any]]:
    """A type without Annotated and `| None`, and what Annotated says of it."""
    metadata: list[Any] = []
    while True:
        if typing.get_origin(hint) is Annotated:
            metadata += hint.__metadata__
            hint = typing.get_args(hint)[0]
        elif typing.get_origin(hint) in (types.UnionType, typing.Union):
            hint = next(inner for inner in typing.get_args(hint) if inner is not type(None))
        else:
            return hint, metadata


def hint_of(path: Iterable[str | int]) -> Any:
    """The type of a key or of an element in a list, as the schema has it."""
    hint: Any = Config
    for step in path:
        if isinstance(step, int):
            inner = next(kind for kind, _ in map(unwrap, choices(hint)) if typing.get_origin(kind) in (list, tuple))
            hint = typing.get_args(inner)[0]
        else:
            hint = typing.get_type_hints(section_of(hint), include_extras=True)[step]
    return hint


def expected(hint: Any) -> str:
    """A type and its bounds in words: "a number from 0 to 1", "one of auto, cuda, cpu"."""
    if len(kinds := choices(hint)) > 1:
        words = [expected(kind) for kind in kinds]
        return (", or " if any("," in word for word in words) else " or ").join(words)
    kind, metadata = unwrap(hint)
    for rule in metadata:
        if isinstance(rule, AfterValidator):  # the schema's own bounds, see bounds.rule
            return rule.func.__doc__ or ""
    if dataclasses.is_dataclass(kind):
        return "a mapping"
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return f"{len(inner)} numbers{_bounds(unwrap(inner[0])[1])}"
    if typing.get_origin(kind) is list:
        element, bounds = unwrap(inner[0])
        if typing.get_origin(element) is Literal:
            return f"a list of some of {', '.join(typing.get_args(element))}"
        plural = {Views: "groups", Source: "sources", str: "texts"}.get(element)
        return f"a list of {plural}" if plural else f"numbers{_bounds(bounds)}"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return names[kind] + _bounds(metadata)


def _bounds(metadata: list[Any]) -> str:
    found: dict[str, Any] = {}
    for item in metadata:
        for rule in (item, *getattr(item, "metadata", ())):  # Field(ge=0, le=1) holds several
            found |= {
                name: getattr(rule, name) for name in ("gt", "ge", "lt", "le") if getattr(rule, name, None) is not None
            }
    low, high = found.get("ge"), found.get("le")
    below = {2**63: "2^63"}.get(found.get("lt", 0), str(found.get("lt")))
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}"
    if low is not None:
        return f", {low:g} or more" + (f" and below {below}" if "lt" in found else "")
    top = f", {high:g} or less" if high is not None else ""
    return f" above {found['gt']:g}{top}" if "gt" in found else ""


def found(value: Any) -> str:
    """A value of a config file in words."""
    if isinstance(value, str):
        return f"the text {value!r}" if len(value) < 100 else f"a text of {len(value):,} characters"
    if value is None:
        return "no value"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        text = json.dumps(value)
        return text if len(text) < 60 else f"a list of {len(value):,}"
    text = json.dumps(value)
    return {"Infinity": "inf", "-Infinity": "-inf"}.get(text, text if len(text) < 100 else "a number too large")


# ------------------------------------------------------------------------------------------- pydantic's errors in words


def explain(error: ErrorDetails) -> tuple[str, str, str]:
    """(key, text, the key that was probably meant) of one error that pydantic found."""
    path = tuple(step for step in error["loc"] if step not in TAGS)
    key, value = ".".join(map(str, path)), error["input"]
    if error["type"] == "unexpected_keyword_argument":
        names = [f.name for f in dataclasses.fields(section_of(hint_of(path[:-1])))]
        meant = suggest_key(key) or next(iter(difflib.get_close_matches(str(path[-1]), names, 1)), "")
        return key, "no such key" + (f", did you mean '{meant}'?" if meant else ""), meant
    if not path:
        return key, "a text has half a character (\\ud800 to \\udfff)", ""  # the one thing that JSON refuses
    hint = hint_of(path)
    return key, f"expected {expected(hint)}, found {found(value)}{_meant(hint, value)}", ""


def _nearest(value: Any, known: Iterable[str]) -> str:
    return suggest(value, known, cutoff=0.75) if isinstance(value, str) else ""


def _meant(hint: Any, value: Any) -> str:
    """The end of a message: what a wrong value was probably meant to be."""
    kind, metadata = unwrap(hint)
    if typing.get_origin(kind) is Literal:
        return _nearest(value, typing.get_args(kind))
    if kind is str:
        return _nearest(
            value, [name for rule in metadata for name in getattr(getattr(rule, "func", None), "names", ())]
        )
    if kind is bool and isinstance(value, (str, int)):
        switch = {"no": "false", "off": "false", "0": "false", "yes": "true", "on": "true", "1": "true"}
        word = str(value).lower()
        return suggest(switch.get(word, word), ("true", "false"))
    if kind in (int, float) and isinstance(value, str) and re.fullmatch(NUMBER, value):
        return " (without quotes it is a number)"
    return ""


# ------------------------------------------------------------------------------------------------------ nearest names


def flatten(config: Any, at: str = "") -> dict[str, Any]:
    """Every value by its key: {"optim.lr": 5e-4, "data.views.0.size": 224, ...}."""
    if dataclasses.is_dataclass(config):
        inside = [(f.name, getattr(config, f.name)) for f in dataclasses.fields(config)]
    elif isinstance(config, list) and config and dataclasses.is_dataclass(config[0]):
        inside = [(str(i), value) for i, value in enumerate(config)]
    else:
        return {at: config}
    return {k: v for name, value in inside for k, v in flatten(value, f"{at}.{name}".lstrip(".")).items()}


@functools.cache
def all_keys() -> tuple[str, ...]:
    """The keys of all values and sections, parents first."""
    keys: dict[str, None] = {}
    for key in flatten(Config()):
        parts = key.split(".")
        keys |= dict.fromkeys(".".join(parts[: i + 1]) for i in range(len(parts)))
    keys |= dict.fromkeys(f"eval.every.{field.name}" for field in dataclasses.fields(Every))  # by default a number
    return tuple(keys)


def suggest_key(word: str) -> str:
    """The full key that a wrong word was probably meant to be, or "". The word may be a key of a file (`optim.lrr`) or a
    word of a command line (`--lr=0.1`)."""
    word = word.lstrip("-").partition("=")[0].replace("-", "_").lower()
    section, _, name = word.rpartition(".")
    if not name or name.isdecimal():
        return ""
    if section in ("", "run") and set(name.split("_")) & NAMES_OF_LOGGERS:  # --wandb, run.use_tensorboard
        return "run.loggers"
    place = re.search(r"\.(\d+)$", section)  # in a list: the schema knows places 0 and 1 only
    section = re.sub(r"\.\d+$", ".0", section)
    score, best = max(((_likeness(section, name, key), key) for key in all_keys()), key=lambda pair: pair[0])
    if score == 0:
        return ""
    return best.replace(".0.", f".{place[1]}.") if place else best


def _likeness(section: str, name: str, key: str) -> float:
    """How well a key fits `section.name`; 0 where it does not."""
    parent, _, last = key.rpartition(".")
    ratio = _ratio(name, last)
    words = last.split("_")
    if len(name) > 2 and set(name.split("_")) <= set(words):  # batch_size: global_batch_size
        ratio = max(ratio, 0.9 if last.startswith(name) else 0.85)
    exact = 0.2 if name == last else 0.0
    if parent == section:  # bathc: global_batch_size
        ratio = max(ratio, *(0.7 * _ratio(name, one) for one in words))
        return ratio + exact + (0.15 if section else 0.05) if ratio >= 0.5 else 0.0
    if ratio < 0.8:
        return 0.0
    if section and parent.startswith(f"{section}."):  # data.size: data.views.0.size
        return ratio + exact + 0.1
    if section and parent and _ratio(section, parent) >= 0.7:  # optm.lr
        return ratio + exact + 0.05
    return ratio + exact if parent else 0.0


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def unknown_option(word: str, options: Iterable[str] = ()) -> str:
    """The message for an option that a program of the repository does not have (`--lr=0.1`, `--resume`)."""
    name, _, value = word.lstrip("-").partition("=")
    if name.replace("-", "_").split("_")[0] in ("resume", "continue"):
        return f"{word}: no such option. The same command resumes a run by itself"
    if near := suggest(word.partition("=")[0], options, cutoff=0.8):
        return f"{word}: no such option{near}"
    if key := suggest_key(word):
        return f"{word}: no such option, did you mean '{key}{'=' if value else ''}{value}'?"
    return f"{word}: no such option{suggest(word.partition('=')[0], options)}"


def dotted(tree: Any, at: str = "") -> Iterator[str]:
    """The keys of a tree in the order of the file, sections and places in lists among them."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    for key, value in items:
        yield f"{at}.{key}".lstrip(".")
        yield from dotted(value, f"{at}.{key}".lstrip("."))
