"""Count how often two views of an image hold different objects (DenseDINO paper, section 3.3).

    python -m tools.show misalignment [VOC_FOLDER] [--config FILE ...] [--split train] [--scenes 1000] [--draws 20]
        [--min-share SHARE] [--out misalignment.png]

The paper: "object misalignment [...] indicates that the object information in different views is unequal". Of a pair of a
teacher view and another view, with "the pair views contain completely different objects" and "there are multiple objects
in the global view while the local view contains not all of them", this counts

    full misalignment   the teacher view holds objects, and the other view none of them
    part misalignment   both hold an object, and the teacher view holds one more that the other lacks
    a lost object       an object that the teacher view holds and the other does not, by the object's size

over all pairs whose teacher view holds an object. A view holds an object if at least one of its visible pixels is in the
window, or at least the share --min-share of them. Without --min-share the figures are therefore lower bounds.

The windows are the trainer's own (pipeline/geometry.py), --draws times for each scene, for the eight rows of the paper's
Table 2 and for each --config. An object's pixels in a window are counted exactly. The painted scenes (data/scenes, the
default) hold each class once, so a class is an object; VOC's SegmentationObject separates objects; in other folders an
object is a connected component of one class. Class 0 is the background, and components of less than a thousandth of the
image are ignored. The resolution of a view does not change its window, so rows 3 and 4 (low and high resolution at one
scale) are equal.

O objects of a scene · D draws · V views, the first T of them the teacher's · H, W height and width, pixels.
"""

import argparse
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from scipy.ndimage import label

from eval.datasets import IGNORE, VocSegmentation
from eval.features import progress_bar
from pipeline.geometry import draw_windows
from pipeline.random import hash64
from runtime.config import TEACHERS, Config
from runtime.errors import UserError
from tools.show.figures import COLORS, save

MIN_SIZE = 0.001  # of the image; smaller components of a mask are not counted as objects
BINS = 8  # of objects by size, equally many in each

Scale = tuple[float, float]


@dataclass(frozen=True)
class Recipe:
    """How views are cropped."""

    name: str
    scale: tuple[Scale, ...]  # of each of the V views
    min_overlap: float
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    miou: float | None = None  # percent, as the paper reports it (Table 2)

    @classmethod
    def of_config(cls, path: str, config: Config) -> "Recipe":
        scales = tuple(view.scale for view in config.views)
        return cls(Path(path).stem, scales, config.data.min_overlap, config.data.aspect)


GLOBAL, LOCAL = (0.4, 1.0), (0.05, 0.4)
_VIEWS = (
    ("2×224", 2 * (GLOBAL,)),
    ("2×224+4×96 local", 2 * (GLOBAL,) + 4 * (LOCAL,)),
    ("2×224+4×96", 6 * (GLOBAL,)),
    ("6×224", 6 * (GLOBAL,)),
)
_MIOU = ((46.0, 39.7, 42.6, 46.4), (53.1, 49.0, 51.4, 57.4))
TABLE_2 = [
    Recipe(f"{method} {name}", scale, overlap, miou=miou)
    for (method, overlap), figures in zip((("DINO", 0.0), ("DenseDINO", 0.01)), _MIOU, strict=True)
    for (name, scale), miou in zip(_VIEWS, figures, strict=True)
]


# -------------------------------------------------------------------------------------------------------------- objects


def find_objects(scenes: VocSegmentation, i: int) -> NDArray[np.bool_]:
    """The pixels of each object of a scene: [O,H,W]."""
    mask = np.asarray(scenes.mask(i))
    instances = scenes.folder / "SegmentationObject" / scenes.masks[i].name
    if instances.is_file():
        numbers = np.asarray(Image.open(instances))
        objects = [numbers == n for n in np.setdiff1d(numbers, [0, IGNORE])]
    else:
        classes = [mask == kind for kind in np.setdiff1d(mask, [0, IGNORE])]
        if (scenes.folder / "scenes.json").is_file():
            objects = classes
        else:
            components = [label(pixels) for pixels in classes]
            objects = [numbers == n + 1 for numbers, count in components for n in range(count)]
    objects = [pixels for pixels in objects if pixels.mean() >= MIN_SIZE]
    return np.array(objects, bool).reshape(-1, *mask.shape)


