"""Types and bounds that the schema uses beside pydantic's own."""

import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from runtime.methods import METHODS

SETTINGS = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)  # of every section


def as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def as_text(value: Any) -> Any:
    """A folder may be called 2026."""
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def rule(text: str, holds: Callable[[Any], bool]) -> AfterValidator:
    """A bound that pydantic has no word for. Messages and docs say `text`."""

    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(text)
        return value

    check.__doc__ = text
    return AfterValidator(check)


def _is_method(name: str) -> bool:
    return name in METHODS or re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name) is not None


WINDOW = rule("two numbers 0 < low <= high <= 1", lambda pair: 0 < pair[0] <= pair[1] <= 1)
RATIO = rule("two numbers 0 < low <= high", lambda pair: 0 < pair[0] <= pair[1])
METHOD = rule(f"one of {', '.join(METHODS)}, or module:Class", _is_method)
Share = Annotated[float, Field(ge=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
Shares = Annotated[list[Share], BeforeValidator(as_list, json_schema_input_type=Share | list[Share])]
Text = Annotated[str, BeforeValidator(as_text, json_schema_input_type=str | float)]
Texts = Annotated[list[Text], BeforeValidator(as_list, json_schema_input_type=Text | list[Text])]
Pair = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)  # yaml has no tuples
