"""Text <-> the tree of a config.

Scalars are those of YAML 1.2: `true` and `false` are the only booleans, `1e-3` is a number.
Aliases and tags are refused, repeated keys are reported, and nothing is looked up anywhere: `${oc.env:HOME}` is a text.
"""

import re
from typing import Any

import yaml

from runtime.errors import UserError

MAX_SIZE = (
    100_000  # characters or bytes of a config; ours have 4,000 at most, and the parser needs a second for so many
)
NUMBER = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"


class Loader(yaml.SafeLoader):
    """A SafeLoader that can do less. A few lines of aliases could fill the memory."""

    def __init__(self, text: str):
        super().__init__(text)
        self.repeated: list[str] = []  # one message for each key that appears again

    def compose_node(self, parent, index):  # type: ignore[override]
        event = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.events.AliasEvent):
            raise yaml.YAMLError(f"line {line}: aliases (*{event.anchor}) are not allowed")
        if getattr(event, "tag", None) is not None:
            raise yaml.YAMLError(f"line {line}: tags ({event.tag}) are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        first: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.YAMLError(f"line {line}: a key must be a word, this is a {key.id}")
            key.tag = "tag:yaml.org,2002:str"
            if key.value in first:
                self.repeated.append(f"line {line}: '{key.value}' appears twice (first in line {first[key.value]})")
            first.setdefault(key.value, line)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or 1.2 would read as something else than a text."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in rules if tag.endswith(":null")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _class in (Loader, Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|false)$"), list("tf"))
    _class.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
    _class.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^{NUMBER}$"), list("-+.0123456789"))
Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(node.value))


def parse(text: str, name: str) -> tuple[Any, list[str]]:
    """(the tree, a message for each repeated key). Raises UserError where the text is not YAML."""
    if len(text) > MAX_SIZE:
        raise UserError(f"{name}: {len(text):,} characters are too many for a config (at most {MAX_SIZE:,})")
    try:
        loader = Loader(text)
        tree = loader.get_single_data()
    except RecursionError:
        raise UserError(f"{name}: brackets inside brackets, nested too deep for a config") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{name}: {' '.join(str(error).split())}") from None
    return tree, loader.repeated


def dump(tree: Any) -> str:
    """The tree as text that `parse` reads back."""
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False)
