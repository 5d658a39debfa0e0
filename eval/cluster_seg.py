"""Segmentation without training on labels: patch tokens are clustered, and each cluster is matched to a class.

    python -m eval cluster_seg RUN_OR_CHECKPOINT --data VOC_FOLDER [--split val] [--clusters 500,21] [--seeds 5]
        [--classes N] [--size N] [--untrained]

Overclustering as in Leopart (Ziegler & Asano 2022, section 4 and sup_overcluster.py): patch tokens of all scenes,
standardized, their first 50 principal components, k-means; cluster maps upsampled to 100 x 100 (nearest) and compared
with the masks. As many clusters as classes: one per class, the assignment with the greatest sum of IoU (Hungarian).
More clusters than classes: each gets the majority class of its pixels. The mean over 5 seeds.

Different from the published code: all scenes are clustered (there the incomplete last batch is dropped: 9 of VOC's 1,449).
The small protocol, for networks trained on views of less than 128 pixels: scenes of the view's size, maps of half of it.

N patch tokens of all scenes · D width · C classes · K clusters · S side of a scene, pixels.
"""

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from eval.datasets import VocSegmentation, scene_sizes
from eval.features import check_size, default_workers, progress_bar, resize_masks, scene_tokens
from eval.miou import Score, confusion, score_of
from eval.target import EvalTarget
from model.backbone import Backbone
from runtime.errors import UserError

COMPONENTS = 50
POINTS = 256  # per cluster: k-means is trained on at most this many; then all points are assigned


@dataclass(frozen=True)
class ClusterScore:
    """mIoU in percent for one number of clusters, over the seeds."""

    clusters: int
    matching: str  # 'hungarian' or 'majority'
    miou: float  # mean over the seeds
    miou_present: float
    spread: tuple[float, float]  # lowest and highest
    scores: list[Score]  # of each seed


def hungarian(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The class of each cluster [K], from pixel counts [C,K] by (class, cluster): one cluster per class, the assignment
    with the greatest sum of IoU. Clusters without a class get class 0."""
    union = counts.sum(0, keepdims=True) + counts.sum(1, keepdims=True) - counts
    classes, clusters = linear_sum_assignment(1 - counts / np.maximum(union, 1))
    of_cluster = np.zeros(counts.shape[1], np.int64)
    of_cluster[clusters] = classes
    return of_cluster


def majority(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The majority class of each cluster [K], from pixel counts [C,K]; the first among equals, 0 if empty."""
    return counts.argmax(0)


def match_clusters(counts: Tensor, of_cluster: NDArray[np.int64]) -> Tensor:
    """Pixel counts [C,K] by (class, cluster) -> confusion matrix [C,C], given the class of each cluster [K]."""
    classes = torch.from_numpy(of_cluster).to(counts.device)
    return torch.zeros(len(counts), len(counts), dtype=counts.dtype, device=counts.device).index_add_(
        1, classes, counts
    )


def principal_components(points: Tensor, components: int = COMPONENTS) -> Tensor:
    """Points [N,D], standardized per dimension (in place) -> their first principal components [N,components]."""
    mean = points.mean(0, dtype=torch.float64)
    variance = torch.stack([(chunk - mean).square().sum(0) for chunk in points.split(65_536)]).sum(0) / len(points)
    std = variance.sqrt()
    points -= mean.to(points.dtype)
    points /= std.where(std > 0, 1).to(points.dtype)  # a constant dimension becomes 0
    covariance = torch.stack([chunk.double().T @ chunk.double() for chunk in points.split(65_536)]).sum(0)
    directions = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :components]  # the largest variance first
    return points @ directions.to(points.dtype)


def kmeans(points: Tensor, clusters: int, seed: int, *, iterations: int = 100, tries: int = 5) -> Tensor:
    """Lloyd's k-means of points [N,d]: the cluster of each, int64 [N].

    Settings of faiss, as published: random points as initial centers, at most POINTS points per cluster for training, at
    most `iterations` iterations or until no assignment changes; of `tries` initializations, the centers with the least
    inertia. An empty cluster is moved to the point farthest from its center (faiss splits the largest cluster).
    """
    draws = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(points), generator=draws)[: POINTS * clusters].to(points.device)
    sample = points[chosen]
    lowest, best = torch.inf, sample[:clusters]
    for _ in range(tries):
        centers = sample[torch.randperm(len(sample), generator=draws)[:clusters].to(points.device)]
        before = None
        for _ in range(iterations):
            nearest, distances = assign(sample, centers)
            if before is not None and torch.equal(nearest, before):
                break
            before = nearest
            sizes = torch.bincount(nearest, minlength=clusters)
            sums = torch.zeros_like(centers).index_add_(0, nearest, sample)
            centers = sums / sizes.clamp(min=1)[:, None]
            empty = (sizes == 0).nonzero()[:, 0]
            centers[empty] = sample[distances.topk(len(empty)).indices]
        _, distances = assign(sample, centers)
        if (inertia := float(distances.sum())) < lowest:
            lowest, best = inertia, centers
    return assign(points, best)[0]


