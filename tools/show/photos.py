"""Which photos a picture shows, at which points, and how a network is given them.

Images are files or a folder in Pascal VOC's layout (its val split). If none are named, a run shows its own scenes.

h, w patches of a picture's height and width · p pixels of a patch's side · D width of the network.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transform

from eval import features
from eval.masks import IGNORE, Palette, find_palette, read_mask
from eval.target import EvalTarget, near_samples, open_shards, subsample
from eval.voc import IMAGE_SUFFIXES, scene_files
from model.backbone import Backbone
from pipeline.decode import DecodeError, decode
from runtime.errors import UserError
from tools.show.files import check_images

MAX_NAME = 26  # letters of a photo's name that are shown


class Photo(NamedTuple):
    name: str
    picture: Tensor  # uint8 [3,H,W]
    mask: Path | None = None  # the class of each pixel, if it is known
    palette: Palette | None = None  # of the mask's colors


# ---------------------------------------------------------------------------------------------------- choosing photos


def read_photo(path: Path, mask: Path | None = None, palette: Palette | None = None) -> Photo:
    """Raises UserError if there is no such file, or it cannot be decoded."""
    check_images([path])
    try:
        return Photo(shorten(path.name), decode(path.read_bytes()), mask, palette)
    except DecodeError as error:
        raise UserError(f"{path}: cannot be decoded: {error}") from None


def shorten(name: str) -> str:
    """A name that fits above its picture: the beginning and the end of a long one."""
    half = MAX_NAME // 2
    return name if len(name) <= MAX_NAME else f"{name[: half - 1]}…{name[-half:]}"


def find_photos(
    paths: list[Path], target: EvalTarget, count: int, palette: str | None = None, *, scattered: bool = True
) -> Iterator[Photo]:
    """The images named; else `count` of the run's scenes, else of the photos it was evaluated on or trained with.

    palette: a file with the classes of the colors in the scenes' masks. scattered: evenly spaced in remote shards too, else
    from the first of them.
    Raises UserError if a path holds no images, or if none are named and the network lies in no run folder.
    """
    if not paths and (scenes_folder := target.place("eval.voc")):
        paths = [Path(scenes_folder)]
    if not paths:
        yield from _photos_of_run(target, count, scattered)
    for path in paths:
        if (path / "ImageSets").is_dir():
            scenes, colors = scene_files(path, "val"), find_palette(path, palette)
            for i in subsample(np.arange(len(scenes)), count):
                image, mask = scenes[i]
                yield read_photo(image, mask, colors)
        elif path.is_dir():
            files = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            if not files:
                raise UserError(f"{path}: neither photos nor Pascal VOC's layout (no ImageSets/)")
            yield from (read_photo(files[i]) for i in subsample(np.arange(len(files)), count))
        else:
            yield read_photo(path)


def _photos_of_run(target: EvalTarget, count: int, scattered: bool) -> Iterator[Photo]:
    """`count` photos of the run's validation shards, else of its training shards; corrupt ones are left out."""
    val = target.place("data.val")
    shards = open_shards(val, target.config) if val else target.training_shards()
    if shards is None:
        raise UserError(f"{target.path}: not in a run folder; name the images to show")
    found, near = False, shards.is_remote and not scattered
    for sample in (near_samples(shards, count) if near else subsample(np.arange(len(shards)), count)).tolist():
        photo = shards.read(sample)
        if shards.is_valid(sample, photo):
            try:
                yield Photo(f"sample {sample}", decode(photo))
                found = True
            except DecodeError:
                continue
    if not found:
        folder = shards.folder_of(sample)
        raise UserError(f"{folder}: every photo that was read is corrupt; `make verify DST={folder}` lists the damage")


# ------------------------------------------------------------------------------------------------ photos to a network


def input_size(network: Backbone, args: argparse.Namespace) -> int:
    """The shorter side of a photo as the network gets it, pixels."""
    return args.size or args.scale * network.image_size


def resize_to_patches(photo: Tensor, size: int, patch: int) -> Tensor:
    """The whole photo, its shorter side about `size`, both sides whole patches: uint8 [3,H,W] -> [3,h*p,w*p]."""
    shorter = min(photo.shape[1:])
    sides = [max(1, round(side * size / shorter / patch)) * patch for side in photo.shape[1:]]
    return transform.resize(photo, sides, InterpolationMode.BICUBIC, antialias=True)


def normalized(picture: Tensor, network: Backbone) -> Tensor:
    """uint8 [3,H,W] -> a normalized batch [1,C,H,W] on the network's device."""
    return features.normalized(picture[None].to(next(network.parameters()).device), network.pixels)


def patch_tokens(network: Backbone, picture: Tensor) -> Tensor:
    """uint8 [3,h*p,w*p] -> patch tokens after the final norm on their grid [h,w,D], on the CPU."""
    _, patches = features.tokens(network, picture[None].to(next(network.parameters()).device))
    return patches[0].cpu().unflatten(0, (picture.shape[1] // network.patch, -1))


# ------------------------------------------------------------------------------------------------------ query points


def query_points(photo: Photo, count: int) -> NDArray[np.float64]:
    """At most `count` query points, (x, y) as shares of the photo's width and height: [P,2].

    If the classes of the pixels are known, the innermost pixel of each of the largest objects, class 0 (the background)
    last; else a regular pattern.
    """
    if photo.mask is None:
        pattern = np.array([[0.3, 0.3], [0.7, 0.7], [0.7, 0.3], [0.3, 0.7]])
        return np.array([[0.5, 0.5]]) if count == 1 else pattern[:count]
    centers = class_centers(np.asarray(read_mask(photo.mask, photo.palette)))
    ranked = sorted((label == 0, -depth, x, y) for label, depth, x, y in centers)
    chosen = ranked[: count - 1] + ranked[-1:] if len(ranked) > count > 1 else ranked[:count]
    return np.array([(x, y) for *_, x, y in chosen])


def class_centers(mask: NDArray) -> list[tuple[int, float, float, float]]:
    """(class, pixels to the nearest other class, x, y) of the innermost pixel of each class in a mask [H,W], x and y as
    shares of its width and height."""
    centers = []
    for label in np.setdiff1d(mask, [IGNORE]):
        depth = distance_transform_edt(np.pad(mask == label, 1))[1:-1, 1:-1]
        y, x = np.unravel_index(depth.argmax(), depth.shape)
        centers.append((int(label), float(depth.max()), (x + 0.5) / mask.shape[1], (y + 0.5) / mask.shape[0]))
    return centers


def parse_points(words: list[str] | None) -> NDArray[np.float64] | None:
    """['0.5,0.25', ...] -> [P,2]; None if no points are given. Raises UserError for anything else."""
    if words is None:
        return None
    try:
        points = np.array([[float(number) for number in word.split(",")] for word in words])
    except ValueError:
        points = np.empty((0,))
    if points.shape[1:] != (2,) or not ((points >= 0) & (points < 1)).all():
        raise UserError(
            f"--points {' '.join(words)}: write each point as x,y, shares of the photo's width and height from 0 to 1"
        )
    return points
