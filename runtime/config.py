"""yaml (+ base) + a.b=c -> one typed, checked Config. Imports no torch: a wrong word is told before anything heavy loads.

Values are YAML 1.2's: `true` and `false` are the only booleans, `1e-3` is a number; aliases, tags and repeated keys are
refused, and nothing is looked up anywhere (`${oc.env:HOME}` is a text). All mistakes of a config are told in one list.
"""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from runtime.errors import UserError, suggest

# ---------------------------------------------------------------------------------------------- what changes results


@dataclass
class Views:
    """A group of views of one size."""

    count: int = 2
    size: int = 224  # pixels a side
    scale: tuple[float, float] = (0.25, 1.0)  # a window's area as a share of the image
    teacher: bool = False  # whether the teacher sees them too; two views in all
    blur: list[float] = field(default_factory=lambda: [0.5])  # probability, for each view or one for all
    solarize: list[float] = field(default_factory=lambda: [0.0])


@dataclass
class Jitter:
    probability: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1


@dataclass
class Data:
    shards: str | None = None  # folder of shards to train on, or its address: s3://bucket/path, https://host/path
    val: str | None = None  # folder of shards to evaluate on; without it `holdout` of `shards` is kept for that
    holdout: float = 0.02
    views: list[Views] = field(
        default_factory=lambda: [
            Views(2, 224, (0.25, 1.0), True, [1.0, 0.1], [0.0, 0.2]),
            Views(2, 224, (0.25, 1.0), False, [0.5], [0.0]),
        ]
    )
    min_overlap: float = (
        0.01  # least shared area of a pair, as a share of the image; teacher-teacher pairs: twice; 0: any
    )
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: Jitter = field(default_factory=Jitter)
    grayscale: float = 0.2
    max_corrupt: float = 0.001  # the run stops when more of an epoch's samples than this share are damaged
    max_missing: float = 0.0  # a run starts although shards that are gone or cut held this share of the samples


@dataclass
class Model:
    arch: Literal["vit_tiny", "vit_small", "vit_base", "custom"] = "vit_small"
    patch: int = 16
    width: int | None = None  # these three for arch: custom
    depth: int | None = None
    heads: int | None = None
    drop_path: float = 0.1
    init: str | None = None  # weights to begin with: a file, a run or timm:NAME (model/weights.py: `load_pretrained`)


@dataclass
class Reference:
    """Reference tokens, paper section 3.2 (method: densedino)."""

    points: int = 4  # M, for each ordered pair (teacher view, other view)
    attention: Literal["none", "patches+cls", "patches", "patches+self", "all_query"] = "patches+self"
    border: Literal["zeros", "border"] = "zeros"  # what the bicubic reading finds outside the position grid
    views: Literal["all", "teacher"] = "all"  # x' of eq. 3
    center: Literal["loss", "published"] = "loss"  # which tokens move the reference center


@dataclass
class Head:
    hidden: int = 2048
    bottleneck: int = 256
    prototypes: int = 65536  # K
    norm: Literal["none", "batch"] = "none"
    norm_last_layer: bool = True  # the weight norm's gain stays 1 (DINO's norm_last_layer)
    shared: bool = False  # one head and one center for [CLS] and reference tokens


@dataclass
class Loss:
    alpha: float = 0.5  # eq. 4; method dino: 1
    cls_views: Literal["all", "teacher"] = "all"  # x' of eq. 2
    student_temperature: float = 0.1
    teacher_temperature: tuple[float, float] = (0.04, 0.04)  # from, to
    teacher_temperature_warmup: float = 0  # epochs
    center_momentum: float = 0.9


@dataclass
class Optim:
    global_batch_size: int = 256  # images of a step, all devices together
    epochs: float = 100
    lr: float = 5e-4  # per 256 of batch
    min_lr: float = 1e-6
    warmup_epochs: float = 10  # epochs
    weight_decay: tuple[float, float] = (0.04, 0.4)
    clip_grad: float = 3.0  # largest norm of each gradient tensor; 0: no clipping
    freeze_last_layer_epochs: float = 1  # epochs
    teacher_momentum: float = 0.996


