"""Which process makes the others wait: the time of its forward passes.

A step ends when the slowest process is done, so the images/s of all processes are equal, and a process that waits for others
in a reduction looks as slow as the one it waits for. In the data wait and in the forward pass a process waits for no other
(but in those of SwAV, Leopart and MoCo-v3, whose losses reduce over all processes). So these two are compared.
"""

import time
from typing import Any

import torch
from torch import nn


class ForwardTime:
    """Seconds of a method's forward passes, measured around the module: the step knows nothing of it, and nothing waits.

    On a GPU it is the device's time between two events. The first pass is not counted: it compiles.
    """

    def __init__(self, method: nn.Module, device: torch.device):
        self._gpu, self._passes = device.type == "cuda", 0
        self._begun, self._seconds = 0.0, 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        method.register_forward_pre_hook(self._begin)
        method.register_forward_hook(self._end)

    def read(self) -> float:
        """Seconds since the last call. On a GPU: of the passes that the device has finished; it waits for none."""
        while self._events and self._events[0][1].query():
            begin, end = self._events.pop(0)
            self._seconds += begin.elapsed_time(end) / 1000
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _begin(self, *_: Any) -> None:
        self._passes += 1
        self._begun = time.perf_counter()
        if self._gpu and self._passes > 1:
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._events[-1][0].record()

    def _end(self, *_: Any) -> None:
        if self._gpu and self._passes > 1:
            self._events[-1][1].record()
        elif self._passes > 1:
            self._seconds += time.perf_counter() - self._begun
