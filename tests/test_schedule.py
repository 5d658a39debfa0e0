"""The published optimizer in numbers worked out by hand: schedules, weight decay, clipping. Needs no file of ../shared.

Sources: DINO, Caron et al. 2021, "Implementation details", and its code (github.com/facebookresearch/dino): `utils.py`
(cosine_scheduler, get_params_groups, clip_gradients) and `main_dino.py` (DINOLoss). DenseDINO's code keeps them.
"""

import numpy as np
import pytest
import torch
from conftest import run_program

from model.methods import Method, build
from runtime.checkpoint import latest_valid
from runtime.config import Config, Head, Model, Views
from runtime.schedule import Optimizer, StepValues, decay_groups, make_schedules, with_layer_decay

BETA1 = 0.9  # of Adam: after the first step the first moment is (1 - BETA1) times the clipped gradient


def config_of(method: str = "densedino") -> Config:
    """A network of a few hundred parameters, and a run of 5 epochs without any warm-up."""
    config = Config(method=method, model=Model("custom", 8, 16, 1, 2, 0.0), head=Head(24, 12, 20))
    config.data.views = [Views(2, 16, teacher=True), Views(2, 16)]
    config.optim.global_batch_size, config.optim.epochs, config.optim.warmup_epochs = 256, 5, 0
    return config


def optimizer_of(method: Method, clip: float) -> Optimizer:
    """As train.py makes it."""
    groups, apart = method.parameter_groups(), method.clip_positions_apart
    return Optimizer(method.student, clip, groups=groups, split_positions=apart)


def test_a_cosine_begins_at_its_start_and_stops_one_step_before_its_end():
    """DINO, utils.cosine_scheduler: end + (start - end) / 2 * (1 + cos(pi * i / n)) at step i of n, so the first step has
    the start itself and no step has the end. For n = 4 the cosines are 1, 1/sqrt(2), 0 and -1/sqrt(2)."""
    config = config_of()
    config.optim.epochs, config.optim.lr, config.optim.min_lr = 4, 5.0, 1.0
    config.optim.weight_decay, config.optim.teacher_momentum = (0.04, 0.4), 0.996
    schedules = make_schedules(config, steps_per_epoch=1)
    root = np.sqrt(0.5)
    assert schedules.lr == pytest.approx([5, 3 + 2 * root, 3, 3 - 2 * root], rel=1e-12)
    assert schedules.weight_decay == pytest.approx([0.04, 0.22 - 0.18 * root, 0.22, 0.22 + 0.18 * root], rel=1e-12)
    momentum = [0.996, 0.998 - 0.002 * root, 0.998, 0.998 + 0.002 * root]
    assert schedules.teacher_momentum == pytest.approx(momentum, rel=1e-12)


def test_the_learning_rate_warms_up_from_0_to_its_peak():
    """DINO, utils.cosine_scheduler: np.linspace(0, peak, warm-up steps), both ends included; the peak is lr * batch / 256
    (main_dino.py), here 5e-4 * 512 / 256."""
    config = config_of()
    config.optim.global_batch_size, config.optim.lr, config.optim.warmup_epochs = 512, 5e-4, 2
    lr = make_schedules(config, steps_per_epoch=3).lr
    assert len(lr) == 15
    assert lr[:6] == pytest.approx([0, 0.2e-3, 0.4e-3, 0.6e-3, 0.8e-3, 1e-3], rel=1e-12)


def test_the_last_epoch_of_the_warm_up_has_the_final_teacher_temperature():
    """DINO, DINOLoss.teacher_temp_schedule: np.linspace(first, final, warm-up epochs), both ends included, read by the
    epoch. For 0.04 to 0.07 in 3 epochs: 0.04, 0.055, 0.07, then 0.07."""
    config = config_of()
    config.loss.teacher_temperature, config.loss.teacher_temperature_warmup = (0.04, 0.07), 3
    temperature = make_schedules(config, steps_per_epoch=2).teacher_temperature
    of_epochs = np.array([0.04, 0.055, 0.07, 0.07, 0.07])
    assert temperature == pytest.approx(of_epochs.repeat(2), rel=1e-12)


