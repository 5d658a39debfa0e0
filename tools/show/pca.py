"""Paint what tells patches apart: the first three principal components of their tokens, as red, green and blue.

    python -m tools.show.pca NETWORK [IMAGE | FOLDER ...] [--compare NETWORK ...] [--out FILE] [--images 4] [--size PIXELS]
        [--skip-existing]

The components are found once for all photos of the sheet, so one color means one kind of patch wherever it stands. Each
is stretched from its 2nd to its 98th percentile. Beside the colors stands each component alone, from dark to light, for
eyes that see red and green alike. Photos are shown at twice the size that the network was made for, as the published
segmentation shows them (448 pixels for 224), so that there are more patches. Networks, images and places: tools/show/figures.py.
n photos · N patches · D width.
"""

import argparse

import torch
from matplotlib.figure import Figure
from torch import Tensor

from runtime.errors import run_cli
from tools.show.figures import TEXT, Networks, Photo, patch_tokens, sheet, show, side, titled, whole_picture

COLORS = ("red", "green", "blue")


def principal_components(patches: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Tokens of each photo [N,D] -> (their first three components in [0,1], [N,3] each; shares of variance [3]).

    A component's sign is free: each is turned so that its largest values are rarer than its smallest, so that what stands
    out is light.
    """
    together = torch.cat(patches).double()
    centered = together - together.mean(0)
    _, spread, axes = torch.linalg.svd(centered, full_matrices=False)
    found = centered @ axes[:3].T  # [all N,3]
    found = found * torch.where((found**3).sum(0) < 0, -1.0, 1.0)
    low, high = torch.quantile(found, 0.02, dim=0), torch.quantile(found, 0.98, dim=0)
    found = ((found - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return list(found.split([len(p) for p in patches])), spread[:3] ** 2 / (spread**2).sum()


def draw(networks: Networks, photos: list[Photo], args: argparse.Namespace) -> Figure:
    """A row for each image and network: the image, the three components as one color, and each alone."""
    title = titled(networks, "Patch tokens: their three principal components, shared by all images")
    figure, table = sheet(len(photos) * len(networks), 5, title, photos)
    for n, (name, network) in enumerate(networks):
        pictures = [whole_picture(photo.picture, side(network, args), network.patch) for photo in photos]
        seen = [patch_tokens(network, picture).flatten(0, 1) for picture in pictures]
        components, shares = principal_components(seen)
        for i, (photo, picture, found) in enumerate(zip(photos, pictures, components, strict=True)):
            row = table[i * len(networks) + n]
            maps = found.unflatten(0, (picture.shape[1] // network.patch, -1)).numpy()  # [h,w,3]
            row[0].imshow(photo.picture.permute(1, 2, 0).numpy())
            row[0].set_title(f"{name}\n{photo.name}" if len(networks) > 1 else photo.name, fontsize=TEXT)
            row[1].imshow(maps)
            row[1].set_title(f"all three, {100 * shares.sum():.0f} % of variance", fontsize=TEXT)
            for k, axes in enumerate(row[2:]):
                axes.imshow(maps[..., k], cmap="cividis", vmin=0, vmax=1)
                axes.set_title(f"{k + 1} ({COLORS[k]}), {100 * shares[k]:.0f} %", fontsize=TEXT)
    return figure


def main(argv: list[str] | None = None) -> None:
    show("pca", __doc__, draw, times=2, argv=argv)


if __name__ == "__main__":
    run_cli(main)
