"""k-NN classification with frozen features.

    python -m eval.knn RUN_OR_CHECKPOINT [--bank SHARDS] [--val SHARDS] [--features cls|patches|pixels] [--k 20]
        [--temperature .07] [--size N] [--untrained] [--limit N] [--workers N]

Paper section 4.1, after DINO and Wu et al. 2018 ("Unsupervised feature learning via non-parametric instance
discrimination", section 3.4): the k photos of the bank most like a query vote for their classes.

m photos of the bank · n queries · D width of a feature · C classes · k neighbours.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from eval.datasets import LabelledPhotos
from eval.features import KINDS, check_kind, check_size, default_workers, photo_features
from eval.subject import Subject
from model.vit import ViT
from runtime.mistake import Mistake, tell_mistakes

BANK_ROWS = 16384  # of the bank at a time


def nearest_labels(
    bank: Tensor, labels: Tensor, queries: Tensor, k: int, *, memory: int = 1 << 28, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """The k most similar photos of the bank: (cosine similarities float32 [n,k], most similar first; their labels [n,k]).

    bank [m,D], labels int64 [m], queries [n,D]; k is cut to m. Never the whole [n,m]: a block of the bank at a time
    goes to the device, is held against blocks of queries, and the best k so far are merged with the block's best k.
    memory: bytes of one block of similarities. All in all the features, one block of the bank and about twice `memory`.
    """
    device = device or bank.device
    k = min(k, len(bank))
    queries = F.normalize(queries.to(device).float(), dim=1)
    best = torch.full((len(queries), k), -torch.inf, device=device)
    whose = torch.zeros((len(queries), k), dtype=torch.int64, device=device)
    query_rows = max(1, memory // (4 * min(BANK_ROWS, len(bank))))
    for block, named in zip(bank.split(BANK_ROWS), labels.split(BANK_ROWS), strict=True):
        block, named = F.normalize(block.to(device).float(), dim=1), named.to(device)
        for i in range(0, len(queries), query_rows):
            rows = slice(i, i + query_rows)
            similar, at = (queries[rows] @ block.T).topk(min(k, len(block)), dim=1)
            both, labels_of_both = torch.cat([best[rows], similar], 1), torch.cat([whose[rows], named[at]], 1)
            best[rows], kept = both.topk(k, dim=1)
            whose[rows] = labels_of_both.gather(1, kept)
    return best, whose


def class_scores(similarities: Tensor, labels: Tensor, temperature: float, classes: int) -> Tensor:
    """Each neighbour [n,k] votes for its class with weight exp(similarity / temperature): float32 [n,C].

    Raises Mistake for a temperature so low that a vote leaves float32.
    """
    if temperature < 1 / 80:
        raise Mistake(f"temperature {temperature}: at least 0.0125, or a vote of exp(1 / temperature) leaves float32")
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
    memory: int = 1 << 28,
    device: torch.device | None = None,
) -> Tensor:
    """Class scores of the queries, float32 [n,C]: see `nearest_labels` for the arguments, `class_scores` for the vote."""
    classes = int(labels.max()) + 1 if classes is None else classes
    return class_scores(*nearest_labels(bank, labels, queries, k, memory=memory, device=device), temperature, classes)


def top_accuracy(scores: Tensor, answers: Tensor, k: int) -> tuple[float, float]:
    """Top-1 and top-5 in percent, of scores [n,C] and right classes [n].

    As published, top-5 looks at no more classes than there are neighbours, and among equal scores (classes without
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
    bank: LabelledPhotos,
    val: LabelledPhotos,
    kinds: tuple[str, ...] = ("cls",),
    *,
    k: int = 20,
    temperature: float = 0.07,
    batch: int = 256,
    workers: int = 0,
    show: bool = False,
) -> dict[str, tuple[float, float]]:
    """Top-1 and top-5 in percent for each kind of features, bank and queries read once for all of them.

    Raises Mistake where no photo of the bank, or none that is asked about, has a class.
    """
    told = dict(batch=batch, workers=workers)
    voting, labels = photo_features(network, bank, kinds, **told, show="bank" if show else None)
    asked, answers = photo_features(network, val, kinds, **told, show="queries" if show else None)
    for photos, known in ((bank, labels), (val, answers)):
        if not len(known):
            raise Mistake(f"{photos.shards.folder}: no sound photo of a known class among {len(photos)}")
    device = next(network.parameters()).device if network else None
    figures = {}
    for kind in kinds:
        scores = knn_scores(voting[kind], labels, asked[kind], k, temperature, len(bank.classes), device=device)
        figures[kind] = top_accuracy(scores, answers, k)
    return figures


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m eval.knn", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("network", help="a run folder, a checkpoint or a backbone file")
    parser.add_argument("--bank", help="shards that vote (default: the run's training shards, less what it held out)")
    parser.add_argument("--val", help="shards asked about (default: the run's data.val, else what it held out)")
    parser.add_argument("--features", default="cls", help=f"{', '.join(KINDS)} (default: cls)")
    parser.add_argument("--k", type=int, help="neighbours (default: the run's eval.k, 20)")
    parser.add_argument("--temperature", type=float, help="of the votes (default: the run's eval.temperature, .07)")
    parser.add_argument("--size", type=int, help="side of a photo in pixels (default: the training view's)")
    parser.add_argument("--untrained", action="store_true", help="the run's network before training")
    parser.add_argument("--limit", type=int, help="at most so many photos of each set, evenly spread")
    parser.add_argument("--batch", type=int, default=256, help="photos at a time (default: 256)")
    parser.add_argument("--workers", type=int, help="reading processes (default: by the number of photos)")
    args = parser.parse_args(argv)

    began = time.perf_counter()
    kind = check_kind(args.features)
    for name in ("k", "temperature", "size", "limit", "batch"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise Mistake(f"--{name} {value}: more than 0")
    subject = Subject(args.network)
    k = args.k or subject.settings.k
    temperature = args.temperature or subject.settings.temperature
    network = subject.network(args.untrained)
    size = args.size or network.image_size
    check_size(network, size)
    photos = subject.photos(size, args.bank, args.val, args.limit)
    if photos is None:
        print("k-NN skipped: these shards have no classes")
        return 0
    bank, val = photos
    workers = default_workers(len(bank)) if args.workers is None else args.workers
    figures = photo_knn(
        None if kind == "pixels" else network,
        bank,
        val,
        (kind,),
        k=k,
        temperature=temperature,
        batch=args.batch,
        workers=workers,
        show=True,
    )
    top1, top5 = figures[kind]

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
    tell_mistakes(main)