@pytest.mark.parametrize("method", ["dino", "densedino"])
def test_matrices_and_tokens_decay_and_biases_and_norms_do_not(method: str):
    """DINO, utils.get_params_groups: no decay where a parameter has one axis or is called .bias; tokens and positions decay.
    With gradients of 0, AdamW multiplies by 1 - lr * decay, here 1 - 0.1 * 0.5."""
    model = build(config_of(method))
    learning = {name: p for name, p in model.student.named_parameters() if p.requires_grad}
    for p in learning.values():
        torch.nn.init.ones_(p)
        p.grad = torch.zeros_like(p)
    optimizer_of(model, clip=3.0).step(StepValues(lr=0.1, weight_decay=0.5))
    assert {"backbone.cls_token", "backbone.pos_embed", "cls_head.last_layer.weight_v"} <= learning.keys()
    for name, p in learning.items():
        stays = name.endswith(".bias") or ".norm" in name
        torch.testing.assert_close(p.detach(), torch.full_like(p, 1.0 if stays else 0.95), msg=name)


@pytest.mark.parametrize(("method", "norms"), [("densedino", (3.0, 2.0)), ("dino", (4 * 0.6, 3 * 0.6))])
def test_clipping_knows_whether_positions_are_one_tensor_or_two(method: str, norms: tuple[float, float]):
    """DINO, utils.clip_gradients: each parameter by its own norm. DenseDINO's code has two of positions, `cls_pos_embed`
    and `patch_pos_embed`; DINO's has one, `pos_embed`.

    densedino: gradients of norm 4 and 2, the largest allowed is 3: the first becomes 3, the other stays.
    dino: gradients of norm 4 and 3 are one of norm 5: both are multiplied by 3 / 5.
    """
    model = build(config_of(method))
    optimizer = optimizer_of(model, clip=3.0)
    for p in model.student.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    (positions,) = [p for name, p in model.student.named_parameters() if name.endswith("pos_embed")]
    positions.grad[0, 0, 5] = 4.0
    positions.grad[0, 3, 7] = 2.0 if method == "densedino" else 3.0
    optimizer.step(StepValues(lr=0.1))
    clipped = optimizer.adamw.state[positions]["exp_avg"] / (1 - BETA1)
    assert [clipped[0, 0].norm().item(), clipped[0, 1:].norm().item()] == pytest.approx(norms, rel=1e-5)


def test_train_clips_the_positions_of_densedino_apart(tiny_config, tmp_path):
    """The same through train.py: where the largest norm allowed is tiny, each tensor ends up with that norm."""
    clip = 1e-5
    run_program("train.py", tiny_config, "optim.epochs=0.2", "optim.warmup_epochs=0", f"optim.clip_grad={clip}")
    found = latest_valid(tmp_path / "run" / "checkpoints")
    assert found.step == 1
    (moment,) = [t for name, t in found.tensors().items() if name.endswith("pos_embed.exp_avg")]
    clipped = moment[0] / (1 - BETA1)
    assert [clipped[0].norm().item(), clipped[1:].norm().item()] == pytest.approx([clip, clip], rel=1e-2)


def test_layer_decay():
    """BEiT: decay^(depth + 1 - layer): of depth 1 the embedding has 0.25, the block 0.5, all above it 1. Times the group's
    own factor. Groups keep their weight decay, and no parameter is lost."""
    student = build(config_of()).student
    groups = decay_groups(student, lr_factor=10)
    factors = {}
    for group in with_layer_decay(groups, student, 0.5):
        for p in group["params"]:
            factors[p] = group["lr_factor"]
            assert group["decays"] == (p in {q for g in groups if g["decays"] for q in g["params"]})
    expected = {"patch_embed": 2.5, "pos_embed": 2.5, "cls_token": 2.5, "blocks": 5, "norm": 10}
    for name, p in student.named_parameters():
        network, part = name.split(".")[:2]
        if p.requires_grad:
            assert factors.pop(p) == (expected[part] if network == "backbone" else 10)
    assert not factors
    assert with_layer_decay(groups, student, 1) is groups
    optimizer = Optimizer(student, 0.0, layer_decay=0.5)
    for p in student.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    before = student.backbone.cls_token.detach().clone(), student.backbone.norm.bias.detach().clone()
    optimizer.step(StepValues(lr=0.1))
    # AdamW's first step is lr times the sign of the gradient
    torch.testing.assert_close(student.backbone.cls_token, before[0] - 0.025)
    torch.testing.assert_close(student.backbone.norm.bias, before[1] - 0.1)
