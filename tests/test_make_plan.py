"""`make plan`: what training on some photos takes, before it starts, and whether its figures are true."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from model.memory import Memory
from runtime.cards import CARDS, card_of
from runtime.config import load_config
from runtime.errors import UserError
from tools.plan import counted, hours, photos, recipe
from tools.plan.__main__ import main

ROOT = Path(__file__).parents[1]


def plan(capsys, *words: str) -> str:
    assert main(list(words)) == 0
    return capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- the answers


def test_without_data(capsys):
    text = plan(capsys, "--images", "10000", "--gpu", "24GB")
    assert "configs/photos_10k.yaml" in text
    assert "fits with speed.grad_accum_steps=2" in text
    assert "estimates, no GPU was measured" in text
    assert "RTX 4090" in text
    assert "H100," not in text  # a card of another memory
    assert (
        "start        make pretrain CONFIG=configs/photos_10k.yaml SHARDS=data/mine ARGS=speed.grad_accum_steps=2"
        in text
    )


def test_the_command_of_a_plan_is_valid(capsys):
    """For any number of photos, alone and with the user's own words, which go before the rules."""
    for n in (100, 3000, 10_000, 60_000, 99_000, 300_000, 1_281_167):
        for device in ("cuda", "cpu"):
            name, _ = recipe.choose(n, device)
            values = recipe.scale(load_config(name), n, name)
            config = load_config(name, recipe.words(values))
            assert config.optim.global_batch_size <= 0.98 * n / 8
            assert counted.known(config, device, "bfloat16" if device == "cuda" else "float32"), (n, device)
    text = plan(capsys, "--images", "300k", "--gpu", "h100", "optim.epochs=7", "optim.warmup_epochs=1")
    assert "optim.epochs=360" not in text
    assert "7 epochs" in text


def test_smaller_sets_train_longer_with_smaller_heads():
    configs = []
    for n in (10_000, 60_000, 150_000, 400_000):
        name, _ = recipe.choose(n, "cuda")
        configs.append(load_config(name, recipe.words(recipe.scale(load_config(name), n, name))))
    for less, more in itertools.pairwise(configs):
        assert less.optim.epochs >= more.optim.epochs
        assert less.head.prototypes <= more.head.prototypes
        assert less.optim.teacher_momentum <= more.optim.teacher_momentum
        assert less.optim.global_batch_size <= more.optim.global_batch_size
    assert recipe.scale(load_config("configs/photos_10k.yaml"), 10_000, "configs/photos_10k.yaml") == []


def test_a_written_config_is_that_of_the_plan(capsys, tmp_path):
    path = tmp_path / "mine.yaml"
    text = plan(capsys, "--images", "300k", "--gpu", "4090", "--write", str(path), "data.jitter.hue=0.05")
    config = load_config(path)
    assert config.head.prototypes == 16384
    assert config.data.jitter.hue == 0.05
    assert config.speed.grad_accum_steps > 1
    assert f"speed.grad_accum_steps={config.speed.grad_accum_steps}" in text
    before = path.read_bytes()
    with pytest.raises(UserError, match="there is a file already"):
        main(["--images", "300k", "--write", str(path)])
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "One of IMAGES=10000"),
        (["--images", "5", "--src", "x"], "IMAGES and SRC are given"),
        (["--images", "-3"], "a whole number above 0"),
        (["--images", "10000", "--gpu", "h10"], "is it H100 PCIe or H100"),
        (["--images", "10000", "--gpu", "rtx4900"], "did you mean 'RTX 4090'"),
        (["--images", "10000", "--gpus", "7"], "nearest: optim.global_batch_size=126"),
        (["--images", "20", "--config", "configs/photos64.yaml"], "optim.global_batch_size=5"),
        (["--images", "10000", "--gpu", "cpu", "--gpus", "2"], "there is one device"),
        (["--src", "test"], "did you mean 'tests'"),
        (["--src", "configs"], "no photos"),
        (["--images", "10000", "--write", "confgs/x.yaml"], "did you mean 'configs'"),
        (["--images", "10000", "--write", "configs/x.txt"], "ends with .yaml"),
        (["--images", "10000", "--write", "configs/x.yaml", "data.views.0.size=96"], "a place in a list"),
        (["--images", "10000", "--gpuu", "h100"], "did you mean '--gpu'"),
        (["--images", "10000", "optim.lrr=3"], "did you mean 'optim.lr'"),
    ],
)
def test_wrong_words(words, message, monkeypatch):
    monkeypatch.setattr("tools.plan.__main__.count", lambda *_: pytest.skip("counted"))  # takes a minute
    with pytest.raises(UserError) as error:
        main(words)
    assert message in str(error.value)
    assert not (ROOT / "configs" / "x.yaml").exists()


# -------------------------------------------------------------------------------------------------------------- cards


def test_cards_by_any_spelling():
    for word in ("h100", "H100", "NVIDIA H100"):
        assert hours.find_device(word).cards[0].name == "H100"
    assert hours.find_device("4090").cards[0].name == hours.find_device("rtx-4090").cards[0].name == "RTX 4090"
    assert {card.memory for card in hours.find_device("24 GB").cards} == {24}
    assert hours.find_device("95GB").cards == ()
    names = {
        "NVIDIA A100-SXM4-40GB": "A100 40GB", "NVIDIA A100-SXM4-80GB": "A100", "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA H100 PCIe": "H100 PCIe", "NVIDIA GeForce RTX 4090": "RTX 4090", "NVIDIA L40S": "L40S", "NVIDIA L4": "L4",
        "NVIDIA RTX 6000 Ada Generation": "RTX 6000 Ada",
    }  # fmt: skip
    for driver, name in names.items():
        card = card_of(driver)
        assert card is not None
        assert card.name == name
    assert card_of("NVIDIA A40") is None


