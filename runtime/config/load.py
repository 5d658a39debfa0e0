"""yaml (+ base) + a.b=c -> one checked Config, or one UserError that lists all that is wrong. Imports no torch."""

import copy
import functools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from runtime.config import yaml
from runtime.config.bounds import TAGS
from runtime.config.checks import check, check_training, is_path
from runtime.config.messages import (
    COMMAND_LINE,
    ConfigErrors,
    all_keys,
    dotted,
    explain,
    flatten,
    found,
    is_inside,
    suggest_key,
)  # fmt: skip
from runtime.config.schema import NON_RESULT_KEYS, PLACES, RESULT_SECTIONS, Config
from runtime.errors import UserError, suggest

ARCHITECTURE = ("model.arch", "model.width", "model.depth", "model.heads")  # what follows from weights, if not given


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, processes: int | None = None, allowed: Sequence[str] = (),
    errors: Iterable[str] = (),
) -> Config:  # fmt: skip
    """The config of a yaml file with `a.b=c` words applied over it. Raises one UserError that lists all errors.

    The config.yaml of a run means the folder that it is in, wherever the run was made, unless a word gives run.folder.
    processes: how many are going to train with it; None: it is only read. allowed: keys whose values may differ from a
    checkpoint's (--allow-change). errors: what the caller found wrong on its command line.
    """
    path = Path(path)
    listed = ConfigErrors(str(path), errors)
    tree, sources = _read(path, listed)
    for word in overrides:
        _override(tree, word, sources, listed)
    config = _validate(tree, sources, listed)
    folder = run_of(path)
    if config.run.folder is None or (folder is not None and sources("run.folder") != COMMAND_LINE):
        config.run.folder = str(folder or Path("runs") / path.stem)
    keys = flatten(config)
    for key in allowed:
        if key not in keys and key not in PLACES:
            near = f", did you mean '{suggest_key(key)}'?" if suggest_key(key) in keys else ""
            listed.messages.append(f"{COMMAND_LINE}: --allow-change {key}: no such key{near}")
    listed.add_problems(check(config), sources)
    if processes is not None:
        listed.add_problems(check_training(config, processes), sources)
    listed.raise_any()
    return config


def parse_config(text: str, name: str) -> Config:
    """The config of a resolved copy, as checkpoints have it. `name`: where it comes from, for messages."""
    errors = ConfigErrors(name)
    tree, repeated = yaml.parse(text, name)
    errors.messages += [f"{name}, {message}" for message in repeated]
    if not isinstance(tree, dict):
        raise UserError(f"{name}: its config must be a mapping 'key: value', found {found(tree)}")
    sources = Sources(name)
    config = _validate(tree, sources, errors)
    errors.add_problems(check(config), sources)
    errors.raise_any()
    return config


def dump_config(config: Config) -> str:
    """The resolved config as yaml, with every key."""
    return yaml.dump(_plain(config))


def run_of(path: Path) -> Path | None:
    """The run whose config.yaml this is: the folder it is in, if a run has started there; else None."""
    folder = path.parent
    started = (folder / "versions.jsonl").is_file() or any((folder / "checkpoints").glob("checkpoint-*.safetensors"))
    return folder if path.name == "config.yaml" and started else None


def dump_run_config(config: Config) -> str:
    """The resolved config as a run keeps it, which means the same from every folder: its paths are absolute, and it has no
    run.folder, because a run is where its config.yaml is."""
    tree = _plain(_with_absolute_places(config))
    tree["run"]["folder"] = None
    return yaml.dump(tree)


def _with_absolute_places(config: Config) -> Config:
    config = copy.deepcopy(config)
    for key in PLACES:
        section, _, name = key.partition(".")
        value = getattr(getattr(config, section), name)
        several = isinstance(value, list)  # sources
        for inside, attribute in (
            [(source, "path") for source in value] if several else [(getattr(config, section), name)]
        ):
            place = getattr(inside, attribute)
            if is_path(place) and not place.startswith("~"):
                setattr(inside, attribute, os.path.abspath(place))
    return config