def assign(points: Tensor, centers: Tensor, rows: int = 4096) -> tuple[Tensor, Tensor]:
    """(index of the nearest center [N], squared distance to it [N]) of points [N,d] and centers [K,d]."""
    squared = centers.square().sum(1)
    nearest = [torch.addmm(squared, chunk, centers.T, alpha=-2).min(dim=1) for chunk in points.split(rows)]
    indices = torch.cat([chunk.indices for chunk in nearest])
    return indices, torch.cat([chunk.values for chunk in nearest]) + points.square().sum(1)


def measure(
    network: Backbone,
    scenes: VocSegmentation,
    map_size: int,
    clusters: list[int],
    *,
    seeds: int = 5,
    batch: int = 64,
    workers: int = 0,
    progress: bool = False,
) -> list[ClusterScore]:
    """The score of each number of clusters; maps are compared at `map_size` pixels a side.

    Raises UserError if there are fewer tokens than clusters.
    """
    device = next(network.parameters()).device
    loaded = scene_tokens(network, scenes, batch=batch, workers=workers, progress="scenes" if progress else None)
    n, width, h, w = loaded.tokens.shape
    if n * h * w < max(clusters):
        raise UserError(
            f"--clusters {max(clusters)}: there are only {n * h * w} patch tokens; use at most as many clusters"
        )
    masks = resize_masks(loaded.masks, map_size)
    points = principal_components(loaded.tokens.permute(0, 2, 3, 1).reshape(-1, width), min(COMPONENTS, width)).to(
        device
    )
    work = [(k, seed) for k in clusters for seed in range(seeds)]
    scores: dict[int, list[Score]] = {k: [] for k in clusters}
    for k, seed in progress_bar(work, len(work), "clusters" if progress else None):
        maps = kmeans(points, k, seed).view(n, 1, h, w)
        counts = torch.zeros(scenes.classes, k, dtype=torch.int64)
        for chunk, truth in zip(maps.split(batch), masks.split(batch), strict=True):
            larger = F.interpolate(chunk.float(), (map_size, map_size), mode="nearest")[:, 0].long()
            counts += confusion(truth, larger.cpu(), scenes.classes, k)
        match = hungarian if k <= scenes.classes else majority
        scores[k].append(score_of(match_clusters(counts, match(counts.numpy()))))
    return [mean_score(k, "hungarian" if k <= scenes.classes else "majority", scores[k]) for k in clusters]


def mean_score(clusters: int, matching: str, scores: list[Score]) -> ClusterScore:
    """The mean over the seeds."""
    mious = [score.miou for score in scores]
    present = statistics.fmean(score.miou_present for score in scores)
    return ClusterScore(clusters, matching, statistics.fmean(mious), present, (min(mious), max(mious)), scores)


def run(
    target: EvalTarget,
    data: str,
    *,
    split: str = "val",
    clusters: list[int] | None = None,
    seeds: int = 5,
    classes: int | None = None,
    palette: str | None = None,
    size: int | None = None,
    untrained: bool = False,
    workers: int | None = None,
) -> int:
    """The program: measure, print, record. data: folder of scenes; the other options: `python -m eval cluster_seg`."""
    start = time.perf_counter()
    network = target.network(untrained)
    size, map_size = scene_sizes(network.image_size, size)
    check_size(network, size)
    scenes = VocSegmentation(data, split, size, classes=classes, palette=palette)
    clusters = clusters or [500, scenes.classes]
    workers = default_workers(len(scenes), workers)
    scores = measure(network, scenes, map_size, clusters, seeds=seeds, workers=workers, progress=True)

    title = f"clusters of patch tokens, {target.title(untrained)}: {data}, {len(scenes)} scenes"
    caption = f"{scenes.classes} classes, {size} pixels a side, {seeds} seeds"
    table = Table(title=escape(title), caption=caption, title_justify="left", caption_justify="left")
    for heading in ("clusters", "matching", "mIoU %", "min – max", "of the classes present"):
        table.add_column(heading, justify="right")
    for score in scores:
        low, high = score.spread
        cells = (f"[bold]{score.miou:.2f}[/bold]", f"{low:.2f} – {high:.2f}", f"{score.miou_present:.2f}")
        table.add_row(str(score.clusters), score.matching, *cells)
    Console().print(table)
    sets: dict[str, Any] = dict(data=data, split=split, scenes=len(scenes), classes=scenes.classes)
    settings = dict(untrained=untrained, size=size, map_size=map_size, seeds=seeds) | sets
    seconds = round(time.perf_counter() - start, 1)
    print(target.record("cluster_seg", **settings, figures=[asdict(score) for score in scores], seconds=seconds))
    return 0
