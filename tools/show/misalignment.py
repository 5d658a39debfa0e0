"""How often the views of an image hold different objects: the paper's section 3.3, counted.

    python -m tools.show.misalignment [VOC_FOLDER] [--config FILE ...] [--split train] [--scenes 1000] [--draws 20]
        [--least SHARE] [--out misalignment.png]

The paper: "object misalignment [...] indicates that the object information in different views is unequal". Of a pair of a
teacher view and another view, with "the pair views contain completely different objects" and "there are multiple objects
in the global view while the local view contains not all of them", this counts

    full misalignment   the teacher view holds objects, and the other view none of them
    part misalignment   both hold an object, and the teacher view one more that the other lacks
    a lost object       an object that the teacher view holds and the other does not, by the object's size

over all pairs whose teacher view holds an object. A view holds an object when one of its visible pixels lies in the
window, or at least the share --least of them. So without --least the figures are the least that can be said.

The windows are the trainer's own (pipeline/geometry.py), --draws times for each scene, for the eight rows of the paper's
Table 2 and for each --config. An object's pixels in a window are counted exactly. The painted scenes (data/scenes, the
default) hold each class once, and the mask tells which; VOC's SegmentationObject tells objects apart; in other folders an
object is a connected piece of one class. Class 0 is ground, and pieces of less than a thousandth of the image are none.
The resolution of a view changes no window, so rows 3 and 4 (low and high resolution at one scale) are the same.

O objects of a scene · D draws · V views, the first T of them the teacher's · H, W height and width, pixels.
"""

import argparse
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from scipy.ndimage import label

from eval.datasets import IGNORE, VocSegmentation
from eval.features import shown
from eval.target import spread
from pipeline.geometry import draw_windows
from pipeline.random import hash64
from runtime.config import TEACHERS, load_config
from runtime.errors import UserError, run_cli
from tools.show.figures import COLORS, save

SMALLEST = 0.001  # of the image; smaller pieces of a mask are no objects
BINS = 8  # of objects by their size, equally many in each

Scale = tuple[float, float]


@dataclass(frozen=True)
class Recipe:
    """How views are cut. seg: mIoU that the paper reports for it (Table 2)."""

    name: str
    scale: tuple[Scale, ...]  # of each of the V views
    min_overlap: float
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    seg: float | None = None


GLOBAL, LOCAL = (0.4, 1.0), (0.05, 0.4)
_VIEWS = (
    ("2×224", 2 * (GLOBAL,)),
    ("2×224+4×96 local", 2 * (GLOBAL,) + 4 * (LOCAL,)),
    ("2×224+4×96", 6 * (GLOBAL,)),
    ("6×224", 6 * (GLOBAL,)),
)
_SEG = ((46.0, 39.7, 42.6, 46.4), (53.1, 49.0, 51.4, 57.4))
TABLE_2 = [
    Recipe(f"{method} {name}", scale, overlap, seg=seg)
    for (method, overlap), figures in zip((("DINO", 0.0), ("DenseDINO", 0.01)), _SEG, strict=True)
    for (name, scale), seg in zip(_VIEWS, figures, strict=True)
]


def recipe_of(path: str) -> Recipe:
    config = load_config(path)
    scales = tuple(view.scale for view in config.views)
    return Recipe(Path(path).stem, scales, config.data.min_overlap, config.data.aspect)


# -------------------------------------------------------------------------------------------------------------- objects


def objects_of(scenes: VocSegmentation, i: int) -> NDArray[np.bool_]:
    """Where each object of a scene is: [O,H,W]."""
    mask = np.asarray(Image.open(scenes.masks[i]))
    told = scenes.folder / "SegmentationObject" / scenes.masks[i].name
    if told.is_file():
        numbers = np.asarray(Image.open(told))
        found = [numbers == n for n in np.setdiff1d(numbers, [0, IGNORE])]
    else:
        kinds = [mask == kind for kind in np.setdiff1d(mask, [0, IGNORE])]
        if (scenes.folder / "scenes.json").is_file():
            found = kinds
        else:
            pieces = [label(kind) for kind in kinds]
            found = [where == n + 1 for where, count in pieces for n in range(count)]
    found = [where for where in found if where.mean() >= SMALLEST]
    return np.array(found, bool).reshape(-1, *mask.shape)


def pixels_inside(objects: NDArray[np.bool_], windows: NDArray) -> NDArray[np.int64]:
    """Visible pixels of each object in each window, counted exactly: objects [O,H,W], windows [...,4] -> [...,O]."""
    sums = np.zeros((len(objects), objects.shape[1] + 1, objects.shape[2] + 1), np.int64)
    sums[:, 1:, 1:] = objects.cumsum(1).cumsum(2)  # of all pixels above and left
    x0, x1 = np.sort(windows[..., [0, 2]], axis=-1).T  # a flipped window holds the same
    y0, y1 = windows[..., 1].T, windows[..., 3].T
    return (sums[:, y1, x1] - sums[:, y0, x1] - sums[:, y1, x0] + sums[:, y0, x0]).T


