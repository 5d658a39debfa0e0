"""The tokens of a batch's views, for methods without reference tokens.

Letters: B images, V views, Vg views of one size.
"""

from collections.abc import Collection
from typing import Any

from model import drop_path
from model.vit import ViT
from pipeline.batch import Batch


def encode(backbone: ViT, batch: Batch, views: int, want: Collection[str], drop_seed: int | None = None) -> list[Any]:
    """Tokens of the first `views` views: for each size Tokens, of tensors [Vg,B,...].

    drop_seed: the run's seed if drop path leaves branches out.
    """
    draws = None
    if drop_seed is not None:
        draws = drop_path.draw(drop_seed, batch.step, batch.ids, (views, len(backbone.blocks), 2))  # [B,V,depth,2]
    tokens: list[Any] = []
    first = 0
    for images in batch.views:  # [Vg,B,3,H,W]
        images = images[: max(0, views - first)]
        if not len(images):
            break
        last = first + len(images)
        drop = None if draws is None else draws[:, first:last].transpose(0, 1).flatten(0, 1)
        out, by_view = backbone(images.flatten(0, 1), want=want, drop=drop), images.shape[:2]
        tokens.append(type(out)(*(t if t is None else t.unflatten(0, by_view) for t in out)))
        first = last
    return tokens
