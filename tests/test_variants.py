"""Variants of the locality prior (tools/paper/variants.py): each trains, and each changes what it says it changes."""

import inspect

import numpy as np
import pytest
import torch
from conftest import losses_of

from model.methods import build
from pipeline.batch import Batch, draw
from runtime.config import load_config
from runtime.schedule import StepValues
from tools.paper import variants
from tools.paper.tables import VARIANTS

CLASSES = [name for name, c in vars(variants).items() if inspect.isclass(c) and c.__module__ == variants.__name__]
METHODS = [name for name in CLASSES if not name.startswith("_")]


def reference_loss(tiny_config, method: str, locality: str = "1") -> torch.Tensor:
    config = load_config(
        tiny_config,
        [
            f"method={method}",
            f"reference.locality={locality}",
            "speed.precision=float64",
            "data.views=[{count: 2, size: 32, teacher: true}]",
        ],
    )
    draws = draw(config, 0, np.arange(3), np.full(3, 40), np.full(3, 50))
    torch.manual_seed(0)
    views, ids = [torch.randn(2, 3, 3, 32, 32)], torch.arange(3)
    method = build(config)
    method.before_step(StepValues(teacher_momentum=1 - (1 - config.optim.teacher_momentum) / 2))
    metrics, _ = losses_of(method, Batch(0, ids, ids, views, **draws.tensors()))
    metrics["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.student.parameters() if p.requires_grad)
    return metrics["reference_loss"].detach()


def test_the_table_has_every_variant():
    used = {word.partition(":")[2] for _, words in VARIANTS.values() for word in words if word.startswith("method=")}
    assert used == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_variant_is_another_loss(name, tiny_config):
    variant = reference_loss(tiny_config, f"tools.paper.variants:{name}")
    if name == "Learned":  # starts as the fixed prior
        torch.testing.assert_close(variant, reference_loss(tiny_config, "densedino"))
    else:
        assert variant != reference_loss(tiny_config, "densedino")
    if name not in ("Learned", "CenteredTargets", "SineCosine"):  # without a prior nothing is left to vary
        without = reference_loss(tiny_config, f"tools.paper.variants:{name}", "null")
        assert without == reference_loss(tiny_config, "densedino", "null")
