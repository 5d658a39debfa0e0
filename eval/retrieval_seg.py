"""Segmentation by retrieval: every patch gets the labels of the most similar labeled patches. Nothing is trained.

    python -m eval retrieval_seg RUN_OR_CHECKPOINT --data VOC_FOLDER [--train-split trainaug] [--val-split val]
        [--pixels] [--scenes N] [--k 30] [--temperature .02] [--memory-size 1024000] [--classes N] [--size N] [--seed 0]
        [--untrained]

In-context scene understanding (Balazevic et al. 2023, "Towards in-context scene understanding", section 3): a memory bank
of patch tokens of the train scenes, each with the class distribution of its patch; a patch of a validation scene
gets the distributions of its k nearest neighbors, weighted by the softmax of their cosines divided by a temperature; the
distributions are upsampled to the scene's size, and the argmax is the prediction.

If there are more than `--memory-size` tokens, a random choice is kept, equally many from each scene (published: more from
patches of several classes). The small protocol, for networks trained on views of less than 128 pixels: scenes of the
view's size.

n scenes · m tokens of the memory bank · D width · h, w patches · C classes · S side of a scene, pixels.
"""

import time
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from eval.datasets import VocSegmentation, describe_scenes, scene_sizes, voc_splits
from eval.features import check_size, default_workers, progress_bar, scene_batches, upsample
from eval.knn import NearestNeighbors
from eval.miou import Score, confusion, score_of, score_rows
from eval.target import MEMORY_SIZE, EvalTarget
from model.backbone import Backbone
from runtime.errors import UserError


def class_distributions(masks: Tensor, patch: int, classes: int) -> Tensor:
    """Masks uint8 [n,S,S] -> the share of each class among the labeled pixels of a patch: float32 [n,h*w,C].

    All zeros for a patch whose pixels are all ignored.
    """
    n, side = len(masks), masks.shape[1] // patch
    pixels = masks.view(n, side, patch, side, patch).transpose(2, 3).reshape(n, side * side, patch * patch).long()
    pixels = pixels.where(pixels < classes, classes)
    counts = torch.zeros(n, side * side, classes + 1, device=masks.device)
    counts.scatter_add_(2, pixels, torch.ones((), device=masks.device).expand(pixels.shape))
    counts = counts[..., :classes]
    return counts / counts.sum(2, keepdim=True).clamp(min=1)


