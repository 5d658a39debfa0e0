"""What the frozen network is asked about: photos with a class each, and scenes with a class for every pixel.

Photos come from labeled shards, scenes from a folder in Pascal VOC's layout. Both give uint8 pictures [3,S,S] that are
cut and sized as the published evaluations do it; normalizing is left to the device (eval/features.py). Photos and scenes
are decoded as in training (pipeline/decode.py), EXIF rotation not applied; a mask is a label image, read as it is stored.

H, W height and width of a picture in its file · S side of a prepared picture, pixels.
"""

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as transform

from pipeline.decode import DecodeError, decode, load_torchcodec
from pipeline.remote.cache import is_address
from pipeline.shards import Shards
from runtime.config import Config
from runtime.errors import UserError, suggest

NO_CLASS = -1  # of a photo: it has no label, or it is damaged
IGNORE = 255  # of a pixel: it counts nowhere
SMALL = 128  # pixels: networks trained on smaller views, and scenes smaller than that, are measured by small protocols
PHOTOS = (".jpg", ".jpeg", ".png", ".webp")


def shorter_side(size: int) -> int:
    """Of a photo before its center of `size` pixels is cut: 256 for 224, and the same share of every other size."""
    return round(size * 256 / 224)


def center_crop(picture: Tensor, size: int) -> Tensor:
    """The middle of a picture for a class: uint8 [3,H,W] -> [3,size,size].

    Shorter side to 256/224 of `size`, bicubic with antialiasing, then the center square: 256 and 224 in DINO's k-NN
    (Caron et al. 2021, eval_knn.py), the same share of every other size.
    """
    picture = transform.resize(picture, [shorter_side(size)], InterpolationMode.BICUBIC, antialias=True)
    return transform.center_crop(picture, [size, size])


def random_crop(picture: Tensor, size: int) -> Tensor:
    """A random window of a picture for a class: uint8 [3,H,W] -> [3,size,size], bicubic, flipped in one of two cases.

    .08 to 1 of the area, sides 3:4 to 4:3 (the published linear classification, Caron et al. 2021, eval_linear.py),
    drawn with torch's own generator.
    """
    top, left, height, width = RandomResizedCrop.get_params(picture, scale=[0.08, 1.0], ratio=[3 / 4, 4 / 3])
    bicubic = InterpolationMode.BICUBIC
    picture = transform.resized_crop(picture, top, left, height, width, [size, size], bicubic, antialias=True)
    return picture.flip(-1) if torch.rand(()) < 0.5 else picture


def open_shards(folder: str | Path, config: Config | None = None) -> Shards:
    """The shards of a folder or an address, with the cache and the losses that a run's config allows; a folder of photos
    is told how to become one. Raises UserError."""
    allowed = (config.speed, config.data.max_missing) if config else ()
    if is_address(folder):
        return Shards(folder, *allowed)
    folder = Path(folder)
    if folder.is_dir() and not (folder / "manifest.json").is_file() and not any(folder.glob("*.tar")):
        inside = [folder, *(d for d in sorted(folder.iterdir())[:20] if d.is_dir())]
        if any(file.suffix.lower() in PHOTOS for place in inside for file in place.iterdir()):
            raise UserError(
                f"{folder}: photos, not shards; `make shards SRC={folder} DST={folder}-shards` makes shards of them"
            )
    return Shards(folder, *allowed)


