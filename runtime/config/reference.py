"""Write docs/reference/config.md and configs/schema.json from the schema: `make docs-reference`."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from runtime.config.bounds import ARCH, SIZES
from runtime.config.load import adapter
from runtime.config.messages import choices, expected, unwrap
from runtime.config.schema import RESULT_SECTIONS, Config
from runtime.methods import METHODS

ROOT = Path(__file__).parents[2]
HEAD = """# Config reference

Written by `make docs-reference` from `runtime/config/schema.py`. Edit it there.

A config is a YAML file. `base: other.yaml` takes the values of another file first, and words such as `optim.lr=1e-3` on the
command line come last. Scalars are those of YAML 1.2.
Where a list of numbers is expected, a single number is a list of one.
`python train.py CONFIG --dry-run` prints what a config would train.

Section numbers and equations are those of the DenseDINO paper (arXiv:2306.04654). "DINO" is Caron et al. 2021.
"""


def markdown() -> str:
    """docs/reference/config.md: a table for each section."""
    parts = [HEAD]
    titles = {True: "## Sections that change results", False: "## Sections that do not change results"}
    last = None
    for prefix, section in _sections(Config):
        changes = not prefix or prefix.split(".")[0] in RESULT_SECTIONS
        if changes is not last:
            parts.append(f"{titles[changes]}\n")
            last = changes
        parts.append(f"### `{prefix}`\n\n{_text(section.__doc__)}\n" if prefix else "### Top level\n")
        rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
        rows += [f"| {' | '.join(row)} |" for row in _rows(prefix, section)]
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


def _sections(section: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """(key, class) of a section and of those inside it, parents first; `data.views.N` for a group of views."""
    yield prefix, section
    for name, hint in get_type_hints(section, include_extras=True).items():
        for kind, _ in map(unwrap, choices(hint)):
            if dataclasses.is_dataclass(kind):
                yield from _sections(kind, f"{prefix}.{name}".lstrip("."))  # type: ignore[arg-type]
            elif get_origin(kind) is list and dataclasses.is_dataclass(element := get_args(kind)[0]):
                yield from _sections(element, f"{prefix}.{name}.N")  # type: ignore[arg-type]


def _rows(prefix: str, section: Any) -> Iterator[tuple[str, str, str, str]]:
    """(key, type and bounds, default, meaning) of each value of a section."""
    defaults = section()
    for name, hint in get_type_hints(section, include_extras=True).items():
        key, default = f"{prefix}.{name}".lstrip("."), getattr(defaults, name)
        if dataclasses.is_dataclass(default):
            continue
        what = expected(hint) + (", or null" if type(None) in get_args(hint) else "")
        shown = "2 groups of 2" if key == "data.views" else f"`{_value(default)}`"
        yield f"`{key}`", what, shown, _text(section.__pydantic_fields__[name].description)


def _value(value: Any) -> str:
    """A default as it is written in YAML."""
    if isinstance(value, tuple):
        return f"[{', '.join(f'{number:g}' for number in value)}]"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) and value else json.dumps(value)


def _text(docstring: str | None) -> str:
    return " ".join((docstring or "").split()).replace("|", "\\|")


class _Generator(GenerateJsonSchema):
    """JSON schema as YAML language servers of any age read it."""

    def tuple_schema(self, schema: core_schema.TupleSchema) -> JsonSchemaValue:
        """All elements of our tuples have one type: `items`, not `prefixItems`, which draft 7 does not have."""
        written = super().tuple_schema(schema)
        if prefix := written.pop("prefixItems", None):
            written["items"] = prefix[0]
        return written


def json_schema() -> str:
    """configs/schema.json: what an editor completes and checks our YAML with."""
    schema = adapter().json_schema(schema_generator=_Generator)
    for part in (schema, *schema["$defs"].values()):
        for name, value in part["properties"].items():
            value.pop("title", None)
            if "description" in value:
                value["description"] = _text(value["description"])
            if name == "views" and value.get("type") == "array":  # one group may stand without a list
                value["anyOf"] = [{"type": "array", "items": value["items"]}, value["items"]]
                del value["type"], value["items"]
    schema["properties"]["method"] |= {"anyOf": [{"enum": [*METHODS]}, {"pattern": "^[A-Za-z_][\\w.]*:[A-Za-z_]\\w*$"}]}
    arch = schema["$defs"]["Model"]["properties"]["arch"]
    arch |= {"anyOf": [{"enum": [*SIZES]}, {"pattern": f"^{ARCH.pattern}$"}]}
    base = {"type": "string", "description": "Another config, relative to this one. Its values are taken first."}
    schema["properties"] = {"base": base, **schema["properties"]}
    schema["title"] = "DenseDINO config"
    return (
        json.dumps({"$schema": "http://json-schema.org/draft-07/schema#", **schema}, indent=2, ensure_ascii=False)
        + "\n"
    )


FILES = {"docs/reference/config.md": markdown, "configs/schema.json": json_schema}


def main() -> None:
    """Write both files; with --check, exit with 1 where one is not up to date."""
    old = []
    for name, write in FILES.items():
        path, text = ROOT / name, write()
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        old.append(name)
        if "--check" not in sys.argv:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            print(f"wrote {name}")
    if old and "--check" in sys.argv:
        sys.exit(f"not up to date: {', '.join(old)}. Run `make docs-reference`")


if __name__ == "__main__":
    main()
