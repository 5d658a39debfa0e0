"""Equal to the published reference, number by number: the tensors of ../shared/oracle were computed by the published code.

One test for each a_small_<mode>.safetensors; more can be added there. $ORACLE names another folder.
Long: `test_step` follows one published step from its views to the updated weights.
"""

import re

import numpy as np
import pytest
import torch
from conftest import ORACLE, losses_of
from torch import Tensor

from model.losses.cross_entropy import CrossEntropy
from model.methods import Method, build
from model.methods.student_teacher import STUDENT, TEACHER, group_by_count
from model.reference import point_embedding, resize_grid
from model.weights import load_strictly, remap_keys
from pipeline.batch import Batch
from pipeline.geometry import points_in_views
from runtime.config import Config, Head, Model, Views
from runtime.pixels import IMAGENET
from runtime.schedule import Optimizer, Schedules, make_schedules

MODES = {
    "020": "none",
    "all2pos": "patches+cls",
    "all2pos_pos2cls": "patches",
    "all2pos_pos2cls_eye": "patches+self",
    "all_query": "all_query",
}
CASES = sorted(p.stem.removeprefix("a_small_") for p in ORACLE.glob("a_small_*.safetensors") if "common" not in p.stem)
needs_oracle = pytest.mark.skipif(not CASES, reason=f"no oracle: {ORACLE} does not exist (set ORACLE=folder)")


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-30))


def config_of(case: dict, mode: str | None, views: list[Views], image: int) -> Config:
    """The published command's choices at the oracle's size; mode None: plain DINO."""
    config = Config(method="densedino" if mode else "dino")
    config.model = Model("custom", case.get("patch", 16), case["embed"], case["depth"], case["heads"], 0.0)
    config.head = Head(case["head_hidden"], case["head_bottleneck"], case["out_dim"])
    config.data.views = views
    config.loss.cls_views = "teacher" if mode else "all"
    config.reference.attention = mode or "patches+self"  # type: ignore[assignment]
    config.reference.center = "published"
    config.reference.points = case["M"]
    assert config.image_size == image
    return config


def schedules_of(steps: list[dict]) -> Schedules:
    """The oracle's schedules; the last layers are frozen during epoch 0."""
    column = lambda name: np.array([s[name] for s in steps])  # noqa: E731
    temperature, always = np.full(len(steps), 0.04), np.ones(len(steps), bool)
    return Schedules(column("lr"), column("wd"), column("m"), temperature, column("epoch") == 0, always)


def load_method(config: Config, tensors: dict[str, Tensor]) -> Method:
    """Our method with the oracle's student and teacher, loaded as published checkpoints are."""
    model = build(config)
    for role, network in (("student", model.student), ("teacher", model.teacher)):
        own = {n.removeprefix(f"{role}."): t for n, t in tensors.items() if n.startswith(f"{role}.")}
        load_strictly(network, remap_keys(own), role)
    return model


def batch_of(tensors: dict[str, Tensor]) -> Batch:
    """The oracle's views and points in the loader's form."""
    teacher = (tensors["tea_pos"].double().permute(1, 0, 2, 3, 4) + 1) / 2  # [B,T,V,M,2]
    student = (tensors["stu_pos"].double().permute(1, 2, 0, 3, 4) + 1) / 2
    empty = torch.empty(0)
    ids = torch.arange(len(teacher))
    return Batch(0, ids, ids, [tensors["views"]], empty, torch.stack([teacher, student], -2), empty)


def check_updated(ours: dict[str, Tensor], theirs: dict[str, Tensor], lr: float, momentum: float | None = None) -> None:
    """1e-5 in 99.9 % of the entries. Where the true gradient is (nearly) zero, Adam's first step is the sign of noise, so a
    difference of 2 lr is allowed (the key third of qkv.bias has an analytically zero gradient)."""
    step = 2 * lr * (1 if momentum is None else 1 - momentum) * 1.01 + 1e-5
    off = total = 0
    for name, theirs_ in theirs.items():
        difference = (ours[name] - theirs_).abs()
        if name.endswith("qkv.bias"):
            width = len(difference) // 3
            assert difference[width : 2 * width].max() < step, name
            difference[width : 2 * width] = 0
        assert difference.max() < step, name
        off += int((difference > 1e-5).sum())
        total += difference.numel()
    assert off <= 1e-3 * total


