"""Linear segmentation with frozen features: a 1x1 convolution tells the class of every patch token.

    python -m eval.linear_seg RUN_OR_CHECKPOINT --data VOC_FOLDER [--protocol densedino|leopart] [--train-split trainaug]
        [--val-split val] [--classes N] [--size N] [--train-size N] [--[no-]augment] [--epochs 25] [--lr .01] [--batch 64]
        [--untrained]

Paper section 4.1, the protocol of Leopart (Ziegler & Asano 2022) as the published eval_segment.py runs it: scenes of
448 x 448, patch tokens of 28 x 28, upsampled to 100 x 100 to train on and to 448 x 448 to be judged; SGD with momentum
.9 and weight decay 1e-4 for 25 epochs, learning rate .01 for each 60 scenes of a batch, a tenth of it from epoch 20 on.

Two things are done otherwise than published, and mean the same: logits are upsampled instead of features, for a 1x1
convolution and a bilinear upsampling can change places (its weights sum to one); and features that augmentation does
not change are computed once.

`--protocol leopart`: as Leopart's own code does it (linear_finetune.py, eval_linear.py). Batches of 120 with what is left
over dropped, a learning rate of .01 whatever the batch, torch's own first weights; and its best epoch is picked by 480
validation scenes at 100 x 100, then judged on all of them at 448 x 448, where the other protocol's best epoch is simply
the one that scores most.

The small protocol, for networks trained on views of less than 128 pixels: scenes of the view's own size, no
augmentation, trained on logits and masks of half that size (4 for each patch of 8 pixels, about as many as published;
twice as many cost four times the time and moved mIoU by 0.1), judged at full size. Features are cached, so that minutes
become seconds; a network of little width may want a larger --lr to get to the end of its 25 epochs.

n scenes · D width · h, w patches · C classes · S side of a scene, pixels.
"""

import argparse
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

from eval.datasets import IGNORE, SMALL, VocSegmentation, scene_sizes, voc_splits
from eval.features import (
    SceneTokens,
    check_size,
    default_workers,
    resized_masks,
    scene_batches,
    scene_tokens,
    shown,
    upsampled,
)
from eval.miou import Score, confusion, score_rows, scored
from eval.target import EvalTarget
from model.vit import ViT
from runtime.errors import UserError, require_positive, run_cli, suggest

PROTOCOLS = ("densedino", "leopart")


@dataclass(frozen=True)
class Protocol:
    """The published protocol; `for_views` gives the one that suits a network."""

    size: int = 448  # S
    train_size: int = 100  # side of the logits and masks that the loss compares
    augment: bool = True
    epochs: int = 25
    batch: int = 64  # 8 on each of 8 GPUs
    lr: float = 0.01  # for each 60 scenes of a batch
    seed: int = 0
    drop_last: bool = False  # the scenes of an epoch that fill no batch
    first_weights: Literal["small", "torch"] = "small"  # normal(0, .01) and no bias; or torch's own
    picked_by: int = 0  # the best epoch is picked by so many val scenes at train_size; 0: by all of them, at full size

    @staticmethod
    def for_views(image_size: int, size: int | None = None, name: str = "densedino") -> "Protocol":
        """The protocol for a network trained on views of `image_size`, perhaps with scenes of another size."""
        if name not in PROTOCOLS:
            raise UserError(f"protocol '{name}': one of {', '.join(PROTOCOLS)}{suggest(name, PROTOCOLS)}")
        size, train_size = scene_sizes(image_size, size)
        protocol = Protocol(size, train_size, augment=size >= SMALL)
        if name == "leopart":  # batches of 60 on each of 2 GPUs; .005 for each 60 of 120 scenes is .01
            leopart: dict[str, Any] = dict(batch=120, lr=0.005, drop_last=True, first_weights="torch", picked_by=480)
            protocol = replace(protocol, **leopart)
        return protocol


@dataclass(frozen=True)
class Figures(Score):
    """What an epoch scored on the validation scenes, in percent."""

    epoch: int
    picked_by: float  # the mIoU by which the best epoch is picked


# -------------------------------------------------------------------------------------------------------- the linear map


@torch.random.fork_rng(devices=())  # what is drawn here is drawn from the protocol's seed and leaves no trace
def fit(
    network: ViT,
    train: VocSegmentation,
    val: VocSegmentation,
    protocol: Protocol,
    *,
    workers: int = 0,
    show: bool = False,
) -> list[Figures]:
    """Train the linear map on `train`; its figures on `val` after each epoch. A function of the seed (and of `workers`,
    which draw the augmentation).

    Raises UserError where the size is no multiple of the network's patch.
    """
    check_size(network, protocol.size)
    device = next(network.parameters()).device
    told: dict[str, Any] = dict(batch=protocol.batch, workers=workers)
    judged = scene_tokens(network, val, **told, show="val scenes" if show else None)
    kept = None if train.augment else scene_tokens(network, train, **told, show="train scenes" if show else None)
    torch.manual_seed(protocol.seed)
    draws = torch.Generator().manual_seed(protocol.seed)

    def epoch_of_batches() -> Iterator[SceneTokens]:
        if kept is None:
            yield from scene_batches(network, train, **told, shuffle=draws)
            return
        for rows in torch.randperm(len(train), generator=draws).split(protocol.batch):
            yield SceneTokens(kept.tokens[rows].to(device), kept.masks[rows].to(device))

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
    for epoch in shown(range(1, protocol.epochs + 1), protocol.epochs, "linear map" if show else None):
        for tokens, masks in epoch_of_batches():
            if protocol.drop_last and len(masks) < protocol.batch <= len(train):
                continue
            logits = upsampled(head(tokens), protocol.train_size)
            answers = resized_masks(masks, protocol.train_size).long()
            loss = F.cross_entropy(logits, answers, ignore_index=IGNORE)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        score = scored(judge(head, judged))
        picked_by = score.miou
        if protocol.picked_by:
            some = SceneTokens(judged.tokens[: protocol.picked_by], judged.masks[: protocol.picked_by])
            picked_by = scored(judge(head, some, size=protocol.train_size)).miou
        history.append(Figures(**asdict(score), epoch=epoch, picked_by=picked_by))
    return history


