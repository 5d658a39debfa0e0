"""One file of an address, in as many requests as it takes; each continues at the byte where the last one broke off."""

import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import BinaryIO

from pipeline.remote.client import CHUNK_BYTES, Client, RangeNotSupported
from pipeline.remote.filesystem import SCHEMES, RetryableError
from runtime.errors import UserError

METADATA = ("manifest.json", "index.npy")
MAX_TRIES = 8  # in a row that bring next to nothing (less than 1/64 of the file, or CHUNK_BYTES), then the run stops
MAX_METADATA_TRIES = 4  # the same for manifest and index: a user waits for them
MAX_REDOWNLOADS = 3  # complete downloads with a wrong checksum, then the run stops
MIN_BACKOFF, MAX_BACKOFF = (
    0.5,
    32.0,
)  # seconds before the second try, doubled for each further one; 63 for all MAX_TRIES


def backoff(failures: int) -> float:
    """Seconds to wait after so many failures in a row."""
    return min(MAX_BACKOFF, MIN_BACKOFF * 2 ** (failures - 1))


class Download:
    """Downloads one file of a client's address. `run` raises UserError if that is not possible.

    size: its bytes, if known. is_complete: whether the file is as it was written, once all bytes are there. disk: turns
    disk errors into UserErrors (network errors are OSErrors too).
    """

    def __init__(
        self,
        client: Client,
        name: str,
        size: int | None,
        is_complete: Callable[[], bool],
        disk: Callable[[], AbstractContextManager[None]],
    ):
        self.client, self.name, self.size = client, name, size
        self.is_complete, self.disk = is_complete, disk
        self.url = f"{client.address}/{name}"
        self.received = 0  # bytes of the file that are there
        self.use_ranges = True

    def run(self, file: BinaryIO) -> None:
        """Write the file. Raises UserError if it is missing, forbidden, not the manifest's, or does not arrive."""
        progress = failures = downloads = 0  # progress: bytes that were there when `failures` was last reset
        begin = time.monotonic()
        max_tries = MAX_METADATA_TRIES if self.name in METADATA else MAX_TRIES
        reasons: Counter[str] = Counter()
        self.client.filesystem()
        retryable = self.client.retryable_errors()
        while True:
            try:
                self._request(file)
                if self._is_complete(file):
                    return
                self.received, downloads, self.use_ranges = 0, downloads + 1, False
                raise RetryableError("the file arrived, but its content is wrong")
            except FileNotFoundError as error:
                raise UserError(self._not_found(self.client.describe(error))) from None
            except PermissionError as error:
                raise UserError(self._forbidden(self.client.describe(error))) from None
            except retryable as error:
                self.use_ranges = self.use_ranges and not isinstance(error, RangeNotSupported)
                reasons[self.client.describe(error)] += 1
            if downloads == MAX_REDOWNLOADS:
                raise UserError(self._wrong_content())
            if self.received > progress + min(CHUNK_BYTES, (self.size or 0) // 64):
                progress, failures = self.received, 0
            failures += 1
            if failures >= max_tries:
                raise UserError(self._given_up(max_tries, time.monotonic() - begin, reasons))
            # randomized: processes of many machines that lost the same server must not return all at once
            time.sleep(backoff(failures) * random.uniform(0.75, 1.0))

    def _request(self, file: BinaryIO) -> None:
        """One request: append what it brings. Raises what Client.open_range raises; RetryableError if bytes are missing, or
        are more than the file has."""
        with self.client.open_range(self.name, self.received if self.use_ranges else 0) as (chunks, position, total):
            if None not in (self.size, total) and self.size != total:
                raise UserError(f"{self.url}: has {total} bytes, the manifest says {self.size} bytes; upload it again")
            with self.disk():
                file.seek(self.received)
            for chunk in chunks:
                new = chunk[max(0, self.received - position) :]  # a server without ranges begins at byte 0 again
                position, self.received = position + len(chunk), self.received + len(new)
                if self.size is not None and self.received > self.size:
                    self.received = 0
                    raise RetryableError(f"more bytes than the manifest's {self.size}")
                with self.disk():
                    file.write(new)
                    file.flush()  # waiting processes watch the file grow
        if self.received < (self.size or total or 0):
            raise RetryableError("the body ended early")

    def _is_complete(self, file: BinaryIO) -> bool:
        """Whether the file that has arrived is as it was written."""
        with self.disk():
            if self.size is None:
                file.truncate(self.received)
            return self.is_complete()

    def _not_found(self, why: str) -> str:
        if self.name == METADATA[0]:
            return (
                f"{self.client.address}: no shards here (no manifest.json: {why}); give the address of the uploaded folder "
                "that `make shards` wrote"
            )
        return f"{self.url}: is missing ({why}); upload it from the folder in which the shards were made"

    def _forbidden(self, why: str) -> str:
        keys = SCHEMES[self.client.scheme].credentials
        return f"{self.url}: access denied ({why}); check the credentials: {keys}"

    def _wrong_content(self) -> str:
        wrong = "it is not what `make shards` writes" if self.size is None else "its sha256 is not the manifest's"
        return (
            f"{self.url}: downloaded {MAX_REDOWNLOADS} times, and {wrong}; run `make verify` where the shards were made, "
            "then upload it again"
        )

    def _given_up(self, tries: int, seconds: float, reasons: Counter[str]) -> str:
        why = "; ".join(f"{reason} ({n} x)" for reason, n in reasons.items())
        received = "" if self.size is None else f"{self.received:,} of {self.size:,} bytes have arrived; "
        return (
            f"{self.url}: download failed after {tries} tries and {seconds:.0f} s: {why}; {received}"
            "check the address and the server; the same command resumes"
        )
