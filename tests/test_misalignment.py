"""Object misalignment: pixels are counted exactly, and the cases are those of the paper's section 3.3."""

import json

import numpy as np
import pytest
from conftest import run_program
from PIL import Image

from eval.datasets import VocSegmentation
from tools.show.misalignment import (
    GLOBAL,
    TABLE_2,
    PairCounts,
    Recipe,
    count_pairs,
    find_objects,
    lost_by_size,
    pixels_inside,
)

WHOLE = (1.0, 1.0)


def voc(folder, masks: list[np.ndarray], objects: list[np.ndarray] | None = None, painted=False) -> VocSegmentation:
    """A folder in VOC's layout with these masks."""
    for name in (
        "JPEGImages",
        "SegmentationClass",
        "ImageSets/Segmentation",
        *(["SegmentationObject"] if objects else []),
    ):
        (folder / name).mkdir(parents=True)
    for n, mask in enumerate(masks):
        Image.fromarray(np.zeros((*mask.shape, 3), np.uint8)).save(folder / "JPEGImages" / f"{n}.jpg")
        Image.fromarray(mask).save(folder / "SegmentationClass" / f"{n}.png")
        if objects:
            Image.fromarray(objects[n]).save(folder / "SegmentationObject" / f"{n}.png")
    (folder / "ImageSets/Segmentation/train.txt").write_text("\n".join(str(n) for n in range(len(masks))))
    if painted:
        (folder / "scenes.json").write_text(json.dumps({}))
    return VocSegmentation(folder, "train", 1, classes=1)


def test_pixels_are_counted_exactly():
    rng = np.random.default_rng(0)
    objects = rng.random((3, 20, 30)) < 0.3
    x, y = (np.sort(rng.integers(0, side + 1, (50, 4, 2)), -1) for side in (30, 20))
    windows = np.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], -1)
    windows[::2] = windows[::2][..., [2, 1, 0, 3]]  # flipped
    inside = pixels_inside(objects, windows)
    assert inside.shape == (50, 4, 3)
    for d in range(50):
        for v in range(4):
            (x0, x1), y0, y1 = sorted(windows[d, v, [0, 2]]), windows[d, v, 1], windows[d, v, 3]
            assert inside[d, v].tolist() == objects[:, y0:y1, x0:x1].sum((1, 2)).tolist()


def test_cases_by_hand():
    """Objects A and B, views teacher 1, teacher 2, student; T = 2, so the pairs are 12, 13, 21, 23."""
    a, b, both, none = [True, False], [False, True], [True, True], [False, False]
    scale, sizes = (GLOBAL,) * 3, np.array([0.1, 0.02])
    cases = [
        ([a, a, a], (4, 0, 0)),  # the same object everywhere
        ([both, a, a], (4, 0, 2)),  # 1-2 and 1-3 lose B; 2-1 and 2-3 lose nothing
        ([a, b, both], (4, 2, 0)),  # 1-2 and 2-1 share nothing
        ([both, none, a], (2, 1, 1)),  # 1-2: nothing shared; 1-3: B is lost; teacher 2 holds nothing: no case
        ([none, none, both], (0, 0, 0)),
    ]
    for views, expected in cases:
        counts = PairCounts()
        counts.add(np.array([views]), sizes, scale)
        assert (counts.pairs[0], counts.full[0], counts.part[0]) == expected, views
    counts = PairCounts()
    counts.add(np.array([[both, a, a], [both, both, none]]), sizes, scale)
    seen = counts.objects[GLOBAL, GLOBAL]
    assert sum(held for size, held, _ in seen if size == 0.1) == 8  # A: in the teacher view of all pairs
    assert sum(lost for size, _, lost in seen if size == 0.1) == 2
    assert sum(held for size, held, _ in seen if size == 0.02) == 6
    assert sum(lost for size, _, lost in seen if size == 0.02) == 4
    assert counts.percent(counts.part)[0] == 100 * 2 / 8


