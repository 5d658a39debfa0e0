"""SwAV and Leopart: the parts of their losses against plain loops, what enters the queue, and the order of a step."""

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_program
from scipy import ndimage
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from model.alignment import BINS, Overlaps, axis_weights
from model.cluster_queue import ClusterQueue
from model.foreground import foreground, without_small_components
from model.heads import cosines
from model.losses.dense_clustering import dense_clustering
from model.losses.sinkhorn import sinkhorn
from model.methods import build
from model.weights import load_backbone
from pipeline.batch import Batch
from pipeline.readers.worker import crop_resize
from runtime.compile import compile_parts
from runtime.config import load_config
from runtime.errors import UserError
from runtime.schedule import Optimizer, StepValues
from tests.faults.program import final
from tests.test_step import Crossings

WINDOWS = torch.tensor(
    [[[0, 0, 80, 60], [70, 10, 10, 50], [20, 15, 60, 40]], [[5, 3, 50, 61], [0, 0, 64, 64], [64, 20, 30, 64]]]
)


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def test_sinkhorn_equals_the_published_loops():
    """With the marginals 1/K and 1/n; and rows of -inf take no part."""
    torch.manual_seed(0)
    n, k, epsilon = 7, 4, 0.05
    scores = cosines(unit(n, 6), unit(k, 6))
    q = (scores / epsilon).exp()
    q = q / q.sum()
    for _ in range(3):
        for j in range(k):
            q[:, j] *= 1 / k / q[:, j].sum()
        for i in range(n):
            q[i] *= 1 / n / q[i].sum()
    ours = sinkhorn(scores, epsilon, 3)
    assert torch.allclose(ours, q * n, rtol=1e-12)
    absent = torch.cat([torch.full((2, k), -torch.inf, dtype=torch.float64), scores])
    with_absent = sinkhorn(absent, epsilon, 3)
    assert not with_absent[:2].any()
    assert torch.allclose(with_absent[2:], ours, rtol=1e-12)
    balanced = sinkhorn(scores, epsilon, 100)
    assert torch.allclose(balanced.sum(0), torch.full((k,), n / k, dtype=torch.float64), rtol=1e-6)
    assert sinkhorn(torch.ones(5, 3), 0.02, 3).isfinite().all()  # the smallest epsilon of a config, the largest cosines


@pytest.mark.parametrize("patches", [3, 6, 14])
def test_an_axis_is_read_as_the_loops_say(patches):
    """RoIAlign's samples, one by one, for both directions of the window."""
    values = torch.randn(patches, dtype=torch.float64)
    for start, end, low, high in ((0, 80, 10, 70), (0, 80, 0, 80), (80, 0, 3, 21), (10, 94, 40, 82), (50, 7, 7, 50)):
        read = []
        side = abs(high - low) * patches / abs(end - start)
        samples = max(1, int(np.ceil(side / BINS - 1e-9)))
        for j in range(BINS):
            total = 0.0
            for m in range(samples):
                source = low + (j + (m + 0.5) / samples) / BINS * (high - low)
                at = min(max((source - start) / (end - start) * patches - 0.5, 0), patches - 1)
                left = min(int(at), patches - 2)
                total += (1 - (at - left)) * values[left] + (at - left) * values[left + 1]
            read.append(float(total) / samples)
        weights = axis_weights(*(torch.tensor(x) for x in (start, end, low, high)), patches)
        assert torch.allclose(weights @ values, torch.tensor(read, dtype=torch.float64), rtol=1e-12), (start, end)
        assert torch.allclose(weights.sum(1), torch.ones(BINS, dtype=torch.float64), rtol=1e-12)


def test_a_flipped_view_is_read_backward():
    """A view and its mirror image, whose window is flipped, show the same at the same place."""
    maps = torch.randn(3, 2, 6, 6, 2, dtype=torch.float64)
    flipped = WINDOWS[:, :, [2, 1, 0, 3]]
    for windows, pixels in ((WINDOWS, maps), (flipped, maps.flip(3))):
        overlaps = Overlaps(windows, 2)
        read = overlaps.read_teachers(pixels[:2]), overlaps.read_views(pixels, slice(3))
        if windows is WINDOWS:
            first = read
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(first, read, strict=True))


