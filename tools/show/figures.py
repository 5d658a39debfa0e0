"""What all pictures of a network share: whose they are, which photos they show, at which points, and the way to disk.

    python -m tools.show_… NETWORK [IMAGE | FOLDER ...] [--compare NETWORK ...] [--out FILE] [--images 4] [--size PIXELS]

NETWORK is a run folder, a checkpoint or a backbone file; --compare puts others under it, as the paper's figure 6 puts
DenseDINO under DINO. Images are files or a folder in Pascal VOC's layout (its val split); a run shows its own scenes where
none are named. A run's picture goes to RUN/pictures/, another one here.

h, w patches of a picture's height and width · p pixels of a patch's side · D width.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import distance_transform_edt
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transform

from eval.datasets import IGNORE, PHOTOS, VocSegmentation, open_shards
from eval.features import check_size, tokens
from eval.target import EvalTarget, spread
from model.vit import ViT
from pipeline.augment.recipe import MEAN, STD
from pipeline.decode import DecodeError, decode
from runtime.errors import UserError, suggest

# Okabe & Ito 2008, colors that the color-blind tell apart; without black, the ink of the text
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442")
DARK = (COLORS[0], COLORS[4])  # on these, numbers are white
CELL = 1.9  # inches of a picture's side
TEXT = 8  # points: some 29 letters over a picture, and still letters where a page shows the sheet at half its size
MOST_PATCHES = 128  # in a row: attention among more takes gigabytes, and nobody sees them
LONGEST = 26  # letters of a photo's name that are shown
Networks = list[tuple[str, ViT]]  # each with its title


class Photo(NamedTuple):
    name: str
    picture: Tensor  # uint8 [3,H,W]
    mask: Path | None = None  # the class of each pixel, where it is known


# ------------------------------------------------------------------------------------------------------ which photos


def read_photo(path: Path, mask: Path | None = None) -> Photo:
    if not path.is_file():
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        raise UserError(f"{path}: no such image{suggest(str(path), map(str, beside))}")
    try:
        return Photo(shortened(path.name), decode(path.read_bytes()), mask)
    except DecodeError as error:
        raise UserError(f"{path}: no picture: {error}") from None


def shortened(name: str) -> str:
    """A name that fits over its picture: of a long one the beginning and the end."""
    half = LONGEST // 2
    return name if len(name) <= LONGEST else f"{name[: half - 1]}…{name[-half:]}"


def choose_photos(named: list[Path], subject: EvalTarget, count: int) -> list[Photo]:
    """The images named; else `count` of the run's scenes, else of the photos it was evaluated on or trained with."""
    config = subject.config
    if not named and config and config.eval.voc:
        named = [Path(config.eval.voc)]
    photos: list[Photo] = []
    for path in named:
        if (path / "ImageSets").is_dir():
            scenes = VocSegmentation(path, "val", 1, classes=1)
            photos += [read_photo(scenes.pictures[i], scenes.masks[i]) for i in spread(np.arange(len(scenes)), count)]
        elif path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in PHOTOS)
            if not inside:
                raise UserError(f"{path}: neither photos nor Pascal VOC's layout (no ImageSets/)")
            photos += [read_photo(inside[i]) for i in spread(np.arange(len(inside)), count)]
        else:
            photos.append(read_photo(path))
    if photos:
        return photos
    folder = (config.data.val or config.data.shards) if config else None
    if folder is None:
        raise UserError(f"{subject.path}: lies in no run folder; name the images to look at")
    shards = open_shards(folder, config)
    for sample in spread(np.arange(len(shards)), count).tolist():
        photo = shards.read(sample)
        if shards.is_valid(sample, photo):
            try:
                photos.append(Photo(f"sample {sample}", decode(photo)))
            except DecodeError:
                continue
    if not photos:
        raise UserError(f"{folder}: no sound photo among those looked at; `make verify DST={folder}`")
    return photos


def whole_picture(photo: Tensor, size: int, patch: int) -> Tensor:
    """The whole photo, its shorter side `size`, both sides whole patches: uint8 [3,H,W] -> [3,h*p,w*p]."""
    shorter = min(photo.shape[1:])
    sides = [max(1, round(side * size / shorter / patch)) * patch for side in photo.shape[1:]]
    return transform.resize(photo, sides, InterpolationMode.BICUBIC, antialias=True)


def side(network: ViT, args: argparse.Namespace) -> int:
    """The shorter side in pixels of what a network is shown."""
    return args.size or args.times * network.image_size


def normalized(picture: Tensor, network: ViT) -> Tensor:
    """uint8 [3,H,W] -> [1,3,H,W] as the network takes it, on its device."""
    device = network.pos_embed.device
    mean, std = (torch.tensor(c, device=device).view(3, 1, 1) for c in (MEAN, STD))
    return ((picture.to(device).float() / 255 - mean) / std)[None]


