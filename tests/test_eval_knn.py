"""k-NN: the published vote; streaming the train set changes no result; photos from shards.

Long: all cases share the photos and shards made here.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_processes
from PIL import Image

from eval import knn
from eval.__main__ import main
from eval.datasets import NO_CLASS, LabeledPhotos, decode
from eval.features import PIXELS, photo_features, raw_pixels
from eval.knn import (
    NearestNeighbors,
    class_scores,
    in_blocks,
    knn_scores,
    nearest_labels,
    photo_knn,
    top_accuracy,
)
from eval.target import EvalTarget, open_shards, subsample
from model.vit import ViT
from pipeline.shards import Shards
from runtime.checkpoint import save_backbone
from runtime.config import load_config
from runtime.errors import UserError

HOME = Path(__file__).parents[1]
COLORS = {"blue": (30, 60, 220), "green": (40, 200, 60), "red": (220, 40, 30)}


def naive_scores(train, labels, queries, k, temperature, classes):
    """The definition in plain loops."""
    scores = torch.zeros(len(queries), classes)
    for i, query in enumerate(queries):
        similar = [float(F.cosine_similarity(query, photo, dim=0)) for photo in train]
        for j in sorted(range(len(train)), key=lambda j: -similar[j])[:k]:
            scores[i, labels[j]] += np.exp(similar[j] / temperature)
    return scores


@pytest.mark.parametrize(("rows", "memory"), [(16384, 1 << 28), (7, 7 * 4 * 3), (50, 50 * 4), (1, 4)])
def test_block_sizes_do_not_change_the_scores(monkeypatch, rows, memory):
    """One block; several blocks of both, the last one shorter; one query at a time; one photo at a time."""
    monkeypatch.setattr(knn, "BLOCK_ROWS", rows)
    draw = torch.Generator().manual_seed(0)
    train, queries = 5 * torch.randn(103, 8, generator=draw), torch.randn(10, 8, generator=draw)
    labels = torch.randint(0, 6, (103,), generator=draw)
    scores = knn_scores(train, labels, queries, 9, 0.1, 6, memory=memory)
    torch.testing.assert_close(scores, naive_scores(train, labels, queries, 9, 0.1, 6), rtol=1e-4, atol=1e-3)


def test_the_train_set_may_come_in_parts_and_in_half_precision():
    draw = torch.Generator().manual_seed(0)
    train, queries = torch.randn(60, 8, generator=draw).half(), torch.randn(5, 8, generator=draw)
    labels = torch.randint(0, 6, (60,), generator=draw)
    whole = nearest_labels(train, labels, queries, 9)
    streamed = NearestNeighbors(queries, 9, memory=1)
    for part, part_labels in zip(train.split(7), labels.split(7), strict=True):
        streamed.update(part, part_labels)
    torch.testing.assert_close(streamed.similarities, whole[0])
    assert torch.equal(streamed.labels, whole[1])
    few = NearestNeighbors(queries, 9)
    few.update(train[:4], labels[:4])
    assert few.similarities[:, 4:].isneginf().all()  # only four neighbors, so five have no vote
    torch.testing.assert_close(
        class_scores(few.similarities, few.labels, 0.1, 6), knn_scores(train[:4], labels[:4], queries, 9, 0.1, 6)
    )


def test_batches_are_concatenated_and_none_is_lost():
    batches = [({"cls": torch.full((n, 2), float(n))}, torch.full((n,), n)) for n in (3, 4, 2, 9, 1)]
    blocks = list(in_blocks(batches, rows=5))
    assert [len(labels) for _, labels in blocks] == [7, 11, 1]
    assert torch.equal(torch.cat([labels for _, labels in blocks]), torch.cat([labels for _, labels in batches]))
    assert all(torch.equal(features["cls"][:, 0], labels.float()) for features, labels in blocks)


def test_a_near_neighbor_outvotes_two_far_ones_only_at_a_low_temperature():
    train = torch.tensor([[1.0, 0.1], [1.0, 1.0], [1.0, 1.1]])
    labels, query = torch.tensor([0, 1, 1]), torch.tensor([[2.0, 0.0]])
    assert knn_scores(train, labels, query, 3, 0.07, 2).argmax() == 0
    assert knn_scores(train, labels, query, 3, 10.0, 2).argmax() == 1
    assert knn_scores(train, labels, query, 99, 10.0, 2).argmax() == 1  # no more neighbors than there are photos


def test_top_five_considers_no_more_classes_than_there_are_neighbors():
    scores = torch.tensor([[0.0, 3.0, 2.0, 1.0, 0.5, 0.0, 4.0]] * 3)
    targets = torch.tensor([6, 2, 5])  # ranks 1, 3 and 7
    assert top_accuracy(scores, targets, k=20) == pytest.approx((100 / 3, 200 / 3))
    assert top_accuracy(scores, targets, k=2) == pytest.approx((100 / 3, 100 / 3))


def test_scores_order_and_accuracy_equal_the_published_code_s(oracle, oracle_json):
    published = oracle("e_knn")
    train, queries = published["train_features_raw"], published["test_features_raw"]
    labels, targets = published["train_labels"].long(), published["test_labels"].long()
    scores = knn_scores(train, labels, queries, 20, 0.07, 10)
    torch.testing.assert_close(scores, published["k20_T0.07.class_scores"], rtol=1e-5, atol=0)
    assert torch.equal(scores.argsort(dim=1, descending=True, stable=True), published["k20_T0.07.order"].long())
    for settings, accuracy in oracle_json("e_eval")["knn"].items():
        k, temperature = (float(setting.split("=")[1]) for setting in settings.split(","))
        top1, top5 = top_accuracy(knn_scores(train, labels, queries, int(k), temperature, 10), targets, int(k))
        assert (top1, top5) == pytest.approx((accuracy["top1"], accuracy["top5"]), abs=1e-6), settings


# ------------------------------------------------------------------------------------------------- photos and programs


def write_photos(folder: Path, count: int, seed: int) -> None:
    """Photos of 40 x 30 pixels, a color for each class."""
    draw = np.random.default_rng(seed)
    for name, color in COLORS.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            noise = draw.normal(0, 12, (30, 40, 3))
            photo = Image.fromarray((np.array(color) + noise).clip(0, 255).astype(np.uint8))
            photo.save(folder / name / f"{seed}-{i}.jpg", quality=95)


def make_shards(source: Path, folder: Path, *flags: str) -> None:
    command = [sys.executable, "-m", "tools.make_shards", "make", str(source), str(folder), "--processes", "1", *flags]
    subprocess.run(command, cwd=HOME, check=True, capture_output=True)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """photos/, shards/ of them, val/ (other photos of two of the classes), unlabeled/ (the photos without classes)."""
    home = tmp_path_factory.mktemp("knn")
    write_photos(home / "photos", 30, seed=0)
    write_photos(home / "others", 5, seed=1)
    for file in (home / "others" / "green").iterdir():
        file.unlink()
    (home / "others" / "green").rmdir()
    make_shards(home / "photos", home / "shards")
    make_shards(home / "others", home / "val")
    make_shards(home / "photos", home / "unlabeled", "--labels", "no")
    return home


@pytest.fixture
def run(home, tmp_path, monkeypatch):
    """A run folder whose network is a small untrained ViT, which preserves colors."""

    def load(path, untrained=False):
        torch.manual_seed(1 if untrained else 0)
        return ViT(width=24, depth=1, heads=2, patch=8, image_size=24)

    monkeypatch.setattr("model.weights.load_backbone", load)
    (tmp_path / "config.yaml").write_text(
        f"data: {{shards: {home / 'shards'}, holdout: 0.2, views: [{{count: 2, size: 24, teacher: true}}]}}\n"
        "model: {arch: custom, width: 24, depth: 1, heads: 2, patch: 8}\noptim: {global_batch_size: 8}\n"
    )
    return tmp_path


def test_photos_are_cropped_as_published_and_labeled(home):
    photos = LabeledPhotos(Shards(home / "shards"), 24)
    image, label = photos[0]
    assert image.shape == (3, 24, 24)
    assert image.dtype == torch.uint8
    assert tuple(image.float().mean((1, 2)).round()) == pytest.approx(COLORS[photos.classes[label]], abs=8)
    # shorter side 30 -> round(24 * 256 / 224) = 27, then the middle 24: against Pillow, to a level of gray
    original = Image.fromarray(decode(photos.shards.read(0)).permute(1, 2, 0).numpy())
    pillow = original.resize((36, 27), Image.Resampling.BICUBIC).crop((6, 2, 30, 26))
    assert (image.permute(1, 2, 0).int() - torch.from_numpy(np.array(pillow)).int()).abs().max() <= 1


def test_labels_are_those_of_the_train_set(home):
    photos = LabeledPhotos(Shards(home / "val"), 24, classes=["green", "red", "blue"])
    assert {photos[i][1] for i in range(len(photos))} == {1, 2}
    with pytest.raises(UserError, match=r"class 'red' is not in the train set.*did you mean 'reds'"):
        LabeledPhotos(Shards(home / "val"), 24, classes=["blue", "reds"])


def test_a_damaged_photo_is_left_out(home, tmp_path):
    shutil.copytree(home / "val", tmp_path / "val")
    shards = Shards(tmp_path / "val")
    record = shards.index[3]
    with open(shards.folder / shards.shards[record["shard"]]["name"], "r+b") as tar:
        tar.seek(int(record["offset"]) + 300)
        tar.write(b"\0\0\0\0")
    photos = LabeledPhotos(Shards(tmp_path / "val"), 24)
    assert photos[3][1] == NO_CLASS
    features, labels = photo_features(None, photos, ("pixels",), batch=4)
    assert len(labels) == len(features["pixels"]) == len(photos) - 1
    assert labels.min() >= 0


def test_raw_pixels_ignore_brightness_and_contrast():
    images = torch.randint(60, 180, (3, 3, 40, 40), dtype=torch.uint8)
    brighter = (images.float() * 1.2 + 20).round().to(torch.uint8)
    a, b = raw_pixels(images), raw_pixels(brighter)
    assert a.shape == (3, 3 * PIXELS * PIXELS)
    similar = F.normalize(a) @ F.normalize(b).T
    assert similar.diagonal().min() > 0.99
    assert (similar - torch.eye(3)).abs().max() < 0.2
    assert raw_pixels(images[:, :, :16, :16]).shape == (3, 3 * 16 * 16)  # smaller images are not enlarged


def test_workers_and_batches_do_not_change_the_features(home):
    torch.manual_seed(0)
    network = ViT(width=24, depth=1, heads=2, patch=8, image_size=24).eval()
    photos = LabeledPhotos(Shards(home / "shards"), 24)
    features, labels = photo_features(network, photos, ("cls", "patches"), batch=90)
    assert not torch.equal(features["cls"], features["patches"])
    again, labels_again = photo_features(network, photos, ("patches", "cls"), batch=7, workers=2)
    assert torch.equal(labels, labels_again)
    for kind, values in features.items():
        torch.testing.assert_close(again[kind], values, rtol=1e-4, atol=1e-5)


def test_a_run_is_evaluated_on_what_it_held_out(run, capsys):
    assert main(["knn", str(run), "--k", "5"]) == 0
    assert "cls" in capsys.readouterr().out
    line = json.loads((run / "evaluations.jsonl").read_text())
    assert (line["photos"], line["queries"]) == (72, 18)  # 90 photos, a fifth held out
    assert (line["what"], line["k"], line["temperature"], line["size"]) == ("knn", 5, 0.07, 24)
    assert line["top1"] > 90  # three colors: chance is a third
    train, val = EvalTarget(run).photos(24)
    assert not set(train.ids) & set(val.ids)


def test_other_shards_and_a_limit(run, home):
    assert (
        main(["knn", str(run), "--val", str(home / "val"), "--features", "pixels", "--limit", "9", "--size", "32"]) == 0
    )
    assert main(["knn", str(run), "--val", str(home / "val"), "--features", "patches", "--untrained"]) == 0
    first, second = map(json.loads, (run / "evaluations.jsonl").read_text().splitlines())
    assert (first["photos"], first["queries"], first["features"], first["size"]) == (9, 9, "pixels", 32)
    assert (second["photos"], second["queries"], second["untrained"]) == (72, 10, True)
    assert list(subsample(np.arange(10), 4)) == [0, 2, 5, 7]


def test_a_run_with_validation_shards_held_nothing_out(run, home):
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("holdout: 0.2", f"holdout: 0.2, val: {home / 'val'}"))
    train, val = EvalTarget(run).photos(24)
    assert (len(train), len(val), val.shards.folder) == (90, 10, home / "val")


def test_shards_without_classes_are_reported_and_nothing_is_written(run, home, capsys):
    assert main(["knn", str(run), "--val", str(home / "unlabeled")]) == 0
    assert capsys.readouterr().out == "k-NN skipped: these shards have no classes\n"
    assert not (run / "evaluations.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--features", "patch"], "did you mean 'patches'"),
        (["--size", "30"], "size 30: not a multiple of the patch size 8; the nearest is 32"),
        (["--val", "nowhere"], "nowhere: no such folder"),
        (["--limit", "-3"], "--limit -3: must be more than 0"),
        (["--limit", "0"], "--limit 0: must be more than 0"),
        (["--temperature", "0.01"], "temperature 0.01: must be at least 0.0125"),
        (["--k", "0"], "--k 0: must be more than 0"),
    ],
)
def test_wrong_options_are_refused(run, options, message):
    with pytest.raises(UserError, match=message):
        main(["knn", str(run), *options])


def test_a_folder_of_photos_names_the_command_that_makes_shards(home):
    with pytest.raises(UserError, match=f"make shards SRC={home / 'photos'} DST="):
        open_shards(home / "photos")


def test_shards_that_a_run_may_miss_its_evaluation_may_miss(tiny_shards, tiny_config, tmp_path):
    """data.max_missing: a run trained without one of its shards is evaluated without it, too."""
    folder = tmp_path / "cut"
    shutil.copytree(tiny_shards, folder)
    next(folder.glob("*.tar")).unlink()
    with pytest.raises(UserError, match="is missing, the manifest says"):
        open_shards(folder)
    shards = open_shards(folder, load_config(tiny_config, ["data.max_missing=0.9"]))
    labels = [label for _, label in LabeledPhotos(shards, 32)]
    assert 0 < labels.count(NO_CLASS) < len(labels)


def test_a_train_set_of_all_photos_leaves_none_to_test_on(run, home):
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("holdout: 0.2", "holdout: 0"))
    with pytest.raises(UserError, match=r"none is left to test on.*--val"):
        main(["knn", str(run)])
    with pytest.raises(UserError, match="none is left to test on"):  # a photo must not vote for itself
        main(["knn", str(run), "--train", str(home / "val"), "--val", str(home / "val")])


def test_two_processes_get_the_result_of_one(home, tmp_path):
    """Of 87 photos, one process has one more than the other; only one of them prints and records."""
    torch.manual_seed(0)
    save_backbone(tmp_path / "b.safetensors", ViT(width=24, depth=1, heads=2, patch=8, image_size=24), {"heads": 2})
    (tmp_path / "config.yaml").write_text("data: {views: [{count: 2, size: 24, teacher: true}]}\nmodel: {patch: 8}\n")
    command = ["eval", "knn", str(tmp_path / "b.safetensors")]
    command += ["--train", str(home / "shards"), "--val", str(home / "val")]
    command += ["--k", "7", "--limit", "87", "--features", "patches"]
    for processes in (1, 2):
        run_processes("-m", *command, processes=processes)
    one, two = map(json.loads, (tmp_path / "evaluations.jsonl").read_text().splitlines())
    for key in ("time", "seconds"):
        one.pop(key), two.pop(key)
    assert one == two
    assert one["photos"] == 87


def test_a_missing_run_ends_the_program_with_one_line_and_code_2(tmp_path):
    (tmp_path / "first").mkdir()
    command = [sys.executable, "-m", "eval", "knn", str(tmp_path / "frist")]
    ended = subprocess.run(command, cwd=HOME, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert f"did you mean '{tmp_path / 'first'}'" in ended.stderr


def test_a_set_of_damaged_photos_is_refused(home, monkeypatch):
    monkeypatch.setattr(Shards, "is_valid", lambda *_: False)
    photos = LabeledPhotos(Shards(home / "val"), 24)
    with pytest.raises(UserError, match="none of the 10 photos is readable and has a known class"):
        photo_knn(None, photos, photos, ("pixels",))


def test_a_photo_is_not_rotated_by_its_exif():
    """As in training, with any decoder."""
    from io import BytesIO

    from eval.datasets import decode

    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 40, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    files = [BytesIO(), BytesIO()]
    photo.save(files[0], "JPEG", exif=exif)
    photo.save(files[1], "JPEG")
    rotated, plain = (decode(f.getvalue()) for f in files)
    assert rotated.shape == (3, 16, 40)
    assert torch.equal(rotated, plain)
