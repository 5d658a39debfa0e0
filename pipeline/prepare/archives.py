"""Files that are no tar: empty, cut or compressed ones, known by their first and last bytes; and what helps.

Photos are read at their offset, which a compressed archive does not have. Archives are known by their first bytes, whatever
their name.
"""

import os
import shlex
from contextlib import suppress
from pathlib import Path

from pipeline.prepare.names import in_command, split_order
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
AGAIN = "copy it again"
LONGEST = max(map(len, ARCHIVES))


def fault(path: Path) -> str:
    """Why a file is no whole tar, as far as its two ends show it, and what helps; "" if nothing is wrong there.

    Takes two reads of a whole tar, so hundreds are looked at in a second. Raises OSError if it cannot be read.
    """
    if not path.is_file():  # reading a fifo would wait for ever
        return "is a folder, not a tar" if path.is_dir() else "is not a file"
    if archive := describe_archive(path):
        return archive
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
    kind, *_ = _archive(path)
    return f"compressed ({kind}), and photos are read at their offset; unpack it first: {unpack(path)}" if kind else ""


def unpack(path: Path) -> str:
    """The exact command that unpacks a compressed archive; "" if the file is not one. Raises OSError as above."""
    kind, command, ending = _archive(path)
    if not kind:
        return ""
    return f"`{_unpack_stream(path, command, ending) if ending else _unpack_files(path, command)}`"


def _archive(path: Path) -> tuple[str, str, str]:
    """The entry of ARCHIVES for a file, by its first bytes; three empty texts if it is none of them."""
    with path.open("rb") as file:
        first = os.pread(file.fileno(), LONGEST, 0)
    return next((entry for magic, entry in ARCHIVES.items() if first.startswith(magic)), ("", "", ""))


def first_archive(folder: Path) -> str:
    """The end of a message about a folder of compressed archives: `; x.zip is compressed ...`, or nothing.

    Tars are unpacked by one command. Of others the first is described (that of train), and the rest are named.
    """
    if len(compressed := compressed_tars(folder)) > 1:
        return (
            f"; {len(compressed)} tars are compressed, and photos are read at their offset: `{unpack_tars(compressed)}`"
        )
    found = []
    for path in sorted(folder.iterdir(), key=lambda path: split_order(path.name)):
        with suppress(OSError):  # a file that cannot be read is no help
            if path.is_file() and (archive := describe_archive(path)):
                found.append((path.name, archive))
    if not found:
        return ""
    others = ", ".join(name for name, _ in found[1:])
    return f"; {found[0][0]} is {found[0][1]}" + (f"; then the same for {others}" if others else "")


def unpack_tars(compressed: list[tuple[Path, str]]) -> str:
    """One command for all of these `compressed_tars` of the first one's kind."""
    first, command = compressed[0]
    names = [path.name for path, other in compressed if other == command]
    return f"{command} {in_command(first.parent, names, ''.join(first.suffixes[-2:]))}"


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
