"""Features as files: equal to the evaluations' own, the same bytes after a kill, refusals, points, damage, neighbors."""

import csv
import hashlib
import importlib.util
import json
import re
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, env_without_make, run_program
from PIL import Image

from eval import embed, neighbors
from eval.__main__ import main
from eval.datasets import LabeledPhotos, center_crop, points_in_crop, whole_square
from eval.feature_folder import FeatureFolder
from eval.features import photo_features, tokens, tokens_at
from eval.photo_source import open_photo_source
from eval.point_list import read_points
from model.reference import MODES
from model.resnet import ResNet
from model.vit import ViT
from model.weights import load_backbone
from pipeline.shards import Shards
from runtime.checkpoint import save_backbone
from runtime.errors import UserError

SIZE = 32


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    """A backbone file."""
    torch.manual_seed(0)
    vit = ViT(width=24, depth=2, heads=2, patch=8, image_size=SIZE)
    path = tmp_path_factory.mktemp("network") / "backbone.safetensors"
    save_backbone(path, vit, vit.about())
    return path


@pytest.fixture
def folder(photos: Path, tmp_path: Path) -> Path:
    """12 of the photos, flat, in a folder of the test's own."""
    made = tmp_path / "photos"
    made.mkdir()
    for path in sorted(photos.rglob("*.jpg"))[:12]:
        shutil.copy(path, made)
    return made


def read(out: Path, name: str) -> np.ndarray:
    return np.load(out / f"{name}.npy", mmap_mode="r")


def names_of(out: Path) -> list[str]:
    return (out / "names.txt").read_text().splitlines()


def files(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}


def test_features_are_those_of_the_evaluations(network, tiny_shards, tmp_path):
    """Of shards, in the order of the index; patches on their grid."""
    out = tmp_path / "features"
    main(["embed", str(network), str(tiny_shards), str(out), "--features", "cls,mean,patches", "--batch", "40"])
    shards = Shards(tiny_shards)
    expected, _ = photo_features(load_backbone(network), LabeledPhotos(shards, SIZE), ("cls", "patches"))
    assert np.abs(read(out, "cls") - expected["cls"].numpy()).max() < 1e-5
    assert np.abs(read(out, "mean") - expected["patches"].numpy()).max() < 1e-5
    assert read(out, "patches").shape == (len(shards), 4, 4, 24)
    assert np.abs(read(out, "patches").mean((1, 2)) - read(out, "mean")).max() < 1e-5
    origin = (tiny_shards / "sources.txt").read_text().split("\n")[0].partition("\t")[2]
    assert [f"{origin}/{name}" for name in names_of(out)] == [shards.source(i) for i in range(96)]


def test_a_folder_a_list_and_shards_have_the_same_features(network, photos, tiny_shards, tmp_path):
    """By name; JPEGs that need no change are the same pixels in each."""
    paths = sorted(path.relative_to(photos) for path in photos.rglob("*.jpg"))
    listed = photos.parent / "some.txt"
    listed.write_text("".join(f"{photos.name}/{path}\n" for path in paths[::7]))
    rows = {}
    for name, source in {"folder": photos, "list": listed, "shards": tiny_shards}.items():
        out = tmp_path / name
        main(["embed", str(network), str(source), str(out), "--dtype", "float16"])
        assert read(out, "cls").dtype == np.float16
        rows[name] = dict(zip(names_of(out), read(out, "cls").astype(np.float32), strict=True))
    assert list(rows["folder"]) == list(map(str, paths))
    for path in paths:
        near = rows["shards"][str(path)]
        assert np.abs(rows["folder"][str(path)] - near).max() < 1e-2
        if path in paths[::7]:
            assert np.abs(rows["list"][f"{photos.name}/{path}"] - near).max() < 1e-2


