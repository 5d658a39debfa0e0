"""The frozen network over a data set, batch by batch.

n images · S side of an image, pixels · D width · h, w patches of an image's height and width.
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from eval.datasets import LabeledPhotos, Size, VocSegmentation
from model.backbone import Backbone
from pipeline.augment.recipe import luma
from runtime import distributed
from runtime.errors import UserError
from runtime.pixels import Pixels

LINE_SECONDS = 10  # between two lines of progress where there is no bar
PIXELS = 32  # side of the images whose raw pixels are compared


def check_size(network: Backbone, size: Size) -> None:
    """Raises UserError if images of this size cannot be divided into whole patches."""
    sides = (size,) if isinstance(size, int) else size
    near = [max(1, round(side / network.patch)) * network.patch for side in sides]
    if near != [*sides]:
        given, nearest = ("x".join(map(str, numbers)) for numbers in (sides, near))
        raise UserError(f"size {given}: not a multiple of the patch size {network.patch}; the nearest is {nearest}")


def default_workers(items: int, asked: int | None = None, few: int = 5_000) -> int:
    """Reading processes for so many items, unless a number is asked for: none for less than `few`, which are read sooner
    than a process is started."""
    return asked if asked is not None else 0 if items < few else min(16, (os.cpu_count() or 2) // 2)


def batches(
    data: Dataset, batch: int, device: torch.device, *, workers: int = 0, shuffle: torch.Generator | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """(images uint8 [n,3,S,S], labels [n] or masks [n,S,S]) on the device, in order unless shuffled."""
    loader = DataLoader(
        _ReturnErrors(data),
        batch,
        shuffle=shuffle is not None,
        generator=shuffle or torch.Generator(),  # its own, so that the global generator of a run is not advanced
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
    )
    for loaded in loader:
        if isinstance(loaded, UserError):
            raise loaded
        images, targets = loaded
        yield images.to(device, non_blocking=True), targets.to(device, non_blocking=True)


class _ReturnErrors(Dataset):
    """The same data with a UserError returned as a value: raised in a worker, its message would contain the traceback."""

    def __init__(self, data: Dataset):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, i: int) -> tuple | UserError:
        try:
            return self.data[i]
        except UserError as error:
            return error


def _collate(samples: list) -> list[Tensor] | UserError:
    return next((sample for sample in samples if isinstance(sample, UserError)), None) or default_collate(samples)


def normalized(images: Tensor, pixels: Pixels) -> Tensor:
    """Images uint8 [n,3,h,w] -> what a network takes of them, float32 [n,C,h,w]: minus the mean of each channel, divided by
    its standard deviation; of one channel their gray."""
    values = images / 255
    if pixels.channels == 1:
        values = luma(values.unbind(1))[:, None]
    mean, std = (torch.tensor(c, device=images.device).view(1, -1, 1, 1) for c in pixels)
    return (values - mean) / std


def precision_of(network: Backbone) -> torch.dtype:
    """What `tokens` computes in: the run's precision (`network.precision`); without a run as for `speed.precision: auto`."""
    return network.precision or distributed.choose_precision("auto", next(network.parameters()).device)


@torch.inference_mode()
def tokens(network: Backbone, images: Tensor) -> tuple[Tensor, Tensor]:
    """Images uint8 [n,3,S,S] -> ([CLS] [n,D], patch tokens [n,h*w,D]) after the final norm, float32."""
    cls, patches, _ = tokens_at(network, images, [])
    return cls, patches


@torch.inference_mode()
def tokens_at(network: Backbone, images: Tensor, points: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """`tokens`, and the reference tokens [n_i,R_i,D] at points [n_i,R_i,2] of consecutive groups of images, as `ViT` takes
    them. Without points the network may be any."""
    weight = next(network.parameters())
    bfloat16 = precision_of(network) == torch.bfloat16
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16):
        pixels = normalized(images, network.pixels).to(weight.dtype)
        out = network(pixels, points) if points else network(pixels)
    return out.cls.float(), out.patches.float(), [references.float() for references in out.references or []]


def raw_pixels(images: Tensor) -> Tensor:
    """Images uint8 [n,3,S,S] -> [n, 3*32*32], the baseline without a network.

    Values 0 to 1, resized to 32 x 32 (bilinear, antialiased; smaller images are kept), minus the mean of the
    image's own values: the cosine between two images is then the correlation of their pixels.
    """
    pixels = images / 255
    if images.shape[-1] > PIXELS:
        pixels = F.interpolate(pixels, (PIXELS, PIXELS), mode="bilinear", antialias=True)
    pixels = pixels.flatten(1)
    return pixels - pixels.mean(dim=1, keepdim=True)


def feature_width(kind: str, network: Backbone | None, size: int) -> int:
    """D of a photo's features: the network's width, or the number of values of its raw pixels."""
    return 3 * min(size, PIXELS) ** 2 if kind == "pixels" or network is None else network.width


