"""Linear segmentation with frozen features: a 1x1 convolution predicts the class of every patch token.

    python -m eval linear_seg RUN_OR_CHECKPOINT --data VOC_FOLDER [--protocol densedino|leopart] [--train-split trainaug]
        [--val-split val] [--classes N] [--size N] [--train-size N] [--[no-]augment] [--epochs 25] [--lr .01] [--batch 64]
        [--untrained]

Paper section 4.1, the protocol of Leopart (Ziegler & Asano 2022) as the published eval_segment.py runs it: scenes of
448 x 448 give 28 x 28 patch tokens, upsampled to 100 x 100 for training and to 448 x 448 for evaluation; SGD with momentum
.9 and weight decay 1e-4 for 25 epochs, learning rate .01 per 60 scenes of a batch, divided by 10 after epoch 20.

Two differences from the published code give the same result: logits are upsampled instead of features, because a 1x1
convolution and bilinear upsampling commute (the weights of the upsampling sum to one); and without augmentation, features
are computed once.

`--protocol leopart`: as in Leopart's own code (linear_finetune.py, eval_linear.py). Batches of 120, an incomplete last
batch is dropped; a learning rate of .01 for any batch size; torch's default initialization. Its best epoch is selected on
480 validation scenes at 100 x 100 and evaluated on all of them at 448 x 448; the best epoch of the other protocol is
the one with the highest mIoU.

The small protocol, for networks trained on views of less than 128 pixels: scenes of the view's size, no augmentation,
training on logits and masks of half that size (4 per patch of 8 pixels, about as many as published; twice as many took
four times as long and changed mIoU by 0.1), evaluation at full size. Features are cached, which takes seconds instead of
minutes; a narrow network may need a larger --lr to converge in 25 epochs.

n scenes · D width · h, w patches · C classes · S side of a scene, pixels.
"""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from eval.datasets import IGNORE, SMALL, VocSegmentation, describe_scenes, scene_sizes, voc_splits
from eval.features import (
    SceneTokens,
    check_size,
    default_workers,
    progress_bar,
    resize_masks,
    scene_batches,
    scene_tokens,
    upsample,
)
from eval.miou import Score, confusion, score_of, score_rows
from eval.target import PROTOCOLS, EvalTarget, require_choice
from model.backbone import Backbone


@dataclass(frozen=True)
class Protocol:
    """The published protocol; `for_views` gives the one for a network."""

    size: int = 448  # S
    train_size: int = 100  # side of the logits and masks that the loss compares
    augment: bool = True
    epochs: int = 25
    batch: int = 64  # 8 on each of 8 GPUs
    lr: float = 0.01  # per 60 scenes of a batch
    seed: int = 0
    drop_last: bool = False  # an incomplete last batch of an epoch
    first_weights: Literal["small", "torch"] = "small"  # normal(0, .01) and no bias; or torch's default
    picked_by: int = 0  # select the best epoch on this many val scenes at train_size; 0: on all of them at full size

    @property
    def reads(self) -> int:
        """How often a train scene is read: once, if its features can be kept."""
        return self.epochs if self.augment else 1

    @staticmethod
    def for_views(image_size: int, size: int | None = None, name: str = "densedino") -> "Protocol":
        """The protocol for a network trained on views of `image_size` pixels; `size` overrides the side of a scene."""
        require_choice("--protocol", name, PROTOCOLS)
        size, train_size = scene_sizes(image_size, size)
        protocol = Protocol(size, train_size, augment=size >= SMALL)
        if name == "leopart":  # batches of 60 on each of 2 GPUs; .005 per 60 scenes is .01 for 120
            leopart: dict[str, Any] = dict(batch=120, lr=0.005, drop_last=True, first_weights="torch", picked_by=480)
            protocol = replace(protocol, **leopart)
        return protocol


@dataclass(frozen=True)
class EpochScore(Score):
    """The score after an epoch on the validation scenes, in percent."""

    epoch: int
    picked_by: float  # the mIoU by which the best epoch is selected


