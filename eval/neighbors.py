"""Near-duplicates and outliers among photos, by their features.

    duplicates.csv   pairs whose cosine is at least a threshold, the most similar first
    outliers.csv     photos whose mean cosine to their k nearest is lowest
    neighbors.png    the first of both

The search is exact (eval/knn.NearestNeighbors). A photo is compared with its k nearest: of more than k copies
not every pair is listed, but each copy is in one. Features are [CLS]; without them, the mean of the patch tokens.

n photos · D width · k neighbors.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from eval.feature_folder import FeatureFolder
from eval.knn import BLOCK_ROWS, NearestNeighbors
from eval.photo_source import PhotoSource
from eval.provenance import png_text
from runtime.distributed import best_device
from runtime.errors import UserError, plural
from runtime.files import atomic_path, write_atomic

OUTLIERS = 100  # in the list
COLUMNS, PAIRS, STRANGE = 8, 16, 16  # photos of a row of the sheet; pairs and outliers on it
THUMBNAIL, INCHES, TEXT = 160, 1.3, 6  # pixels and inches of a photo on the sheet, points of its title


def nearest(features: NDArray, k: int, device: torch.device) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k photos most similar to each, itself left out: (cosines [n,k], most similar first; rows [n,k]). features [n,D];
    k is less than n."""
    rows = torch.arange(len(features))
    found = NearestNeighbors(torch.from_numpy(np.asarray(features, np.float32)).to(device), k + 1)
    for part in rows.split(BLOCK_ROWS):
        found.update(torch.from_numpy(np.asarray(features[part.numpy()])), part)
    others = found.labels != rows.to(device)[:, None]
    others[others.all(1), -1] = False  # more than k copies of it came first
    shape = (len(features), k)
    cosines, labels = found.similarities[others].view(shape), found.labels[others].view(shape)
    return cosines.cpu().numpy(), labels.cpu().numpy()


def duplicate_pairs(
    cosines: NDArray[np.float32], labels: NDArray[np.int64], threshold: float
) -> list[tuple[int, int, float]]:
    """(row, row, cosine) of the pairs at or above a threshold, each once, the most similar first."""
    pairs = dict[tuple[int, int], float]()
    for row, neighbor in np.argwhere(cosines >= threshold).tolist():
        other = int(labels[row, neighbor])
        pairs[min(row, other), max(row, other)] = float(cosines[row, neighbor])
    return sorted(((a, b, c) for (a, b), c in pairs.items()), key=lambda pair: (-pair[2], pair[:2]))


def outliers(cosines: NDArray[np.float32]) -> list[tuple[int, float]]:
    """(row, mean cosine to its nearest) of the photos where that is lowest, the lowest first."""
    means = cosines.mean(1, dtype=np.float64)
    return [(int(row), float(means[row])) for row in np.argsort(means, kind="stable")[:OUTLIERS]]


def write(folder: FeatureFolder, source: PhotoSource, *, k: int, threshold: float) -> Iterator[str]:
    """Write the three files; says what is in them."""
    kind = "cls" if "cls" in folder.arrays else "mean"
    bad = {row["row"] for row in folder.damaged}
    sound = np.array([row for row in range(len(source.names)) if row not in bad], np.int64)  # [n]
    if len(sound) < 2:
        raise UserError("--neighbors needs at least two photos that can be read")
    k = min(k, len(sound) - 1)
    cosines, labels = nearest(folder.arrays[kind][sound], k, best_device())
    pairs = [(int(sound[a]), int(sound[b]), c) for a, b, c in duplicate_pairs(cosines, labels, threshold)]
    strange = [(int(sound[row]), mean) for row, mean in outliers(cosines)]
    names = source.names
    lines = [(names[a], names[b], f"{c:.6f}") for a, b, c in pairs]
    _write_csv(folder.folder / "duplicates.csv", ("photo", "duplicate", "cosine"), lines)
    _write_csv(
        folder.folder / "outliers.csv", ("photo", "mean_cosine"), [(names[row], f"{m:.6f}") for row, m in strange]
    )
    _draw(folder, source, pairs[:PAIRS], strange[:STRANGE])
    yield f"{plural(len(pairs), 'pair')} of photos with a cosine of at least {threshold:g}: duplicates.csv"
    if crowded := int((cosines[:, -1] >= threshold).sum()):
        yield f"  all {k} nearest of {plural(crowded, 'photo')} are that similar, so pairs may be missing; --k finds more"
    yield f"the {len(strange)} least similar to their {k} nearest: outliers.csv; the first of both: neighbors.png"


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(header)
    lines.writerows(rows)
    write_atomic(path, text.getvalue())


def _draw(
    folder: FeatureFolder, source: PhotoSource, pairs: list[tuple[int, int, float]], strange: list[tuple[int, float]]
) -> None:
    """The contact sheet: pairs side by side, four in a row; then outliers."""
    from matplotlib.figure import Figure

    cells: list[tuple[int, str]] = []
    for a, b, cosine in pairs:
        cells += [(a, f"{cosine:.3f}  {_end(source.names[a])}"), (b, f"= {_end(source.names[b])}")]
    cells += [(-1, "")] * (-len(cells) % COLUMNS)
    cells += [(row, f"{mean:.3f}  {_end(source.names[row])}") for row, mean in strange]
    rows = -(-len(cells) // COLUMNS)
    figure = Figure(figsize=(INCHES * COLUMNS, (INCHES + 0.2) * rows + 0.4), layout="constrained")
    title = f"{len(pairs)} pairs of near-duplicates, their cosines; then the {len(strange)} photos least like any other"
    figure.suptitle(title, fontsize=TEXT + 2)
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (row, text) in zip(grid.flat, cells, strict=False):
        if row >= 0:
            photo = Image.fromarray(source.pixels(row))
            photo.thumbnail((THUMBNAIL, THUMBNAIL))
            axes.imshow(photo)
            axes.set_title(text, fontsize=TEXT)
    with atomic_path(folder.folder / "neighbors.png") as draft:
        figure.savefig(draft, dpi=120, format="png", metadata=png_text([folder.settings["weights"]]))


def _end(name: str, letters: int = 18) -> str:
    return name if len(name) <= letters else f"…{name[1 - letters :]}"
