"""A chart of some metrics over a run, as an SVG that a page carries.

Written without matplotlib: importing it and laying out fifteen charts takes two CPU-seconds, the whole page takes half a
second without it. The page's style sheet gives the colors: currentColor and --c0.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

POINTS = 400  # of a curve: more are drawn as means, with their range behind them
WIDTH, HEIGHT, FONT = 331.0, 180.0, 9.0  # of a chart; the page scales it
LETTER = 0.55 * FONT  # width of a letter, about
COLORS = ("var(--c0)", "#e69f00", "#009e73", "#d55e00")  # Okabe & Ito's, safe for color-blind readers
DASHES = ("", "6 2.5", "1.6 2.6", "9 2.5 1.6 2.5")  # line styles, so that curves differ without color too


Rows = list[dict[str, float]]  # of metrics.jsonl, by step


def curve(rows: Rows, title: str, unit: str, names: Sequence[str], ceiling: float | None = None) -> str:
    """An SVG of some metrics of a run, see `chart`."""
    return chart({name.replace("_", " "): (rows, name) for name in names}, title, unit, ceiling)


def chart(shown: Mapping[str, tuple[Rows, str]], title: str, unit: str, ceiling: float | None = None) -> str:
    """An SVG of curves over epochs (steps, if epochs were not recorded); '' if none of them was recorded.

    shown: {label: (rows, name of the metric)}, a label keeps its color if others were not recorded; unit: label of the
    y axis; ceiling: the highest possible value, drawn as a line.
    """
    styles = {label: (COLORS[n % 4], DASHES[(n + n // 4) % 4]) for n, label in enumerate(shown)}  # 16 that differ
    recorded = {
        label: of for label, of in shown.items() if any(isinstance(row.get(of[1]), int | float) for row in of[0])
    }
    if not recorded:
        return ""
    x_name = "epoch" if all("epoch" in rows[0] for rows, _ in recorded.values()) else "step"
    curves = [_Curve.of(rows, name, x_name) for rows, name in recorded.values()]
    legend = [(label, *styles[label]) for label in recorded]
    y_values = [edge for c in curves for edge in (c.low, c.high)]
    if ceiling is not None:
        legend.append((f"{ceiling:.1f}: uniform over all prototypes", "currentColor", "1 3"))
        y_values.append(np.array([ceiling]))
    legend_svg, legend_height = _legend(legend) if len(legend) > 1 else ("", 6.0)
    x_low, x_high = _padded(*_range([c.x for c in curves]))
    y_low, y_high = _padded(*_range(y_values))
    if len(legend) == 1:  # the axis of a single curve starts at 0
        low = curves[0].low
        y_low = float(np.min(low, initial=0.0, where=np.isfinite(low)))
    plot = _Plot(x_low, x_high, y_low, y_high, legend_height, bool(unit))
    parts = [legend_svg, *plot.axes(f"{x_name}s", unit)]
    for c, (_, color, dash) in zip(curves, legend, strict=False):
        x = plot.x(c.x)
        if c.thinned:
            parts += _bands(x, plot.y(c.low), plot.y(c.high), color)
        parts += _lines(x, plot.y(c.mean), color, dash, markers=len(x) <= 30)
    if ceiling is not None:
        line = f"M{plot.left:.1f} {plot.y(np.array(ceiling)):.1f}H{plot.right:.1f}"
        parts.append(f'<path d="{line}" stroke="currentColor" stroke-width=".8" stroke-dasharray="1 3"/>')
    label = escape(f"{title}: {', '.join(recorded)}", quote=True)
    return (
        f'<svg role="img" aria-label="{label}" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" xmlns="http://www.w3.org/2000/svg" '
        f'fill="none" font-size="{FONT:g}">{"".join(parts)}</svg>'
    )


@dataclass(frozen=True)
class _Curve:
    """A metric over a run, thinned: arrays [n]. x: "epoch" or "step"."""

    x: NDArray
    mean: NDArray
    low: NDArray
    high: NDArray
    thinned: bool

    @staticmethod
    def of(rows: Rows, name: str, x_name: str) -> "_Curve":
        points = [(row[x_name], row[name]) for row in rows if isinstance(row.get(name), int | float)]
        x, mean, low, high = thin(*np.array(points, float).T)
        return _Curve(x, mean, low, high, len(points) > len(x))


class _Plot:
    """The area of the curves: from values to coordinates."""

    def __init__(self, x_low: float, x_high: float, y_low: float, y_high: float, top: float, has_label: bool):
        self.x_low, self.x_high, self.y_low, self.y_high = x_low, x_high, y_low, y_high
        self.x_ticks, self.y_ticks = ticks(x_low, x_high, 7), ticks(y_low, y_high, 5)
        self.left = 10 + 1.4 * FONT * has_label + LETTER * max(len(text) for _, text in self.y_ticks)
        self.right, self.top, self.bottom = WIDTH - 8, top, HEIGHT - 2.6 * FONT - 6

    def x(self, values: NDArray) -> NDArray:
        return self.left + (values - self.x_low) / (self.x_high - self.x_low) * (self.right - self.left)

    def y(self, values: NDArray) -> NDArray:
        return self.bottom - (values - self.y_low) / (self.y_high - self.y_low) * (self.bottom - self.top)

    def axes(self, x_label: str, y_label: str) -> list[str]:
        """Two axes with ticks and labels."""
        left, right, bottom = self.left, self.right, self.bottom
        lines = [f"M{left:.1f} {self.top:.1f}V{bottom:.1f}H{right:.1f}"]
        parts = []
        for value, text in self.x_ticks:
            x = float(self.x(np.array(value)))
            lines.append(f"M{x:.1f} {bottom:.1f}v3")
            parts.append(_text(x, bottom + 4 + FONT, text, "middle"))
        for value, text in self.y_ticks:
            y = float(self.y(np.array(value)))
            lines.append(f"M{left:.1f} {y:.1f}h-3")
            parts.append(_text(left - 5, y + 0.35 * FONT, text, "end"))
        parts.append(f'<path d="{"".join(lines)}" stroke="currentColor" stroke-width=".8"/>')
        parts.append(_text((left + right) / 2, HEIGHT - 4, x_label, "middle"))
        if y_label:
            turn = f"translate({FONT:.1f} {(self.top + bottom) / 2:.1f}) rotate(-90)"
            parts.append(f'<g transform="{turn}">{_text(0, 0, y_label, "middle")}</g>')
        return parts


def thin(x: NDArray, y: NDArray) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """(x, mean, lowest, highest) of at most POINTS consecutive pieces of a curve."""
    pieces = min(len(x), POINTS)
    size, longer = divmod(len(x), pieces)  # as np.array_split: the first pieces have one more
    lengths = np.full(pieces, size) + (np.arange(pieces) < longer)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    mean = np.add.reduceat(y, starts) / lengths
    return x[ends - 1], mean, np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)


def ticks(low: float, high: float, count: int) -> list[tuple[float, str]]:
    """About `count` round values from low to high, with their labels."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [(n * step, f"{n * step:.6g}") for n in numbers]


