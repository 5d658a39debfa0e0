"""The Order of one source: in which order its samples are read, pass after pass.

A *pass* covers every sample once. It permutes the shards and the samples of each shard, and lays them end to end.
Position p of a pass belongs to stream p mod `streams`; all streams have the same length, give or take one sample. A stream
shuffles its samples inside windows of `shuffle_shards` shards' worth of samples, and reads one window after the other. So
whoever reads whole streams reads long parts of few shards, and no list as long as the data set is ever made.

S shards · n positions or samples.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.random import hash64, permute

SAME_SHARD_TRIES = 10  # replacements of a damaged sample that come from its own shard; later ones come from any shard

At = tuple[int, int]  # (pass, position in it)


def held_out(shards: Any, *, seed: int, holdout: float) -> NDArray[np.int64]:
    """Ids of the samples that no step uses, in ascending order; of every source of a mixture, the same ones whatever it is
    mixed with. shards: Shards or a Mixture."""
    parts = zip(shards.parts, np.cumsum([0, *map(len, shards.parts)]), strict=False)
    return np.concatenate([first + Order(part, seed=seed, holdout=holdout).held_out() for part, first in parts])


def count_held_out(counts: NDArray[np.int64], holdout: float) -> NDArray[np.int64]:
    """How many samples of each shard no step uses: [S], of shards of `counts` samples [S]."""
    return np.round(holdout * counts).astype(np.int64)


class Order:
    """Samples of one source by (pass, position): a function of the seed and nothing else.

    shards: a folder or address. holdout: share of each shard's samples that no pass has, always the same samples
    (`held_out`). samples: of a pass.
    """

    def __init__(self, shards: Any, *, seed: int, holdout: float = 0.0, streams: int = 64, shuffle_shards: int = 4):
        self.seed, self.streams = seed, streams
        self._starts, self._counts = shards.starts, shards.counts
        self._held_out = count_held_out(shards.counts, holdout)  # [S] samples of each shard
        self._trained = shards.counts - self._held_out  # [S]
        self.samples = int(self._trained.sum())
        self._ends = np.cumsum(self._trained)  # [S]
        self._window = max(1, shuffle_shards * self.samples // max(1, int((self._trained > 0).sum())))
        self._orders: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def samples_at(self, number: NDArray[np.int64], position: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample ids [n] at positions [n] of the passes `number` [n]."""
        found = np.empty_like(position)
        for one in np.unique(number).tolist():  # of a step's samples one, or two where a pass ends in it
            mine = number == one
            found[mine] = self._samples_of(one, position[mine])
        return found

    def held_out(self) -> NDArray[np.int64]:
        """Sample ids that no pass has, in ascending order."""
        shard = np.repeat(np.arange(len(self._counts)), self._held_out)
        within = np.arange(len(shard)) - np.repeat(np.cumsum(self._held_out) - self._held_out, self._held_out)
        return np.sort(self._sample_id(shard, within))

    def replacement(self, sample: int, draw: int, attempt: int) -> int:
        """The sample that `draw`, a random number, puts in the place of a damaged one. It is of the same shard, whose data
        this machine already has, and of any shard after SAME_SHARD_TRIES attempts. attempt: 1, 2, ..."""
        if attempt <= SAME_SHARD_TRIES:
            shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
            within = draw % int(self._trained[shard])
        else:
            position = draw % self.samples
            shard = int(np.searchsorted(self._ends, position, side="right"))
            within = position - int(self._ends[shard] - self._trained[shard])
        return int(self._sample_id(np.array([shard]), np.array([self._held_out[shard] + within]))[0])

    def shards_ahead(self, first: At, last: At, stream: NDArray[np.int64]) -> tuple[list[int], list[int]]:
        """(shards of the windows that these streams are in from `first` to `last`, shards of the windows after those), in
        the order in which they are read."""
        round_size = self.streams * self._window  # samples of a window of all streams

        def after(number: int, window: int) -> At:
            return (number, window + 1) if (window + 1) * round_size < self.samples else (number + 1, 0)

        at, end = ((number, position // round_size) for number, position in (first, last))
        current = self._shards_of(*at, stream)
        while at < end:
            at = after(*at)
            current += self._shards_of(*at, stream)
        return list(dict.fromkeys(current)), self._shards_of(*after(*end), stream)

    def _samples_of(self, number: int, position: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample ids at positions of one pass."""
        stream, slot = position % self.streams, position // self.streams
        window = slot // self._window
        start, size = self._bounds(stream, window)
        # The words of a key ("run" here: a shuffle window) are part of the plan: other words give another order
        key = hash64(self.seed, number, "run", stream, window)
        return self._sample_at(number, start + permute(slot % self._window, size, key))

    def _bounds(
        self, stream: NDArray[np.int64], window: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(position in the pass's sequence, samples) of windows of streams. The first (samples mod streams) streams are one
        sample longer than the others."""
        length, longer = divmod(self.samples, self.streams)
        start = stream * length + np.minimum(stream, longer)
        return start + window * self._window, np.minimum(
            self._window, length + (stream < longer) - window * self._window
        )

    def _order(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(the pass's order of the shards, where each one ends in the pass's sequence)."""
        if number not in self._orders:
            order = np.argsort(hash64(self.seed, number, "shard", np.arange(len(self._counts))), kind="stable")
            if len(self._orders) > 1:  # this pass and the next
                self._orders.pop(next(iter(self._orders)))
            self._orders[number] = order, np.cumsum(self._trained[order])
        return self._orders[number]

    def _shards_of(self, number: int, window: int, stream: NDArray[np.int64]) -> list[int]:
        """Shards of one window of each of these streams: the first shard of every stream, then the second, ...; each shard
        once."""
        order, ends = self._order(number)
        start, size = self._bounds(stream, np.full_like(stream, window))
        first, last = (np.searchsorted(ends, at, side="right") for at in (start, start + size - 1))
        turn = first[None] + np.arange(1 + max(0, int((last - first).max())))[:, None]
        return list(dict.fromkeys(order[turn[(turn <= last) & (size > 0)]].tolist()))

    def _sample_at(self, number: int, position: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample ids at positions of a pass's sequence."""
        order, ends = self._order(number)
        turn = np.searchsorted(ends, position, side="right")
        shard = order[turn]
        within = position - (ends[turn] - self._trained[shard])
        within = permute(within, self._trained[shard], hash64(self.seed, number, "sample", shard))
        return self._sample_id(shard, self._held_out[shard] + within)

    def _sample_id(self, shard: NDArray[np.int64], within: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample ids of positions in a fixed permutation of each shard; the first `_held_out[shard]` are held out."""
        return self._starts[shard] + permute(within, self._counts[shard], hash64(self.seed, "holdout", shard))
