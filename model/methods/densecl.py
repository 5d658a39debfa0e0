"""DenseCL (Wang et al. 2021): MoCo-v2, and the same for patches. The query of a patch has to find the key of that patch in
the other view which is most similar to it.

Letters: B images, N patches, E width of the backbone, d width of queries and keys.
"""

import torch
from torch import Tensor, nn

from model.backbone import Tokens
from model.key_queue import KeyQueue
from model.losses.info_nce import unit
from model.methods.base import StepOutput
from model.methods.mocov2 import MoCoNetwork, MoCoV2, two_layers
from runtime.config import Config


class DenseCLNetwork(MoCoNetwork):
    """MoCo-v2's encoder with a second head of the same shape for each patch: the published 1x1 convolutions."""

    def __init__(self, config: Config, drop_path: float):
        super().__init__(config, drop_path)
        self.dense_projector = two_layers(self.backbone.width, config.head)
        for layer in self.projector:  # as published; the dense head has torch's own initialization
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)


class DenseCL(MoCoV2):
    """Eq. 3: 1 - lambda times the loss of images, lambda times the loss of patches. Each has a queue of its own."""

    student: DenseCLNetwork
    key: DenseCLNetwork
    want = ("cls", "patches")

    def __init__(self, config: Config):
        super().__init__(config, DenseCLNetwork)
        self.dense_queue = KeyQueue(config.contrast.queue, config.head.bottleneck)

    def queues(self) -> tuple[KeyQueue, ...]:
        return self.queue, self.dense_queue

    def compare(self, query: Tokens, key: Tokens) -> StepOutput:
        image_loss, k = self.compare_images(query, key)
        dense_loss, dense_k = self.compare_patches(query, key)
        self.new_keys.append((k, dense_k))
        weight = self.settings.dense_weight
        metrics = {"image_loss": image_loss.detach(), "dense_loss": dense_loss.detach()}
        return StepOutput((1 - weight) * image_loss + weight * dense_loss, metrics, [])

    def compare_patches(self, query: Tokens, key: Tokens) -> tuple[Tensor, Tensor]:
        """(eq. 2: a mean over all B*N patches of the queries; the keys [B,d] for the queue: an image's is the mean of its
        patches' projections, made a unit vector only then)."""
        assert query.patches is not None
        assert key.patches is not None
        q = unit(self.student.dense_projector(query.patches.flatten(0, 1)))  # [B*N,d]
        with torch.no_grad():
            of_key = self.key.dense_projector(key.patches.flatten(0, 1)).unflatten(0, key.patches.shape[:2])  # [B,N,d]
            match = most_similar(query.patches, key.patches).unsqueeze(-1).expand_as(of_key)
            positives = unit(of_key).gather(1, match).flatten(0, 1)
            pooled = unit(of_key.mean(1, dtype=q.dtype))
        return self.info_nce(q, positives, self.dense_queue.rows), pooled


@torch.no_grad()
def most_similar(query: Tensor, key: Tensor) -> Tensor:
    """For each patch of the query the patch of the key whose feature of the backbone has the largest cosine with its own
    (eq. 4): query, key [B,N,E] -> int64 [B,N]. Near ties are common, and bfloat16 would decide 1 % of the patches otherwise:
    neither autocast nor TF32 applies to a product in float64."""
    return (unit(query).double() @ unit(key).double().transpose(1, 2)).argmax(2)
