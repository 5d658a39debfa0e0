"""The command that the user typed, with more words at its end: for messages that end with a command to copy."""

import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

# of `make pretrain`, `make table1` and `make tables`, in the order of their documentation; make exports the given ones
VARIABLES = ("CONFIG", "SHARDS", "VAL", "GPUS", "RESTARTS", "RUN", "METHOD", "TABLE", "SCALE", "SEEDS")
ALLOW = "--allow-change"


def again(*more: str) -> str:
    """The command that started this process, with `more` at its end. A word a.b=c replaces an earlier one of its key, and
    --allow-change KEY is there once."""
    started = os.environ.get("STARTED_BY")  # set by the Makefile, which gives train.py other words than the user typed
    if started:
        given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
        defaults = {"CONFIG": "configs/demo.yaml", "RUN": f"runs/{_run_name(given)}"}
        words = [f"{name}={shlex.quote(value)}" for name, value in given.items() if value != defaults.get(name)]
        arguments = shlex.join(_replace(shlex.split(os.environ.get("ARGS", "")), more))
        return " ".join([started, *words, *([f"ARGS={_quote(arguments)}"] if arguments else [])])
    program, *words = sys.argv
    if Path(program).name == "__main__.py" and (spec := sys.modules["__main__"].__spec__):  # started by -m
        return f"python -m {shlex.join([spec.name.removesuffix('.__main__'), *_replace(words, more)])}"
    # what torchrun itself was given is not known here
    launcher = "torchrun …" if "TORCHELASTIC_RUN_ID" in os.environ else "python"
    return f"{launcher} {shlex.join([program, *_replace(words, more)])}"


def _run_name(given: dict[str, str]) -> str:
    """The run folder in runs/ that the Makefile takes if none is given."""
    return Path(given.get("CONFIG", "demo")).stem + (f"-{given['METHOD']}" if "METHOD" in given else "")


def _quote(text: str) -> str:
    """`shlex.quote`, in double quotes where that is easier to read."""
    return f'"{text}"' if "'" in text and not {*text} & {*'"$`\\!'} else shlex.quote(text)


def _replace(words: list[str], more: tuple[str, ...]) -> list[str]:
    """`words` and `more`, without the arguments of `words` that `more` has too."""
    replaced = {_name(argument) for argument in _arguments(more)}
    kept = (argument for argument in _arguments(words) if _name(argument) not in replaced)
    return [word for argument in kept for word in argument] + [*more]


def _arguments(words: Iterable[str]) -> list[list[str]]:
    """The words, --allow-change together with its key."""
    arguments: list[list[str]] = []
    for word in words:
        if arguments and arguments[-1] == [ALLOW]:
            arguments[-1].append(word)
        else:
            arguments.append(word.split("=", 1) if word.startswith(f"{ALLOW}=") else [word])
    return arguments


def _name(argument: list[str]) -> str:
    """What an argument is about: `a.b` of a.b=c, else all of it."""
    return argument[0].partition("=")[0] if "=" in argument[0] else " ".join(argument)