def scale_losses_as_published(model: Method) -> tuple[float, float]:
    """Published code divides each loss by the number of its terms + 1e-5. Returns the factors against our exact means, and
    applies them to the weights of the total."""
    shares = 2 / (2 + 1e-5), 6 / (6 + 1e-5)
    model.cls_loss.weight, model.reference_loss.weight = (0.5 * share for share in shares)
    return shares


def check_steps(model: Method, batch: Batch, case: dict, steps: list[dict], want: dict[str, Tensor]) -> None:
    """Losses, gradients, clipping, AdamW, teacher and centers of each step."""
    schedules = schedules_of(steps)
    optimizer = Optimizer(model.student, case.get("clip", 3.0), split_positions=True)
    log, _ = losses_of(model, batch)
    assert torch.isclose(log["loss"], 0.5 * (log["cls_loss"] + log["reference_loss"]), rtol=1e-6)
    shares = scale_losses_as_published(model)
    for i, step in enumerate(steps):
        log, means = losses_of(model, batch)
        cls, reference = (log[name] * share for name, share in zip(("cls_loss", "reference_loss"), shares, strict=True))
        for ours, name in ((cls, "global_loss"), (reference, "ref_loss"), (log["loss"], "loss")):
            assert name not in step or ours.item() == pytest.approx(step[name], rel=1e-5), name
        log["loss"].backward()
        if i == 0:
            theirs = remap_keys({n[5:]: g for n, g in want.items() if n.startswith("grad.")})
            ours = {n: p.grad for n, p in model.student.named_parameters() if p.requires_grad}
            assert ours.keys() == theirs.keys()
            for name in theirs:
                if name.endswith("qkv.bias"):  # the key third is zero except for rounding
                    width = case["embed"]
                    ours[name][width : 2 * width] = theirs[name][width : 2 * width]
                assert relative(ours[name], theirs[name]) < 1e-5, name
        norms = torch._foreach_norm(optimizer._clipped())
        assert "n_clipped" not in step or sum(float(n) > step["clip"] for n in norms) == step["n_clipped"]
        optimizer.step(schedules.at(i))
        model.update_teacher(step["m"])
        model.update_centers(means)
        assert relative(model.cls_center, want[f"step{i}.center"][0]) < 1e-5
        assert relative(model.reference_center, want[f"step{i}.ref_center"][0]) < 1e-5
        if i == 0:
            for role, momentum in (("student", None), ("teacher", step["m"])):
                own = {n.removeprefix(f"step0.{role}."): t for n, t in want.items() if n.startswith(f"step0.{role}.")}
                check_updated(dict(getattr(model, role).state_dict()), remap_keys(own), step["lr"], momentum)


