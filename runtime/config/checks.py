"""Rules between values. The bounds of one value stand with it in schema.py.

They are functions that list what is wrong, not pydantic's model validators: a validator reports one error, and none where
another value is wrong. Each Problem names the keys it depends on, so that it is left out where one of these is unknown.
"""

import json
import os
import re
import shlex
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TypeGuard

from runtime.config.bounds import ARCH, TIMM, patch_of
from runtime.config.messages import Problem
from runtime.config.schema import BY_VIEW, TEACHERS, Config
from runtime.errors import suggest_path
from runtime.methods import METHODS, users
from runtime.pixels import usual

CLUSTERING = users("clustering.queue")
BLUR_RADIUS = 3  # of the attention that makes Leopart's mask, in patches: its border is reflected (model/foreground.py)
PUSHED = 10  # rows of each image and teacher view that a step of Leopart pushes into the queue (published)
TWO_VIEWS = ("densecl", "mocov2", "mocov3")  # the methods that compare one view with another
QUEUES = users("contrast.queue")
MIN_TEMPERATURE = 1 / 80  # of k-NN: above it no vote, exp(similarity / temperature), overflows float32


def check(c: Config) -> list[Problem]:
    """What is wrong with values that are each valid by themselves."""
    return [
        *_sources(c), *_optim(c), *_model(c), *_views(c), *_pixels(c), *_reference(c), *_clustering(c), *_contrast(c),
        *_loggers(c),
    ]  # fmt: skip


def _nearest(value: int, unit: int) -> int:
    """The multiple of a unit, above 0, that is nearest to a value."""
    return max(1, round(value / unit)) * unit


def _multiple(key: str, value: int, other: str, unit: int, depends_on: tuple[str, ...]) -> Iterator[Problem]:
    """A key's value must be a multiple of another key's."""
    if value % unit:
        text = f"{value} is not a multiple of {other}: {unit} (nearest: {_nearest(value, unit)})"
        yield Problem(key, text, (other, *depends_on))


def _sources(c: Config) -> Iterator[Problem]:
    sources = c.data.sources
    if isinstance(c.data.shards, list) and not sources:
        yield Problem("data.shards", "this list is empty; name a folder of shards, or several")
    without = [source.path for source in sources if source.weight is None]
    if without and len(without) < len(sources):
        text = f"{without[0]} has no weight, others have one; give all sources a weight, or none"
        yield Problem("data.shards", text)
    seen: dict[str, str] = {}
    for i, source in enumerate(sources):
        if not source.path:
            yield Problem(f"data.shards.{i}", "a source needs a path: {path: folder, weight: 1}")
        place = os.path.realpath(source.path) if is_path(source.path) else source.path.rstrip("/")
        if place in seen:
            text = f"{seen[place]} and {source.path} are the same place; name it once, with a larger weight"
            yield Problem("data.shards", text)
        seen[place] = source.path


def _optim(c: Config) -> Iterator[Problem]:
    epochs, warmup, pieces = c.optim.epochs, c.optim.warmup_epochs, c.speed.grad_accum_steps
    if warmup >= epochs:
        text = (
            f"{warmup:g} epochs of warmup do not fit into optim.epochs: {epochs:g}; a tenth of the run is usual: "
            f"optim.warmup_epochs={epochs / 10:g}"
        )
        yield Problem("optim.warmup_epochs", text, ("optim.epochs",))
    if c.optim.global_batch_size % pieces:
        text = f"{c.optim.global_batch_size} is not divisible by speed.grad_accum_steps: {pieces}"
        yield Problem("optim.global_batch_size", text, ("speed.grad_accum_steps",))
    if pieces > 1 and c.head.norm == "batch":
        text = (
            f"{pieces} pieces of a step would each have their own batch statistics (head.norm: batch), which changes what "
            "is learned; speed.activation_checkpointing: true needs less memory too, and so do more devices"
        )
        yield Problem("speed.grad_accum_steps", text, ("head.norm",))
    if pieces > 1 and c.method in METHODS and not METHODS[c.method].accumulates:
        text = (
            f"{pieces} pieces of a step would have a loss each, but method: {c.method} has one of all images of a step; "
            "speed.activation_checkpointing: true needs less memory too, and so do more devices"
        )
        yield Problem("speed.grad_accum_steps", text, ("method",))
    if c.method == "dino" and c.loss.alpha == 0:
        text = "0 leaves no loss at all. method: dino has the class loss alone, which is alpha: 1"
        yield Problem("loss.alpha", text, ("method",))