# --------------------------------------------------------------------------------------- what does not change results


@dataclass
class Speed:
    device: Literal["auto", "cuda", "cpu"] = "auto"
    precision: Literal["auto", "float32", "bfloat16", "float64"] = "auto"  # auto: bfloat16 on a GPU that has it
    compile: bool = True
    grad_accum_steps: int = 1  # a step's images in this many pieces
    activation_checkpointing: bool = False  # activation checkpointing: less memory, a third more work
    reader: Literal["auto", "dali", "wds"] = "auto"
    workers: int = 1  # reading processes for each device; 0: a thread
    prefetch: int = 2  # batches ready ahead, for each worker
    dali_threads: int = 4  # of DALI, for each device
    hw_decoder_load: float = 0.65  # share of the photos that a GPU's JPEG engine decodes, where it has one
    cache: str | None = None  # folder for shards that come from s3:// or https://; default: ~/.cache/densedino
    cache_gb: float = 100  # its bound; all processes of a machine share it
    read_timeout: float = 30  # a server that sends no byte for so long is asked again


@dataclass
class Run:
    folder: str | None = None  # default: runs/<name of the config file>
    log_every: int = 10  # steps between two rows of metrics.jsonl; all that reads the device is on this beat
    checkpoint_every: int = 1000  # steps
    keep_checkpoints: int = 2  # checkpoints
    step_timeout: float = (
        600  # seconds; a step, or a wait for a batch, that takes longer ends the run (the first: 10 times)
    )
    grace: float = 25  # seconds after a stop signal; what is unsaved then ends unsaved (torchrun kills after 30)
    log_samples: bool = False  # samples.jsonl: which samples each step saw (of process r: samples-r.jsonl)
    max_nonfinite_steps: int = 10  # the run stops after so many steps in a row whose loss or gradient is not finite
    profile: bool = False  # steps 10 to 12 of this start into profile/: a trace, and a table of what takes the time


@dataclass
class Eval:
    voc: str | None = None  # folder in Pascal VOC's layout, for segmentation
    every: float = 0  # epochs between two k-NN evaluations of the teacher while it trains; 0: never
    limit: int = 20_000  # photos of the bank, and photos asked about, in these
    k: int = 20
    temperature: float = 0.07
    seg_epochs: int = 25
    seg_lr: float = 0.01  # for each 60 images of a batch


@dataclass
class Config:
    method: str = "densedino"  # one of METHODS, or module:Class for one of your own (model/methods)
    seed: int = 0
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    reference: Reference = field(default_factory=Reference)
    head: Head = field(default_factory=Head)
    loss: Loss = field(default_factory=Loss)
    optim: Optim = field(default_factory=Optim)
    speed: Speed = field(default_factory=Speed)
    run: Run = field(default_factory=Run)
    eval: Eval = field(default_factory=Eval)

    @property
    def views(self) -> list[Views]:
        """One entry (count 1) for each view, the two teacher views first."""
        return [
            Views(1, g.size, g.scale, g.teacher, [g.blur[i % len(g.blur)]], [g.solarize[i % len(g.solarize)]])
            for g in self.data.views
            for i in range(g.count)
        ]

    @property
    def points(self) -> int:
        """M, or 0 where the method has no reference tokens."""
        return self.reference.points if self.method == "densedino" else 0

    @property
    def image_size(self) -> int:
        """The side of the largest view: the position grid is made for it."""
        return max(g.size for g in self.data.views)


METHODS = ("densedino", "dino")
TEACHERS = 2  # T: the published method's two teacher views
RESULTS = ("method", "seed", "data", "model", "reference", "head", "loss", "optim")  # sections that change results
# of them: where the photos lie, and when to give up
NOT_RESULTS = ("data.shards", "data.val", "data.max_corrupt", "data.max_missing")
LARGEST = 100_000  # bytes of a config; ours have 4,000 at most, and a parser of Python's speed reads these in a second


# ------------------------------------------------------------------------------------------------------------ reading


