"""Draws inside a step, on the device: a function of seed, step and sample id alone, so a step in pieces, or on several
processes, draws what the whole step would. For drop path, and for the rows of a queue.
"""

import torch
from torch import Tensor

from pipeline.random import hash64


def _signed(word: int) -> int:
    """A number modulo 2^64, as torch's int64 holds it."""
    return (word + (1 << 63)) % (1 << 64) - (1 << 63)


_GOLDEN, _MIX1, _MIX2 = (_signed(w) for w in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: torch's own repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def draw(seed: int, step: int, ids: Tensor, shape: tuple[int, ...], purpose: str = "drop path") -> Tensor:
    """float32 [n, *shape] in [0, 1) for images of these sample ids [n], made on their device.

    The numbers of `pipeline.random.uniform(seed, purpose, step, ids, shape=shape)`, rounded down to 24 bits.
    """
    words = _signed(int(hash64(seed, purpose, step)) + _GOLDEN)
    key = _mix(_mix(ids ^ words) ^ _GOLDEN)
    counter = torch.arange(torch.Size(shape).numel(), device=ids.device).view(shape)
    h = _mix((key.view(-1, *[1] * len(shape)) + _GOLDEN) ^ counter)
    return _shift(h, 40).float() * 2.0**-24
