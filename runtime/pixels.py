"""What a network takes of a photo: red, green and blue, or their gray, minus a mean and divided by a standard deviation.

A run has both in its config (`data`), a network in the metadata of its file. Imports no torch: pipeline/augment/recipe.py
has the arithmetic of training, eval/features.py that of evaluation.
"""

from typing import NamedTuple


class Pixels(NamedTuple):
    """The statistics of each channel's values, which are 0 to 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def channels(self) -> int:
        return len(self.mean)

    def repeated(self, channels: int) -> "Pixels":
        """The same statistics for several equal channels. Of one channel only."""
        return Pixels(self.mean * channels, self.std * channels)


IMAGENET = Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GRAY = Pixels((0.449,), (0.226,))  # the means of ImageNet's three


def usual(channels: int) -> Pixels:
    """The statistics of a network of so many channels that comes with none."""
    return IMAGENET if channels == IMAGENET.channels else GRAY.repeated(channels)
