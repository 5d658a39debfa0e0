"""The Plan: which samples make global step i, for any number of processes."""

import math

import numpy as np
from numpy.typing import NDArray

from pipeline.random import hash64, permute
from pipeline.shards import Shards
from runtime.errors import UserError

SAME_SHARD_TRIES = 10  # replacements of a damaged sample that come from its own shard; later ones come from any shard
MAX_TRIES = 100  # samples tried in all; a data set with so many damaged samples in a row is unusable


class Plan:
    """Which samples make global step i: a pure function of (seed, step), for any number of processes.

    An epoch permutes the shards and the samples of each shard, and lays them end to end. Position p of this sequence
    belongs to stream p mod `streams`; all streams have the same length, give or take one sample. A stream shuffles its
    samples inside windows of `shuffle_shards` shards' worth of samples, and reads one window after the other. So an epoch
    covers every sample once (less than one global batch is left over, other samples each time), a process that reads whole
    streams reads long parts of few shards, and no list as long as the data set is ever made.

    batch: images of a global step, all processes together. holdout: share of each shard's samples that no step ever uses,
    the same samples in all epochs (`held_out`). Raises UserError if the samples are fewer than one global batch.
    """

    def __init__(
        self, shards: Shards, *, batch: int, seed: int, holdout: float = 0.0, streams: int = 64, shuffle_shards: int = 4
    ):
        self.seed, self.batch, self.streams = seed, batch, streams
        self._starts, self._counts = shards.starts, shards.counts
        self._held_out = np.round(holdout * shards.counts).astype(np.int64)  # [S] samples of each shard
        self._trained = shards.counts - self._held_out  # [S]
        self.samples = int(self._trained.sum())
        self.steps_per_epoch = self.samples // batch
        if self.steps_per_epoch == 0:
            raise UserError(
                f"{shards.folder}: {self.samples} samples to train on (of {len(shards)}) are fewer than one "
                f"global batch of {batch}; take a smaller optim.global_batch_size or more photos"
            )
        self._ends = np.cumsum(self._trained)  # [S]
        self._window = max(1, shuffle_shards * self.samples // max(1, int((self._trained > 0).sum())))
        self._orders: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def samples_of(self, step: int, rank: int = 0, world_size: int = 1) -> NDArray[np.int64]:
        """Sample ids of this process's slice of a global step: [batch / world_size], which has to be an integer."""
        epoch, within = divmod(step, self.steps_per_epoch)
        position = within * self.batch + np.arange(rank, self.batch, world_size)
        stream, slot = position % self.streams, position // self.streams
        window = slot // self._window
        start, size = self._bounds(stream, window)
        # The words of a key ("run" here: a shuffle window) are part of the plan: other words give another order
        key = hash64(self.seed, epoch, "run", stream, window)
        return self._sample_at(epoch, start + permute(slot % self._window, size, key))

    def held_out(self) -> NDArray[np.int64]:
        """Sample ids that no step uses, in ascending order."""
        shard = np.repeat(np.arange(len(self._counts)), self._held_out)
        within = np.arange(len(shard)) - np.repeat(np.cumsum(self._held_out) - self._held_out, self._held_out)
        return np.sort(self._sample_id(shard, within))

    def replacement_id(self, sample: int, step: int, attempt: int) -> int:
        """The sample that is read instead of a damaged one; the same in every process. It is of the same shard, whose data
        this machine already has, and of any shard after SAME_SHARD_TRIES attempts. attempt: 1, 2, ..."""
        draw = int(hash64(self.seed, self.epoch(step), "replacement", sample, attempt))
        if attempt <= SAME_SHARD_TRIES:
            shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
            within = draw % int(self._trained[shard])
        else:
            position = draw % self.samples
            shard = int(np.searchsorted(self._ends, position, side="right"))
            within = position - int(self._ends[shard] - self._trained[shard])
        return int(self._sample_id(np.array([shard]), np.array([self._held_out[shard] + within]))[0])

    def read_valid(self, shards: Shards, sample: int, step: int, attempt: int = 0) -> tuple[int, bytes]:
        """(id of the sample that was read, its bytes): the planned sample, or the first valid one of its replacements.

        attempt: where to begin (0: the planned sample). Raises UserError after MAX_TRIES attempts.
        """
        read = sample
        for n in range(attempt, MAX_TRIES):
            read = self.replacement_id(sample, step, n) if n else sample
            photo = shards.read(read)
            if shards.is_valid(read, photo):
                return read, photo
        damage = shards.describe(read)
        made_from = f" (made from {damage['source']})" if damage["source"] else ""
        raise UserError(
            f"{shards.folder}: {MAX_TRIES} samples in a row are damaged, the last one in {damage['shard']} at byte "
            f"{damage['byte']}{made_from}: {damage['why']}; `make verify DST={shards.folder}` checks every sample"
        )

    def prefetch(self, shards: Shards, step: int, rank: int = 0, world_size: int = 1) -> None:
        """Download the shards of this process's next steps in the background, if they are remote. Raises UserError if the
        cache is too small for them."""
        if shards.is_remote:
            current, upcoming = self.shards_ahead(step, rank, world_size)
            # processes r and r + gcd(streams, world_size) read the same streams
            shards.prefetch(current, upcoming, distinct_ranks=math.gcd(self.streams, world_size))

    def shards_ahead(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[list[int], list[int]]:
        """(shards of the windows that this process's streams are in at a step, shards of the windows after those), in the
        order in which they are read."""
        epoch, within = divmod(step, self.steps_per_epoch)
        share, round_size = (
            math.gcd(self.streams, world_size),
            self.streams * self._window,
        )  # samples of a window of all streams
        stream = np.arange(rank % share, self.streams, share)
        first, last = within * self.batch // round_size, ((within + 1) * self.batch - 1) // round_size
        current = [shard for window in range(first, last + 1) for shard in self._shards_of(epoch, stream, window)]
        following = (epoch, last + 1) if (last + 1) * round_size < self.samples else (epoch + 1, 0)
        return list(dict.fromkeys(current)), self._shards_of(following[0], stream, following[1])

    def _bounds(
        self, stream: NDArray[np.int64], window: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(position in the epoch's sequence, samples) of windows of streams. The first (samples mod streams) streams are
        one sample longer than the others."""
        length, longer = divmod(self.samples, self.streams)
        start = stream * length + np.minimum(stream, longer)
        return start + window * self._window, np.minimum(
            self._window, length + (stream < longer) - window * self._window
        )

    def _order(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(the epoch's order of the shards, where each one ends in the epoch's sequence)."""
        if epoch not in self._orders:
            order = np.argsort(hash64(self.seed, epoch, "shard", np.arange(len(self._counts))), kind="stable")
            if len(self._orders) > 1:  # this epoch and the next
                self._orders.pop(next(iter(self._orders)))
            self._orders[epoch] = order, np.cumsum(self._trained[order])
        return self._orders[epoch]

    def _shards_of(self, epoch: int, stream: NDArray[np.int64], window: int) -> list[int]:
        """Shards of one window of each of these streams: the first shard of every stream, then the second, ...; each shard
        once."""
        order, ends = self._order(epoch)
        start, size = self._bounds(stream, np.full_like(stream, window))
        first, last = (np.searchsorted(ends, at, side="right") for at in (start, start + size - 1))
        turn = first[None] + np.arange(1 + max(0, int((last - first).max())))[:, None]
        return list(dict.fromkeys(order[turn[(turn <= last) & (size > 0)]].tolist()))

    def _sample_at(self, epoch: int, position: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample ids at positions of the epoch's sequence."""
        order, ends = self._order(epoch)
        turn = np.searchsorted(ends, position, side="right")
        shard = order[turn]
        within = position - (ends[turn] - self._trained[shard])
        within = permute(within, self._trained[shard], hash64(self.seed, epoch, "sample", shard))
        return self._sample_id(shard, self._held_out[shard] + within)

    def _sample_id(self, shard: NDArray[np.int64], within: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample ids of positions in a fixed permutation of each shard; the first `_held_out[shard]` are held out."""
        return self._starts[shard] + permute(within, self._counts[shard], hash64(self.seed, "holdout", shard))
