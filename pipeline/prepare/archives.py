"""Files that are no tar: empty, cut or compressed ones, known by their first and last bytes; and what helps.

Photos are read at their offset, which a compressed archive does not have. Archives are known by their first bytes, whatever
their name.
"""

import os
import shlex
from contextlib import suppress
from pathlib import Path

from pipeline.prepare.names import in_command, printable, split_order
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


READ = ("gzip", "xz", "zstd", "bzip2", "zip")  # that `make` reads
MAX_RATIO, BOMB_FLOOR = 200, 1 << 26  # times an archive's bytes, and bytes: what unpacks to more than both is a bomb


def refuse_bomb(name: str, unpacked: int, packed: int) -> None:
    """Raise UserError if an archive of so many bytes unpacks to far more than photos do."""
    if unpacked > max(BOMB_FLOOR, MAX_RATIO * packed):
        raise UserError(f"{name}: a bomb: its {packed:,} bytes unpack to {unpacked:,} or more, which no photos do")


def stream_kind(path: Path) -> str:
    """gzip, xz, zstd, bzip2, lz4 or zip, 7z, rar by a file's first bytes; "" for anything else."""
    return _archive(path)[0]


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
    kind, *_ = _archive(path)
    return f"compressed ({kind}), and photos are read at their offset; unpack it first: {unpack(path)}" if kind else ""


def unpack(path: Path) -> str:
    """The exact command that unpacks a compressed archive; "" if the file is not one. Raises OSError as above."""
    kind, command, ending = _archive(path)
    if not kind:
        return ""
    return f"`{_unpack_stream(path, command, ending) if ending else _unpack_files(path, command)}`"


def inner_fault(path: Path, start: int, end: int) -> str:
    """As `fault`, for a tar in bytes [start, end) of the tar `path`, as far as its first bytes show it."""
    if start == end:
        return f"empty (0 bytes); {AGAIN}"
    kind = _archive(path, start)[0]
    return f"compressed ({kind}), and photos are read at their offset; {unpack_outer(path)}" if kind else ""


def unpack_outer(tar: Path) -> str:
    """The end of a message about a tar whose members are compressed."""
    folder = shlex.quote(str(_folder_of(tar)))
    unpack = f"mkdir -p {folder} && tar -xf {shlex.quote(str(tar))} -C {folder}"
    return f"unpack both: `{unpack}`, then each archive in {folder}, and make shards of that folder"


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


def _archive(path: Path, at: int = 0) -> tuple[str, str, str]:
    """The entry of ARCHIVES for the bytes of a file from `at` on; three empty texts if it is none of them."""
    with path.open("rb") as file:
        first = os.pread(file.fileno(), LONGEST, at)
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


def list_tars(folder: Path) -> list[Path]:
    """The files and folders in a folder whose names end in .tar or .TAR, sorted."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() == ".tar")


def left_out(folder: Path) -> list[str]:
    """What an index of a folder's tars leaves out: tars under other names, archives of files, and tars in folders below. A
    sentence each, with the next step."""
    renamed, packed = [], []
    for path in sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() != ".tar"):
        with suppress(OSError), path.open("rb") as file:
            first = os.pread(file.fileno(), BLOCK, 0)
            if first[257:262] == b"ustar":
                renamed.append(path)
            elif path.suffix.lower() in ARCHIVE_ENDINGS and _archive(path)[0] and not _archive(path)[2]:
                packed.append(path)
    below = sorted(folder.glob("*/**/*.[tT][aA][rR]"))
    said = []
    if renamed:
        command = f"mv {shlex.quote(str(renamed[0]))} {shlex.quote(f'{renamed[0]}.tar')}"
        said.append(f"{_named(renamed, folder)}: a tar, but its name does not end in .tar: if it is whole, `{command}`")
    if packed:
        said.append(f"{_named(packed, folder)}: not opened; {describe_archive(packed[0])}, then `make shards` of it")
    if below:
        index = f"`make index DST={shlex.quote(str(below[0].parent))}`"
        said.append(f"{_named(below, folder)}: in a folder below; move the tars here, or {index} writes an index there")
    return said


def _named(paths: list[Path], folder: Path) -> str:
    more = f" and {len(paths) - 1:,} more like it" if len(paths) > 1 else ""
    return f"{printable(str(paths[0].relative_to(folder)))}{more}"


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
    return command.format(file=shlex.quote(str(path)), folder=shlex.quote(str(_folder_of(path))))


def _folder_of(archive: Path) -> Path:
    """Where an archive is unpacked: beside it."""
    return archive.with_suffix("") if archive.suffix else archive.with_name(f"{archive.name}-photos")
