"""The point probe: what a reference token, the patch token under it and [CLS] know of what lies at a point.

    python -m eval points NETWORK --data VOC_FOLDER [--train-split trainaug] [--val-split val] [--points 3] [--scenes N]
        [--size N] [--seed 0] [--untrained]

The paper says that a reference token attends to what lies at its point. Here that is measured: points are drawn on the
largest thing of each scene, and as many on its other things, which are small. What lies under a point of a validation scene
is then asked of each kind of token, by k-NN among the same kind of points of the train scenes and by a linear map (ridge
regression on the classes). [CLS] is the same for all points of a scene: what it knows of small things is what agreeing on
the whole picture gives. Further:

within         share of the reference tokens' variance that lies within a scene; 0: a token does not depend on its point
               (as the lines below, of the tokens whose points lie on a thing)
cosine to CLS  mean over reference tokens
distance       mean distance of a reference token's attention from its point, in patches, last block, mean over heads
entropy        of the same attention, in nats; ln N is attention to all N patches alike

n scenes · R points of a scene · N patches · D width · S side of a scene, pixels.
"""

import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from eval.attention import attention_weights, distance_from_points
from eval.datasets import IGNORE, VocSegmentation, describe_scenes, scene_sizes, voc_splits
from eval.features import batches, check_size, default_workers, normalized, progress_bar
from eval.knn import knn_scores
from eval.target import EvalTarget
from model.vit import ViT, require_vit
from runtime.errors import UserError

KINDS = ("reference", "patch", "cls")
ON = ("large", "small")  # things that points lie on
RIDGE = 1e-2  # weight of the squared norm, as a share of the features' variance


@dataclass
class PointFeatures:
    """Tokens of all points of some scenes that lie on a thing."""

    tokens: dict[str, Tensor]  # kind: float32 [points,D]
    labels: Tensor  # int64 [points], the class under the point
    small: Tensor  # bool [points], whether it lies on a small thing
    within: float  # see above
    cosine: float
    distance: float
    entropy: float


@dataclass
class PointScore:
    """The results of a network; percentages by what points lie on and by kind of token."""

    knn: dict[str, dict[str, float]] = field(default_factory=dict)  # {"large" | "small": {kind: top-1}}
    linear: dict[str, dict[str, float]] = field(default_factory=dict)
    within: float = 0.0
    cosine: float = 0.0
    distance: float = 0.0
    entropy: float = 0.0
    points: int = 0  # of the validation scenes