KILLED = """
import os, signal
from eval import feature_folder
from eval.__main__ import main

def advance(folder, photos, known=feature_folder.FeatureFolder.advance):
    if folder.done >= 8:  # the next rows are written, and not yet counted
        os.kill(os.getpid(), signal.SIGKILL)
    known(folder, photos)

feature_folder.SAVE_SHARE = 1e9  # a save after each batch
feature_folder.FeatureFolder.advance = advance
main()
"""


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_and_continued_leaves_the_same_bytes(network, folder, tmp_path, workers):
    """kill -9 between two saves, then the same command; what was done is not made again."""
    names = sorted(path.name for path in folder.iterdir())
    (folder / names[3]).write_bytes(b"\xff\xd8\xff damaged")
    points = "".join(f"{names[i % 12]},.5,.{i % 10}\n" for i in range(30))
    (tmp_path / "points.csv").write_text(f"photo,x,y\n{points}")
    (tmp_path / "program.py").write_text(KILLED)
    words = ["embed", network, folder, "--batch", "2", "--points", tmp_path / "points.csv"]
    words += ["--workers", workers, "--features", "cls,patches"]
    out = tmp_path / "killed"
    run_program(tmp_path / "program.py", *words, out, expect=-signal.SIGKILL)
    state = out / "features.json"
    assert json.loads(state.read_text())["done"] == 8
    before = read(out, "cls")[:8].copy()
    assert np.abs(before[:3]).min() > 0
    assert "continued, 8 of 12 photos are done" in run_program("-m", "eval", *words, out).stdout
    main([str(word) for word in (*words, tmp_path / "whole")])
    assert np.array_equal(before, read(tmp_path / "whole", "cls")[:8], equal_nan=True)
    assert files(out) == files(tmp_path / "whole")
    assert json.loads(state.read_text())["done"] == 12


def test_a_finished_folder_is_kept(network, folder, tmp_path, capsys):
    out = tmp_path / "features"
    words = ["embed", str(network), str(folder), str(out)]
    main(words)
    before = files(out)
    main(words)
    assert files(out) == before
    assert "all done before" in capsys.readouterr().out


def test_other_features_in_the_folder_are_refused(network, folder, tmp_path):
    """With what differs, and a way out."""
    out = tmp_path / "features"
    words = ["embed", str(network), str(folder), str(out)]
    main(words)
    before = files(out)
    torch.manual_seed(1)
    vit, other = ViT(width=24, depth=2, heads=2, patch=8, image_size=SIZE), tmp_path / "other.safetensors"
    save_backbone(other, vit, vit.about())
    for changed, message in (
        ([*words, "--size", "48"], "size: saved 32, now 48; name another folder, or remove"),
        ([*words, "--dtype", "float16"], "dtype: saved float32, now float16"),
        ([*words, "--features", "cls"], "features: saved cls,mean, now cls"),
        (["embed", str(other), *words[2:]], "weights: saved .*sha256 .*now .*sha256"),
    ):
        with pytest.raises(UserError, match=message):
            main(changed)
    (folder / "more.jpg").write_bytes((folder / names_of(out)[0]).read_bytes())
    with pytest.raises(UserError, match="photos: saved 12, now 13"):
        main(words)
    assert files(out) == before
    with pytest.raises(UserError, match=r"not empty \(.*\), and not a folder of features"):
        main(["embed", str(network), str(folder), str(tmp_path)])
    with pytest.raises(UserError, match="lies in the photos' folder"):
        main(["embed", str(network), str(folder), str(folder / "features")])


def test_an_array_of_the_users_stays(tmp_path):
    """A name of ours is not ours without features.json."""
    (tmp_path / "cls.npy").write_text("mine")
    with pytest.raises(UserError, match=r"not empty \(cls.npy …\), and not a folder of features \(no features.json\)"):
        FeatureFolder(tmp_path, {}, {})
    assert (tmp_path / "cls.npy").read_text() == "mine"


def test_killed_before_the_first_photo(tmp_path):
    """features.json is first, so whatever else is there can be made again; with other settings, too."""
    for state in ({"size": 48}, {"size": 64}):
        folder = FeatureFolder(tmp_path / "features", state, {})
        folder.open(["a"], {"cls": (1, 4)}, "float32")
        (tmp_path / "features/cls.npy").unlink()
        folder.close()


