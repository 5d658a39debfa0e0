"""Features of photos, as files: [CLS], the mean patch token, patch tokens on their grid, reference tokens at points.

    python -m eval embed NETWORK SRC OUT [--features cls,mean,patches] [--points FILE] [--size N | HxW] [--fit crop|square]
        [--dtype float32|float16] [--batch 64] [--workers N] [--parquet] [--neighbors] [--untrained]

Tokens are those after the final norm, as in every evaluation (eval/features.py). A photo is seen as in k-NN: its shorter
side resized to 256/224 of the size, the center cut. --fit square: as scenes are, the whole photo resized to a square. The
folder can be continued (eval/feature_folder.py). A damaged photo has NaN rows, and so has a point outside the crop.

n photos of a batch · H, W height and width of a prepared photo, pixels · h, w the same in patches · D width · P points ·
R_i points of photo i.
"""

import csv
import hashlib
import io
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import Dataset, Subset

from eval.datasets import Size, center_crop, points_in_crop, sides_of, whole_square
from eval.feature_folder import FeatureFolder
from eval.features import LINE_SECONDS, batches, check_size, default_workers, precision_of, tokens_at
from eval.photo_source import PhotoSource
from eval.point_list import HEADER, PointList
from eval.provenance import weights_of
from eval.target import EvalTarget
from model.backbone import Backbone
from model.vit import require_vit
from pipeline.decode import DecodeError
from runtime.errors import UserError, plural

FEW = 500  # photos that are read sooner than a process for them is started
NAMED = 5  # damaged photos, in the summary
Batch = tuple[Tensor, Tensor]  # images uint8 [n,3,H,W]; heights and widths of the photos int64 [n,2], 0 if damaged