def test_hours_come_from_a_measured_row_if_there_is_one(tmp_path, monkeypatch):
    card = next(card for card in CARDS if card.name == "H100")
    estimate = hours.speed(card, 130, "bfloat16")
    assert estimate == (pytest.approx(0.23 * 989e3 / 130), "")
    rows = tmp_path / "rows.jsonl"
    row = {
        "device": "NVIDIA H100 80GB HBM3",
        "kind": "cuda",
        "dtype": "bfloat16",
        "what": "a run",
        "gflop": 65,
        "date": "now",
    }
    rows.write_text(json.dumps(row | {"images_per_second": 3000}) + "\n")
    monkeypatch.setattr(hours, "ROWS", rows)
    measured = hours.speed(card, 130, "bfloat16")
    assert measured.images_per_second == 1500
    assert "scaled" in measured.source


# ------------------------------------------------------------------------------------------------------------- photos


def test_large_photos_are_resized(tmp_path, capsys):
    """12 megapixels: from their headers. The size below which no window is enlarged, of the config's smallest window."""
    for i in range(3):
        Image.new("RGB", (4000, 3000), (i, 9, 9)).save(tmp_path / f"{i}.jpg")
    found = photos.of_source(str(tmp_path))
    assert (found.images, found.megapixels) == (3, 12)
    assert photos.short_side(load_config("configs/photos_10k.yaml")) == 448  # 224 px of a quarter of the area
    text = plan(capsys, "--src", str(tmp_path), "--config", "configs/photos_10k.yaml", "optim.global_batch_size=2")
    assert "--resize-short 448 --quality 90'` pays" in text
    assert f"CONFIG=configs/photos_10k.yaml SHARDS={tmp_path}" in text  # a folder of photos, as it is
    for path in tmp_path.iterdir():
        Image.new("RGB", (500, 375)).save(path)
    text = plan(capsys, "--src", str(tmp_path), "--config", "configs/photos_10k.yaml", "optim.global_batch_size=2")
    assert "it does not pay" in text


def test_shards_are_read_from_their_index(tiny_shards, capsys):
    found = photos.of_shards(str(tiny_shards))
    assert found.images > 0
    assert found.shards > 0
    assert found.sides.shape == (found.images, 2)


# ------------------------------------------------------------------------------------------------------------- memory


def test_memory_of_pieces_and_processes():
    memory = Memory(fixed=100, image=10, state=80, gradients=20)
    assert memory.peak(8) == 180
    assert memory.peak(8, pieces=4) == 100 + 20 + 20
    assert memory.peak(8, processes=2) == 200
    assert memory.peak(0) == 100  # never below networks, moments and gradients
    assert Memory(fixed=60, image=1, state=80, gradients=20).peak(1) == 100


def test_kept_counts_are_of_today():
    table = counted.read_table()
    configs = dict(counted.kept_configs())
    assert {name for row in table.values() for name in row["configs"]} == set(configs)
    for name, config in configs.items():
        assert name in table[counted.digest(config)]["configs"], f"{name}: `python -m tools.plan.counted` counts again"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["configs/demo.yaml", "configs/photos64.yaml", "configs/photos_10k.yaml"])
def test_kept_counts_are_equal_to_new_ones(name):
    config = load_config(name)
    kept, new = counted.known(config, "cpu", "float32"), counted.count(config, "cpu", "float32")
    assert kept is not None
    assert kept.flops == pytest.approx(new.flops, rel=0.01)  # torch's versions differ a little
    for key, memory in new.memory.items():
        for of_images in (8, 64):
            assert Memory(**kept.memory[key]).peak(of_images) == pytest.approx(
                Memory(**memory).peak(of_images), rel=0.05
            )


def measured_peak(name: str, batch: int, shards: Path, folder: Path, *words: str) -> float:
    """Bytes: the most that a process had resident over three steps, uncompiled."""
    per_epoch = json.loads((shards / "manifest.json").read_text())["source"]["photos"] // batch
    words = (
        f"data.shards={shards}", f"run.folder={folder}", "data.val=null", "data.holdout=0", "eval.voc=null",
        f"optim.global_batch_size={batch}", f"optim.epochs={3 / per_epoch}", "optim.warmup_epochs=0", "run.log_every=1",
        "optim.freeze_last_layer_epochs=0", "run.checkpoint_every=1000", "speed.compile=false", "speed.device=cpu",
        "speed.workers=1", *words,
    )  # fmt: skip
    subprocess.run([sys.executable, "train.py", name, *words], check=True, cwd=ROOT, capture_output=True)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return max(row["peak_memory_mb"] for row in rows if "peak_memory_mb" in row) * 2**20


@pytest.fixture(scope="module")
def process(tiny_shards, tmp_path_factory) -> float:
    """Bytes of a process with next to no tensors. It depends on the machine: torch's libraries are mapped from files."""
    folder = tmp_path_factory.mktemp("process") / "run"
    network = ("model.width=8", "model.heads=2", "head.hidden=8", "head.bottleneck=8", "head.prototypes=8")
    return measured_peak("configs/demo.yaml", 32, tiny_shards, folder, *network)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "batch"), [("configs/demo.yaml", 32), ("configs/photos64.yaml", 32), ("configs/densedino_vitti16.yaml", 8)]
)
def test_memory_is_what_a_run_measures(name, batch, process, tiny_shards, tmp_path):
    measured = measured_peak(name, batch, tiny_shards, tmp_path / "run")
    found = counted.known(load_config(name), "cpu", "float32")
    assert found is not None
    assert measured == pytest.approx(process + Memory(**found.memory["cpu float32"]).peak(batch), rel=0.15)