def pixels_inside(objects: NDArray[np.bool_], windows: NDArray) -> NDArray[np.int64]:
    """Visible pixels of each object in each window, counted exactly: objects [O,H,W], windows [...,4] -> [...,O]."""
    sums = np.zeros((len(objects), objects.shape[1] + 1, objects.shape[2] + 1), np.int64)
    sums[:, 1:, 1:] = objects.cumsum(1).cumsum(2)  # of all pixels above and left (an integral image)
    x0, x1 = np.sort(windows[..., [0, 2]], axis=-1).T  # a flipped window holds the same pixels
    y0, y1 = windows[..., 1].T, windows[..., 3].T
    return (sums[:, y1, x1] - sums[:, y0, x1] - sums[:, y1, x0] + sums[:, y0, x0]).T


# ------------------------------------------------------------------------------------------------------------- counting


@dataclass
class PairCounts:
    """Counts of one recipe: pairs in each scene, and how often each object of the teacher views was lost."""

    pairs: list[int] = field(default_factory=list)
    full: list[int] = field(default_factory=list)
    part: list[int] = field(default_factory=list)
    # by the scales of the two views: (size as a share of the image, times held by the teacher view, times lost)
    objects: dict[tuple[Scale, Scale], list[tuple[float, int, int]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, held: NDArray[np.bool_], sizes: NDArray[np.float64], scale: tuple[Scale, ...]) -> None:
        """Count a scene: held [D,V,O], whether a view of a draw holds an object; sizes [O], shares of the image."""
        pairs = [(t, v) for t in range(TEACHERS) for v in range(len(scale)) if t != v]
        teacher, other = (held[:, list(views)] for views in zip(*pairs, strict=True))  # [D,pairs,O]
        counted, shared = teacher.any(-1), (teacher & other).any(-1)
        lost = teacher & ~other
        self.pairs.append(int(counted.sum()))
        self.full.append(int((counted & ~shared).sum()))
        self.part.append(int((shared & lost.any(-1)).sum()))
        for p, (t, v) in enumerate(pairs):
            times = zip(sizes, teacher[:, p].sum(0), lost[:, p].sum(0), strict=True)
            self.objects[scale[t], scale[v]] += [(float(size), int(n), int(n_lost)) for size, n, n_lost in times]

    def percent(self, cases: list[int]) -> tuple[float, float]:
        """(percent of the pairs, half the width of its 95 % confidence interval over the choice of scenes)."""
        n, f = np.array(self.pairs, float), np.array(cases, float)
        share = f.sum() / max(1, n.sum())
        return 100 * share, 100 * 1.96 * float(np.sqrt(((f - share * n) ** 2).sum())) / max(1, n.sum())


def count_pairs(scenes: VocSegmentation, recipes: list[Recipe], draws: int, min_share: float) -> list[PairCounts]:
    """Counts of each recipe over all scenes. Raises UserError if no scene holds an object."""
    counts = [PairCounts() for _ in recipes]
    for i in progress_bar(range(len(scenes)), len(scenes), "scenes"):
        objects = find_objects(scenes, i)
        if not len(objects):
            continue
        visible = objects.sum((1, 2))
        height, width = objects.shape[1:]
        key = hash64(0, "misalignment", i, np.arange(draws))
        for recipe, of_recipe in zip(recipes, counts, strict=True):
            windows = draw_windows(
                key, np.full(draws, height), np.full(draws, width), scale=list(recipe.scale), aspect=recipe.aspect,
                teachers=TEACHERS, min_overlap=recipe.min_overlap,
            )  # fmt: skip
            inside = pixels_inside(objects, windows)  # [D,V,O]
            of_recipe.add(inside >= np.maximum(1, min_share * visible), visible / (height * width), recipe.scale)
    if not counts[0].pairs:
        raise UserError(f"{scenes.folder}: no scene of split '{scenes.split}' holds an object")
    return counts


def lost_by_size(
    recipes: list[Recipe], counts: list[PairCounts]
) -> dict[tuple[Scale, Scale, float], tuple[NDArray, NDArray]]:
    """(sizes in % of the image, lost objects in %), each [bins], by the two views' scales and the minimum overlap."""
    groups: dict[tuple[Scale, Scale, float], list[tuple[float, int, int]]] = defaultdict(list)
    for recipe, of_recipe in zip(recipes, counts, strict=True):
        for (teacher, other), objects in of_recipe.objects.items():
            groups[teacher, other, recipe.min_overlap] += objects
    curves = {}
    for group, objects in groups.items():
        size, held, lost = np.array(sorted(objects)).T
        bins = [bin for bin in np.array_split(np.arange(len(size)), BINS) if held[bin].sum()]
        means = np.array([100 * np.exp(np.log(size[bin]).mean()) for bin in bins])  # geometric
        curves[group] = means, np.array([100 * lost[bin].sum() / held[bin].sum() for bin in bins])
    return curves


# ------------------------------------------------------------------------------------------------- a table, and a figure


def make_table(recipes: list[Recipe], counts: list[PairCounts], title: str) -> Table:
    """A row for each recipe; the last column is the mIoU that the paper reports for it."""
    caption = "% of the pairs whose teacher view holds an object, ± 95 % over the scenes; paper: its mIoU (Table 2)"
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for head in ("views", "full %", "part %", "aligned", "paper"):
        table.add_column(head, justify="left" if head == "views" else "right", no_wrap=True)
    for recipe, of_recipe in zip(recipes, counts, strict=True):
        (full, full_ci), (part, part_ci) = of_recipe.percent(of_recipe.full), of_recipe.percent(of_recipe.part)
        miou = "–" if recipe.miou is None else f"{recipe.miou:.1f}"
        figures = (f"{full:.2f} ± {full_ci:.2f}", f"{part:.1f} ± {part_ci:.1f}", f"{100 - full - part:.1f}", miou)
        table.add_row(recipe.name, *figures)
    return table


def make_figure(recipes: list[Recipe], counts: list[PairCounts], title: str) -> Figure:
    """Left the rows of the table, right the lost objects by size."""
    layout = ConstrainedLayoutEngine(w_pad=0.1)  # inches
    figure = Figure(figsize=(9.5, 2.2 + 0.34 * len(recipes)), layout=layout)
    figure.suptitle(title, fontsize=9)
    bars, curves = figure.subplots(1, 2, width_ratios=(1.1, 1))
    _draw_bars(bars, recipes, counts)
    _draw_curves(curves, lost_by_size(recipes, counts))
    for axes in (bars, curves):
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16 - 0.25 / len(recipes)))
    curves.get_legend().set_title("scale of the teacher view and of the other view", {"size": 7})
    return figure


