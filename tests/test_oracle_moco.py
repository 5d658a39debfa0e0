"""MoCo-v2, DenseCL and MoCo-v3 equal to their published code, step by step: the tensors of ../shared/oracle-baselines.

One test for each case of baselines_index.json whose name begins with moco_, densecl_ or mocov3_, in float32 and float64;
more can be added there. $ORACLE_BASELINES names another folder. Features of the backbones are given: a case is what follows
from them: heads, losses, gradients, optimizer, average and queues.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.losses.info_nce import unit
from model.methods import Method, build
from model.methods.densecl import most_similar
from model.vit import Tokens
from model.weights import load_strictly
from runtime.config import Config, Contrast, Head, Model, Views
from runtime.schedule import StepValues

FOLDER = Path(os.environ.get("ORACLE_BASELINES", Path(__file__).parents[2] / "shared" / "oracle-baselines"))
INDEX = FOLDER / "baselines_index.json"
FILES = json.loads(INDEX.read_text())["files"] if INDEX.is_file() else {}
METHODS = {"moco": "mocov2", "densecl": "densecl", "mocov3": "mocov3"}
CASES = [n for n in FILES if n.partition("_")[0] in METHODS and not n.endswith("_f64")]
PARTS = {  # published names: ours
    "encoder_q.fc": "student.projector", "encoder_k.fc": "key.projector",
    "encoder_q.1.mlp": "student.projector", "encoder_k.1.mlp": "key.projector",
    "encoder_q.1.mlp2": "student.dense_projector", "encoder_k.1.mlp2": "key.dense_projector",
    "base_encoder.head": "student.projector", "momentum_encoder.head": "key.projector", "predictor": "student.predictor",
    "fc": "student.projector", "1.mlp": "student.projector", "1.mlp2": "student.dense_projector",
}  # fmt: skip
# of the README, in float32; where the published float32 is further from its float64, twice that
TOLERANCES = {"loss": 1e-6, "projection": 4e-7, "logits": 2.5e-6, "grad": 5e-7, "after": 4e-7}


class Case:
    """The tensors of a case in one precision, and the configuration that made them."""

    def __init__(self, name: str, dtype: torch.dtype):
        about = FILES[name]
        self.method, self.config, self.dtype = METHODS[name.partition("_")[0]], about["config"], dtype
        tensors = load_file(FOLDER / f"{name}.safetensors")
        self.keys = FILES[name]["keys"]
        if dtype == torch.float64:
            tensors |= load_file(FOLDER / f"{name}_f64.safetensors")
        self.tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}

    def names(self, prefix: str) -> dict[str, str]:
        """Our name of each published parameter below a prefix: its key in the file."""
        ours = {}
        for key in self.tensors:
            name = key.removeprefix(prefix)
            part = name.rsplit(".", 2)[0]
            if key.startswith(prefix) and part in PARTS and "running" not in name:
                ours[PARTS[part] + name.removeprefix(part)] = key
        return ours

    def tensor(self, key: str) -> Tensor:
        """1x1 convolutions [out,in,1,1] as matrices."""
        t = self.tensors[key]
        return t.flatten(1) if t.shape[2:] == (1, 1) else t

    def check(self, key: str, ours: Tensor, kind: str) -> None:
        theirs, tolerance = self.tensor(key), 1e-12
        assert ours.shape == theirs.shape, key
        if self.dtype == torch.float32:
            tolerance = max(TOLERANCES[kind], 2 * self.keys[key].get("max_abs_f32_minus_f64", 0))
        assert (ours - theirs).abs().max() <= tolerance, key


def build_case(case: Case) -> Method:
    """Our method with the published heads and queues; its backbone is not used."""
    c, first = case.config, {n: case.tensor(key) for n, key in case.names("init.").items()}
    width, hidden = c["E"], len(first["student.projector.0.weight"])
    config = Config(method=case.method, model=Model("custom", 8, width, 1, 1, 0.0), head=Head(hidden, c["d"]))
    feature = "mean" if case.method == "densecl" else "cls"
    config.contrast = Contrast(c.get("K", 1), c["T"], feature, c.get("lam", 0.5))
    config.data.views = [Views(2, 8, teacher=True)]
    method = build(config).to(case.dtype)
    for part in sorted({name.rsplit(".", 2)[0] for name in first}):
        load_strictly(
            method.get_submodule(part),
            {n.removeprefix(f"{part}."): t for n, t in first.items() if n.startswith(f"{part}.")},
        )
    for queue, name in zip(queues(method), ("queue", "queue2"), strict=False):
        queue.rows.copy_(case.tensors[f"init.{name}"].T)
        queue.pointer.copy_(case.tensors[f"init.{name}_ptr"][0])
    method.moved.fill_(1)  # the networks start different, as after a step
    return method


def queues(method: Method) -> tuple:
    return method.queues() if hasattr(method, "queues") else ()


def optimizer_of(case: Case, method: Method) -> torch.optim.Optimizer:
    """The published one, with its weight decay on everything."""
    parameters, lr = method.student.parameters(), case.config["lr"]
    if case.method == "mocov3":
        return torch.optim.AdamW(parameters, lr, weight_decay=case.config.get("wd", 0.1))
    return torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=case.config.get("wd", 1e-4))


def tokens_of(features: Tensor) -> Tokens:
    """Features as our backbone gives them: [...,E] of images, or a map [B,E,g,g]."""
    if features.ndim == 4:
        patches = features.flatten(2).transpose(1, 2)
        return Tokens(patches[:, 0], patches, None)
    return Tokens(features, None, None)


@torch.no_grad()
def check_forward(case: Case, t: int, method: Method, query: Tokens, key: Tokens) -> None:
    """What is between features and losses: projections, logits, matches."""
    student, networks_key, s = method.student, method.key, f"s{t}."
    if case.method == "mocov2":
        q, k = student.projector(query.cls), networks_key.projector(key.cls)
        case.check(s + "query_projection", q, "projection")
        case.check(s + "key_projection", k, "projection")
        case.check(s + "logits", logits(unit(q), unit(k), method.queue.rows) / case.config["T"], "logits")
    elif case.method == "densecl":
        match = most_similar(query.patches, key.patches)
        assert torch.equal(match, case.tensors[s + "match"])
        dense = {}
        for name, network, tokens in (("query", student, query), ("key", networks_key, key)):
            single, dense[name] = network.projector(method.feature(tokens)), network.dense_projector(tokens.patches)
            case.check(f"{s}{name}.single", single, "projection")
            case.check(f"{s}{name}.dense", dense[name].transpose(1, 2), "projection")
            case.check(f"{s}{name}.dense_mean", dense[name].mean(1), "projection")
        positives = unit(dense["key"]).gather(1, match.unsqueeze(-1).expand_as(dense["key"]))
        ours = logits(unit(dense["query"]).flatten(0, 1), positives.flatten(0, 1), method.dense_queue.rows)
        case.check(s + "logits_dense", ours, "projection")
    else:
        by_view = zip(query.cls.chunk(2), key.cls.chunk(2), strict=True)
        outs = [(student.projector(q), networks_key.projector(k)) for q, k in by_view]
        base, keys = (torch.stack(x) for x in zip(*outs, strict=True))
        case.check(s + "base_encoder_out", base, "projection")
        case.check(s + "momentum_encoder_out", keys, "projection")
        case.check(s + "predictor_out", torch.stack([student.predictor(x) for x in base]), "projection")


def logits(q: Tensor, k: Tensor, negatives: Tensor) -> Tensor:
    """Cosines [n,1+K], the positive first."""
    return torch.cat([(q * k).sum(1, keepdim=True), q @ negatives.T], 1)


@pytest.mark.skipif(not CASES, reason=f"no published reference: {INDEX} does not exist (set ORACLE_BASELINES=folder)")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", CASES or ["none"])
def test_published_steps(name: str, dtype: torch.dtype):
    case = Case(name, dtype)
    method, at = build_case(case), StepValues(teacher_momentum=case.config["m"])
    optimizer = optimizer_of(case, method)
    for t in range(case.config["steps"]):
        s, features = f"s{t}.", case.tensors[f"in.s{t}.features"].clone()
        method.before_step(at)
        if case.method == "mocov3":  # both networks see both views
            trained = features.requires_grad_()
            query = keys = tokens_of(trained.flatten(0, 1))
        else:
            trained = features[0].requires_grad_()
            query, keys = tokens_of(trained), tokens_of(features[1])
        check_forward(case, t, method, query, keys)
        out = method.compare(query, keys)
        case.check(s + "loss", out.loss.detach(), "loss")
        if case.method == "densecl":
            weight = case.config["lam"]
            case.check(s + "weighted_loss_single", (1 - weight) * out.metrics["image_loss"], "loss")
            case.check(s + "weighted_loss_dense", weight * out.metrics["dense_loss"], "loss")
        out.loss.backward()
        case.check(s + "grad.features", trained.grad, "grad")
        gradients = {f"student.{n}": p.grad for n, p in method.student.named_parameters() if p.grad is not None}
        published = case.names(s + "grad.")
        assert gradients.keys() == published.keys()
        for parameter, key in published.items():
            case.check(key, gradients[parameter], "grad")
        optimizer.step()
        optimizer.zero_grad()
        method.after_step([], at, torch.ones(()))
        state, published = method.state_dict(), case.names(s + "after.")
        assert published.keys() == {n for n in state if "projector" in n or "predictor" in n}
        for parameter, key in published.items():
            case.check(key, state[parameter], "after")
        for queue, queue_name in zip(queues(method), ("queue", "queue2"), strict=False):
            case.check(f"{s}after.{queue_name}", queue.rows.T, "after")
            assert queue.pointer == case.tensors[f"{s}after.{queue_name}_ptr"][0]
