"""The frozen network over a data set, batch by batch.

n pictures · S side of a picture, pixels · D width · h, w patches of a picture's height and width.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from eval.datasets import LabeledPhotos, VocSegmentation
from model.vit import ViT
from pipeline.augment.recipe import MEAN, STD
from runtime import distributed
from runtime.errors import UserError, suggest

PIXELS = 32  # a side of the picture whose raw pixels are compared
KINDS = ("cls", "patches", "pixels")


def check_size(network: ViT, size: int) -> None:
    """Raises UserError where pictures of `size` pixels a side do not fall into whole patches."""
    if size < network.patch or size % network.patch:
        near = max(1, round(size / network.patch)) * network.patch
        raise UserError(f"size {size}: not a multiple of the patch size {network.patch}; the nearest is {near}")


def check_kind(kind: str) -> str:
    if kind not in KINDS:
        raise UserError(f"features '{kind}': one of {', '.join(KINDS)}{suggest(kind, KINDS)}")
    return kind


def default_workers(items: int) -> int:
    """Reading processes for a data set: none where starting them takes longer than reading."""
    return 0 if items < 5_000 else min(16, (os.cpu_count() or 2) // 2)


def batches(
    data: Dataset, batch: int, device: torch.device, *, workers: int = 0, shuffle: torch.Generator | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """(pictures uint8 [n,3,S,S], labels [n] or masks [n,S,S]) on the device, in order unless shuffled."""
    loader = DataLoader(
        _Told(data),
        batch,
        shuffle=shuffle is not None,
        generator=shuffle or torch.Generator(),  # its own: evaluating in the middle of a run draws none of the run's
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
    )
    for made in loader:
        if isinstance(made, UserError):
            raise made
        pictures, answers = made
        yield pictures.to(device, non_blocking=True), answers.to(device, non_blocking=True)


class _Told(Dataset):
    """The same data; a UserError comes as a value: raised in a worker it would be told with the worker's traceback."""

    def __init__(self, data: Dataset):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, i: int) -> tuple | UserError:
        try:
            return self.data[i]
        except UserError as mistake:
            return mistake


def _collate(samples: list) -> list[Tensor] | UserError:
    return next((sample for sample in samples if isinstance(sample, UserError)), None) or default_collate(samples)


def normalized(pictures: Tensor) -> Tensor:
    """Pictures uint8 [n,3,S,S] -> float32, each channel less ImageNet's mean, by its deviation."""
    mean, std = (torch.tensor(c, device=pictures.device).view(1, 3, 1, 1) for c in (MEAN, STD))
    return (pictures / 255 - mean) / std


