"""The losses against their specification as plain loops; the total, centers and teacher against their formulas."""

import json

import numpy as np
import pytest
import torch
from conftest import losses_of, run_program

from model import cost
from model.cost import count_cost, count_memory
from model.heads import Prototypes
from model.losses.cross_entropy import GROUP, CrossEntropy
from model.methods import Method, build
from model.methods.student_teacher import group_by_count
from pipeline.batch import Batch, draw
from runtime.config import Config, Head, Model, Views
from runtime.schedule import Optimizer, clip_each, make_schedules


def small(**changes) -> Config:
    config = Config(model=Model("custom", 8, 16, 1, 2, 0.0), head=Head(24, 12, 20))
    config.data.views = [Views(2, 16, teacher=True, blur=[1.0, 0.1], solarize=[0.0, 0.2]), Views(2, 16)]
    config.reference.points = 2
    for name, value in changes.items():
        section, key = name.split("__")
        setattr(getattr(config, section), key, value)
    return config


def build_with_batch(config: Config) -> tuple[Method, Batch]:
    torch.manual_seed(0)
    model = build(config)
    for p in model.teacher.parameters():  # a teacher that differs from the student, as after some steps
        p.data += 0.02 * torch.randn_like(p)
    model.cls_center.normal_()
    if config.method == "densedino":
        model.reference_center.normal_()
    draws = draw(config, 0, np.arange(3), np.full(3, 40), np.full(3, 50))
    ids = torch.arange(3)
    return model, Batch(0, ids, ids, [torch.randn(4, 3, 3, 16, 16)], **draws.tensors())


@pytest.mark.parametrize(
    ("sample_chunk", "prototype_chunk", "k"),
    [(1, None, 9), (2, 4, 9), (256, 9, 9), (256, None, 3 * GROUP), (2, 2 * GROUP, 2 * GROUP + 5)],
)
@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_cross_entropy_equals_its_loops(sample_chunk: int, prototype_chunk: int | None, k: int, norm_last_layer: bool):
    """Value and gradients, through the weight norm, against the docstring's loops, whole or in chunks, in float64."""
    torch.manual_seed(0)
    views, n, d = 4, 5, 6
    student = torch.nn.functional.normalize(torch.randn(views, n, d, dtype=torch.float64), dim=-1).requires_grad_()
    teacher = torch.nn.functional.normalize(torch.randn(2, n, d, dtype=torch.float64), dim=-1)
    layer, layer_t = (Prototypes(d, k, norm_last_layer).double() for _ in range(2))
    layer_t.requires_grad_(False)
    for gains in (layer.weight_g, layer_t.weight_g):
        gains.data.uniform_(0.5, 2.0)
    center, center_batch = torch.randn(k, dtype=torch.float64), torch.randn(d, dtype=torch.float64)
    terms = torch.tensor([[0, 1, 1, 1], [1, 0, 1, 1]])
    cross_entropy = CrossEntropy(terms, 0.1, 0.7, sample_chunk, prototype_chunk)
    weighted, loss, entropy, mean = cross_entropy(student, layer, teacher, layer_t, center, 0.05, center_batch)
    w, w_t = (p.weight_g * p.weight_v / p.weight_v.norm(dim=1, keepdim=True) for p in (layer, layer_t))
    assert torch.allclose(layer(), w, rtol=1e-15)
    loops, entropies = 0.0, []
    for t in range(2):
        for i in range(n):
            p = ((teacher[t, i] @ w_t.T - center) / 0.05).softmax(-1)
            entropies.append(float(torch.special.entr(p).sum()))
            for v in range(views):
                if terms[t, v]:
                    loops = loops - (p * (student[v, i] @ w.T / 0.1).log_softmax(-1)).sum() / (6 * n)
    assert loss.item() == pytest.approx(loops.item(), rel=1e-12)
    assert entropy.item() == pytest.approx(np.mean(entropies), rel=1e-12)
    assert torch.allclose(mean, w_t @ center_batch, rtol=1e-12)
    trained = [student, *(p for p in layer.parameters() if p.requires_grad)]
    assert len(trained) == (2 if norm_last_layer else 3)
    assert weighted.item() == pytest.approx(0.7 * loops.item(), rel=1e-12)
    theirs = torch.autograd.grad(0.7 * loops, trained)
    for factor in (1, 3):  # 1 for a whole step, another factor for a part of an accumulated step
        weighted = cross_entropy(student, layer, teacher, layer_t, center, 0.05, center_batch)[0]
        ours = torch.autograd.grad(factor * weighted, trained)
        assert all((a - factor * b).abs().max() < 1e-12 for a, b in zip(ours, theirs, strict=True))