def test_dense_clustering_equals_its_loops():
    """The docstring's loops over pairs and bins; a pair without a bin adds 0; the gradient of the pair with itself is 0."""
    torch.manual_seed(0)
    k, temperature = 4, 0.1
    scores = torch.randn(3, 2, 6, 6, k, dtype=torch.float64, requires_grad=True)
    targets, mask = torch.rand(2, 2, 6, 6, k, dtype=torch.float64), torch.rand(2, 2, 6, 6) > 0.15
    mask[1] = False
    loss, pair_loss, bins = dense_clustering([scores[:2], scores[2:]], targets, mask, WINDOWS, temperature)
    overlaps, total = Overlaps(WINDOWS, 2), 0.0
    q, read = overlaps.read_teachers(targets), overlaps.read_views(scores, slice(3))
    inside = overlaps.read_teachers(mask.double()[..., None])[..., 0] > 1 - 1e-9
    for t in range(2):
        for v in range(3):
            terms = [
                -(q[b, t, v, j, i] * (read[b, t, v, j, i] / temperature).log_softmax(-1)).sum()
                for b in range(2) for j in range(BINS) for i in range(BINS) if inside[b, t, v, j, i] and t != v
            ]  # fmt: skip
            mean = sum(terms, torch.zeros((), dtype=torch.float64)) / max(1, len(terms))
            assert float(pair_loss[t, v]) == pytest.approx(float(mean.detach()), rel=1e-12)
            assert int(bins[t, v]) == len(terms)
            total = total + mean / (2 * 2)
    assert bins[0, 1:].all()
    assert not bins[1].any()
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=1e-12)
    ours, theirs = (torch.autograd.grad(x, scores)[0] for x in (loss, total))
    assert torch.allclose(ours, theirs, atol=1e-14)
    assert not ours[0].any()  # view 0 is compared with view 1 only, which has no bin


def test_small_components_are_found_without_labels():
    """Against labelled components, of masks of every density."""
    rng = np.random.default_rng(0)
    masks = np.stack([rng.random((9, 9)) < p for p in np.linspace(0.02, 0.6, 300)])
    for mask, ours in zip(masks, without_small_components(torch.from_numpy(masks)), strict=True):
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        sizes = np.bincount(labels.ravel(), minlength=count + 1)
        assert np.array_equal(ours.numpy(), mask & (sizes[labels] > 2))


def test_the_foreground_is_where_the_attention_is():
    """Two heads; a bright square, a bright single patch, and little elsewhere."""
    attention = torch.full((1, 2, 8, 8), 1e-3)
    attention[:, :, 2:5, 3:6] = 0.1
    attention[:, 0, 7, 0] = 0.08
    mask = foreground(attention.flatten(2))[0]
    wanted = torch.zeros(8, 8, dtype=torch.bool)
    wanted[2:5, 3:6] = True
    assert (mask & ~wanted).sum() == 0
    assert (mask & wanted).sum() >= 5  # 60 % of the sum
    assert mask[3, 4]


def test_the_queue_is_used_when_it_is_full():
    queue, prototypes, one = ClusterQueue(2, 4, 3), unit(5, 3).float(), torch.ones(())
    first, second, third = (unit(2, 2, 3).float() for _ in range(3))
    queue.push(first, one)
    assert torch.isneginf(queue.scores(prototypes)).all()
    queue.push(second, one)
    kept = torch.cat([second, first], 1)
    assert torch.equal(queue.rows, kept)
    assert torch.equal(queue.scores(prototypes), cosines(kept, prototypes))
    queue.push(third, 0 * one)
    assert torch.equal(queue.rows, kept)
    queue.push(torch.cat([third, first, third], 1), one)
    assert torch.equal(queue.rows, torch.cat([third, first], 1))


@pytest.fixture
def leopart(tiny_config):
    torch.manual_seed(0)
    return build(load_config(tiny_config, ["method=leopart", "clustering.head_lr_factor=10"]))