class _Yaml(yaml.SafeLoader):
    """YAML 1.2's scalars; no aliases (a few lines of them can fill the memory), no tags, no key twice."""

    def __init__(self, text: str):
        super().__init__(text)
        self.twice: list[str] = []

    def compose_node(self, parent, index):  # type: ignore[override]
        event, line = self.peek_event(), self.peek_event().start_mark.line + 1
        if isinstance(event, yaml.events.AliasEvent):
            raise yaml.YAMLError(f"line {line}: aliases (*{event.anchor}) are not taken")
        if getattr(event, "tag", None) is not None:
            raise yaml.YAMLError(f"line {line}: tags ({event.tag}) are not taken")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(f"line {line}: a key is a word, this is {key.id}")
            if key.value in seen:
                self.twice.append(f"line {line}: '{key.value}' stands there twice (and in line {seen[key.value]})")
            seen[key.value] = line
        return super().construct_mapping(node, deep)


_Yaml.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in rules if tag.endswith(":null")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_NUMBER = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
_Yaml.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|false)$"), list("tf"))
_Yaml.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Yaml.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^{_NUMBER}$"), list("-+.0123456789"))
_Yaml.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Yaml.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(node.value))


def _parse(text: str, name: str, wrong: list[str]) -> Any:
    """The tree of a yaml text; keys that stand there twice go into `wrong`. Raises UserError where it is no yaml."""
    if len(text) > LARGEST:
        raise UserError(f"{name}: {len(text):,} characters are no config (at most {LARGEST:,})")
    try:
        loader = _Yaml(text)  # a SafeLoader with fewer powers
        tree = loader.get_single_data()
    except RecursionError:
        raise UserError(f"{name}: brackets inside brackets, too deep for a config") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{name}: {' '.join(str(error).split())}") from None
    wrong += [f"{name}, {line}" for line in loader.twice]
    return tree


def _read(path: Path, wrong: list[str], seen: tuple[Path, ...] = ()) -> dict:
    """The file's mapping over that of its `base`."""
    if not path.is_file():
        known = [str(p) for p in sorted(path.parent.glob("*.yaml"))] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such config{suggest(str(path), known)}")
    if path.stat().st_size > LARGEST:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes are no config (at most {LARGEST:,})")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    tree = _parse(text, str(path), wrong)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a mapping 'key: value', this file is {_kind(tree)}")
    base = tree.pop("base", None)
    if base is None:
        return tree
    under = (path.parent / str(base)).resolve()
    if under in seen:
        raise UserError(f"{path}: base {base} leads in a circle")
    return _over(_read(under, wrong, (*seen, path.resolve())), tree)


def _over(under: Any, over: Any) -> Any:
    if isinstance(under, dict) and isinstance(over, dict):
        return under | {k: _over(under.get(k), v) for k, v in over.items()}
    return over


def _set(tree: Any, dotted: str, value: Any, defaults: Any) -> None:
    """tree[a][b] = value for 'a.b'; a number is a place in a list (`data.views.0.size`)."""
    *path, last = dotted.split(".")
    for i, key in enumerate(path):
        if isinstance(tree, list):
            if not key.isdigit() or int(key) >= len(tree):
                raise UserError(f"{dotted}: '{'.'.join(path[:i])}' has places 0 to {len(tree) - 1}, not '{key}'")
            tree = tree[int(key)]
        elif isinstance(tree, dict):
            default = getattr(defaults, key, None)
            if isinstance(default, list) and key not in tree:  # a place in a list that the file leaves at its default
                tree[key] = [_plain(dataclasses.asdict(d)) if dataclasses.is_dataclass(d) else d for d in default]  # type: ignore
            defaults, tree = default, tree.setdefault(key, {})
    if isinstance(tree, list) and last.isdigit() and int(last) < len(tree):
        tree[int(last)] = value
    elif isinstance(tree, dict):
        tree[last] = value
    else:
        raise UserError(f"{dotted}: '{'.'.join(path)}' is {_kind(tree)}, it has no '{last}'")


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return f"the text {value!r}" if len(value) < 100 else f"a text of {len(value):,} characters"
    kinds = {dict: "a mapping", list: "a list", type(None): "empty"}
    return kinds.get(type(value), str(value).lower() if isinstance(value, bool) else f"{value}")


