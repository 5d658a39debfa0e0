"""Draw the first three principal components of the patch tokens, as red, green and blue.

    python -m tools.show pca NETWORK [IMAGE | FOLDER ...] [--compare NETWORK ...] [--out FILE] [--images 4] [--size PIXELS]
        [--skip-existing]

The components are computed once for all photos, so a color means the same kind of patch in every photo. Each component is
stretched from its 2nd to its 98th percentile. Beside the colors each component is drawn by itself, from dark to light, for
color-blind readers. Photos are shown at twice the size that the network was trained for, as the published segmentation
does (448 pixels for 224), to have more patches.

n photos · N patches · D width.
"""

import argparse

import torch
from matplotlib.figure import Figure
from torch import Tensor

from tools.show.figures import TEXT, Networks, figure_grid, figure_title
from tools.show.photos import Photo, input_size, patch_tokens, resize_to_patches

COLORS = ("red", "green", "blue")


def principal_components(patches: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Tokens of each photo [N,D] -> (their first three components in [0,1], [N,3] each; shares of variance [3]).

    A component's sign is arbitrary: it is chosen so that the largest values are rarer than the smallest, so that what is
    unusual is light.
    """
    tokens = torch.cat(patches).double()
    centered = tokens - tokens.mean(0)
    _, deviations, axes = torch.linalg.svd(centered, full_matrices=False)
    components = centered @ axes[:3].T  # [all N,3]
    components = components * torch.where((components**3).sum(0) < 0, -1.0, 1.0)
    low, high = torch.quantile(components, 0.02, dim=0), torch.quantile(components, 0.98, dim=0)
    components = ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return list(components.split([len(p) for p in patches])), deviations[:3] ** 2 / (deviations**2).sum()


def draw(networks: Networks, photos: list[Photo], args: argparse.Namespace) -> Figure:
    """A row for each image and network: the image, the three components as one color, and each component."""
    title = figure_title(networks, "Patch tokens: their three principal components, shared by all images")
    figure, grid = figure_grid(len(photos) * len(networks), 5, title, photos)
    for n, (name, network) in enumerate(networks):
        pictures = [resize_to_patches(photo.picture, input_size(network, args), network.patch) for photo in photos]
        tokens = [patch_tokens(network, picture).flatten(0, 1) for picture in pictures]
        components, shares = principal_components(tokens)
        for i, (photo, picture, of_photo) in enumerate(zip(photos, pictures, components, strict=True)):
            row = grid[i * len(networks) + n]
            maps = of_photo.unflatten(0, (picture.shape[1] // network.patch, -1)).numpy()  # [h,w,3]
            row[0].imshow(photo.picture.permute(1, 2, 0).numpy())
            row[0].set_title(f"{name}\n{photo.name}" if len(networks) > 1 else photo.name, fontsize=TEXT)
            row[1].imshow(maps)
            row[1].set_title(f"all three, {100 * shares.sum():.0f} % of variance", fontsize=TEXT)
            for k, axes in enumerate(row[2:]):
                axes.imshow(maps[..., k], cmap="cividis", vmin=0, vmax=1)
                axes.set_title(f"{k + 1} ({COLORS[k]}), {100 * shares[k]:.0f} %", fontsize=TEXT)
    return figure
