"""F18: decompression bombs: small files whose header says very many pixels. They are refused by the header: when shards are
made, when tars are indexed, and in training, whatever the index says; memory grows by less than 200 MB.

DALI takes 12.3 GB and 41 s for the first of them.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import run_measured, run_program
from pictures import encoded, lying_jpeg, overwrite, photo, png_bomb, tar_of, tiff_bomb, tree, webp_bomb

from pipeline.shards import Shards

CONFIG = """
data: {views: [{count: 2, size: 32, scale: [0.4, 1.0], teacher: true}, {count: 2, size: 16}]}
model: {arch: custom, patch: 8, width: 24, depth: 2, heads: 2}
reference: {points: 2}
head: {hidden: 32, bottleneck: 16, prototypes: 40}
speed: {compile: false, workers: 0, device: cpu}
"""
MAKE = "from tools.make_shards import main; code = main()"
TRAIN = "from train import main; code = main()"
READ = """
import importlib.util
from pipeline.plan import Plan
from pipeline.readers import webdataset
from pipeline.shards import Shards
from runtime.config import load_config
readers = {"wds": webdataset.read}
if importlib.util.find_spec("nvidia.dali"):
    from pipeline.readers import dali
    readers["dali"] = dali.read
for folder in sys.argv[2:]:
    config = load_config(sys.argv[1], ["data.shards=" + folder, "optim.global_batch_size=4"])
    shards = Shards(folder)
    plan = Plan(shards, batch=4, seed=0)
    rows = {n: [i for b in read(config, shards, plan, start=0, stop=6) for i in b.rows.tolist()]
            for n, read in readers.items()}
    print(*({tuple(r) for r in rows.values()}))
code = 0
"""
BOMBS = {
    "png": {"bomb.png": (lambda: png_bomb(30000, 30000), "its header says 900000000 pixels", "30000 x 30000 pixels")},
    "jpeg": {
        "bomb.jpg": (lambda: lying_jpeg(65000, 65000), "its header says 4225000000 pixels", "65000 x 65000 pixels")
    },
    "webp, tiff": {
        "bomb.webp": (webp_bomb, "its header says 268435456 pixels", "16384 x 16384 pixels"),
        "bomb.tif": (tiff_bomb, "its header says 900000000 pixels", "it is not a JPEG, PNG or WebP"),
    },
}
PHOTOS, SIDE = 12, 850
GOOD = {f"{i}.jpg": photo(i) for i in range(8)}
MORE = ("--max-bad", "0.3", "--processes", "1")
SHORT = ["optim.epochs=2", "optim.warmup_epochs=0", "optim.global_batch_size=4", "data.holdout=0", "run.log_every=1"]


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Path:
    """Shards of photos with as many bytes as the bombs: noise."""
    folder, rng = tmp_path_factory.mktemp("intact"), np.random.default_rng(0)
    noise = [encoded(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8), quality=97) for _ in range(PHOTOS)]
    assert min(map(len, noise)) > 900_000
    src = tree(folder / "src", {f"{i:02d}.jpg": data for i, data in enumerate(noise)})
    run_program("-m", "tools.make_shards", "make", src, folder / "dst", "--processes", "1")
    return folder / "dst"


@pytest.fixture(scope="module")
def ordinary(intact, tmp_path_factory) -> dict[str, int]:
    """Peak memory of each program, in MB, for valid photos."""
    folder = tmp_path_factory.mktemp("ordinary")
    config = folder / "config.yaml"
    config.write_text(CONFIG)
    _, make = run_measured(MAKE, "make", tree(folder / "good", GOOD), folder / "dst", *MORE)
    _, read = run_measured(READ, config, intact)
    _, train = run_measured(TRAIN, config, *SHORT, f"data.shards={intact}", f"run.folder={folder / 'run'}")
    return {"make": make, "read": read, "train": train}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to measure the peak")
@pytest.mark.fault("F18")
@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb(kind, intact, ordinary, tmp_path):
    bombs = {name: (make_bomb(), *reasons) for name, (make_bomb, *reasons) in BOMBS[kind].items()}
    # made into shards, and in a tar that is indexed (by a name that `index` accepts)
    src = tree(tmp_path / "src", GOOD | {name: bomb for name, (bomb, *_) in bombs.items()})
    as_jpg = {name.replace(".", "-") + ".jpg": bomb for name, (bomb, *_) in bombs.items()}
    tar_of(GOOD | as_jpg, tmp_path / "tars" / "t.tar")
    for words, folder in (
        (("make", src, tmp_path / "made"), tmp_path / "made"),
        (("index", tmp_path / "tars"), tmp_path / "tars"),
    ):
        done, peak = run_measured(MAKE, *words, *MORE)
        assert peak < ordinary["make"] + 200
        assert f"rejected {len(bombs)} (rejected.jsonl)" in done.stdout
        assert len(Shards(folder)) == len(GOOD)
        refused = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
        names = [row["source"].removeprefix("t.tar/").removesuffix(".jpg").replace("-", ".") for row in refused]
        for name, row in zip(names, refused, strict=True):
            assert bombs[name if name in bombs else f"{name}.jpg"][1] + ", more than --max-pixels" in row["reason"]

    # in place of indexed photos, with the right crc32: once with the photo's size in the index, once with the header's
    bombed = Path(shutil.copytree(intact, tmp_path / "bombed"))
    places = {}
    for i, (name, (bomb, _, reason)) in enumerate(sorted(bombs.items())):
        overwrite(bombed, 2 * i, bomb, indexed=True)
        overwrite(bombed, 2 * i + 1, bomb, indexed=True)
        places |= {
            2 * i: f"its header says {reason}, the index {SIDE} x {SIDE}",
            2 * i + 1: f"{reason} are more than the readers accept",
        }
        if name == "bomb.tif":
            places |= dict.fromkeys((2 * i, 2 * i + 1), reason)
    index = np.load(bombed / "index.npy")
    side = {"png": 30000, "jpeg": 65000, "webp, tiff": 16384}[kind]
    index["height"][1::2], index["width"][1::2] = side, side
    index["height"][2 * len(bombs) :], index["width"][2 * len(bombs) :] = SIDE, SIDE
    np.save(bombed / "index.npy", index)
    shards = Shards(bombed)
    assert {i: w for i in range(PHOTOS) if (w := shards.validation_error(i, shards.read(i)).split(" (")[0])} == places

    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    done, peak = run_measured(READ, config, intact, bombed)
    assert peak < ordinary["read"] + 200
    original, replaced = done.stdout.splitlines()  # one line each: the readers agree
    assert set(range(PHOTOS)) == {int(i) for i in original.strip("()").split(",")}
    assert not {int(i) for i in replaced.strip("()").split(",")} & set(places)

    # and by the trainer
    words = [*SHORT, f"data.shards={bombed}", f"run.folder={tmp_path / 'run'}", "data.max_corrupt=0.5"]
    done, peak = run_measured(TRAIN, config, *words)
    assert "finished: 6 steps" in done.stdout
    assert peak < ordinary["train"] + 200
    rows = [json.loads(line) for line in (tmp_path / "run" / "damaged.jsonl").read_text().splitlines()]
    assert sorted(row["planned"] for row in rows) == sorted([*places] * 2)  # two epochs
    assert all(row["why"].startswith(places[row["planned"]]) for row in rows)