def tiny_batch(step: int = 0) -> Batch:
    torch.manual_seed(step)
    ids = torch.arange(4) + 4 * step
    windows = torch.tensor([[0, 0, 40, 40], [30, 5, 10, 45], [5, 5, 25, 30], [12, 8, 32, 28]]).repeat(4, 1, 1).int()
    views = [torch.randn(2, 4, 3, 32, 32), torch.randn(2, 4, 3, 16, 16)]
    return Batch(step, ids, ids, views, windows, torch.empty(4, 2, 4, 0, 2, 2), torch.empty(0))


def test_rows_for_the_queue_are_drawn_from_the_mask(leopart):
    z = torch.arange(2 * 4 * 16.0).view(2, 4, 16, 1)
    mask = torch.zeros(2, 4, 16, dtype=torch.bool)
    mask[0, :, :10] = mask[1, 1, :3] = True
    rows = leopart.draw_rows(z, mask, tiny_batch(), 30)[..., 0]
    assert rows.shape == (2, 30)
    assert all(len(of_view.unique()) == 30 for of_view in rows)
    assert set(rows[0].tolist()) < set(z[0][mask[0]].flatten().tolist())
    assert set(rows[1, :3].tolist()) == set(z[1][mask[1]].flatten().tolist())  # first the mask, then the rest
    again = leopart.draw_rows(z, mask, tiny_batch(), 30)[..., 0]
    other = leopart.draw_rows(z, mask, tiny_batch(1), 30)[..., 0]
    assert torch.equal(rows, again)
    assert not torch.equal(rows, other)


def test_a_step_of_leopart_has_the_published_order(leopart):
    """Heads are drawn separately; the teacher follows the student as it was before the optimizer; prototypes are unit
    vectors again after the step; the head learns faster; the student is evaluated."""
    student, teacher = leopart.student, leopart.teacher
    assert torch.equal(student.backbone.pos_embed, teacher.backbone.pos_embed)
    assert not torch.equal(student.head.prototypes, teacher.head.prototypes)
    assert leopart.backbone is student.backbone
    before = {
        role: [p.detach().clone() for p in getattr(leopart, role).parameters()] for role in ("student", "teacher")
    }
    optimizer = Optimizer(student, 0.0, groups=leopart.parameter_groups())
    at = StepValues(0, lr=1e-3, teacher_momentum=0.9)
    leopart.before_step(at)
    out = leopart(tiny_batch(), at)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    applied, _ = optimizer.step(at, None, leopart.before_update)
    for t, s, p in zip(before["teacher"], before["student"], teacher.parameters(), strict=True):
        assert torch.allclose(p, 0.9 * t + 0.1 * s, atol=1e-7)
    assert [group["lr"] for group in optimizer.adamw.param_groups] == pytest.approx([1e-3, 1e-3, 1e-2, 1e-2])
    leopart.after_step([], at, applied)
    for network in (student, teacher):
        assert torch.allclose(network.head.prototypes.norm(dim=1), torch.ones(40))
    assert leopart.queue.rows.any(-1).all()
    assert leopart(tiny_batch(1), at).loss.isfinite()


