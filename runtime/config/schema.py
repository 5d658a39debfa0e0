"""Every value of a config: its type, its bounds, its default, and one docstring that says what it means.

pydantic reads all four. `docs/reference/config.md` and `configs/schema.json` are written from them by
`make docs-reference`. Rules between several values are in checks.py. "DINO" is Caron et al. 2021; section, equation and
table numbers are those of the DenseDINO paper (arXiv:2306.04654).
"""

from dataclasses import fields, replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from runtime.config.bounds import (
    ARCHITECTURE,
    METHOD,
    RATIO,
    SETTINGS,
    SIDE,
    WINDOW,
    Deviations,
    Loggers,
    Pair,
    Share,
    ShareBelowOne,
    Shares,
    Text,
    as_list,
    default_loggers,
    one_or_several,
    patch_of,
)
from runtime.config.evaluation import Eval
from runtime.config.objectives import Clustering, Contrast, Head, Loss, Reference
from runtime.methods import uses_points
from runtime.pixels import Pixels, usual

TEACHERS = 2  # T: the method has two teacher views (eq. 2, eq. 3)
# every key and section of Config is in one of the two; a resume refuses a changed value of the first
RESULT_SECTIONS = ("method", "seed", "data", "model", "reference", "head", "loss", "clustering", "contrast", "optim")
OTHER_SECTIONS = ("speed", "run", "eval")
NON_RESULT_KEYS = (
    "data.shards",
    "data.val",
    "data.max_corrupt",
    "data.max_missing",
)  # where images are, when to give up
PLACES = ("data.shards", "data.val", "model.init", "speed.cache", "eval.voc")  # values that may be paths

# ------------------------------------------------------------------------------------------ sections that change results


@dataclass(config=SETTINGS)
class Views:
    """A group of views that have one size and one recipe."""

    count: PositiveInt = 2
    """Number of views in this group."""
    size: Annotated[PositiveInt, SIDE] = 224
    """Height and width of a view, in pixels. It must be a multiple of `model.patch`."""
    scale: Annotated[tuple[float, float], Pair, WINDOW] = (0.25, 1.0)
    """Smallest and largest area of a view's window, as a share of the image (Table 2: global views 0.4 to 1, local views
    0.05 to 0.4; the published command: 0.25 to 1)."""
    teacher: bool = False
    """Whether the teacher sees these views too. The teacher has two views in all, and they come first (section 3.1)."""
    blur: Shares = Field(default_factory=lambda: [0.5])
    """Probability of Gaussian blur. Give one number for all views of the group, or one for each (DINO)."""
    solarize: Shares = Field(default_factory=lambda: [0.0])
    """Probability of solarization. Give one number for all views of the group, or one for each (DINO)."""


BY_VIEW = tuple(field.name for field in fields(Views) if field.type is Shares)  # one value, or one for each view


@dataclass(config=SETTINGS)
class Jitter:
    """Color jitter, as in DINO."""

    probability: Share = 0.8
    """Probability that a view's colors are jittered."""
    brightness: NonNegativeFloat = 0.4
    """Largest relative change of brightness."""
    contrast: NonNegativeFloat = 0.4
    """Largest relative change of contrast."""
    saturation: NonNegativeFloat = 0.2
    """Largest relative change of saturation."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Largest change of hue, as a share of the full color circle."""


@dataclass(config=SETTINGS)
class Source:
    """One of several sources of photos: a mixture. A place by itself, without `path:`, is a source without a weight."""

    path: Text = ""
    """A folder of shards, or an address."""
    weight: PositiveFloat | None = None
    """Share of the images that come from this source, up to a factor that all sources have in common: with 2 and 1, two of
    three images. Either all sources have one or none; without weights every photo comes once an epoch."""