def _draw_bars(axes: Axes, recipes: list[Recipe], counts: list[PairCounts]) -> None:
    rows = np.arange(len(recipes))[::-1]
    full, part = (np.array([c.percent(getattr(c, kind))[0] for c in counts]) for kind in ("full", "part"))
    style: dict[str, Any] = dict(height=0.7, ec="black", lw=0.5)
    axes.barh(rows, full, color=COLORS[4], label="full: no object in common", **style)
    axes.barh(rows, part, left=full, color=COLORS[5], hatch="///", label="part: an object is missing", **style)
    for row, a, b in zip(rows, full, part, strict=True):
        axes.text(a + b, row, f" {a:.1f} + {b:.1f}", va="center", fontsize=7)
    axes.set_yticks(rows, [recipe.name for recipe in recipes], fontsize=8)
    axes.set_xlim(0, 1.22 * (full + part).max() + 1)
    axes.set_xlabel("misaligned pairs of views, %", fontsize=8)


def _draw_curves(axes: Axes, curves: Mapping[tuple[Scale, Scale, float], tuple[NDArray, NDArray]]) -> None:
    scales = list(dict.fromkeys((teacher, other) for teacher, other, _ in curves))
    for (teacher, other, overlap), (size, lost) in curves.items():
        n = scales.index((teacher, other))
        style = dict(ls="--", marker="osD^v"[n % 5], ms=5) if overlap else dict(lw=5, alpha=0.35)
        names = [f"{100 * low:.0f}–{100 * high:.0f} %" for low, high in (teacher, other)]
        text = f"{' and '.join(names)}, {f'overlap > {100 * overlap:g} %' if overlap else 'any overlap'}"
        axes.plot(size, lost, color=COLORS[n % len(COLORS)], label=text, **style)  # type: ignore[arg-type]
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("size of the object, % of the image", fontsize=8)
    axes.set_ylabel("teacher view's objects that the other lacks, %", fontsize=8)
    axes.set_ylim(bottom=0)


def show(args: argparse.Namespace, configs: Mapping[str, Config]) -> None:
    """Print the table and write the figure, for the paper's recipes and those of `configs` (by path)."""
    recipes = TABLE_2 + [Recipe.of_config(path, config) for path, config in configs.items()]
    scenes = VocSegmentation(args.data, args.split, 1, classes=1).subset(args.scenes)
    counts = count_pairs(scenes, recipes, args.draws, args.min_share)
    title = f"Object misalignment of two views: {args.data}, {len(scenes)} scenes × {args.draws} draws"
    Console().print(make_table(recipes, counts, title))
    save(make_figure(recipes, counts, title), args.out, [])
    print(f"misalignment written to {args.out}")
