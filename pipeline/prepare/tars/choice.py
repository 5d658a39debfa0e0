"""Which tars of a folder `index` reads, what it says of those that it cannot, and links to them from another folder."""

import os
from pathlib import Path
from shlex import quote

from pipeline.prepare.archives import compressed_tars, describe_archive, first_archive, left_out, list_tars, unpack_tars
from pipeline.prepare.folder import WORK
from pipeline.prepare.names import in_command, matches, splits_among
from runtime.errors import UserError, plural


def choose_tars(dst: Path, skip_broken: bool, pattern: str) -> list[Path]:
    """The tars of a folder, compressed ones too if they are to be left out. Raises UserError if there are none, if they
    cannot be indexed together, or if `make` has not finished there. pattern: only tars whose names match."""
    if not dst.is_dir():
        archive = describe_archive(dst) if dst.is_file() else ""
        what = archive or (
            "is a file; give the folder of the tars: " + str(dst.parent) if dst.exists() else "no such folder"
        )
        raise UserError(f"{dst}: {what}")
    if (dst / WORK / "task").exists():
        raise UserError(f"{dst}: holds an unfinished `make`; run the same `make` command again to finish it")
    tars = list_tars(dst)
    if not tars:
        other = "; ".join(left_out(dst)) or "`make shards SRC=photos/ DST=shards/` makes shards from photos"
        raise UserError(f"{dst}: no *.tar here{first_archive(dst) or f'; {other}'}")
    chosen = [tar for tar in tars if matches(tar.name, pattern)]
    if not chosen:
        raise UserError(
            f"{dst}: none of its {plural(len(tars), 'tar')} matches {pattern!r}; the first is {tars[0].name}"
        )
    tars = chosen
    _refuse_splits(dst, [tar.name for tar in tars])
    compressed = [(path, how) for path, how in compressed_tars(dst) if matches(path.name, pattern)]
    if compressed and not skip_broken:
        first = compressed[0][0]
        raise UserError(
            f"{first}: compressed, and would be left out of the index ({plural(len(compressed), 'such file')}): "
            f"`{unpack_tars(compressed)}`, then the same command again; {skip_hint(dst)}"
        )
    return sorted(tars + [path for path, _ in compressed])


def _refuse_splits(dst: Path, names: list[str]) -> None:
    """Raise UserError if the names of the tars are of several splits."""
    splits = splits_among(names)
    if splits:
        found = [f"{split} ({plural(len(names), 'tar')}, {names[0]} first)" for split, names in splits.items()]
        split, names = next(iter(splits.items()))
        pattern = quote(f"{os.path.commonprefix(names).removesuffix('.tar')}*")  # noqa: RUF071  # of letters
        into = quote(str(dst / split))
        raise UserError(
            f"{dst} holds tars of several splits: {', '.join(found)}; give each a folder of its own: `mkdir {into} && "
            f"mv {in_command(dst, names, '.tar')} {into} && make index DST={into}`; or take one of them: "
            f'ARGS="--match {pattern}"'
        )


def skip_hint(dst: Path) -> str:
    """The end of a message: how to continue without the tars that it names."""
    return f"or index the others: `make index DST={quote(str(dst))} ARGS=--skip-broken`"


def describe_broken(dst: Path, broken: list[dict], tars: int) -> str:
    """The message for tars that cannot be used: each with its reason, and the command that continues without them."""
    listed = "; ".join(f"{row['source']}: {row['reason']}" for row in broken[:3])
    more = f"; and {len(broken) - 3} more ({dst}/rejected.jsonl lists all)" if len(broken) > 3 else ""
    skip = f"; {skip_hint(dst)}" if tars > len(broken) else ""
    if len(broken) == 1:
        return f"{dst}/{listed}{skip}"
    return f"{dst}: {len(broken)} of {plural(tars, 'tar')} cannot be used: {listed}{more}{skip}"


def require_own_folder(out: Path, tars: list[Path]) -> None:
    """Raise UserError if links to these tars in another folder would mix with tars of its own."""
    if out.resolve() == tars[0].parent.resolve():
        raise UserError(f"--out {out} is the folder of the tars; without --out the index is written there")
    if not out.is_dir():
        return
    targets = {tar.name: tar.resolve() for tar in tars}
    other = [path for path in list_tars(out) if path.resolve() != targets.get(path.name)]
    if other:
        raise UserError(f"--out {out}: holds other tars ({other[0].name} first); give a folder of its own")


def link_tars(out: Path, tars: list[Path]) -> None:
    """Links to these tars, by which the folder of the index has them. Those that are there already are as they must be:
    `require_own_folder`."""
    for tar in tars:
        if not (out / tar.name).is_symlink():
            (out / tar.name).symlink_to(tar.resolve())
