"""Names of source files: which are photos, and how a name is printed."""

import os

ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")


def is_photo(name: str) -> bool:
    base = name.rpartition("/")[2]
    return base.lower().endswith(ENDINGS) and not base.startswith(".")  # ._x.jpg: macOS writes it next to a photo


def printable(name: str) -> str:
    """A name as valid UTF-8 on one line: control characters and undecodable bytes are escaped."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
