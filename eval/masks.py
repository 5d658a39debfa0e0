"""What the masks of scenes hold: class numbers, or colors that a palette file names. Read without torch.

A mask is a palette or gray PNG of class numbers; 255 is ignored. A palette file has a line for each color, `R G B CLASS`.
CLASS is the class's number, or its name (the names are numbered from 0 as they come), or `ignore`:

    0 0 0        background
    128 0 0      aeroplane
    224 224 192  ignore
"""

import struct
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eval.voc import NO_JPEG, class_names, default_train_split, is_jpeg, scene_files
from runtime.errors import UserError

IGNORE = 255  # class of a pixel that is not counted
UNKNOWN = 254  # in a table of colors: a color that has no class
PALETTE = "palette.txt"  # in the folder of the scenes
COLORED_MASKS = 20  # masks whose colors a message lists
LISTED = 12  # numbers or colors in a message


# ------------------------------------------------------------------------------------------------------------- palettes


@dataclass(frozen=True)
class Palette:
    """The class of each color of a palette file."""

    file: Path
    names: list[str]  # of the classes; empty if the file has numbers
    table: NDArray[np.uint8] = field(repr=False)  # [2^24]: class by R << 16 | G << 8 | B

    def classes_of(self, mask: Image.Image, path: Path) -> Image.Image:
        """Class numbers of a mask of any mode. Raises UserError for a color that the file does not have."""
        colors = packed(mask)
        classes = self.table[colors]
        if (unknown := classes == UNKNOWN).any():
            color, count = Counter(colors[unknown].tolist()).most_common(1)[0]
            raise UserError(f"{path}: the color {unpack(color)} ({count:,} pixels) is not in {self.file}; add its line")
        return Image.fromarray(classes)


def packed(mask: Image.Image) -> NDArray[np.uint32]:
    """R << 16 | G << 8 | B of each pixel."""
    red, green, blue = np.moveaxis(np.asarray(mask.convert("RGB"), np.uint32), -1, 0)
    return red << 16 | green << 8 | blue


def unpack(color: int) -> str:
    return f"{color >> 16} {color >> 8 & 255} {color & 255}"


def find_palette(folder: str | Path, file: str | Path | None = None) -> Palette | None:
    """The palette in `file`, else in the folder's palette.txt, else None. Raises UserError if it is wrong."""
    own = Path(folder) / PALETTE
    if file is None and not own.is_file():
        return None
    file = Path(file or own)
    if not file.is_file():
        raise UserError(f"--palette {file}: no such file")
    classes: dict[int, str] = {}
    lines = file.read_bytes().decode("utf-8-sig", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].split(maxsplit=3)
        if not words:
            continue
        values = [int(word) for word in words[:3] if word.isascii() and word.isdigit() and int(word) < 256]
        if len(words) < 4 or len(values) < 3:
            raise UserError(f"{file}, line {number}: '{line}' is not `R G B CLASS`, as in `128 0 0 aeroplane`")
        color = values[0] << 16 | values[1] << 8 | values[2]
        if classes.setdefault(color, words[3].strip()) != words[3].strip():
            raise UserError(f"{file}, line {number}: the color {unpack(color)} is also '{classes[color]}'")
    words = [word for word in dict.fromkeys(classes.values()) if word != "ignore"]
    numbered = [word for word in words if word.isascii() and word.isdigit()]
    if numbered and len(numbered) < len(words):
        other = next(word for word in words if word not in numbered)
        raise UserError(f"{file}: classes are numbers or names, not both; this file has '{numbered[0]}' and '{other}'")
    number_of = {word: int(word) if numbered else n for n, word in enumerate(words)} | {"ignore": IGNORE}
    if not words or max(number_of[word] for word in words) >= UNKNOWN:
        raise UserError(f"{file}: 1 to {UNKNOWN} classes, numbered 0 to {UNKNOWN - 1}, can be named")
    table = np.full(1 << 24, UNKNOWN, np.uint8)
    for color, word in classes.items():
        table[color] = number_of[word]
    return Palette(file, [] if numbered else words, table)


