"""Equal to the published code of Leopart, number by number: the tensors of ../shared/oracle-leopart. $ORACLE_LEOPART names
another folder; its index lists the cases and their settings.

A step is followed from its views to the updated weights, in float32 and in float64. The mask counts a full bin whatever its
rounding (`model.losses.dense_clustering.FULL`), so losses are compared with those that the index calls forgiven.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.alignment import BINS, Overlaps
from model.foreground import foreground
from model.losses.dense_clustering import dense_clustering
from model.methods import build
from model.methods.clustering import assign
from model.methods.encode import encode
from model.methods.leopart import square
from pipeline.batch import Batch
from pipeline.geometry import draw_windows, overlap
from runtime.config import Clustering, Config, Head, Model, Views, load_config
from runtime.pixels import IMAGENET
from runtime.schedule import Optimizer, StepValues, make_schedules

ROOT = Path(__file__).parents[1]
FOLDER = Path(os.environ.get("ORACLE_LEOPART", ROOT.parent / "shared" / "oracle-leopart"))
INDEX = FOLDER / "l_leopart_index.json"
NUMBERS: dict[str, Any] = json.loads(INDEX.read_text())["numbers"] if INDEX.is_file() else {}
CASES = [n for n, case in NUMBERS.items() if "steps" in case and (FOLDER / f"{n}.safetensors").is_file()]
needs_oracle = pytest.mark.skipif(
    not CASES, reason=f"no published reference: {INDEX} does not exist (set ORACLE_LEOPART=folder)"
)
MASKS = {"fg": "foreground", "bg": "background", "all": "all"}


def config_of(case: dict) -> Config:
    """The settings of a case: those of the published command, at its sizes."""
    config = Config(
        method="leopart", model=Model("custom", case["patch"], case["width"], case["depth"], case["heads"], 0.0)
    )
    config.head = Head(case["hidden"], case["feat"], case["K"])
    sizes = zip(case["crops"], case["sizes"], strict=True)
    config.data.views = [Views(n, size, teacher=not i) for i, (n, size) in enumerate(sizes)]
    factor = case["lr_heads"] / case["lr_backbone"]
    config.clustering = Clustering(0.05, 3, case["queue"], mask=MASKS[case["mask"]], head_lr_factor=factor)  # type: ignore[arg-type]
    return config


def our_name(name: str) -> str:
    """A parameter's published name -> ours."""
    name = name.replace("projection_head.", "head.mlp.").replace("prototypes.", "head.last_layer.")
    return name if name.startswith("head.") else f"backbone.{name}"


