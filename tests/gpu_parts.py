"""Stand-ins for the parts of `python -m tools.gpu`: each reports a row, then ends in its own way. Imports no torch."""

import ctypes
import os
import time
from pathlib import Path

from runtime.metrics import append_jsonl
from tools.gpu.parts import NotHere, Report, Setting


def fine(setting: Setting, report: Report) -> None:
    report.row("a row", 1.0, "ms")


def raises(setting: Setting, report: Report) -> None:
    fine(setting, report)
    raise ValueError("broken")


def exits(setting: Setting, report: Report) -> None:
    fine(setting, report)
    os._exit(7)


def crashes(setting: Setting, report: Report) -> None:
    fine(setting, report)
    ctypes.string_at(0)


def hangs(setting: Setting, report: Report) -> None:
    """With a child, as a part with data workers."""
    fine(setting, report)
    if child := os.fork():
        append_jsonl(Path(setting.scratch, "children.jsonl"), {"child": child})
    time.sleep(600)


def lacks(setting: Setting, report: Report) -> None:
    raise NotHere("no DALI")


def is_wrong(setting: Setting, report: Report) -> None:
    report.row("an error", 2.0, "", at_most=1, required=True)
