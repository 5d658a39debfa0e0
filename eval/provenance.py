"""Which weights a file was made from: results, pictures and page carry the step and the hash of their network.

A file is current if it carries what the network is now. Times of files say nothing: a copy is new, a network restored from
a backup is old. The hash of a checkpoint or backbone file is the one in its header; only files of others are read whole.
Imports no torch.
"""

import hashlib
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from runtime.checkpoint import read_header
from runtime.checkpoint.format import list_checkpoints
from runtime.config import TIMM
from runtime.errors import UserError

KEY = "densedino"  # of a PNG's text and of a page's meta tag
Weights = dict[str, Any]  # {"step": steps done, None if it is not known; "sha256": hash of the network's file}


def weights_of(path: str | Path) -> Weights:
    """The weights at a path: a run folder (its newest checkpoint), a checkpoint (folder or file), a file of weights, or
    timm:NAME, whose name is used as its hash.

    Raises UserError if there are none.
    """
    if str(path).startswith(TIMM):
        return {"step": None, "sha256": str(path)}
    path = Path(path)
    if path.is_dir():
        is_run = (path / "config.yaml").is_file()
        for checkpoint in list_checkpoints(path / "checkpoints" if is_run else path):
            if recorded := _recorded(checkpoint):
                return recorded
        kind = "a run without a checkpoint" if is_run else "neither a run nor a folder of checkpoints"
        raise UserError(f"{path}: {kind}")
    if recorded := _recorded(path):
        return recorded
    try:
        with open(path, "rb") as file:
            return {"step": None, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def known_weights(path: str | Path) -> Weights | None:
    """As `weights_of`, but None if there are none."""
    try:
        return weights_of(path)
    except UserError:
        return None


def _recorded(path: Path) -> Weights | None:
    """The step and the hash in the header of a checkpoint or backbone file of ours; None for any other file."""
    try:
        header = read_header(path)["__metadata__"]
        step = header["step"] if "step" in header else json.loads(header[KEY]).get("steps")
        return {"step": None if step is None else int(step), "sha256": str(header["sha256"])}
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        return None


# -------------------------------------------------------------------------------------------- marks in pictures and pages


def png_text(weights: Sequence[Weights]) -> dict[str, str]:
    """The text chunk of a picture of these networks."""
    return {KEY: json.dumps(list(weights))}


def png_weights(path: Path) -> list[Weights] | None:
    """The weights that a picture carries; None if it carries none, or is no PNG."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return _list(picture.info.get(KEY, ""))
    except (OSError, SyntaxError, UnidentifiedImageError):
        return None


def html_meta(weights: Weights | None) -> str:
    """The meta tag of a run's page."""
    return f'<meta name="{KEY}" content="{escape(json.dumps([weights] if weights else []), quote=True)}">'


def _list(text: str) -> list[Weights] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, list) else None
