"""Types and bounds that the schema uses beside pydantic's own."""

import re
from collections.abc import Callable, Collection
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Discriminator, Field, NonNegativeFloat, Tag

from runtime.methods import METHODS

SETTINGS = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)  # of every section
# of reference.locality: below, a token between two patches attends to none of them; above, the prior changes nothing
LOCALITY = (0.1, 1e4)


def as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def as_text(value: Any) -> Any:
    """A folder may be called 2026."""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def rule(text: str, holds: Callable[[Any], bool], names: Collection[str] = ()) -> AfterValidator:
    """A bound that pydantic has no word for. Messages and docs say `text`. names: what a wrong text may have meant."""

    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(text)
        return value

    check.__doc__ = text
    check.names = names  # type: ignore[attr-defined]
    return AfterValidator(check)


SIZES = ("vit_tiny", "vit_small", "vit_base", "custom")
TIMM = "timm:"  # before the name of a model whose published weights are meant
ARCH = re.compile(r"[a-z]\w*_patch([1-9]\d{0,2})(_\w+)?")  # timm's names of ViTs, which have the patch in them
ARCHS_OF_TIMM = (  # for the nearest name; the model's own code asks timm itself
    *(f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")), "vit_huge_patch14_224",
    *(f"vit_{size}_patch{patch}_224" for size in ("small", "base") for patch in (8, 32)),
    *(f"vit_{size}_patch14_{kind}" for size in ("small", "base", "large", "giant") for kind in ("dinov2", "reg4_dinov2")),
)  # fmt: skip


def patch_of(arch: str | None) -> int:
    """The patch of an architecture: that in timm's name, else 16."""
    named = ARCH.fullmatch(arch or "")
    return int(named[1]) if named else 16


def _is_arch(name: str) -> bool:
    return name in SIZES or ARCH.fullmatch(name) is not None


def _is_method(name: str) -> bool:
    return name in METHODS or re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name) is not None


WINDOW = rule("two numbers 0 < low <= high <= 1", lambda pair: 0 < pair[0] <= pair[1] <= 1)
RATIO = rule("two numbers 0 < low <= high", lambda pair: 0 < pair[0] <= pair[1])
SIDE = rule("a whole number above 0: a view is a square", lambda side: side > 0)
METHOD = rule(f"one of {', '.join(METHODS)}, or module:Class", _is_method, METHODS)
ARCHITECTURE = rule(
    f"one of {', '.join(SIZES)}, or a name of timm's ViTs without its tag, such as vit_small_patch14_dinov2",
    _is_arch, (*SIZES, *ARCHS_OF_TIMM),
)  # fmt: skip
Share = Annotated[float, Field(ge=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
Shares = Annotated[list[Share], BeforeValidator(as_list, json_schema_input_type=Share | list[Share])]
Deviation = Annotated[float, Field(gt=0, le=1)]
Deviations = Annotated[list[Deviation], BeforeValidator(as_list, json_schema_input_type=Deviation | list[Deviation])]


def as_sources(value: Any) -> Any:
    """Places by themselves are sources too; one source with a weight needs no list."""
    if isinstance(value, list):
        return [{"path": place} if isinstance(place, (str, int, float)) else place for place in value]
    return as_sources([value]) if isinstance(value, dict) else value


def one_or_several(source: type, one: Any) -> Any:
    """The type of a place (`one`), or of a list of sources. TAGS are what pydantic puts into the path of an error."""
    written = BeforeValidator(as_sources, json_schema_input_type=list[source | one] | source)  # type: ignore[valid-type]
    several = Annotated[list[source], written, Tag(TAGS[1])]  # type: ignore[valid-type]
    choose = Discriminator(lambda value: TAGS[isinstance(value, (list, dict))])
    return Annotated[Annotated[one, Tag(TAGS[0])] | several, choose]


def number_or_section(section: type) -> Any:
    """The type of a number, or of a section that has one for each of several things."""
    choose = Discriminator(lambda value: TAGS[isinstance(value, (dict, section))])
    return Annotated[Annotated[NonNegativeFloat, Tag(TAGS[0])] | Annotated[section, Tag(TAGS[1])], choose]  # type: ignore[valid-type]


TAGS = ("<one>", "<several>")
Text = Annotated[str, BeforeValidator(as_text, json_schema_input_type=str | float)]
Texts = Annotated[list[Text], BeforeValidator(as_list, json_schema_input_type=Text | list[Text])]
LoggerName = Literal["jsonl", "tensorboard", "wandb", "mlflow"]
LOGGERS: tuple[str, ...] = get_args(LoggerName)
Loggers = Annotated[list[LoggerName], BeforeValidator(as_list, json_schema_input_type=LoggerName | list[LoggerName])]
Pair = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)  # yaml has no tuples


def default_loggers() -> list[LoggerName]:
    return ["jsonl", "tensorboard"]
