"""Segmentation by retrieval: every patch gets the labels of the patches most like it. Nothing is trained.

    python -m eval.retrieval_seg RUN_OR_CHECKPOINT --data VOC_FOLDER [--train-split trainaug] [--val-split val]
        [--pixels] [--scenes N] [--k 30] [--temperature .02] [--bank 1024000] [--classes N] [--size N] [--seed 0]
        [--untrained]

In-context scene understanding (Balazevic et al. 2023, "Toward in-context scene understanding", section 3): a bank of
patch tokens of the train scenes, each with the shares of the classes in its patch; a patch of a validation scene takes
the shares of its k nearest, weighted by the softmax of their cosines over a temperature; shares are upsampled to the
scene's size and the greatest is the prediction.

A bank larger than `--bank` tokens is a seeded choice, equally many from each scene (published: more from patches of
several classes). The small protocol, for networks trained on views of less than 128 pixels: scenes of the view's own size.

n scenes · m tokens of the bank · D width · h, w patches · C classes · S side of a scene, pixels.
"""

import argparse
import time
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from eval.datasets import VocSegmentation, scene_sizes, voc_splits
from eval.features import check_size, default_workers, scene_batches, shown, upsampled
from eval.knn import NearestNeighbors
from eval.miou import Score, confusion, score_rows, scored
from eval.target import EvalTarget
from model.vit import ViT
from runtime.errors import UserError, require_positive, run_cli

BANK = 1_024_000  # tokens: 1.6 GB of ViT-S


def class_shares(masks: Tensor, patch: int, classes: int) -> Tensor:
    """Masks uint8 [n,S,S] -> the share of each class among a patch's pixels that are of any: float32 [n,h*w,C].

    A patch whose pixels are all ignored has no shares: nothing but zeros.
    """
    n, side = len(masks), masks.shape[1] // patch
    pixels = masks.view(n, side, patch, side, patch).transpose(2, 3).reshape(n, side * side, patch * patch).long()
    pixels = pixels.where(pixels < classes, classes)
    counts = torch.zeros(n, side * side, classes + 1, device=masks.device)
    counts.scatter_add_(2, pixels, torch.ones((), device=masks.device).expand(pixels.shape))
    counts = counts[..., :classes]
    return counts / counts.sum(2, keepdim=True).clamp(min=1)


