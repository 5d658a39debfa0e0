"""A folder of features while it is written, and whose it is. Imports no torch.

    features.json   which network, photos and settings; how many photos are done; which are damaged
    names.txt       the photos, a line each, in the order of the rows
    *.npy           the features, written in place; rows of photos that are not done yet are zeros
    points.csv      with points: photo,x,y of each row of points.npy

A save syncs the arrays before it writes features.json, so a program that is killed continues from its last save.
Nothing in a file depends on when it was written: a run that was killed leaves the bytes of one that was not.
"""

import errno
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import RunError, UserError
from runtime.files import refusal, sync, try_lock, write_atomic

FORMAT = 1
STATE, NAMES, POINTS = "features.json", "names.txt", "points.csv"
ARRAYS = ("cls", "mean", "patches", "points")
DTYPES = ("float32", "float16")
FITS = ("crop", "square")  # of a photo to the network's square: its center, or the whole of it, distorted
SAVE_SHARE = 0.02  # of the time may be spent in saves
CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)  # a disk that reserves no space
LOCK_SECONDS = 10.0  # data workers of a killed program hold its lock until they see that it is gone


def read_state(folder: Path) -> dict[str, Any] | None:
    """features.json of a folder; None if nothing was begun there. Raises UserError if the folder holds anything else, or
    nothing can be written there."""
    if why := refusal(folder):
        raise UserError(f"{folder}: cannot write there ({why})")
    path = folder / STATE
    try:
        state = json.loads(path.read_text("utf-8"))
        _ = state["settings"], state["done"], state["damaged"]
        if state["format"] == FORMAT:
            return state
    except FileNotFoundError:
        others = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        if others := [name for name in others if not name.endswith(".tmp")]:
            raise UserError(
                f"{folder}: not empty ({others[0]} …), and not a folder of features (no {STATE}); name another one"
            ) from None
        return None
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(
        f"{path}: not a file of this program, or of another version; name another folder, or remove this one"
    )


class FeatureFolder:
    """settings: what decides the features; a folder with others is refused. about: recorded beside them.

    done: photos whose rows are final. damaged: rows of photos that cannot be read, and why.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], about: dict[str, Any]):
        self.folder, self.settings, self.about = folder, json.loads(json.dumps(settings)), about
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{folder}: cannot write there ({error.strerror})") from None
        until = time.monotonic() + LOCK_SECONDS
        while not try_lock(self._lock, folder):
            if time.monotonic() > until:
                raise UserError(f"{folder}: another program writes features there; name another folder, or wait for it")
            time.sleep(0.1)
        try:
            if (state := read_state(folder)) and state["done"]:
                _refuse_other(folder, state["settings"], self.settings)
        except UserError:
            self.close()
            raise
        self.done: int = state["done"] if state else 0
        self.damaged: list[dict[str, Any]] = state["damaged"] if state else []
        self.arrays: dict[str, NDArray] = {}
        self._saved, self._cost = time.monotonic(), 0.0

    def open(self, names: list[str], shapes: Mapping[str, tuple[int, ...]], dtype: str, points_csv: str = "") -> None:
        """Open the arrays of these shapes for writing; make them if nothing was begun. Raises UserError if the disk is too
        small."""
        paths = {name: self.folder / f"{name}.npy" for name in shapes}
        if not self.done:
            texts = {NAMES: "".join(f"{name}\n" for name in names)} | ({POINTS: points_csv} if points_csv else {})
            self._begin(paths, shapes, dtype, texts)
        for name, path in paths.items():
            try:
                array = np.lib.format.open_memmap(path, "r+")
            except (OSError, ValueError) as error:
                raise UserError(f"{path}: {error}; remove {self.folder} to begin again") from None
            if array.shape != shapes[name] or array.dtype != np.dtype(dtype):
                raise UserError(f"{path}: not the array that was begun; remove {self.folder} to begin again")
            self.arrays[name] = array

    def _begin(
        self, paths: Mapping[str, Path], shapes: Mapping[str, tuple[int, ...]], dtype: str, texts: Mapping[str, str]
    ) -> None:
        """Write features.json, which says whose the folder is, then the other files. The arrays take their space on the
        disk: a full one would end the program in the middle, without a word. If there is too little, nothing stays."""
        try:
            self._write_state()
            for name, text in texts.items():
                write_atomic(self.folder / name, text)
            for name, path in paths.items():
                np.lib.format.open_memmap(path, "w+", dtype, shapes[name])
                _reserve(path)
        except OSError as error:
            for path in (self.folder / STATE, *(self.folder / name for name in texts), *paths.values()):
                path.unlink(missing_ok=True)
            need = sum(math.prod(shape) for shape in shapes.values()) * np.dtype(dtype).itemsize / 1e9
            raise UserError(
                f"{self.folder}: {need:.3g} GB of features cannot be written there ({error.strerror}); --dtype float16 "
                "halves them, and patches are the most of them"
            ) from None

    def advance(self, photos: int) -> None:
        """The next photos' rows are written; saved if the last save was long enough ago."""
        self.done += photos
        if time.monotonic() - self._saved > self._cost / SAVE_SHARE:
            self.save()

    def save(self) -> None:
        """Raises RunError if the disk fails."""
        start = time.monotonic()
        try:
            for name, array in self.arrays.items():
                array.flush()  # type: ignore[attr-defined]  # a memmap
                sync(self.folder / f"{name}.npy")
            self._write_state()
        except OSError as error:
            raise RunError(f"{self.folder}: {error.strerror}; the same command continues from the last save") from None
        self._saved = time.monotonic()
        self._cost = self._saved - start

    def close(self) -> None:
        """Release the lock; arrays stay readable."""
        os.close(self._lock)

    def _write_state(self) -> None:
        state = {"format": FORMAT, "settings": self.settings, **self.about, "done": self.done, "damaged": self.damaged}
        write_atomic(self.folder / STATE, json.dumps(state, indent=1, ensure_ascii=False) + "\n")


def _reserve(path: Path) -> None:
    """Take the space of a file on the disk, where the disk can reserve any. Raises OSError if it is too small."""
    with open(path, "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if error.errno not in CANNOT_RESERVE:
                raise


def _refuse_other(folder: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises UserError with what differs."""
    keys = [key for key in {**saved, **current} if saved.get(key) != current.get(key)]
    if not keys:
        return
    listed = "; ".join(f"{key}: saved {_short(saved.get(key))}, now {_short(current.get(key))}" for key in keys)
    help = f"name another folder, or remove {folder} to begin again"
    if "weights" in keys and (step := (saved.get("weights") or {}).get("step")):
        help += f"; the run's checkpoint of step {step} may still be there, and can be named instead of the run"
    raise UserError(f"{folder}: holds other features: {listed}; {help}")


def _short(value: Any) -> str:
    """A setting in a message: of hashes the beginning."""
    if isinstance(value, dict):
        return " ".join(f"{key} {_short(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list):
        return ",".join(map(str, value))
    text = str(value)
    return f"{text[:8]}…" if len(text) == 64 else text
