"""The import rules of docs/architecture.md: a lower level never imports a higher one, and only tools import tools."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("pipeline", "model", "runtime", "eval", "tools")
LEVELS = {
    "runtime": 0, "pipeline": 0, "model": 0, "eval.datasets": 0, "eval.miou": 0, "eval.voc": 0, "eval.masks": 0,
    "pipeline.prepare": 1, "pipeline.readers": 1, "model.architecture": 0, "model.vit": 1,
    "pipeline.loader": 2, "model.methods": 2, "model.cost": 2, "model.weights": 2, "eval.features": 2, "eval.target": 2,
    "eval.provenance": 2,
    "eval": 3, "train": 4, "tools": 5,
}  # fmt: skip
NEVER_IMPORTS = (("pipeline", "model"), ("runtime", "model"), ("runtime", "pipeline"))


def modules() -> dict[str, Path]:
    files = [p for package in PACKAGES for p in (ROOT / package).rglob("*.py")] + [ROOT / "train.py"]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


def level(module: str) -> int:
    while module not in LEVELS:
        module = module.rpartition(".")[0]
    return LEVELS[module]


def imports(path: Path) -> set[str]:
    """Modules of this repository that a file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & modules().keys()) or {node.module}
    return {m for m in found if m.split(".")[0] in (*PACKAGES, "train")}


def test_import_rules():
    for module, path in modules().items():
        for other in imports(path):
            assert level(other) <= level(module), f"{module} (level {level(module)}) imports {other} ({level(other)})"
            assert not other.startswith("tools") or module.startswith("tools"), f"{module} imports a tool"
            pair = module.split(".")[0], other.split(".")[0]
            assert pair not in NEVER_IMPORTS, f"{module} imports {other}"


def test_light_imports():
    """Geometry and the config need no torch."""
    for path in (
        ROOT / "pipeline" / "geometry.py",
        *(ROOT / "runtime").glob("config*/**/*.py"),
        *(ROOT / "runtime").glob("config*.py"),
    ):
        tree = ast.parse(path.read_text())
        names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not any(str(n).split(".")[0] == "torch" for n in names), path


def test_file_names_say_what_is_inside():
    for path in modules().values():
        assert not {"utils", "util", "common", "misc", "helpers"} & {*path.parts, path.stem}, path