def test_a_folder_has_one_writer(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.feature_folder.LOCK_SECONDS", 0.1)
    first = FeatureFolder(tmp_path / "features", {}, {})
    with pytest.raises(UserError, match="another program writes features there"):
        FeatureFolder(tmp_path / "features", {}, {})
    first.close()
    FeatureFolder(tmp_path / "features", {}, {}).close()


def test_a_disk_that_is_too_small_is_said_at_once(tmp_path):
    """Nothing is left, and the same folder can be begun with less."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    folder = FeatureFolder(tmp_path / "features", {}, {})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        with pytest.raises(UserError, match=r"0.004 GB of features cannot be written there .*--dtype float16"):
            folder.open(["a"], {"cls": (10, 10), "patches": (1000, 1000)}, "float32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        folder.close()
    assert list((tmp_path / "features").iterdir()) == []
    folder = FeatureFolder(tmp_path / "features", {}, {})
    folder.open(["a"], {"cls": (10, 10)}, "float32")
    folder.close()
    assert read(tmp_path / "features", "cls").shape == (10, 10)


def test_progress_has_rate_and_time_left(network, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(embed, "LINE_SECONDS", 0)
    main(["embed", str(network), str(folder), str(tmp_path / "features"), "--batch", "4"])
    assert re.search(r"4 of 12 photos, [\d.,]+ photos/s, \d+ s left\n  8 of 12", capsys.readouterr().err)


def test_samples_of_other_tars_have_the_names_of_their_members(tiny_shards, tmp_path):
    """Without sources.txt, which `make index` does not write."""
    shutil.copytree(tiny_shards, tmp_path / "shards")
    (tmp_path / "shards" / "sources.txt").unlink()
    names = open_photo_source(str(tmp_path / "shards")).names
    assert len(set(names)) == 96
    assert re.fullmatch(r"shard-000000\.tar/\d+\.jpg", names[0])


def test_damaged_photos_are_named_and_not_numbers(network, folder, tmp_path, capsys):
    """Their rows are NaN; those of all other photos are as without them."""
    good, out = tmp_path / "good", tmp_path / "features"
    main(["embed", str(network), str(folder), str(good)])
    names = names_of(good)
    (folder / names[3]).write_bytes((folder / names[3]).read_bytes()[:200])
    (folder / names[5]).write_bytes(b"\0\0\0\x0cJXL \r\n\x87\n" + b"\0" * 300)
    (folder / "notes.txt").write_text("no photo")
    main(["embed", str(network), str(folder), str(out), "--features", "cls,patches"])
    cls, expected = read(out, "cls"), read(good, "cls")
    assert np.isnan(cls).all(1).nonzero()[0].tolist() == [3, 5]
    assert np.isnan(read(out, "patches")).all((1, 2, 3)).nonzero()[0].tolist() == [3, 5]
    sound = [i for i in range(12) if i not in (3, 5)]
    assert np.abs(cls[sound] - expected[sound]).max() < 1e-5
    damaged = json.loads((out / "features.json").read_text())["damaged"]
    assert [(row["row"], row["photo"]) for row in damaged] == [(3, names[3]), (5, names[5])]
    assert "JPEG XL" in damaged[1]["why"]
    printed = capsys.readouterr().out
    assert "2 damaged photos with NaN rows" in printed
    assert names[3] in printed
    assert "left out: 1 (.txt files 1)" in printed


def test_photos_of_a_folder_are_upright_and_over_white(folder, tmp_path):
    """As `make shards` makes them, in any of its formats."""
    upright = np.zeros((20, 30, 3), np.uint8)
    upright[:10, :10] = 200
    rotated = Image.fromarray(np.rot90(upright))
    exif = rotated.getexif()
    exif[0x0112] = 6
    (tmp_path / "few").mkdir()
    rotated.save(tmp_path / "few" / "a.png", exif=exif)
    transparent = np.dstack([upright, np.full((20, 30), 0, np.uint8)])
    Image.fromarray(transparent).save(tmp_path / "few" / "b.tif")
    source = open_photo_source(str(tmp_path / "few"))
    assert source.names == ["a.png", "b.tif"]
    assert np.array_equal(source.pixels(0), upright)
    assert (source.pixels(1) == 255).all()


def test_points_fall_where_the_crop_shows_them():
    """A photo whose colors are its coordinates: what the crop shows at a point is the point."""
    for height, width in ((200, 333), (301, 150), (97, 97)):
        x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
        photo = torch.from_numpy(np.stack([x, y, 0 * x])).mul(255).round().to(torch.uint8)
        points = np.array([[0.5, 0.5], [0.45, 0.6], [0.55, 0.42]])
        for size in (64, (64, 96), (96, 64)):
            view, shown = points_in_crop(points, height, width, size), center_crop(photo, size)
            column, row = (view * shown.shape[:0:-1]).astype(int).T
            seen = shown[:2, row, column].numpy().T / 255
            assert np.abs(seen - points).max() < 0.02
            assert np.abs(points_in_crop(np.array([[0.5, 0.5]]), height, width, size) - 0.5).max() < 0.02
    outside = points_in_crop(np.array([[0.02, 0.5], [0.98, 0.5]]), 100, 300, 64)
    assert outside[0, 0] < 0
    assert outside[1, 0] > 1


@pytest.mark.parametrize("fit", ["crop", "square"])
def test_any_height_and_width(network, folder, tmp_path, fit):
    """Multiples of the patch: the grid is of as many patches. The aspect ratio is kept in a crop."""
    options = ["--features", "patches", "--size", "48x24", "--fit", fit]
    main(["embed", str(network), str(folder), str(tmp_path / "out"), *options])
    found, vit = read(tmp_path / "out", "patches"), load_backbone(network)
    assert found.shape == (12, 6, 3, 24)
    prepare = center_crop if fit == "crop" else whole_square
    photo = torch.from_numpy(np.array(Image.open(sorted(folder.iterdir())[0]).convert("RGB"))).permute(2, 0, 1)
    expected = tokens(vit, prepare(photo, (48, 24))[None])[1][0]
    assert np.abs(found[0].reshape(18, 24) - expected.numpy()).max() < 1e-4
    with pytest.raises(UserError, match="size 50x30: not a multiple of the patch size 8; the nearest is 48x32"):
        main(["embed", str(network), str(folder), str(tmp_path / "other"), "--size", "50x30"])
    with pytest.raises(UserError, match="--size 48x: expected pixels, as in 448, or HEIGHTxWIDTH, as in 480x640"):
        main(["embed", str(network), str(folder), str(tmp_path / "other"), "--size", "48x"])


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "none"])
def test_points_of_one_photo_do_not_depend_on_the_batch(mode):
    """Any number in each photo, none too; in the order of the photos."""
    torch.manual_seed(0)
    vit = ViT(width=24, depth=2, heads=2, patch=8, image_size=SIZE, attention=mode).eval()
    images = torch.randint(0, 256, (5, 3, SIZE, SIZE), dtype=torch.uint8)
    views = [torch.rand(count, 2) for count in (0, 3, 1, 3, 0)]
    cls, patches, references = embed.with_points(vit, images, views)
    for i, points in enumerate(views):
        one_cls, one_patches, one = tokens_at(vit, images[i : i + 1], [points[None]] if len(points) else [])
        assert (cls[i] - one_cls[0]).abs().max() < 1e-5
        assert (patches[i] - one_patches[0]).abs().max() < 1e-5
        assert references[i].shape == (len(points), 24)
        if len(points):
            assert (references[i] - one[0][0]).abs().max() < 1e-5
    alone = tokens(vit, images)
    assert (cls - alone[0]).abs().max() < 1e-5


def test_reference_tokens_have_the_rows_of_their_points(network, folder, tmp_path, capsys):
    """In the order of the file, CSV or JSON; NaN where the crop does not hold the point."""
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 120, 3), np.uint8))
    wide.save(folder / "wide.png")
    first = sorted(path.name for path in folder.iterdir())[0]
    (tmp_path / "p.csv").write_text(f"photo,x,y\nwide.png,.5,.5\n{first},.5,.4\nwide.png,.01,.5\nwide.png,.55,.5\n")
    (tmp_path / "p.json").write_text(json.dumps({"wide.png": [[0.5, 0.5], [0.01, 0.5]]}))
    base = ["embed", str(network), str(folder)]
    main([*base, str(tmp_path / "csv"), "--points", str(tmp_path / "p.csv")])
    assert "1 point with NaN rows" in capsys.readouterr().out
    main([*base, str(tmp_path / "json"), "--points", str(tmp_path / "p.json")])
    main([*base, str(tmp_path / "square"), "--points", str(tmp_path / "p.json"), "--fit", "square"])
    found = read(tmp_path / "csv", "points")
    assert np.isnan(found).all(1).tolist() == [False, False, True, False]
    vit, photo = load_backbone(network), torch.from_numpy(np.array(wide)).permute(2, 0, 1)
    view = torch.from_numpy(points_in_crop(np.array([[0.5, 0.5], [0.55, 0.5]]), 40, 120, SIZE)).float()
    _, _, (expected,) = tokens_at(vit, center_crop(photo, SIZE)[None], [view[None]])
    assert np.abs(found[[0, 3]] - expected[0].numpy()).max() < 1e-5
    assert np.abs(read(tmp_path / "json", "points")[0] - found[0]).max() < 1e-5
    given = torch.tensor([[[0.5, 0.5], [0.01, 0.5]]])
    _, _, (expected,) = tokens_at(vit, whole_square(photo, SIZE)[None], [given])
    assert np.abs(read(tmp_path / "square", "points") - expected[0].numpy()).max() < 1e-5
    with open(tmp_path / "csv" / "points.csv") as lines:
        assert [row["photo"] for row in csv.DictReader(lines)] == ["wide.png", first, "wide.png", "wide.png"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.csv", "a.jpg,.5,.5\n", "the first line must be photo,x,y"),
        ("p.csv", "photo,x,y\nb.jpg,.5,.5\n", r"p.csv:2: no photo 'b.jpg', did you mean 'a.jpg'\?"),
        ("p.csv", "photo,x,y\na.jpg,.5\n", "a point is two numbers"),
        ("p.csv", "photo,x,y\na.jpg,120,.5\n", "shares of the photo's width and height, 0 to 1, not pixels"),
        ("p.csv", "photo,x,y\na.jpg,nan,.5\n", "shares of the photo's"),
        ("p.csv", "photo,x,y\n", "no points"),
        ("p.json", '{"a.jpg": [[0.5]]}', "a point is two numbers"),
        ("p.json", '[["a.jpg", 0.5, 0.5]]', "expected"),
        ("p.json", "{", "not JSON"),
    ],
)
def test_points_that_cannot_be_used(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_points(tmp_path / name, ["a.jpg"])


def test_sources_that_cannot_be_used(folder, tmp_path):
    (tmp_path / "list.txt").write_text("photos/000.jpg\nphotos/nothing.jpg\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "voc" / "JPEGImages").mkdir(parents=True)
    for source, message in (
        ("list.txt", "list.txt:2: photos/nothing.jpg: no such file"),
        ("empty", "no photos"),
        ("voc", "name its photos: .*JPEGImages"),
        ("photo", "did you mean '.*photos'"),
    ):
        with pytest.raises(UserError, match=message):
            open_photo_source(str(tmp_path / source))


def test_a_resnet_has_features_but_no_points(folder, tmp_path):
    torch.manual_seed(0)
    resnet, path = ResNet((1, 1, 1, 1), (4, 8, 16, 32), 64), tmp_path / "resnet.safetensors"
    save_backbone(path, resnet, resnet.about())
    main(["embed", str(path), str(folder), str(tmp_path / "features"), "--features", "cls,patches"])
    assert read(tmp_path / "features", "patches").shape == (12, 2, 2, 128)
    (tmp_path / "p.csv").write_text(f"photo,x,y\n{names_of(tmp_path / 'features')[0]},.5,.5\n")
    with pytest.raises(UserError, match=r"is a ResNet; --points needs a ViT"):
        main(["embed", str(path), str(folder), str(tmp_path / "p"), "--points", str(tmp_path / "p.csv")])
    assert not (tmp_path / "p").exists()


def test_neighbors_find_a_planted_duplicate(network, folder, tmp_path, capsys):
    """The same photo under two names, smaller; a blank photo is the least like any other."""
    first = sorted(path.name for path in folder.iterdir())[0]
    with Image.open(folder / first) as photo:
        photo.resize((photo.width * 3 // 4, photo.height * 3 // 4)).save(folder / "copy.png")
    shutil.copy(folder / first, folder / "again.jpg")
    (folder / "bad.jpg").write_bytes(b"\xff\xd8\xff")
    out = tmp_path / "features"
    main(["embed", str(network), str(folder), str(out), "--neighbors", "--threshold", ".999", "--k", "4"])
    with open(out / "duplicates.csv") as lines:
        pairs = list(csv.DictReader(lines))
    assert {pairs[0]["photo"], pairs[0]["duplicate"]} == {first, "again.jpg"}
    assert float(pairs[0]["cosine"]) > 0.99999
    with open(out / "outliers.csv") as lines:
        listed = [row["photo"] for row in csv.DictReader(lines)]
    assert sorted(listed) == sorted(set(names_of(out)) - {"bad.jpg"})
    with Image.open(out / "neighbors.png") as sheet:
        assert sheet.width > 500
    assert "of photos with a cosine of at least 0.999: duplicates.csv" in capsys.readouterr().out


def test_nearest_leaves_itself_out():
    """By plain loops; also where more copies than neighbors come before a photo itself."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(30, 5)).astype(np.float32)
    cosines, labels = neighbors.nearest(features, 3, torch.device("cpu"))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    expected = unit @ unit.T
    np.fill_diagonal(expected, -2)
    assert np.array_equal(labels, np.argsort(-expected, 1)[:, :3])
    assert np.abs(cosines - -np.sort(-expected, 1)[:, :3]).max() < 1e-6
    assert neighbors.outliers(cosines)[0][0] == cosines.mean(1).argmin()
    copies = np.repeat(features[:1], 9, 0)
    cosines, labels = neighbors.nearest(copies, 3, torch.device("cpu"))
    assert not (labels == np.arange(9)[:, None]).any()
    pairs = neighbors.duplicate_pairs(cosines, labels, 0.99)
    assert {row for a, b, _ in pairs for row in (a, b)} == set(range(9))
    assert all(a < b for a, b, _ in pairs)
    assert len({(a, b) for a, b, _ in pairs}) == len(pairs)


def test_parquet(network, folder, tmp_path):
    words = ["embed", str(network), str(folder), str(tmp_path / "features"), "--features", "cls,patches", "--parquet"]
    if importlib.util.find_spec("pyarrow") is None:
        with pytest.raises(UserError, match=r"--parquet needs the package pyarrow: `.*pip install pyarrow`"):
            main(words)
        assert not (tmp_path / "features").exists()
        return
    from pyarrow import parquet

    main(words)
    table = parquet.read_table(tmp_path / "features" / "features.parquet")
    assert table["photo"].to_pylist() == names_of(tmp_path / "features")
    for name in ("cls", "patches"):
        rows = np.array(table[name].to_pylist(), np.float32)
        assert np.array_equal(rows, read(tmp_path / "features", name).reshape(12, -1))


def test_make_features_needs_a_source_and_a_folder(tmp_path):
    options = dict(cwd=ROOT, capture_output=True, text=True, check=False, env=env_without_make())
    for words, message in (
        (["SRC=photos"], "OUT=… is missing: the folder to write"),
        ([f"OUT={tmp_path}"], "SRC=… is missing: a folder of photos"),
    ):
        refused = subprocess.run(["make", "features", "RUN=runs/none", *words], **options)
        assert refused.returncode == 2
        assert message in refused.stderr


@pytest.mark.slow
def test_make_features(network, folder, tmp_path):
    words = ["make", "features", f"RUN={network}", f"SRC={folder}"]
    options = dict(cwd=ROOT, capture_output=True, text=True, check=False, env=env_without_make())
    done = subprocess.run([*words, f"OUT={tmp_path / 'my features'}", "ARGS=--dtype float16"], **options)
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "my features", "cls").shape == (12, 24)