def test_what_an_object_is(tmp_path):
    """A class in a painted scene, an object of SegmentationObject, else a connected component; no background, no specks."""
    mask = np.zeros((50, 50), np.uint8)
    mask[5:15, 5:15], mask[5:15, 30:40], mask[30:40, 5:45], mask[45, 45], mask[48:, :5] = 1, 1, 2, 3, 255
    parts = np.where(mask == 1, 4, 0).astype(np.uint8)
    parts[:, 25:] = np.where(mask == 1, 5, 0)[:, 25:]
    areas = [
        sorted(find_objects(scenes, 0).sum((1, 2)).tolist())
        for scenes in (
            voc(tmp_path / "p", [mask], painted=True),
            voc(tmp_path / "v", [mask], [parts]),
            voc(tmp_path / "c", [mask]),
        )
    ]
    assert areas == [[200, 400], [100, 100], [100, 100, 400]]


def test_whole_images_are_aligned_and_small_views_are_not(tmp_path):
    mask = np.zeros((64, 64), np.uint8)
    mask[20:44, 20:44], mask[2:8, 2:8] = 1, 2
    scenes = voc(tmp_path, [mask, np.zeros_like(mask)], painted=True)  # the second scene holds nothing
    small = (0.05, 0.2)
    recipes = [Recipe("whole", (WHOLE,) * 4, 0.0), Recipe("small", (WHOLE, WHOLE, small, small), 0.0, (1.0, 1.0))]
    whole, few = count_pairs(scenes, recipes, 200, 0.0)
    assert whole.pairs == [6 * 200]
    assert whole.full == whole.part == [0]
    assert few.part[0] > few.full[0] > 0
    # pairs of a whole and a small view, and of two whole views: the smaller object is lost more often
    curves = lost_by_size(recipes, [whole, few])
    size, lost = curves[WHOLE, small, 0.0]
    assert size[0] < size[-1]
    assert lost[0] > lost[-1] + 20
    # with half of each object required instead of one pixel, more objects are missing
    assert count_pairs(scenes, recipes[1:], 200, 0.5)[0].full[0] > few.full[0]


def test_table_2_on_painted_scenes(tmp_path):
    """The program: local views cause misalignment, resolution does not; a minimum overlap makes full misalignment rarer."""
    assert [len(r.scale) for r in TABLE_2] == [2, 6, 6, 6] * 2
    folder, out = tmp_path / "scenes", tmp_path / "m.png"
    run_program("-m", "tools.make_scenes", folder, "--train", 60, "--val", 1, "--size", 48)
    stdout = run_program(
        "-m", "tools.show", "misalignment", folder, "--out", out, "--config", "configs/demo.yaml"
    ).stdout
    rows = [line.split("│")[1:-1] for line in stdout.splitlines() if line.startswith("│")]
    figures = {row[0].strip(): [float(cell.split("±")[0]) for cell in row[1:3]] for row in rows}
    assert list(figures) == [*(recipe.name for recipe in TABLE_2), "demo"]
    for method in ("DINO", "DenseDINO"):
        full, part = figures[f"{method} 2×224+4×96 local"]
        assert figures[f"{method} 2×224+4×96"] == figures[f"{method} 6×224"]
        assert part > 3 * figures[f"{method} 6×224"][1]
        assert full > figures[f"{method} 6×224"][0]
    assert figures["DenseDINO 2×224+4×96 local"][0] < figures["DINO 2×224+4×96 local"][0]
    Image.open(out).verify()


def test_a_split_without_objects(tmp_path):
    voc(tmp_path / "empty", [np.zeros((20, 20), np.uint8)])
    error = run_program(
        "-m", "tools.show", "misalignment", tmp_path / "empty", "--out", tmp_path / "m.png", expect=2
    ).stderr
    assert error == f"error: {tmp_path}/empty: no scene of split 'train' holds an object\n"


@pytest.mark.parametrize("recipe", TABLE_2, ids=lambda recipe: recipe.name)
def test_the_recipes_are_those_of_table_2(recipe):
    assert recipe.scale[:2] == (GLOBAL, GLOBAL)
    assert set(recipe.scale[2:]) <= ({(0.05, 0.4)} if "local" in recipe.name else {GLOBAL})
    assert (recipe.min_overlap > 0) == recipe.name.startswith("Dense")
