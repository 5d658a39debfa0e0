"""Segmentation without a label: patch tokens fall into clusters, and each cluster is taken for a class.

    python -m eval.cluster_seg RUN_OR_CHECKPOINT --data VOC_FOLDER [--split val] [--clusters 500,21] [--seeds 5]
        [--classes N] [--size N] [--untrained]

Overclustering as in Leopart (Ziegler & Asano 2022, section 4 and sup_overcluster.py): patch tokens of all scenes,
standardized, their first 50 principal components, k-means; clusters upsampled to 100 x 100 by the nearest and held
against the masks. As many clusters as classes: one for each, the assignment of the greatest sum of IoU (Hungarian).
More clusters than classes: each is taken for the class that most of its pixels have. The mean over 5 seeds.

Otherwise than published: all scenes are clustered (there the last, incomplete batch is dropped: 9 of VOC's 1,449).
The small protocol, for networks trained on views of less than 128 pixels: scenes of the view's own size, maps of half of it.

N patch tokens of all scenes · D width · C classes · K clusters · S side of a scene, pixels.
"""

import argparse
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
from eval.features import check_size, default_workers, resized_masks, scene_tokens, shown
from eval.miou import Score, confusion, scored
from eval.target import EvalTarget
from model.vit import ViT
from runtime.errors import UserError, require_positive, run_cli

COMPONENTS = 50
POINTS = 256  # of each cluster, at most, that k-means looks at; all are assigned afterward


@dataclass(frozen=True)
class Figures:
    """mIoU in percent of one number of clusters, over the seeds."""

    clusters: int
    matching: str  # 'hungarian' or 'majority'
    miou: float  # mean over the seeds
    miou_present: float
    spread: tuple[float, float]  # least and most
    scores: list[Score]  # of each seed


# ------------------------------------------------------------------------------------------------ from clusters to classes


def hungarian(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The class of each cluster [K], one cluster for each class, of pixels [C,K] counted by (class, cluster): the
    assignment of the greatest sum of IoU. A cluster that no class is left for is taken for class 0."""
    union = counts.sum(0, keepdims=True) + counts.sum(1, keepdims=True) - counts
    classes, clusters = linear_sum_assignment(1 - counts / np.maximum(union, 1))
    of_cluster = np.zeros(counts.shape[1], np.int64)
    of_cluster[clusters] = classes
    return of_cluster


def majority(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The class that most pixels of each cluster have [K]; the first of equal ones, class 0 for an empty cluster."""
    return counts.argmax(0)


def matched(counts: Tensor, of_cluster: NDArray[np.int64]) -> Tensor:
    """Pixels counted by (class, cluster) [C,K] -> by (class, class taken for) [C,C]."""
    taken = torch.from_numpy(of_cluster).to(counts.device)
    return torch.zeros(len(counts), len(counts), dtype=counts.dtype, device=counts.device).index_add_(1, taken, counts)


# ------------------------------------------------------------------------------------------------ from tokens to clusters


def principal(points: Tensor, components: int = COMPONENTS) -> Tensor:
    """Points [N,D], every dimension standardized (in place) -> their first principal components [N,components]."""
    mean = points.mean(0, dtype=torch.float64)
    spread = torch.stack([(some - mean).square().sum(0) for some in points.split(65_536)]).sum(0) / len(points)
    spread = spread.sqrt()
    points -= mean.to(points.dtype)
    points /= spread.where(spread > 0, 1).to(points.dtype)  # a dimension that never changes tells nothing
    covariance = torch.stack([some.double().T @ some.double() for some in points.split(65_536)]).sum(0)
    directions = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :components]  # the greatest first
    return points @ directions.to(points.dtype)


def kmeans(points: Tensor, clusters: int, seed: int, *, iterations: int = 100, tries: int = 5) -> Tensor:
    """Lloyd's k-means of points [N,d]: the cluster of each, int64 [N].

    Settings of faiss, as published: begins with points drawn at random, looks at no more than POINTS of them for each
    cluster, ends after `iterations` or where nothing moves; of `tries` beginnings, the centers with the least sum of squared
    distances. A cluster that falls empty begins anew at the point farthest from its center (faiss halves the largest).
    """
    draws = torch.Generator().manual_seed(seed)
    few = torch.randperm(len(points), generator=draws)[: POINTS * clusters].to(points.device)
    seen = points[few]
    least, best = torch.inf, seen[:clusters]
    for _ in range(tries):
        centers = seen[torch.randperm(len(seen), generator=draws)[:clusters].to(points.device)]
        before = None
        for _ in range(iterations):
            nearest, distances = assign(seen, centers)
            if before is not None and torch.equal(nearest, before):
                break
            before = nearest
            sizes = torch.bincount(nearest, minlength=clusters)
            sums = torch.zeros_like(centers).index_add_(0, nearest, seen)
            centers = sums / sizes.clamp(min=1)[:, None]
            empty = (sizes == 0).nonzero()[:, 0]
            centers[empty] = seen[distances.topk(len(empty)).indices]
        _, distances = assign(seen, centers)
        if (inertia := float(distances.sum())) < least:
            least, best = inertia, centers
    return assign(points, best)[0]


def assign(points: Tensor, centers: Tensor, rows: int = 4096) -> tuple[Tensor, Tensor]:
    """(the nearest center of each point [N], squared distance to it [N]) of points [N,d] and centers [K,d]."""
    squared = centers.square().sum(1)
    found = [torch.addmm(squared, some, centers.T, alpha=-2).min(dim=1) for some in points.split(rows)]
    nearest = torch.cat([one.indices for one in found])
    return nearest, torch.cat([one.values for one in found]) + points.square().sum(1)


