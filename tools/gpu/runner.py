"""Runs parts one after the other, each in a process group of its own with a time limit.

Whatever ends one part, the next begins.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.metrics import append_jsonl
from tools.gpu.part import NOT_HERE
from tools.gpu.parts import SLACK, Part, Setting

DONE, FAILED, LACKING = "done", "failed", "not run"
SHORTEST = 5  # seconds: with less time left no part is started


def run_parts(parts: Sequence[Part], setting: Setting, log: Path, seconds: float) -> list[dict[str, Any]]:
    """Run the parts within `seconds` in total. Appends their rows to setting.out, after each part a row with its status, and
    all output of their processes to `log`. Returns the rows with the statuses."""
    end, statuses = time.monotonic() + seconds, []
    for part in parts:
        print(f"{part.name:<13} {part.question} ...", flush=True)
        start = time.monotonic()
        left = end - start
        if left < SHORTEST:
            status, why = LACKING, f"the time was over; --parts {part.name} runs it alone"
        else:
            status, why = _run_part(part, setting, log, min(part.seconds * (SLACK if setting.tiny else 1), left))
        row: dict[str, Any] = {"part": part.name, "status": status, "seconds": round(time.monotonic() - start, 1)}
        row |= {"why": why} if why else {}
        append_jsonl(Path(setting.out), row)
        statuses.append(row)
        print(f"{'':<13} {status}, {row['seconds']:.0f} s{f': {why}' if why else ''}", flush=True)
    return statuses


def _run_part(part: Part, setting: Setting, log: Path, limit: float) -> tuple[str, str]:
    """(status, reason) of a part in its own process. All that it started is killed at its end."""
    command = [sys.executable, "-m", "tools.gpu.part", part.name, part.function, json.dumps(setting)]
    with open(log, "ab+") as output:
        output.write(f"\n===== {part.name}\n".encode())
        output.flush()
        begin = output.tell()
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return FAILED, f"no end within {limit:.0f} s; its rows up to then are kept"
        finally:
            _kill_group(process)
        output.seek(begin)
        lines = output.read().decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), f"exit code {code}, and no word")
    if code == 0:
        return DONE, ""
    if code == NOT_HERE:
        return LACKING, last
    return FAILED, f"ended by {signal.Signals(-code).name}; {last}" if code < 0 else last


def _kill_group(process: subprocess.Popen) -> None:
    """Kill a process and all that it started; those that have ended are no error."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
