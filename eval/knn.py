"""k-NN classification with frozen features.

    python -m eval.knn RUN_OR_CHECKPOINT [--bank SHARDS] [--val SHARDS] [--features cls|patches|pixels] [--k 20]
        [--temperature .07] [--size N] [--untrained] [--limit N] [--workers N]
    torchrun --nproc-per-node=8 -m eval.knn RUN_OR_CHECKPOINT ...

Paper section 4.1, after DINO and Wu et al. 2018 ("Unsupervised feature learning via non-parametric instance
discrimination", section 3.4): the k photos of the bank most like a query vote for their classes.

The bank passes by and is never held: memory is the queries' and that of one block, however many photos vote. Several
processes share the photos of both sets.

m photos of the bank · n queries · D width of a feature · C classes · k neighbors.
"""

import argparse
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
from eval.features import KINDS, check_kind, check_size, default_workers, photo_batches, photo_features, width_of
from eval.target import EvalTarget
from model.vit import ViT
from runtime import distributed
from runtime.config import Speed
from runtime.distributed import DistributedContext
from runtime.errors import UserError, require_positive, run_cli

BANK_ROWS = 16384  # of the bank at a time


class NearestNeighbors:
    """The k photos of a bank most like each query, found while the bank passes by in blocks.

    queries [n,D], of any length; memory: bytes of one block of similarities, on top of the queries and the answers.
    After every `meet`: similarities, the cosines float32 [n,k], most similar first (-inf where fewer than k have come);
    labels int64 [n,k], theirs.
    """

    def __init__(self, queries: Tensor, k: int, *, memory: int = 1 << 26):
        self.queries = F.normalize(queries.float(), dim=1)
        self.similarities = torch.full((len(queries), k), -torch.inf, device=queries.device)
        self.labels = torch.zeros((len(queries), k), dtype=torch.int64, device=queries.device)
        self._rows = min(len(queries), max(1, memory // (4 * BANK_ROWS)))
        self._room = torch.empty(self._rows * BANK_ROWS, device=queries.device)  # one room: a new one costs page faults

    def meet(self, bank: Tensor, labels: Tensor) -> None:
        """Hold some of the bank, [m,D] of any dtype and device, and its labels int64 [m], against all queries."""
        k = self.similarities.shape[1]
        with float32_in_full():
            for block, named in zip(bank.split(BANK_ROWS), labels.split(BANK_ROWS), strict=True):
                block = F.normalize(block.to(self.queries.device).float(), dim=1)
                named = named.to(self.queries.device)
                for first in range(0, len(self.queries), self._rows):
                    rows = slice(first, first + self._rows)
                    asked = self.queries[rows]
                    room = self._room[: len(asked) * len(block)].view(len(asked), len(block))
                    similar, at = torch.mm(asked, block.T, out=room).topk(min(k, len(block)), dim=1)
                    self._keep(rows, similar, named[at])

    def _keep(self, rows: slice, similar: Tensor, labels: Tensor) -> None:
        """The best k of those known and those that have come."""
        both = torch.cat([self.similarities[rows], similar], 1)
        self.similarities[rows], kept = both.topk(self.similarities.shape[1], dim=1)
        self.labels[rows] = torch.cat([self.labels[rows], labels], 1).gather(1, kept)

    def join(self, processes: DistributedContext) -> None:
        """The best k of all processes' banks, in all of them; each has met another part with the same queries."""
        if processes.world == 1:
            return
        n, k = self.similarities.shape
        for first in range(0, n, self._rows):
            rows = slice(first, first + self._rows)
            similar, labels = processes.gather(self.similarities[rows]), processes.gather(self.labels[rows])
            similar, labels = (x.unflatten(0, (processes.world, -1)) for x in (similar, labels))
            self.similarities[rows], kept = similar.transpose(0, 1).flatten(1).topk(k, dim=1)
            self.labels[rows] = labels.transpose(0, 1).flatten(1).gather(1, kept)


@contextlib.contextmanager
def float32_in_full() -> Iterator[None]:
    """Products of float32 in float32, whatever was chosen for training: neighbors differ by less than TF32 tells."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def nearest_labels(
    bank: Tensor, labels: Tensor, queries: Tensor, k: int, *, memory: int = 1 << 26, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """The k most similar photos of a bank that is there: (cosine similarities float32 [n,k], most similar first; their
    labels [n,k]). bank [m,D], labels int64 [m], queries [n,D]; k is cut to m. See `NearestNeighbors`."""
    neighbors = NearestNeighbors(queries.to(device or bank.device), min(k, len(bank)), memory=memory)
    neighbors.meet(bank, labels)
    return neighbors.similarities, neighbors.labels


def class_scores(similarities: Tensor, labels: Tensor, temperature: float, classes: int) -> Tensor:
    """Each neighbor [n,k] votes for its class with weight exp(similarity / temperature): float32 [n,C].

    Raises UserError for a temperature so low that a vote leaves float32.
    """
    if temperature < 1 / 80:
        raise UserError(f"temperature {temperature}: at least 0.0125, or a vote of exp(1 / temperature) leaves float32")
    scores = torch.zeros(len(labels), classes, device=labels.device)
    return scores.scatter_add_(1, labels, (similarities / temperature).exp())


def knn_scores(
    bank: Tensor,
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
    return class_scores(*nearest_labels(bank, labels, queries, k, memory=memory, device=device), temperature, classes)


def top_accuracy(scores: Tensor, answers: Tensor, k: int) -> tuple[float, float]:
    """Top-1 and top-5 in percent, of scores [n,C] and right classes [n].

    As published, top-5 looks at no more classes than there are neighbors, and among equal scores (classes without
    any vote) the lower number goes first.
    """
    hits = [0, 0]
    for some, right in zip(scores.split(4096), answers.to(scores.device).split(4096), strict=True):
        order = some.argsort(dim=1, descending=True, stable=True)
        for i, places in enumerate((1, min(5, k))):
            hits[i] += int((order[:, :places] == right[:, None]).sum())
    return 100 * hits[0] / len(answers), 100 * hits[1] / len(answers)


def photo_knn(
    network: ViT | None,
    bank: LabeledPhotos,
    val: LabeledPhotos,
    kinds: tuple[str, ...] = ("cls",),
    *,
    k: int = 20,
    temperature: float = 0.07,
    batch: int = 256,
    workers: int = 0,
    show: bool = False,
    processes: DistributedContext | None = None,
) -> dict[str, tuple[float, float]]:
    """Top-1 and top-5 in percent for each kind of features, bank and queries read once for all of them.

    processes: all call this together, each reads its share of both sets, and all get the same figures.
    Raises UserError where no photo of the bank, or none that is asked about, has a class.
    """
    device = next(network.parameters()).device if network else torch.device("cpu")
    processes = processes or DistributedContext(0, 1, device, torch.float32)
    bank_here, val_here = (photos.share(processes.rank, processes.world) for photos in (bank, val))
    how: dict[str, Any] = dict(batch=batch, workers=workers)
    asked, answers = photo_features(network, val_here, kinds, **how, show="queries" if show else None)
    answers = processes.gather(answers.to(processes.device))
    if not len(answers):
        raise UserError(f"{val.shards.folder}: no sound photo of a known class among {len(val)}")
    neighbors = {}
    for kind in kinds:
        nothing = torch.empty(0, width_of(kind, network, val.size))  # a share may hold no sound photo
        neighbors[kind] = NearestNeighbors(processes.gather(asked.pop(kind, nothing).to(processes.device)), k)
    met = torch.zeros(1, dtype=torch.int64, device=processes.device)
    for features, labels in in_blocks(photo_batches(network, bank_here, kinds, **how, show="bank" if show else None)):
        for kind in kinds:
            neighbors[kind].meet(features[kind], labels)
        met += len(labels)
    if not processes.gather(met).sum():
        raise UserError(f"{bank.shards.folder}: no sound photo of a known class among {len(bank)}")
    figures = {}
    for kind, found in neighbors.items():
        found.join(processes)
        scores = class_scores(found.similarities, found.labels, temperature, len(bank.classes))
        figures[kind] = top_accuracy(scores, answers, k)
    return figures


def in_blocks(
    batches: Iterable[tuple[dict[str, Tensor], Tensor]], rows: int = BANK_ROWS
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Batches put together to at least `rows` photos; the last may have fewer."""
    waiting: list[tuple[dict[str, Tensor], Tensor]] = []
    for made in batches:
        waiting.append(made)
        if sum(len(labels) for _, labels in waiting) >= rows:
            yield _together(waiting)
            waiting = []
    if waiting:
        yield _together(waiting)


def _together(made: list[tuple[dict[str, Tensor], Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
    features = {kind: torch.cat([some[kind] for some, _ in made]) for kind in made[0][0]}
    return features, torch.cat([labels for _, labels in made])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m eval.knn", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("network", help="a run folder, a checkpoint, a backbone file or timm:NAME")
    parser.add_argument("--bank", help="shards that vote (default: the run's training shards, less what it held out)")
    parser.add_argument("--val", help="shards asked about (default: the run's data.val, else what it held out)")
    parser.add_argument("--features", default="cls", help=f"{', '.join(KINDS)} (default: cls)")
    parser.add_argument("--k", type=int, help="neighbors (default: the run's eval.k, 20)")
    parser.add_argument("--temperature", type=float, help="of the votes (default: the run's eval.temperature, .07)")
    parser.add_argument("--size", type=int, help="side of a photo in pixels (default: the training view's)")
    parser.add_argument("--untrained", action="store_true", help="the run's network before training")
    parser.add_argument("--limit", type=int, help="at most so many photos of each set, evenly spread")
    parser.add_argument("--batch", type=int, default=256, help="photos at a time (default: 256)")
    parser.add_argument("--workers", type=int, help="reading processes (default: by the number of photos)")
    args = parser.parse_args(argv)

    began = time.perf_counter()
    kind = check_kind(args.features)
    require_positive(args, "k", "temperature", "size", "limit", "batch")
    processes = distributed.start(Speed())
    subject = EvalTarget(args.network)
    k = args.k or subject.settings.k
    temperature = args.temperature or subject.settings.temperature
    network = subject.network(args.untrained).to(processes.device)
    size = args.size or network.image_size
    check_size(network, size)
    photos = subject.photos(size, args.bank, args.val, args.limit)
    if photos is None:
        if processes.first:
            print("k-NN skipped: these shards have no classes")
        return 0
    bank, val = photos
    workers = default_workers(len(bank) // processes.world) if args.workers is None else args.workers
    how: dict[str, Any] = dict(k=k, temperature=temperature, batch=args.batch, workers=workers)
    asked_of = None if kind == "pixels" else network
    top1, top5 = photo_knn(asked_of, bank, val, (kind,), **how, show=processes.first, processes=processes)[kind]
    processes.close()
    if not processes.first:
        return 0

    who = "raw pixels" if kind == "pixels" else f"{subject.path}{', untrained' if args.untrained else ''}"
    caption = f"{len(bank.classes)} classes, {size} pixels a side, k {k}, temperature {temperature:g}"
    table = Table(title=escape(f"k-NN, {who}"), caption=caption, title_justify="left", caption_justify="left")
    for heading in ("features", "bank", "queries", "top-1 %", "top-5 %"):
        table.add_column(heading, justify="right")
    table.add_row(kind, f"{len(bank):,}", f"{len(val):,}", f"{top1:.2f}", f"{top5:.2f}")
    Console().print(table)
    settings = dict(features=kind, k=k, temperature=temperature, size=size, limit=args.limit, untrained=args.untrained)
    sets = dict(bank=str(bank.shards.folder), val=str(val.shards.folder), photos=len(bank), queries=len(val))
    seconds = round(time.perf_counter() - began, 1)
    print(subject.record("knn", **settings, **sets, top1=top1, top5=top5, seconds=seconds))
    return 0


if __name__ == "__main__":
    run_cli(main)