def build_memory(
    network: Backbone,
    scenes: VocSegmentation,
    size: int = MEMORY_SIZE,
    *,
    seed: int = 0,
    batch: int = 16,
    workers: int = 0,
    pixels: bool = False,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """The memory bank: (tokens float32 [m,D], class distributions float32 [m,C]), m <= size, on the network's device.

    pixels: the patch's pixels instead of its token, the baseline without a network.
    Raises UserError if no patch has a labeled pixel.
    """
    draws = torch.Generator().manual_seed(seed)
    per_scene = max(1, size // len(scenes))  # tokens
    memory, distributions = [], []
    loaded = scene_batches(network, scenes, batch=batch, workers=workers, pixels=pixels)
    for tokens, masks in progress_bar(loaded, -(-len(scenes) // batch), "memory bank" if progress else None):
        keys = tokens.flatten(2).transpose(1, 2)  # [n,h*w,D]
        values = class_distributions(masks, network.patch, scenes.classes)
        if keys.shape[1] > per_scene:
            chosen = torch.rand(keys.shape[:2], generator=draws).topk(per_scene, dim=1).indices.to(keys.device)
            keys, values = (x.gather(1, chosen[..., None].expand(-1, -1, x.shape[2])) for x in (keys, values))
        labeled = values.sum(2) > 0
        memory.append(keys[labeled])
        distributions.append(values[labeled])
    keys, values = torch.cat(memory)[:size], torch.cat(distributions)[:size]
    if not len(keys):
        raise UserError(f"{scenes.folder}: no pixel has a class in the split '{scenes.split}'")
    return keys, values


@torch.inference_mode()
def retrieve(queries: Tensor, keys: Tensor, values: Tensor, k: int = 30, temperature: float = 0.02) -> Tensor:
    """Class distributions [q,C] of queries [q,D]: those of the k nearest keys [m,D], values [m,C], weighted by
    softmax(cosine / temperature)."""
    neighbors = NearestNeighbors(queries, min(k, len(keys)))
    neighbors.update(keys, torch.arange(len(keys), device=keys.device))
    weights = (neighbors.similarities / temperature).softmax(dim=1)  # [q,k]
    return torch.einsum("qk,qkc->qc", weights, values[neighbors.labels])


def measure(
    network: Backbone,
    train: VocSegmentation,
    val: VocSegmentation,
    *,
    k: int = 30,
    temperature: float = 0.02,
    memory_size: int = MEMORY_SIZE,
    seed: int = 0,
    batch: int = 16,
    workers: int = 0,
    pixels: bool = False,
    progress: bool = False,
) -> Score:
    """The score on `val` of labels retrieved from `train`, at the full size of the prepared scenes."""
    check_size(network, val.size)
    reading: dict[str, Any] = dict(batch=batch, workers=workers, pixels=pixels)
    keys, values = build_memory(network, train, memory_size, seed=seed, **reading, progress=progress)
    counts = torch.zeros(val.classes, val.classes, dtype=torch.int64, device=keys.device)
    loaded = scene_batches(network, val, **reading)
    for tokens, masks in progress_bar(loaded, -(-len(val) // batch), "val scenes" if progress else None):
        n, _, h, w = tokens.shape
        predicted = retrieve(tokens.permute(0, 2, 3, 1).flatten(0, 2), keys, values, k, temperature)
        maps = upsample(predicted.view(n, h, w, -1).permute(0, 3, 1, 2), val.size)  # [n,C,S,S]
        counts += confusion(masks, maps.argmax(1), val.classes)
    return score_of(counts)


def run(
    target: EvalTarget,
    data: str,
    *,
    train_split: str | None = None,
    val_split: str = "val",
    classes: int | None = None,
    palette: str | None = None,
    pixels: bool = False,
    scenes: int | None = None,
    k: int = 30,
    temperature: float = 0.02,
    memory_size: int = MEMORY_SIZE,
    seed: int = 0,
    size: int | None = None,
    untrained: bool = False,
    workers: int | None = None,
) -> int:
    """The program: measure, print, record. data: folder of scenes; the other options: `python -m eval retrieval_seg`."""
    start = time.perf_counter()
    network = target.network(untrained)
    size, _ = scene_sizes(network.image_size, size)
    check_size(network, size)
    train, val = voc_splits(data, size, train_split, val_split, classes, palette=palette)
    train = train.subset(scenes or len(train))
    workers = default_workers(len(train), workers)
    options: dict[str, Any] = dict(k=k, temperature=temperature, memory_size=memory_size, seed=seed, pixels=pixels)
    score = measure(network, train, val, **options, workers=workers, progress=True)

    title = f"segmentation by retrieval, {target.title(untrained)}: {data}, {len(val)} scenes"
    table = Table(title=escape(title), title_justify="left")
    table.add_column("IoU %")
    table.add_column(f"{k} neighbors", justify="right")
    for row in score_rows([train.name(label) for label in range(train.classes)], (score,)):
        table.add_row(*map(escape, row), end_section=row[0] == train.name(train.classes - 1))
    Console().print(table)
    settings: dict[str, Any] = dict(k=k, temperature=temperature, bank=memory_size, seed=seed, pixels=pixels)
    sets = describe_scenes(data, train, val)
    settings = dict(untrained=untrained, size=size) | settings | sets
    print(target.record("retrieval_seg", **settings, **asdict(score), seconds=round(time.perf_counter() - start, 1)))
    return 0
