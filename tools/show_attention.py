"""Paint what [CLS] looks at: its attention in the last block, head by head, over the image (paper figure 6).

    python -m tools.show_attention NETWORK [IMAGE | FOLDER ...] [--beside NETWORK ...]
        [--out FILE] [--images 4] [--size PIXELS] [--if-missing]

NETWORK is a run folder, a checkpoint or a backbone file; --beside puts others under it, as the figure puts DenseDINO under
DINO. Images are files or a folder in Pascal VOC's layout (its val split); a run shows its own scenes where none are
named. A run's picture goes to RUN/pictures/attention.png, another one to attention.png.

A cell is one patch, the more opaque the more weight; every map is scaled to its own largest weight. The number over it is
the share that falls on the patches, the rest [CLS] keeps to itself.
H heads · h, w patches of a picture's height and width, N = hw · p pixels of a patch's side.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transform

from eval.datasets import PHOTOS, VocSegmentation, decode, open_shards
from eval.features import check_size
from eval.subject import Subject, spread
from model.vit import ViT
from pipeline.augment import MEAN, STD
from runtime.mistake import Mistake, nearest, tell_mistakes

CELL = 1.9  # inches
YELLOW = ListedColormap(["#F0E442"])  # Okabe & Ito's: stands out from grey for every eye; a map is all in its opacity
Photo = tuple[str, Tensor]  # name, uint8 [3,H,W]


@torch.no_grad()
def cls_attention(network: ViT, picture: Tensor) -> Tensor:
    """Weights of [CLS] in the last block: [H,1+N], those on itself first. picture uint8 [3,h*p,w*p].

    Without reference tokens [CLS] attends to itself and the patches in every mode of `reference.attend`.
    """
    seen: list[Tensor] = []
    block: Any = network.blocks[-1]
    hook = block.attn.qkv.register_forward_hook(lambda module, given, qkv: seen.append(qkv))
    try:
        device = network.pos_embed.device
        mean, std = (torch.tensor(c, device=device).view(3, 1, 1) for c in (MEAN, STD))
        network(((picture.to(device).float() / 255 - mean) / std)[None])
    finally:
        hook.remove()
    q, k, _ = seen[0][0].unflatten(-1, (3, network.heads, -1)).permute(1, 2, 0, 3)  # [H,1+N,d] each
    return (q[:, :1] @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)[:, 0].cpu()


def whole_picture(photo: Tensor, size: int, patch: int) -> Tensor:
    """The whole photo, its shorter side `size`, both sides whole patches: uint8 [3,H,W] -> [3,h*p,w*p]."""
    shorter = min(photo.shape[1:])
    sides = [max(1, round(side * size / shorter / patch)) * patch for side in photo.shape[1:]]
    return transform.resize(photo, sides, InterpolationMode.BICUBIC, antialias=True)


def read_photo(path: Path) -> Photo:
    if not path.is_file():
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        raise Mistake(f"{path}: no such image{nearest(str(path), map(str, beside))}")
    try:
        return path.name, decode(path.read_bytes())
    except ValueError as error:
        raise Mistake(f"{path}: {error}") from None


def choose_photos(named: list[Path], subject: Subject, count: int) -> list[Photo]:
    """The images named; else `count` of the run's scenes, else of the photos it was evaluated on or trained with."""
    config = subject.config
    if not named and config and config.eval.voc:
        named = [Path(config.eval.voc)]
    photos: list[Photo] = []
    for path in named:
        if (path / "ImageSets").is_dir():
            scenes = VocSegmentation(path, "val", 1, classes=1).pictures
            photos += [read_photo(scenes[i]) for i in spread(np.arange(len(scenes)), count)]
        elif path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in PHOTOS)
            if not inside:
                raise Mistake(f"{path}: neither photos nor Pascal VOC's layout (no ImageSets/)")
            photos += [read_photo(inside[i]) for i in spread(np.arange(len(inside)), count)]
        else:
            photos.append(read_photo(path))
    if photos:
        return photos
    folder = (config.data.val or config.data.shards) if config else None
    if folder is None:
        raise Mistake(f"{subject.path}: lies in no run folder; name the images to look at")
    shards = open_shards(folder, config.speed if config else None)
    for sample in spread(np.arange(len(shards)), count).tolist():
        photo = shards.read(sample)
        if shards.is_sound(sample, photo):
            try:
                photos.append((f"sample {sample}", decode(photo)))
            except ValueError:
                continue
    if not photos:
        raise Mistake(f"{folder}: no sound photo among those looked at; `make verify DST={folder}`")
    return photos