def test_cross_entropy_in_bfloat16():
    """Under autocast the products are in bfloat16, the softmaxes in float32."""
    torch.manual_seed(0)
    student, teacher = (torch.nn.functional.normalize(torch.randn(1, 64, 16), dim=-1) for _ in range(2))
    layer = Prototypes(16, 50, norm_last_layer=True)
    cross_entropy = CrossEntropy(torch.ones(1, 1), 0.1, sample_chunk=16)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            weighted, loss, _, mean = cross_entropy(
                student, layer, teacher, layer, torch.zeros(50), 0.04, teacher[0].mean(0)
            )
        assert loss.dtype == torch.float32
        assert torch.allclose(mean, layer() @ teacher[0].mean(0), rtol=1e-5)  # a center must not be rounded
        results.append((loss.item(), torch.autograd.grad(weighted, layer.weight_v)[0]))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-2)
    assert (results[1][1] - results[0][1]).norm() < 3e-2 * results[0][1].norm()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_total_is_the_weighted_sum(alpha: float):
    model, batch = build_with_batch(small(loss__alpha=alpha))
    log, _ = losses_of(model, batch)
    assert torch.allclose(log["loss"], alpha * log["cls_loss"] + (1 - alpha) * log["reference_loss"])


def test_losses_equal_those_computed_view_by_view():
    """forward() against the same computed for each pair: which view has which points, head and center."""
    model, batch = build_with_batch(small())
    log, means = losses_of(model, batch, 0.05)
    s, t = model.student, model.teacher
    with torch.no_grad():
        targets, logits, point_terms, points_of_teacher = [], [], [], []
        for v in range(4):
            logits.append(s.cls_head.logits(s.backbone(batch.views[0][v]).cls))
        for i in range(2):
            targets.append(t.cls_head.logits(t.backbone(batch.views[0][i]).cls))
        for i in range(2):
            for v in range(4):
                if v == i:
                    continue
                points = batch.view_points[:, i, v]  # [B,M,2(teacher,student),2]
                of_teacher = t.reference_head.logits(t.backbone(batch.views[0][i], points[:, :, 0]).references)
                of_student = s.reference_head.logits(s.backbone(batch.views[0][v], points[:, :, 1]).references)
                p = ((of_teacher - model.reference_center) / 0.05).softmax(-1)
                point_terms.append(-(p * (of_student / 0.1).log_softmax(-1)).sum(-1).mean())
                points_of_teacher.append(of_teacher)
        p = ((torch.stack(targets) - model.cls_center) / 0.05).softmax(-1)
        terms = [
            -(p[i] * (logits[v] / 0.1).log_softmax(-1)).sum(-1).mean() for i in range(2) for v in range(4) if v != i
        ]
    assert torch.allclose(log["cls_loss"], torch.stack(terms).mean(), rtol=1e-5)
    assert torch.allclose(log["reference_loss"], torch.stack(point_terms).mean(), rtol=1e-5)
    assert torch.allclose(means[0], torch.stack(targets).mean((0, 1)), atol=1e-6)
    assert torch.allclose(means[1], torch.stack(points_of_teacher).mean((0, 1, 2)), atol=1e-6)


def test_views_of_a_loss_and_a_shared_head():
    model, batch = build_with_batch(small(loss__cls_views="teacher", reference__views="teacher"))
    assert model.cls_pairs == model.reference_pairs == [(0, 1), (1, 0)]
    assert torch.isfinite(losses_of(model, batch)[0]["loss"])
    model, batch = build_with_batch(small(head__shared=True))
    log, means = losses_of(model, batch)
    assert model.student.reference_head is None
    assert len(means) == 1
    assert torch.isfinite(log["reference_loss"])


