"""Help, wrong options and wrong paths are answered before torch is imported; that takes seconds."""

import json
import shlex

import pytest
import torch
from conftest import run_program
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from eval.provenance import png_text, weights_of
from eval.report import settings_of
from eval.target import EvalTarget
from runtime.checkpoint import save_backbone

HEAVY = ("torch", "torchvision", "timm", "matplotlib", "numba")

# Runs command lines as `python -m`, in turns; prints each one's exit code, the heavy packages imported so far, its output.
PROGRAMS = """
import contextlib, io, json, runpy, sys
results = []
for module, *words in json.load(sys.stdin):
    sys.argv = [module, *words]
    output, code = io.TextIOWrapper(io.BytesIO(), "utf-8"), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code
    output.flush()
    results.append([code, [name for name in {heavy} if name in sys.modules], output.buffer.getvalue().decode()])
json.dump(results, sys.stdout)
"""

COMMANDS = {  # command line: exit code
    "tools.show --help": 0,
    "tools.show views --help": 0,
    "tools.show attention --help": 0,
    "tools.show misalignment --help": 0,
    "tools.show run --help": 0,
    "tools.show nothing": 2,
    "tools.show pca": 2,
    "tools.show pca no/such/run": 2,
    "tools.show points {run} --nothing": 2,
    "tools.show points {run} no/such/photo.jpg": 2,
    "tools.show similarity {run} --compare no/such/run": 2,
    "tools.show segmentation {run} --scenes 0": 2,
    "tools.show neighbors {run} --queries 0": 2,
    "tools.show views no/such/shards": 2,
    "tools.show views {run} --images 0": 2,
    "tools.show views {run} --skip-existing": 0,
    "tools.show misalignment no/such/folder": 2,
    "tools.show misalignment --config no/such.yaml": 2,
    "tools.show run no/such/run": 2,
    "tools.show run {run} --skip-existing": 0,
    "tools.bench --help": 0,
    "tools.bench data --help": 0,
    "tools.bench step --help": 0,
    "tools.bench nothing": 2,
    "tools.bench step --form nothing": 2,
    "tools.bench step --methods dino,nothing": 2,
    "tools.bench step --arch vit_smal": 2,
    "tools.bench step --rounds 0": 2,
    "tools.bench data --shards no/such/shards": 2,
    "tools.bench all --config no/such.yaml": 2,
    "tools.bench leak --shards no/such/shards": 2,
    "tools.bench scale two": 2,
    "tools.bench shards --src no/such/photos": 2,
    "tools.bench checkpoint --config no/such.yaml": 2,
    "tools.gpu --help": 0,
    "tools.gpu --parts nothing": 2,
    "tools.gpu --minutes 0": 2,
    "tools.gpu --shards no/such/shards": 2,
    "tools.gpu --out docs": 2,
    "tools.make_scenes --help": 0,
    "tools.make_scenes scenes --train 0": 2,
    "tools.make_shards --help": 0,
    "tools.make_shards make no/such/photos shards": 2,
    "tools.export --help": 0,
    "tools.export no/such/run exported": 2,
    "tools.plan --help": 0,
    "tools.plan": 2,
    "tools.plan --images ten": 2,
    "tools.plan --images 10000 --gpu h10": 2,
    "tools.plan --images 10000 --config no/such.yaml": 2,
    "tools.plan --images 10000 --gpu 24GB": 0,
    "tools.plan --src docs/pictures --gpu cpu": 0,
    "tools.slurm --help": 0,
    "tools.slurm --gpus 0 configs/demo.yaml": 2,
    "tools.slurm --gpus 1 no/such.yaml": 2,
    "tools.pretrain --help": 0,
    "tools.pretrain --gpus x configs/demo.yaml": 2,
    "tools.pretrain --restarts x configs/demo.yaml": 2,
    "tools.paper --help": 0,
    "tools.paper table9": 2,
    "tools.paper table1 --scale paper": 2,
    "tools.paper table1 --photos no/such/shards no/such/shards": 2,
    "tools.paper all --scale paper": 2,
    "tools.paper table2 --measures nothing": 2,
    "tools.paper table2 --photos no/such/shards no/such/shards": 2,
    "tools.finish_run --help": 0,
    "tools.finish_run no/such/run": 2,
    "tools.finish_run {run} --skip-existing": 0,
    "eval --help": 0,
    "eval knn --help": 0,
    "eval linear --help": 0,
    "eval linear_seg --help": 0,
    "eval cluster_seg --help": 0,
    "eval retrieval_seg --help": 0,
    "eval compare --help": 0,
    "eval report --help": 0,
    "eval html --help": 0,
    "eval nothing": 2,
    "eval knn": 2,
    "eval knn no/such/run": 2,
    "eval knn {run} --nothing": 2,
    "eval knn {run} --features patch": 2,
    "eval knn {run} --temperature .001": 2,
    "eval knn {run}": 2,
    "eval knn timm:vit_small --untrained": 2,
    "eval knn timm:vit_small --train no/such/shards": 2,
    "eval linear {run} --rates a,b": 2,
    "eval linear {run} --val no/such/shards": 2,
    "eval linear_seg {run}": 2,
    "eval linear_seg {run} --protocol dense": 2,
    "eval linear_seg {run} --data no/such/folder": 2,
    "eval cluster_seg {run} --data no/such/folder": 2,
    "eval cluster_seg {run} --clusters 1": 2,
    "eval retrieval_seg {run} --memory-size 0": 2,
    "eval retrieval_seg no/such/run": 2,
    "eval compare {run} {run}": 2,
    "eval compare {run} no/such/run": 2,
    "eval compare {run} --measures nothing": 2,
    "eval compare timm:vit_small --only-untrained --measures nothing": 2,
    "eval compare {run} --out README.md/x": 2,
    "eval report no/such/run": 2,
    "eval report {run} --data no/such/folder": 2,
    "eval report {run} --skip-existing": 0,
    "eval html no/such/run": 2,
    "eval embed --help": 0,
    "eval embed no/such/run configs no/such/folder": 2,
    "eval embed {run} no/such/photos no/such/folder": 2,
    "eval embed {run} configs no/such/folder": 2,
    "eval embed {run} docs/pictures configs": 2,
    "eval embed {run} docs/pictures no/such/folder --features patch": 2,
    "eval embed {run} docs/pictures no/such/folder --dtype float64": 2,
    "eval embed {run} docs/pictures no/such/folder --points no/such/points.csv": 2,
    "eval embed {run} docs/pictures no/such/folder --features patches --neighbors": 2,
    "eval html {run}": 0,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder as if all that follows training had been made."""
    folder = tmp_path_factory.mktemp("startup") / "run"
    (folder / "pictures").mkdir(parents=True)
    (folder / "config.yaml").write_text("data: {shards: no/such/shards}\n")
    missing: dict = {"knn_top1": None, "knn_top1_patches": None, "miou": None}
    save_backbone(folder / "checkpoints" / "checkpoint-00000007.safetensors", torch.nn.Linear(1, 1), {"steps": 7})
    weights = weights_of(folder)
    results = missing | {
        "untrained": missing,
        "pixels": {"knn_top1": None},
        "chance": {},
        "settings": {},
        "weights": weights,
    }
    results["asked"] = settings_of(EvalTarget(str(folder)), None, None, None)
    (folder / "results.json").write_text(json.dumps(results))
    text = PngInfo()
    text.add_text(*png_text([weights]).popitem())
    for name in ("views", "attention", "pca", "similarity", "neighbors", "points"):
        Image.new("L", (1, 1)).save(folder / "pictures" / f"{name}.png", pnginfo=text)
    (folder / "report.html").write_text("")
    return folder


def test_nothing_heavy_is_imported(run):
    """All command lines in one process: a package that any of them imports is seen after it."""
    commands = [shlex.split(command.format(run=run)) for command in COMMANDS]
    done = run_program("-c", PROGRAMS.format(heavy=HEAVY), input=json.dumps(commands))
    results = json.loads(done.stdout)
    assert len(results) == len(COMMANDS)
    for (command, expected), (code, imported, output) in zip(COMMANDS.items(), results, strict=True):
        assert imported == [], f"{command} imports {', '.join(imported)}"
        assert code == expected, f"{command}: exit code {code}\n{output}"
        assert "Traceback" not in output, f"{command}:\n{output}"
