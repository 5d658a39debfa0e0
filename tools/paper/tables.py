"""What the tables hold: rows as configs with a few words changed, what the paper reports, which signs are expected.

A row is a network: a config file and words over it (a.b=c), or weights that someone else has trained. A row may start from
the weights of another, seed by seed. Rows of several
tables whose configs are the same are one run. The view recipes are made from the config's own view size and patch: at a
small scale they keep the proportions of Table 2. Page and equation numbers are those of the paper (arXiv:2306.04654).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from runtime.config import Config, Views

Figures = Mapping[str, float]  # {key of eval.tables.MEASURE_ROWS: percent}

CLS, SEG = "knn_top1", "linear_seg_miou"  # the paper's "Cls." and "Seg."
DENSE = "points_patch_small"  # what a patch token knows of a small thing under a point (eval/points.py)
FIGURES = {  # what tables show, and its short heading
    CLS: "k-NN",
    SEG: "mIoU",
    "knn_top1_patches": "k-NN, patches",
    "linear_top1": "linear",
    "cluster_seg_miou_500": "500 clusters",
    "retrieval_seg_miou": "retrieval",
    "points_patch_large": "large, patch",
    DENSE: "small, patch",
    "points_reference_small": "small, token",
}
GLOBAL, LOCAL = (0.4, 1.0), (0.05, 0.4)  # areas of windows, as shares of the image (Table 2)
DINO = ("method=dino", "data.min_overlap=0")  # plain DINO's windows know nothing of each other
PUBLISHED = ("reference.locality=null",)  # no prior, whatever the base config has
POINTS = (1, 2, 4, 8, 16, 32)  # M
WIDTHS = (2, 1, 0.7, 0.5, 0.35)  # σ of reference.locality, in patches


@dataclass(frozen=True)
class Row:
    """A network of a table."""

    name: str  # its run folder's, unless an earlier row is the same run
    label: str
    words: tuple[str, ...] = ()  # over the config
    config: str | None = None  # another file than the scale's
    weights: str | None = None  # a network to measure that is not trained here: a file, a run folder or timm:NAME
    start: str | None = None  # name of an earlier row of the same table, from whose weights it is trained
    untrained: bool = False  # the network of `start` before its training: it is only measured
    baseline: str | None = None  # name of the row of the same table that it is compared with
    paper: Figures = field(default_factory=dict)
    expected: Mapping[str, int] = field(default_factory=dict)  # sign of the difference, where the paper has no figures
    optional: bool = False  # left out, with a message, where the config's checks refuse it
    x: float | None = None  # place on the picture's axis, if all rows of the table have one

    def sign(self, key: str, baseline: "Row") -> int:
        """The sign that the difference to the baseline should have: +1, -1; 0 if nothing is expected."""
        if key in self.paper and key in baseline.paper:
            difference = self.paper[key] - baseline.paper[key]
            return (difference > 0) - (difference < 0)
        return self.expected.get(key, 0)

    def with_weights(self, file: str) -> "Row":
        """The row with weights of others in its place."""
        label = f"{self.label}: {file.rpartition('/')[2]}"
        return replace(self, label=label, weights=file, words=(), config=None, start=None, untrained=False)


@dataclass(frozen=True)
class Table:
    """Rows that are shown together."""

    name: str
    title: str
    source: str  # where its rows and expectations come from
    rows: tuple[Row, ...]
    axis: str = ""  # of the rows' x
    measures: tuple[str, ...] = ("knn", "linear_seg", "retrieval_seg", "points")  # of eval.target.MEASURES

    def row(self, name: str) -> Row:
        return next(row for row in self.rows if row.name == name)


def make_tables(base: Config) -> dict[str, Table]:
    """{name: table} of a base config: DenseDINO on the views that it has."""
    return {
        table.name: table
        for table in (_table2(base), _table3(base), _figure5(base), _locality(base), _variants(base), _continued(base))
    }


# ------------------------------------------------------------------------------------------------------------ the views


@dataclass(frozen=True)
class Recipe:
    """A view recipe of Table 2: two global views and `count` others."""

    name: str
    count: int = 0
    low: bool = False  # whether the others have the low resolution, 96 of 224
    local: bool = False  # whether the others cover small parts

    def words(self, base: Config) -> tuple[str, ...]:
        """The views of the config with this recipe. Colors are those of its own groups."""
        teacher, *others = base.data.views
        blur = others[0].blur[0] if others else sum(teacher.blur) / len(teacher.blur)
        solarize = others[0].solarize[0] if others else 0.0
        groups = [_group(teacher, 2, base.image_size, GLOBAL, teacher.blur, teacher.solarize)]
        if self.count:
            size = low_size(base) if self.low else base.image_size
            other = Views(teacher=False)
            groups.append(_group(other, self.count, size, LOCAL if self.local else GLOBAL, [blur], [solarize]))
        return (f"data.views={json.dumps(groups)}",)

    def label(self, base: Config) -> str:
        """The recipe in the paper's form: 2 x 224 + local 4 x 96."""
        size = base.image_size
        if not self.count:
            return f"2 x {size}"
        if not self.low:
            return f"{2 + self.count} x {size}"
        return f"2 x {size} + {'local ' if self.local else ''}{self.count} x {low_size(base)}"


