"""The memory of a training step, as model/cost.py counts it. Imports no torch, so that a kept count is read in no time."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Memory:
    """Bytes of a step's tensors. At its peak they are `fixed` + `image` for each image of a piece."""

    fixed: int  # networks, moments, and what a chunk of the losses needs
    image: int  # the batch, this one and the next, and what is kept for the backward pass
    state: int  # networks and moments alone
    gradients: int

    def peak(self, images: int, pieces: int = 1, processes: int = 1) -> int:
        """The most bytes on one device. images: of a device in a step, processed in so many pieces."""
        kept = self.gradients if pieces > 1 or processes > 1 else 0  # those of earlier pieces, or the buckets of DDP
        return max(self.fixed + kept + self.image * (images // pieces), self.state + self.gradients)