@torch.inference_mode()
def tokens(network: ViT, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures uint8 [n,3,S,S] -> ([CLS] [n,D], patch tokens [n,h*w,D]) after the final norm, float32.

    Computed in the run's precision (`network.precision`), or where there is no run as `speed.precision: auto` does.
    """
    precision = network.precision or distributed.choose_precision("auto", pictures.device)
    with torch.autocast(pictures.device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
        cls, patches, _ = network(normalized(pictures).to(network.pos_embed.dtype))
    assert patches is not None
    return cls.float(), patches.float()


def raw_pixels(pictures: Tensor) -> Tensor:
    """Pictures uint8 [n,3,S,S] -> [n, 3*32*32]: what k-NN finds without any network.

    Values 0 to 1, sized to 32 x 32 (bilinear, antialiased; smaller pictures stay as they are), less the mean of the
    picture's own values, so that the cosine between two pictures is the correlation of their pixels.
    """
    pixels = pictures / 255
    if pictures.shape[-1] > PIXELS:
        pixels = F.interpolate(pixels, (PIXELS, PIXELS), mode="bilinear", antialias=True)
    pixels = pixels.flatten(1)
    return pixels - pixels.mean(dim=1, keepdim=True)


def width_of(kind: str, network: ViT | None, size: int) -> int:
    """D of a photo's features: the network's width, or the number of values of its raw pixels."""
    return 3 * min(size, PIXELS) ** 2 if kind == "pixels" or network is None else network.width


def photo_batches(
    network: ViT | None,
    photos: LabeledPhotos,
    kinds: Sequence[str] = ("cls",),
    *,
    batch: int = 256,
    workers: int = 0,
    shuffle: torch.Generator | None = None,
    show: str | None = None,
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """One vector for each photo, a batch at a time: ({kind: float32 [n,D]}, labels int64 [n]) on the network's device;
    photos of no class are left out.

    kinds: 'cls' ([CLS] after the final norm), 'patches' (mean of the patch tokens) and 'pixels' (`raw_pixels`; asks
    for no network). show: the words beside a progress bar.
    """
    device = next(network.parameters()).device if network else torch.device("cpu")
    made = batches(photos, batch, device, workers=workers, shuffle=shuffle)
    for pictures, labels in shown(made, -(-len(photos) // batch), show):
        pictures, labels = pictures[labels >= 0], labels[labels >= 0]
        if not len(labels):
            continue
        features = {}
        if network and ("cls" in kinds or "patches" in kinds):
            cls, patches = tokens(network, pictures)
            features = {"cls": cls, "patches": patches.mean(dim=1)}
        if "pixels" in kinds:
            features["pixels"] = raw_pixels(pictures)
        yield {kind: features[kind] for kind in kinds}, labels


def photo_features(
    network: ViT | None, photos: LabeledPhotos, kinds: Sequence[str] = ("cls",), **how: Any
) -> tuple[dict[str, Tensor], Tensor]:
    """All of `photo_batches` at once, on the CPU: ({kind: float32 [n,D]}, labels int64 [n]); n*D*4 bytes of each kind."""
    features: dict[str, Tensor] = {}
    labels = torch.empty(len(photos), dtype=torch.int64)
    filled = 0
    for made, known in photo_batches(network, photos, kinds, **how):
        rows = slice(filled, filled + len(known))
        for kind in kinds:
            if kind not in features:
                features[kind] = torch.empty(len(photos), made[kind].shape[1])
            features[kind][rows] = made[kind].cpu()
        labels[rows] = known.cpu()
        filled = rows.stop
    return {kind: features[kind][:filled] for kind in features}, labels[:filled]


class SceneTokens(NamedTuple):
    """Scenes as the linear map sees them."""

    tokens: Tensor  # float32 [n,D,h,w]
    masks: Tensor  # uint8 [n,S,S]


def upsampled(maps: Tensor, size: int) -> Tensor:
    """[n,C,h,w] -> [n,C,size,size], bilinear."""
    return F.interpolate(maps, (size, size), mode="bilinear", align_corners=False)


def resized_masks(masks: Tensor, size: int) -> Tensor:
    """Masks uint8 [n,S,S] -> [n,size,size], by the nearest pixel."""
    return masks if masks.shape[-1] == size else F.interpolate(masks[:, None], (size, size), mode="nearest")[:, 0]


def scene_batches(
    network: ViT,
    scenes: VocSegmentation,
    *,
    batch: int = 64,
    workers: int = 0,
    shuffle: torch.Generator | None = None,
    pixels: bool = False,
) -> Iterator[SceneTokens]:
    """Patch tokens on their grid and masks, on the network's device. pixels: a patch's own instead of its token."""
    device = next(network.parameters()).device
    side = scenes.size // network.patch
    for pictures, masks in batches(scenes, batch, device, workers=workers, shuffle=shuffle):
        if pixels:
            yield SceneTokens(F.pixel_unshuffle(normalized(pictures), network.patch), masks)
            continue
        _, patches = tokens(network, pictures)
        # cloned, for a tensor born in inference mode can enter no gradient
        yield SceneTokens(patches.clone().transpose(1, 2).unflatten(2, (side, side)), masks)


def scene_tokens(
    network: ViT, scenes: VocSegmentation, *, batch: int = 64, workers: int = 0, show: str | None = None
) -> SceneTokens:
    """All scenes at once, on the CPU: n*D*h*w*4 bytes (Pascal VOC's trainaug at 448 px through ViT-S/16: 12.7 GB)."""
    all_tokens, all_masks, filled = torch.empty(0), torch.empty(0), 0
    for made, masks in shown(
        scene_batches(network, scenes, batch=batch, workers=workers), -(-len(scenes) // batch), show
    ):
        if not filled:  # a token's channels side by side: several times faster for all that follows on a CPU
            all_tokens = torch.empty(len(scenes), *made.shape[1:]).contiguous(memory_format=torch.channels_last)
            all_masks = torch.empty(len(scenes), *masks.shape[1:], dtype=torch.uint8)
        rows = slice(filled, filled + len(masks))
        all_tokens[rows], all_masks[rows] = made.cpu(), masks.cpu()
        filled = rows.stop
    return SceneTokens(all_tokens, all_masks)


def shown(steps: Iterable[Any], total: int, words: str | None) -> Iterable[Any]:
    """The steps, with a progress bar on stderr where there are words for it and a terminal to show it."""
    console = Console(stderr=True)
    return track(steps, words, total, console=console, transient=True) if words and console.is_terminal else steps