def measure(
    network: ViT,
    scenes: VocSegmentation,
    map_size: int,
    clusters: list[int],
    *,
    seeds: int = 5,
    batch: int = 64,
    workers: int = 0,
    show: bool = False,
) -> list[Figures]:
    """The figures of each number of clusters; maps are compared at `map_size` pixels a side.

    Raises UserError where there are fewer tokens than clusters.
    """
    device = next(network.parameters()).device
    made = scene_tokens(network, scenes, batch=batch, workers=workers, show="scenes" if show else None)
    n, width, h, w = made.tokens.shape
    if n * h * w < max(clusters):
        raise UserError(f"{max(clusters)} clusters of {n * h * w} patch tokens: not more clusters than tokens")
    masks = resized_masks(made.masks, map_size)
    points = principal(made.tokens.permute(0, 2, 3, 1).reshape(-1, width), min(COMPONENTS, width)).to(device)
    work = [(k, seed) for k in clusters for seed in range(seeds)]
    scores: dict[int, list[Score]] = {k: [] for k in clusters}
    for k, seed in shown(work, len(work), "clusters" if show else None):
        maps = kmeans(points, k, seed).view(n, 1, h, w)
        counts = torch.zeros(scenes.classes, k, dtype=torch.int64)
        for some, truth in zip(maps.split(batch), masks.split(batch), strict=True):
            larger = F.interpolate(some.float(), (map_size, map_size), mode="nearest")[:, 0].long()
            counts += confusion(truth, larger.cpu(), scenes.classes, k)
        match = hungarian if k <= scenes.classes else majority
        scores[k].append(scored(matched(counts, match(counts.numpy()))))
    return [summed_up(k, "hungarian" if k <= scenes.classes else "majority", scores[k]) for k in clusters]


def summed_up(clusters: int, matching: str, scores: list[Score]) -> Figures:
    mious = [score.miou for score in scores]
    present = statistics.fmean(score.miou_present for score in scores)
    return Figures(clusters, matching, statistics.fmean(mious), present, (min(mious), max(mious)), scores)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m eval.cluster_seg", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("network", help="a run folder, a checkpoint, a backbone file or timm:NAME")
    parser.add_argument("--data", help="folder in Pascal VOC's layout (default: the run's eval.voc)")
    parser.add_argument("--split", default="val", help="default: val")
    parser.add_argument("--classes", type=int, help="how many (default: see classes.txt or the masks)")
    parser.add_argument("--clusters", help="numbers of clusters, as in 500,21 (default: 500 and as many as classes)")
    parser.add_argument("--seeds", type=int, default=5, help="default: 5")
    parser.add_argument("--size", type=int, help="side of a scene in pixels (default: 448; small protocol: the view's)")
    parser.add_argument("--untrained", action="store_true", help="the run's network before training")
    parser.add_argument("--workers", type=int, help="reading processes (default: by the number of scenes)")
    args = parser.parse_args(argv)

    began = time.perf_counter()
    require_positive(args, "classes", "seeds", "size")
    subject = EvalTarget(args.network)
    data = subject.scenes_folder(args.data)
    network = subject.network(args.untrained)
    size, map_size = scene_sizes(network.image_size, args.size)
    check_size(network, size)
    scenes = VocSegmentation(data, args.split, size, classes=args.classes)
    clusters = read_clusters(args.clusters) if args.clusters else [500, scenes.classes]
    workers = default_workers(len(scenes)) if args.workers is None else args.workers
    figures = measure(network, scenes, map_size, clusters, seeds=args.seeds, workers=workers, show=True)

    title = f"clusters of tokens, {subject.path}{', untrained' if args.untrained else ''}: {data}, {len(scenes)} scenes"
    caption = f"{scenes.classes} classes, {size} pixels a side, {args.seeds} seeds"
    table = Table(title=escape(title), caption=caption, title_justify="left", caption_justify="left")
    for heading in ("clusters", "taken for", "mIoU %", "least – most", "of the classes present"):
        table.add_column(heading, justify="right")
    words = {"hungarian": "a class each", "majority": "the class of most"}
    for one in figures:
        low, high = one.spread
        told = (f"[bold]{one.miou:.2f}[/bold]", f"{low:.2f} – {high:.2f}", f"{one.miou_present:.2f}")
        table.add_row(str(one.clusters), words[one.matching], *told)
    Console().print(table)
    sets: dict[str, Any] = dict(data=str(data), split=args.split, scenes=len(scenes), classes=scenes.classes)
    settings = dict(untrained=args.untrained, size=size, map_size=map_size, seeds=args.seeds) | sets
    seconds = round(time.perf_counter() - began, 1)
    print(subject.record("cluster_seg", **settings, figures=[asdict(one) for one in figures], seconds=seconds))
    return 0


def read_clusters(words: str) -> list[int]:
    """Numbers of clusters as they are typed. Raises UserError."""
    try:
        clusters = [int(word) for word in words.split(",")]
    except ValueError:
        raise UserError(f"--clusters {words}: whole numbers with commas between, as in 500,21") from None
    if min(clusters) < 2:
        raise UserError(f"--clusters {words}: at least 2")
    return clusters


if __name__ == "__main__":
    run_cli(main)
