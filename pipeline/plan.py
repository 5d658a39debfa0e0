"""The Plan: which samples make global step i, for any number of processes and of sources.

n samples of a step · S sources.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.mixture import AnyShards
from pipeline.order import Order, count_held_out
from pipeline.random import hash64, permute
from runtime.errors import UserError

MAX_TRIES = 100  # samples tried in all; a data set with so many damaged samples in a row is unusable


class Plan:
    """Which samples make global step i: a pure function of (seed, step), for any number of processes.

    An epoch has as many images as there are samples to train on, less than one global batch left out. Of one source it
    covers every sample once; other samples are left out each time. Of a mixture, each source gives its share of the epoch's
    images (`quotas`), spread evenly over the steps, in passes of its own (see Order): no sample comes again before all of
    its source have been seen, and a pass may begin in the middle of an epoch. Without weights the shares are those of the
    samples, so that every photo comes once an epoch.

    batch: images of a global step, all processes together. holdout: share of each shard's samples that no step ever uses,
    the same samples in all epochs (`held_out`). streams: of all sources together. Raises UserError if the samples are fewer
    than one global batch, or those of a source fewer than its share of one.
    """

    def __init__(
        self,
        shards: AnyShards,
        *,
        batch: int,
        seed: int,
        holdout: float = 0.0,
        streams: int = 64,
        shuffle_shards: int = 4,
    ):
        self.seed, self.batch = seed, batch
        self.firsts = np.cumsum([0, *map(len, shards.parts)])  # [S+1] first sample id of each source
        trained = [len(part) - int(count_held_out(part.counts, holdout).sum()) for part in shards.parts]
        self.samples = sum(trained)
        self.steps_per_epoch = self.samples // batch
        if self.steps_per_epoch == 0:
            raise UserError(
                f"{shards.folder}: {self.samples} samples to train on (of {len(shards)}) are fewer than one "
                f"global batch of {batch}; take a smaller optim.global_batch_size or more photos"
            )
        self.quotas = quotas(
            shards.weights or trained, self.steps_per_epoch * batch
        )  # images of each source in an epoch
        _check_shares([str(part.folder) for part in shards.parts], self.quotas, trained, batch)
        self.orders = [
            Order(
                part, seed=seed, holdout=holdout, streams=max(1, round(streams * quota / sum(self.quotas))),
                shuffle_shards=shuffle_shards,
            )
            for part, quota in zip(shards.parts, self.quotas, strict=True)
        ]  # fmt: skip

    def epoch(self, step: int) -> int:
        return step // self.steps_per_epoch

    def samples_of(self, step: int, rank: int = 0, world_size: int = 1) -> NDArray[np.int64]:
        """Sample ids of this process's slice of a global step: [batch / world_size], which has to be an integer."""
        source, number, position = self._places(step, rank, world_size)
        ids = np.empty_like(position)
        for s, order in enumerate(self.orders):
            mine = source == s
            ids[mine] = self.firsts[s] + order.samples_at(number[mine], position[mine])
        return ids

    def passes_of(self, step: int, rank: int = 0, world_size: int = 1) -> NDArray[np.int64]:
        """The number of the pass that each of the samples of `samples_of` belongs to: how often its source was seen before.
        Of one source it is the epoch."""
        return self._places(step, rank, world_size)[1]

    def images_before(self, step: int) -> list[int]:
        """How many images of each source the steps before this one have: [S]."""
        epoch, within = divmod(step, self.steps_per_epoch)
        rest, left, counts = within * self.batch, self.steps_per_epoch * self.batch, []
        for quota in self.quotas:
            before = rest * quota // left
            counts.append(epoch * quota + before)
            rest, left = rest - before, left - quota
        return counts

    def held_out(self) -> NDArray[np.int64]:
        """Sample ids that no step uses, in ascending order."""
        return np.concatenate([self.firsts[s] + order.held_out() for s, order in enumerate(self.orders)])

    def replacement_id(self, sample: int, step: int, attempt: int) -> int:
        """The sample that is read instead of a damaged one, of the same source; the same in every process. attempt: 1, 2,
        ..."""
        draw = int(hash64(self.seed, self.epoch(step), "replacement", sample, attempt))
        source = int(np.searchsorted(self.firsts, sample, side="right")) - 1
        first = int(self.firsts[source])
        return first + self.orders[source].replacement(sample - first, draw, attempt)

    def read_valid(self, shards: AnyShards, sample: int, step: int, attempt: int = 0) -> tuple[int, bytes]:
        """(id of the sample that was read, its bytes): the planned sample, or the first valid one of its replacements.

        attempt: where to begin (0: the planned sample). Raises UserError after MAX_TRIES attempts.
        """
        read = sample
        for n in range(attempt, MAX_TRIES):
            read = self.replacement_id(sample, step, n) if n else sample
            photo = shards.read(read)
            if shards.is_valid(read, photo):
                return read, photo
        damage, folder = shards.describe(read), shards.folder_of(read)
        made_from = f" (made from {damage['source']})" if damage["source"] else ""
        raise UserError(
            f"{folder}: {MAX_TRIES} samples in a row are damaged, the last one in {damage['shard']} at byte "
            f"{damage['byte']}{made_from}: {damage['why']}; `make verify DST={folder}` checks every sample"
        )

    def prefetch(self, shards: AnyShards, step: int, rank: int = 0, world_size: int = 1) -> None:
        """Download the shards of this process's next steps in the background, if they are remote. Raises UserError if the
        cache is too small for them."""
        remote = [s for s, part in enumerate(shards.parts) if part.is_remote]
        ahead = {s: self.shards_ahead(step, rank, world_size, s) for s in remote}
        now = {s: sum(shards.parts[s].shards[i]["bytes"] for i in ahead[s][0]) for s in remote}
        for s in remote:
            others = [now[o] + shards.parts[o].index.nbytes for o in remote if o != s]  # which share the cache
            shards.parts[s].prefetch(*ahead[s], distinct_ranks=self._distinct_ranks(world_size, s), others=others)

    def shards_ahead(
        self, step: int, rank: int = 0, world_size: int = 1, source: int = 0
    ) -> tuple[list[int], list[int]]:
        """(shards of a source whose windows this process's streams are in at a step, shards of the windows after those), in
        the order in which they are read."""
        order, distinct = self.orders[source], self._distinct_ranks(world_size, source)
        if len(self.orders) == 1:
            epoch, within = divmod(step, self.steps_per_epoch)
            first, last = (epoch, within * self.batch), (epoch, (within + 1) * self.batch - 1)
        else:
            before, after = (self.images_before(at)[source] for at in (step, step + 1))
            first, last = (divmod(at, order.samples) for at in (before, max(before, after - 1)))
        return order.shards_ahead(first, last, np.arange(rank % distinct, order.streams, distinct))

    def _distinct_ranks(self, world_size: int, source: int) -> int:
        """How many processes read other streams of a source than the others: processes r and r + gcd(streams, world_size)
        read the same ones. Of a mixture, every process reads all streams."""
        return math.gcd(self.orders[source].streams, world_size) if len(self.orders) == 1 else 1

    def _places(
        self, step: int, rank: int, world_size: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """(source, number of its pass, position in the pass) of this process's images of a step: each [n]."""
        epoch, within = divmod(step, self.steps_per_epoch)
        image = np.arange(rank, self.batch, world_size)
        if len(self.orders) == 1:  # image i is of stream i mod streams, so that a process reads whole streams
            return np.zeros_like(image), np.full_like(image, epoch), within * self.batch + image
        # permuted, or with two sources and two processes each process would have a source of its own
        image = permute(image, self.batch, hash64(self.seed, step, "mixture"))
        source, turn = deal(within * self.batch + image, self.quotas)
        turn += epoch * np.array(self.quotas)[source]
        number, position = np.divmod(turn, np.array([order.samples for order in self.orders])[source])
        return source, number, position


def quotas(weights: Sequence[float], images: int) -> list[int]:
    """How many of `images` each source gives, in proportion to the weights [S]."""
    ends = np.rint(np.cumsum(weights) / sum(weights) * images).astype(np.int64)
    return np.diff(ends, prepend=0).tolist()


def deal(image: NDArray[np.int64], quotas: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(source, turn) of the images [n] of an epoch: image i is the turn-th of its source, and the quotas [S] are reached at
    the epoch's end. Of the images that the sources before have left, the first r hold r * quota // left of a source: none is
    ever behind its share by more than a few images, and nothing is listed."""
    source, turn = np.empty_like(image), np.empty_like(image)
    place, rest, left = np.arange(len(image)), image, sum(quotas)  # of the images that no source has taken yet
    for s, quota in enumerate(quotas):
        before = rest * quota // left
        taken = (rest + 1) * quota // left > before
        source[place[taken]], turn[place[taken]] = s, before[taken]
        place, rest, left = place[~taken], (rest - before)[~taken], left - quota
    return source, turn


def _check_shares(folders: list[str], quotas: Sequence[int], trained: Sequence[int], batch: int) -> None:
    """Raises UserError if a source has fewer samples than its share of a batch, which would hold photos twice, or none."""
    for folder, quota, samples in zip(folders, quotas, trained, strict=True):
        share = batch * quota / sum(quotas)
        if quota == 0:
            why = "no sample to train on" if samples == 0 else "a share of an epoch below one image"
            raise UserError(f"{folder}: {why}; leave it out of data.shards, or give it a larger weight or more photos")
        if math.ceil(share) > samples:
            raise UserError(
                f"{folder}: {samples} samples to train on are fewer than its share of a global batch, {share:.1f} of "
                f"{batch} images, so that every step would see photos twice; give it a smaller weight in data.shards, take "
                "a smaller optim.global_batch_size or more photos"
            )