class ConfigErrors(list[str]):
    """What is wrong so far, and the names whose value is in doubt because of it."""

    def __init__(self, found: Iterable[str] = ()):
        super().__init__(found)
        self.doubtful: set[str] = set()

    def add(self, at: str, what: str, doubtful: str | None = None) -> None:
        self.append(f"{at}: {what}")
        self.doubtful.add(re.split(r"\.\d", doubtful or at)[0])  # a view in doubt: all views are


def _typed(hint: Any, value: Any, at: str, wrong: ConfigErrors) -> Any:
    """`value` as `hint`; what does not fit goes into `wrong`."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _typed(next(t for t in inner if t is not type(None)), value, at, wrong)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            wrong.add(at, f"expected a mapping, this is {_kind(value)}")
            return typing.cast(type, hint)()
        return _section(typing.cast(type, hint), value, at, wrong)
    if origin is Literal:
        if value not in inner:
            wrong.add(at, f"one of {', '.join(inner)}, this is {_kind(value)}{suggest(value, inner)}")
        return value
    if origin in (list, tuple):
        values = value if isinstance(value, list) else [value]
        if origin is tuple and len(values) != len(inner):
            wrong.add(at, f"expected {len(inner)} numbers, this is {_kind(value)}")
        typed = [_typed(inner[0], v, f"{at}.{i}", wrong) for i, v in enumerate(values)]
        return typed if origin is list else tuple(typed)
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if hint is float and abs(value) < 1e300:
            value = float(value)
        if hint is str:
            value = str(value)  # a folder may be called 2026
    endless = isinstance(value, float) and abs(value) == float("inf")  # 1e999
    if not isinstance(value, hint) or endless or (isinstance(value, bool) and hint is not bool):
        meant = ""
        if hint is bool:
            switch = {"no": "false", "off": "false", "yes": "true", "on": "true"}
            meant = suggest(switch.get(str(value).lower(), str(value).lower()), ("true", "false"))
        elif hint in (int, float) and isinstance(value, str) and re.fullmatch(_NUMBER, value):
            meant = " (without quotes it is a number)"
        wrong.add(at, f"expected {names[hint]}, this is {_kind(value)}{meant}")
    return value


def _section(kind: type, tree: dict, at: str, wrong: ConfigErrors) -> Any:
    """The section that `tree` describes. A value that is wrong by itself stays at its default."""
    hints = typing.get_type_hints(kind)
    made = kind()
    for key, value in tree.items():
        name = f"{at}.{key}" if at else str(key)
        if key in hints:
            before = len(wrong)
            typed = _typed(hints[key], value, name, wrong)
            if len(wrong) == before or dataclasses.is_dataclass(hints[key]):
                setattr(made, key, typed)
        else:
            meant = suggest(key, hints) or ("" if at else suggest_key(str(key)))
            near = re.search(r"'(.*)'", meant)
            doubtful = near and (f"{at}.{near[1]}" if at else near[1])
            wrong.add(name, f"no such key{meant}", doubtful or name)
    return made


def load_config(
    path: str | Path, overrides: list[str] | tuple[str, ...] = (), *, processes: int | None = None,
    forced: list[str] | tuple[str, ...] = (), wrong: Iterable[str] = (),
) -> Config:  # fmt: skip
    """The config of a yaml file with `a.b=c` words laid over it. Raises one UserError that lists all that is wrong.

    processes: how many are going to train by it together; None: it is only read. forced: names of values that may differ
    from a checkpoint's. wrong: mistakes that the caller has found.
    """
    path, mistakes = Path(path), ConfigErrors(wrong)
    tree = _read(path, mistakes)
    for word in overrides:
        key, equals, text = word.partition("=")
        try:
            if not equals or not key:
                raise UserError(f"'{word}': an override is written a.b=c")
            _set(tree, key, _parse(text, key, mistakes), Config())
        except UserError as mistake:
            mistakes.append(str(mistake))
            mistakes.doubtful.add(key)
    config = _section(Config, tree, "", mistakes)
    if config.run.folder is None:
        config.run.folder = str(Path("runs") / path.stem)
    known = leaves(config)
    mistakes += [f"--allow-change {name}: no such key{suggest(name, known)}" for name in forced if name not in known]
    found = _check(config) + ([] if processes is None else _check_training(config, processes))
    return _right(config, found, mistakes, str(path))


def parse_config(text: str, name: str) -> Config:
    """The config of a resolved copy, as checkpoints carry it."""
    mistakes = ConfigErrors()
    tree = _parse(text, name, mistakes)
    if not isinstance(tree, dict):
        raise UserError(f"{name}: its config is {_kind(tree)}")
    config = _section(Config, tree, "", mistakes)
    return _right(config, _check(config), mistakes, name)


def _right(config: Config, found: list[str], mistakes: ConfigErrors, name: str) -> Config:
    """The config, or one UserError: what is wrong by itself, and what the rest of it means together."""
    wrong = [*mistakes, *(m for m in found if not any(n in m for n in mistakes.doubtful))]
    if wrong:
        raise UserError(
            f"{name}: " + (wrong[0] if len(wrong) == 1 else "\n  ".join([f"{len(wrong)} mistakes", *wrong]))
        )
    return config


def leaves(config: Any, at: str = "") -> dict[str, Any]:
    """Every value by its name: {"optim.lr": 5e-4, "data.views.0.size": 224, ...}."""
    if dataclasses.is_dataclass(config):
        inside = [(f.name, getattr(config, f.name)) for f in dataclasses.fields(config)]
    elif isinstance(config, list) and config and dataclasses.is_dataclass(config[0]):
        inside = [(str(i), v) for i, v in enumerate(config)]
    else:
        return {at: config}
    return {n: v for name, value in inside for n, v in leaves(value, f"{at}.{name}".lstrip(".")).items()}


def suggest_key(word: str) -> str:
    """The end of a message, as `nearest`: the full name of the value whose last word is closest to `word`."""
    by_last_word = {name.rpartition(".")[2]: name for name in leaves(Config())}
    close = difflib.get_close_matches(word, by_last_word, n=1, cutoff=0.8)
    return f", did you mean '{by_last_word[close[0]]}'?" if close else ""


def differences(before: Config, now: Config) -> dict[str, str]:
    """What changes results and is not the same, by name, in words."""
    told = {}
    a, b = leaves(before), leaves(now)
    for name in a | b:
        if name.split(".")[0] in RESULTS and name not in NOT_RESULTS and a.get(name) != b.get(name):
            told[name] = f"{name}: {a.get(name, 'nothing')} there, {b.get(name, 'nothing')} now"
    if bool(before.data.val) != bool(now.data.val) and now.data.holdout:  # then other photos are kept out of training
        there, here = (c.data.val or f"{c.data.holdout:g} of the training shards" for c in (before, now))
        told["data.val"] = f"data.val: {there} there, {here} now"
    return told


def dump_config(config: Config) -> str:
    """The resolved config as yaml, every key written out."""
    return yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _check(c: Config) -> list[str]:
    """Everything that is wrong with values that are each of the right type."""
    wrong: list[str] = []

    def need(right: bool, message: str) -> None:
        if not right:
            wrong.append(message)

    need(
        c.method in METHODS or re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", c.method) is not None,
        f"method: one of {', '.join(METHODS)}, or module:Class, this is {_kind(c.method)}{suggest(c.method, METHODS)}",
    )
    shares = {
        "data.holdout": c.data.holdout, "data.min_overlap": c.data.min_overlap, "data.flip": c.data.flip,
        "data.grayscale": c.data.grayscale, "data.max_corrupt": c.data.max_corrupt, "data.max_missing": c.data.max_missing,
        "data.jitter.probability": c.data.jitter.probability, "loss.alpha": c.loss.alpha,
        "loss.center_momentum": c.loss.center_momentum, "optim.teacher_momentum": c.optim.teacher_momentum,
        "model.drop_path": c.model.drop_path, "speed.hw_decoder_load": c.speed.hw_decoder_load,
    }  # fmt: skip
    for name, value in shares.items():
        need(0 <= value <= 1, f"{name}: between 0 and 1, this is {value}")
    for name, value in {"data.holdout": c.data.holdout, "model.drop_path": c.model.drop_path}.items():
        need(value < 1, f"{name}: less than 1, this is {value}")
    positive = {
        "optim.global_batch_size": c.optim.global_batch_size, "optim.epochs": c.optim.epochs, "optim.lr": c.optim.lr,
        "loss.student_temperature": c.loss.student_temperature, "speed.grad_accum_steps": c.speed.grad_accum_steps,
        "speed.prefetch": c.speed.prefetch, "speed.dali_threads": c.speed.dali_threads,
        "run.log_every": c.run.log_every, "run.keep_checkpoints": c.run.keep_checkpoints, "run.max_nonfinite_steps": c.run.max_nonfinite_steps,
        "run.step_timeout": c.run.step_timeout,
        "speed.cache_gb": c.speed.cache_gb, "speed.read_timeout": c.speed.read_timeout,
        "run.checkpoint_every": c.run.checkpoint_every, "model.patch": c.model.patch, "head.hidden": c.head.hidden,
        "head.bottleneck": c.head.bottleneck, "eval.k": c.eval.k, "eval.temperature": c.eval.temperature,
        "eval.seg_epochs": c.eval.seg_epochs, "eval.seg_lr": c.eval.seg_lr,
        "eval.limit": c.eval.limit,
    }  # fmt: skip
    for name, value in positive.items():
        need(value > 0, f"{name}: more than 0, this is {value}")
    for name, value in {
        "optim.min_lr": c.optim.min_lr, "optim.warmup_epochs": c.optim.warmup_epochs, "optim.clip_grad": c.optim.clip_grad,
        "optim.freeze_last_layer_epochs": c.optim.freeze_last_layer_epochs, "speed.workers": c.speed.workers, "seed": c.seed,
        "loss.teacher_temperature_warmup": c.loss.teacher_temperature_warmup,
        "optim.weight_decay": min(c.optim.weight_decay), "eval.every": c.eval.every, "run.grace": c.run.grace,
    }.items():  # fmt: skip
        need(value >= 0, f"{name}: not below 0, this is {value}")
    need(min(c.loss.teacher_temperature) > 0, "loss.teacher_temperature: more than 0")
    need(
        c.head.prototypes >= 2, f"head.prototypes: at least 2, with {c.head.prototypes} there is nothing to tell apart"
    )
    need(
        c.optim.warmup_epochs < c.optim.epochs,
        f"optim.warmup_epochs: {c.optim.warmup_epochs:g} epochs of warm-up do not fit into optim.epochs: {c.optim.epochs:g}",
    )
    need(c.seed < 2**63, f"seed: less than 2^63, this is {c.seed}")
    need(
        c.method != "dino" or c.loss.alpha > 0,
        "loss.alpha: 0 leaves no loss at all: method: dino has the class loss alone, which alpha: 1 is",
    )
    if c.speed.grad_accum_steps > 0:
        need(
            c.optim.global_batch_size % c.speed.grad_accum_steps == 0,
            f"optim.global_batch_size: {c.optim.global_batch_size} does not fall into speed.grad_accum_steps: {c.speed.grad_accum_steps} equal pieces",
        )

    dims = (c.model.width, c.model.depth, c.model.heads)
    if c.model.arch == "custom":
        need(None not in dims, "model.width, model.depth, model.heads: model.arch: custom needs all three")
        need(all(d is None or d > 0 for d in dims), "model.width, model.depth, model.heads: each more than 0")
        if c.model.width and c.model.heads and c.model.heads > 0:
            need(
                c.model.width % c.model.heads == 0,
                f"model.width: {c.model.width} does not fall into model.heads: {c.model.heads} equal parts",
            )
    else:
        need(
            dims == (None,) * 3,
            f"model.width, model.depth, model.heads: model.arch: {c.model.arch} has its own; custom takes them",
        )

    need(bool(c.data.views), "data.views: no view at all")
    teachers = sum(g.count for g in c.data.views if g.teacher)
    need(
        teachers == TEACHERS,
        f"data.views: {teachers} teacher views, the method has {TEACHERS} (teacher: true, count: 2)",
    )
    roles = [g.teacher for g in c.data.views]
    need(roles == sorted(roles, reverse=True), "data.views: the teacher's views come first")
    sizes = [g.size for g in c.data.views]
    need(
        len(set(sizes)) == sum(a != b for a, b in zip(sizes, [None, *sizes], strict=False)),
        f"data.views: sizes {sizes}; views of one size stand next to each other",
    )
    for i, g in enumerate(c.data.views):
        at = f"data.views.{i}"
        need(g.count > 0, f"{at}.count: more than 0, this is {g.count}")
        if c.model.patch > 0:
            need(
                g.size >= c.model.patch and g.size % c.model.patch == 0,
                f"{at}.size: {g.size} is no multiple of model.patch: {c.model.patch}"
                f" (nearest: {max(1, round(g.size / c.model.patch)) * c.model.patch})",
            )
        low, high = g.scale
        need(0 < low <= high <= 1, f"{at}.scale: two numbers 0 < low <= high <= 1, this is {low:g}, {high:g}")
        least = c.data.min_overlap * (2 if g.teacher else 1)
        need(
            high > least,
            f"{at}.scale: windows of at most {high:g} of the image cannot share {least:g} of it (data.min_overlap)",
        )
        for name, list_of in (("blur", g.blur), ("solarize", g.solarize)):
            need(len(list_of) in (1, g.count), f"{at}.{name}: one probability or {g.count}, not {len(list_of)}")
            need(all(0 <= p <= 1 for p in list_of), f"{at}.{name}: probabilities between 0 and 1")
    low, high = c.data.aspect
    need(0 < low <= high, f"data.aspect: two numbers 0 < low <= high, this is {low:g}, {high:g}")
    j = c.data.jitter
    need(0 <= j.hue <= 0.5, f"data.jitter.hue: between 0 and 0.5, this is {j.hue}")
    need(min(j.brightness, j.contrast, j.saturation) >= 0, "data.jitter: not below 0")

    if c.method == "densedino" and c.model.patch > 0 and c.data.views:
        tokens = (c.image_size // c.model.patch) ** 2
        views = sum(g.count for g in c.data.views)
        need(c.reference.points >= 1, "reference.points: at least 1 (method: dino is the same trainer without points)")
        need(
            (views - 1) * c.reference.points <= 4 * tokens,
            f"reference.points: {c.reference.points} make {(views - 1) * c.reference.points} reference tokens in a view "
            f"of {tokens} patches",
        )
        need(
            c.data.min_overlap > 0,
            "data.min_overlap: more than 0, or views may share no point (method: dino allows 0)",
        )
        if c.head.shared:
            need(
                c.reference.center == "loss",
                "reference.center: published: has a center of its own, head.shared: true has not",
            )
    return wrong


def _check_training(c: Config, processes: int) -> list[str]:
    """What is wrong with a config that `processes` processes are going to train by."""
    wrong = []
    if c.data.shards is None:
        wrong.append(
            "data.shards: which shards? `make pretrain SHARDS=folder`, made by `make shards SRC=photos/ DST=folder`"
        )
    pieces = processes * c.speed.grad_accum_steps
    if pieces > 0 and processes > 1 and c.optim.global_batch_size % pieces:
        nearest_batch = max(1, round(c.optim.global_batch_size / pieces)) * pieces
        wrong.append(
            f"optim.global_batch_size: {c.optim.global_batch_size} images do not fall into {processes} processes x "
            f"speed.grad_accum_steps: {c.speed.grad_accum_steps} equal pieces (nearest: {nearest_batch})"
        )
    run = Path(c.run.folder or "run").resolve()
    for name, place in {"data.shards": c.data.shards, "data.val": c.data.val, "eval.voc": c.eval.voc}.items():
        if place is not None and "://" not in place and Path(place).resolve() in (run, *run.parents):
            where = "is" if Path(place).resolve() == run else "lies in"
            wrong.append(f"run.folder: {c.run.folder} {where} {name}: {place}; a run writes into a folder of its own")
    return wrong
