"""Paint what a linear map makes of patch tokens: the predicted classes of scenes beside the true ones.

    python -m tools.show.segmentation NETWORK [VOC_FOLDER] [--scenes 500] [--compare NETWORK ...] [--out FILE] [--images 4]
        [--size PIXELS] [--skip-existing]

The map tells the class of a patch from its token. It is fitted to the shares of classes in each patch of the train split
(trainaug where there is one), by L-BFGS to its optimum, which takes seconds and knows no learning rate; the figures of
eval.linear_seg come from the published recipe instead. Predictions are upsampled to the mask's pixels. A number in a map
is a class, in the middle of where it stands; in the last picture orange is wrong, gray is right, white counts nowhere.
Photos are shown at twice the size that the network was made for, as the published segmentation does it.
Networks, images and places: tools/show/figures.py.
n patches · D width · h, w patches of a scene · C classes · S side of a scene as the network sees it, pixels.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from torch import Tensor, nn

from eval.datasets import IGNORE, VocSegmentation
from eval.features import scene_batches, shown
from eval.target import spread
from model.vit import ViT
from runtime.errors import UserError, run_cli
from tools.show.figures import COLORS, TEXT, Networks, Photo, middles, sheet, show, side, titled

BATCH = 32


def color(kind: int) -> NDArray[np.float64]:
    """Of a class: gray for the ground, then seven that every eye tells apart, then these darker, then lighter."""
    if kind == 0:
        return np.full(3, 0.8)
    base = np.array(to_rgb(COLORS[(kind - 1) % len(COLORS)]))
    return [base, 0.55 * base, 0.5 + 0.5 * base][(kind - 1) // len(COLORS) % 3]


def patch_shares(masks: Tensor, classes: int, h: int, w: int) -> Tensor:
    """What share of each patch's pixels each class has: masks uint8 [n,S,S] -> [n,C,h,w]; ignored pixels have none."""
    numbers = masks.long().clamp(max=classes)  # what is no class has a place of its own, cut off again
    return F.adaptive_avg_pool2d(F.one_hot(numbers, classes + 1)[..., :classes].permute(0, 3, 1, 2).float(), (h, w))


def linear_map(network: ViT, scenes: VocSegmentation) -> nn.Linear:
    """The map [D] -> logits [C] with the least cross-entropy to the class shares of the scenes' patches."""
    found_tokens, found_shares = [], []
    total = -(-len(scenes) // BATCH)
    for seen, masks in shown(scene_batches(network, scenes, batch=BATCH), total, "scenes to learn from"):
        shares = patch_shares(masks, scenes.classes, *seen.shape[-2:])
        found_tokens.append(seen.flatten(2).transpose(1, 2).flatten(0, 1))
        found_shares.append(shares.flatten(2).transpose(1, 2).flatten(0, 1))
    tokens, shares = torch.cat(found_tokens), torch.cat(found_shares)  # [n,D], [n,C]
    head = nn.Linear(tokens.shape[1], scenes.classes).to(tokens)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        loss = -(shares * head(tokens).log_softmax(-1)).sum() / shares.sum() + 1e-5 * head.weight.square().sum()
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    return head.requires_grad_(False)


def paint(axes: Axes, classes: NDArray[np.uint8], extent: tuple[float, float, float, float]) -> set[int]:
    """A map of classes [S,S] with its numbers; returns the classes in it."""
    kinds = set(np.unique(classes).tolist()) - {IGNORE}
    picture = np.ones((*classes.shape, 3))
    for kind in kinds:
        picture[classes == kind] = color(kind)
    axes.imshow(picture, extent=extent, interpolation="nearest")
    for kind, depth, x, y in middles(classes):
        if depth < len(classes) / 40:
            continue  # no room for a number
        ink = "black" if color(kind).mean() > 0.45 else "white"
        place = (x * extent[1], y * extent[2])
        axes.text(*place, str(kind), ha="center", va="center_baseline", fontsize=TEXT, color=ink)
    return kinds


def splits(photos: list[Photo], size: int, most: int) -> tuple[VocSegmentation, VocSegmentation]:
    """(scenes of the train split to learn from, at most so many; the scenes of these photos) of the photos' folder."""
    masks = [photo.mask for photo in photos if photo.mask]
    folders = {mask.parents[1] for mask in masks}
    if len(masks) < len(photos) or len(folders) > 1:
        raise UserError("segmentation needs scenes with masks: name one folder in Pascal VOC's layout")
    folder = folders.pop()
    has_aug = (folder / "ImageSets" / "Segmentation" / "trainaug.txt").is_file()
    train = VocSegmentation(folder, "trainaug" if has_aug else "train", size)
    kept = spread(np.arange(len(train)), most)
    train.pictures, train.masks = [train.pictures[i] for i in kept], [train.masks[i] for i in kept]
    val = VocSegmentation(folder, "val", size, classes=train.classes)
    at = [val.masks.index(mask) for mask in masks]
    val.pictures, val.masks = [val.pictures[i] for i in at], [val.masks[i] for i in at]
    return train, val


def draw(networks: Networks, photos: list[Photo], args: argparse.Namespace) -> Figure:
    """A row for each scene and network: the scene, the truth, the prediction, and where it is wrong."""
    if args.scenes < 1:
        raise UserError(f"--scenes: at least 1, this is {args.scenes}")
    title = titled(networks, "Segmentation by a linear map on patch tokens")
    figure, table = sheet(len(photos) * len(networks), 4, title, photos)
    names: dict[int, str] = {}
    for n, (name, network) in enumerate(networks):
        train, val = splits(photos, side(network, args), args.scenes)
        head = linear_map(network, train)
        for i, (seen, masks) in enumerate(scene_batches(network, val, batch=1)):
            logits = head(seen.movedim(1, -1)).movedim(-1, 1)  # [1,C,h,w]
            predicted = F.interpolate(logits, masks.shape[1:], mode="bilinear").argmax(1)[0].cpu().numpy()  # [S,S]
            truth = masks[0].cpu().numpy()
            counts = truth != IGNORE
            right = (predicted == truth) & counts
            row, (high, wide) = table[i * len(networks) + n], photos[i].picture.shape[1:]
            extent = (0.0, float(wide), float(high), 0.0)
            row[0].imshow(photos[i].picture.permute(1, 2, 0).numpy(), extent=extent)
            kinds = paint(row[1], truth, extent) | paint(row[2], predicted.astype(np.uint8), extent)
            names |= {kind: f"{kind} {val.name(kind)}" if val.names else str(kind) for kind in kinds}
            verdict = np.ones((*truth.shape, 3))
            verdict[right], verdict[counts & ~right] = 0.85, to_rgb(COLORS[4])
            row[3].imshow(verdict, extent=extent, interpolation="nearest")
            share = f"{100 * right.sum() / max(1, counts.sum()):.0f} % right, orange is wrong"
            told = (f"{name}\n{photos[i].name}" if len(networks) > 1 else photos[i].name, "truth", "prediction", share)
            for axes, words_over in zip(row, told, strict=True):
                axes.set_title(words_over, fontsize=TEXT)
    legend = [Patch(fc=color(kind), ec="0.4", lw=0.5, label=names[kind]) for kind in sorted(names)]
    figure.legend(handles=legend, loc="outside lower center", ncols=4, fontsize=TEXT, frameon=False)
    return figure


def words(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scenes", type=int, default=500, help="so many train scenes at most (default 500)")


def main(argv: list[str] | None = None) -> None:
    show("segmentation", __doc__, draw, words, times=2, argv=argv)


if __name__ == "__main__":
    run_cli(main)