def _model(c: Config) -> Iterator[Problem]:
    keys = "model.width, model.depth, model.heads"
    width, heads = c.model.width, c.model.heads
    given = [d is not None for d in (width, c.model.depth, heads)]
    from_timm = ARCH.fullmatch(c.model.arch or "")
    if from_timm and c.model.patch != patch_of(c.model.arch):
        text = f"{c.model.patch}, but model.arch: {c.model.arch} has {from_timm[1]}; leave model.patch out"
        yield Problem("model.patch", text, ("model.arch",))
    if c.model.arch != "custom" and not from_timm and any(given):
        own = f"{c.model.arch} has its own" if c.model.arch else "null has those of model.init"
        text = f"model.arch: {own}. Only model.arch: custom and names of timm take them"
        yield Problem(keys, text, ("model.arch",))
        return
    if c.model.arch == "custom" and not all(given):
        yield Problem(keys, "model.arch: custom needs all three", ("model.arch",))
    if width and heads and width % heads:
        yield Problem("model.width", f"{width} is not divisible by model.heads: {heads}", ("model.arch", "model.heads"))


def _views(c: Config) -> Iterator[Problem]:
    groups, patch = c.data.views, c.model.patch
    if not groups:
        yield Problem("data.views", "a config needs views, this list is empty")
        return
    teachers = sum(g.count for g in groups if g.teacher)
    if teachers != TEACHERS:
        text = f"{teachers} teacher views, the method has {TEACHERS} (one group with teacher: true, count: 2)"
        yield Problem("data.views", text)
    roles = [g.teacher for g in groups]
    if roles != sorted(roles, reverse=True):
        yield Problem("data.views", "groups with teacher: true must come first")
    sizes = [g.size for g in groups]
    if len(set(sizes)) != sum(a != b for a, b in zip(sizes, [None, *sizes], strict=False)):
        yield Problem("data.views", f"groups of one size must be next to each other, found sizes {sizes}")
    for i, g in enumerate(groups):
        at = f"data.views.{i}"
        yield from _multiple(f"{at}.size", g.size, "model.patch", patch, ("data.views",))
        least = c.data.min_overlap * (2 if g.teacher else 1)
        if g.scale[1] <= least:
            text = f"windows of at most {g.scale[1]:g} of the image cannot share {least:g} of it (data.min_overlap)"
            yield Problem(f"{at}.scale", text, ("data.min_overlap", "data.views"))
        for name in BY_VIEW:
            values = getattr(g, name)
            if len(values) not in (1, g.count):
                text = f"expected one probability or {g.count} (count), found {len(values)}"
                yield Problem(f"{at}.{name}", text, ("data.views",))


def _pixels(c: Config) -> Iterator[Problem]:
    for name in ("mean", "std"):
        values, own = getattr(c.data, name), list(getattr(usual(c.data.channels), name))
        if len(values) != c.data.channels:
            text = f"{len(values)} given, data.channels: {c.data.channels} needs {c.data.channels} (such as {own})"
            yield Problem(f"data.{name}", text, ("data.channels",))


