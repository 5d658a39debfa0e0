"""Equal to the published code of MoCo-v2, DenseCL and MoCo-v3, step by step: more cases of the frame of
tests/test_oracle_baselines.py.

Features of the backbones are given. A case is what follows from them: heads, matches, losses, gradients, optimizer, average
and queues.
"""

import pytest
import torch
from torch import Tensor

from model.losses.info_nce import unit
from model.methods import Method, build
from model.methods.densecl import most_similar
from model.vit import Tokens
from model.weights import load_strictly
from runtime.config import Config, Contrast, Head, Model, Views
from runtime.schedule import StepValues
from tests.test_oracle_baselines import Case, cases

PARTS = {  # published names: ours
    "encoder_q.fc": "student.projector", "encoder_k.fc": "key.projector",
    "encoder_q.1.mlp": "student.projector", "encoder_k.1.mlp": "key.projector",
    "encoder_q.1.mlp2": "student.dense_projector", "encoder_k.1.mlp2": "key.dense_projector",
    "base_encoder.head": "student.projector", "momentum_encoder.head": "key.projector", "predictor": "student.predictor",
    "fc": "student.projector", "1.mlp": "student.projector", "1.mlp2": "student.dense_projector",
}  # fmt: skip


def read_case(name: str, precision: str) -> Case:
    """1x1 convolutions [out,in,1,1] are matrices here."""
    case = Case(name, precision)
    case.tensors = {n: t.flatten(1) if t.shape[2:] == (1, 1) else t for n, t in case.tensors.items()}
    return case


def parameters(case: Case, prefix: str) -> dict[str, str]:
    """Our name of each published parameter below a prefix: its key in the file."""
    ours = {}
    for name in case.under(prefix):
        part = name.rsplit(".", 2)[0]
        if part in PARTS and "running" not in name:
            ours[PARTS[part] + name.removeprefix(part)] = prefix + name
    return ours


def build_case(case: Case, method: str, settings: dict) -> Method:
    """Our method with the published heads and queues; its backbone is not used."""
    first = {n: case.tensors[key] for n, key in parameters(case, "init.").items()}
    head = Head(len(first["student.projector.0.weight"]), settings["d"])
    config = Config(method=method, model=Model("custom", 8, settings["E"], 1, 1, 0.0), head=head)
    feature = "mean" if method == "densecl" else "cls"
    config.contrast = Contrast(settings.get("K", 1), settings["T"], feature, settings.get("lam", 0.5))
    config.data.views = [Views(2, 8, teacher=True)]
    built = build(config).to(case.dtype)
    for part in {name.rsplit(".", 2)[0] for name in first}:
        own = {n.removeprefix(f"{part}."): t for n, t in first.items() if n.startswith(f"{part}.")}
        load_strictly(built.get_submodule(part), own, part)
    built.moved.fill_(1)  # the networks start different, as after a step
    return built


def follow(
    case: Case, method: Method, settings: dict, optimizer: torch.optim.Optimizer, check, both: bool = False
) -> None:
    """The published steps, in the published order. check(the step's prefix, the query network's tokens, the key network's)
    compares what is between features and losses. both: both networks see both views."""
    at = StepValues(teacher_momentum=settings["m"])
    for t in range(settings["steps"]):
        s, features = f"s{t}.", case.tensors[f"in.s{t}.features"].clone()
        trained = (features if both else features[0]).requires_grad_()
        query = tokens_of(trained.flatten(0, 1) if both else trained)
        key = query if both else tokens_of(features[1])
        method.before_step(at)
        with torch.no_grad():
            check(s, query, key)
        out = method.compare(query, key)
        case.check(f"{s}loss", out.loss)
        if "dense_loss" in out.metrics:
            case.check(f"{s}weighted_loss_single", (1 - settings["lam"]) * out.metrics["image_loss"])
            case.check(f"{s}weighted_loss_dense", settings["lam"] * out.metrics["dense_loss"])
        out.loss.backward()
        case.check(f"{s}grad.features", trained.grad)
        gradients = {f"student.{n}": p.grad for n, p in method.student.named_parameters() if p.grad is not None}
        published = parameters(case, f"{s}grad.")
        assert gradients.keys() == published.keys()
        for name, key_in_file in published.items():
            case.check(key_in_file, gradients[name])
        optimizer.step()
        optimizer.zero_grad()
        method.after_step([], at, torch.tensor(1.0))
        state, published = method.state_dict(), parameters(case, f"{s}after.")
        assert published.keys() == {name for name in state if "projector" in name or "predictor" in name}
        for name, key_in_file in published.items():
            case.check(key_in_file, state[name])
        for queue, name in with_queues(method):
            case.check(f"{s}after.{name}", queue.rows.T)
            assert queue.pointer == case.tensors[f"{s}after.{name}_ptr"][0]


