"""Data sets for evaluation: photos with one class each, and scenes with a class for every pixel.

Photos come from labeled shards, scenes from a folder in Pascal VOC's layout (eval/voc.py). Both give uint8 images
[3,S,S], cropped and resized as in the published evaluations; they are normalized on the device (eval/features.py).
Photos and scenes are decoded as in training (pipeline/decode.py), without EXIF rotation; a mask is read as it is stored.

H, W height and width of an image in its file · S side of a prepared image, pixels.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as transform

from eval.masks import IGNORE, count_pixels, find_palette, read_mask
from eval.voc import class_names, default_train_split, scene_files
from pipeline.decode import DecodeError, decode
from pipeline.mixture import AnyShards
from runtime.errors import UserError, suggest

NO_CLASS = -1  # label of a photo without a class, or of a damaged photo
Size = int | tuple[int, int]  # of a prepared image, pixels: the side of a square, or height and width
SMALL = 128  # pixels: networks trained on smaller views, and smaller scenes, are measured by the small protocols


def shorter_side(size: int) -> int:
    """The shorter side that a photo is resized to before `center_crop` cuts `size`: 256 for 224, else in proportion."""
    return round(size * 256 / 224)


def sides_of(size: Size) -> tuple[int, int]:
    """(height, width)."""
    return (size, size) if isinstance(size, int) else size


def resized_sides(height: int, width: int, size: Size) -> tuple[int, int]:
    """(height, width) that `center_crop` resizes a photo to: the smallest of its aspect ratio that cover 256/224 of `size`.
    Of a square: its shorter side is that, the other one rounded down, as torchvision rounds."""
    least_height, least_width = map(shorter_side, sides_of(size))
    if least_height * width >= least_width * height:
        return least_height, max(least_width, int(least_height * width / height))
    return max(least_height, int(least_width * height / width)), least_width


def center_crop(image: Tensor, size: Size) -> Tensor:
    """Resize the photo to cover 256/224 of `size` (bicubic, antialiased), cut the center: uint8 [3,H,W] -> [3,size,size].

    For size 224 this is the transform of DINO's k-NN (Caron et al. 2021, eval_knn.py).
    """
    height, width = image.shape[1:]
    sides = resized_sides(height, width, size)
    image = transform.resize(image, [*sides], InterpolationMode.BICUBIC, antialias=True)
    return transform.center_crop(image, [*sides_of(size)])


def points_in_crop(points: NDArray[np.float64], height: int, width: int, size: Size) -> NDArray[np.float64]:
    """Points [R,2], (x, y) as shares of a photo's width and height, in the [0,1] frame of its `center_crop`; outside of it
    if the crop does not hold them."""
    resized, cut = resized_sides(height, width, size)[::-1], np.array(sides_of(size)[::-1])  # x before y
    corner = np.array([round((n - part) / 2) for n, part in zip(resized, cut.tolist(), strict=True)])  # as torchvision
    return (points * np.array(resized) - corner) / cut


def whole_square(image: Tensor, size: Size) -> Tensor:
    """The whole photo at this size, its aspect ratio lost, bilinear, antialiased: uint8 [3,H,W] -> [3,size,size]; as scenes
    are measured (below), which are squares."""
    return transform.resize(image, [*sides_of(size)], InterpolationMode.BILINEAR, antialias=True)


def random_crop(image: Tensor, size: int) -> Tensor:
    """A random resized crop with a random horizontal flip: uint8 [3,H,W] -> [3,size,size], bicubic.

    .08 to 1 of the area, aspect ratio 3:4 to 4:3, flipped with probability 1/2 (the linear classification of Caron et al.
    2021, eval_linear.py). Draws from torch's global generator.
    """
    top, left, height, width = RandomResizedCrop.get_params(image, scale=[0.08, 1.0], ratio=[3 / 4, 4 / 3])
    bicubic = InterpolationMode.BICUBIC
    image = transform.resized_crop(image, top, left, height, width, [size, size], bicubic, antialias=True)
    return image.flip(-1) if torch.rand(()) < 0.5 else image


class LabeledPhotos(Dataset[tuple[Tensor, int]]):
    """Photos of shards, prepared: (uint8 [3,size,size], label).

    ids: sample ids, by default all. classes: class names in the order of their labels (a validation set gets those of the
    train set); by default the shards' own. augment: `random_crop` instead of `center_crop`. A damaged photo is
    returned black and with the label NO_CLASS, so that it is left out.
    Raises UserError if one of the photos has a class that `classes` lacks.
    """

    def __init__(
        self,
        shards: AnyShards,
        size: int,
        ids: NDArray[np.int64] | None = None,
        classes: Sequence[str] | None = None,
        *,
        augment: bool = False,
    ):
        self.shards, self.size, self.augment = shards, size, augment
        self.ids = np.arange(len(shards)) if ids is None else ids
        self.classes = list(shards.classes if classes is None else classes)
        label_of = {name: label for label, name in enumerate(self.classes)}
        self._label = [label_of.get(name, NO_CLASS) for name in shards.classes]
        self._of_shards = shards.labels(self.ids)  # [n] labels as the shards have them
        for label in np.unique(self._of_shards).tolist():
            if label >= 0 and self._label[label] == NO_CLASS:
                name = shards.classes[label]
                raise UserError(f"{shards.folder}: class '{name}' is not in the train set{suggest(name, label_of)}")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        sample = int(self.ids[i])
        photo, label = self.shards.read(sample), int(self._of_shards[i])
        if self.shards.is_valid(sample, photo):
            try:
                crop = random_crop if self.augment else center_crop
                return crop(decode(photo), self.size), self._label[label] if label >= 0 else NO_CLASS
            except DecodeError:
                pass
        return torch.zeros(3, self.size, self.size, dtype=torch.uint8), NO_CLASS

    def for_rank(self, rank: int, world: int) -> "LabeledPhotos":
        """Every world-th of these photos, for one of `world` processes."""
        return LabeledPhotos(self.shards, self.size, self.ids[rank::world], self.classes, augment=self.augment)


class VocSegmentation(Dataset[tuple[Tensor, Tensor]]):
    """Scenes and masks of a split in Pascal VOC's layout, prepared: (uint8 [3,size,size], pixel classes uint8 [size,size]).

    A mask holds class numbers, 255 is ignored; or colors, whose classes a palette file names (eval/masks.py). As published
    (DenseDINO, eval_segment.py, after Leopart): the whole scene is resized to a square without keeping its aspect ratio,
    bilinear; its mask by the nearest pixel. augment: first a random crop of .8 to 1 of the area, aspect ratio 3:4 to 4:3,
    then a flip with probability 1/2, drawn from torch's global generator.

    palette: a palette file, by default the folder's palette.txt if there is one. classes: the number of classes, by default
    that of the palette's names, else of classes.txt, else the highest class in this split's masks + 1.
    Raises UserError for a missing folder, split, image or mask, and for a mask that cannot be read.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        size: int,
        *,
        augment: bool = False,
        classes: int | None = None,
        palette: str | Path | None = None,
    ):
        self.folder, self.split, self.size, self.augment = Path(folder), split, size, augment
        self.palette = find_palette(self.folder, palette)
        files = scene_files(self.folder, split)
        self.images, self.masks = [image for image, _ in files], [mask for _, mask in files]
        self.names = (self.palette.names if self.palette else []) or class_names(self.folder)
        self.classes = classes or len(self.names) or 1 + self._highest()

    def _highest(self) -> int:
        """The highest class number in the masks."""
        counts = count_pixels(self.masks, self.palette)[:, :IGNORE].sum(0)
        return int(counts.nonzero()[0].max(initial=0))

    def subset(self, limit: int) -> "VocSegmentation":
        """The same with at most `limit` of its scenes, evenly spaced in the list."""
        indices = [i * len(self) // limit for i in range(limit)] if limit < len(self) else range(len(self))
        part = copy.copy(self)
        part.images, part.masks = [self.images[i] for i in indices], [self.masks[i] for i in indices]
        return part

    def name(self, label: int) -> str:
        return self.names[label] if label < len(self.names) else str(label)

    def mask(self, i: int) -> Image.Image:
        """The class numbers of a scene's pixels, as stored."""
        return read_mask(self.masks[i], self.palette)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        try:
            image = decode(self.images[i].read_bytes())
        except DecodeError as error:
            raise UserError(f"{self.images[i]}: cannot be decoded: {error}") from None
        mask = self.mask(i)
        height, width = image.shape[1:]
        if mask.size != (width, height):
            raise UserError(f"{self.masks[i]}: {mask.size} pixels, but the image has {(width, height)}")
        if self.augment:
            top, left, height, width = RandomResizedCrop.get_params(image, scale=[0.8, 1.0], ratio=[3 / 4, 4 / 3])
            image = transform.crop(image, top, left, height, width)
            mask = mask.crop((left, top, left + width, top + height))
        image = whole_square(image, self.size)
        numbers = torch.from_numpy(np.array(mask.resize((self.size, self.size), Image.Resampling.NEAREST)))
        if self.augment and torch.rand(()) < 0.5:
            image, numbers = image.flip(-1), numbers.flip(-1)
        highest = int(numbers.where(numbers != IGNORE, 0).max())
        if highest >= self.classes:
            raise UserError(
                f"{self.masks[i]}: class {highest}, but there are {self.classes} classes (0 to {self.classes - 1})"
            )
        return image, numbers


def voc_splits(
    folder: str | Path,
    size: int,
    train_split: str | None = None,
    val_split: str = "val",
    classes: int | None = None,
    *,
    augment: bool = False,
    palette: str | Path | None = None,
) -> tuple[VocSegmentation, VocSegmentation]:
    """(train, val) of a folder in Pascal VOC's layout; the train split is by default `trainaug` if there is one. Both have
    the same classes: if nothing gives their number, as many as the masks of either hold."""
    train_split = train_split or default_train_split(folder)
    train = VocSegmentation(folder, train_split, size, augment=augment, classes=classes, palette=palette)
    val = VocSegmentation(folder, val_split, size, classes=classes, palette=palette)
    train.classes = val.classes = max(train.classes, val.classes)
    return train, val


def describe_scenes(folder: str | Path, train: VocSegmentation, val: VocSegmentation) -> dict[str, Any]:
    """The scenes of a measure, for its record."""
    sets = dict(train_split=train.split, val_split=val.split, scenes=len(train), classes=train.classes)
    return {"data": str(folder), **sets}


def scene_sizes(image_size: int, size: int | None = None) -> tuple[int, int]:
    """(side of a scene, side of the maps on which predictions are compared), pixels, for a network trained on views of
    `image_size` pixels; `size` overrides the side of a scene. Published: 448 and 100, the second in proportion.

    The small protocol, for networks trained on views of less than SMALL pixels: scenes of the view's size, maps of
    half of it (4 map pixels per patch of 8 pixels, about as many as published).
    """
    size = size or (448 if image_size >= SMALL else image_size)
    return size, size // 2 if size < SMALL else round(size * 100 / 448)
