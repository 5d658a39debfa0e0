"""The import rules of docs/architecture.md: a lower level never imports a higher one, and only tools import tools."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "model", "runtime", "eval", "tools")
LEVELS = {
    "runtime": 0, "pipeline": 0, "model": 0, "eval.datasets": 0, "eval.miou": 0,
    "pipeline.prepare": 1, "pipeline.readers": 1, "model.vit": 1,
    "pipeline.loader": 2, "model.methods": 2, "model.cost": 2, "model.weights": 2, "eval.features": 2, "eval.target": 2,
    "eval": 3, "train": 4, "tools": 5,
}  # fmt: skip
KNOWS_NOTHING_OF = (("pipeline", "model"), ("runtime", "model"), ("runtime", "pipeline"))


def modules() -> dict[str, Path]:
    files = [p for package in PACKAGES for p in (ROOT / package).rglob("*.py")] + [ROOT / "train.py"]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


def level(module: str) -> int:
    while module not in LEVELS:
        module = module.rpartition(".")[0]
    return LEVELS[module]


def imports(path: Path) -> set[str]:
    """Modules of this repository that a file imports, wherever in the file."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (whole & modules().keys()) or {node.module}
    return {m for m in found if m.split(".")[0] in (*PACKAGES, "train")}


def test_import_rules():
    for module, path in modules().items():
        for other in imports(path):
            assert level(other) <= level(module), f"{module} (level {level(module)}) imports {other} ({level(other)})"
            assert not other.startswith("tools") or module.startswith("tools"), f"{module} imports a tool"
            assert (module.split(".")[0], other.split(".")[0]) not in KNOWS_NOTHING_OF, f"{module} imports {other}"


def test_light_imports():
    """Geometry needs NumPy only; the config is read without torch."""
    for module, forbidden in (("pipeline/geometry.py", "torch"), ("runtime/config.py", "torch")):
        tree = ast.parse((ROOT / module).read_text())
        names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not any(str(n).split(".")[0] == forbidden for n in names), module


def test_no_file_without_a_purpose():
    for path in modules().values():
        assert not {"utils", "util", "common", "misc", "helpers"} & {*path.parts, path.stem}, path
