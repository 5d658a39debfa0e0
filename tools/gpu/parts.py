"""The parts of `python -m tools.gpu`, in the order in which they run: what each one answers, and its time limit.

Light: nothing here imports torch.
"""

from typing import Any, NamedTuple


class NotHere(Exception):
    """A part cannot run on this machine. The message says what is missing and how to get it."""


class Setting(NamedTuple):
    """What every part gets."""

    tiny: bool  # tiny networks and pictures: every line runs, no figure means anything
    shards: str  # a folder of shards; the part `photos` writes them if there are none
    scratch: str  # a folder for files that are not kept
    out: str  # the file of the rows

    @property
    def backend(self) -> str:
        """What compiles. Inductor's C++ for a CPU takes minutes: at the tiny size the step is traced and not translated."""
        return "aot_eager" if self.tiny else "inductor"


class Part(NamedTuple):
    name: str
    function: str  # module:function, called with (Setting, Report) in a process of its own
    seconds: int  # its limit
    question: str


SLACK = 5  # times its limit for a part at the tiny size: a CPU may be shared, and torch's start alone takes seconds


def _part(name: str, module: str, seconds: int, question: str) -> Part:
    return Part(name, f"tools.gpu.{module}:{name}", seconds, question)


PARTS = (
    _part("machine", "machine", 60, "which versions and device; its own peaks of arithmetic and memory"),
    _part("photos", "machine", 90, "painted scenes as shards, if no others are given"),
    _part("equal", "equal", 150, "one step: compiled = eager = float64 on the CPU"),
    _part("waits", "equal", 90, "recompilations, graph breaks, waits of the host"),
    _part("speed", "speed", 240, "ViT-S, ViT-Ti, ViT-B: the step beside the naive form, shares of the peak, memory"),
    _part("decode", "decode", 120, "DALI on the GPU: the CPU reader's batches, photos per second"),
    _part("training", "training", 120, "train.py's loop: data wait and headspace"),
    _part("resume", "training", 150, "a killed run resumes with the same bits; a profile"),
    _part("pieces", "pieces", 90, "colors, losses by chunk, attention by kernel"),
    _part("processes", "processes", 60, "NCCL: reductions, and DDP's step = one process's"),
    _part("alternatives", "speed", 180, "other settings of the compiler and of attention, in the whole step"),
)


class Report:
    """Appends a part's rows to the file as they come."""

    def __init__(self, part: str, setting: Setting):
        self.part, self.out = part, setting.out
        self.judges_speed = not setting.tiny
        self.wrong: list[str] = []  # rows that a correct program would have reached

    def row(
        self,
        what: str,
        value: Any = None,
        unit: str = "",
        beside: str = "",
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        required: bool = False,
        **details: Any,
    ) -> None:
        """Append one row. at_least, at_most: its target. required: a value beyond it is an error, at any size; without it a
        target is one of speed, which a tiny size does not judge. beside: the alternative, in words and figures."""
        from pathlib import Path

        from runtime.metrics import append_jsonl

        row: dict[str, Any] = {"part": self.part, "what": what, "value": _short(value), "unit": unit}
        bound, sign = (at_least, "≥") if at_least is not None else (at_most, "≤")
        if bound is not None:
            row["target"] = f"{sign} {bound:g}"
        if bound is not None and (required or self.judges_speed):
            number = float("nan") if value is None else float(value)
            row["reached"] = bool(number >= bound if at_least is not None else number <= bound)
            if required and not row["reached"]:
                self.wrong.append(f"{what}: {row['value']} {unit}, wanted {row['target']}")
        append_jsonl(Path(self.out), row | ({"beside": beside} if beside else {}) | details)


def _short(value: Any) -> Any:
    """A float with 4 significant digits."""
    return float(f"{value:.4g}") if isinstance(value, float) else value
