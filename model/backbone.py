"""What an evaluation needs of a network: the ViT that is trained here (vit.py), or a ResNet of others (resnet.py).

Letters: n images, C channels, N patches, D width, R reference tokens of an image, H heads.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from runtime.pixels import IMAGENET, Pixels


class Tokens(NamedTuple):
    """What a backbone returns, after its last norm."""

    cls: Tensor  # [n,D]
    patches: Tensor | None  # [n,N,D], row by row; None if not wanted
    references: Any  # of a ViT: [n,R,D] of one tensor of points, [n_i,R_i,D] each of a list; None without points
    attention: Tensor | None = None  # [n,H,N]: what [CLS] takes from each patch in the last block; None if not wanted


class Backbone(nn.Module):
    """A network whose call, `backbone(images)`, takes normalized images [n,C,h,w] and returns `Tokens`.

    h and w are multiples of `patch`, and N = (h / patch) * (w / patch).
    """

    width: int  # D
    patch: int  # side of the square of a patch token, pixels
    image_size: int  # side of the images that it was trained for, pixels
    pixels: Pixels = IMAGENET  # what it takes of a photo
    precision: torch.dtype | None = None  # of matrix products in evaluation; None: the fastest of the device
    note: str = ""  # on its weights: whose they are, and what of their file is not used

    def about(self) -> dict[str, Any]:
        """What the shapes of its tensors do not tell: the metadata of its files."""
        return {"mean": list(self.pixels.mean), "std": list(self.pixels.std)}