class LabeledPhotos(Dataset[tuple[Tensor, int]]):
    """Photos of shards, prepared: (uint8 [3,size,size], label).

    rows: sample ids, all where None. classes: names in the order that labels count in (the bank's, for queries from
    other shards); by default the shards' own. augment: a `random_crop` instead of the `center_crop`. A damaged photo is
    black and of NO_CLASS: it is left out, not guessed.
    Raises UserError where the shards have a class that `classes` lacks.
    """

    def __init__(
        self,
        shards: Shards,
        size: int,
        rows: NDArray[np.int64] | None = None,
        classes: Sequence[str] | None = None,
        *,
        augment: bool = False,
    ):
        self.shards, self.size, self.augment = shards, size, augment
        self.rows = np.arange(len(shards)) if rows is None else rows
        self.classes = list(shards.classes if classes is None else classes)
        place = {name: label for label, name in enumerate(self.classes)}
        for name in shards.classes:
            if name not in place:
                raise UserError(f"{shards.folder}: class '{name}' is not among the bank's{suggest(name, place)}")
        self._label = [place[name] for name in shards.classes]
        load_torchcodec()  # once, before a loader forks its processes

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        row = int(self.rows[i])
        photo, label = self.shards.read(row), int(self.shards.index["label"][row])
        if self.shards.is_valid(row, photo):
            try:
                cut = random_crop if self.augment else center_crop
                return cut(decode(photo), self.size), self._label[label] if label >= 0 else NO_CLASS
            except DecodeError:
                pass
        return torch.zeros(3, self.size, self.size, dtype=torch.uint8), NO_CLASS

    def share(self, rank: int, world: int) -> "LabeledPhotos":
        """Every world-th of these photos, for one of `world` processes."""
        return LabeledPhotos(self.shards, self.size, self.rows[rank::world], self.classes, augment=self.augment)


