"""A plan as lines of text."""

import re
import shlex
from dataclasses import dataclass

from model.memory import Memory
from runtime.cards import CARDS, Card
from runtime.config import Config
from runtime.errors import UserError, plural
from runtime.methods import accumulates
from tools.plan import recipe
from tools.plan.counted import Counted, memory_key
from tools.plan.hours import RESERVE, SHARE_SOURCE, Device, Speed, speed
from tools.plan.photos import Photos, describe

PIECES = (1, 2, 4, 8)
PROCESS = 0.9  # GiB of a process on a CPU without tensors: torch and what it loads (docs/howto/memory.md)
PLAIN = re.compile(r"[\w@%+=:,./\[\]-]+")  # words that a shell leaves alone
SMALL = 20e9  # FLOPs of an image, well below a ViT-S (130e9): the published share is not that of such a network
SHOWN = ("H100", "A100", "RTX 4090")  # in a written config, if no card was named
NO_WEIGHTS = f"published weights learn faster on photos like those of the web: CONFIG={recipe.CONTINUE_CONFIG}"
NO_TRAINING = (
    "published features may do already: make features RUN=timm:vit_small_patch14_dinov2.lvd142m SRC=photos/ OUT=…"
)


@dataclass
class Plan:
    """All that a plan is made of. name: the config's file; values: those that differ from it; words: the user's own."""

    name: str
    why: str
    values: list[recipe.Value]
    words: list[str]
    config: Config
    photos: Photos
    device: Device | None  # None: any GPU
    gpus: int
    counted: Counted
    shard_mb: float
    place: str  # of the shards, for commands

    def __post_init__(self) -> None:
        """Raises UserError where the photos or devices do not fit the config."""
        held = self.config.data.holdout if not self.config.data.val else 0
        self.trained, self.batch = round(self.photos.images * (1 - held)), self.config.optim.global_batch_size
        self.per_epoch = self.trained // self.batch
        self.kind = self.device.kind if self.device else "cuda"
        self.dtype = precision(self.config, self.kind)
        self.many = f"{self.gpus} x " if self.gpus > 1 else ""
        if not self.per_epoch:
            left = f", of which {self.trained} are trained on (data.holdout)" if held else ""
            raise UserError(
                f"{self.photos.images:,} photos{left}: a step of {self.name} takes {self.batch}; "
                f"optim.global_batch_size={max(1, self.trained // 4)} makes four steps an epoch"
            )
        if self.kind == "cpu" and self.gpus > 1:
            raise UserError(f"GPUS={self.gpus}: with GPU=cpu there is one device")
        if self.batch % self.gpus:
            near = max(1, round(self.batch / self.gpus)) * self.gpus
            raise UserError(
                f"GPUS={self.gpus}: a step of {self.batch} images cannot be divided by it; nearest: "
                f"optim.global_batch_size={near}"
            )
        steps = self.config.steps(self.per_epoch)
        self.steps, self.images = steps, steps * self.batch
        self.choices = self._choices()

    def lines(self) -> list[str]:
        speeds, where = self._speeds(), self.many + (self.device.word if self.device else "any GPU")
        rate = speeds[0][1].images_per_second if self.device and speeds else None
        advice = NO_WEIGHTS if self.name == recipe.SMALL_CONFIG else ""
        if self.photos.images < recipe.FEW and self.kind != "cpu":
            advice = NO_TRAINING
        return [
            f"{plural(self.photos.images, 'photo')} on {where}, {self.dtype}",
            line("config", f"{self.name}: {self.why}"),
            *self._recipe(), *self._memory(), *self._hours(speeds),
            *(line(*pair) for pair in describe(self.photos, self.config, rate, self.shard_mb)),
            *([line("weights", advice)] if advice else []),
            line("start", self._command()),
        ]  # fmt: skip

    def _recipe(self) -> list[str]:
        o = self.config.optim
        rate = f"{o.lr * self.batch / 256:.2g} = optim.lr {o.lr:g} x {self.batch} / 256 (linear rule: Goyal 2017, DINO)"
        length = f"{o.epochs:g} epochs of {self.per_epoch:,}, {_million(self.images)} images seen"
        return [
            *(line("", f"{word:44} {v.why}") for word, v in zip(recipe.words(self.values), self.values, strict=True)),
            line("rate", rate),
            line("steps", f"{self.steps:,}: {length}"),
        ]

    # ------------------------------------------------------------------------------------------------------ memory

    def peak(self, pieces: int, checkpointing: bool) -> int:
        """Bytes of tensors on one device."""
        memory = Memory(**self.counted.memory[memory_key(self.kind, self.dtype, checkpointing)])
        return memory.peak(self.batch // self.gpus, pieces, self.gpus)

    def _choices(self) -> list[tuple[int, bool]]:
        """(pieces, checkpointing) that the config allows, the cheapest first."""
        several = self.config.head.norm != "batch" and accumulates(self.config.method)
        pieces = [n for n in PIECES if n == 1 or (several and self.batch // self.gpus % n == 0)]
        return [(n, False) for n in pieces] + [(n, True) for n in pieces]

    def _fitting(self, memory: float) -> tuple[int, bool] | None:
        """The cheapest choice whose tensors fit into so many GB of a card."""
        usable = memory * (1 - RESERVE) * 2**30
        return next((choice for choice in self.choices if self.peak(*choice) <= usable), None)

    def fitting_words(self) -> list[str]:
        """The overrides with which it fits the card that was named."""
        return speed_words(self._fitting(self.device.memory) if self.device and self.kind == "cuda" else None)

    def _memory(self) -> list[str]:
        title = f"GiB of tensors on each device, {plural(self.batch // self.gpus, 'image')} of a step, not compiled"
        head = "".join(f"{n:9}" for n, checkpointing in self.choices if not checkpointing)
        lines = [line("memory", title), line("", f"{'speed.grad_accum_steps':36}{head}")]
        for name, checkpointing in (("as it is", False), ("speed.activation_checkpointing=true", True)):
            row = "".join(f"{self.peak(n, c) / 2**30:9.2f}" for n, c in self.choices if c == checkpointing)
            lines.append(line("", f"{name:36}{row}"))
        if self.kind == "cpu":
            return [*lines, line("", f"and {PROCESS} GiB of the process itself: torch and what it loads")]
        for memory in [self.device.memory] if self.device else sorted({card.memory for card in CARDS}):
            cards = self.device.cards if self.device else [card for card in CARDS if card.memory == memory]
            choice = self._fitting(memory)
            fits = " ".join(["fits", *(["with"] if choice != (1, False) else []), *speed_words(choice)]) if choice else (
                "does not fit: more devices, a smaller network or optim.global_batch_size"
            )  # fmt: skip
            lines.append(line("", f"{memory:4g} GB {', '.join(card.name for card in cards):34} {fits}"))
        left = f"({100 * RESERVE:.0f} % of a card is left to CUDA and its allocator: our choice, not measured)"
        return [*lines, line("", left)]

    # ------------------------------------------------------------------------------------------------------- hours

    def _speeds(self) -> list[tuple[str, Speed]]:
        """The speed of all devices together, for each card that may be meant."""
        cards: tuple[Card | None, ...] = (
            (self.device.cards if self.device else CARDS) if self.kind == "cuda" else (None,)
        )
        speeds = [(card, speed(card, self.counted.flops / 1e9, self.dtype)) for card in cards]
        return [
            (c.name if c else "a CPU", s._replace(images_per_second=self.gpus * s.images_per_second)) for c, s in speeds
        ]

    def _hours(self, speeds: list[tuple[str, Speed]]) -> list[str]:
        arithmetic = f"{self.counted.flops / 1e9:.3g} GFLOP for an image of a step, forward and backward"
        lines = [line("arithmetic", arithmetic)]
        for name, s in speeds:
            measured = f" ({s.source})" if s.source else ""
            rate = f"{_count(s.images_per_second)} images/s"
            label = "hours" if len(lines) == 1 else ""
            lines.append(
                line(label, f"{_time(self.images / s.images_per_second):>12} on {self.many}{name}, {rate}{measured}")
            )
        if not speeds:
            lines.append(
                line("hours", f"not known: no card of this memory is on the list; GPU={CARDS[-1].name} names one")
            )
        elif not all(s.source for _, s in speeds):
            lines.append(line("", f"estimates, no GPU was measured: {SHARE_SOURCE}"))
            if self.counted.flops < SMALL:
                lines.append(line("", "a network so small reaches less, and decoding may be slower than the step"))
        if self.gpus > 1:
            lines.append(line("", "devices are assumed to add up"))
        return lines

    def hours_text(self) -> str:
        """For the head of a written config."""
        shown = [(name, s) for name, s in self._speeds() if self.device or name in SHOWN]
        parts = [f"{_time(self.images / s.images_per_second)} on {self.many}{name}" for name, s in shown]
        return f"{', '.join(parts)}, estimated by `make plan`" if parts else "not known"

    def _command(self) -> str:
        words = [*recipe.words(self.values), *self.words, *self.fitting_words()]
        args = [f"ARGS={shlex.quote(' '.join(word if PLAIN.fullmatch(word) else shlex.quote(word) for word in words))}"]
        gpus = [f"GPUS={self.gpus}"] * (self.gpus > 1)
        return " ".join(
            ["make pretrain", f"CONFIG={self.name}", f"SHARDS={self.place}", *gpus, *(args if words else [])]
        )


def precision(config: Config, kind: str) -> str:
    """What speed.precision means on a device of this kind."""
    given = config.speed.precision
    return given if given != "auto" else "bfloat16" if kind == "cuda" else "float32"


def line(label: str, text: str) -> str:
    return f"{label:13}{text}"


def speed_words(choice: tuple[int, bool] | None) -> list[str]:
    """The overrides of (pieces, checkpointing)."""
    pieces, checkpointing = choice or (1, False)
    return [f"speed.grad_accum_steps={pieces}"] * (pieces > 1) + ["speed.activation_checkpointing=true"] * checkpointing


def _time(seconds: float) -> str:
    """Minutes, hours or days, to two digits."""
    if seconds < 5400:
        return plural(max(1, round(seconds / 60)), "minute")
    return f"{_count(seconds / 3600)} hours" if seconds < 72 * 3600 else f"{_count(seconds / 86400)} days"


def _count(x: float) -> str:
    """A number to two digits, at least."""
    return f"{x:,.0f}" if x >= 10 else f"{x:.1f}" if x >= 1 else f"{x:.2g}"


def _million(n: int) -> str:
    return f"{n / 1e6:.3g} million" if n >= 1e6 else f"{n:,}"
