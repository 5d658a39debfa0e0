"""Equal to the published code of SwAV, number by number: the tensors of ../shared/oracle-baselines. $ORACLE_BASELINES names
another folder; its index lists the cases and their settings.

The inputs are backbone features, so only heads, losses, queues and the optimizer are followed.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.losses.sinkhorn import sinkhorn
from model.methods import build
from runtime.config import Clustering, Config, Head, Model, Views
from runtime.schedule import StepValues

FOLDER = Path(os.environ.get("ORACLE_BASELINES", Path(__file__).parents[2] / "shared" / "oracle-baselines"))
INDEX = FOLDER / "baselines_index.json"
FILES: dict[str, Any] = json.loads(INDEX.read_text())["files"] if INDEX.is_file() else {}
DTYPES = {"float32": torch.float32, "float64": torch.float64}
# largest differences of the losses, and of everything else; in float32, the published rounding of each tensor comes on top
LOSS = {torch.float32: 1e-6, torch.float64: 1e-13}
REST = {torch.float32: 5e-7, torch.float64: 1e-13}


def method_of(settings: dict) -> str:
    """The method of a case by its settings, whatever its name: SwAV has an epsilon, DenseCL a lambda, MoCo-v3 no K."""
    return (
        "swav" if "eps" in settings else "densecl" if "lam" in settings else "mocov2" if "K" in settings else "mocov3"
    )


def cases(method: str) -> list[Any]:
    """(name, settings, precision) of each of a method's cases; one that is skipped without the folder."""
    names = [n for n, file in FILES.items() if "config" in file and method_of(file["config"]) == method]
    found = [pytest.param(n, FILES[n]["config"], d, id=f"{n}-{d}") for n in names for d in DTYPES]
    skip = pytest.mark.skip(reason=f"no published reference: {INDEX} does not exist (set ORACLE_BASELINES=folder)")
    return found or [pytest.param("", {}, "", marks=skip, id=method)]


class Case:
    """The tensors of a case in one precision: inputs, and what the published code made of them."""

    def __init__(self, name: str, precision: str):
        self.dtype = DTYPES[precision]
        self.rounding = {n: key.get("max_abs_f32_minus_f64", 0.0) for n, key in FILES[name]["keys"].items()}
        of_precision = {"float64": f"{name}_f64"}.get(precision, name)
        tensors = load_file(FOLDER / f"{name}.safetensors") | load_file(FOLDER / f"{of_precision}.safetensors")
        self.tensors = {n: t.to(self.dtype) if t.is_floating_point() else t for n, t in tensors.items()}

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}

    def check(self, name: str, ours: Tensor) -> None:
        """Ours is the tensor of this name."""
        theirs, tolerance = self.tensors[name], (LOSS if "loss" in name else REST)[self.dtype]
        assert ours.dtype == theirs.dtype
        if self.dtype == torch.float32:
            tolerance += self.rounding[name]
        difference = float((ours.detach() - theirs).abs().max())
        assert difference <= tolerance * max(1.0, float(theirs.abs().max())), f"{name}: {difference:.1e} off"


# ---------------------------------------------------------------------------------------------------------------- SwAV


def swav_config(case: dict) -> Config:
    config = Config(method="swav", model=Model("custom", 8, case["E"], 1, 1, 0.0))
    three = case.get("head") == "three_gelu"
    config.head = Head(
        case["hidden"],
        case["d"],
        case["K"],
        3 if three else 2,
        "gelu" if three else "relu",
        "none" if three else "batch",
    )
    config.data.views = [Views(count, 16 // (i + 1), teacher=not i) for i, count in enumerate(case["crops"])]
    config.loss.student_temperature = case["tau"]
    config.clustering = Clustering(case["eps"], case["iters"], case["queue"])
    return config


def swav_name(name: str) -> str:
    """A parameter's published name -> ours, in the head."""
    return name.replace("projection_head", "mlp").replace("prototypes", "last_layer")


@pytest.mark.parametrize(("name", "settings", "precision"), cases("swav"))
def test_swav(name: str, settings: dict, precision: str):
    """Projections, assignments, losses, gradients, parameters and queues, step by step."""
    case = Case(name, precision)
    method = build(swav_config(settings)).to(case.dtype)
    head: Any = method.student.head
    init = {n: t for n, t in case.under("init.").items() if "running" not in n and n != "queue"}
    head.load_state_dict({swav_name(n): t for n, t in init.items()})
    head.normalize_prototypes()  # the published step begins with it
    if method.queue is not None:
        method.queue.rows.copy_(case.tensors["init.queue"])
    parameters = dict(head.named_parameters())
    sgd = torch.optim.SGD(head.parameters(), settings["lr"], momentum=0.9, weight_decay=settings.get("wd", 1e-6))
    for step in range(settings["steps"]):
        at, s = StepValues(step, frozen=step < settings["freeze"]), f"s{step}."
        features = case.tensors[f"in.{s}features"].requires_grad_()
        method.before_step(at)
        case.check(f"{s}prototypes_used", head.prototypes)
        z = head(features)
        case.check(f"{s}embedding", z)
        case.check(f"{s}scores", head.scores(z))
        for t in range(2):
            q = sinkhorn(case.tensors[f"{s}sinkhorn_scores.{t}"], settings["eps"], settings["iters"])
            case.check(f"{s}q_all.{t}", q)
        out = method.compare(features, at)
        case.check(f"{s}loss", out.loss)
        out.loss.backward()
        case.check(f"{s}grad.features", features.grad)
        if at.frozen:
            head.prototypes.grad = None
        for n in case.under(f"{s}grad."):
            if n != "features":
                assert parameters[swav_name(n)].grad is not None, n
                case.check(f"{s}grad.{n}", parameters[swav_name(n)].grad)
        sgd.step()
        sgd.zero_grad()
        for n in case.under(f"{s}after."):
            if "running" not in n:
                case.check(f"{s}after.{n}", parameters[swav_name(n)])
        method.after_step([], at, torch.tensor(1.0))
        if method.queue is not None:
            case.check(f"{s}queue_after", method.queue.rows)
