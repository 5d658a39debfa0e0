"""Compiled training on several processes: units above DDP's bucket size, static shapes, accumulation, checkpointing."""

import json
from pathlib import Path

import pytest

from tests.faults.program import Program, final, log

# train.py with a torch.compile that also writes one line for each graph: its nodes and symbolic sizes
SCRIPT = """
import json, os, sys
sys.path.insert(0, {root!r})
import train

BACKEND, GRAPHS = {backend!r}, {graphs!r}

def backend(graph, inputs, **options):
    from torch._dynamo.backends.registry import lookup_backend
    import torch
    symbolic = sum(isinstance(x, torch.SymInt) or any(isinstance(s, torch.SymInt) for s in getattr(x, "shape", ()))
                   for x in inputs)
    line = {{"nodes": len(graph.graph.nodes), "symbolic": symbolic}}
    with open(GRAPHS, "a") as file:
        file.write(json.dumps(line) + "\\n")
    return lookup_backend(BACKEND)(graph, inputs, **options)

def main():
    import torch
    compile = torch.compile
    torch.compile = lambda *args, **options: compile(*args, **options | {{"backend": backend}})
    return train.main()

if __name__ == "__main__":  # worker processes import this file
    train.run_cli(main)
"""


def compiling(folder: Path, backend: str) -> tuple[Path, Path]:
    """(train.py with this compiler backend, the file that lists its graphs)."""
    from tests.conftest import ROOT

    path, graphs = folder / "compiling.py", folder / "graphs.jsonl"
    path.write_text(SCRIPT.format(root=str(ROOT), backend=backend, graphs=str(graphs)))
    return path, graphs


LARGE = ["model.arch=custom", "model.width=512", "model.depth=3", "model.heads=8"]  # 38 MB of blocks: two buckets
MULTI_CROP: list[str] = []  # the views of the tiny config, two of 32 and two of 16 pixels
FOUR_VIEWS = ["data.views.1.size=32"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "views", "speed"),
    [
        ("aot_eager", FOUR_VIEWS, []),
        ("aot_eager", MULTI_CROP, []),
        ("aot_eager", FOUR_VIEWS, ["speed.grad_accum_steps=2", "speed.activation_checkpointing=true"]),
        ("aot_eager", MULTI_CROP, ["speed.grad_accum_steps=2", "speed.activation_checkpointing=true"]),
        ("inductor", MULTI_CROP, ["speed.grad_accum_steps=2"]),
    ],
    ids=["4-views", "multi-crop", "4-views-accumulated", "multi-crop-accumulated", "inductor"],
)
def test_large_units_compiled_on_two_processes(tiny_config, tmp_path, backend, views, speed):
    """The losses equal those of the same run without compilation, and no graph has a symbolic size."""
    words = [
        *LARGE,
        *views,
        *speed,
        "speed.precision=bfloat16",
        "optim.epochs=0.4",
        "optim.warmup_epochs=0",
        "model.drop_path=0",
    ]
    script, graphs = compiling(tmp_path, backend)
    run = Program(tiny_config, *words, "speed.compile=true", f"run.folder={tmp_path / 'c'}", processes=2, script=script)
    code, out, err = run.end(limit=400)
    assert code == 0, f"{out}\n{err}"
    assert "recompile_limit" not in err
    seen = [json.loads(line) for line in graphs.read_text().splitlines()]
    assert seen
    assert not sum(graph["symbolic"] for graph in seen)
    plain = Program(tiny_config, *words, f"run.folder={tmp_path / 'e'}", processes=2)
    code, out, err = plain.end()
    assert code == 0, f"{out}\n{err}"
    ours, theirs = log(tmp_path / "c")["losses"], log(tmp_path / "e")["losses"]
    assert len(ours) == 2
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-2)
    assert final(tmp_path / "c").keys() == final(tmp_path / "e").keys()