def shade(picture: Tensor) -> NDArray[np.float32]:
    """The picture in dark greys, to lay a colour over: [h,w] in [0,1]."""
    return (0.6 * picture.float().mean(0) / 255).numpy()


def draw(networks: list[tuple[str, ViT]], photos: list[Photo], size: int | None) -> Figure:
    """A row for each image and network: the image, then one map for each head, then their mean."""
    heads = max(network.heads for _, network in networks)
    rows = len(photos) * len(networks)
    figure = Figure(figsize=(CELL * (heads + 2), (CELL + 0.25) * rows + 0.6), layout="constrained")
    table = figure.subplots(rows, heads + 2, squeeze=False)
    for axes in table.flat:
        axes.set_axis_off()
    for i, (name, photo) in enumerate(photos):
        for n, (title, network) in enumerate(networks):
            row = table[i * len(networks) + n]
            picture = whole_picture(photo, size or network.image_size, network.patch)
            high, wide = picture.shape[1:]
            weights = cls_attention(network, picture)
            maps = weights[:, 1:].unflatten(1, (high // network.patch, wide // network.patch))  # [H,h,w]
            row[0].imshow(picture.permute(1, 2, 0).numpy())
            row[0].set_title(f"{title}\n{name}" if len(networks) > 1 else name, fontsize=7)
            named = [*(f"head {head + 1}" for head in range(len(maps))), "mean"]
            for axes, what, heat in zip(row[1:], named, [*maps, maps.mean(0)], strict=False):
                axes.imshow(shade(picture), cmap="gray", vmin=0, vmax=1, extent=(0, wide, high, 0))
                strength = (heat / heat.max()).numpy()
                axes.imshow(strength, cmap=YELLOW, vmin=0, vmax=1, alpha=0.75 * strength, extent=(0, wide, high, 0))
                axes.set_title(f"{what} · {100 * heat.sum():.0f} % on patches", fontsize=7)
    whose = f" · {networks[0][0]}" if len(networks) == 1 else ""  # several stand in their rows
    figure.suptitle(f"Attention of [CLS] in the last block{whose}", fontsize=9)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser("python -m tools.show_attention", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("network", help="a run folder, a checkpoint or a backbone file")
    parser.add_argument("photos", type=Path, nargs="*", help="image files, or a folder in Pascal VOC's layout")
    parser.add_argument("--beside", nargs="+", default=[], metavar="NETWORK", help="other networks, a row each")
    parser.add_argument("--out", type=Path, help="the picture (default: RUN/pictures/attention.png or attention.png)")
    parser.add_argument("--images", type=int, default=4, help="so many of a folder, evenly spread (default 4)")
    parser.add_argument("--size", type=int, help="the shorter side in pixels (default: what each network was made for)")
    parser.add_argument("--if-missing", action="store_true", help="leave a picture that is there alone")
    args = parser.parse_args()

    if args.images < 1:
        raise Mistake(f"--images: at least 1, this is {args.images}")
    subjects = [Subject(path) for path in (args.network, *args.beside)]
    run = subjects[0].run
    out = args.out or (run / "pictures" / "attention.png" if run else Path("attention.png"))
    if args.if_missing and out.is_file():
        print(f"{out}: already there")
        return
    photos = choose_photos(args.photos, subjects[0], args.images)
    networks = [("/".join(subject.path.absolute().parts[-2:]), subject.network()) for subject in subjects]
    for _, network in networks:
        check_size(network, args.size or network.image_size)
    figure = draw(networks, photos, args.size)
    partial = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(partial, dpi=150, format="png")
        os.replace(partial, out)  # a picture that is there is whole
    except OSError as error:
        raise Mistake(f"{out}: {error.strerror}") from None
    print(f"attention written to {out}")


if __name__ == "__main__":
    tell_mistakes(main)