def draw_points(masks: Tensor, count: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` pixels of the largest thing of each scene, then `count` of its other things.

    masks uint8 [n,S,S]; class 0 is the ground. Returns (points float32 [n,2*count,2], the pixels' centers (x, y) in [0,1];
    classes int64 [n,2*count], -1 where the scene has no such thing).
    """
    n, side, _ = masks.shape
    flat = masks.flatten(1).long()
    things = (flat > 0) & (flat != IGNORE)
    areas = torch.zeros(n, 256, device=masks.device).scatter_add_(1, flat, things.float())
    largest = areas.argmax(1, keepdim=True)
    points, labels = [], []
    for chosen in (things & (flat == largest), things & (flat != largest)):
        noise = torch.rand(flat.shape, generator=draws).to(masks.device)
        top = noise.where(chosen, -1.0).topk(count, dim=1)
        points.append(torch.stack([top.indices % side, top.indices // side], -1).float().add(0.5) / side)
        labels.append(flat.gather(1, top.indices).where(top.values >= 0, -1))
    return torch.cat(points, 1), torch.cat(labels, 1)


@torch.inference_mode()
def point_features(
    network: ViT, scenes: VocSegmentation, count: int, *, seed: int = 0, batch: int = 64, workers: int = 0,
    progress: str | None = None,
) -> PointFeatures:  # fmt: skip
    """Tokens at `count` points on the largest thing of each scene, and at as many on its other things."""
    device = next(network.parameters()).device
    draws, grid = torch.Generator().manual_seed(seed), scenes.size // network.patch
    kept: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    all_labels: list[Tensor] = []
    sums = torch.zeros(3, dtype=torch.float64)  # cosine, distance, entropy
    seen = 0  # scenes
    loaded = batches(scenes, batch, device, workers=workers)
    for images, masks in progress_bar(loaded, -(-len(scenes) // batch), progress):
        points, labels = draw_points(masks, count, draws)
        pixels = normalized(images, network.pixels).to(network.pos_embed.dtype)
        out = network(pixels, points)
        cls, patches, tokens = out.cls, out.patches, out.references
        under = (points * grid).long().clamp(max=grid - 1)  # [n,R,(x, y)]
        index = (under[..., 1] * grid + under[..., 0])[..., None].expand(-1, -1, patches.shape[-1])
        features = {"reference": tokens, "patch": patches.gather(1, index), "cls": cls[:, None].expand_as(tokens)}
        valid = labels >= 0  # a scene without such a thing has none of its points: they lie anywhere
        for kind, x in features.items():
            kept[kind].append(x[valid].float().cpu())
        small = (torch.arange(2 * count, device=device) >= count).expand_as(labels)
        scene = seen + torch.arange(len(labels), device=device)[:, None].expand_as(labels)
        all_labels.append(torch.stack([labels[valid], small[valid].long(), scene[valid]], 1).cpu())
        seen += len(labels)

        weights = attention_weights(network, pixels, points)[1].mean(1)  # [n,R,N]
        weights = weights / weights.sum(-1, keepdim=True)
        distance = distance_from_points(weights, points, grid, grid)
        cosine = F.cosine_similarity(tokens.float(), cls[:, None].float(), dim=-1)
        entropy = -(weights * weights.clamp(min=1e-30).log()).sum(-1)
        sums += torch.stack([x[valid].double().sum() for x in (cosine, distance, entropy)]).cpu()
    labels, small, scene = torch.cat(all_labels).unbind(1)
    found = {kind: torch.cat(x) for kind, x in kept.items()}
    within = share_within(found["reference"], scene)
    return PointFeatures(found, labels, small.bool(), within, *(sums / len(labels)).tolist())


def share_within(tokens: Tensor, scene: Tensor) -> float:
    """Share of the variance of tokens [points,D] that lies within a scene; scene [points]: the number of each one's."""
    x = tokens.double()
    _, index, counts = scene.unique(return_inverse=True, return_counts=True)
    means = torch.zeros(len(counts), x.shape[1], dtype=x.dtype).index_add_(0, index, x) / counts[:, None]
    return float((x - means[index]).square().sum() / (x - x.mean(0)).square().sum())


def ridge_accuracy(train: Tensor, labels: Tensor, val: Tensor, targets: Tensor, classes: int) -> Tensor:
    """Whether a linear map fitted by ridge regression names each of `val`'s classes: bool [v]. train [t,D], val [v,D]."""
    mean, scale = train.double().mean(0), train.double().std(0, correction=min(1, len(train) - 1)).clamp(min=1e-6)
    x, y = ((t.double() - mean) / scale for t in (train, val))
    x, y = (torch.cat([t, torch.ones(len(t), 1, dtype=t.dtype)], 1) for t in (x, y))
    one_hot = F.one_hot(labels, classes).double()
    penalty = RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    penalty[-1, -1] = 0  # the constant is free
    weights = torch.linalg.solve(x.T @ x + penalty, x.T @ one_hot)
    return (y @ weights).argmax(1) == targets


def measure(
    network: ViT, train: VocSegmentation, val: VocSegmentation, *, points: int = 3, k: int = 20,
    temperature: float = 0.07, seed: int = 0, workers: int = 0, progress: bool = False,
) -> PointScore:  # fmt: skip
    """The probe. Without small things in a split (one thing a scene) there are no results for them. Raises UserError if a
    split has no thing at all."""
    check_size(network, val.size)
    reading: dict[str, Any] = dict(workers=workers)
    known = point_features(network, train, points, seed=seed, **reading, progress="train points" if progress else None)
    asked = point_features(network, val, points, seed=seed, **reading, progress="val points" if progress else None)
    score = PointScore(within=asked.within, cosine=asked.cosine, distance=asked.distance, entropy=asked.entropy)
    score.points = len(asked.labels)
    for on, is_small in zip(ON, (False, True), strict=True):
        from_train, from_val = known.small == is_small, asked.small == is_small
        if not from_train.any() or not from_val.any():
            if not is_small:
                empty = val if from_train.any() else train
                raise UserError(
                    f"{empty.folder}: no scene of '{empty.split}' has a thing to draw points on: all pixels are of class 0 "
                    "or ignored"
                )
            continue
        labels, targets = known.labels[from_train], asked.labels[from_val]
        score.knn[on], score.linear[on] = {}, {}
        for kind in KINDS:
            keys, queries = known.tokens[kind][from_train], asked.tokens[kind][from_val]
            votes = knn_scores(keys, labels, queries, min(k, len(keys)), temperature, val.classes)
            score.knn[on][kind] = 100 * float((votes.argmax(1) == targets).double().mean())
            right = ridge_accuracy(keys, labels, queries, targets, val.classes)
            score.linear[on][kind] = 100 * float(right.double().mean())
    return score


def score_table(score: PointScore, title: str) -> Table:
    table = Table(title=escape(title), title_justify="left")
    headings = [f"{on}, {by}" for on in score.knn for by in ("k-NN", "linear")]
    for heading in ("top-1 %", *headings):
        table.add_column(heading, justify="left" if heading == "top-1 %" else "right")
    for kind, name in zip(KINDS, ("reference token", "patch token under it", "[CLS]"), strict=True):
        cells = [f"{result[on][kind]:.1f}" for on in score.knn for result in (score.knn, score.linear)]
        table.add_row(escape(name), *cells)
    return table


def run(
    target: EvalTarget, data: str, *, train_split: str | None = None, val_split: str = "val",
    classes: int | None = None, palette: str | None = None, points: int = 3,
    scenes: int | None = None, seed: int = 0, size: int | None = None,
    untrained: bool = False, workers: int | None = None,
) -> int:  # fmt: skip
    """The program: measure, print, record. data: folder of scenes; the other options: `python -m eval points`."""
    start = time.perf_counter()
    network = require_vit(target.network(untrained), target.path, "the point probe")
    size, _ = scene_sizes(network.image_size, size)
    check_size(network, size)
    if points > size * size:
        raise UserError(f"--points {points}: a scene of {size} x {size} pixels has {size * size:,}")
    train, val = voc_splits(data, size, train_split, val_split, classes, palette=palette)
    train = train.subset(scenes or len(train))
    workers = default_workers(len(train), workers)
    score = measure(network, train, val, points=points, seed=seed, workers=workers, progress=True)
    Console().print(score_table(score, f"what lies at {score.points:,} points, {target.title(untrained)}: {data}"))
    patches = (size // network.patch) ** 2
    print(
        f"reference tokens: {100 * score.within:.0f} % of their variance is within a scene; cosine to [CLS] "
        f"{score.cosine:.2f}; attention {score.distance:.1f} patches from the point, entropy {score.entropy:.2f} of "
        f"{math.log(patches):.2f}"
    )
    settings: dict[str, Any] = dict(untrained=untrained, size=size, points_drawn=points, seed=seed)
    settings |= describe_scenes(data, train, val)
    print(target.record("points", **settings, **asdict(score), seconds=round(time.perf_counter() - start, 1)))
    return 0