class Case:
    """The tensors of a case, the common inputs among them, in one precision."""

    def __init__(self, name: str, dtype: torch.dtype):
        self.settings, self.steps = NUMBERS[name]["config"], NUMBERS[name]["steps"]
        tensors = load_file(FOLDER / "l_leopart_common.safetensors") | load_file(FOLDER / f"{name}.safetensors")
        self.tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
        self.dtype, self.step = dtype, ""

    def get(self, name: str) -> Tensor:
        return self.tensors[self.step + name]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Ours by name: what the published code has under a prefix."""
        prefix = self.step + prefix
        return {our_name(n.removeprefix(prefix)): t for n, t in self.tensors.items() if n.startswith(prefix)}

    def check(self, name: str, ours: Tensor) -> None:
        """Ours is the tensor of this name, if the case has it. Theirs are rounded to float32 in both precisions."""
        theirs = self.tensors.get(self.step + name)
        if theirs is None:
            return
        theirs = theirs[-len(ours) :] if name.startswith("sinkhorn") else theirs  # the batch's, after the queue's
        rounding = self.steps[0].get("max_abs_fp32_vs_fp64_forgiven", {}).get(name, 0.0)
        # published overlaps are rounded to float32 before they are read
        close = 1.6e-6 if name.startswith("aligned.") else 2e-7
        tolerance = (1 if self.dtype == torch.float64 else 2) * rounding + close * max(1.0, float(theirs.abs().max()))
        difference = float((ours.detach() - theirs).abs().max())
        assert difference <= tolerance, f"{name}: {difference:.1e} off, {tolerance:.1e} allowed"


def load(case: Case) -> Any:
    method: Any = build(config_of(case.settings)).to(case.dtype)
    for role in ("student", "teacher"):
        getattr(method, role).load_state_dict(case.under(f"init.{role}."))
        getattr(method, role).head.normalize_prototypes()  # the published step begins with it
    if method.queue is not None and "init.queue" in case.tensors:
        method.queue.rows.copy_(case.tensors["init.queue"])
    return method


def batch_of(case: Case) -> Batch:
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in IMAGENET)
    views, first = [], 0
    for count in case.settings["crops"]:
        pixels = torch.stack([case.tensors[f"views_u8.{v}"] for v in range(first, first + count)])
        views.append(((pixels / 255 - mean) / std).to(case.dtype))  # the float64 run has the views of the other
        first += count
    ids, none = torch.arange(views[0].shape[1]), torch.empty(0)
    return Batch(0, ids, ids, views, case.tensors["geo.windows_xyxy"], none, none)


@needs_oracle
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_step(name: str, dtype: torch.dtype):
    """Tokens, attention, mask, assignments, aligned maps, losses, gradients, AdamW, EMA, queue."""
    case = Case(name, dtype)
    method, batch = load(case), batch_of(case)
    groups = method.parameter_groups()
    optimizer = Optimizer(method.student, 0.0, groups=groups)
    for i, numbers in enumerate(case.steps):
        case.step = next((p for p in (f"s{i}.", f"step{i}.") if any(n.startswith(p) for n in case.tensors)), "")
        if i and not case.step:
            pytest.fail(f"the tensors of step {i} have no name that this test knows")
        at = StepValues(i, numbers["lr_groups"][0], numbers["wd_groups"][0], numbers["momentum"])
        method.before_step(at)
        z = check_parts(case, method, batch)
        out = method(batch, at)
        case.check("loss_rounding_forgiven", out.loss)
        exact = numbers["loss_fp64_rounding_forgiven"]
        assert out.loss.item() == pytest.approx(exact, abs=1e-7 if dtype == torch.float64 else 2e-6)
        out.loss.backward()
        parameters = dict(method.student.named_parameters())
        assert all(p.grad is not None for p in parameters.values())
        for n in case.under("grad."):
            theirs = case.under("grad.")[n]
            ours = parameters[n].grad
            assert float((ours - theirs).norm() / theirs.norm()) < 1e-5 or float((ours - theirs).abs().max()) < 5e-7, n
        optimizer.step(at, None, method.before_update)
        for role, lr in (("student", at.lr), ("teacher", 0.0)):
            ours = dict(getattr(method, role).named_parameters())
            for n, theirs in case.under(f"after.{role}.").items():
                factor = method.settings.head_lr_factor if n.startswith("head.") else 1
                check_updated(n, ours[n].detach(), theirs, lr * factor)
        if method.queue is not None:
            pushed = [case.get(f"queue.pushed_rows.{t}").long() for t in range(2)]
            method.newest = [torch.stack([z[t].flatten(0, 1)[rows] for t, rows in enumerate(pushed)])]
        method.after_step([], at, torch.ones((), dtype=dtype))
        if method.queue is not None:
            case.check("queue.after", method.queue.rows)


@torch.no_grad()
def check_parts(case: Case, method: Any, batch: Batch) -> Tensor:
    """What the loss is made of. Returns the teacher's unit vectors [T,B,N,d]."""
    teacher, student = method.teacher, method.student
    (tokens,) = encode(teacher.backbone, batch, 2, ("cls", "patches", "attention"))
    case.check("teacher.tokens", torch.cat([tokens.cls[..., None, :], tokens.patches], 2).flatten(0, 1))
    case.check("teacher.cls_attention", tokens.attention.flatten(0, 1))
    z = teacher.head(tokens.patches)
    case.check("teacher.embedding", z.flatten(0, 2))
    case.check("teacher.scores", teacher.head.scores(z).flatten(0, 2))
    if f"{case.step}fg.mask" in case.tensors:
        assert torch.equal(foreground(tokens.attention.flatten(0, 1))[:, None], case.get("fg.mask").bool())
    q = assign(z.flatten(1, 2), teacher.head.prototypes, method.queue, student.head.prototypes, method.settings)
    mask = method.mask(tokens.attention)
    for t in range(2):
        case.check(f"sinkhorn.q_all.{t}", q[t])
    maps = square(q.unflatten(1, z.shape[1:3]))  # [T,B,g,g,K]
    grid = square(mask[..., None])  # [T,B,g,g,1]
    overlaps = Overlaps(batch.windows, 2)
    read_q, read_mask = overlaps.read_teachers(maps), overlaps.read_teachers(grid.to(q.dtype))
    views = encode(student.backbone, batch, method.views, ("cls", "patches"))
    for size, x in zip(("global", "local"), views, strict=False):  # a recipe may have no local views
        case.check(f"student.tokens_{size}", torch.cat([x.cls[..., None, :], x.patches], 2).flatten(0, 1))
    embedded = [student.head(x.patches) for x in views]
    case.check("student.embedding", torch.cat([e.flatten(0, 2) for e in embedded]))
    scores = [square(student.head.scores(e)) for e in embedded]
    case.check("student.scores", torch.cat([s.flatten(0, 3) for s in scores]))
    first = 0
    for of_size in scores:
        read = overlaps.read_views(of_size, slice(first, first + len(of_size)))
        for t in range(2):
            for v in range(len(of_size)):
                case.check(f"aligned.student_scores.{t}.{first + v}", read[:, t, v].permute(0, 3, 1, 2))
        first += len(of_size)
    for t in range(2):
        case.check(f"aligned.teacher_q.{t}", read_q[:, t].permute(0, 1, 4, 2, 3))
        case.check(f"aligned.mask_raw.{t}", read_mask[:, t, ..., 0])
    _, pair_loss, bins = dense_clustering(scores, maps, grid[..., 0], batch.windows, method.temperature)
    case.check("pair_loss_rounding_forgiven", pair_loss)
    if case.dtype == torch.float32 and not case.steps[0]["full_bins_dropped_by_rounding_fp32"]:
        assert torch.equal(bins.long(), case.get("pair_bins").long())
    return z