class VocSegmentation(Dataset[tuple[Tensor, Tensor]]):
    """Scenes and their masks in Pascal VOC's layout, prepared: (uint8 [3,size,size], class of each pixel uint8 [size,size]).

        folder/JPEGImages/<id>.jpg  SegmentationClass/<id>.png  ImageSets/Segmentation/<split>.txt
        folder/SegmentationClassAug/<id>.png    where there is one, the masks of `trainaug` (VOC's own for what it lacks)
        folder/classes.txt                      where there is one, the names of the classes, one a line

    A mask is a palette or gray PNG of class numbers, 255: ignore. As published (DenseDINO, eval_segment.py, after
    Leopart): the whole scene is squeezed to the square, aspect ratio not kept, bilinear, its mask by the nearest pixel.
    augment: instead a random window of .8 to 1 of the area, sides 3:4 to 4:3, and a flip in one of two cases, drawn
    with torch's own generator.

    classes: how many; by default those of classes.txt, else the highest number in this split's masks + 1.
    Raises UserError for a missing folder, split, picture or mask, and for a mask that is none.
    """

    def __init__(self, folder: str | Path, split: str, size: int, *, augment: bool = False, classes: int | None = None):
        self.folder, self.split, self.size, self.augment = Path(folder), split, size, augment
        lists = self.folder / "ImageSets" / "Segmentation"
        if not lists.is_dir():
            raise UserError(f"{self.folder}: not in Pascal VOC's layout (no ImageSets/Segmentation/)")
        if not (lists / f"{split}.txt").is_file():
            known = sorted(path.stem for path in lists.glob("*.txt"))
            raise UserError(f"{lists}: no split '{split}'{suggest(split, known)} (there are: {', '.join(known)})")
        ids = (lists / f"{split}.txt").read_text().split()
        if not ids:
            raise UserError(f"{lists / split}.txt: names no scene")
        masks = ["SegmentationClassAug", "SegmentationClass"] if split.endswith("aug") else ["SegmentationClass"]
        load_torchcodec()  # once, before a loader forks its processes
        self.pictures = [self._find("JPEGImages", i, PHOTOS, "picture") for i in ids]
        self.masks = [self._find(masks, i, (".png",), "mask") for i in ids]
        names = self.folder / "classes.txt"
        self.names = names.read_text().split("\n") if names.is_file() else []
        self.names = [name.strip() for name in self.names if name.strip()]
        self.classes = classes or len(self.names) or 1 + max(self._highest(path) for path in self.masks)

    def _find(self, rooms: str | list[str], scene: str, suffixes: tuple[str, ...], what: str) -> Path:
        rooms = [rooms] if isinstance(rooms, str) else rooms
        for room in rooms:
            for suffix in suffixes:
                path = self.folder / room / (scene + suffix)
                if path.is_file():
                    return path
        raise UserError(
            f"{self.folder / rooms[-1] / scene}{suffixes[0]}: no such {what}, and split '{self.split}' names it"
        )

    @staticmethod
    def _highest(path: Path) -> int:
        numbers = np.asarray(_open_mask(path))
        return int(numbers[numbers != IGNORE].max(initial=0))

    def few(self, limit: int) -> "VocSegmentation":
        """The same with at most `limit` of its scenes, evenly spread over the list."""
        kept = [i * len(self) // limit for i in range(limit)] if limit < len(self) else range(len(self))
        some = copy.copy(self)
        some.pictures, some.masks = [self.pictures[i] for i in kept], [self.masks[i] for i in kept]
        return some

    def name(self, label: int) -> str:
        return self.names[label] if label < len(self.names) else str(label)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        try:
            picture = decode(self.pictures[i].read_bytes())
        except DecodeError as error:
            raise UserError(f"{self.pictures[i]}: no picture: {error}") from None
        mask = _open_mask(self.masks[i])
        height, width = picture.shape[1:]
        if mask.size != (width, height):
            raise UserError(f"{self.masks[i]}: {mask.size} pixels, but the picture has {(width, height)}")
        square = [self.size, self.size]
        if self.augment:
            top, left, height, width = RandomResizedCrop.get_params(picture, scale=[0.8, 1.0], ratio=[3 / 4, 4 / 3])
            picture = transform.crop(picture, top, left, height, width)
            mask = mask.crop((left, top, left + width, top + height))
        picture = transform.resize(picture, square, InterpolationMode.BILINEAR, antialias=True)
        numbers = torch.from_numpy(np.array(mask.resize((self.size, self.size), Image.Resampling.NEAREST)))
        if self.augment and torch.rand(()) < 0.5:
            picture, numbers = picture.flip(-1), numbers.flip(-1)
        highest = int(numbers.where(numbers != IGNORE, 0).max())
        if highest >= self.classes:
            raise UserError(
                f"{self.masks[i]}: class {highest}, but there are {self.classes} classes (0 to {self.classes - 1})"
            )
        return picture, numbers


def voc_splits(
    folder: str | Path,
    size: int,
    train_split: str | None = None,
    val_split: str = "val",
    classes: int | None = None,
    *,
    augment: bool = False,
) -> tuple[VocSegmentation, VocSegmentation]:
    """(train, val) of a folder in Pascal VOC's layout; the train split is by default `trainaug` where there is one."""
    has_aug = (Path(folder) / "ImageSets" / "Segmentation" / "trainaug.txt").is_file()
    split = train_split or ("trainaug" if has_aug else "train")
    train = VocSegmentation(folder, split, size, augment=augment, classes=classes)
    return train, VocSegmentation(folder, val_split, size, classes=train.classes)


def scene_sizes(image_size: int, size: int | None = None) -> tuple[int, int]:
    """(side of a scene, side of the maps in which what is predicted is compared) for a network trained on views of
    `image_size` pixels, perhaps with scenes of another `size`: 448 and 100 as published, the second in proportion.

    The small protocol, for networks trained on views of less than SMALL pixels: scenes of the view's own size, maps of
    half of it (4 for each patch of 8 pixels, about as many as published).
    """
    size = size or (448 if image_size >= SMALL else image_size)
    return size, size // 2 if size < SMALL else round(size * 100 / 448)


def _open_mask(path: Path) -> Image.Image:
    """A mask's class numbers as they are stored. Not by pipeline/decode.py: a photo's palette becomes colors, and a mask's
    numbers must not. Raises UserError where the file is no mask."""
    try:
        mask = Image.open(path, formats=["PNG"])
        mask.load()
    except OSError as error:
        raise UserError(f"{path}: no mask ({error})") from None
    if mask.mode not in ("P", "L"):
        raise UserError(f"{path}: a mask is a palette or gray PNG of class numbers, this one is {mask.mode}")
    return mask