def diff(saved: Config, current: Config) -> dict[str, str]:
    """What changes results and differs between two configs: {key: message}."""
    changed = {}
    a, b = (flatten(_with_absolute_places(config)) for config in (saved, current))
    if current.model.arch is None:  # the run had it from the weights that it started from
        a = {key: value for key, value in a.items() if key not in ARCHITECTURE}
        b = {key: value for key, value in b.items() if key not in ARCHITECTURE}
    for key in a | b:
        changes_results = key.split(".")[0] in RESULT_SECTIONS and not any(is_inside(key, k) for k in NON_RESULT_KEYS)
        if changes_results and a.get(key) != b.get(key):
            changed[key] = f"{key}: saved {a.get(key, 'nothing')}, current {b.get(key, 'nothing')}"
    if bool(saved.data.val) != bool(current.data.val) and current.data.holdout:  # then other images are held out
        old, new = (c.data.val or f"{c.data.holdout:g} of the training shards" for c in (saved, current))
        changed["data.val"] = f"data.val: saved {old}, current {new}"
    return changed


# ------------------------------------------------------------------------------------------------------------ the tree


class Sources:
    """Which file, or the command line, gave a key its value."""

    def __init__(self, default: str):
        self.default = default
        self.given: dict[str, str] = {}

    def __call__(self, key: str) -> str:
        while key and key not in self.given:
            key = key.rpartition(".")[0]
        return self.given.get(key, self.default)


def _read(path: Path, errors: ConfigErrors, seen: tuple[Path, ...] = ()) -> tuple[dict[str, Any], Sources]:
    """The file's mapping merged over that of its `base`, and where each key comes from."""
    if not path.is_file():
        raise UserError(f"{path}: no such config{_suggest_config(path)}")
    if path.stat().st_size > yaml.MAX_SIZE:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes are too many for a config (at most {yaml.MAX_SIZE:,})")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    tree, repeated = yaml.parse(text, str(path))
    errors.messages += [f"{path}, {message}" for message in repeated]
    if not isinstance(tree, dict):
        kind = {list: "a list", type(None): "empty"}.get(type(tree), found(tree))
        raise UserError(f"{path}: a config is a mapping 'key: value', this file is {kind}")
    base, sources = tree.pop("base", None), Sources(str(path))
    if base is not None:
        if not isinstance(base, str):
            raise UserError(f"{path}: base: expected the path of another config, found {found(base)}")
        base_path = path.parent / base
        if base_path.resolve() in (path.resolve(), *seen):
            raise UserError(f"{path}: base: {base} leads in a circle")
        if not base_path.is_file():
            known = sorted(p.name for p in path.parent.glob("*.yaml"))
            raise UserError(f"{path}: base: {base}: no such config{suggest(base, known)}")
        below, below_sources = _read(base_path, errors, (*seen, path.resolve()))
        sources.given = below_sources.given
        own, tree = tree, merge(below, tree)
    else:
        own = tree
    sources.given |= dict.fromkeys(dotted(own), str(path))
    return tree, sources


def _suggest_config(path: Path) -> str:
    """The end of a message: which config was probably meant, in the same folder, in configs/ or in a run's folder."""
    known = [*sorted(path.parent.glob("*.yaml")), *sorted(Path("configs").glob("*.yaml")), *path.glob("config.yaml")]
    same = [str(p) for p in known if p.stem == path.stem or p.parent == path]
    return suggest(str(path), same, cutoff=0) if same else suggest(str(path), map(str, known))


def merge(below: Any, above: Any) -> Any:
    """Two trees in one: mappings key by key, everything else from `above`."""
    if isinstance(below, dict) and isinstance(above, dict):
        return below | {key: merge(below.get(key), value) for key, value in above.items()}
    return above


