"""Linear segmentation: the score by hand and as published, scenes in Pascal VOC's layout, a classifier that learns.

Long: all cases share the painted folders of scenes made here.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from eval import __main__ as command_line
from eval.datasets import IGNORE, VocSegmentation
from eval.features import scene_batches, scene_tokens, upsample
from eval.linear_seg import EpochScore, Protocol, best_of, fit, scenes_of
from eval.miou import confusion, intersection_over_union, score_of
from eval.target import EvalTarget
from model.vit import ViT
from runtime.checkpoint import save_backbone
from runtime.errors import UserError

COLORS = np.array([(40, 40, 40), (220, 60, 40), (40, 90, 230)], np.uint8)  # of classes 0, 1, 2
SMALL = Protocol(size=48, train_size=24, augment=False, epochs=6, batch=8, lr=0.5)


def test_miou_by_hand():
    truth = torch.tensor([[0, 0, 0, 1, 1, IGNORE]], dtype=torch.uint8)
    predicted = torch.tensor(
        [[0, 0, 1, 1, 3, 2]]
    )  # class 3 is only predicted, class 2 is only where pixels are ignored
    counts = confusion(truth, predicted, 4)
    assert counts.tolist() == [[2, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert intersection_over_union(counts).tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=1e-6)
    assert score_of(counts).miou == pytest.approx(25, abs=1e-3)  # (2/3 + 1/3) / 4
    assert score_of(counts).miou_present == pytest.approx(50, abs=1e-3)  # / 2


def test_miou_equals_the_published_code_s(oracle, oracle_json):
    masks, published = oracle("e_miou"), oracle_json("e_eval")["miou"]
    counts = confusion(masks["case1.gt"], masks["case1.pred"], 21)
    assert torch.equal(counts.double(), masks["case1.confusion"])
    score = score_of(counts)
    assert score.iou == pytest.approx([100 * iou for iou in published["case1"]["per_class_iou"]], abs=1e-9)
    assert score.miou == pytest.approx(100 * published["case1"]["StreamSegMetrics_mean_iou"], abs=1e-9)
    assert score.miou_present == pytest.approx(100 * published["case1"]["mean_iou_over_gt_present_classes"], abs=1e-9)
    # Leopart's code agrees; without its filter of ignored pixels it would not, and ours has no such mode
    assert score.miou == pytest.approx(100 * published["case1"]["PredsmIoU_valid_only"], abs=1e-6)
    assert score.miou > 100 * published["case1"]["PredsmIoU_without_ignore_filter"] + 1
    accuracy = 100 * counts.diagonal().sum() / counts.sum()
    assert float(accuracy) == pytest.approx(100 * published["case1"]["pixel_acc"], abs=1e-4)
    clean = score_of(confusion(masks["case2.gt"], masks["case2.pred"], 21))
    assert clean.miou == pytest.approx(
        100 * published["case2_no_ignore_no_absent"]["StreamSegMetrics_mean_iou"], abs=1e-9
    )


def test_upsampling_logits_equals_upsampling_features():
    torch.manual_seed(0)
    head, tokens = nn.Conv2d(12, 5, 1), torch.randn(2, 12, 6, 6)
    features_first = head(F.interpolate(tokens, (25, 25), mode="bilinear", align_corners=False))
    torch.testing.assert_close(upsample(head(tokens), 25), features_first)


def test_the_protocol_is_the_published_one_for_published_views():
    assert Protocol.for_views(224) == Protocol(448, 100, True, 25, 64, 0.01, 0)
    assert Protocol.for_views(224, 224) == Protocol(224, 50, True, 25, 64, 0.01, 0)
    assert Protocol.for_views(48) == Protocol(48, 24, False, 25, 64, 0.01, 0)


def test_leoparts_protocol_is_the_published_one():
    leopart = Protocol.for_views(224, name="leopart")
    assert (leopart.size, leopart.train_size, leopart.augment, leopart.epochs) == (448, 100, True, 25)
    assert leopart.lr * leopart.batch / 60 == pytest.approx(0.01)
    assert (leopart.batch, leopart.drop_last, leopart.first_weights, leopart.picked_by) == (120, True, "torch", 480)
    with pytest.raises(UserError, match="did you mean 'leopart'"):
        Protocol.for_views(224, name="leopard")


def test_the_best_epoch_is_the_one_that_the_protocol_selects():
    score = dict(miou_present=0.0, iou=[])
    history = [
        EpochScore(miou=m, **score, epoch=e, picked_by=p) for e, (m, p) in enumerate([(5.0, 9.0), (7.0, 3.0)], 1)
    ]
    assert best_of(history).epoch == 1


# -------------------------------------------------------------------------------------------------------------- scenes


def write_scenes(folder: Path, counts: dict[str, int], size: tuple[int, int] = (60, 48)) -> None:
    """Scenes in Pascal VOC's layout: a box of class 1 or 2 on a background, a color for each class, two rows of 255."""
    draw = np.random.default_rng(0)
    for subfolder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / subfolder).mkdir(parents=True)
    width, height = size
    for split, count in counts.items():
        names = [f"{split}{i}" for i in range(count)]
        for name in names:
            mask = np.zeros((height, width), np.uint8)
            x, y = draw.integers(0, width // 2), draw.integers(0, height // 2)
            mask[y : y + 20, x : x + 24] = draw.integers(1, 3)
            image = COLORS[mask] + draw.integers(0, 20, (height, width, 3), dtype=np.uint8)
            mask[:2] = IGNORE
            Image.fromarray(image).save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
            indexed = Image.fromarray(mask).convert("P")
            indexed.putpalette(
                [7 * i % 256 for i in range(768)]
            )  # only the numbers matter, not the colors of the palette
            indexed.save(folder / "SegmentationClass" / f"{name}.png")
        (folder / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voc")
    write_scenes(folder / "voc", {"train": 40, "val": 10})
    return folder / "voc"


@pytest.fixture
def voc(painted, tmp_path):
    shutil.copytree(painted, tmp_path / "voc")
    return tmp_path / "voc"


@pytest.fixture
def network():
    torch.manual_seed(0)
    return ViT(width=24, depth=1, heads=2, patch=8, image_size=48).eval().requires_grad_(False)


@pytest.mark.parametrize("augment", [False, True])
def test_an_image_and_its_mask_stay_aligned(voc, augment):
    scenes = VocSegmentation(voc, "train", 48, augment=augment)
    assert scenes.classes == 3
    torch.manual_seed(0)
    agreement = []
    for i in range(len(scenes)):
        image, mask = scenes[i]
        assert image.shape == (3, 48, 48)
        assert mask.shape == (48, 48)
        assert mask.dtype == torch.uint8
        distance = (
            (image[:, None].float() - torch.from_numpy(COLORS.T.copy()).float()[:, :, None, None]).square().sum(0)
        )
        known = mask != IGNORE
        agreement.append((distance.argmin(0)[known] == mask[known]).float().mean())
    assert min(agreement) > 0.9
    assert np.mean(agreement) > 0.97


def test_augmentation_flips_and_crops(voc):
    torch.manual_seed(0)
    plain, augmented = VocSegmentation(voc, "train", 48), VocSegmentation(voc, "train", 48, augment=True)
    mask = plain[0][1]
    draws = [augmented[0][1] for _ in range(40)]
    assert len({tuple(d.flatten().tolist()) for d in draws}) > 30
    nearer_flipped = [((d != mask.flip(1)).sum() < (d != mask).sum()).item() for d in draws]
    assert 8 < sum(nearer_flipped) < 32


def test_masks_of_trainaug_are_preferred_for_trainaug_only(voc):
    lists = voc / "ImageSets" / "Segmentation"
    (lists / "trainaug.txt").write_text("train0\ntrain1\n")
    (voc / "SegmentationClassAug").mkdir()
    Image.fromarray(np.full((48, 60), 2, np.uint8)).save(voc / "SegmentationClassAug" / "train1.png")
    scenes, val = scenes_of(voc, SMALL, None, "val")
    assert scenes.split == "trainaug"
    assert [path.parent.name for path in scenes.masks] == ["SegmentationClass", "SegmentationClassAug"]
    assert (scenes[1][1] == 2).all()
    assert {path.parent.name for path in val.masks} == {"SegmentationClass"}
    assert VocSegmentation(voc, "train", 48).masks[1].parent.name == "SegmentationClass"


def test_class_names_come_from_classes_txt(voc):
    assert VocSegmentation(voc, "val", 48).name(1) == "1"
    (voc / "classes.txt").write_text("background\nred box\nblue box\nnever\n")
    scenes = VocSegmentation(voc, "val", 48)
    assert (scenes.classes, scenes.name(1)) == (4, "red box")
    assert VocSegmentation(voc, "val", 48, classes=21).classes == 21


def test_a_wrong_folder_of_scenes_is_refused(voc, tmp_path):
    def refused(message: str, **given):
        settings = {"folder": voc, "split": "val", "size": 48, "classes": 3} | given
        with pytest.raises(UserError, match=message):
            VocSegmentation(**settings)[0]

    refused("not in Pascal VOC's layout", folder=tmp_path / "nowhere")
    refused("no split 'vall', did you mean 'val'.*available: train, val", split="vall")
    refused("val0.png: class 2, but there are 2 classes|val0.png: class 1, but", classes=1)
    (voc / "JPEGImages" / "val0.jpg").write_bytes(b"\xff\xd8 no photo")
    refused("val0.jpg: cannot be decoded")
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(voc / "JPEGImages" / "val0.jpg")
    refused(r"val0.png: \(60, 48\) pixels, but the image has \(9, 9\)")
    Image.fromarray(np.zeros((48, 60, 3), np.uint8)).save(voc / "SegmentationClass" / "val0.png")
    refused("a mask must be a palette or gray PNG")
    (voc / "SegmentationClass" / "val0.png").unlink()
    refused("val.txt, line 1: no mask of 'val0' in .*SegmentationClass$")
    (voc / "ImageSets" / "Segmentation" / "val.txt").write_text("\n")
    refused("the split is empty")


# ---------------------------------------------------------------------------------------------------------- the classifier


def test_tokens_are_on_their_grid(voc, network):
    """A token has the position of its patch: it changes most where the image is changed."""
    scenes = VocSegmentation(voc, "val", 48)
    made = scene_tokens(network, scenes, batch=4)
    assert made.tokens.shape == (10, 24, 6, 6)
    assert torch.equal(made.masks[7], scenes[7][1])
    image = scenes[0][0].clone()
    image[:, 16:24, 40:48] ^= 128  # row 2, column 5
    scenes.__class__ = type("Changed", (VocSegmentation,), {"__getitem__": lambda self, i: (image, made.masks[0])})
    changed = next(scene_batches(network, scenes, batch=1)).tokens
    assert divmod(int((changed[0] - made.tokens[0]).square().sum(0).argmax()), 6) == (2, 5)


def test_the_classifier_learns_what_is_linear(voc, network):
    train, val = scenes_of(voc, SMALL, None, "val")
    history = fit(network, train, val, SMALL)
    assert [score.epoch for score in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1].miou > 70  # colors alone determine the classes; 8-pixel patches blur the borders
    assert history[-1].miou > history[0].miou + 20
    torch.manual_seed(7)
    assert fit(network, train, val, SMALL)[-1] == history[-1]  # depends on the protocol's seed only


def test_leoparts_protocol_drops_the_last_batch_and_selects_on_some_scenes(voc, network):
    leopart = dict(drop_last=True, first_weights="torch", picked_by=4)
    protocol = replace(SMALL, **leopart, batch=12, lr=0.4)  # 40 scenes: three batches, and four more scenes
    train, val = scenes_of(voc, protocol, None, "val")
    history = fit(network, train, val, protocol)
    assert history[-1].miou > 70
    assert any(score.picked_by != score.miou for score in history)
    whole = fit(network, train, val, replace(protocol, drop_last=False))
    assert whole[-1] != history[-1]
    assert fit(network, train, val, replace(protocol, picked_by=0))[-1].miou == history[-1].miou
    few = replace(protocol, batch=99)  # more than there are scenes: the only batch is not dropped
    assert fit(network, train, val, few)[-1].miou > history[0].miou - 50


def test_the_classifier_learns_with_augmentation_and_workers(voc, network):
    protocol = replace(SMALL, augment=True)
    train, val = scenes_of(voc, protocol, "train", "val")
    before = torch.get_rng_state()
    assert fit(network, train, val, protocol, workers=2)[-1].miou > 65
    short = replace(protocol, epochs=1)
    assert fit(network, train, val, short) == fit(network, train, val, short)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_error_in_a_worker_is_one_line(voc, network):
    (voc / "JPEGImages" / "train3.jpg").write_bytes(b"")
    train, val = scenes_of(voc, SMALL, None, "val")
    with pytest.raises(UserError) as error:
        fit(network, train, val, SMALL, workers=1)
    assert str(error.value).startswith(f"{voc / 'JPEGImages' / 'train3.jpg'}: cannot be decoded")
    assert "\n" not in str(error.value)


def test_a_batch_of_ignored_pixels_does_no_harm(voc, network):
    for i in range(0, 40, 4):
        Image.fromarray(np.full((48, 60), IGNORE, np.uint8)).save(voc / "SegmentationClass" / f"train{i}.png")
    protocol = replace(SMALL, batch=1, lr=4.0)
    train, val = scenes_of(voc, protocol, None, "val")
    assert fit(network, train, val, protocol)[-1].miou > 70


# ------------------------------------------------------------------------------------------ the map's learning rate


def epochs_won_by_class_1(folder: Path, share: float, protocol: Protocol) -> list[bool]:
    """For each epoch, whether the map predicts class 1 for every pixel, and not class 0.

    One scene of two classes, of which `share` is class 1, and a network whose tokens are all 0. Then only the map's two
    biases learn, which begin at 0, and d = bias 1 - bias 0 decides.
    """
    (folder / "ImageSets" / "Segmentation").mkdir(parents=True)
    for name in ("JPEGImages", "SegmentationClass"):
        (folder / name).mkdir()
    (folder / "ImageSets" / "Segmentation" / "train.txt").write_text("scene\n")
    mask = np.zeros((40, 40), np.uint8)
    mask[: round(40 * share)] = 1
    Image.fromarray(mask).save(folder / "SegmentationClass" / "scene.png")
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(folder / "JPEGImages" / "scene.jpg")
    blind = ViT(width=8, depth=1, heads=2, patch=8, image_size=40).eval().requires_grad_(False)
    nn.init.zeros_(blind.norm.weight)
    scenes = VocSegmentation(folder, "train", 40)
    history = fit(blind, scenes, scenes, protocol)
    assert all(sorted(f.iou) == pytest.approx([0, 100 * (share if f.iou[1] else 1 - share)]) for f in history)
    return [f.iou[1] > 0 for f in history]


@pytest.mark.parametrize("batch", [15, 60, 240])
@pytest.mark.parametrize(("rate", "still"), [(6.4, True), (6.85, False)])
def test_the_learning_rate_is_for_each_60_scenes_of_a_batch(tmp_path, batch, rate, still):
    """DenseDINO, eval_segment.py (after Leopart): SGD with lr * batch / 60 and momentum 0.9. So with lr = 60 rate / batch
    the rate is the same for every batch.

    Class 1 has 0.6 of the pixels. The slope of the loss for d is sigmoid(d) - 0.6 for one bias, and its negative for the
    other, so d moves by 2 rate (0.6 - sigmoid(d)): first by 0.2 rate, to d1. With the momentum d is after the second
    epoch d1 + rate (0.9 * 0.2 + 1.2 - 2 sigmoid(d1)) = rate (1.58 - 2 sigmoid(0.2 rate)). This is above 0, and class 1
    wins still, where sigmoid(0.2 rate) < 0.79, which is where rate < 5 log(0.79 / 0.21) = 6.62.
    """
    protocol = Protocol(size=40, train_size=40, augment=False, epochs=2, batch=batch, lr=60 * rate / batch)
    assert epochs_won_by_class_1(tmp_path / "voc", 0.6, protocol) == [True, still]


def test_the_learning_rate_is_a_tenth_from_epoch_21_on(tmp_path):
    """DenseDINO, eval_segment.py (after Leopart): StepLR(step_size=20, gamma=0.1) and 25 epochs, stepped after each. So
    20 epochs have the whole rate and five a tenth of it; momentum 0.9, weight decay 1e-4.

    Class 1 has 0.8 of the pixels, and the rate, 153, is so large that d swings from side to side. Its course, worked out
    with a number for d and one for its speed, decides each epoch; it keeps far from 0, and other steps give other winners.
    """

    def course(whole: int) -> list[float]:
        d, speed, all_of_them = 0.0, 0.0, []
        for epoch in range(25):
            speed = 0.9 * speed + 2 * (1 / (1 + np.exp(-d)) - 0.8) + 1e-4 * d
            d -= (153 if epoch < whole else 15.3) * speed
            all_of_them.append(d)
        return all_of_them

    winners = {whole: [d > 0 for d in course(whole)] for whole in (10, 19, 20, 21, 25)}
    assert min(map(abs, course(20))) > 12
    assert all(winners[whole] != winners[20] for whole in (10, 19, 21, 25))
    protocol = Protocol(size=40, train_size=40, augment=False, batch=60, lr=153.0)
    assert epochs_won_by_class_1(tmp_path / "voc", 0.8, protocol) == winners[20]


# ------------------------------------------------------------------------------------------------------------ programs


def main(options: list[str]) -> int:
    return command_line.main(["linear_seg", *options])


@pytest.fixture
def run(tmp_path, monkeypatch):
    def load(path, untrained=False):
        torch.manual_seed(1 if untrained else 0)
        return ViT(width=24, depth=1, heads=2, patch=8, image_size=48)

    monkeypatch.setattr("model.weights.load_backbone", load)
    save_backbone(tmp_path / "run" / "checkpoints" / "checkpoint-00000007.safetensors", load(""), {"steps": 7})
    (tmp_path / "run" / "config.yaml").write_text(
        "data: {shards: nowhere, views: [{count: 2, size: 48, teacher: true}]}\n"
        "model: {arch: custom, width: 24, depth: 1, heads: 2, patch: 8}\noptim: {global_batch_size: 8}\n"
    )
    return tmp_path / "run"


def test_the_command_prints_and_records(run, voc, capsys):
    (voc / "classes.txt").write_text("background\nred box\nblue box\n")
    words = ["--data", str(voc), "--epochs", "6", "--lr", "0.5", "--batch", "8"]
    assert main([str(run), *words]) == 0
    screen = capsys.readouterr().out
    assert "red box" in screen
    assert main([str(run), *words, "--untrained"]) == 0
    assert main([str(run), "--data", str(voc), "--epochs", "2", "--protocol", "leopart"]) == 0
    line, untrained, leopart = map(json.loads, (run / "evaluations.jsonl").read_text().splitlines())
    assert (leopart["protocol"], leopart["batch"], leopart["drop_last"]) == ("leopart", 120, True)
    assert (line["untrained"], untrained["untrained"]) == (False, True)
    assert line["last"] != untrained["last"]
    assert (line["size"], line["train_size"], line["augment"], line["epochs"], line["classes"]) == (48, 24, False, 6, 3)
    assert line["last"]["epoch"] == 6
    assert line["last"]["miou"] > 70
    assert line["best"]["miou"] >= line["last"]["miou"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere"], "nowhere: not in Pascal VOC's layout"),
        ([], "no scenes"),
        (["--data", "VOC", "--size", "60"], "size 60: not a multiple of the patch size 8; the nearest is 64"),
        (["--data", "VOC", "--val-split", "tarin"], "did you mean 'train'"),
        (["--data", "VOC", "--epochs", "0"], "--epochs 0: must be more than 0"),
        (["--data", "VOC", "--protocol", "dense"], "did you mean 'densedino'"),
    ],
)
def test_wrong_options_are_refused(run, voc, options, message):
    with pytest.raises(UserError, match=message):
        main([str(run), *(str(voc) if option == "VOC" else option for option in options)])


def test_the_report_compares_trained_untrained_and_pixels(run, voc, tmp_path, capsys):
    from tests.test_eval_knn import make_shards, write_photos

    write_photos(tmp_path / "photos", 20, seed=0)
    make_shards(tmp_path / "photos", tmp_path / "shards")
    config = run / "config.yaml"
    config.write_text(
        config.read_text().replace("shards: nowhere", f"shards: {tmp_path / 'shards'}, holdout: 0.2")
        + f"eval: {{voc: {voc}, seg_epochs: 3, seg_lr: 0.5, k: 5}}\n"
    )
    assert command_line.main(["report", str(run)]) == 0
    results = json.loads((run / "results.json").read_text())
    assert results["knn_top1"] > 90
    assert 0 < results["miou"] <= results["miou_best"] <= 100
    assert set(results["untrained"]) >= {"knn_top1", "knn_top1_patches", "miou"}
    assert 0 < results["untrained"]["miou"] != results["miou"]
    assert 0 < results["untrained"]["knn_top1"] <= 100
    assert results["pixels"]["knn_top1"] > 50
    masks = [np.asarray(Image.open(file)) for file in sorted((voc / "SegmentationClass").glob("val*.png"))]
    shares = np.bincount(np.concatenate([mask[mask != 255] for mask in masks]).ravel(), minlength=3)
    assert results["chance"]["miou"] == pytest.approx(
        100 * shares[0] / shares.sum() / results["settings"]["segmentation"]["classes"]
    )
    photos = EvalTarget(run).photo_sets()
    known, asked = (photos.train.index["label"][ids] for ids in (photos.train_ids, photos.val_ids))
    assert results["chance"]["knn_top1"] == pytest.approx(100 * (asked == np.bincount(known).argmax()).mean())
    assert results["settings"]["knn"]["k"] == 5
    assert results["settings"]["segmentation"]["epochs"] == 3
    screen = capsys.readouterr().out
    assert all(word in screen for word in ("trained", "untrained", "raw pixels", "chance", f"{results['miou']:.2f}"))

    assert command_line.main(["report", str(run), "--skip-existing"]) == 0  # printed again, not measured again
    assert f"{results['miou']:.2f}" in capsys.readouterr().out
    assert json.loads((run / "results.json").read_text()) == results
    assert results["weights"]["step"] == 7
    newest = run / "checkpoints" / "checkpoint-00000009.safetensors"  # trained further since
    save_backbone(newest, ViT(width=24, depth=1, heads=2, patch=8, image_size=48), {"steps": 9})
    assert command_line.main(["report", str(run), "--skip-existing"]) == 0
    assert "written to" in capsys.readouterr().out


def test_a_report_names_what_it_skips(run, voc, tmp_path, capsys):
    from tests.test_eval_knn import make_shards, write_photos

    write_photos(tmp_path / "photos", 10, seed=0)
    make_shards(tmp_path / "photos", tmp_path / "unlabeled", "--labels", "no")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("shards: nowhere", f"shards: {tmp_path / 'unlabeled'}, holdout: 0.2"))
    assert command_line.main(["report", str(run)]) == 0
    screen = capsys.readouterr().out
    assert screen.count("k-NN cannot be measured: these shards have no classes") == 1
    assert screen.count("mIoU cannot be measured: no scenes to segment (--data FOLDER") == 1
    assert "│" not in screen  # no table without a number in it
    results = json.loads((run / "results.json").read_text())
    assert (
        results["knn_top1"] is results["miou"] is results["untrained"]["miou"] is results["pixels"]["knn_top1"] is None
    )
