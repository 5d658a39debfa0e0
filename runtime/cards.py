"""GPUs: memory, and the peaks that NVIDIA states for dense products. Imports nothing heavy.

bfloat16 with sums in float32, and TF32, without sparsity: data sheets often print twice as much, with sparsity. Sources: the
data sheets of B200 (HGX), H200, H100, A100, L40S, L4, A10, RTX 6000 Ada and A6000; the architecture papers of Blackwell
(RTX 5090), Ada (RTX 40) and Ampere GA102 (RTX 30). Those of A100, H100 PCIe and RTX 4090 were compared with pages
of specifications in 2026-11; the others are as they are generally quoted.
"""

import re
from typing import NamedTuple


class Card(NamedTuple):
    """A GPU as its maker describes it."""

    name: str
    memory: int  # GB, as sold
    bfloat16: float  # TFLOP/s
    tf32: float


CARDS = (
    Card("B200", 180, 2250, 1125),
    Card("H200", 141, 989, 494),
    Card("H100 PCIe", 80, 756, 378),
    Card("H100", 80, 989, 494),
    Card("A100 40GB", 40, 312, 156),
    Card("A100", 80, 312, 156),
    Card("L40S", 48, 362, 183),
    Card("RTX 6000 Ada", 48, 364, 182),
    Card("RTX A6000", 48, 155, 77),
    Card("RTX 5090", 32, 209, 105),
    Card("RTX 4090", 24, 165, 83),
    Card("RTX 3090", 24, 71, 36),
    Card("A10", 24, 125, 62),
    Card("L4", 24, 121, 60),
    Card("RTX 4080", 16, 97, 49),
)


def card_of(device_name: str) -> Card | None:
    """The card that a driver names, such as "NVIDIA A100-SXM4-40GB"; None if it is not on the list."""
    words = set(_words(device_name))
    return next((card for card in CARDS if words.issuperset(_words(card.name))), None)


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", name.lower())