RECIPES = (
    Recipe("2-views"),
    Recipe("2-global-4-local", 4, low=True, local=True),
    Recipe("2-global-4-low", 4, low=True),
    Recipe("6-views", 4),
)
SIX = RECIPES[-1]  # of Table 3 and Figure 5


def low_size(base: Config) -> int:
    """The side of a low-resolution view: 96/224 of a view's, in whole patches."""
    return max(1, round(base.image_size * 96 / 224 / base.model.patch)) * base.model.patch


def _group(
    views: Views, count: int, size: int, scale: tuple[float, float], blur: list[float], solarize: list[float]
) -> dict[str, object]:
    group: dict[str, object] = {"count": count, "size": size, "scale": list(scale), "teacher": views.teacher}
    return group | {"blur": blur, "solarize": solarize}


# ----------------------------------------------------------------------------------------------------------- the tables


def _table2(base: Config) -> Table:
    dino = {
        "2-views": (53.3, 46.0),
        "2-global-4-local": (58.8, 39.7),
        "2-global-4-low": (56.1, 42.6),
        "6-views": (56.7, 46.4),
    }
    dense = {
        "2-views": (53.8, 53.1),
        "2-global-4-local": (58.5, 49.0),
        "2-global-4-low": (57.5, 51.4),
        "6-views": (55.7, 57.4),
    }
    rows = []
    for name, label, words, paper in (("dino", "DINO", DINO, dino), ("densedino", "DenseDINO", (), dense)):
        for recipe in RECIPES:
            cls, seg = paper[recipe.name]
            against = f"dino-{recipe.name}" if name == "densedino" else "dino-2-views"
            rows.append(
                Row(
                    f"{name}-{recipe.name}",
                    f"{label}, {recipe.label(base)}",
                    (*recipe.words(base), *PUBLISHED, *words),
                    baseline=None if against == f"{name}-{recipe.name}" else against,
                    paper={CLS: cls, SEG: seg},
                )
            )
    source = (
        "Table 2 of the paper: ViT-Ti/16, 100 epochs of ImageNet, Pascal VOC. DINO is compared with DINO on two global "
        "views, DenseDINO with DINO on the same views. Views without \"local\" cover 40 to 100 % of the image, local "
        "views 5 to 40 %."
    )  # fmt: skip
    return Table("table2", "Table 2: view recipes", source, tuple(rows))


def _table3(base: Config) -> Table:
    views, cls = (*SIX.words(base), *PUBLISHED), "dino-6-views"
    rows = (
        Row(cls, "class loss", (*views, *DINO), paper={CLS: 56.7, SEG: 46.4}),
        Row(
            "reference-loss-6-views",
            "reference loss",
            (*views, "loss.alpha=0"),
            baseline=cls,
            paper={CLS: 42.4, SEG: 55.9},
        ),
        Row("densedino-6-views", "both", views, baseline=cls, paper={CLS: 55.7, SEG: 57.4}),
    )
    source = (
        f"Table 3 of the paper, on {SIX.label(base)} as there (its first and last rows are Table 2's). The class loss alone "
        "is plain DINO."
    )
    return Table("table3", "Table 3: loss terms", source, rows)


def _figure5(base: Config) -> Table:
    default = base.reference.points if base.reference.points in POINTS else 4
    rows = []
    for points in POINTS:
        more = points > default
        expected = {CLS: 1 if more else -1}
        if points < 4 or points == max(POINTS):
            expected[SEG] = -1
        words = (*SIX.words(base), *PUBLISHED, f"reference.points={points}")
        rows.append(
            Row(
                f"densedino-6-views-m{points}",
                f"M = {points}",
                words,
                baseline=None if points == default else f"densedino-6-views-m{default}",
                paper={CLS: 55.7, SEG: 57.4} if points == 4 else {},
                expected={} if points == default else expected,
                optional=points > default,
                x=points,
            )
        )
    source = (
        f"Figure 5 of the paper, on {SIX.label(base)} as there. The figure has no numbers in print; those of M = 4 are "
        "Table 2's. Signs are those of section 4.3: k-NN rises with M, four points are enough for segmentation, many "
        "points hurt it (expected here of M = 32 alone)."
    )
    return Table(
        "figure5", "Figure 5: reference points of a pair", source, tuple(rows), "M, reference points of a pair"
    )