def photo_batches(
    network: Backbone | None,
    photos: LabeledPhotos,
    kinds: Sequence[str] = ("cls",),
    *,
    batch: int = 256,
    workers: int = 0,
    shuffle: torch.Generator | None = None,
    progress: str | None = None,
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """One vector per photo, batch by batch: ({kind: float32 [n,D]}, labels int64 [n]) on the network's device.

    Photos without a class are left out. kinds: 'cls' ([CLS] after the final norm), 'patches' (mean of the patch tokens)
    and 'pixels' (`raw_pixels`; needs no network). progress: label of a progress bar.
    """
    device = next(network.parameters()).device if network else torch.device("cpu")
    loaded = batches(photos, batch, device, workers=workers, shuffle=shuffle)
    for images, labels in progress_bar(loaded, -(-len(photos) // batch), progress):
        images, labels = images[labels >= 0], labels[labels >= 0]
        if not len(labels):
            continue
        features = {}
        if network and ("cls" in kinds or "patches" in kinds):
            cls, patches = tokens(network, images)
            features = {"cls": cls, "patches": patches.mean(dim=1)}
        if "pixels" in kinds:
            features["pixels"] = raw_pixels(images)
        yield {kind: features[kind] for kind in kinds}, labels


def photo_features(
    network: Backbone | None, photos: LabeledPhotos, kinds: Sequence[str] = ("cls",), **options: Any
) -> tuple[dict[str, Tensor], Tensor]:
    """All of `photo_batches` at once, on the CPU: ({kind: float32 [n,D]}, labels int64 [n]); n*D*4 bytes per kind."""
    features: dict[str, Tensor] = {}
    labels = torch.empty(len(photos), dtype=torch.int64)
    filled = 0
    for batch_features, batch_labels in photo_batches(network, photos, kinds, **options):
        rows = slice(filled, filled + len(batch_labels))
        for kind in kinds:
            if kind not in features:
                features[kind] = torch.empty(len(photos), batch_features[kind].shape[1])
            features[kind][rows] = batch_features[kind].cpu()
        labels[rows] = batch_labels.cpu()
        filled = rows.stop
    return {kind: features[kind][:filled] for kind in features}, labels[:filled]


class SceneTokens(NamedTuple):
    """Scenes as the linear classifier of segmentation sees them."""

    tokens: Tensor  # float32 [n,D,h,w]
    masks: Tensor  # uint8 [n,S,S]


def upsample(maps: Tensor, size: int) -> Tensor:
    """[n,C,h,w] -> [n,C,size,size], bilinear."""
    return F.interpolate(maps, (size, size), mode="bilinear", align_corners=False)


def resize_masks(masks: Tensor, size: int) -> Tensor:
    """Masks uint8 [n,S,S] -> [n,size,size], by the nearest pixel."""
    return masks if masks.shape[-1] == size else F.interpolate(masks[:, None], (size, size), mode="nearest")[:, 0]


def scene_batches(
    network: Backbone,
    scenes: VocSegmentation,
    *,
    batch: int = 64,
    workers: int = 0,
    shuffle: torch.Generator | None = None,
    pixels: bool = False,
) -> Iterator[SceneTokens]:
    """Patch tokens on their grid and masks, on the network's device. pixels: the patch's pixels instead of its token."""
    device = next(network.parameters()).device
    side = scenes.size // network.patch
    for images, masks in batches(scenes, batch, device, workers=workers, shuffle=shuffle):
        if pixels:
            yield SceneTokens(F.pixel_unshuffle(normalized(images, network.pixels), network.patch), masks)
            continue
        _, patches = tokens(network, images)
        # cloned: a tensor made in inference mode cannot be used in autograd
        yield SceneTokens(patches.clone().transpose(1, 2).unflatten(2, (side, side)), masks)


def scene_tokens(
    network: Backbone, scenes: VocSegmentation, *, batch: int = 64, workers: int = 0, progress: str | None = None
) -> SceneTokens:
    """All scenes at once, on the CPU: n*D*h*w*4 bytes (Pascal VOC's trainaug at 448 px through ViT-S/16: 12.7 GB)."""
    all_tokens, all_masks, filled = torch.empty(0), torch.empty(0), 0
    loaded = scene_batches(network, scenes, batch=batch, workers=workers)
    for batch_tokens, masks in progress_bar(loaded, -(-len(scenes) // batch), progress):
        if not filled:  # channels last: several times faster for everything that follows on a CPU
            shape = (len(scenes), *batch_tokens.shape[1:])
            all_tokens = torch.empty(shape).contiguous(memory_format=torch.channels_last)
            all_masks = torch.empty(len(scenes), *masks.shape[1:], dtype=torch.uint8)
        rows = slice(filled, filled + len(masks))
        all_tokens[rows], all_masks[rows] = batch_tokens.cpu(), masks.cpu()
        filled = rows.stop
    return SceneTokens(all_tokens, all_masks)


def progress_bar(steps: Iterable[Any], total: int, label: str | None) -> Iterable[Any]:
    """The steps, with their progress on stderr if there is a label for it: a bar on a terminal, else a line now and then."""
    console = Console(stderr=True)
    if label and console.is_terminal:
        return track(steps, label, total, console=console, transient=True)
    return _with_lines(steps, total, label) if label else steps


def _with_lines(steps: Iterable[Any], total: int, label: str) -> Iterator[Any]:
    """The steps, with a line of progress every LINE_SECONDS: for an output that is a file."""
    start = last = time.monotonic()
    for done, step in enumerate(steps):
        now = time.monotonic()
        if done and now - last > LINE_SECONDS:
            last, left = now, (now - start) * (total - done) / done
            print(f"  {label}: {done:,} of {total:,}, {left:.0f} s left", file=sys.stderr, flush=True)
        yield step