def with_queues(method: Method) -> list[tuple]:
    """(queue, its published name)."""
    return list(zip(getattr(method, "queues", tuple)(), ("queue", "queue2"), strict=False))


def load_queues(case: Case, method: Method) -> None:
    for queue, name in with_queues(method):
        queue.rows.copy_(case.tensors[f"init.{name}"].T)
        queue.pointer.copy_(case.tensors[f"init.{name}_ptr"][0])


def tokens_of(features: Tensor) -> Tokens:
    """Features [n,E], or a map [B,E,g,g] of patches, as our backbone gives them."""
    patches = features.flatten(2).transpose(1, 2) if features.ndim == 4 else None
    return Tokens(features if patches is None else patches[:, 0], patches, None)


def published_sgd(method: Method, settings: dict) -> torch.optim.Optimizer:
    decay = settings.get("wd", 1e-4)  # of everything
    return torch.optim.SGD(method.student.parameters(), settings["lr"], momentum=0.9, weight_decay=decay)


def cosines(q: Tensor, k: Tensor, negatives: Tensor) -> Tensor:
    """[n,1+K], the positive first."""
    return torch.cat([(q * k).sum(1, keepdim=True), q @ negatives.T], 1)


@pytest.mark.parametrize(("name", "settings", "precision"), cases("mocov2"))
def test_mocov2(name: str, settings: dict, precision: str):
    case = read_case(name, precision)
    method = build_case(case, "mocov2", settings)
    load_queues(case, method)

    def check(s: str, query: Tokens, key: Tokens) -> None:
        q, k = method.student.projector(query.cls), method.key.projector(key.cls)
        case.check(f"{s}query_projection", q)
        case.check(f"{s}key_projection", k)
        case.check(f"{s}logits", cosines(unit(q), unit(k), method.queue.rows) / settings["T"])

    follow(case, method, settings, published_sgd(method, settings), check)


@pytest.mark.parametrize(("name", "settings", "precision"), cases("densecl"))
def test_densecl(name: str, settings: dict, precision: str):
    case = read_case(name, precision)
    method = build_case(case, "densecl", settings)
    load_queues(case, method)

    def check(s: str, query: Tokens, key: Tokens) -> None:
        image, dense = {}, {}
        for role, network, tokens in (("query", method.student, query), ("key", method.key, key)):
            image[role], dense[role] = (
                network.projector(method.feature(tokens)),
                network.dense_projector(tokens.patches),
            )
            case.check(f"{s}{role}.single", image[role])
            case.check(f"{s}{role}.dense", dense[role].transpose(1, 2))
            case.check(f"{s}{role}.dense_mean", dense[role].mean(1))
        match = most_similar(query.patches, key.patches)
        assert torch.equal(match, case.tensors[f"{s}match"])
        positives = unit(dense["key"]).gather(1, match.unsqueeze(-1).expand_as(dense["key"])).flatten(0, 1)
        case.check(f"{s}logits_single", cosines(unit(image["query"]), unit(image["key"]), method.queue.rows))
        case.check(f"{s}logits_dense", cosines(unit(dense["query"]).flatten(0, 1), positives, method.dense_queue.rows))

    follow(case, method, settings, published_sgd(method, settings), check)


@pytest.mark.parametrize(("name", "settings", "precision"), cases("mocov3"))
def test_mocov3(name: str, settings: dict, precision: str):
    case = read_case(name, precision)
    method = build_case(case, "mocov3", settings)
    adamw = torch.optim.AdamW(method.student.parameters(), settings["lr"], weight_decay=settings.get("wd", 0.1))

    def check(s: str, query: Tokens, key: Tokens) -> None:
        base = torch.stack([method.student.projector(x) for x in query.cls.chunk(2)])
        case.check(f"{s}base_encoder_out", base)
        case.check(f"{s}momentum_encoder_out", torch.stack([method.key.projector(x) for x in key.cls.chunk(2)]))
        case.check(f"{s}predictor_out", torch.stack([method.student.predictor(x) for x in base]))

    follow(case, method, settings, adamw, check, both=True)