def check_updated(name: str, ours: Tensor, theirs: Tensor, lr: float) -> None:
    """2e-7 in 99.9 % of the entries. Where the true gradient is nearly zero, Adam's first step is the sign of noise, so a
    difference of 2 lr is allowed; the key third of qkv.bias has an analytically zero gradient."""
    difference = (ours - theirs).abs()
    assert difference.max() <= 2.02 * lr + 2e-7, name
    if name.endswith("qkv.bias"):
        difference = torch.cat([difference[: len(difference) // 3], difference[2 * len(difference) // 3 :]])
    assert (difference > 2e-7).double().mean() <= 1e-3 + 1 / difference.numel(), name


def test_roi():
    """Maps of published sizes, read in the overlaps of published windows."""
    path = FOLDER / "l_leopart_roi.safetensors"
    if not path.is_file():
        pytest.skip(f"no published reference: {path} does not exist (set ORACLE_LEOPART=folder)")
    c = load_file(path)
    overlaps = Overlaps(c["geo.windows_xyxy"], 2)

    def by_view(name: str) -> Tensor:
        return c[name].double().permute(1, 0, 3, 4, 2)  # [n,views,C,h,w] -> [views,n,h,w,C]

    small = by_view("maps.local")
    ours = {
        "teacher": overlaps.read_teachers(by_view("maps.teacher")),
        "student": torch.cat(
            [overlaps.read_views(by_view("maps.global"), slice(0, 2)), overlaps.read_views(small, slice(2, None))], 2
        ),
    }
    # the number of samples jumps at a side of exactly BINS patches, where the rounding of a published box decides
    side = (overlaps.high - overlaps.low).double()  # [n,T,V,2]
    window = (overlaps.end - overlaps.start).abs()
    for name, own in (("teacher", window[:, :2, None]), ("student", window[:, None])):
        patches = c["maps.teacher"].shape[-1] * torch.ones(side.shape[2])
        if name == "student":
            patches[2:] = c["maps.local"].shape[-1]
        clear = ((side / own * patches[:, None] - BINS).abs() > 1e-5).all(-1)  # [n,T,V]
        assert clear.double().mean() > 0.98
        for precision, tolerance in (("_fp64", 2e-6), ("", 4e-6)):
            theirs = c[f"aligned.{name}{precision}"].double().permute(0, 1, 2, 4, 5, 3)
            difference = (ours[name] - theirs).abs()[clear].max()
            assert difference < tolerance * float(theirs.abs().max()), (name, precision, float(difference))


@needs_oracle
def test_schedules():
    """The shipped config has the published rates, decay and momentum at every step that the file lists."""
    want = json.loads((FOLDER / "l_leopart_schedules.json").read_text())["published_in100k"]
    config = load_config(ROOT / "configs" / "leopart_vits16.yaml")
    ours = make_schedules(config, want["steps_per_epoch"])
    assert len(ours) == want["steps"]
    factor = config.clustering.head_lr_factor
    columns = {
        "lr_backbone": ours.lr, "lr_heads": ours.lr * factor, "weight_decay": ours.weight_decay,
        "teacher_momentum": ours.teacher_momentum,
    }  # fmt: skip
    for name, values in columns.items():
        for step, value in want[name].items():
            assert values[int(step)] == pytest.approx(value, rel=1e-9, abs=1e-18), (name, step)
        assert values.sum() == pytest.approx(want["sums"][name], rel=1e-9)


def test_views():
    """The shipped config draws windows as the published code does: areas and overlaps have the same distribution."""
    path = FOLDER / "l_leopart_views.safetensors"
    if not path.is_file():
        pytest.skip(f"no published reference: {path} does not exist (set ORACLE_LEOPART=folder)")
    c = {n: t.numpy().astype(np.int64) for n, t in load_file(path).items()}
    config = load_config(ROOT / "configs" / "leopart_vits16.yaml")
    width, height = c["image_sizes_wh"].T
    ours = draw_windows(
        np.arange(len(width), dtype=np.uint64), height, width, scale=[v.scale for v in config.views],
        aspect=config.data.aspect, min_overlap=config.data.min_overlap, flip=config.data.flip,
    )  # fmt: skip

    def shares(windows: np.ndarray) -> dict[str, np.ndarray]:
        image = width * height
        area = (windows[..., 2:] - windows[..., :2]).prod(-1) / image[:, None]
        common = overlap(windows[:, :1], windows) / image[:, None]
        return {"large": area[:, 1], "small": area[:, 3], "both": common[:, 1], "overlap": common[:, 3]}

    theirs, mine = shares(c["windows_xyxy"]), shares(ours.astype(np.int64))
    for name in theirs:
        at = np.sort(np.concatenate([theirs[name], mine[name]]))
        below = [np.searchsorted(np.sort(x[name]), at, "right") / len(at) * 2 for x in (theirs, mine)]
        assert np.abs(below[0] - below[1]).max() < 0.06, name  # Kolmogorov-Smirnov