def patch_tokens(network: ViT, picture: Tensor) -> Tensor:
    """uint8 [3,h*p,w*p] -> patch tokens after the final norm on their grid [h,w,D], on the CPU."""
    _, patches = tokens(network, picture[None].to(network.pos_embed.device))
    return patches[0].cpu().unflatten(0, (picture.shape[1] // network.patch, -1))


# ------------------------------------------------------------------------------------------------------ which points


def points_of(photo: Photo, count: int) -> NDArray[np.float64]:
    """At most `count` points to ask about, (x, y) as shares of the photo: [P,2].

    Where the classes of the pixels are known, the place deepest inside each of the largest things, what has class 0 (the
    ground) last; else a regular pattern.
    """
    if photo.mask is None:
        pattern = np.array([[0.3, 0.3], [0.7, 0.7], [0.7, 0.3], [0.3, 0.7]])
        return np.array([[0.5, 0.5]]) if count == 1 else pattern[:count]
    found = sorted((kind == 0, -depth, x, y) for kind, depth, x, y in middles(np.asarray(Image.open(photo.mask))))
    things = found[: count - 1] + found[-1:] if len(found) > count > 1 else found[:count]
    return np.array([(x, y) for *_, x, y in things])


def middles(classes: NDArray) -> list[tuple[int, float, float, float]]:
    """(class, pixels to the nearest other class, x, y): the place deepest inside each class of a mask [H,W], x and y as
    shares of its width and height."""
    found = []
    for kind in np.setdiff1d(classes, [IGNORE]):
        depth = distance_transform_edt(np.pad(classes == kind, 1))[1:-1, 1:-1]
        y, x = np.unravel_index(depth.argmax(), depth.shape)
        found.append((int(kind), float(depth.max()), (x + 0.5) / classes.shape[1], (y + 0.5) / classes.shape[0]))
    return found


def parse_points(words: list[str] | None) -> NDArray[np.float64] | None:
    """['0.5,0.25', ...] -> [P,2]; None where no points are given."""
    if words is None:
        return None
    try:
        points = np.array([[float(number) for number in word.split(",")] for word in words])
    except ValueError:
        points = np.empty((0,))
    if points.shape[1:] != (2,) or not ((points >= 0) & (points < 1)).all():
        raise UserError(
            f"--points {' '.join(words)}: each is written x,y, shares of the photo's width and height from 0 to 1"
        )
    return points


def mark(axes: Axes, x: float, y: float, number: int, size: float = 9) -> None:
    """A numbered point, in its number's color."""
    color = COLORS[(number - 1) % len(COLORS)]
    axes.plot(x, y, "o", ms=size, mfc=color, mec="white", mew=0.9, clip_on=False, zorder=3)
    ink = "white" if color in DARK else "black"
    axes.text(x, y, str(number), ha="center", va="center_baseline", fontsize=0.7 * size, color=ink, zorder=4)


# ------------------------------------------------------------------------------------------------------------ drawing


def sheet(rows: int, columns: int, title: str, photos: list[Photo], cell: float = CELL) -> tuple[Figure, NDArray]:
    """A figure of rows x columns pictures of these photos' shape, without ticks, and its axes [rows,columns]."""
    tallest = max(photo.picture.shape[1] / photo.picture.shape[2] for photo in photos)
    high = cell * min(max(tallest, 0.4), 2.0)
    figure = Figure(figsize=(cell * columns, (high + 0.25) * rows + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=TEXT + 1)
    table = figure.subplots(rows, columns, squeeze=False)
    for axes in table.flat:
        axes.set_axis_off()
    return figure, table


def titled(networks: Networks, what: str) -> str:
    """The title of a sheet: of several networks each stands in its own rows."""
    return f"{what} · {networks[0][0]}" if len(networks) == 1 else what


def shade(picture: Tensor) -> NDArray[np.float32]:
    """The picture in dark grays, to lay a color over: [h,w] in [0,1]."""
    return (0.6 * picture.float().mean(0) / 255).numpy()


def save(figure: Figure, out: Path, dpi: int = 150) -> None:
    """Write a PNG, whole or not at all. Raises UserError where that is impossible."""
    partial = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(partial, dpi=dpi, format="png")
        os.replace(partial, out)
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}") from None


# -------------------------------------------------------------------------------------------------------- the program


def place(what: str, run: Path | None, out: Path | None) -> Path:
    """Where a picture goes: where the user says, else to the run's pictures, else here."""
    return out or (run / "pictures" / f"{what}.png" if run else Path(f"{what}.png"))


def show(
    what: str,
    doc: str | None,
    draw: Callable[[Networks, list[Photo], argparse.Namespace], Figure],
    words: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
    times: int = 1,
    argv: list[str] | None = None,
) -> None:
    """A program that paints networks looking at photos: `draw` makes the figure, `words` adds words of its own. Photos are
    shown to a network at `times` the size that it was made for, unless --size says otherwise."""
    parser = argparse.ArgumentParser(f"python -m tools.show_{what}", description=doc, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("network", help="a run folder, a checkpoint or a backbone file")
    parser.add_argument("photos", type=Path, nargs="*", help="image files, or a folder in Pascal VOC's layout")
    parser.add_argument("--compare", nargs="+", default=[], metavar="NETWORK", help="other networks, a row each")
    parser.add_argument("--out", type=Path, help=f"the picture (default: RUN/pictures/{what}.png or {what}.png)")
    parser.add_argument("--images", type=int, default=4, help="so many of a folder, evenly spread (default 4)")
    usual = "what each network was made for" if times == 1 else f"{times} times what each network was made for"
    parser.add_argument("--size", type=int, help=f"the shorter side in pixels (default: {usual})")
    parser.add_argument("--skip-existing", action="store_true", help="leave a picture that is there alone")
    words(parser)
    args = parser.parse_args(argv, namespace=argparse.Namespace(times=times))

    if args.images < 1:
        raise UserError(f"--images: at least 1, this is {args.images}")
    subjects = [EvalTarget(path) for path in (args.network, *args.compare)]
    out = place(what, subjects[0].run, args.out)
    if args.skip_existing and out.is_file():
        print(f"{out}: already there")
        return
    photos = choose_photos(args.photos, subjects[0], args.images)
    networks = [("/".join(subject.path.absolute().parts[-2:]), subject.network()) for subject in subjects]
    for _, network in networks:
        check_size(network, side(network, args))
        if side(network, args) > MOST_PATCHES * network.patch:
            raise UserError(
                f"--size {args.size}: at most {MOST_PATCHES} patches, {MOST_PATCHES * network.patch} pixels"
            )
    save(draw(networks, photos, args), out)
    print(f"{what} written to {out}")