def _reference(c: Config) -> Iterator[Problem]:
    if c.method not in METHODS or not METHODS[c.method].uses_points or not c.data.views:
        return
    patches = (c.image_size // c.model.patch) ** 2
    tokens = (sum(g.count for g in c.data.views) - 1) * c.reference.points
    if c.reference.points < 1:
        text = f"at least 1, found {c.reference.points} (method: dino is the same trainer without points)"
        yield Problem("reference.points", text, ("method",))
    if patches and tokens > 4 * patches:
        text = f"{c.reference.points} make {tokens} reference tokens in a view of {patches} patches (at most {4 * patches})"
        yield Problem("reference.points", text, ("method", "model.patch", "data.views"))
    if c.reference.locality is not None and not c.reference.attention.startswith("patches"):
        text = f"only for tokens that attend to patches alone, not for reference.attention: {c.reference.attention}"
        yield Problem("reference.locality", text, ("reference.attention",))
    if c.data.min_overlap == 0:
        text = "must be above 0, or views may share no point (method: dino allows 0)"
        yield Problem("data.min_overlap", text, ("method",))
    if c.head.shared and c.reference.center == "published":
        text = "published has a center of its own, but head.shared: true has one center for both"
        yield Problem("reference.center", text, ("method", "head.shared"))


def _clustering(c: Config) -> Iterator[Problem]:
    queue, batch = c.clustering.queue, c.optim.global_batch_size
    if c.method == "swav":
        yield from _multiple("clustering.queue", queue, "optim.global_batch_size", batch, ("method",))
    if c.method != "leopart" or not c.data.views:
        return
    if c.data.min_overlap == 0:
        text = "must be above 0, or views may share no place (method: leopart compares views where they overlap)"
        yield Problem("data.min_overlap", text, ("method",))
    sizes = [g.size for g in c.data.views if g.teacher]
    if len(set(sizes)) > 1:
        yield Problem("data.views", f"method: leopart needs teacher views of one size, found {sizes}", ("method",))
    elif c.clustering.mask != "all" and sizes and sizes[0] // c.model.patch <= BLUR_RADIUS:
        text = (
            f"{c.clustering.mask} needs more than {BLUR_RADIUS} patches a side, a teacher view of {sizes[0]} pixels has "
            f"{sizes[0] // c.model.patch} (mask: all needs none)"
        )
        yield Problem("clustering.mask", text, ("method", "model.patch", "data.views"))


def _contrast(c: Config) -> Iterator[Problem]:
    groups, batch, queue = c.data.views, c.optim.global_batch_size, c.contrast.queue
    views = sum(g.count for g in groups)
    if c.method in TWO_VIEWS and groups and (views != 2 or len({g.size for g in groups}) > 1):
        sizes = " and ".join(dict.fromkeys(str(g.size) for g in groups))
        text = (
            f"method: {c.method} compares two views of one size, found {views} of {sizes} pixels "
            "(one group with teacher: true, count: 2)"
        )
        yield Problem("data.views", text, ("method",))
    if c.method in QUEUES:
        yield from _multiple("contrast.queue", queue, "optim.global_batch_size", batch, ("method",))


def _loggers(c: Config) -> Iterator[Problem]:
    twice = [name for name in dict.fromkeys(c.run.loggers) if c.run.loggers.count(name) > 1]
    if twice:
        yield Problem("run.loggers", f"{', '.join(twice)}: named twice")


def _measures(c: Config) -> Iterator[Problem]:
    """Measures that `eval.every` names and that this config has no data for. Of k-NN eval/preflight.py says it, which has
    the shards."""
    for name in c.eval.measures if c.eval.names_measures else ():
        key = f"eval.every.{name}"
        if name != "knn" and c.eval.voc is None:
            yield Problem(key, "needs scenes: eval.voc=FOLDER, in Pascal VOC's layout", ("eval.voc",))
        if name == "points" and c.method in METHODS and not METHODS[c.method].uses_points:
            yield Problem(key, f"method: {c.method} has no reference tokens that could be asked", ("method",))


def check_training(c: Config, processes: int) -> Iterator[Problem]:
    """What is wrong with a config that this many processes are going to train with."""
    if c.data.shards is None:
        text = "which shards? `make pretrain SHARDS=folder`, made by `make shards SRC=photos/ DST=folder`"
        yield Problem("data.shards", text)
    batch, pieces = c.optim.global_batch_size, processes * c.speed.grad_accum_steps
    if processes > 1 and batch % pieces:
        text = (
            f"{batch} is not divisible by {processes} processes x speed.grad_accum_steps: {c.speed.grad_accum_steps}"
            f" (nearest: {_nearest(batch, pieces)})"
        )
        yield Problem("optim.global_batch_size", text, ("speed.grad_accum_steps",))
    if c.method in CLUSTERING and c.clustering.queue % processes:
        text = (
            f"{c.clustering.queue} is not divisible by {processes} processes "
            f"(nearest: {_nearest(c.clustering.queue, processes)})"
        )
        yield Problem("clustering.queue", text)
    if c.eval.temperature < MIN_TEMPERATURE:
        text = f"{c.eval.temperature:g} lets a vote of k-NN overflow float32 (at least {MIN_TEMPERATURE:g})"
        yield Problem("eval.temperature", text)
    yield from _measures(c)
    for name in c.run.loggers:
        if name in ("wandb", "mlflow") and not find_spec(name):
            text = f"{name} is not installed: `{sys.executable} -m pip install {name}`"
            yield Problem("run.loggers", text)
    run = Path(c.run.folder or "run").resolve()
    several = isinstance(c.data.shards, list)
    shards = {f"data.shards.{i}" if several else "data.shards": s.path for i, s in enumerate(c.data.sources) if s.path}
    for key, place in {**shards, "data.val": c.data.val, "eval.voc": c.eval.voc}.items():
        if not is_path(place) or "\0" in place + os.fspath(run):
            continue
        folder = Path(place).resolve()
        if folder in (run, *run.parents):
            where = "is" if folder == run else "is inside"
            text = f"{c.run.folder} {where} {key}: {place}. A run needs a folder of its own"
            yield Problem("run.folder", text, (key,))
        elif problem := missing(place):
            without = "; eval.voc=null trains without scenes" if key == "eval.voc" else ""
            if key in shards and (weighted := _with_weight(place)):
                path, weight = weighted
                without = f"; a weight is given by data.shards='[{{path: {path}, weight: {weight}}}, …]'"
            yield Problem(key, f"{place}: {problem}{without}")


def is_path(place: str | None) -> TypeGuard[str]:
    """Whether the value of one of PLACES is a path, and not an address or timm:NAME."""
    return place is not None and "://" not in place and not place.startswith(TIMM)


def split_places(text: str) -> list[str]:
    """The folders or addresses that SHARDS='a b' names: one, if there is a folder of this name, blanks and all, or if there
    is none by any of the words; else one by each word, quoted as in a shell if it has blanks."""
    try:
        words = shlex.split(text)
    except ValueError:  # a quotation mark that is part of a name
        return [text]
    known = any("://" in word or os.path.exists(word) or _with_weight(word) for word in words)
    return words if known and not os.path.exists(text) else [text]


def _with_weight(place: str) -> tuple[str, str] | None:
    """(path, weight) of a word path:2, if there is such a path; None otherwise. Only a message takes it so."""
    path, _, weight = place.rpartition(":")
    return (path, weight) if re.fullmatch(r"[0-9.]+", weight) and os.path.exists(path) else None


def shards_word(text: str) -> str:
    """The word `data.shards=…` for SHARDS=text. In JSON, which is YAML too: a folder 2026, or a: b, stays text."""
    places = split_places(text)
    return f"data.shards={json.dumps(places if len(places) > 1 else text, ensure_ascii=False)}"


def missing(place: str, what: str = "folder") -> str:
    """What is wrong with a path where nothing is, with the nearest name; "" if it exists, or is a pattern of names."""
    if os.path.exists(place) or re.search(r"[*?\[{]", place):
        return ""
    painted = "; `make scenes` paints it" if Path(place).parts[:2] == ("data", "scenes") else ""
    return f"no such {what}{suggest_path(place)}{painted}"
