"""k-NN classification with frozen features.

    python -m eval knn RUN_OR_CHECKPOINT [--train SHARDS] [--val SHARDS] [--features cls|patches|pixels] [--k 20]
        [--temperature .07] [--size N] [--untrained] [--limit N] [--workers N] [--ignore-class NAME]
    torchrun --nproc-per-node=8 -m eval knn RUN_OR_CHECKPOINT ...

Paper section 4.1, after DINO and Wu et al. 2018 ("Unsupervised feature learning via non-parametric instance
discrimination", section 3.4): the k photos of the train set most similar to a query vote for their classes.

The features of the train set are streamed and never kept: memory is that of the queries and of one block, whatever the
size of the train set. With several processes, each reads its share of both sets.

m photos of the train set · n queries · D width of a feature · C classes · k neighbors.
"""

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from eval.datasets import LabeledPhotos
from eval.features import check_size, default_workers, feature_width, photo_batches, photo_features
from eval.target import EvalTarget, PhotoSets, check_temperature
from model.backbone import Backbone
from runtime import distributed
from runtime.config import Speed
from runtime.distributed import DistributedContext
from runtime.errors import UserError

BLOCK_ROWS = 16384  # photos of the train set at a time


class NearestNeighbors:
    """The k photos of a train set most similar to each query, found while the train set is streamed in blocks.

    queries [n,D], not normalized; memory: bytes of one block of similarities, besides the queries and the results.
    After every `update`: similarities, the cosines float32 [n,k], most similar first (-inf while fewer than k photos
    were seen); labels int64 [n,k], of the same photos.
    """

    def __init__(self, queries: Tensor, k: int, *, memory: int = 1 << 26):
        self.queries = F.normalize(queries.float(), dim=1)
        self.similarities = torch.full((len(queries), k), -torch.inf, device=queries.device)
        self.labels = torch.zeros((len(queries), k), dtype=torch.int64, device=queries.device)
        self._rows = min(len(queries), max(1, memory // (4 * BLOCK_ROWS)))
        self._buffer = torch.empty(
            self._rows * BLOCK_ROWS, device=queries.device
        )  # reused: a new one costs page faults

    def update(self, train: Tensor, labels: Tensor) -> None:
        """Compare a part of the train set, [m,D] of any dtype and device, labels int64 [m], with all queries."""
        k = self.similarities.shape[1]
        with full_float32():
            for block, block_labels in zip(train.split(BLOCK_ROWS), labels.split(BLOCK_ROWS), strict=True):
                block = F.normalize(block.to(self.queries.device).float(), dim=1)
                block_labels = block_labels.to(self.queries.device)
                for start in range(0, len(self.queries), self._rows):
                    rows = slice(start, start + self._rows)
                    queries = self.queries[rows]
                    out = self._buffer[: len(queries) * len(block)].view(len(queries), len(block))
                    similarities, indices = torch.mm(queries, block.T, out=out).topk(min(k, len(block)), dim=1)
                    self._keep_best(rows, similarities, block_labels[indices])

    def _keep_best(self, rows: slice, similarities: Tensor, labels: Tensor) -> None:
        """Keep the best k of the known and the new neighbors."""
        both = torch.cat([self.similarities[rows], similarities], 1)
        self.similarities[rows], indices = both.topk(self.similarities.shape[1], dim=1)
        self.labels[rows] = torch.cat([self.labels[rows], labels], 1).gather(1, indices)

    def merge(self, processes: DistributedContext) -> None:
        """Keep the best k over all processes, in all of them; each has seen its part of the train set."""
        if processes.world_size == 1:
            return
        n, k = self.similarities.shape
        for start in range(0, n, self._rows):
            rows = slice(start, start + self._rows)
            similarities, labels = (
                processes.all_gather(self.similarities[rows]),
                processes.all_gather(self.labels[rows]),
            )
            similarities, labels = (x.unflatten(0, (processes.world_size, -1)) for x in (similarities, labels))
            self.similarities[rows], indices = similarities.transpose(0, 1).flatten(1).topk(k, dim=1)
            self.labels[rows] = labels.transpose(0, 1).flatten(1).gather(1, indices)


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Matrix products of float32 without TF32, whatever training uses: neighbors can differ by less than TF32 resolves."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def nearest_labels(
    train: Tensor, labels: Tensor, queries: Tensor, k: int, *, memory: int = 1 << 26, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """The k most similar photos of a train set in memory: (cosine similarities float32 [n,k], most similar first; their
    labels [n,k]). train [m,D], labels int64 [m], queries [n,D]; k is at most m. See `NearestNeighbors`."""
    neighbors = NearestNeighbors(queries.to(device or train.device), min(k, len(train)), memory=memory)
    neighbors.update(train, labels)
    return neighbors.similarities, neighbors.labels


def class_scores(similarities: Tensor, labels: Tensor, temperature: float, classes: int) -> Tensor:
    """Each neighbor [n,k] votes for its class with weight exp(similarity / temperature): float32 [n,C].

    Raises UserError if a vote could overflow float32 at this temperature.
    """
    check_temperature(temperature)
    scores = torch.zeros(len(labels), classes, device=labels.device)
    return scores.scatter_add_(1, labels, (similarities / temperature).exp())


def knn_scores(
    train: Tensor,
    labels: Tensor,
    queries: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    classes: int | None = None,
    *,
    memory: int = 1 << 26,
    device: torch.device | None = None,
) -> Tensor:
    """Class scores of the queries, float32 [n,C]: see `nearest_labels` for the arguments, `class_scores` for the vote."""
    classes = int(labels.max()) + 1 if classes is None else classes
    return class_scores(*nearest_labels(train, labels, queries, k, memory=memory, device=device), temperature, classes)


def top_accuracy(scores: Tensor, targets: Tensor, k: int) -> tuple[float, float]:
    """Top-1 and top-5 in percent, of scores [n,C] and true classes [n].

    As published, top-5 considers no more classes than there are neighbors, and among equal scores (classes without
    any vote) the lower class comes first.
    """
    hits = [0, 0]
    for chunk, chunk_targets in zip(scores.split(4096), targets.to(scores.device).split(4096), strict=True):
        order = chunk.argsort(dim=1, descending=True, stable=True)
        for i, top in enumerate((1, min(5, k))):
            hits[i] += int((order[:, :top] == chunk_targets[:, None]).sum())
    return 100 * hits[0] / len(targets), 100 * hits[1] / len(targets)


def photo_knn(
    network: Backbone | None,
    train: LabeledPhotos,
    val: LabeledPhotos,
    kinds: tuple[str, ...] = ("cls",),
    *,
    k: int = 20,
    temperature: float = 0.07,
    batch: int = 256,
    workers: int = 0,
    progress: bool = False,
    processes: DistributedContext | None = None,
) -> dict[str, tuple[float, float]]:
    """Top-1 and top-5 in percent for each kind of features; train set and queries are read once for all kinds.

    processes: all of them call this together, each reads its share of both sets, and all get the same result.
    Raises UserError if no photo of the train set, or no query, has a class.
    """
    device = next(network.parameters()).device if network else torch.device("cpu")
    processes = processes or DistributedContext(0, 1, device, torch.float32)
    local_train, local_val = (photos.for_rank(processes.rank, processes.world_size) for photos in (train, val))
    reading: dict[str, Any] = dict(batch=batch, workers=workers)
    queries, targets = photo_features(network, local_val, kinds, **reading, progress="queries" if progress else None)
    targets = processes.all_gather(targets.to(processes.device))
    if not len(targets):
        raise UserError(f"{val.shards.folder}: none of the {len(val)} photos is readable and has a known class")
    neighbors = {}
    for kind in kinds:
        empty = torch.empty(0, feature_width(kind, network, val.size))  # a process may have no readable photo
        neighbors[kind] = NearestNeighbors(processes.all_gather(queries.pop(kind, empty).to(processes.device)), k)
    seen = torch.zeros(1, dtype=torch.int64, device=processes.device)
    loaded = photo_batches(network, local_train, kinds, **reading, progress="train photos" if progress else None)
    for features, labels in in_blocks(loaded):
        for kind in kinds:
            neighbors[kind].update(features[kind], labels)
        seen += len(labels)
    if not processes.all_gather(seen).sum():
        raise UserError(f"{train.shards.folder}: none of the {len(train)} photos is readable and has a known class")
    accuracy = {}
    for kind, nearest in neighbors.items():
        nearest.merge(processes)
        scores = class_scores(nearest.similarities, nearest.labels, temperature, len(train.classes))
        accuracy[kind] = top_accuracy(scores, targets, k)
    return accuracy


def in_blocks(
    batches: Iterable[tuple[dict[str, Tensor], Tensor]], rows: int = BLOCK_ROWS
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Batches concatenated to at least `rows` photos; the last block may have fewer."""
    waiting: list[tuple[dict[str, Tensor], Tensor]] = []
    for batch in batches:
        waiting.append(batch)
        if sum(len(labels) for _, labels in waiting) >= rows:
            yield _concat(waiting)
            waiting = []
    if waiting:
        yield _concat(waiting)


def _concat(batches: list[tuple[dict[str, Tensor], Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
    features = {kind: torch.cat([batch[kind] for batch, _ in batches]) for kind in batches[0][0]}
    return features, torch.cat([labels for _, labels in batches])


def run(
    target: EvalTarget,
    sets: PhotoSets | None,
    *,
    features: str = "cls",
    k: int | None = None,
    temperature: float | None = None,
    size: int | None = None,
    untrained: bool = False,
    limit: int | None = None,
    batch: int = 256,
    workers: int | None = None,
) -> int:
    """The program: measure, print, record. `sets`: see `EvalTarget.photo_sets`; the other options: `python -m eval knn`."""
    start = time.perf_counter()
    processes = distributed.start(Speed())
    k = k or target.settings.k
    temperature = temperature or target.settings.temperature
    network = target.network(untrained).to(processes.device)
    size = size or network.image_size
    check_size(network, size)
    if sets is None:
        if processes.is_main:
            print("k-NN skipped: these shards have no classes")
        return 0
    train, val = sets.at_size(size)
    workers = default_workers(len(train) // processes.world_size, workers)
    options: dict[str, Any] = dict(k=k, temperature=temperature, batch=batch, workers=workers)
    used = None if features == "pixels" else network
    accuracy = photo_knn(used, train, val, (features,), **options, progress=processes.is_main, processes=processes)
    top1, top5 = accuracy[features]
    processes.close()
    if not processes.is_main:
        return 0

    name = "raw pixels" if features == "pixels" else target.title(untrained)
    caption = f"{len(train.classes)} classes, {size} pixels a side, k {k}, temperature {temperature:g}"
    table = Table(title=escape(f"k-NN, {name}"), caption=caption, title_justify="left", caption_justify="left")
    for heading in ("features", "train photos", "queries", "top-1 %", "top-5 %"):
        table.add_column(heading, justify="right")
    table.add_row(features, f"{len(train):,}", f"{len(val):,}", f"{top1:.2f}", f"{top5:.2f}")
    Console().print(table)
    settings = dict(features=features, k=k, temperature=temperature, size=size, limit=limit, untrained=untrained)
    data = target.describe_photos(train, val)
    seconds = round(time.perf_counter() - start, 1)
    print(target.record("knn", **settings, **data, top1=top1, top5=top5, seconds=seconds))
    return 0
