"""What a word that `make` does not know may have meant: the message of the Makefile's refusal.

    python -m tools.make_words --goals 'pretrain' --targets '…' --takes '…' --variables '…' -- pretrian EPOCHS=3

goals: the known targets of the command line; takes: the variables that they take; variables: those of any target. It may
run before anything is installed, so it imports nothing but the standard library.
"""

import argparse
import difflib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from runtime.errors import suggest

SCHEMA = Path(__file__).parents[1] / "configs" / "schema.json"


def config_keys(schema: dict, node: dict, prefix: str = "") -> Iterator[str]:
    """The dotted keys of configs/schema.json."""
    for name, child in node.get("properties", {}).items():
        section = schema["$defs"].get(child.get("$ref", "").rpartition("/")[2])
        if section:
            yield from config_keys(schema, section, f"{prefix}{name}.")
        else:
            yield prefix + name


def closest(word: str, known: Iterable[str]) -> tuple[float, str]:
    """(likeness from 0 to 1, word) of the known word most like `word`, whatever the case."""
    return max((difflib.SequenceMatcher(None, word.lower(), k.lower()).ratio(), k) for k in known)


def explain_target(word: str, targets: list[str]) -> str:
    if word.endswith((".yaml", ".yml")):
        return f"{word}: no such target; a config is given as CONFIG={word}"
    return f"{word}: no such target{suggest(word, targets) or '; `make` lists them'}"


def explain_variable(word: str, goals: str, takes: list[str], variables: list[str]) -> str:
    name, _, value = word.partition("=")
    if name in variables:
        return f"{name}: `make {goals or 'help'}` takes no {name}, only {', '.join(takes)}"
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    keys = {key.rpartition(".")[2]: key for key in config_keys(schema, schema)}
    keys |= {key: key for key in keys.values()}
    (near, variable), (near_key, key) = closest(name, variables), closest(name, keys)
    if near_key > max(near, 0.7) and "ARGS" in takes:
        return f"{name}: no such variable; a value of the config is given as ARGS='{keys[key]}={value}'"
    return f"{name}: no such variable" + (
        f", did you mean {variable}={value}?" if near > 0.5 else "; `make` lists them"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("goals", "targets", "takes", "variables"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("words", nargs="+")
    args = parser.parse_args()
    takes, variables = args.takes.split(), args.variables.split()
    print("; ".join(
        explain_variable(word, args.goals, takes, variables) if "=" in word else explain_target(word, args.targets.split())
        for word in args.words
    ))  # fmt: skip


if __name__ == "__main__":
    main()
