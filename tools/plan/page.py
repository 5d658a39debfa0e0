"""A plan as lines of text."""

import shlex
from dataclasses import dataclass

from model.memory import Memory
from runtime.cards import CARDS
from runtime.config import Config
from runtime.errors import UserError
from runtime.methods import accumulates
from tools.plan import photos as about_photos
from tools.plan import recipe
from tools.plan.counted import Counted, memory_key
from tools.plan.hours import RESERVE, SHARE_SOURCE, Device, speed
from tools.plan.photos import Photos

PIECES = (1, 2, 4, 8)


@dataclass
class Plan:
    """All that a plan is made of. values: those that differ from the config's file; words: the user's own."""

    name: str
    why: str
    values: list[recipe.Value]
    words: list[str]
    config: Config
    photos: Photos
    device: Device | None
    gpus: int
    counted: Counted
    shard_mb: float

    @property
    def kind(self) -> str:
        return self.device.kind if self.device else "cuda"

    @property
    def dtype(self) -> str:
        given = self.config.speed.precision
        return given if given != "auto" else "bfloat16" if self.kind == "cuda" else "float32"

    @property
    def trained(self) -> int:
        """Photos that are trained on: without data.val some are held out."""
        return round(self.photos.count * (1 - (0 if self.config.data.val else self.config.data.holdout)))

    @property
    def steps(self) -> int:
        return self.config.steps(self.trained // self.config.optim.global_batch_size)

    def check(self) -> None:
        """Raise UserError where the photos or devices do not fit the config."""
        batch = self.config.optim.global_batch_size
        if self.trained < batch:
            held = f", {self.photos.count - self.trained} of them held out" if self.trained < self.photos.count else ""
            raise UserError(
                f"{self.photos.count:,} photos{held}: a step of {self.name} takes {batch} (optim.global_batch_size)"
            )
        if batch % self.gpus:
            nearest = max(1, round(batch / self.gpus)) * self.gpus
            raise UserError(f"GPUS={self.gpus}: {batch} images of a step are not divisible by it (optim.global_batch_size={nearest})")
        if self.kind == "cpu" and self.gpus > 1:
            raise UserError(f"GPUS={self.gpus}: with GPU=cpu there is one device")

    # ------------------------------------------------------------------------------------------------------- lines

    def lines(self) -> list[str]:
        where = f"{self.gpus} x {self.device.word}" if self.device else "any GPU"
        rate = self._rates()[0][1] if self.device and self._rates() else None
        return [
            f"{self.photos.count:,} photos on {where}, {self.dtype}",
            f"config       {self.name}: {self.why}",
            *self._recipe(), *self._memory(), *self._hours(),
            *about_photos.describe(self.photos, self.config, rate, self.shard_mb),
            *self._advice(), *self._commands(),
        ]  # fmt: skip

    def _recipe(self) -> list[str]:
        o = self.config.optim
        lines = [f"             {word:44} {v.why}" for word, v in zip(recipe.words(self.values), self.values, strict=True)]
        peak = o.lr * o.global_batch_size / 256
        return [
            *lines,
            f"rate         {peak:.2g} = optim.lr {o.lr:g} x {o.global_batch_size} / 256 (linear rule: Goyal et al. 2017; DINO)",
            f"length       {o.epochs:g} epochs of {self.trained // o.global_batch_size:,} steps: {self.steps:,} steps, "
            f"{_million(self.steps * o.global_batch_size)} images",
        ]  # fmt: skip

    def peak(self, pieces: int, checkpointing: bool) -> int:
        """Bytes of tensors on one device."""
        memory = Memory(**self.counted.memory[memory_key(self.kind, self.dtype, checkpointing)])
        return memory.peak(self.config.optim.global_batch_size // self.gpus, pieces, self.gpus)

    def choices(self) -> list[tuple[int, bool]]:
        """(pieces, checkpointing) that the config allows, the cheapest first."""
        images, c = self.config.optim.global_batch_size // self.gpus, self.config
        several = c.head.norm != "batch" and accumulates(c.method)
        pieces = [n for n in PIECES if images % n == 0 and (n == 1 or several)]
        return [(n, False) for n in pieces] + [(n, True) for n in pieces]

    def _memory(self) -> list[str]:
        images, choices = self.config.optim.global_batch_size // self.gpus, self.choices()
        lines = [f"memory       GiB of tensors on each device, {images} images of a step, by speed.grad_accum_steps"]
        lines.append(" " * 13 + " " * 34 + "".join(f"{n:>9}" for n, checkpointing in choices if not checkpointing))
        for checkpointing in (False, True):
            row = [f"{self.peak(n, c) / 2**30:9.2f}" for n, c in choices if c == checkpointing]
            lines.append(f"             {'speed.activation_checkpointing' if checkpointing else 'as it is':34}{''.join(row)}")
        if self.kind == "cpu":
            lines.append("             and about 0.9 GiB of the process itself: torch and what it loads")
            return lines
        fits = [(d, self._fit(d)) for d in self._memories()]
        for memory, fit in fits:
            lines.append(f"             {memory:>4} GB  {self._cards_of(memory):44} {fit}")
        lines.append(f"             ({100 * RESERVE:.0f} % of a card is left for CUDA itself and its allocator: our choice, not measured)")
        return lines

    def _memories(self) -> list[int]:
        if self.device:
            return [int(self.device.memory)]
        return sorted({card.memory for card in CARDS})

    def _cards_of(self, memory: int) -> str:
        cards = self.device.cards if self.device else [card for card in CARDS if card.memory == memory]
        return ", ".join(card.name for card in cards)

    def _fit(self, memory: int) -> str:
        usable = memory * (1 - RESERVE) * 2**30
        for pieces, checkpointing in self.choices():
            if self.peak(pieces, checkpointing) <= usable:
                return "fits with " + " ".join(_speed_words(pieces, checkpointing)) if pieces > 1 or checkpointing else "fits"
        return "does not fit: a smaller optim.global_batch_size, a smaller network, or more devices"

    def _rates(self) -> list[tuple[str, float, str]]:
        """(card, images per second of all devices, where that comes from) of each card that may be meant."""
        gflop = self.counted.flops / 1e9
        if self.kind == "cpu":
            found = speed(None, gflop, self.dtype)
            return [("CPU", found.images_per_second, found.source)]
        cards = self.device.cards if self.device else CARDS
        found_all = [(card.name, speed(card, gflop, self.dtype)) for card in cards]
        return [(name, self.gpus * s.images_per_second, s.source) for name, s in found_all]

    def _hours(self) -> list[str]:
        images, rates = self.steps * self.config.optim.global_batch_size, self._rates()
        lines = [f"arithmetic   {self.counted.flops / 1e9:.3g} GFLOP for an image of a step, forward and backward"]
        if not rates:
            return [*lines, f"hours        not known: no card of {self.device.memory:g} GB is on the list" if self.device else ""]
        for i, (name, rate, source) in enumerate(rates):
            many = f"{self.gpus} x " if self.gpus > 1 else ""
            lines.append(
                f"{'hours' if not i else '':12} {hours(images / rate):>12} on {many}{name}, {_count(rate)} images/s"
                + ("" if source == "estimate" else f" ({source})")
            )
        if any(source == "estimate" for *_, source in rates):
            lines.append(f"             estimates, no GPU was measured: {SHARE_SOURCE}")
        if self.gpus > 1:
            lines.append("             devices are assumed to add up")
        return lines

    def hours_line(self) -> str:
        """For the head of a written config."""
        images, rates = self.steps * self.config.optim.global_batch_size, self._rates()
        shown = [r for r in rates if r[0] in ("H100", "A100", "RTX 4090")] if not self.device else rates
        parts = [f"{hours(images / rate)} on {self.gpus} x {name}" for name, rate, _ in shown]
        return ", ".join(parts) + ": `make plan`'s estimate" if parts else "not known"

    def _advice(self) -> list[str]:
        if self.name == recipe.SMALL_CONFIG:
            return [
                f"weights      photos like those of the web learn faster from published weights: CONFIG={recipe.CONTINUE_CONFIG} "
                "(docs/howto/which-config.md)"
            ]  # fmt: skip
        if self.name == recipe.CONTINUE_CONFIG and self.photos.count < recipe.FEW:
            return ["weights      published features may already do: make features RUN=timm:vit_small_patch14_dinov2.lvd142m SRC=photos/ OUT=features"]
        return []

    def _commands(self) -> list[str]:
        words = [*recipe.words(self.values), *self.words]
        if self.device and self.kind == "cuda":
            fit = next((c for c in self.choices() if self.peak(*c) <= self.device.usable), None)
            words += _speed_words(*fit) if fit else []
        args = f" ARGS={shlex.quote(' '.join(words))}" if words else ""
        gpus = f" GPUS={self.gpus}" if self.gpus > 1 else ""
        return [f"start        make pretrain CONFIG={self.name} SHARDS=data/mine{gpus}{args}"]


def _speed_words(pieces: int, checkpointing: bool) -> list[str]:
    return [f"speed.grad_accum_steps={pieces}"] * (pieces > 1) + ["speed.activation_checkpointing=true"] * checkpointing


def hours(seconds: float) -> str:
    """A length of time, to two digits."""
    if seconds < 5400:
        return f"{max(1, round(seconds / 60))} minutes"
    value, unit = (seconds / 3600, "hours") if seconds < 72 * 3600 else (seconds / 86400, "days")
    return f"{_count(value)} {unit}"


def _count(x: float) -> str:
    """A number to two digits, at least."""
    return f"{x:,.0f}" if x >= 10 else f"{x:.1f}" if x >= 1 else f"{x:.2g}"


def _million(n: int) -> str:
    return f"{n / 1e6:.3g} million" if n >= 1e6 else f"{n:,}"

