"""What a config says that works but is seldom meant, in a line each, with the value that fits: printed before the first step
and by --dry-run."""

from collections.abc import Iterator, Sequence

from runtime.config import Config
from runtime.config.checks import CLUSTERING, PUSHED, QUEUES, TWO_VIEWS
from runtime.config.messages import flatten
from runtime.methods import METHODS, users


def notes(config: Config, steps_per_epoch: int, words: Sequence[str] = ()) -> list[str]:
    """The notes of a run that starts. words: its command line's `a.b=c`."""
    short, queue = _short_run(config, steps_per_epoch), _key_queue(config, steps_per_epoch)
    return [*_unused(config, words), *short, *queue, *_start(config)]


def _unused(config: Config, words: Sequence[str]) -> Iterator[str]:
    """Keys of other methods on the command line, unless they are given their default. A config file may have them: others
    are based on it."""
    if config.method not in METHODS:
        return
    values, defaults = flatten(config), flatten(Config())
    named = [word.partition("=")[0] for word in words]
    for key in dict.fromkeys(key for name in named for key in values if f"{key}.".startswith(f"{name}.")):
        others = users(key)
        if others and config.method not in others and values[key] != defaults[key]:
            yield f"{key} changes nothing: method: {config.method} does not use it (those that do: {', '.join(others)})"


def _short_run(config: Config, steps_per_epoch: int) -> Iterator[str]:
    """What takes up a short run, because its length in epochs was meant for a longer one."""
    o, loss = config.optim, config.loss
    steps = config.steps(steps_per_epoch)
    warmup, frozen = (round(epochs * steps_per_epoch) for epochs in (o.warmup_epochs, o.freeze_last_layer_epochs))
    tenth = f"{o.epochs / 10:g}"
    if warmup > steps / 2:
        rises = min(warmup, steps)
        yield f"the learning rate warms up in {rises} of {steps} steps; optim.warmup_epochs={tenth} takes a tenth"
    if frozen >= steps and config.method not in TWO_VIEWS:  # their heads have no prototypes
        yield (
            f"the heads' last layer is frozen in all {steps} steps; optim.freeze_last_layer_epochs={tenth} takes a tenth"
        )
    start, final = loss.teacher_temperature
    if start != final and loss.teacher_temperature_warmup >= o.epochs:
        fits = round(o.epochs / 10)
        yield f"the teacher's temperature never gets to {final:g}; loss.teacher_temperature_warmup={fits} does"
    yield from _cluster_queue(config, steps_per_epoch, steps)


def _cluster_queue(config: Config, steps_per_epoch: int, steps: int) -> Iterator[str]:
    """A queue of clustering is used from the step after the one that fills it."""
    c, batch = config.clustering, config.optim.global_batch_size
    if config.method not in CLUSTERING or not c.queue:
        return
    pushed = batch if config.method == "swav" else PUSHED * batch  # rows of a step
    fill = -(-c.queue // pushed)
    start, early = (round(e * steps_per_epoch) for e in (c.queue_start_epochs, config.optim.epochs / 10))
    if start + fill < steps:
        return
    words = []
    if start:
        words.append(f"clustering.queue_start_epochs={config.optim.epochs / 10:g}")
    if min(start, early) + fill >= steps:
        words.append(f"clustering.queue={max(0, steps // 2) * pushed}")
    yield (
        f"the queue is used in none of the {steps} steps: it starts after {start} steps, and {fill} fill its {c.queue:,} "
        f"rows; {' '.join(words)} uses it"
    )


def _key_queue(config: Config, steps_per_epoch: int) -> Iterator[str]:
    """With half an epoch in the queue, and any order of the next one equally likely, one image of eight meets its own old
    key."""
    queue, batch = config.contrast.queue, config.optim.global_batch_size
    images = steps_per_epoch * batch
    if config.method in QUEUES and queue > max(images // 2, batch):
        fits = max(1, images // 4 // batch) * batch
        yield (
            f"the queue has {queue:,} keys and an epoch {images:,} images: many images meet their own older key as a "
            f"negative; contrast.queue={fits} is at most a fourth"
        )


def _start(config: Config) -> Iterator[str]:
    if config.method == "leopart" and config.model.init is None and config.clustering.mask != "all":
        mask = config.clustering.mask
        yield (
            f"method: leopart starts from random weights: their [CLS] attends to no object, and the {mask} is made of its "
            "attention; model.init=runs/…/backbone.safetensors starts from a trained network, "
            "clustering.mask=all needs no attention"
        )
