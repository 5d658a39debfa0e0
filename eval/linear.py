"""Linear classification with frozen features: many linear probes are trained in one pass, one for each learning rate.

    python -m eval linear RUN_OR_CHECKPOINT [--train SHARDS] [--val SHARDS] [--epochs N] [--batch N] [--[no-]augment]
        [--rates .001,.01,.1] [--size N] [--untrained] [--limit N] [--workers N]
        [--ignore-class NAME]

The protocol of DINOv2 (Oquab et al. 2023): one probe for each learning rate and each choice of features ([CLS] alone;
[CLS] concatenated with the mean of the patch tokens), all on the same batches; SGD with momentum .9 and no weight decay,
learning rates per 256 photos of a batch with a cosine decay to 0; 10 epochs of random resized crops and flips. The best
probe is the one with the highest top-1 on the validation photos, as published. Different from DINOv2: tokens of the last
block only (not of the last four), and three higher learning rates besides the 13 published ones.

The small protocol, for networks trained on views of less than 128 pixels: center crops, so that features are computed
once, and 100 epochs over them.

n photos · D width of a feature · C classes · L linear probes.
"""

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
from eval.features import check_size, default_workers, photo_batches, photo_features, progress_bar
from eval.knn import top_accuracy
from eval.target import EvalTarget, PhotoSets
from model.backbone import Backbone
from runtime.errors import UserError

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1, 1.0)
INPUTS = {"cls": ("cls",), "cls+patches": ("cls", "patches")}  # of a probe: kinds of features, concatenated


@dataclass(frozen=True)
class Protocol:
    """The published protocol; `for_views` gives the one for a network."""

    augment: bool = True
    epochs: int = 10
    batch: int = 1024  # 128 on each of 8 GPUs
    rates: tuple[float, ...] = RATES  # per 256 photos of a batch
    seed: int = 0

    @property
    def reads(self) -> int:
        """How often a train photo is read: once, if its features can be kept."""
        return self.epochs if self.augment else 1

    @staticmethod
    def for_views(image_size: int) -> "Protocol":
        """The protocol for a network trained on views of `image_size` pixels."""
        return Protocol() if image_size >= SMALL else Protocol(augment=False, epochs=100, batch=128)


@dataclass(frozen=True)
class ProbeScore:
    """The accuracy of one linear probe on the validation photos, in percent."""

    features: str
    rate: float
    top1: float
    top5: float


class LinearProbes(nn.Module):
    """A linear probe for each choice of features and each learning rate: {kind: [n,D]} -> logits [L,n,C].

    Weights are initialized from normal(0, .01), biases with 0.
    """

    def __init__(self, width: int, classes: int, rates: Sequence[float]):
        super().__init__()
        self.rates = list(rates)
        self.weights, self.biases = nn.ParameterDict(), nn.ParameterDict()
        for features, kinds in INPUTS.items():
            self.weights[features] = nn.Parameter(0.01 * torch.randn(len(rates), len(kinds) * width, classes))
            self.biases[features] = nn.Parameter(torch.zeros(len(rates), 1, classes))

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        logits = []
        for name, kinds in INPUTS.items():
            inputs = torch.cat([features[kind] for kind in kinds], 1)  # [n,D] or [n,2D]
            logits.append(inputs @ self.weights[name] + self.biases[name])  # [rates,n,C]
        return torch.cat(logits)

    @property
    def names(self) -> list[tuple[str, float]]:
        """(features, rate) of each probe, in the order of the logits."""
        return [(features, rate) for features in INPUTS for rate in self.rates]