@torch.random.fork_rng(devices=())  # everything is drawn from the protocol's seed, and the global generator is restored
def fit(
    network: Backbone,
    train: VocSegmentation,
    val: VocSegmentation,
    protocol: Protocol,
    *,
    workers: int = 0,
    progress: bool = False,
    last_only: bool = False,
) -> list[EpochScore]:
    """Train the linear classifier on `train`; its score on `val` after each epoch, or after the last one only. Deterministic
    given the seed (and, with augmentation, `workers`).

    Raises UserError if the size is not a multiple of the network's patch size.
    """
    check_size(network, protocol.size)
    device = next(network.parameters()).device
    reading: dict[str, Any] = dict(batch=protocol.batch, workers=workers)
    val_tokens = scene_tokens(network, val, **reading, progress="val scenes" if progress else None)
    cached = None
    if not train.augment:
        cached = scene_tokens(network, train, **reading, progress="train scenes" if progress else None)
    torch.manual_seed(protocol.seed)
    draws = torch.Generator().manual_seed(protocol.seed)

    def epoch_of_batches() -> Iterator[SceneTokens]:
        if cached is None:
            yield from scene_batches(network, train, **reading, shuffle=draws)
            return
        for rows in torch.randperm(len(train), generator=draws).split(protocol.batch):
            yield SceneTokens(cached.tokens[rows].to(device), cached.masks[rows].to(device))

    head = nn.Conv2d(network.width, train.classes, 1)
    if protocol.first_weights == "small":
        nn.init.normal_(head.weight, std=0.01)
        assert head.bias is not None
        nn.init.zeros_(head.bias)
    head = head.to(device)
    rate = protocol.lr * protocol.batch / 60
    optimizer = torch.optim.SGD(head.parameters(), rate, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=20, gamma=0.1)

    history = []
    for epoch in progress_bar(
        range(1, protocol.epochs + 1), protocol.epochs, "linear classifier" if progress else None
    ):
        for tokens, masks in epoch_of_batches():
            if protocol.drop_last and len(masks) < protocol.batch <= len(train):
                continue
            logits = upsample(head(tokens), protocol.train_size)
            targets = resize_masks(masks, protocol.train_size).long()
            loss = F.cross_entropy(logits, targets, ignore_index=IGNORE)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        if last_only and epoch < protocol.epochs:
            continue
        score = score_of(evaluate(head, val_tokens))
        picked_by = score.miou
        if protocol.picked_by:
            subset = SceneTokens(val_tokens.tokens[: protocol.picked_by], val_tokens.masks[: protocol.picked_by])
            picked_by = score_of(evaluate(head, subset, size=protocol.train_size)).miou
        history.append(EpochScore(**asdict(score), epoch=epoch, picked_by=picked_by))
    return history


def best_of(history: list[EpochScore]) -> EpochScore:
    """The epoch that the protocol selects; the first one among equals."""
    return max(history, key=lambda score: score.picked_by)


@torch.inference_mode()
def evaluate(head: nn.Module, scenes: SceneTokens, batch: int = 32, size: int | None = None) -> Tensor:
    """Confusion matrix [C,C] of the head's predictions, at the masks' full size or at `size`."""
    device = next(head.parameters()).device
    counts = torch.zeros((), dtype=torch.int64, device=device)
    for tokens, masks in zip(scenes.tokens.split(batch), scenes.masks.split(batch), strict=True):
        logits = head(tokens.to(device))
        masks = resize_masks(masks.to(device), size or masks.shape[-1])
        predicted = upsample(logits, masks.shape[-1]).argmax(1)
        counts = counts + confusion(masks, predicted, logits.shape[1])
    return counts


def scenes_of(
    folder: str | Path,
    protocol: Protocol,
    train_split: str | None,
    val_split: str,
    classes: int | None = None,
    palette: str | Path | None = None,
) -> tuple[VocSegmentation, VocSegmentation]:
    """(train, val) of a folder in Pascal VOC's layout; the train split is by default `trainaug` if there is one."""
    augment = protocol.augment
    return voc_splits(folder, protocol.size, train_split, val_split, classes, augment=augment, palette=palette)


def run(
    target: EvalTarget,
    data: str,
    *,
    protocol: str = "densedino",
    train_split: str | None = None,
    val_split: str = "val",
    classes: int | None = None,
    palette: str | None = None,
    size: int | None = None,
    untrained: bool = False,
    workers: int | None = None,
    **changes: Any,
) -> int:
    """The program: measure, print, record. data: folder of scenes; changes: of the protocol (None: unchanged); the
    other options: `python -m eval linear_seg`."""
    start = time.perf_counter()
    network = target.network(untrained)
    if protocol == "densedino":
        changes = {"epochs": target.settings.seg_epochs, "lr": target.settings.seg_lr} | _given(changes)
    settings = replace(Protocol.for_views(network.image_size, size, protocol), **_given(changes))
    check_size(network, settings.size)
    train, val = scenes_of(data, settings, train_split, val_split, classes, palette)
    workers = default_workers(len(train) * settings.reads, workers)
    history = fit(network, train, val, settings, workers=workers, progress=True)

    last, best = history[-1], best_of(history)
    title = f"linear segmentation, {target.title(untrained)}: {data}, {len(val)} scenes"
    table = Table(title=escape(title), title_justify="left")
    table.add_column("IoU %")
    for score, label in ((last, "last epoch"), (best, "best epoch")):
        table.add_column(f"{label} ({score.epoch})", justify="right")
    for row in score_rows([train.name(label) for label in range(train.classes)], (last, best)):
        table.add_row(*map(escape, row), end_section=row[0] == train.name(train.classes - 1))
    Console().print(table)
    sets = describe_scenes(data, train, val)
    described = dict(protocol=protocol, untrained=untrained) | asdict(settings) | sets
    results = dict(last=asdict(last), best=asdict(best), seconds=round(time.perf_counter() - start, 1))
    print(target.record("linear_seg", **described, **results))
    return 0


def _given(changes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in changes.items() if value is not None}