def remember(
    network: ViT,
    scenes: VocSegmentation,
    most: int = BANK,
    *,
    seed: int = 0,
    batch: int = 16,
    workers: int = 0,
    pixels: bool = False,
    show: bool = False,
) -> tuple[Tensor, Tensor]:
    """The bank: (tokens float32 [m,D], class shares float32 [m,C]), m at most `most`, on the network's device.

    pixels: those of a patch instead of its token: what is found without any network.
    Raises UserError where no patch has a class.
    """
    draws = torch.Generator().manual_seed(seed)
    each = max(1, most // len(scenes))  # tokens of a scene
    bank, shares = [], []
    made = scene_batches(network, scenes, batch=batch, workers=workers, pixels=pixels)
    for tokens, masks in shown(made, -(-len(scenes) // batch), "bank" if show else None):
        seen = tokens.flatten(2).transpose(1, 2)  # [n,h*w,D]
        known = class_shares(masks, network.patch, scenes.classes)
        if seen.shape[1] > each:
            chosen = torch.rand(seen.shape[:2], generator=draws).topk(each, dim=1).indices.to(seen.device)
            seen, known = (x.gather(1, chosen[..., None].expand(-1, -1, x.shape[2])) for x in (seen, known))
        of_any = known.sum(2) > 0
        bank.append(seen[of_any])
        shares.append(known[of_any])
    tokens, known = torch.cat(bank)[:most], torch.cat(shares)[:most]
    if not len(tokens):
        raise UserError(f"{scenes.folder}: no pixel of a class in the split '{scenes.split}'")
    return tokens, known


@torch.inference_mode()
def retrieved(queries: Tensor, bank: Tensor, shares: Tensor, k: int = 30, temperature: float = 0.02) -> Tensor:
    """Class shares [q,C] of queries [q,D]: those of the k nearest of the bank [m,D], weighted by softmax(cosine / T)."""
    neighbors = NearestNeighbors(queries, min(k, len(bank)))
    neighbors.meet(bank, torch.arange(len(bank), device=bank.device))
    weights = (neighbors.similarities / temperature).softmax(dim=1)  # [q,k]
    return torch.einsum("qk,qkc->qc", weights, shares[neighbors.labels])


def measure(
    network: ViT,
    train: VocSegmentation,
    val: VocSegmentation,
    *,
    k: int = 30,
    temperature: float = 0.02,
    bank: int = BANK,
    seed: int = 0,
    batch: int = 16,
    workers: int = 0,
    pixels: bool = False,
    show: bool = False,
) -> Score:
    """What the labels of `train` tell of `val`, at the full size of the prepared scenes."""
    check_size(network, val.size)
    how: dict[str, Any] = dict(batch=batch, workers=workers, pixels=pixels)
    remembered, shares = remember(network, train, bank, seed=seed, **how, show=show)
    counts = torch.zeros(val.classes, val.classes, dtype=torch.int64, device=remembered.device)
    made = scene_batches(network, val, **how)
    for tokens, masks in shown(made, -(-len(val) // batch), "val scenes" if show else None):
        n, _, h, w = tokens.shape
        found = retrieved(tokens.permute(0, 2, 3, 1).flatten(0, 2), remembered, shares, k, temperature)
        maps = upsampled(found.view(n, h, w, -1).permute(0, 3, 1, 2), val.size)  # [n,C,S,S]
        counts += confusion(masks, maps.argmax(1), val.classes)
    return scored(counts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m eval.retrieval_seg", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("network", help="a run folder, a checkpoint, a backbone file or timm:NAME")
    parser.add_argument("--data", help="folder in Pascal VOC's layout (default: the run's eval.voc)")
    parser.add_argument("--train-split", help="default: trainaug where it is listed, else train")
    parser.add_argument("--val-split", default="val", help="default: val")
    parser.add_argument("--classes", type=int, help="how many (default: see classes.txt or the train masks)")
    parser.add_argument("--pixels", action="store_true", help="raw pixels of the patches instead of tokens")
    parser.add_argument("--scenes", type=int, help="train scenes whose labels are known, evenly spread (default: all)")
    parser.add_argument("--k", type=int, default=30, help="neighbors (default: 30)")
    parser.add_argument("--temperature", type=float, default=0.02, help="of their weights (default: .02)")
    parser.add_argument("--bank", type=int, default=BANK, help=f"at most so many tokens (default: {BANK})")
    parser.add_argument("--seed", type=int, default=0, help="of the choice among more tokens (default: 0)")
    parser.add_argument("--size", type=int, help="side of a scene in pixels (default: 448; small protocol: the view's)")
    parser.add_argument("--untrained", action="store_true", help="the run's network before training")
    parser.add_argument("--workers", type=int, help="reading processes (default: by the number of scenes)")
    args = parser.parse_args(argv)

    began = time.perf_counter()
    require_positive(args, "classes", "scenes", "k", "temperature", "bank", "size")
    subject = EvalTarget(args.network)
    data = subject.scenes_folder(args.data)
    network = subject.network(args.untrained)
    size, _ = scene_sizes(network.image_size, args.size)
    check_size(network, size)
    train, val = voc_splits(data, size, args.train_split, args.val_split, args.classes)
    train = train.few(args.scenes or len(train))
    settings: dict[str, Any] = dict(k=args.k, temperature=args.temperature, bank=args.bank, seed=args.seed)
    settings |= dict(pixels=args.pixels)
    workers = default_workers(len(train)) if args.workers is None else args.workers
    score = measure(network, train, val, **settings, workers=workers, show=True)

    title = (
        f"segmentation by retrieval, {subject.path}{', untrained' if args.untrained else ''}: {data}, {len(val)} scenes"
    )
    table = Table(title=escape(title), title_justify="left")
    table.add_column("IoU %")
    table.add_column(f"{args.k} neighbors", justify="right")
    for row in score_rows([train.name(label) for label in range(train.classes)], (score,)):
        table.add_row(*map(escape, row), end_section=row[0] == train.name(train.classes - 1))
    Console().print(table)
    sets = dict(data=str(data), train_split=train.split, val_split=val.split, scenes=len(train), classes=train.classes)
    told = dict(untrained=args.untrained, size=size) | settings | sets
    print(subject.record("retrieval_seg", **told, **asdict(score), seconds=round(time.perf_counter() - began, 1)))
    return 0


if __name__ == "__main__":
    run_cli(main)
