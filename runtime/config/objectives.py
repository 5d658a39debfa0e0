"""The sections of the schema that say what a method learns: reference tokens, heads, losses. See schema.py."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from runtime.config.bounds import LOCALITY, SETTINGS, Pair, Share


@dataclass(config=SETTINGS)
class Reference:
    """Reference tokens (section 3.2). Only `method: densedino` uses them."""

    points: int = 4
    """Number of reference points for each ordered pair of a teacher view and another view, M (section 4.1: 4)."""
    attention: Literal["none", "patches+cls", "patches", "patches+self", "all_query"] = "patches+self"
    """Tokens that a reference token attends to. `patches`, `patches+cls` and `patches+self` name them, and no token attends
    to reference tokens. `none`: every token attends to all. `all_query`: as `patches+self`, and patches do not attend to
    [CLS] (Figure 3; the published command: patches+self)."""
    locality: Annotated[float, Field(ge=LOCALITY[0], le=LOCALITY[1])] | None = None
    """Width σ, in patches of the view, of a Gaussian prior on what a reference token attends to: its logit for a patch gets
    -d² / (2 σ²), d the distance from the point to the patch. None: no prior, the published method. Not in the paper."""
    border: Literal["zeros", "border"] = "zeros"
    """Value of the position embedding outside its grid: zero, or that of the nearest patch (published code: zeros)."""
    views: Literal["all", "teacher"] = "all"
    """Student views in the reference loss, x' of eq. 3: all views, or the teacher's only."""
    center: Literal["loss", "published"] = "loss"
    """Tokens that move the reference center. `loss`: those that enter the loss (section 4.1: as the class token).
    `published`: those of all pairs of the two teacher views, a view paired with itself too."""


@dataclass(config=SETTINGS)
class Head:
    """Projection heads onto prototypes (DINO; section 4.1: the same settings for class and reference tokens)."""

    hidden: PositiveInt = 2048
    """Width of the two hidden layers."""
    bottleneck: PositiveInt = 256
    """Width of the last layer's input, which has unit norm."""
    prototypes: Annotated[int, Field(ge=2)] = 65536
    """Number of prototypes, K: the outputs of the last layer."""
    layers: Annotated[int, Field(ge=2)] = 3
    """Number of linear maps before the prototypes (Leopart: 3; SwAV: 2). Only `leopart` and `swav` use it."""
    activation: Literal["gelu", "relu"] = "gelu"
    """Function after each hidden layer (Leopart: GELU; SwAV: ReLU). Only `leopart` and `swav` use it."""
    norm: Literal["none", "batch"] = "none"
    """Normalization after each hidden layer: none, or batch normalization (an option of DINO; SwAV has it)."""
    norm_last_layer: bool = True
    """Whether the gain of the last layer's weight norm stays 1, so that prototypes keep unit norm (DINO)."""
    shared: bool = False
    """Whether class and reference tokens share one head and one center. Section 3.2 ("a shared projection head") can be read
    either way; the published code has two."""


@dataclass(config=SETTINGS)
class Loss:
    """The two cross-entropies (section 3.2)."""

    alpha: Share = 0.5
    """Weight of the class loss; the reference loss has weight 1 - alpha (eq. 4; section 4.1: 0.5). `method: dino` has the
    class loss alone."""
    cls_views: Literal["all", "teacher"] = "all"
    """Student views in the class loss, x' of eq. 2: all views, or the teacher's only."""
    student_temperature: PositiveFloat = 0.1
    """Softmax temperature of the student (eq. 1; DINO)."""
    teacher_temperature: Annotated[tuple[PositiveFloat, PositiveFloat], Pair] = (0.04, 0.04)
    """Softmax temperature of the teacher, at the start of the warmup and after it (section 3.1; DINO)."""
    teacher_temperature_warmup: NonNegativeFloat = 0
    """Epochs in which the teacher's temperature goes linearly from its first value to its second."""
    center_momentum: Share = 0.9
    """Momentum of the centers of the teacher's logits, per step (DINO)."""


@dataclass(config=SETTINGS)
class Clustering:
    """Clustering into `head.prototypes` clusters while training: `method: swav` (Caron et al. 2020) and `method: leopart`
    (Ziegler & Asano 2022)."""

    epsilon: Annotated[float, Field(ge=0.02)] = 0.05
    """Temperature of the assignments to clusters; a larger one makes them softer (both papers: 0.05)."""
    iterations: PositiveInt = 3
    """Number of Sinkhorn iterations that balance the clusters (both papers: 3)."""
    queue: NonNegativeInt = 0
    """Number of embeddings of earlier steps, over all devices and for each teacher view, that are balanced together with the
    batch as soon as there are so many (Leopart: 8,192; SwAV with a small batch: 3,840). 0 means no queue."""
    queue_start_epochs: NonNegativeFloat = 0
    """Epochs before the queue is filled and used (Leopart: 0; SwAV: 15)."""
    mask: Literal["foreground", "background", "all"] = "foreground"
    """Patches that are in the loss and the queue of `leopart`: those that the teacher's [CLS] attends to, the others, or all
    (Leopart: foreground)."""
    feature: Literal["cls", "mean"] = "cls"
    """What represents a view in `swav`: [CLS], or the mean of the patch tokens."""
    head_lr_factor: PositiveFloat = 1.0
    """Learning rate of head and prototypes, as a multiple of the backbone's (Leopart: 10)."""


@dataclass(config=SETTINGS)
class Contrast:
    """Contrastive losses. `method: mocov2` (He et al. 2020; Chen et al. 2020), `densecl` (Wang et al. 2021) and `mocov3`
    (Chen, Xie & He 2021) use them. The key network is a moving average with `optim.teacher_momentum`."""

    queue: PositiveInt = 65536
    """Number of keys in each queue, a multiple of `optim.global_batch_size` (MoCo: 65,536). It should be well below the
    number of images, or an image meets its own older key as a negative. `mocov3` has no queue."""
    temperature: PositiveFloat = 0.2
    """Softmax temperature (MoCo-v2, DenseCL and MoCo-v3's ViTs: 0.2)."""
    feature: Literal["cls", "mean"] = "cls"
    """What an image's head gets: [CLS] (MoCo-v3), or the mean of the patch tokens (DenseCL: the mean of its map)."""
    dense_weight: Share = 0.5
    """Weight λ of the loss of patches; that of images has weight 1 - λ (DenseCL: 0.5). Only `densecl` uses it."""
