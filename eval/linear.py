"""Linear classification with frozen features: many linear maps are trained in one pass, one for each learning rate.

    python -m eval.linear RUN_OR_CHECKPOINT [--bank SHARDS] [--val SHARDS] [--epochs N] [--batch N] [--[no-]augment]
        [--rates .001,.01,.1] [--size N] [--untrained] [--limit N] [--workers N]

The protocol of DINOv2 (Oquab et al. 2023): for each learning rate and each choice of features ([CLS] alone; [CLS] beside
the mean of the patch tokens) one map, all on the same batches; SGD with momentum .9 and no weight decay, the rate (for each
256 photos of a batch) falling to nothing along a cosine. Random windows, flipped, are seen anew in each of 10 epochs. The
best map is that of the highest top-1 on the photos asked about, as published: it is picked by them. Otherwise than there,
tokens are the last block's only (not the last four blocks'), and three higher rates stand beside the 13 published ones.

The small protocol, for networks trained on views of less than 128 pixels: the center of each photo, so that features are
computed once, and 100 epochs over them.

n photos · D width of a feature · C classes · L linear maps.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from eval.datasets import SMALL, LabeledPhotos
from eval.features import check_size, default_workers, photo_batches, photo_features, shown
from eval.knn import top_accuracy
from eval.target import EvalTarget
from model.vit import ViT
from runtime.errors import UserError, require_positive, run_cli

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1, 1.0)
INPUTS = {"cls": ("cls",), "cls+patches": ("cls", "patches")}  # of a map: features side by side


@dataclass(frozen=True)
class Protocol:
    """The published protocol; `for_views` gives the one that suits a network."""

    augment: bool = True
    epochs: int = 10
    batch: int = 1024  # 128 on each of 8 GPUs
    rates: tuple[float, ...] = RATES  # for each 256 photos of a batch
    seed: int = 0

    @staticmethod
    def for_views(image_size: int) -> "Protocol":
        """The protocol for a network trained on views of `image_size`."""
        return Protocol() if image_size >= SMALL else Protocol(augment=False, epochs=100, batch=128)


@dataclass(frozen=True)
class Figures:
    """What one linear map scored on the photos asked about, in percent."""

    features: str
    rate: float
    top1: float
    top5: float


class Maps(nn.Module):
    """Linear maps of several learning rates for each choice of features: {kind: [n,D]} -> logits [L,n,C].

    Weights begin as normal(0, .01), biases as nothing.
    """

    def __init__(self, width: int, classes: int, rates: Sequence[float]):
        super().__init__()
        self.rates = list(rates)
        self.weights, self.biases = nn.ParameterDict(), nn.ParameterDict()
        for features, kinds in INPUTS.items():
            self.weights[features] = nn.Parameter(0.01 * torch.randn(len(rates), len(kinds) * width, classes))
            self.biases[features] = nn.Parameter(torch.zeros(len(rates), 1, classes))

    def forward(self, made: dict[str, Tensor]) -> Tensor:
        logits = []
        for features, kinds in INPUTS.items():
            side_by_side = torch.cat([made[kind] for kind in kinds], 1)  # [n,D]
            logits.append(side_by_side @ self.weights[features] + self.biases[features])  # [rates,n,C]
        return torch.cat(logits)

    @property
    def names(self) -> list[tuple[str, float]]:
        """(features, rate) of each map, in the order of the logits."""
        return [(features, rate) for features in INPUTS for rate in self.rates]


@torch.random.fork_rng(devices=())  # what is drawn here is drawn from the protocol's seed and leaves no trace
def fit(
    network: ViT,
    bank: LabeledPhotos,
    val: LabeledPhotos,
    protocol: Protocol,
    *,
    batch: int = 256,
    workers: int = 0,
    show: bool = False,
) -> list[Figures]:
    """Train the maps on `bank`; what each of them scores on `val`. A function of the seed (and of `workers`, which draw
    the augmentation). batch: photos at a time where nothing is trained on them.

    Raises UserError where no photo of the bank, or none that is asked about, has a class.
    """
    device = next(network.parameters()).device
    kinds = INPUTS["cls+patches"]
    how: dict[str, Any] = dict(batch=batch, workers=workers)
    asked, answers = photo_features(network, val, kinds, **how, show="queries" if show else None)
    kept: dict[str, Tensor] = {}
    known = torch.empty(0)
    if not protocol.augment:
        kept, known = photo_features(network, bank, kinds, **how, show="photos" if show else None)
    for photos, found in ((val, answers), (bank, known)):
        if not len(found) and not (photos is bank and protocol.augment):
            raise UserError(f"{photos.shards.folder}: no sound photo of a known class among {len(photos)}")
    torch.manual_seed(protocol.seed)
    draws = torch.Generator().manual_seed(protocol.seed)
    moved = LabeledPhotos(bank.shards, bank.size, bank.rows, bank.classes, augment=True)

    def epoch_of_batches() -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        if protocol.augment:
            yield from photo_batches(network, moved, kinds, batch=protocol.batch, workers=workers, shuffle=draws)
            return
        for rows in torch.randperm(len(known), generator=draws).split(protocol.batch):
            yield {kind: kept[kind][rows].to(device) for kind in kinds}, known[rows].to(device)

    maps = Maps(network.width, len(bank.classes), protocol.rates).to(device)
    # without weight decay a map's rate may as well stand before its loss: one optimizer for all
    rates = protocol.batch / 256 * torch.tensor([rate for _, rate in maps.names], device=device)
    optimizer = torch.optim.SGD(maps.parameters(), 1.0, momentum=0.9)
    steps = protocol.epochs * -(-len(known if kept else bank) // protocol.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in shown(range(protocol.epochs), protocol.epochs, "linear maps" if show else None):
        for made, labels in epoch_of_batches():
            # cloned, for a tensor born in inference mode can enter no gradient
            logits = maps({kind: features.clone() for kind, features in made.items()})  # [L,n,C]
            losses = F.cross_entropy(logits.transpose(1, 2), labels.expand(len(rates), -1), reduction="none").mean(1)
            optimizer.zero_grad()
            (rates * losses).sum().backward()
            optimizer.step()
            schedule.step()
    return judge(maps, asked, answers)


@torch.inference_mode()
def judge(maps: Maps, asked: dict[str, Tensor], answers: Tensor, batch: int = 1024) -> list[Figures]:
    """What each map scores on photos whose features are known."""
    device = next(maps.parameters()).device
    hits = torch.zeros(len(maps.names), 2)
    for first in range(0, len(answers), batch):
        rows = slice(first, first + batch)
        logits = maps({kind: features[rows].to(device) for kind, features in asked.items()})
        right = answers[rows].to(device)
        hits += torch.tensor([top_accuracy(some, right, 5) for some in logits]) * len(right)
    scores = (hits / len(answers)).tolist()
    return [Figures(*name, *score) for name, score in zip(maps.names, scores, strict=True)]


def best_of(figures: list[Figures]) -> Figures:
    """The map of the highest top-1; the first of equal ones."""
    return max(figures, key=lambda one: one.top1)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m eval.linear", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("network", help="a run folder, a checkpoint, a backbone file or timm:NAME")
    parser.add_argument("--bank", help="shards to train on (default: the run's training shards, less what it held out)")
    parser.add_argument("--val", help="shards asked about (default: the run's data.val, else what it held out)")
    parser.add_argument("--epochs", type=int, help="default: 10; small protocol: 100")
    parser.add_argument("--batch", type=int, help="photos (default: 1024; small protocol: 128)")
    parser.add_argument("--augment", action=argparse.BooleanOptionalAction, help="default: yes; small protocol: no")
    parser.add_argument("--rates", help="learning rates for each 256 photos of a batch, as in .001,.01,.1")
    parser.add_argument("--seed", type=int, help="of the maps' first weights, order and windows (default: 0)")
    parser.add_argument("--size", type=int, help="side of a photo in pixels (default: the training view's)")
    parser.add_argument("--untrained", action="store_true", help="the run's network before training")
    parser.add_argument("--limit", type=int, help="at most so many photos of each set, evenly spread")
    parser.add_argument("--workers", type=int, help="reading processes (default: by the number of photos read)")
    args = parser.parse_args(argv)

    began = time.perf_counter()
    require_positive(args, "epochs", "batch", "size", "limit")
    subject = EvalTarget(args.network)
    network = subject.network(args.untrained)
    size = args.size or network.image_size
    check_size(network, size)
    protocol = Protocol.for_views(network.image_size)
    for name in ("epochs", "batch", "augment", "seed"):
        if getattr(args, name) is not None:
            protocol = replace(protocol, **{name: getattr(args, name)})
    if args.rates:
        protocol = replace(protocol, rates=read_rates(args.rates))
    photos = subject.photos(size, args.bank, args.val, args.limit)
    if photos is None:
        print("linear classification skipped: these shards have no classes")
        return 0
    bank, val = photos
    workers = default_workers(len(bank) * (protocol.epochs if protocol.augment else 1))
    figures = fit(network, bank, val, protocol, workers=workers if args.workers is None else args.workers, show=True)

    best = best_of(figures)
    title = f"linear classification, {subject.path}{', untrained' if args.untrained else ''}: {len(val):,} photos"
    table = Table(title=escape(title), title_justify="left")
    table.add_column("top-1 % at the rate", justify="right")
    for features in INPUTS:
        table.add_column(features, justify="right")
    for rate in protocol.rates:
        row = [one for one in figures if one.rate == rate]
        table.add_row(f"{rate:g}", *(f"[bold]{f.top1:.2f}[/bold]" if f is best else f"{f.top1:.2f}" for f in row))
    Console().print(table)
    print(f"best: {best.top1:.2f} ({best.top5:.2f} among five), {best.features} at the rate {best.rate:g}")
    sets = dict(bank=str(bank.shards.folder), val=str(val.shards.folder), photos=len(bank), queries=len(val))
    told = dict(untrained=args.untrained, size=size, limit=args.limit) | asdict(protocol) | sets
    scores = dict(best=asdict(best), maps=[asdict(one) for one in figures])
    print(subject.record("linear", **told, **scores, seconds=round(time.perf_counter() - began, 1)))
    return 0


def read_rates(words: str) -> tuple[float, ...]:
    """Learning rates as they are typed. Raises UserError."""
    try:
        rates = tuple(float(word) for word in words.split(","))
    except ValueError:
        raise UserError(f"--rates {words}: numbers with commas between, as in .001,.01,.1") from None
    if min(rates) <= 0 or len(set(rates)) < len(rates):
        raise UserError(f"--rates {words}: each more than 0, and none twice")
    return rates


if __name__ == "__main__":
    run_cli(main)