def _locality(base: Config) -> Table:
    none = "densedino"
    rows = [
        Row(none, "published (none)", PUBLISHED),
        Row("dino", "DINO", (*DINO, *PUBLISHED), baseline=none, expected={SEG: -1}),
    ]
    rows += [
        Row(
            f"{none}-sigma-{sigma:g}",
            f"σ = {sigma:g}",
            (f"reference.locality={sigma:g}",),
            baseline=none,
            expected={SEG: 1, DENSE: 1},
        )
        for sigma in WIDTHS
    ]
    source = (
        "Not in the paper: a Gaussian prior of σ patches on what a reference token attends to (reference.locality), on the "
        "config's own views. Expected of it: more mIoU, and patch tokens that know more of small things; of DINO, less mIoU."
    )
    measures = ("knn", "linear_seg", "cluster_seg", "retrieval_seg", "points")
    return Table("locality", "Locality of reference tokens", source, tuple(rows), measures=measures)


VARIANTS = {
    "by-head": ("σ from half to twice by head", ("method=tools.paper.variants:ByHead",)),
    "learned": ("σ learned by block and head", ("method=tools.paper.variants:Learned",)),
    "annealed": ("from σ to none over training", ("method=tools.paper.variants:Annealed",)),
    "first-block": ("in the first block only", ("method=tools.paper.variants:FirstBlock",)),
    "last-block": ("in the last block only", ("method=tools.paper.variants:LastBlock",)),
    "share": ("distance in the photo, not in the view", ("method=tools.paper.variants:ShareOfImage",)),
    "m-1": ("M = 1", ("reference.points=1",)),
    "m-16": ("M = 16", ("reference.points=16",)),
    "alpha-0.3": ("α = 0.3", ("loss.alpha=0.3",)),
    "alpha-0.7": ("α = 0.7", ("loss.alpha=0.7",)),
    "center-published": ("the published center", ("reference.center=published",)),
    "centered": ("targets centered within an image", ("method=tools.paper.variants:CenteredTargets",)),
    "sine-cosine": ("positions start as sines and cosines", ("method=tools.paper.variants:SineCosine",)),
}


def _variants(base: Config) -> Table:
    local = ("reference.locality=0.5",)
    baseline = "densedino-sigma-0.5"
    rows = [Row(baseline, "σ = 0.5", local)]
    for name, (label, words) in VARIANTS.items():
        rows.append(Row(f"local-{name}", label, (*local, *words), baseline=baseline, optional=True))
    source = (
        "Not in the paper: variants of the prior and of what it works with (tools/paper/variants.py), each compared with "
        "σ = 0.5 in every head and block."
    )
    return Table("variants", "Variants of the locality prior", source, tuple(rows))


def _continued(base: Config) -> Table:
    optim, dino, longer = base.optim, "dino", "dino-continued"
    short = (
        f"optim.epochs={optim.epochs / 4:g}", f"optim.warmup_epochs={optim.warmup_epochs / 4:g}",
        f"optim.lr={optim.lr / 4:g}",
    )  # fmt: skip
    rows = [
        Row(dino, "DINO", (*DINO, *PUBLISHED)),
        Row(longer, "continued with DINO", (*DINO, *PUBLISHED, *short), start=dino, baseline=dino),
    ]
    sigma = base.reference.locality or 1.0
    for name, label, words in (
        ("densedino-continued", "continued with DenseDINO, published", PUBLISHED),
        ("local-continued", f"continued with DenseDINO, σ = {sigma:g}", (f"reference.locality={sigma:g}",)),
    ):
        expected = {SEG: 1, "retrieval_seg_miou": 1, DENSE: 1}
        rows.append(Row(name, label, (*words, *short), start=dino, baseline=longer, expected=expected))
    source = (
        "Not in the paper: a run of DINO is continued for a quarter of its steps, at a quarter of its rate, with new heads. "
        "Expected of DenseDINO: better dense measures than those of DINO continued alike."
    )
    return Table("continued", "DINO continued with reference tokens", source, tuple(rows))
