"""timm's ResNet as a backbone, for weights of others: it is evaluated, never trained.

Its tokens are the positions of the last feature map, before pooling (stride 32). It has no [CLS]: the mean of the map is
used instead, the feature that the published evaluations of ResNets take (He et al. 2016, global average pooling).

Letters: n images, h, w positions of the map, D width.
"""

from typing import Any

from timm.models.resnet import Bottleneck
from timm.models.resnet import ResNet as TimmResNet
from torch import Tensor

from model.backbone import Backbone, Tokens

STRIDE = 32  # of the last map, pixels
IMAGE_SIZE = 224  # of the published weights


class ResNet(TimmResNet, Backbone):
    """A ResNet of bottlenecks whose stride is in the 3x3 convolution: ResNet-50 and deeper, as torchvision's.

    layers, channels: blocks and inner width of each of the four stages.
    """

    def __init__(
        self,
        layers: tuple[int, ...] = (3, 4, 6, 3),
        channels: tuple[int, ...] = (64, 128, 256, 512),
        image_size: int = IMAGE_SIZE,
    ):
        super().__init__(Bottleneck, layers, num_classes=0, channels=channels)  # type: ignore[arg-type]
        self.width, self.patch, self.image_size = self.num_features, STRIDE, image_size

    def forward(self, images: Tensor) -> Tokens:  # type: ignore[override]
        """images [n,3,32h,32w] normalized."""
        patches = self.forward_features(images).flatten(2).transpose(1, 2)  # [n,D,h,w] -> [n,h*w,D]
        return Tokens(patches.mean(1), patches, None)

    def about(self) -> dict[str, Any]:
        return super().about() | {"image_size": self.image_size}