# ------------------------------------------------------------------------------------------------------------- counting


@dataclass
class Count:
    """Of one recipe: cases in each scene, and what became of each object of the teacher views."""

    pairs: list[int] = field(default_factory=list)
    full: list[int] = field(default_factory=list)
    part: list[int] = field(default_factory=list)
    # by the scales of the two views: (size as a share of the image, times held by the teacher view, times lost)
    objects: dict[tuple[Scale, Scale], list[tuple[float, int, int]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, held: NDArray[np.bool_], sizes: NDArray[np.float64], scale: tuple[Scale, ...]) -> None:
        """A scene: held [D,V,O], which view of which draw holds which object."""
        pairs = [(t, v) for t in range(TEACHERS) for v in range(len(scale)) if t != v]
        teacher, other = (held[:, list(which)] for which in zip(*pairs, strict=True))  # [D,pairs,O]
        cases, shared = teacher.any(-1), (teacher & other).any(-1)
        lost = teacher & ~other
        self.pairs.append(int(cases.sum()))
        self.full.append(int((cases & ~shared).sum()))
        self.part.append(int((shared & lost.any(-1)).sum()))
        for p, (t, v) in enumerate(pairs):
            times = zip(sizes, teacher[:, p].sum(0), lost[:, p].sum(0), strict=True)
            self.objects[scale[t], scale[v]] += [(float(size), int(n), int(gone)) for size, n, gone in times]

    def percent(self, cases: list[int]) -> tuple[float, float]:
        """(share of the pairs, half the width of its 95 % interval over the choice of scenes)."""
        n, f = np.array(self.pairs, float), np.array(cases, float)
        share = f.sum() / max(1, n.sum())
        return 100 * share, 100 * 1.96 * float(np.sqrt(((f - share * n) ** 2).sum())) / max(1, n.sum())


def count(scenes: VocSegmentation, recipes: list[Recipe], draws: int, least: float) -> list[Count]:
    """Each recipe on every scene. Raises UserError where no scene holds an object."""
    counts = [Count() for _ in recipes]
    for i in shown(range(len(scenes)), len(scenes), "scenes"):
        objects = objects_of(scenes, i)
        if not len(objects):
            continue
        visible = objects.sum((1, 2))
        high, wide = objects.shape[1:]
        key = hash64(0, "misalignment", i, np.arange(draws))
        for recipe, made in zip(recipes, counts, strict=True):
            windows = draw_windows(
                key, np.full(draws, high), np.full(draws, wide), scale=list(recipe.scale), aspect=recipe.aspect,
                teachers=TEACHERS, min_overlap=recipe.min_overlap,
            )  # fmt: skip
            inside = pixels_inside(objects, windows)  # [D,V,O]
            made.add(inside >= np.maximum(1, least * visible), visible / (high * wide), recipe.scale)
    if not counts[0].pairs:
        raise UserError(f"{scenes.folder}: no scene of split '{scenes.split}' holds an object")
    return counts


# -------------------------------------------------------------------------------------------------- a table, and a plot


def table_of(recipes: list[Recipe], counts: list[Count], title: str) -> Table:
    """A row for each recipe; the last column is the mIoU that the paper reports for it."""
    words = "% of the pairs whose teacher view holds an object, ± 95 % over the scenes; paper: its mIoU (Table 2)"
    table = Table(title=title, title_justify="left", caption=words, caption_justify="left")
    for head in ("views", "full %", "part %", "aligned", "paper"):
        table.add_column(head, justify="left" if head == "views" else "right", no_wrap=True)
    for recipe, made in zip(recipes, counts, strict=True):
        (full, wide), (part, wider) = made.percent(made.full), made.percent(made.part)
        seg = "–" if recipe.seg is None else f"{recipe.seg:.1f}"
        told = (f"{full:.2f} ± {wide:.2f}", f"{part:.1f} ± {wider:.1f}", f"{100 - full - part:.1f}", seg)
        table.add_row(recipe.name, *told)
    return table


def by_size(recipes: list[Recipe], counts: list[Count]) -> dict[tuple[Scale, Scale, float], tuple[NDArray, NDArray]]:
    """(sizes in % of the image, lost objects in %) by the two views' scales and the least overlap."""
    kinds: dict[tuple[Scale, Scale, float], list[tuple[float, int, int]]] = defaultdict(list)
    for recipe, made in zip(recipes, counts, strict=True):
        for (teacher, other), seen in made.objects.items():
            kinds[teacher, other, recipe.min_overlap] += seen
    curves = {}
    for kind, seen in kinds.items():
        size, held, lost = np.array(sorted(seen)).T
        parts = [part for part in np.array_split(np.arange(len(size)), BINS) if held[part].sum()]
        middles = np.array([100 * np.exp(np.log(size[part]).mean()) for part in parts])
        curves[kind] = middles, np.array([100 * lost[part].sum() / held[part].sum() for part in parts])
    return curves


def picture(recipes: list[Recipe], counts: list[Count], title: str) -> Figure:
    """Left the rows of the table, right what is lost by the object's size."""
    layout = ConstrainedLayoutEngine(w_pad=0.1)  # inches
    figure = Figure(figsize=(9.5, 2.2 + 0.34 * len(recipes)), layout=layout)
    figure.suptitle(title, fontsize=9)
    bars, curves = figure.subplots(1, 2, width_ratios=(1.1, 1))
    rows = np.arange(len(recipes))[::-1]
    full, part = (np.array([made.percent(getattr(made, kind))[0] for made in counts]) for kind in ("full", "part"))
    drawn = dict(height=0.7, ec="black", lw=0.5)
    bars.barh(rows, full, color=COLORS[4], label="full: no object in common", **drawn)
    bars.barh(rows, part, left=full, color=COLORS[5], hatch="///", label="part: an object is missing", **drawn)
    for row, a, b in zip(rows, full, part, strict=True):
        bars.text(a + b, row, f" {a:.1f} + {b:.1f}", va="center", fontsize=7)
    bars.set_yticks(rows, [recipe.name for recipe in recipes], fontsize=8)
    bars.set_xlim(0, 1.22 * (full + part).max() + 1)
    bars.set_xlabel("misaligned pairs of views, %", fontsize=8)

    found = by_size(recipes, counts)
    kinds = list(dict.fromkeys((teacher, other) for teacher, other, _ in found))
    for (teacher, other, overlap), (size, lost) in found.items():
        n = kinds.index((teacher, other))
        look = dict(ls="--", marker="osD^v"[n % 5], ms=5) if overlap else dict(lw=5, alpha=0.35)
        names = [f"{100 * low:.0f}–{100 * high:.0f} %" for low, high in (teacher, other)]
        words = f"{' and '.join(names)}, {f'overlap > {100 * overlap:g} %' if overlap else 'any overlap'}"
        curves.plot(size, lost, color=COLORS[n % len(COLORS)], label=words, **look)  # type: ignore[arg-type]
    curves.set_xscale("log")
    curves.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    curves.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    curves.xaxis.set_minor_formatter(NullFormatter())
    curves.set_xlabel("size of the object, % of the image", fontsize=8)
    curves.set_ylabel("teacher view's objects that the other lacks, %", fontsize=8)
    curves.set_ylim(bottom=0)
    for axes in (bars, curves):
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16 - 0.25 / len(recipes)))
    curves.get_legend().set_title("scale of the teacher view and of the other view", {"size": 7})
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m tools.show.misalignment", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "data", type=Path, nargs="?", default=Path("data/scenes"), help="a folder in Pascal VOC's layout"
    )
    parser.add_argument("--config", nargs="+", default=[], metavar="FILE", help="the views of these configs too")
    parser.add_argument("--split", default="train", help="default: train")
    parser.add_argument("--scenes", type=int, default=1000, help="so many at most, evenly spread (default 1000)")
    parser.add_argument("--draws", type=int, default=20, help="of each scene's windows (default 20)")
    parser.add_argument(
        "--least", type=float, default=0.0, help="share of an object that a view must hold (default: any)"
    )
    parser.add_argument("--out", type=Path, default=Path("misalignment.png"), help="the picture")
    args = parser.parse_args(argv)

    for name, least in (("scenes", 1), ("draws", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name}: at least {least}, this is {getattr(args, name)}")
    if not 0 <= args.least <= 1:
        raise UserError(f"--least: between 0 and 1, this is {args.least}")
    recipes = TABLE_2 + [recipe_of(path) for path in args.config]
    if not args.data.is_dir():
        raise UserError(f"{args.data}: no such folder; `make scenes` paints data/scenes")
    scenes = VocSegmentation(args.data, args.split, 1, classes=1)
    kept = spread(np.arange(len(scenes)), args.scenes)
    scenes.pictures, scenes.masks = [scenes.pictures[i] for i in kept], [scenes.masks[i] for i in kept]
    counts = count(scenes, recipes, args.draws, args.least)
    title = f"Object misalignment of two views: {args.data}, {len(scenes)} scenes × {args.draws} draws"
    Console().print(table_of(recipes, counts, title))
    save(picture(recipes, counts, title), args.out)
    print(f"misalignment written to {args.out}")


if __name__ == "__main__":
    run_cli(main)
