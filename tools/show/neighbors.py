"""Draw photos, each beside those that the network finds most similar to it. Needs no labels.

    python -m tools.show neighbors NETWORK [IMAGE | FOLDER ...] [--images 1000] [--queries 6] [--compare NETWORK ...]
        [--out FILE] [--size PIXELS] [--skip-existing]

The queries are evenly spaced among the photos; all other photos are searched. Similarity is the cosine of [CLS], the number
above a neighbor. Each photo is seen as in k-NN: its center, cropped. A network that has learned something puts the same kind
of thing side by side; a collapsed one has 1.00 everywhere.

n photos · D width.
"""

import argparse
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from eval.datasets import center_crop
from eval.features import tokens
from model.backbone import Backbone
from runtime.errors import UserError
from tools.show.figures import TEXT, Networks, figure_grid, figure_title
from tools.show.photos import Photo, input_size

NEIGHBORS = 6
BATCH = 64
THUMBNAIL = 160  # pixels of a side: photos are kept this small, because there may be many


def features_of(networks: list[tuple[Backbone, int]], photos: Iterable[Photo]) -> tuple[list[Photo], list[Tensor]]:
    """(the photos' centers, small; for each network and its size their normalized [CLS] [n,D]). Reads photos one by one."""
    shown: list[Photo] = []
    crops: list[list[Tensor]] = [[] for _ in networks]
    features: list[list[Tensor]] = [[] for _ in networks]

    def flush() -> None:
        for (network, _), waiting, found in zip(networks, crops, features, strict=True):
            if waiting:
                cls, _ = tokens(network, torch.stack(waiting).to(next(network.parameters()).device))
                found.append(F.normalize(cls, dim=1).cpu())
                waiting.clear()

    for photo in photos:
        shown.append(Photo(photo.name, center_crop(photo.picture, THUMBNAIL)))
        for (_, size), waiting in zip(networks, crops, strict=True):
            waiting.append(center_crop(photo.picture, size))
        if len(shown) % BATCH == 0:
            flush()
    flush()
    return shown, [torch.cat(found) for found in features]


def draw(networks: Networks, photos: Iterable[Photo], args: argparse.Namespace) -> Figure:
    """A row for each query and network: the query and its nearest neighbors. Raises UserError for fewer than two photos."""
    shown, features = features_of([(network, input_size(network, args)) for _, network in networks], photos)
    if len(shown) < 2:
        raise UserError("neighbors need at least two photos; name a folder of photos, or raise --images")
    queries = [i * len(shown) // min(args.queries, len(shown)) for i in range(min(args.queries, len(shown)))]
    columns = min(NEIGHBORS, len(shown) - 1)
    title = figure_title(networks, f"Each photo and its nearest of {len(shown):,}, by the cosine of [CLS]")
    figure, grid = figure_grid(len(queries) * len(networks), 1 + columns, title, shown[:1])
    for n, (name, _) in enumerate(networks):
        for i, query in enumerate(queries):
            cosines = features[n] @ features[n][query]
            cosines[query] = -2  # not its own neighbor
            nearest = cosines.topk(columns)
            row = grid[i * len(networks) + n]
            titles = [f"{name}\n{shown[query].name}" if len(networks) > 1 else shown[query].name]
            titles += [f"{cosine:.2f}" for cosine in nearest.values.tolist()]
            for axes, index, text in zip(row, [query, *nearest.indices.tolist()], titles, strict=True):
                axes.imshow(shown[index].picture.permute(1, 2, 0).numpy())
                axes.set_title(text, fontsize=TEXT)
    return figure
