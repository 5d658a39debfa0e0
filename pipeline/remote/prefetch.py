"""Prefetcher: downloads the shards that will be read next, in background threads, as far as the cache can hold them."""

import os
import threading
import time
from collections import deque
from collections.abc import Sequence

from pipeline.remote.cache import Remote, stat_or_none
from pipeline.remote.download import METADATA
from runtime.errors import UserError

MAX_THREADS = 4  # for each process
MARK_SECONDS = 2.0  # between two times that the shards in use are marked


class Prefetcher:
    """Downloads ahead of need. A download that fails is reported by the `Remote.open` that needs the shard."""

    def __init__(self, remote: Remote):
        self.remote = remote
        self._queue: deque[dict] = deque()
        self._threads = 0
        self._lock = threading.Lock()
        self._requested, self._last_mark = b"", 0.0

    def request(
        self,
        shards: list[dict],
        current: list[int],
        upcoming: list[int],
        distinct_ranks: int,
        others: Sequence[int] = (),
    ) -> None:
        """Download the current and then the upcoming shards, as far as the cache can hold them, and mark them as in use.

        shards: the manifest's; current, upcoming: positions in it; distinct_ranks: processes that read other shards than
        this one; others: bytes that each other source of a mixture needs in the same cache now. Raises UserError if the
        cache cannot hold the current shards of this machine's processes.
        """
        requested = repr((current, upcoming, others)).encode()
        if requested != self._requested:
            self._replace_queue(shards, current, upcoming, distinct_ranks, others)
            self._requested = requested
        if time.monotonic() - self._last_mark > MARK_SECONDS:
            self._last_mark = time.monotonic()
            names = (*(shards[i]["name"] for i in [*upcoming, *current]), *METADATA)
            self.remote.mark_used(self.remote.folder / name for name in names)

    def _replace_queue(
        self, shards: list[dict], current: list[int], upcoming: list[int], distinct_ranks: int, others: Sequence[int]
    ) -> None:
        remote = self.remote
        ranks = min(distinct_ranks, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # this machine's share its cache
        sizes = {i: shards[i]["bytes"] for i in [*current, *upcoming]}
        metadata = sum(status.st_size for name in METADATA if (status := stat_or_none(remote.folder / name)))
        needed = metadata + ranks * sum(sizes[i] for i in current) + sum(others)
        if needed > remote.bound:
            raise UserError(
                f"speed.cache_gb: {remote.speed.cache_gb:g} GB cannot hold the shards that are read at the same time, "
                f"{len(current) * ranks} of up to {max(sizes.values()) / 1e6:.3g} MB; set "
                f"speed.cache_gb={1.01 * needed / 1e9:.3g}, or make smaller shards (make shards SHARD_MB=…)"
            )
        spare = (remote.bound - needed) // (
            1 + len(others)
        )  # each source downloads ahead into its part of what is left
        queue, left = deque[dict](), sum(sizes[i] for i in current) + spare // ranks
        for i in [*current, *upcoming]:
            left -= sizes[i]
            if left < 0:
                break
            queue.append(shards[i])
        with self._lock:
            self._queue, self._last_mark = queue, 0.0
            new = min(MAX_THREADS, len(queue)) - self._threads
            self._threads += max(0, new)
        for _ in range(new):
            threading.Thread(target=self._download_queue, name="shard prefetch", daemon=True).start()

    def _download_queue(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._threads -= 1
                    return
                shard = self._queue.popleft()
            if not (self.remote.folder / shard["name"]).exists():
                try:
                    self.remote.download(shard, wait=False)
                except UserError:  # reported by the `open` that needs the shard
                    continue
