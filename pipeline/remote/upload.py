"""Upload: the address that `make shards` writes to (DST=s3://…), beside a small folder of this machine.

    s3://bucket/mine/
      .make_shards/task, shard-000000.tar.json …   what is being made, and the record of each shard that is there: from these
                                                   any machine resumes; deleted at the end
      shard-000000.tar …                           each appears whole: a store shows an object once all of it has arrived
      sources.txt, index.npy, manifest.json        at the end, manifest.json last: shards without it cannot be read

fsspec uploads and repeats what fails (`retries`); what it gives up is one message, and the same command resumes.
"""

import os
import re
import shutil
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

from pipeline.remote.cache import default_cache
from pipeline.remote.filesystem import SCHEMES, WRITABLE, check_address, describe, open_filesystem, sorted_error
from runtime.errors import UserError

TIMEOUT = 60.0  # seconds without an answer


class Upload:
    """Files at an address, to be written. `names`: bytes of each file that is there, as `list` found it; of work/, too.

    folder: of this machine, for what is not uploaded yet. work: the folder below the address that is deleted at the end.
    Processes get it by pickling. Raises UserError if the address cannot be written.
    """

    def __init__(self, address: str, work: str):
        parts = check_address(address)
        path = parts.path.rstrip("/")
        if parts.scheme not in WRITABLE:
            raise UserError(
                f"DST {address}: cannot be written; give a folder, or one of {', '.join(f'{s}://' for s in WRITABLE)}"
            )
        if not path:
            raise UserError(f"DST {address}: give a folder in it, for example {address.rstrip('/')}/mine")
        self.scheme, self.base, self.work = parts.scheme, parts.netloc + path, work
        self.address = f"{self.scheme}://{self.base}"
        short = re.sub(r"\W+", "-", self.base)[-40:].strip("-")
        self.folder = default_cache() / "uploads" / f"{short}-{sha256(self.address.encode()).hexdigest()[:12]}"
        self.names: dict[str, int] = {}
        self._filesystems: dict[int, Any] = {}  # by process id: none survives a fork

    def __getstate__(self) -> dict:
        return vars(self) | {"_filesystems": {}, "names": {}}

    def list(self) -> None:
        """Find out which files are there."""
        self.names = {}
        for folder in ("", f"{self.work}/"):
            try:
                found = self._do("ls", f"{self.base}/{folder}".rstrip("/"), detail=True)
            except FileNotFoundError:  # a store has no empty folders
                continue
            files = (file for file in found if file["type"] == "file")
            self.names |= {folder + file["name"].rpartition("/")[2]: int(file["size"] or 0) for file in files}

    def check_writable(self) -> None:
        """Write a file and delete it. Raises UserError if that is not possible."""
        probe = f"{self.base}/{self.work}/probe"
        self._do("pipe_file", probe, b"?", missing=True)
        self._do("rm_file", probe, missing=True)

    def get(self, name: str) -> bytes:
        return self._do("cat_file", f"{self.base}/{name}", missing=True)

    def put(self, path: Path, name: str) -> None:
        """Upload a file. It is there whole, or not at all."""
        self._do("put_file", str(path), f"{self.base}/{name}", missing=True)

    def clear_work(self) -> None:
        """Delete work/ at the address."""
        self.list()
        if any(name.startswith(f"{self.work}/") for name in self.names):
            self._do("rm", f"{self.base}/{self.work}", recursive=True)

    def begin(self, keep: str) -> None:
        """Make the folder of this machine what the address says: its manifest and index if it is complete, otherwise the
        task and records in work/. keep: the file or folder of work/ that stays."""
        self.list()
        work = self.folder / self.work
        for path in (*self.folder.glob("*"), *work.glob("*")):
            if path.is_file() and path.name != keep:
                path.unlink()
        work.mkdir(parents=True, exist_ok=True)
        complete = "manifest.json" in self.names
        for name in ("manifest.json", "index.npy") if complete else [n for n in self.names if n.startswith(self.work)]:
            (self.folder / name).write_bytes(self.get(name))

    def check_complete(self, shards: Iterable[dict]) -> None:
        """Raise UserError unless all shards of a manifest are there, with its sizes."""
        missing = [s["name"] for s in shards if self.names.get(s["name"]) != s["bytes"]]
        if missing:
            raise UserError(
                f"DST {self.address}: {len(missing)} shards are missing or of another size, {missing[0]} first; delete "
                "manifest.json there, and the same command makes all shards again"
            )

    def remove_folder(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _do(self, function: str, *words: Any, missing: bool = False, **options: Any) -> Any:
        """What a function of fsspec returns. Raises UserError; and FileNotFoundError, unless `missing` makes it one."""
        filesystem = self._filesystems.get(os.getpid())
        if filesystem is None:
            filesystem = open_filesystem(self.scheme, self.address, TIMEOUT, retries=True)
            self._filesystems[os.getpid()] = filesystem
        try:
            return getattr(filesystem, function)(*words, **options)
        except Exception as error:
            kind = sorted_error(error)
            if isinstance(kind, FileNotFoundError) and not missing:
                raise kind from None
            advice = "check the address and the server; the same command resumes"
            if isinstance(kind, FileNotFoundError):
                advice = "is there such a bucket?"
            elif isinstance(kind, ValueError):
                advice = "correct the address"
            elif isinstance(kind, PermissionError):
                advice = f"check the credentials: {SCHEMES[self.scheme].credentials}"
            raise UserError(f"DST {self.address}: {describe(error)}; {advice}") from None