def _override(tree: dict[str, Any], word: str, sources: Sources, errors: ConfigErrors) -> None:
    """Apply one word `a.b=c` of the command line."""
    key, equals, text = word.partition("=")
    try:
        if not equals or not key:
            raise UserError(f"'{word}': an override is written a.b=c")
        value, repeated = yaml.parse(text, key)
        errors.messages += [f"{COMMAND_LINE}: {key}, {message}" for message in repeated]
        _assign(tree, key, value)
    except UserError as error:
        errors.messages.append(f"{COMMAND_LINE}: {error}")
        errors.unknown.add(key)
    else:
        sources.given |= dict.fromkeys((key, *(f"{key}.{inner}" for inner in dotted(value))), COMMAND_LINE)


def _assign(tree: Any, key: str, value: Any) -> None:
    """tree[a][b] = value for `a.b`. A number is a place in a list (`data.views.0.size`)."""
    *path, last = key.split(".")
    defaults: Any = _defaults()
    for i, name in enumerate(path):
        if isinstance(tree, list):
            if not name.isdecimal() or int(name) >= len(tree):
                raise UserError(f"{key}: '{'.'.join(path[:i])}' has places 0 to {len(tree) - 1}, not '{name}'")
            tree = tree[int(name)]
        elif isinstance(tree, dict):
            defaults = defaults.get(name) if isinstance(defaults, dict) else None
            if isinstance(defaults, list) and name not in tree:  # a place in a list that the file leaves at its default
                tree[name] = copy.deepcopy(defaults)
            tree = tree.setdefault(name, {})
    if isinstance(tree, list) and last.isdecimal() and int(last) < len(tree):
        tree[int(last)] = value
    elif isinstance(tree, dict):
        tree[last] = value
    else:
        parent = ".".join(path)
        either = key in all_keys() and parent in flatten(Config())  # a number, or a section
        instead = f"; '{parent}={{{last}: …}}' replaces it" if either else ""
        raise UserError(f"{key}: '{parent}' is {found(tree)}, it has no '{last}'{instead}")


# ----------------------------------------------------------------------------------------------------- tree and Config


@functools.cache
def adapter() -> TypeAdapter[Config]:
    return TypeAdapter(Config)


def _plain(config: Config) -> dict[str, Any]:
    """The config as mappings, lists and scalars."""
    return adapter().dump_python(config, mode="json", warnings=False)


@functools.cache
def _defaults() -> dict[str, Any]:
    return _plain(Config())


def _validate(tree: dict[str, Any], sources: Sources, errors: ConfigErrors) -> Config:
    """The Config of a tree. What is wrong goes into `errors`, and its key gets its default.

    As JSON, because there pydantic's strict mode takes lists and mappings for tuples and sections, and nothing else for
    anything else: 1 is no boolean, and '3' is no number.
    """
    data = tree.get("data")
    if isinstance(data, dict) and isinstance(data.get("views"), dict):  # one group of views
        data["views"] = [data["views"]]
    order = {key: i for i, key in enumerate(dotted(tree))}
    while True:
        try:
            return adapter().validate_json(json.dumps(tree), strict=True)
        except ValidationError as error:
            details = error.errors(include_url=False)
            # a default that depends on a wrong value is no error of its own
            details = [d for d in details if d["type"] != "default_factory_not_called"]
            wrong = [(tuple(step for step in d["loc"] if step not in TAGS), *explain(d)) for d in details]
        for loc, key, text, meant in sorted(wrong, key=lambda item: order.get(item[1], -1)):
            if not loc:
                raise UserError(f"{errors.config}: {text}")
            errors.add(sources(key), key, text, meant)
            _drop(tree, loc)


def _drop(tree: Any, loc: tuple[int | str, ...]) -> None:
    """Remove the innermost mapping's key that `loc` leads through."""
    inside, name = tree, loc[0]
    for step in loc:
        if isinstance(tree, dict) and step in tree:
            inside, name = tree, step
        elif not isinstance(tree, list) or not isinstance(step, int) or step >= len(tree):
            break
        tree = tree[step]
    inside.pop(name, None)
