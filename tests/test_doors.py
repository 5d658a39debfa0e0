"""The doors of docs/house.md: lower rooms never import higher ones, and nobody imports a tool."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("pipeline", "model", "runtime", "eval", "tools")
LEVELS = {
    "runtime": 0,
    "pipeline.draws": 0, "pipeline.shards": 0, "pipeline.geometry": 0, "pipeline.augment": 0, "pipeline.augment_cpu": 0,
    "pipeline.batch": 0, "pipeline.decode": 0,
    "pipeline.remote": 0,
    "model.reference": 0, "model.heads": 0, "model.losses": 0, "eval.datasets": 0, "eval.miou": 0,
    "pipeline.dali": 1, "pipeline.wds": 1, "model.vit": 1,
    "pipeline.loader": 2, "model.methods": 2, "model.cost": 2, "model.weights": 2, "eval.features": 2, "eval.subject": 2,
    "eval": 3, "train": 4, "tools": 5,
}  # fmt: skip


def modules() -> dict[str, Path]:
    files = [p for room in ROOMS for p in (ROOT / room).rglob("*.py") if p.stem != "__init__"] + [ROOT / "train.py"]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in files}


def level(module: str) -> int:
    while module not in LEVELS:
        module = module.rpartition(".")[0]
        assert module, "a file without a level: add it to LEVELS and to docs/house.md"
    return LEVELS[module]


def imports(path: Path) -> set[str]:
    """Modules of the house that a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (whole & modules().keys()) or {node.module}
    return {m for m in found if m.split(".")[0] in (*ROOMS, "train")}


@pytest.mark.parametrize("module", sorted(modules()))
def test_door(module: str):
    own = level(module)
    for other in imports(modules()[module]):
        assert level(other) <= own, f"{module} (level {own}) imports {other} (level {level(other)})"
        assert not other.startswith("tools") or module.startswith("tools"), f"{module} imports a tool"
        pairs = ((module.split(".")[0], other.split(".")[0]),)
        assert ("pipeline", "model") not in pairs, "the pipeline does not know there is a model"
        assert ("runtime", "model") not in pairs, "plumbing knows no maths"
        assert ("runtime", "pipeline") not in pairs or module == "runtime", "plumbing knows no pixels"


def test_light_starts():
    """Geometry needs NumPy only; the config is read without torch."""
    for module, forbidden in (("pipeline/geometry.py", "torch"), ("runtime/config.py", "torch")):
        tree = ast.parse((ROOT / module).read_text())
        names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not any(str(n).split(".")[0] == forbidden for n in names), module


def test_no_room_without_a_purpose():
    for path in modules().values():
        assert not {"utils", "util", "common", "misc", "helpers"} & {*path.parts, path.stem}, path