def best_of(history: list[Figures]) -> Figures:
    """The epoch that the protocol picks; the first of equal ones."""
    return max(history, key=lambda figures: figures.picked_by)


@torch.inference_mode()
def judge(head: nn.Module, scenes: SceneTokens, batch: int = 32, size: int | None = None) -> Tensor:
    """Confusion matrix [C,C] of the head's predictions, at the masks' full size or at `size`."""
    device = next(head.parameters()).device
    counts = torch.zeros((), dtype=torch.int64, device=device)
    for tokens, masks in zip(scenes.tokens.split(batch), scenes.masks.split(batch), strict=True):
        logits = head(tokens.to(device))
        masks = resized_masks(masks.to(device), size or masks.shape[-1])
        predicted = upsampled(logits, masks.shape[-1]).argmax(1)
        counts = counts + confusion(masks, predicted, logits.shape[1])
    return counts


def scenes_of(
    folder: str | Path, protocol: Protocol, train_split: str | None, val_split: str, classes: int | None = None
) -> tuple[VocSegmentation, VocSegmentation]:
    """(train, val) of a folder in Pascal VOC's layout; the train split is by default `trainaug` where there is one."""
    return voc_splits(folder, protocol.size, train_split, val_split, classes, augment=protocol.augment)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m eval.linear_seg", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("network", help="a run folder, a checkpoint, a backbone file or timm:NAME")
    parser.add_argument("--data", help="folder in Pascal VOC's layout (default: the run's eval.voc)")
    parser.add_argument("--protocol", default="densedino", help=f"{' or '.join(PROTOCOLS)} (default: densedino)")
    parser.add_argument("--train-split", help="default: trainaug where it is listed, else train")
    parser.add_argument("--val-split", default="val", help="default: val")
    parser.add_argument("--classes", type=int, help="how many (default: see classes.txt or the train masks)")
    parser.add_argument("--size", type=int, help="side of a scene in pixels (default: 448; small protocol: the view's)")
    parser.add_argument(
        "--train-size", type=int, help="side of the logits that are trained (default: 100/448 of --size)"
    )
    parser.add_argument("--augment", action=argparse.BooleanOptionalAction, help="default: yes; small protocol: no")
    parser.add_argument("--epochs", type=int, help="default: the run's eval.seg_epochs, 25")
    parser.add_argument("--lr", type=float, help="for each 60 scenes of a batch (default: the run's eval.seg_lr, .01)")
    parser.add_argument("--batch", type=int, help=f"scenes (default: {Protocol.batch})")
    parser.add_argument("--seed", type=int, help="of the map's first weights and of the order (default: 0)")
    parser.add_argument("--untrained", action="store_true", help="the run's network before training")
    parser.add_argument("--workers", type=int, help="reading processes (default: by the number of scenes read)")
    args = parser.parse_args(argv)

    began = time.perf_counter()
    require_positive(args, "classes", "size", "train_size", "epochs", "lr", "batch")
    subject = EvalTarget(args.network)
    data = subject.scenes_folder(args.data)
    network = subject.network(args.untrained)
    protocol = Protocol.for_views(network.image_size, args.size, args.protocol)
    given: dict[str, Any] = {}
    if args.protocol == "densedino":
        given = dict(epochs=subject.settings.seg_epochs, lr=subject.settings.seg_lr)
    for name in ("train_size", "augment", "epochs", "lr", "batch", "seed"):
        if getattr(args, name) is not None:
            given[name] = getattr(args, name)
    protocol = replace(protocol, **given)
    check_size(network, protocol.size)
    train, val = scenes_of(data, protocol, args.train_split, args.val_split, args.classes)
    workers = default_workers(len(train) * (protocol.epochs if protocol.augment else 1))
    history = fit(network, train, val, protocol, workers=workers if args.workers is None else args.workers, show=True)

    last, best = history[-1], best_of(history)
    title = f"linear segmentation, {subject.path}{', untrained' if args.untrained else ''}: {data}, {len(val)} scenes"
    table = Table(title=escape(title), title_justify="left")
    table.add_column("IoU %")
    for figures, word in ((last, "last epoch"), (best, "best epoch")):
        table.add_column(f"{word} ({figures.epoch})", justify="right")
    for row in score_rows([train.name(label) for label in range(train.classes)], (last, best)):
        table.add_row(*map(escape, row), end_section=row[0] == train.name(train.classes - 1))
    Console().print(table)
    sets = dict(data=str(data), train_split=train.split, val_split=val.split, scenes=len(train), classes=train.classes)
    seconds = round(time.perf_counter() - began, 1)
    scores = dict(last=asdict(last), best=asdict(best), seconds=seconds)
    told = dict(protocol=args.protocol, untrained=args.untrained)
    print(subject.record("linear_seg", **told, **asdict(protocol), **sets, **scores))
    return 0


if __name__ == "__main__":
    run_cli(main)
