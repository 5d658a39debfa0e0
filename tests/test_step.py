"""The compiled step: after the first steps nothing is compiled again."""

import functools

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.exc import CppCompileError

from model.dense_dino import DenseDINO
from pipeline.batch import Batch, draw
from runtime import parallel
from runtime.config import Config, Head, Model, Views
from runtime.schedule import Optimizer, make_schedules


def test_nothing_is_compiled_after_the_first_steps(monkeypatch):
    """Two sizes of views, runs of views with other numbers of points, drop path, a last layer frozen at first, a
    non-finite step: graphs are counted, not timed. Traced as on any machine; no compiler is called."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(parallel, "can_compile", lambda device: None)
    torch._dynamo.reset()
    config = Config(model=Model("custom", 8, 16, 2, 2, 0.1), head=Head(24, 12, 20))
    config.data.views = [Views(2, 32, teacher=True), Views(1, 32), Views(2, 16)]
    config.reference.points = 2
    config.optim.freeze_last_layer = 0.6
    torch.manual_seed(0)
    model, schedules = DenseDINO(config), make_schedules(config, 10)
    assert schedules.frozen[5]
    assert not schedules.frozen[6]
    parallel.compile_parts(model.parts(), torch.device("cpu"))
    optimizer = Optimizer(model.student, schedules, 3.0, split_positions=True)

    def step(i: int, images: int = 4) -> int:
        ids = np.arange(images) + i
        draws = draw(config, i, ids, np.full(images, 40), np.full(images, 50))
        views = [torch.randn(n, images, 3, size, size) for n, size in ((3, 32), (2, 16))]
        log, means = model(
            Batch(i, torch.from_numpy(ids), torch.from_numpy(ids), views, **draws.tensors()), 0.04 + i / 1e3
        )
        log["loss"].backward()
        taken, _ = optimizer.step(i, torch.tensor(float(i != 4)))
        model.update_teacher(float(schedules.teacher_momentum[i]), taken)
        model.update_centers(means, taken)
        return counters["stats"]["unique_graphs"]

    counters.clear()
    after = [step(i) for i in range(9)]
    assert after[0] > 0
    assert after[2:] == [after[1]] * 7
    assert step(9, images=5) > after[-1]  # another shape is seen: the count can rise


@pytest.mark.parametrize(
    ("raised", "told"),
    [
        (
            ImportError("/tmp/torchinductor_me/ab/abc.main.so: file too short"),
            "a kill or a full disk cut this file off: remove it, or all of /tmp/torchinductor_me",
        ),
        (
            CppCompileError(["g++", "x.cpp"], "x.cpp:1: fatal error: omp.h: No such file"),
            "fatal error: omp.h: No such file",
        ),
        (ValueError(), "(ValueError: ); TORCH_LOGS=+dynamo tells more"),
    ],
)
def test_what_the_compiler_stumbled_over_is_told(raised: Exception, told: str):
    def backend(graph, inputs):
        raise raised

    with pytest.raises(RuntimeError) as failed:
        torch.compile(torch.nn.Linear(2, 2), backend=backend)(torch.ones(1, 2))
    words = parallel.compile_failure(failed.value)
    assert words is not None
    assert told in words
    assert "speed.compile=false trains without it" in words
    assert parallel.compile_failure(RuntimeError("another")) is None