class PreparedPhotos(Dataset[tuple[Tensor, Tensor]]):
    """Photos of a source as the network gets them: (uint8 [3,H,W], (height, width) of the photo). A damaged one is black,
    and its height and width are 0."""

    def __init__(self, source: PhotoSource, size: Size, fit: str):
        self.source, self.size, self.fit = source, size, fit

    def __len__(self) -> int:
        return len(self.source.names)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        try:
            photo = torch.from_numpy(self.source.pixels(row)).permute(2, 0, 1)
        except DecodeError:
            return torch.zeros(3, *sides_of(self.size), dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
        prepared = center_crop(photo, self.size) if self.fit == "crop" else whole_square(photo, self.size)
        return prepared, torch.tensor(photo.shape[1:])


@dataclass
class Points:
    """The points of a list, by photo. order [P]: rows of the list, photo by photo; starts [photos + 1]: of each in it."""

    listed: PointList
    order: NDArray[np.int64]
    starts: NDArray[np.int64]

    @classmethod
    def by_photo(cls, listed: PointList, photos: int) -> "Points":
        order = np.argsort(listed.rows, kind="stable")
        return cls(listed, order, np.searchsorted(listed.rows[order], np.arange(photos + 1)))

    def of(self, photo: int) -> NDArray[np.int64]:
        """Rows of the list [R_i]."""
        return self.order[self.starts[photo] : self.starts[photo + 1]]


def points_in_view(
    points: Points | None, first: int, sizes: Sequence[Sequence[int]], size: Size, fit: str
) -> tuple[list[NDArray[np.int64]], list[Tensor]]:
    """What each photo of a batch shows of its points: (rows of the list [R_i], the points in the view's frame [R_i,2]).
    first: the batch's first photo; sizes: height and width of each, 0 of a damaged one."""
    rows, views = [], []
    for photo, (height, width) in enumerate(sizes, first):
        row = points.of(photo) if points and height else np.empty(0, np.int64)
        view = points.listed.xy[row] if points else np.empty((0, 2))
        if fit == "crop" and len(row):
            view = points_in_crop(view, height, width, size)
        seen = ((view >= 0) & (view <= 1)).all(1)
        rows.append(row[seen])
        views.append(torch.from_numpy(view[seen]).float())
    return rows, views


def with_points(network: Backbone, images: Tensor, views: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """([CLS] [n,D], patch tokens [n,h*w,D], reference tokens [R_i,D] of each image) for any number of points in each.

    Images with equally many points are a group, the most first; those without any are last (`ViT.forward`).
    """
    order = sorted(range(len(views)), key=lambda i: -len(views[i]))
    groups = [torch.stack([views[i] for i in group]) for _, group in groupby(order, key=lambda i: len(views[i]))]
    groups = [group.to(images.device) for group in groups if group.shape[1]]
    cls, patches, references = tokens_at(network, images[order] if groups else images, groups)
    if not groups:
        return cls, patches, [cls[:0]] * len(views)
    back = np.argsort(order).tolist()
    flat = [tokens for group in references for tokens in group] + [cls[:0]] * len(views)
    return cls[back], patches[back], [flat[i] for i in back]


def shown(loaded: Iterable[Batch], done: int, total: int) -> Iterator[Batch]:
    """The batches, with progress, rate and the time left on stderr: a bar on a terminal, else a line now and then."""
    console, start, last, before = Console(stderr=True), time.monotonic(), time.monotonic(), done
    columns = (TextColumn("photos"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]:.1f}/s"))
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=total, completed=done, rate=0.0)
        for images, sizes in loaded:
            yield images, sizes
            done += len(images)
            now = time.monotonic()
            rate = (done - before) / (now - start)
            bar.update(task, completed=done, rate=rate)
            if not console.is_terminal and now - last > LINE_SECONDS and done < total:
                last = now
                left = f"{rate:.1f} photos/s, {(total - done) / rate:.0f} s left"
                print(f"  {done:,} of {total:,} photos, {left}", file=sys.stderr, flush=True)


def embed(
    network: Backbone, source: PhotoSource, folder: FeatureFolder, points: Points | None, *, size: Size, fit: str,
    batch: int, workers: int,
) -> None:  # fmt: skip
    """Write the rows of all photos that are not done yet."""
    device, grid = next(network.parameters()).device, grid_of(network, size)
    photos = PreparedPhotos(source, size, fit)
    rest = Subset(photos, range(folder.done, len(photos)))
    for images, sizes in shown(batches(rest, batch, device, workers=workers), folder.done, len(photos)):
        first = folder.done
        rows, views = points_in_view(points, first, sizes.tolist(), size, fit)
        cls, patches, references = with_points(network, images, views)
        features = {"cls": cls, "mean": patches.mean(1), "patches": patches.unflatten(1, grid)}
        damaged = sizes[:, 0] == 0
        for name, array in folder.arrays.items():
            if name != "points":
                values = features[name].masked_fill(damaged.view(-1, *[1] * (array.ndim - 1)), torch.nan)
                array[first : first + len(images)] = _to_numpy(values, array.dtype)
        if points:
            mine = np.concatenate([points.of(photo) for photo in range(first, first + len(images))])
            array = folder.arrays["points"]
            array[mine] = np.nan
            array[np.concatenate(rows)] = _to_numpy(torch.cat(references), array.dtype)
        for row in (first + damaged.nonzero()[:, 0]).tolist():
            folder.damaged.append({"row": row, "photo": source.names[row], "why": _why(source, row)})
        folder.advance(len(images))
    folder.save()


def _to_numpy(values: Tensor, dtype: np.dtype) -> NDArray:
    """In the array's type, converted where the features are: half as many bytes to copy."""
    return values.to(torch.float16 if dtype == np.float16 else torch.float32).cpu().numpy()


def _why(source: PhotoSource, row: int) -> str:
    try:
        source.pixels(row)
    except DecodeError as error:
        return str(error)
    return "nothing is wrong with it now: the disk failed for a moment"


def grid_of(network: Backbone, size: Size) -> tuple[int, int]:
    """(h, w)."""
    height, width = sides_of(size)
    return height // network.patch, width // network.patch


def shapes_of(
    features: Sequence[str], photos: int, points: int, network: Backbone, size: Size
) -> dict[str, tuple[int, ...]]:
    """The arrays and their shapes."""
    width = network.width
    shapes: dict[str, tuple[int, ...]] = {"cls": (photos, width), "mean": (photos, width)}
    shapes["patches"] = (photos, *grid_of(network, size), width)
    return {name: shapes[name] for name in shapes if name in features} | ({"points": (points, width)} if points else {})


def points_csv(listed: PointList | None, names: Sequence[str]) -> str:
    """points.csv; empty without points."""
    if listed is None:
        return ""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(HEADER)
    lines.writerows([names[row], *xy] for row, xy in zip(listed.rows.tolist(), listed.xy.tolist(), strict=True))
    return text.getvalue()


def summary(folder: FeatureFolder, source: PhotoSource, seconds: float, made: int) -> list[str]:
    """What was written, at which rate, and what of it is NaN."""
    files = ", ".join(f"{name}.npy {list(array.shape)}" for name, array in folder.arrays.items())
    rate = f"{plural(made, 'photo')} in {seconds:.1f} s, {made / seconds:.1f} photos/s" if made else "all done before"
    lines = [f"{folder.folder}: {files} {folder.settings['dtype']}; {rate}"]
    if bad := folder.damaged:
        listed = "; ".join(f"{row['photo']}: {row['why']}" for row in bad[:NAMED])
        more = f"; and {len(bad) - NAMED} more in features.json" if len(bad) > NAMED else ""
        lines.append(f"{plural(len(bad), 'damaged photo')} with NaN rows: {listed}{more}")
    if "points" in folder.arrays and (unseen := int(np.isnan(folder.arrays["points"][:, 0]).sum())):
        lines.append(
            f"{plural(unseen, 'point')} with NaN rows: in damaged photos, or outside the center crop (--fit square shows "
            "the whole photo)"
        )
    if source.note:
        lines.append(f"no photos, left out: {source.note}")
    return lines


def run(
    target: EvalTarget, source: PhotoSource, out: Path, listed: PointList | None, *, features: Sequence[str],
    size: Size | None = None, fit: str = "crop", dtype: str = "float32", batch: int = 64, workers: int | None = None,
    untrained: bool = False, parquet: bool = False, neighbors: bool = False, k: int = 10, threshold: float = 0.95,
) -> int:  # fmt: skip
    """The program; the options: `python -m eval embed`. listed: points whose reference tokens are wanted."""
    network = target.network(untrained)
    if listed and require_vit(network, target.path, "--points").attention == "none":
        raise UserError(
            f"{target.path}: --points: with its reference.attention, none, every token attends to reference tokens, so "
            "[CLS] and patches would change with the points"
        )
    size = size or network.image_size
    check_size(network, size)
    weights = {"step": 0, "sha256": f"untrained {target.run}"} if untrained else weights_of(target.path)
    csv_text = points_csv(listed, source.names)
    settings: dict[str, Any] = dict(
        weights=weights, photos=len(source.names), photos_sha256=source.digest(), features=list(features),
        points_sha256=hashlib.sha256(csv_text.encode()).hexdigest() if listed else None,
        size=size, fit=fit, dtype=dtype, batch=batch, precision=str(precision_of(network)).removeprefix("torch."),
    )  # fmt: skip
    about = {"network": str(target.path), "width": network.width, "patch": network.patch}
    folder = FeatureFolder(out, settings, about)
    shapes = shapes_of(features, len(source.names), len(listed.rows) if listed else 0, network, size)
    folder.open(source.names, shapes, dtype, csv_text)
    if folder.done:
        print(f"{out}: continued, {folder.done:,} of {plural(len(source.names), 'photo')} are done")
    start, before = time.perf_counter(), folder.done
    workers = default_workers(len(source.names) - before, workers, FEW)
    points = Points.by_photo(listed, len(source.names)) if listed else None
    embed(network, source, folder, points, size=size, fit=fit, batch=batch, workers=workers)
    print("\n".join(summary(folder, source, time.perf_counter() - start, folder.done - before)))
    if parquet:
        from eval.parquet import write_parquet

        print(f"written to {write_parquet(folder, source.names)}")
    if neighbors:
        from eval import neighbors as nearest

        for line in nearest.write(folder, source, k=k, threshold=threshold):
            print(line)
    folder.close()
    return 0
