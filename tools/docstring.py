"""Help texts without imports: a program's help is its module's docstring, read from the file."""

import argparse
import ast
import importlib.util
from pathlib import Path


def read_docstring(module: str) -> str:
    """The docstring of a module, which is not imported: its imports may take seconds."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""


def make_parser(prog: str, module: str) -> argparse.ArgumentParser:
    """A parser for `python -m PROG` whose help is the docstring of `module`, printed as written."""
    return argparse.ArgumentParser(
        f"python -m {prog}",
        description=read_docstring(module),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_command(
    commands: "argparse._SubParsersAction", module: str, name: str, summary: str
) -> argparse.ArgumentParser:
    """A subcommand whose help is the docstring of `module`."""
    return commands.add_parser(
        name,
        help=summary,
        description=read_docstring(module),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
