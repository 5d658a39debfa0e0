"""MoCo-v2, DenseCL and MoCo-v3: losses against their specification as plain loops, the queue, and when what changes."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from model.key_queue import KeyQueue
from model.losses.info_nce import InfoNCE, contrast_in_batch
from model.methods import build
from model.methods.densecl import most_similar
from pipeline.batch import Batch, draw
from runtime.config import Config, Contrast, Head, Model, Views, load_config
from runtime.distributed import DistributedContext
from runtime.errors import UserError
from runtime.schedule import StepValues
from tests.test_step import Crossings

METHODS = ("mocov2", "densecl", "mocov3")
ON, OFF = torch.tensor(1.0), torch.tensor(0.0)


def build_small(name: str, **contrast) -> torch.nn.Module:
    config = Config(method=name, model=Model("custom", 8, 16, 2, 2, 0.1), head=Head(24, 12))
    config.data.views, config.contrast = [Views(2, 32, teacher=True)], Contrast(**{"queue": 12} | contrast)
    torch.manual_seed(0)
    return build(config)


def batch_of(step: int = 0, images: int = 4) -> Batch:
    config, ids = Config(method="mocov2"), torch.arange(images) + 10 * step
    config.data.views = [Views(2, 32, teacher=True)]
    draws = draw(config, 0, ids.numpy(), np.full(images, 40), np.full(images, 50))
    pixels = torch.randn(2, images, 3, 32, 32, generator=torch.Generator().manual_seed(step))
    return Batch(step, ids, ids, [pixels], **draws.tensors())


def units(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_info_nce_equals_its_loops(chunk: int):
    """Value and gradient, in chunks of equal and of different size; a factor of the loss reaches the gradient."""
    torch.manual_seed(0)
    queries, positives, negatives = units(7, 5).requires_grad_(), units(7, 5), units(9, 5)
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(7):
        cosines = [queries[i] @ positives[i], *(queries[i] @ key for key in negatives)]
        loss = loss - (torch.stack(cosines) / 0.2).log_softmax(0)[0] / 7
    (want,) = torch.autograd.grad(3 * loss, queries)
    ours = InfoNCE(0.2, chunk)(queries, positives, negatives)
    (gradient,) = torch.autograd.grad(3 * ours, queries)
    assert abs(ours - loss) < 1e-13
    assert (gradient - want).abs().max() < 1e-13


def test_info_nce_in_bfloat16():
    """Under autocast the products are rounded, sums are not: the loss of 4,096 keys is that of float32 to 1 %."""
    torch.manual_seed(0)
    queries, positives, negatives = (x.float() for x in (units(64, 32), units(64, 32), units(4096, 32)))
    exact = InfoNCE(0.2)(queries, positives, negatives)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = InfoNCE(0.2)(queries, positives, negatives)
    assert rounded.dtype == torch.float32
    assert rounded != exact
    assert rounded == pytest.approx(exact.item(), rel=1e-2)


def test_contrast_in_batch_equals_its_loops():
    torch.manual_seed(0)
    queries, keys = units(3, 5), units(9, 5)
    places = torch.tensor([4, 0, 4])
    loss = sum(-(keys @ queries[i] / 0.2).log_softmax(0)[places[i]] / 3 for i in range(3))
    assert abs(contrast_in_batch(queries, keys, places, 0.2) - loss) < 1e-13


def test_the_most_similar_patch():
    """By cosine, not by product: the longest key does not win. Many queries may have one match."""
    query = torch.tensor([[[1.0, 0.1], [0.9, 0.0], [0.0, -1.0]]])
    key = torch.tensor([[[0.2, 0.0], [30.0, 30.0], [0.0, 5.0], [-1.0, -1.0]]])
    assert most_similar(query, key).tolist() == [[0, 0, 3]]


def test_the_queue_is_a_ring():
    """New rows replace the oldest; a push that is not applied changes nothing, even with NaN."""
    torch.manual_seed(0)
    queue = KeyQueue(6, 2)
    assert torch.allclose(queue.rows.norm(dim=1), torch.ones(6))
    first = queue.rows.clone()
    for i in range(4):
        queue.push(torch.full((2, 2), float(i)), ON)
        queue.push(torch.full((2, 2), torch.nan), OFF)
        if i == 0:
            assert torch.equal(queue.rows[2:], first[2:])
    assert queue.rows[:, 0].tolist() == [3, 3, 1, 1, 2, 2]
    assert queue.pointer == 2


@pytest.mark.parametrize("name", METHODS)
def test_the_key_network_follows_before_its_forward_pass(name: str):
    """k <- m k + (1 - m) q with the query of the last step, once for each step that was applied."""
    method, at = build_small(name), StepValues(teacher_momentum=0.75)
    student = dict(method.student.named_parameters())
    names = [n for n, _ in method.key.named_parameters()]
    assert not any(p.requires_grad for p in method.key.parameters())
    assert all(torch.equal(p, student[n]) for n, p in method.key.named_parameters())
    want = {n: student[n].detach().clone() for n in names}

    def step(change: float, applied: torch.Tensor) -> None:
        method.before_step(at)
        assert all(torch.allclose(p, want[n], atol=1e-6) for n, p in method.key.named_parameters())
        method(batch_of(), at)
        for p in method.student.parameters():
            p.data += change
        method.after_step([], at, applied)

    step(1.0, ON)
    want = {n: 0.75 * want[n] + 0.25 * student[n].detach() for n in names}
    step(0.0, OFF)  # this step takes in the first one; the next one has nothing to take in
    step(0.0, ON)
    want = {n: 0.75 * want[n] + 0.25 * student[n].detach() for n in names}
    step(0.0, ON)


@pytest.mark.parametrize("name", ["mocov2", "densecl"])
def test_old_keys_score_and_new_keys_are_pushed_at_the_end(name: str):
    """The pieces of a step see the queue as it was, and their keys are pushed together, in order."""
    method, at, batch = build_small(name), StepValues(teacher_momentum=1.0), batch_of()
    before = [queue.rows.clone() for queue in method.queues()]
    method.before_step(at)
    whole = method(batch, at)
    assert all(torch.equal(queue.rows, old) for queue, old in zip(method.queues(), before, strict=True))
    method.after_step([], at, ON)
    pushed = [queue.rows[:4].clone() for queue in method.queues()]
    for queue, old in zip(method.queues(), before, strict=True):
        assert not torch.isclose(queue.rows[:4], old[:4]).any()
        assert torch.equal(queue.rows[4:], old[4:])
        assert torch.allclose(queue.rows.norm(dim=1), torch.ones(12))
        queue.rows.copy_(old)
        queue.pointer.zero_()
    method.before_step(at)
    parts = [method(piece, at).loss for piece in batch.split(2)]
    method.after_step([], at, ON)
    assert torch.stack(parts).mean().item() == pytest.approx(whole.loss.item(), rel=1e-6)
    for queue, rows in zip(method.queues(), pushed, strict=True):
        assert torch.allclose(queue.rows[:4], rows, atol=1e-6)


def test_features_and_weights():
    """[CLS] or the mean of the patch tokens; lambda weighs DenseCL's two losses, and its first one is MoCo-v2's."""
    batch, at = batch_of(), StepValues()
    losses = {}
    for name, feature, weight in itertools.product(("mocov2", "densecl"), ("cls", "mean"), (0.0, 0.25)):
        method = build_small(name, feature=feature, dense_weight=weight)
        method.load_state_dict(build_small("mocov2").state_dict(), strict=False)
        out = method(batch, at)
        losses[name, feature, weight] = out.loss.item()
        if name == "densecl":
            image, dense = out.metrics["image_loss"], out.metrics["dense_loss"]
            assert out.loss.item() == pytest.approx(((1 - weight) * image + weight * dense).item(), rel=1e-6)
            assert losses["mocov2", feature, 0.0] == pytest.approx(image.item(), rel=1e-6)
    assert losses["mocov2", "cls", 0.0] != losses["mocov2", "mean", 0.0]


@pytest.mark.parametrize("name", METHODS)
def test_on_a_gpu_the_host_waits_for_nothing(name: str, monkeypatch):
    """All but the backward pass, on torch's fake GPU: reading a value raises, and no operation is of both devices."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    gpu, method, batch, crossings = torch.device("cuda", 0), build_small(name), batch_of(), Crossings()
    fake = lambda t: torch.empty(t.shape, dtype=t.dtype, device=gpu)  # noqa: E731
    with FakeTensorMode():
        for module in method.modules():
            for key, p in module.named_parameters(recurse=False):
                setattr(module, key, torch.nn.Parameter(fake(p), p.requires_grad))
            for key, b in module.named_buffers(recurse=False):
                setattr(module, key, fake(b))
        batch = batch.map(fake)
        applied, at = torch.ones((), device=gpu), StepValues()
        with crossings, DistributedContext(0, 1, gpu, torch.bfloat16).autocast():
            method.before_step(at)
            out = method(batch, at)
            method.after_step([], at, applied)
        assert out.loss.device == gpu
        assert out.loss.dtype == torch.float32
        assert not crossings.seen


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["data.views.1.size=224"],
            r"data\.views: method: mocov2 compares two views of one size, found 4 of 224 pixels",
        ),
        (
            ["contrast.queue=960"],
            r"960 is not a multiple of optim\.global_batch_size: 256 \(nearest: 1024\)",
        ),
        (["contrast.queue=100"], r"contrast\.queue: 100 is not a multiple .*\(nearest: 256\)"),
        (["method=mocov3", "speed.grad_accum_steps=2"], r"speed\.grad_accum_steps: 2 pieces .*method: mocov3"),
    ],
)
def test_what_a_config_may_not_say(tmp_path, words: list[str], message: str):
    path = tmp_path / "c.yaml"
    views = "" if words[0].startswith("data.views") else "data: {views: {count: 2, teacher: true}}"
    path.write_text(f"method: mocov2\noptim: {{global_batch_size: 256}}\n{views}\n")
    with pytest.raises(UserError, match=message) as error:
        load_config(path, words)
    assert len(str(error.value).splitlines()) == 1