def _range(values: list[NDArray]) -> tuple[float, float]:
    """(lowest, highest) of the finite values, never equal."""
    flat = np.concatenate(values)
    flat = flat[np.isfinite(flat)]
    low, high = (float(flat.min()), float(flat.max())) if len(flat) else (0.0, 1.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        half = 0.05 * abs(high) or 0.5
        return low - half, high + half
    return low, high


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.05 * (high - low)
    return low - margin, high + margin


def _finite_runs(*values: NDArray) -> list[slice]:
    """The runs of indices at which all values are finite: a curve has a gap where it is not."""
    finite = np.all([np.isfinite(v) for v in values], axis=0)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], finite, [False]]).astype(int)))
    return [slice(a, b) for a, b in edges.reshape(-1, 2)]


def _points(x: NDArray, y: NDArray) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))


def _lines(x: NDArray, y: NDArray, color: str, dash: str, markers: bool) -> list[str]:
    style = f' stroke-dasharray="{dash}"' if dash else ""
    runs = _finite_runs(x, y)
    parts = [
        f'<polyline points="{_points(x[run], y[run])}" stroke="{color}" stroke-width="1.6" stroke-linejoin="round"{style}/>'
        for run in runs
    ]
    if markers:
        at = [(a, b) for run in runs for a, b in zip(x[run], y[run], strict=True)]
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="1.8" fill="{color}"/>' for a, b in at]
    return parts


def _bands(x: NDArray, low: NDArray, high: NDArray, color: str) -> list[str]:
    """The range between two curves, filled."""
    outlines = [
        f"{_points(x[run], high[run])} {_points(x[run][::-1], low[run][::-1])}" for run in _finite_runs(x, low, high)
    ]
    return [f'<polygon points="{outline}" fill="{color}" fill-opacity=".2"/>' for outline in outlines]


def _legend(labels: list[tuple[str, str, str]]) -> tuple[str, float]:
    """(legend above the chart, its height)."""
    x, y, parts = 10.0, FONT + 1, []
    for text, color, dash in labels:
        width = 22 + LETTER * len(text) + 10
        if x > 10 and x + width > WIDTH:
            x, y = 10.0, y + 1.3 * FONT
        style = f' stroke-dasharray="{dash}"' if dash else ""
        parts.append(f'<path d="M{x:.1f} {y - 3:.1f}h18" stroke="{color}" stroke-width="1.6"{style}/>')
        parts.append(_text(x + 22, y, text, "start"))
        x += width
    return "".join(parts), y + 6


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="currentColor">{escape(text)}</text>'