@pytest.mark.parametrize("name", ["leopart", "swav"])
def test_on_a_gpu_the_host_waits_for_nothing(name, tiny_config, monkeypatch):
    """As in tests/test_step.py, on torch's fake GPU: forward pass, EMA, prototypes and queue."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    gpu, crossings = torch.device("cuda", 0), Crossings()
    method = build(load_config(tiny_config, [f"method={name}"]))
    with FakeTensorMode():
        for module in method.modules():
            for n, p in module.named_parameters(recurse=False):
                setattr(module, n, torch.nn.Parameter(torch.empty(p.shape, device=gpu), p.requires_grad))
            for n, b in module.named_buffers(recurse=False):
                setattr(module, n, torch.empty(b.shape, device=gpu))
        batch = Batch(
            0, *(torch.empty(4, dtype=torch.int64, device=gpu) for _ in range(2)),
            [torch.empty(2, 4, 3, size, size, device=gpu) for size in (32, 16)],
            torch.empty(4, 4, 4, dtype=torch.int32, device=gpu), *(torch.empty(0, device=gpu) for _ in range(2)),
        )  # fmt: skip
        at, applied = StepValues(), torch.empty((), device=gpu)
        with crossings:
            method.before_step(at)
            with torch.autocast("cuda", torch.bfloat16):
                out = method(batch, at)
            method.before_update(at, applied)
            method.after_step([], at, applied)
        assert {(x.device, x.dtype) for x in (out.loss, *out.metrics.values())} == {(gpu, torch.float32)}
        assert not crossings.seen


@pytest.mark.slow
@pytest.mark.parametrize("name", ["leopart", "swav"])
def test_compiled_steps_equal_uncompiled_ones(name, tiny_config, monkeypatch):
    """In bfloat16, with drop path and activations that are computed again; nothing is compiled after the first steps."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr("runtime.compile.can_compile", lambda device: None)
    torch._dynamo.reset()
    words = [f"method={name}", "speed.activation_checkpointing=true"]
    found, graphs = [], []
    for compiled in (False, True):
        torch.manual_seed(0)
        method = build(load_config(tiny_config, words))
        if compiled:
            compile_parts(method.compile_units(), torch.device("cpu"))
        optimizer = Optimizer(method.student, 0.0, groups=method.parameter_groups())
        for i in range(4):
            at = StepValues(i, lr=1e-3)
            method.before_step(at)
            with torch.autocast("cpu", torch.bfloat16):
                out = method(tiny_batch(i), at)
            out.loss.backward()
            applied, _ = optimizer.step(at, None, method.before_update)
            method.after_step([], at, applied)
            found.append(float(out.loss.detach()))
            graphs.append(counters["stats"]["unique_graphs"])
    assert found[4:] == pytest.approx(found[:4], rel=1e-2)
    assert graphs[4] > graphs[3]
    assert graphs[7] == graphs[5]


@pytest.mark.parametrize("mask", ["background", "all"])
def test_other_masks(tiny_config, mask):
    torch.manual_seed(0)
    method = build(load_config(tiny_config, ["method=leopart", f"clustering.mask={mask}", "clustering.queue=0"]))
    out = method(tiny_batch(), StepValues())
    share = float(out.metrics["mask"])
    assert share == 1 if mask == "all" else 0.2 < share < 0.8
    assert out.loss.isfinite()


def test_the_mean_patch_token_can_represent_a_view(tiny_config):
    losses = []
    for feature in ("cls", "mean"):
        torch.manual_seed(0)
        method = build(load_config(tiny_config, ["method=swav", f"clustering.feature={feature}", "model.drop_path=0"]))
        out = method(tiny_batch(), StepValues())
        out.loss.backward()
        assert all(p.grad is not None for p in method.student.parameters())
        losses.append(float(out.loss.detach()))
    assert losses[0] != losses[1]


def test_the_queue_starts_after_some_epochs(tiny_config, tmp_path):
    """5 steps an epoch: nothing is pushed in the first epoch."""
    for epochs, filled in ((1, False), (2, True)):
        words = ["method=swav", "clustering.queue_start_epochs=1", f"optim.epochs={epochs}", "optim.warmup_epochs=0"]
        run_program("train.py", tiny_config, *words, f"run.folder={tmp_path / str(epochs)}")
        assert bool(final(tmp_path / str(epochs))["queue.rows"].any()) == filled


def test_the_student_of_a_run_is_evaluated(tiny_config, tmp_path):
    """From its newest checkpoint as from its backbone file."""
    run_program("train.py", tiny_config, "method=leopart", "optim.epochs=1", "optim.warmup_epochs=0")
    of_run, of_file = (load_backbone(path) for path in (tmp_path / "run", tmp_path / "run" / "backbone.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(of_run.parameters(), of_file.parameters(), strict=True))


def test_the_queue_is_shared_equally(tiny_config):
    with pytest.raises(UserError, match=r"clustering\.queue: 32 is not divisible by 3 processes \(nearest: 33\)"):
        load_config(tiny_config, ["method=leopart", "optim.global_batch_size=12"], processes=3)


def test_views_are_resized_by_the_config():
    image = torch.randint(0, 256, (3, 50, 60), dtype=torch.uint8)
    window = np.array([50, 4, 10, 44], np.int32)
    crop = image[None, :, 4:44, 10:50]
    for mode in ("bicubic", "bilinear"):
        wanted = F.interpolate(crop, (24, 24), mode=mode, antialias=True)[0].permute(1, 2, 0).flip(1)
        assert torch.equal(crop_resize(image, window, 24, interpolation=mode), wanted)