def test_only_needed_tokens_are_computed():
    """Self pairs are computed only if the center uses them; the teacher never sees student-only views."""
    model, _ = build_with_batch(small())
    assert group_by_count(model.teacher_pairs, range(2), 0) == [[[(0, 1), (0, 2), (0, 3)], [(1, 0), (1, 2), (1, 3)]]]
    assert group_by_count(model.student_pairs, range(4), 1) == [
        [[(1, 0)], [(0, 1)]],
        [[(0, 2), (1, 2)], [(0, 3), (1, 3)]],
    ]
    model, _ = build_with_batch(small(reference__center="published"))
    assert group_by_count(model.teacher_pairs, range(2), 0)[0][0] == [(0, 0), (0, 1), (0, 2), (0, 3)]
    model, _ = build_with_batch(small(reference__views="teacher"))
    assert group_by_count(model.student_pairs, range(4), 1) == [[[(1, 0)], [(0, 1)]]]
    assert group_by_count(model.student_pairs, range(2, 4), 1) == []


def test_teacher_and_centers_follow_their_formulas():
    model, _ = build_with_batch(small())
    before = {n: t.clone() for n, t in model.state_dict().items()}
    model.update_teacher(0.9)
    model.update_centers([torch.ones(20), torch.zeros(20)])
    for name, now in model.teacher.named_parameters():
        want = 0.9 * before[f"teacher.{name}"] + 0.1 * before[f"student.{name}"]
        assert torch.allclose(now, want, atol=1e-6)
        assert not now.requires_grad
    assert torch.allclose(model.cls_center, 0.9 * before["cls_center"] + 0.1)
    assert torch.allclose(model.reference_center, 0.9 * before["reference_center"])


def test_clipping_is_per_tensor():
    grads = [torch.full((4,), 3.0), torch.full((4,), 0.1)]  # norms 6 and 0.2
    clip_each(grads, [g.norm() for g in grads], 3.0)
    assert float(grads[0].norm()) == pytest.approx(3.0, rel=1e-5)
    assert torch.equal(grads[1], torch.full((4,), 0.1))


def test_last_layer_is_frozen_at_first():
    config = small()
    config.optim.global_batch_size, config.optim.epochs, config.optim.warmup_epochs, config.optim.lr = 256, 4, 0, 1e-2
    model, batch = build_with_batch(config)
    schedules = make_schedules(config, 2)
    assert list(schedules.frozen) == [True] * 2 + [False] * 6
    optimizer = Optimizer(model.student, 3.0, split_positions=True)
    for step in range(4):
        before = {n: p.clone() for n, p in model.student.named_parameters()}
        losses_of(model, batch)[0]["loss"].backward()
        optimizer.step(schedules.at(step))
        unchanged = {n for n, p in model.student.named_parameters() if p.requires_grad and torch.equal(p, before[n])}
        assert unchanged == (
            {f"{h}.last_layer.weight_v" for h in ("cls_head", "reference_head")} if step < 2 else set()
        )


@pytest.mark.parametrize("what", ["gradient", "loss"])
def test_nonfinite_step_changes_nothing(what: str):
    """Parameters, moments, Adam's step count, teacher and centers stay bit-equal; the next step is applied."""
    config = small(reference__points=1)
    model, batch = build_with_batch(config)
    schedules = make_schedules(config, 2)
    schedules.lr[:] = 1e-2
    optimizer = Optimizer(model.student, 3.0)

    def state() -> dict:
        moments = {f"{i}.{k}": t for i, s in enumerate(optimizer.adamw.state.values()) for k, t in s.items()}
        return {n: t.clone() for n, t in (model.state_dict() | moments).items()}

    for step, bad in enumerate([False, True, False]):
        before = state()
        log, means = losses_of(model, batch)
        log["loss"].backward()
        finite = torch.tensor(1.0)
        if bad and what == "gradient":
            model.student.backbone.cls_token.grad[0, 0, 3] = float("inf")
        elif bad:
            finite, means = torch.tensor(0.0), [m * float("nan") for m in means]
        applied, norm = optimizer.step(schedules.at(step), finite)
        model.update_teacher(0.9, applied)
        model.update_centers(means, applied)
        now = state()
        assert float(applied) == (not bad)
        assert bool(norm.isfinite()) == (not bad or what == "loss")
        if bad:
            assert all(torch.equal(now[n], before[n]) for n in now)
        else:
            assert not torch.equal(now["teacher.backbone.cls_token"], before["teacher.backbone.cls_token"])
            assert not torch.equal(now["cls_center"], before["cls_center"])


