"""timm's ViTs with rotary positions (EVA-02, DINOv3) as backbones, for weights of others: they are evaluated, never trained.

A point needs a position that is a vector (model/reference.py); a rotary position is a rotation of queries and keys.
Letters: n images, N patches, D width, P tokens in front of the patches.
"""

from typing import Any

from timm.models.eva import Eva
from torch import Tensor

from model.backbone import Backbone, Tokens
from runtime.pixels import Pixels


class Rotary(Backbone):
    """network: timm's model, made for images of any size (`dynamic_img_size`)."""

    def __init__(self, network: Eva, pixels: Pixels):
        super().__init__()
        self.network: Any = network
        self.pixels = pixels
        self.width, self.patch = self.network.embed_dim, self.network.patch_embed.patch_size[0]
        self.image_size = self.network.patch_embed.img_size[0]

    def forward(self, images: Tensor) -> Tokens:
        """images [n,3,h,w] normalized. Without [CLS], the mean of the patches takes its place, as for a ResNet."""
        tokens = self.network.forward_features(images)  # [n,P+N,D]
        patches = tokens[:, self.network.num_prefix_tokens :]
        return Tokens(patches.mean(1) if self.network.cls_token is None else tokens[:, 0], patches, None)

    def about(self) -> dict[str, Any]:
        return super().about() | {"image_size": self.image_size}