@needs_oracle
@pytest.mark.parametrize("mode", CASES)
def test_step(mode: str, oracle, oracle_json):
    """Three optimizer steps of DenseDINO: everything the published code computes, in its order."""
    tensors = oracle("a_small_common")
    want = oracle(f"a_small_{mode}")
    index = oracle_json("a_small_index")
    case = index["config"]
    steps = index.get(mode, {}).get("fp32", {}).get("steps", case["schedule"])  # a dropped-in case may lack its scalars
    views = [Views(2, 64, teacher=True, blur=[1.0, 0.1], solarize=[0.0, 0.2]), Views(2, 64)]
    config = config_of(case, MODES[mode], views, 64)
    model, batch = load_method(config, tensors), batch_of(tensors)
    m, n_views = case["M"], case["V"]
    rows = {"student": n_views * case["B"], "teacher": 2 * case["B"]}

    def in_our_order(tokens: Tensor, role: str) -> Tensor:
        """[CLS], all slots' points, patches of each image -> [CLS] and patches of all images, then the points we compute."""
        references = tokens.shape[1] - 17
        image = torch.cat([tokens[:, :1], tokens[:, 1 + references :]], 1).flatten(0, 1)
        points = (
            tokens[:, 1 : 1 + references].unflatten(1, (-1, m)).unflatten(0, (-1, case["B"]))
        )  # [views,B,slots,M,D]
        side = TEACHER if role == "teacher" else STUDENT
        groups = group_by_count(getattr(model, f"{role}_pairs"), range(len(points)), side)
        views = iter(range(len(points)))
        ours = [image]
        for group in groups:
            slots = [[v if role == "teacher" else t for t, v in pairs] for pairs in group]
            ours += [points[next(views)][:, of_view].flatten(0, 2) for of_view in slots]
        return torch.cat(ours)

    # tokens after every block, outputs, logits
    logits, spheres = {}, {}
    for role, side in (("student", STUDENT), ("teacher", TEACHER)):
        network = getattr(model, role)
        blocks: list[Tensor] = []
        original = network.backbone._block
        network.backbone._block = lambda b, x, *r, o=original, inputs=blocks: inputs.append(x) or o(b, x, *r)
        with torch.no_grad():
            cls, tokens = model.encode_views(network, batch, side, getattr(model, f"{role}_pairs"))
        del network.backbone._block
        assert relative(blocks[0], in_our_order(want[f"{role}.tokens_in"], role)) < 1e-5
        for i in range(1, case["depth"]):
            assert relative(blocks[i], in_our_order(want[f"{role}.block{i - 1}_out"], role)) < 1e-5
        assert relative(cls.flatten(0, 1), want[f"{role}.cls"][:, 0]) < 1e-5
        with torch.no_grad():
            logits[role] = network.cls_head.logits(cls)
            spheres[role] = network.cls_head(cls)
        assert relative(logits[role].flatten(0, 1), want[f"{role}.head_cls"][:, 0]) < 1e-5
        their_tokens = want[f"{role}.ref"].view(rows[role] // case["B"], case["B"], -1, m, case["embed"])
        their_logits = want[f"{role}.head_ref"].view(*their_tokens.shape[:-1], -1)
        # a teacher's row holds the slots v of its view t, a student's the slots t of v
        for t, v in model.reference_pairs:
            view, slot = (t, v) if role == "teacher" else (v, t)
            assert relative(tokens[t, v], their_tokens[view, :, slot]) < 1e-5
            with torch.no_grad():
                logits[role, t, v] = network.point_head.logits(tokens[t, v])
                spheres[role, t, v] = network.point_head(tokens[t, v])
            assert relative(logits[role, t, v], their_logits[view, :, slot]) < 1e-5

    # the cross-entropy of every pair that enters a loss
    center, cross_entropy = torch.zeros(case["out_dim"]), CrossEntropy(torch.ones(1, 1), 0.1)

    def pair_loss(head: str, student: Tensor, teacher: Tensor) -> float:
        layer, layer_t = (getattr(n, head).last_layer for n in (model.student, model.teacher))
        return cross_entropy(student[None], layer, teacher[None], layer_t, center, 0.04, teacher.mean(0))[0].item()

    for t, v in [(0, 1), (1, 0)]:
        loss = pair_loss("cls_head", spheres["student"][v], spheres["teacher"][t])
        assert loss == pytest.approx(float(want["pair_ce.cls"][t, v]), rel=1e-5)
    for t, v in model.reference_pairs:
        points = [spheres[role, t, v].flatten(0, 1) for role in ("student", "teacher")]
        assert pair_loss("reference_head", *points) == pytest.approx(float(want["pair_ce.ref"][t, v]), rel=1e-5)

    check_steps(model, batch, case, steps, want)


@needs_oracle
@pytest.mark.parametrize("mode", CASES)
def test_losses_in_float64(mode: str, oracle, oracle_json):
    """Three steps in float64 against the float64 twins."""
    index = oracle_json("a_small_index")
    if "fp64" not in index.get(mode, {}):
        pytest.skip(f"no float64 twin of {mode}")
    case, steps = index["config"], index[mode]["fp64"]["steps"]
    tensors = oracle("a_small_common")
    config = config_of(case, MODES[mode], [Views(2, 64, teacher=True, blur=[1.0]), Views(2, 64)], 64)
    model, batch = load_method(config, tensors).double(), batch_of(tensors)
    batch.views = [batch.views[0].double()]
    schedules = schedules_of(steps)
    optimizer = Optimizer(model.student, 3.0, split_positions=True)
    shares = scale_losses_as_published(model)
    for i, step in enumerate(steps):
        log, means = losses_of(model, batch)
        assert log["cls_loss"].item() * shares[0] == pytest.approx(step["global_loss"], rel=1e-9)
        assert log["reference_loss"].item() * shares[1] == pytest.approx(step["ref_loss"], rel=1e-9)
        log["loss"].backward()
        optimizer.step(schedules.at(i))
        model.update_teacher(step["m"])
        model.update_centers(means)


@needs_oracle
def test_loss_variants(oracle, oracle_json):
    """Which views enter each loss, and alpha."""
    index = oracle_json("a_small_index")
    tensors = oracle("a_small_common")
    for name, want in index["variants_loss_only"].items():
        mode, all_cls, all_ref, alpha = re.match(r"(.*)\|all_global=(.*)\|all_ref=(.*)\|alpha=(.*)", name).groups()
        config = config_of(index["config"], MODES[mode], [Views(2, 64, teacher=True), Views(2, 64)], 64)
        config.loss.cls_views = "all" if all_cls == "True" else "teacher"
        config.reference.views = "all" if all_ref == "True" else "teacher"
        config.loss.alpha = float(alpha)
        with torch.no_grad():
            log, _ = losses_of(load_method(config, tensors), batch_of(tensors))
        n_cls, n_ref = (6 if all_cls == "True" else 2), (6 if all_ref == "True" else 2)
        cls, reference = log["cls_loss"] * n_cls / (n_cls + 1e-5), log["reference_loss"] * n_ref / (n_ref + 1e-5)
        assert float(cls) == pytest.approx(want["global_loss"], rel=1e-5), name
        assert float(reference) == pytest.approx(want["ref_loss"], rel=1e-5), name
        assert float(config.loss.alpha * cls + (1 - config.loss.alpha) * reference) == pytest.approx(
            want["loss"], rel=1e-5
        )
        assert float(log["loss"]) == pytest.approx(want["loss"], rel=1e-5), name


def test_dino_multicrop(oracle, oracle_json):
    """Plain DINO, 2 x 224 + 2 x 96 in one step: several sizes, the position grid resized for the small views."""
    tensors, want = oracle("b_multicrop_inputs_dino"), oracle("b_dino_multicrop")
    index = oracle_json("b_dino_index")
    config = config_of(index["config"], None, [Views(2, 224, teacher=True), Views(2, 96, (0.05, 0.4))], 224)
    model = load_method(config, tensors)
    mean, std = (torch.tensor(c).view(1, 1, 3, 1, 1) for c in IMAGENET)
    views = [torch.stack([tensors[f"views_u8.{i}"] for i in pair]) / 255 for pair in ((0, 1), (2, 3))]  # [2,B,3,S,S]
    empty = torch.empty(0)
    ids = torch.arange(3)
    batch = Batch(0, ids, ids, [(v - mean) / std for v in views], empty, torch.empty(3, 2, 4, 0, 2, 2), empty)
    for role, side in (("student", STUDENT), ("teacher", TEACHER)):
        with torch.no_grad():
            cls, _ = model.encode_views(getattr(model, role), batch, side)
            assert relative(cls.flatten(0, 1), want[f"{role}.cls"]) < 1e-5
            assert relative(getattr(model, role).cls_head.logits(cls).flatten(0, 1), want[f"{role}.head"]) < 1e-5
    steps = index["fp32"]
    schedules = schedules_of(steps)
    optimizer = Optimizer(model.student, 3.0)
    for i, step in enumerate(steps):
        log, means = losses_of(model, batch, step["teacher_temp"])
        # the exact mean over DINO's 10 terms
        assert float(log["loss"].detach()) == pytest.approx(step["loss"], rel=1e-5)
        log["loss"].backward()
        if i == 0:
            theirs = remap_keys({n[5:]: g for n, g in want.items() if n.startswith("grad.")})
            for name, p in model.student.named_parameters():
                if p.requires_grad:
                    ours = p.grad.clone()
                    if name.endswith("qkv.bias"):
                        ours[48:96] = theirs[name][48:96]
                    assert relative(ours, theirs[name]) < 1e-5, name
        assert sum(float(n) > 3.0 for n in torch._foreach_norm(optimizer._clipped())) == step["n_clipped"]
        optimizer.step(schedules.at(i))
        model.update_teacher(step["m"])
        model.update_centers(means)
        assert relative(model.cls_center, want[f"step{i}.center"][0]) < 1e-5
        if i == 0:
            for role, momentum in (("student", None), ("teacher", step["m"])):
                own = {n.removeprefix(f"step0.{role}."): t for n, t in want.items() if n.startswith(f"step0.{role}.")}
                check_updated(dict(getattr(model, role).state_dict()), remap_keys(own), step["lr"], momentum)


@pytest.mark.parametrize("grid", ["g14", "g4"])
def test_point_embedding(grid: str, oracle):
    """Values and gradient of the bicubic interpolation, both border rules."""
    c = {n.removeprefix(f"{grid}."): t for n, t in oracle("c_posembed").items()}
    side = int(c["patch_pos_embed"].shape[1] ** 0.5)
    table = c["patch_pos_embed"][0].unflatten(0, (side, side)).requires_grad_()
    points = c["points01"][None]
    out = point_embedding(table, points)[0]
    assert relative(out, c["out"]) < 1e-5
    assert (out - c["out"]).abs().max() < 1e-5
    (gradient,) = torch.autograd.grad(out, table, c["cotangent"])
    assert relative(gradient.flatten(0, 1), c["grad_patch_pos_embed"]) < 1e-5
    assert relative(point_embedding(table, points, "border")[0], c["out_border_padding_NOT_HEAD"]) < 1e-5
    ones = point_embedding(torch.ones(side, side, 1), points)[0, :, 0]
    assert (ones - c["weight_sum"]).abs().max() < 1e-5
    exact = point_embedding(table.double(), (c["grid"].double()[None] + 1) / 2)[0]
    assert (exact - c["out_fp64"]).abs().max() < 1e-6


def test_resized_grid(oracle):
    """The position grid for images of other sizes, including non-square ones."""
    c = oracle("c_posembed")
    table = c["g14.patch_pos_embed"][0].unflatten(0, (14, 14))
    cases = [n for n in c if n.startswith("resize.")]
    assert len(cases) >= 8
    for name in cases:
        h, w = (int(s) // 16 for s in name.removeprefix("resize.").split("x"))
        assert relative(resize_grid(table, h, w).flatten(0, 1), c[name][0]) < 1e-5, name


@pytest.mark.parametrize("case", ["V4M4_224", "V6M9_224", "V6M4_224_96"])
def test_points(case: str, oracle):
    """Points from the published boxes, flips and uniform draws."""
    c = {n.removeprefix(f"{case}."): t.numpy() for n, t in oracle("d_points_exact").items() if n.startswith(case)}
    windows = c["boxes"].astype(np.int32)
    windows[c["flip"] != 0] = windows[c["flip"] != 0][:, [2, 1, 0, 3]]
    ours = points_in_views(windows, c["u"].astype(np.float64))  # [B,T,V,M,2,2]
    assert np.abs(ours[..., 0, :] * 2 - 1 - c["tea"]).max() < 1e-6 * 2
    assert np.abs(ours[..., 1, :].swapaxes(1, 2) * 2 - 1 - c["stu"]).max() < 1e-6 * 2


def test_schedules(oracle_json):
    """Every schedule at every index that the file contains."""
    want = oracle_json("f_schedules")

    def check(values: np.ndarray, name: str) -> None:
        reference = want[name]
        assert len(values) == reference["len"]
        assert values[:50] == pytest.approx(np.array(reference["first50"]), rel=1e-12, abs=1e-15)
        for i, value in reference.get("sampled", {}).items():
            assert values[int(i)] == pytest.approx(value, rel=1e-12, abs=1e-15), (name, i)
        if "sum" in reference:
            assert values.sum() == pytest.approx(reference["sum"], rel=1e-12)

    config = Config()
    config.optim.epochs = 100
    for batch in (256, 512):
        config.optim.global_batch_size = batch
        check(make_schedules(config, 7).lr, f"lr_base0.0005_bs{batch}")
    config.optim.global_batch_size, config.optim.warmup_epochs = 256, 0
    schedules = make_schedules(config, 7)
    check(schedules.lr, "lr_nowarmup")
    check(schedules.weight_decay, "wd")
    check(schedules.teacher_temperature[::7], "teacher_temp_default_0.04_0.04_0")
    for momentum in (0.996, 0.9995):
        config.optim.teacher_momentum = momentum
        check(make_schedules(config, 7).teacher_momentum, f"momentum{momentum}")
    config.loss.teacher_temperature, config.loss.teacher_temperature_warmup = (0.04, 0.07), 30
    check(make_schedules(config, 7).teacher_temperature[::7], "teacher_temp_0.04_0.07_30")
    assert list(schedules.frozen[:8]) == [True] * 7 + [False]