# --------------------------------------------------------------------------------------------------------- reading masks


def read_mask(path: Path, palette: Palette | None = None) -> Image.Image:
    """A mask's class numbers, mode L. Not decoded by pipeline/decode.py, which turns a palette into colors.

    Raises UserError if the file is not a PNG, or if it has colors and there is no palette for them.
    """
    try:
        mask = Image.open(path, formats=["PNG"])
        mask.load()
        with open(path, "rb") as file:
            bits = file.read(25)[24]  # of one value; Pillow stretches gray of fewer than 8 to 0 … 255
    except (OSError, IndexError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        if is_jpeg(path):
            raise UserError(f"{path}: this mask is a JPEG; {NO_JPEG}") from None
        raise UserError(f"{path}: this mask cannot be read ({error})") from None
    if palette:
        return palette.classes_of(mask, path)
    if mask.mode == "P":
        return Image.fromarray(np.asarray(mask))
    if mask.mode in ("1", "L"):
        return Image.fromarray(np.asarray(mask.convert("L")) // (255 // (2**bits - 1)))
    numbers = np.asarray(mask)
    if numbers.ndim == 2 and numbers.max() <= IGNORE:
        return Image.fromarray(numbers.astype(np.uint8))
    if numbers.ndim == 2:
        raise UserError(f"{path}: class {numbers.max()}; class numbers go from 0 to 254, 255 is ignored")
    raise ColoredMask(path, mask.mode)


class ColoredMask(UserError):
    """A mask holds colors instead of class numbers. colors: those of more masks, in words. help: `_palette_help`."""

    def __init__(self, path: Path, mode: str, colors: str = "", help: str = ""):
        super().__init__(
            f"{path}: a mask must be a palette or gray PNG of class numbers, this one has mode {mode}{colors}; name the "
            f"class of each color ({help or _palette_help(path.parents[1])})"
        )
        self.path, self.mode = path, mode


def count_pixels(masks: Sequence[Path], palette: Palette | None = None) -> NDArray[np.int64]:
    """Pixels of each class number in each mask: [n,256]. Raises UserError if a mask cannot be read."""
    with ThreadPoolExecutor() as pool:  # Pillow decodes without holding the interpreter's lock
        return np.array(list(pool.map(partial(_histogram, palette=palette), masks)), np.int64)


def _histogram(path: Path, palette: Palette | None) -> list[int]:
    return read_mask(path, palette).histogram()


# -------------------------------------------------------------------------------------------- can anything be measured?


def check_scenes(
    folder: str | Path,
    splits: Sequence[str | None] = (None, "val"),
    palette_file: str | Path | None = None,
    classes: int | None = None,
    palette_option: bool = True,
) -> None:
    """Looks at every image's file and every mask of some splits, the one to train on first (None: the default one). Prints
    a warning if a class never occurs, or only in splits that nothing is trained on.

    classes: what --classes gives; by default the names of the classes are counted, else the numbers in all these masks.
    palette_option: whether the command has --palette, so that a message can name it.
    Raises UserError if a file is missing or wrong, or if the masks of a split hold fewer than two classes: then every
    prediction is right, and a figure measures nothing.
    """
    palette = find_palette(folder, palette_file)
    names = palette.names if palette and palette.names else class_names(Path(folder))
    known = classes or len(names)  # 0: as many as the masks hold
    help = _palette_help(folder, palette_option)
    held: dict[str, set[int]] = {}
    for split in (name or default_train_split(folder) for name in splits):
        masks = [mask for _, mask in scene_files(folder, split)]
        try:
            counts = count_pixels(masks, palette)
        except ColoredMask as error:
            raise ColoredMask(error.path, error.mode, f"; {_colors(masks, split)}", help) from None
        numbers = np.flatnonzero(counts[:, :IGNORE].sum(0)).tolist()
        if len(numbers) < 2:
            raise UserError(_too_few(folder, split, numbers, bool(counts[:, IGNORE].sum()), help))
        if known and numbers[-1] >= known:
            mask, count = masks[int(counts[:, numbers[-1]].argmax())], numbers[-1] + 1
            mend = f"write {count} names into {Path(folder) / 'classes.txt'}, one a line, or move it away"
            mend = f"--classes {count} counts them all" if classes else mend
            raise UserError(
                f"{mask}: class {numbers[-1]}, but there are {known} classes (0 to {known - 1}): "
                f"the masks of '{split}' hold {_listed(numbers)}; {mend}"
            )
        held[split] = set(numbers)
    _warn_of_gaps(folder, held, known)


def _warn_of_gaps(folder: str | Path, held: dict[str, set[int]], known: int) -> None:
    """Print which classes no mask has, or no mask of the first split, the one to train on. held: class numbers by split;
    known: classes, 0: as many as the masks hold."""
    found = set().union(*held.values())
    classes = known or max(found) + 1
    if absent := sorted(set(range(classes)) - found):
        print(
            f"warning: {folder}: the masks hold {_listed(sorted(found))} of {classes} classes; no pixel has "
            f"{_listed(absent, 'or')}, which counts as 0 in the mean of all classes. Number the classes without gaps, or "
            "read the mean of the classes present",
            flush=True,
        )
    first = next(iter(held))
    if unlearned := sorted(found - held[first]):
        print(
            f"warning: {folder}: no mask of '{first}' has {_listed(unlearned, 'or')}, which other masks have: nothing can "
            "learn it, and it counts as 0",
            flush=True,
        )


def _too_few(folder: str | Path, split: str, numbers: list[int], ignored: bool, help: str) -> str:
    """Why the masks of a split measure nothing, and what mends it. help: `_palette_help`."""
    where = f"{folder}: the masks of '{split}'"
    mend = f"write class numbers 0, 1, 2 … into the masks, or name their colors ({help})"
    if not numbers:
        return f"{where} hold only 255, which is ignored: no pixel can be measured; {mend}"
    if ignored:
        return (
            f"{where} hold {numbers[0]} and 255: 255 is ignored, so there is one class and every prediction is right; "
            f"write 1 for the object, or name the colors `0 0 0 background` and `255 255 255 object` "
            f"({help})"
        )
    return f"{where} hold {numbers[0]} only: there is one class and every prediction is right; {mend}"


def _palette_help(folder: str | Path, option: bool = True) -> str:
    other = ", or in another file with --palette FILE" if option else ""
    return f"a line `R G B NAME` for each in {Path(folder) / PALETTE}{other}"


def _colors(masks: Sequence[Path], split: str) -> str:
    """The colors of a split's first masks, with their shares."""
    masks = masks[:COLORED_MASKS]
    counts: Counter[int] = Counter()
    for path in masks:
        values, pixels = np.unique(packed(Image.open(path)), return_counts=True)
        counts.update(dict(zip(values.tolist(), pixels.tolist(), strict=True)))
    shares = [f"{unpack(color)} ({100 * n / counts.total():.3g} %)" for color, n in counts.most_common(LISTED)]
    more = f" and {len(counts) - LISTED:,} more" if len(counts) > LISTED else ""
    return f"the first {len(masks)} masks of '{split}' hold {len(counts):,} colors: {', '.join(shares)}{more}"


def _listed(numbers: Sequence[int], last: str = "and") -> str:
    """'0, 3 to 7 and 9': numbers in ascending order."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    words = [word for run in runs for word in ([f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run))]
    if len(words) > LISTED:
        words = [*words[: LISTED - 1], f"{len(words) - LISTED + 1} more"]
    return f" {last} ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
