"""Draw the classes that a linear map predicts from patch tokens, beside the true ones.

    python -m tools.show segmentation NETWORK [VOC_FOLDER] [--scenes 500] [--compare NETWORK ...] [--out FILE] [--images 4]
        [--size PIXELS] [--skip-existing]

The map predicts a patch's class from its token. It is fitted to the class shares of each patch of the train split
(trainaug if there is one) by L-BFGS to its optimum, which takes seconds and has no learning rate; published figures come
from `python -m eval linear_seg` instead. Predictions are upsampled to the mask's pixels. A number in a map is a class, at
the center of its region. In the last column orange is wrong, gray is correct, and white pixels are ignored. Photos are
shown at twice the size that the network was trained for, as the published segmentation does.

n patches · D width · h, w patches of a scene · C classes · S side of a scene as the network gets it, pixels.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from torch import Tensor, nn

from eval.datasets import IGNORE, VocSegmentation, voc_splits
from eval.features import progress_bar, scene_batches
from model.backbone import Backbone
from runtime.errors import UserError
from tools.show.figures import COLORS, TEXT, Networks, figure_grid, figure_title
from tools.show.photos import Photo, class_centers, input_size

BATCH = 32


def class_color(label: int) -> NDArray[np.float64]:
    """RGB in [0,1] of a class: gray for the background, seven distinct colors, the same darker, the same lighter."""
    if label == 0:
        return np.full(3, 0.8)
    base = np.array(to_rgb(COLORS[(label - 1) % len(COLORS)]))
    return [base, 0.55 * base, 0.5 + 0.5 * base][(label - 1) // len(COLORS) % 3]


def patch_shares(masks: Tensor, classes: int, h: int, w: int) -> Tensor:
    """The share of each class in each patch's pixels: masks uint8 [n,S,S] -> [n,C,h,w]. Ignored pixels count for none."""
    labels = masks.long().clamp(max=classes)  # ignored pixels become an extra class, which is cut off again
    return F.adaptive_avg_pool2d(F.one_hot(labels, classes + 1)[..., :classes].permute(0, 3, 1, 2).float(), (h, w))


def fit_linear_map(network: Backbone, scenes: VocSegmentation) -> nn.Linear:
    """The map [D] -> logits [C] with the least cross-entropy to the class shares of the scenes' patches."""
    tokens_of, shares_of = [], []
    total = -(-len(scenes) // BATCH)
    for features, masks in progress_bar(scene_batches(network, scenes, batch=BATCH), total, "train scenes"):
        scene_shares = patch_shares(masks, scenes.classes, *features.shape[-2:])
        tokens_of.append(features.flatten(2).transpose(1, 2).flatten(0, 1))
        shares_of.append(scene_shares.flatten(2).transpose(1, 2).flatten(0, 1))
    tokens, shares = torch.cat(tokens_of), torch.cat(shares_of)  # [n,D], [n,C]
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


def draw_classes(axes: Axes, mask: NDArray[np.uint8], extent: tuple[float, float, float, float]) -> set[int]:
    """Draw a map of classes [S,S] with its numbers; returns the classes in it."""
    labels = set(np.unique(mask).tolist()) - {IGNORE}
    picture = np.ones((*mask.shape, 3))
    for label in labels:
        picture[mask == label] = class_color(label)
    axes.imshow(picture, extent=extent, interpolation="nearest")
    for label, depth, x, y in class_centers(mask):
        if depth < len(mask) / 40:
            continue  # too small for a number
        ink = "black" if class_color(label).mean() > 0.45 else "white"
        center = (x * extent[1], y * extent[2])
        axes.text(*center, str(label), ha="center", va="center_baseline", fontsize=TEXT, color=ink)
    return labels


def folder_of(photos: list[Photo]) -> Path:
    """The folder of these scenes. Raises UserError if a photo has no mask, or if the photos are from several folders."""
    masks = [photo.mask for photo in photos if photo.mask]
    folders = {mask.parents[1] for mask in masks}
    if len(masks) < len(photos) or len(folders) > 1:
        raise UserError("segmentation needs scenes with masks: name one folder in Pascal VOC's layout")
    return folders.pop()


def load_splits(
    folder: Path, photos: list[Photo], size: int, limit: int, palette: str | None
) -> tuple[VocSegmentation, VocSegmentation]:
    """(at most `limit` scenes of the train split, the scenes of these photos), from the photos' folder."""
    train, val = voc_splits(folder, size, palette=palette)
    train = train.subset(limit)
    shown_scenes = [val.masks.index(photo.mask) for photo in photos if photo.mask]
    val.images, val.masks = [val.images[i] for i in shown_scenes], [val.masks[i] for i in shown_scenes]
    return train, val


def draw(networks: Networks, photos: list[Photo], args: argparse.Namespace) -> Figure:
    """A row for each scene and network: the scene, the true classes, the prediction, and where it is wrong."""
    folder = folder_of(photos)
    title = figure_title(networks, "Segmentation by a linear map on patch tokens")
    figure, grid = figure_grid(len(photos) * len(networks), 4, title, photos)
    names: dict[int, str] = {}
    for n, (name, network) in enumerate(networks):
        train, val = load_splits(folder, photos, input_size(network, args), args.scenes, args.palette)
        head = fit_linear_map(network, train)
        for i, (features, masks) in enumerate(scene_batches(network, val, batch=1)):
            logits = head(features.movedim(1, -1)).movedim(-1, 1)  # [1,C,h,w]
            predicted = F.interpolate(logits, masks.shape[1:], mode="bilinear").argmax(1)[0].cpu().numpy()  # [S,S]
            title = f"{name}\n{photos[i].name}" if len(networks) > 1 else photos[i].name
            row = grid[i * len(networks) + n]
            labels = _draw_row(row, photos[i], masks[0].cpu().numpy(), predicted.astype(np.uint8), title)
            names |= {label: f"{label} {val.name(label)}" if val.names else str(label) for label in labels}
    legend = [Patch(fc=class_color(label), ec="0.4", lw=0.5, label=names[label]) for label in sorted(names)]
    figure.legend(handles=legend, loc="outside lower center", ncols=4, fontsize=TEXT, frameon=False)
    return figure


def _draw_row(row: NDArray, photo: Photo, truth: NDArray, predicted: NDArray[np.uint8], title: str) -> set[int]:
    """One scene, with masks [S,S]; returns the classes in its maps."""
    counted = truth != IGNORE
    correct = (predicted == truth) & counted
    height, width = photo.picture.shape[1:]
    extent = (0.0, float(width), float(height), 0.0)
    row[0].imshow(photo.picture.permute(1, 2, 0).numpy(), extent=extent)
    labels = draw_classes(row[1], truth, extent) | draw_classes(row[2], predicted, extent)
    verdict = np.ones((*truth.shape, 3))
    verdict[correct], verdict[counted & ~correct] = 0.85, to_rgb(COLORS[4])
    row[3].imshow(verdict, extent=extent, interpolation="nearest")
    share = f"{100 * correct.sum() / max(1, counted.sum()):.0f} % right, orange is wrong"
    for axes, text in zip(row, (title, "truth", "prediction", share), strict=True):
        axes.set_title(text, fontsize=TEXT)
    return labels