@dataclass(config=SETTINGS)
class Data:
    """Images, views and augmentation."""

    shards: one_or_several(Source, Text) | None = None  # type: ignore[valid-type]
    """Shards to train on: a folder, or an address (s3://, gs://, az://, hf://, https://); or a list of these, each
    with a weight if you like: `[{path: data/a, weight: 2}, {path: data/b, weight: 1}]`. An epoch has as many images as all
    sources have samples; no photo comes again before all of its source were seen."""
    val: Text | None = None
    """Shards to evaluate on: a folder or an address. Without it, `data.holdout` of the training shards is held out."""
    holdout: ShareBelowOne = 0.02
    """Share of the training samples that is held out for evaluation. It is used only where `data.val` is not set."""
    views: Annotated[list[Views], BeforeValidator(as_list)] = Field(
        default_factory=lambda: [
            Views(2, 224, (0.25, 1.0), True, [1.0, 0.1], [0.0, 0.2]),
            Views(2, 224, (0.25, 1.0), False, [0.5], [0.0]),
        ]
    )
    """Groups of views. Groups of one size are next to each other, and those of the teacher come first (section 4.1:
    4 views of 224 pixels)."""
    min_overlap: Share = 0.01
    """Smallest area that a teacher view shares with any other view, as a share of the image. Two teacher views share at
    least twice as much. 0 allows any windows (section 3.3 asks for a lower bound; 0.01 is the published code's)."""
    aspect: Annotated[tuple[float, float], Pair, RATIO] = (3 / 4, 4 / 3)
    """Smallest and largest ratio of a window's width to its height (DINO)."""
    flip: Share = 0.5
    """Probability that a view is mirrored horizontally (DINO)."""
    jitter: Jitter = Field(default_factory=Jitter)
    """Color jitter (DINO)."""
    grayscale: Share = 0.2
    """Probability that a view loses its colors (DINO)."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """How a window is resized to its view, antialiased (DINO: bicubic; Leopart and SwAV: bilinear)."""
    channels: Literal[1, 3] = 3
    """Channels that the network takes of a photo: 3 (red, green, blue), or 1, its gray after the color recipe. A gray photo
    has three equal channels."""
    mean: Shares = Field(default_factory=lambda values: list(usual(values["channels"]).mean))
    """Mean of each channel, of values from 0 to 1. It is subtracted (ImageNet's; for one channel their mean, 0.449)."""
    std: Deviations = Field(default_factory=lambda values: list(usual(values["channels"]).std))
    """Standard deviation of each channel, which the difference is divided by (ImageNet's; for one channel their mean,
    0.226)."""
    max_corrupt: Share = 0.001
    """Largest share of an epoch's samples that may be corrupt. The run stops when there are more."""
    max_missing: Share = 0.0
    """Largest share of the samples, of each source, that missing or truncated shards may hold. The run does not start when
    it is more."""

    @property
    def sources(self) -> list[Source]:
        """What `shards` names, as a list."""
        if isinstance(self.shards, list):
            return self.shards
        return [] if self.shards is None else [Source(self.shards)]


@dataclass(config=SETTINGS)
class Model:
    """The vision transformer."""

    arch: Annotated[str, ARCHITECTURE] | None = None
    """Size of the network. `custom` takes `model.width`, `model.depth` and `model.heads` (section 4.1: ViT-Small for the
    main results, ViT-Tiny for the ablations). A name of timm is a VisionTransformer with [CLS] and learned positions, such
    as vit_large_patch16_224 or vit_small_patch14_reg4_dinov2. Its positions are made for the largest view. Without it, the
    architecture is that of the weights in `model.init`, or vit_small."""
    patch: PositiveInt = Field(default_factory=lambda values: patch_of(values["arch"]))
    """Height and width of a patch, in pixels (section 4.1: 16). Where it is not given, it is that of timm's name in
    `model.arch`, or 16."""
    width: PositiveInt | None = None
    """Width of a token, D. `model.arch: custom` needs it, a name of timm may have another than its own. It must be
    divisible by `model.heads`."""
    depth: PositiveInt | None = None
    """Number of transformer blocks, as `model.width`."""
    heads: PositiveInt | None = None
    """Number of attention heads, as `model.width`."""
    drop_path: ShareBelowOne = 0.1
    """Largest drop path rate of the student, reached in the last block (DINO)."""
    init: Text | None = None
    """Weights to start from: a file, a run folder or timm:NAME. Without it the network starts from random weights."""

    def __post_init__(self) -> None:
        if self.arch is None and self.init is None:
            self.arch = "vit_small"


@dataclass(config=SETTINGS)
class Optim:
    """Optimizer and schedules (section 4.1: as DINO)."""

    global_batch_size: PositiveInt = 256
    """Images in one step, over all devices and all pieces of `speed.grad_accum_steps`."""
    epochs: PositiveFloat = 100
    """Length of the training, in epochs (section 4.1: 300 for ViT-Small, 100 for ViT-Tiny)."""
    lr: PositiveFloat = 5e-4
    """Highest learning rate for each 256 images of `optim.global_batch_size`. It is reached after the warmup."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor of the learning rate from one layer to the one below it: the heads and the last norm have `lr`, a block has
    this factor of the block above it, positions and the patch filter have the least. 1 means the same rate everywhere (BEiT,
    for continued training; DINOv2: 0.9)."""
    min_lr: NonNegativeFloat = 1e-6
    """Learning rate at the end of the training. It is not scaled by the batch size."""
    warmup_epochs: NonNegativeFloat = 10
    """Epochs in which the learning rate grows linearly from 0."""
    weight_decay: Annotated[tuple[NonNegativeFloat, NonNegativeFloat], Pair] = (0.04, 0.4)
    """Weight decay at the start and at the end of the training. In between it follows a cosine."""
    clip_grad: NonNegativeFloat = 3.0
    """Largest norm of each gradient tensor, clipped one by one. 0 means no clipping."""
    freeze_last_layer_epochs: NonNegativeFloat = 1
    """Epochs at the start in which the last layer of the heads is not trained."""
    teacher_momentum: Share = 0.996
    """Momentum of the teacher's weights at the start, per step. It follows a cosine to 1 at the end."""


# ---------------------------------------------------------------------------------- sections that do not change results


@dataclass(config=SETTINGS)
class Speed:
    """Devices, precision and data loading. Nothing here changes what a step sees or learns, except by rounding and by the
    reader's decoder (at most 2 of 255)."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device to train on. `auto` takes a GPU where there is one."""
    precision: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Arithmetic of the networks. `auto` is bfloat16 on a GPU that has it, and float32 elsewhere."""
    compile: bool = True
    """Whether the networks and losses are compiled by torch.compile."""
    grad_accum_steps: PositiveInt = 1
    """Number of equal pieces that a step's images are processed in. More pieces need less memory."""
    activation_checkpointing: bool = False
    """Whether activations are computed again in the backward pass. It needs less memory and about a third more work."""
    reader: Literal["auto", "dali", "wds"] = "auto"
    """Program that reads and decodes images: NVIDIA DALI, or WebDataset on the CPU. `auto` takes DALI for a GPU,
    where it is installed."""
    workers: NonNegativeInt = 1
    """Processes that read and decode, for each device; at most one for each core. 0: a thread of the training process."""
    prefetch: PositiveInt = 2
    """Batches that each worker keeps ready."""
    dali_threads: PositiveInt = 4
    """CPU threads of DALI for each device."""
    hw_decoder_load: Share = 0.65
    """Share of the images that the GPU's JPEG engine decodes, on a GPU that has one. Only for DALI."""
    cache: Text | None = None
    """Folder for shards from addresses (s3://, https://, ...). By default it is ~/.cache/densedino."""
    cache_gb: PositiveFloat = 100
    """Largest size of `speed.cache`, in GB. All processes of a machine share it."""
    read_timeout: PositiveFloat = 30
    """Seconds without a byte from the server after which a download is tried again."""


@dataclass(config=SETTINGS)
class Run:
    """The run folder: logs, checkpoints and limits."""

    folder: Text | None = None
    """Folder that the run writes into. By default it is runs/ and the name of the config file."""
    log_every: PositiveInt = 10
    """Steps between two rows of metrics.jsonl. Metrics are read from the device only then."""
    checkpoint_every: PositiveInt = 1000
    """Steps between two checkpoints."""
    keep_checkpoints: PositiveInt = 2
    """Number of newest checkpoints that are kept."""
    step_timeout: PositiveFloat = 600
    """Seconds that a step, or a wait for a batch, may take before the run is ended; the first may take 10 times as long."""
    grace: NonNegativeFloat = 25
    """Seconds that a run has to save itself after a stop signal. torchrun kills its processes after 30."""
    loggers: Loggers = Field(default_factory=default_loggers)
    """Where metrics go (docs/howto/follow-a-run.md). metrics.jsonl is always written, named or not."""
    log_samples: bool = False
    """Whether samples.jsonl records the samples of each step (process r > 0: samples-r.jsonl)."""
    max_nonfinite_steps: PositiveInt = 10
    """The run stops after this many steps in a row whose loss or gradient is not finite."""
    profile: bool = False
    """Whether steps 10 to 12 of this start are profiled into profile/: a trace and a table of the time."""


@dataclass(config=SETTINGS)
class Config:
    """A whole training run."""

    method: Annotated[str, METHOD] = "densedino"
    """Training method: one of runtime/methods.py, or module:Class for a method of your own (model/methods/base.py)."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of everything random: weights, order of samples, windows, points, colors, drop path."""
    data: Data = Field(default_factory=Data)
    model: Model = Field(default_factory=Model)
    reference: Reference = Field(default_factory=Reference)
    head: Head = Field(default_factory=Head)
    loss: Loss = Field(default_factory=Loss)
    clustering: Clustering = Field(default_factory=Clustering)
    contrast: Contrast = Field(default_factory=Contrast)
    optim: Optim = Field(default_factory=Optim)
    speed: Speed = Field(default_factory=Speed)
    run: Run = Field(default_factory=Run)
    eval: Eval = Field(default_factory=Eval)

    @property
    def views(self) -> list[Views]:
        """One entry (count 1) for each view, the two teacher views first."""
        views: list[Views] = []
        for group in self.data.views:
            for i in range(group.count):
                lists = ((name, getattr(group, name)) for name in BY_VIEW)
                own: dict[str, Any] = {name: [values[i % len(values)]] for name, values in lists}
                views.append(replace(group, count=1, **own))
        return views

    @property
    def points(self) -> int:
        """M, the points of each pair (teacher view, other view); 0 if the method has no reference tokens.

        Raises UserError if `method` is a module:Class that cannot be imported.
        """
        return self.reference.points if uses_points(self.method) else 0

    @property
    def pixels(self) -> Pixels:
        """What the network takes of a photo."""
        return Pixels(tuple(self.data.mean), tuple(self.data.std))

    def steps(self, steps_per_epoch: int) -> int:
        """Length of the training, in steps."""
        return max(1, round(self.optim.epochs * steps_per_epoch))

    @property
    def image_size(self) -> int:
        """Size of the largest view. The position grid is made for it."""
        return max(g.size for g in self.data.views)