def test_biases_and_norms_do_not_decay():
    model, _ = build_with_batch(small())
    optimizer = Optimizer(model.student, 3.0)
    decayed, plain = ({id(p) for p in g["params"]} for g in optimizer.adamw.param_groups)
    for name, p in model.student.named_parameters():
        if not p.requires_grad:
            assert name.endswith("weight_g")
            assert id(p) not in decayed | plain
        else:
            assert (id(p) in plain) == (name.endswith(".bias") or ".norm" in name), name


def test_naive_implementation_agrees():
    """The step as the paper's text says (tools/bench/naive.py, what the benchmark compares with): five steps' losses."""
    rows = [json.loads(line) for line in run_program("-m", "tools.bench", "step", "--check").stdout.splitlines()]
    assert len(rows) == 5
    for row in rows:
        assert row["ours"] == pytest.approx(row["naive"], rel=1e-5)


@pytest.mark.slow
def test_step_benchmark_rows(tmp_path):
    """A row for each combination, its faster batch; what is counted and what is asked of the device beside it. A method of
    other papers has no naive implementation; DINO's step is beside it."""
    out, few = (
        tmp_path / "rows.jsonl",
        "--arch=tiny --methods=dino,densecl --dtype=float32 --rounds=1 --steps=1 --warmup=0",
    )
    run_program("-m", "tools.bench", "step", *few.split(), "--eager", "--batch", "1", "2", f"--out={out}")
    rows = {(row["method"], row["form"]): row for row in map(json.loads, out.read_text().splitlines())}
    naive, ours, other = (rows[key] for key in (("dino", "naive"), ("dino", "ours"), ("densecl", "ours")))
    assert len(rows) == 3
    for row in rows.values():
        assert row["what"] == "step"
        assert row["batch"] in (1, 2)
        assert row["compile"] is False
        assert row["peak_memory_mb"] > 0
        assert row["of_matmul_percent"] == pytest.approx(100 * row["tflops"] / row["matmul_tflops"], rel=0.05)
    assert naive["tflops"] / naive["img_per_s"] == pytest.approx(ours["tflops"] / ours["img_per_s"], rel=0.05)
    assert ours["ratio_to_naive"] == pytest.approx(ours["img_per_s"] / naive["img_per_s"], rel=0.01)
    assert naive["ratio_to_naive"] == ours["ratio_to_dino"] == 1
    assert other["ratio_to_dino"] == pytest.approx(other["img_per_s"] / ours["img_per_s"], rel=0.01)
    assert other["ratio_to_naive"] is None


def test_cost_counts_the_matrix_products():
    """One image's matrix products, written out for two blocks without points; then the effect of points, and memory."""
    width, patch, size, hidden, bottleneck, k = 16, 8, 16, 24, 12, 20
    config = small(model__depth=2)
    config.method = "dino"
    image = 1 + (size // patch) ** 2  # tokens of a view
    embed = 2 * (image - 1) * width * 3 * patch**2
    block = 2 * image * 12 * width**2 + 2 * 2 * image**2 * width
    last = (
        2 * (2 * image + 10) * width**2 + 2 * 2 * image * width
    )  # keys and values of all tokens, the rest for [CLS] only
    mlp = 2 * (width * hidden + hidden**2 + hidden * bottleneck)
    backbone, logits = embed + block + last + mlp, 2 * bottleneck * k
    views, teachers = 4, 2
    # a backward pass takes two products for each; none for the pixels. The mean of the teacher's logits: one more product
    step = (teachers + 3 * views) * backbone - views * embed + (teachers + 3 * views) * logits + logits
    assert count_cost(config).flops == pytest.approx(step, rel=0.02)

    with_points = small(model__depth=2)
    assert count_cost(with_points).flops > count_cost(config).flops
    more = count_memory(with_points)
    with_points.speed.activation_checkpointing = True
    less = count_memory(with_points)
    assert less.image < 0.8 * more.image  # the batch and one block stay
    assert less.state == more.state


@pytest.mark.parametrize("method", ["dino", "densedino"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_cost_of_a_deep_network_is_exact(method, checkpointing):
    """The cost is counted on two and three blocks: it equals the count at the network's own depth."""
    config = small(model__depth=5, model__drop_path=0.1)
    config.method, config.speed.activation_checkpointing = method, checkpointing
    assert vars(count_cost(config)) == cost._count_cost(config)
