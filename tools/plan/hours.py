"""How fast a step will be: from the nearest measured row, or from counted arithmetic and a stated share of a card's peak.

The measured rows are docs/benchmarks.jsonl, a line for each: device, kind (cpu or cuda), dtype, images_per_second of one
device, gflop of an image. A row of another network is scaled by the counted arithmetic.
"""

import difflib
import json
import math
from pathlib import Path
from typing import NamedTuple

from runtime.cards import CARDS, Card, card_of
from runtime.errors import UserError

ROWS = Path(__file__).parents[2] / "docs" / "benchmarks.jsonl"
SHARE = 0.23  # of the peak, for a card without a row
SHARE_SOURCE = (
    "23 % of the maker's peak, published for a supervised ViT-S on an H100 (NVIDIA, nvSubquadratic, benchmarks: 22.9 %)"
)
RESERVE = 0.08  # of a card's memory, for CUDA itself and what its allocator cannot use: our choice


class Device(NamedTuple):
    """What to plan for: `cards` that may be meant (none: a CPU), each with `memory` GB."""

    word: str
    kind: str  # cuda or cpu
    memory: float  # GB; 0: that of the machine
    cards: tuple[Card, ...]


class Speed(NamedTuple):
    images_per_second: float
    source: str  # "": an estimate


def find_device(word: str) -> Device:
    """The device of GPU=word: a card's name in any spelling, a memory such as 24GB, or cpu. Raises UserError."""
    plain = _plain(word)
    if plain == "cpu":
        return Device("a CPU", "cpu", 0, ())
    if plain.endswith(("gb", "g")) and plain.rstrip("gb").isdecimal():
        memory = int(plain.rstrip("gb"))
        if memory < 1:
            raise UserError(f"GPU={word}: a card has more memory than that, for example GPU=24GB")
        return Device(f"a GPU of {memory} GB", "cuda", memory, tuple(c for c in CARDS if c.memory == memory))
    found = [c for c in CARDS if _plain(c.name) == plain] or [c for c in CARDS if plain and plain in _plain(c.name)]
    if len(found) != 1:
        if found:
            raise UserError(f"GPU={word}: is it {' or '.join(card.name for card in found)}?")
        known = {_plain(name): card.name for card in CARDS for name in (card.name, card.name.split()[-1])}
        close = difflib.get_close_matches(plain, known, 1, 0.5)
        near = f", did you mean '{known[close[0]]}'?" if close else "."
        names = ", ".join(card.name for card in CARDS)
        raise UserError(f"GPU={word}: not on the list{near} The list: {names}; or a memory, GPU=24GB; or cpu")
    return Device(found[0].name, "cuda", found[0].memory, (found[0],))


def _plain(word: str) -> str:
    return "".join(c for c in word.lower() if c.isalnum()).removeprefix("nvidia").removeprefix("geforce")


def speed(card: Card | None, gflop: float, dtype: str) -> Speed:
    """Images per second of one device, a CPU if card is None. gflop: of an image of a step, counted."""
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    fitting = [
        row for row in rows
        if row["dtype"] == dtype and (card_of(row["device"]) == card if card else row["kind"] == "cpu")
    ]  # fmt: skip
    if fitting:
        near = min(fitting, key=lambda row: abs(math.log(row["gflop"] / gflop)))
        source = f"measured {near['date']} on {near['device']}: {near['what']}, {near['images_per_second']:g} images/s"
        if abs(near["gflop"] / gflop - 1) > 0.02:
            source += f" of {near['gflop']:g} GFLOP, scaled to {gflop:.3g}"
        return Speed(near["images_per_second"] * near["gflop"] / gflop, source)
    assert card is not None  # there are rows of CPUs
    return Speed(SHARE * 1e3 * card.bfloat16 / gflop, "")
