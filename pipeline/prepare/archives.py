"""Files that are no tar: empty, cut or compressed ones, known by their first and last bytes; and what helps.

Photos are read at their offset, which a compressed archive does not have. Archives are known by their first bytes, whatever
their name.
"""

import os
import shlex
from contextlib import suppress
from pathlib import Path

from pipeline.prepare.tar import BLOCK, members
from runtime.errors import UserError

# first bytes: (what it is, command, ending); no ending: an archive of files, not a compressed tar
ARCHIVES = {
    b"\x1f\x8b": ("gzip", "gzip -d", ".gz"),
    b"\xfd7zXZ\0": ("xz", "xz -d", ".xz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -d", ".zst"),
    b"BZh": ("bzip2", "bzip2 -d", ".bz2"),
    b"\x04\x22\x4d\x18": ("lz4", "lz4 -d", ".lz4"),
    b"PK\x03\x04": ("zip", "unzip -q {file} -d {folder}", ""),
    b"7z\xbc\xaf\x27\x1c": ("7z", "7z x {file} -o{folder}", ""),
    b"Rar!\x1a\x07": ("rar", "unrar x {file} {folder}/", ""),
}
STREAM_ENDINGS = (".gz", ".tgz", ".xz", ".txz", ".zst", ".tzst", ".bz2", ".tbz2", ".tbz", ".lz4")
ARCHIVE_ENDINGS = (".tar", ".zip", ".7z", ".rar", *STREAM_ENDINGS)
AGAIN = "copy or download it again"
LONGEST = max(map(len, ARCHIVES))


def fault(path: Path) -> str:
    """Why a file is no whole tar, as far as its two ends show it, and what helps; "" if nothing is wrong there.

    Takes two reads of a whole tar, so hundreds are looked at in a second. Raises OSError if it cannot be read.
    """
    if not path.is_file():  # reading a fifo would wait for ever
        return "is a folder, not a tar" if path.is_dir() else "is not a file"
    if why := describe_archive(path) or _describe_text(path):
        return why
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            return f"empty (0 bytes); {AGAIN}"
        if any(os.pread(file.fileno(), BLOCK, max(0, size - BLOCK))):  # a tar ends with zeros
            try:
                for _ in members(file, 0, size, ""):
                    pass
            except UserError as error:
                return f"{error}; {AGAIN}".removeprefix(": ")
    return ""


def describe_archive(path: Path) -> str:
    """What a compressed archive is, and the exact command that unpacks it; "" if the file is not one.

    Raises OSError if it cannot be read.
    """
    kind, command, ending = _archive(path)
    if not kind:
        return ""
    how = _unpack_stream(path, command, ending) if ending else _unpack_files(path, command)
    return f"compressed ({kind}), and photos are read at their offset; unpack it first: `{how}`"


def _describe_text(path: Path) -> str:
    """What a text named `.tar` is, a web page or Git LFS's pointer, and what helps; "" if the file is no text."""
    with path.open("rb") as file:
        first = os.pread(file.fileno(), BLOCK, 0)
    words = first.decode(errors="replace").strip()
    if not words or b"\0" in first or not words.splitlines()[0].isprintable():  # a tar's header has zeros
        return ""
    is_pointer = words.startswith("version https://git-lfs")
    how = "`git lfs pull` downloads the tar that it points to" if is_pointer else "download it again"
    return f"text, not a tar; it begins with {words.splitlines()[0][:40]!r}; {how}"


def _archive(path: Path) -> tuple[str, str, str]:
    """The entry of ARCHIVES for a file, by its first bytes; three empty texts if it is none of them."""
    with path.open("rb") as file:
        first = os.pread(file.fileno(), LONGEST, 0)
    return next((entry for magic, entry in ARCHIVES.items() if first.startswith(magic)), ("", "", ""))


def first_archive(folder: Path) -> str:
    """The end of a message: `; x.zip is compressed ...` for the first compressed archive in a folder, or nothing."""
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with suppress(OSError):  # a file that cannot be read is no help
            if archive := describe_archive(path):
                return f"; {path.name} is {archive}"
    return ""


def compressed_tars(folder: Path) -> list[tuple[Path, str]]:
    """(file, command that unpacks such files) of the compressed tars in a folder that are not unpacked there, sorted."""
    found = []
    for path in sorted(path for path in folder.iterdir() if path.name.lower().endswith(STREAM_ENDINGS)):
        short = path.suffix.lower().startswith(".t")  # x.tgz is x.tar
        tar = path.with_suffix(".tar" if short else "")
        if tar.suffix.lower() == ".tar" and not tar.exists() and path.is_file():
            with suppress(OSError):
                _, command, ending = _archive(path)
                if ending:
                    found.append((path, f"{command} -k"))
    return found


def _unpack_stream(path: Path, command: str, ending: str) -> str:
    """x.tar.gz becomes x.tar. The programs insist on their ending: a file without it is renamed first."""
    file = shlex.quote(str(path))
    if path.name.lower().endswith(STREAM_ENDINGS):
        return f"{command} -k {file}"
    renamed = shlex.quote(f"{path}{ending}")
    return f"mv {file} {renamed} && {command} {renamed}"


def _unpack_files(path: Path, command: str) -> str:
    """x.zip becomes the folder x."""
    folder = path.with_suffix("") if path.suffix else path.with_name(f"{path.name}-photos")
    return command.format(file=shlex.quote(str(path)), folder=shlex.quote(str(folder)))