@torch.random.fork_rng(devices=())  # everything is drawn from the protocol's seed, and the global generator is restored
def fit(
    network: Backbone,
    train: LabeledPhotos,
    val: LabeledPhotos,
    protocol: Protocol,
    *,
    batch: int = 256,
    workers: int = 0,
    progress: bool = False,
) -> list[ProbeScore]:
    """Train the probes on `train`; the score of each on `val`. Deterministic given the seed (and, with augmentation,
    `workers`). batch: photos at a time where features are only computed.

    Raises UserError if no photo of the train set or of the validation set has a class.
    """
    device = next(network.parameters()).device
    kinds = INPUTS["cls+patches"]
    reading: dict[str, Any] = dict(batch=batch, workers=workers)
    val_features, val_labels = photo_features(network, val, kinds, **reading, progress="queries" if progress else None)
    train_features: dict[str, Tensor] = {}
    train_labels = torch.empty(0)
    if not protocol.augment:
        train_features, train_labels = photo_features(
            network, train, kinds, **reading, progress="train photos" if progress else None
        )
    for photos, labels in ((val, val_labels), (train, train_labels)):
        if not len(labels) and not (photos is train and protocol.augment):
            raise UserError(
                f"{photos.shards.folder}: none of the {len(photos)} photos is readable and has a known class"
            )
    torch.manual_seed(protocol.seed)
    draws = torch.Generator().manual_seed(protocol.seed)
    augmented = LabeledPhotos(train.shards, train.size, train.ids, train.classes, augment=True)

    def epoch_of_batches() -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        if protocol.augment:
            yield from photo_batches(network, augmented, kinds, batch=protocol.batch, workers=workers, shuffle=draws)
            return
        for rows in torch.randperm(len(train_labels), generator=draws).split(protocol.batch):
            yield {kind: train_features[kind][rows].to(device) for kind in kinds}, train_labels[rows].to(device)

    probes = LinearProbes(network.width, len(train.classes), protocol.rates).to(device)
    # without weight decay, scaling a probe's loss is the same as scaling its learning rate: one optimizer for all probes
    rates = protocol.batch / 256 * torch.tensor([rate for _, rate in probes.names], device=device)
    optimizer = torch.optim.SGD(probes.parameters(), 1.0, momentum=0.9)
    steps = protocol.epochs * -(-len(train_labels if train_features else train) // protocol.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in progress_bar(range(protocol.epochs), protocol.epochs, "linear probes" if progress else None):
        for features, labels in epoch_of_batches():
            # cloned: a tensor made in inference mode cannot be used in autograd
            logits = probes({kind: values.clone() for kind, values in features.items()})  # [L,n,C]
            losses = F.cross_entropy(logits.transpose(1, 2), labels.expand(len(rates), -1), reduction="none").mean(1)
            optimizer.zero_grad()
            (rates * losses).sum().backward()
            optimizer.step()
            schedule.step()
    return evaluate(probes, val_features, val_labels)


@torch.inference_mode()
def evaluate(probes: LinearProbes, features: dict[str, Tensor], labels: Tensor, batch: int = 1024) -> list[ProbeScore]:
    """The score of each probe on photos, given their features {kind: [n,D]} and labels [n]."""
    device = next(probes.parameters()).device
    hits = torch.zeros(len(probes.names), 2)
    for start in range(0, len(labels), batch):
        rows = slice(start, start + batch)
        logits = probes({kind: values[rows].to(device) for kind, values in features.items()})
        targets = labels[rows].to(device)
        hits += torch.tensor([top_accuracy(scores, targets, 5) for scores in logits]) * len(targets)
    accuracy = (hits / len(labels)).tolist()
    return [ProbeScore(*name, *top) for name, top in zip(probes.names, accuracy, strict=True)]


def best_of(scores: list[ProbeScore]) -> ProbeScore:
    """The probe with the highest top-1; the first one among equals."""
    return max(scores, key=lambda score: score.top1)


def run(
    target: EvalTarget,
    sets: PhotoSets | None,
    *,
    size: int | None = None,
    untrained: bool = False,
    limit: int | None = None,
    workers: int | None = None,
    **changes: Any,
) -> int:
    """The program: measure, print, record. `sets`: see `EvalTarget.photo_sets`; changes: of the protocol (None: unchanged);
    the other options: `python -m eval linear`."""
    start = time.perf_counter()
    network = target.network(untrained)
    size = size or network.image_size
    check_size(network, size)
    changes = {name: value for name, value in changes.items() if value is not None}
    protocol = replace(Protocol.for_views(network.image_size), **changes)
    if sets is None:
        print("linear classification skipped: these shards have no classes")
        return 0
    train, val = sets.at_size(size)
    workers = default_workers(len(train) * protocol.reads, workers)
    scores = fit(network, train, val, protocol, workers=workers, progress=True)

    best = best_of(scores)
    title = f"linear classification, {target.title(untrained)}: {len(val):,} photos"
    table = Table(title=escape(title), title_justify="left")
    table.add_column("top-1 % at the learning rate", justify="right")
    for features in INPUTS:
        table.add_column(features, justify="right")
    for rate in protocol.rates:
        row = [score for score in scores if score.rate == rate]
        table.add_row(f"{rate:g}", *(f"[bold]{s.top1:.2f}[/bold]" if s is best else f"{s.top1:.2f}" for s in row))
    Console().print(table)
    print(f"best: top-1 {best.top1:.2f}, top-5 {best.top5:.2f}, {best.features} at the learning rate {best.rate:g}")
    settings = dict(untrained=untrained, size=size, limit=limit) | asdict(protocol) | target.describe_photos(train, val)
    results = dict(best=asdict(best), maps=[asdict(score) for score in scores])
    print(target.record("linear", **settings, **results, seconds=round(time.perf_counter() - start, 1)))
    return 0
