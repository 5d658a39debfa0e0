"""F31: masks that measure nothing, or hold colors. They are looked at before a network is loaded: an error or a warning says
which numbers or colors occur and what mends it; a palette file makes colors readable in every command.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import run_program
from pictures import encoded, photo, tree
from PIL import Image

import train
from eval import __main__ as commands
from eval.datasets import VocSegmentation
from eval.masks import check_scenes
from runtime.config import load_config
from runtime.errors import UserError
from tests.runs import write_run
from tools.show import __main__ as show

NAMED = "0 0 0 background\n128 0 0 aeroplane\n\n224 224 192 ignore  # borders\n0 128 0 bicycle\n"
SEGMENTATIONS = ("linear_seg", "cluster_seg", "retrieval_seg")


def halves(*numbers: int) -> np.ndarray:
    """A mask of equal stripes of these numbers."""
    return np.repeat(np.uint8(numbers), 12 // len(numbers))[None].repeat(12, 0)


def colored(*colors: tuple[int, int, int]) -> np.ndarray:
    return np.repeat(np.uint8(colors), 12 // len(colors), 0)[None].repeat(12, 0)


def scenes(folder: Path, train: list, val: list | None = None) -> Path:
    """Scenes with these masks: arrays, or the bytes of a PNG."""
    files: dict[str, bytes] = {}
    for split, masks in (("train", train), ("val", val or train)):
        names = [f"{split}{i}" for i in range(len(masks))]
        files[f"ImageSets/Segmentation/{split}.txt"] = "\n".join(names).encode()
        for name, mask in zip(names, masks, strict=True):
            files[f"JPEGImages/{name}.jpg"] = photo(len(files), 12, 12)
            files[f"SegmentationClass/{name}.png"] = mask if isinstance(mask, bytes) else encoded(mask, "PNG")
    return tree(folder, files)


def refusal(folder: Path, command: str = "linear_seg", *options: object) -> str:
    """The message of a command on these scenes; its network is a file that cannot be loaded."""
    weights = folder.with_name("weights.pth")
    weights.write_bytes(b"")
    with pytest.raises(UserError) as refused:
        commands.main([command, str(weights), "--data", str(folder), *map(str, options)])
    return str(refused.value)


# ------------------------------------------------------------------------------------------------ nothing is measured

NOTHING = {  # case: (train masks, val masks, what is said)
    "0 and 255": ([halves(0, 255)] * 3, None, (
        "the masks of 'train' hold 0 and 255: 255 is ignored, so there is one class", "write 1 for the object",
        "`255 255 255 object`", "palette.txt, or in another file with --palette FILE")),
    "all ignored": ([halves(255)], None, ("the masks of 'train' hold only 255, which is ignored",)),
    "one number": ([halves(0), halves(0)], None, ("the masks of 'train' hold 0 only: there is one class",)),
    "val of one class": ([halves(0, 1)], [halves(0, 255)], ("the masks of 'val' hold 0 and 255",)),
    "val ignored": ([halves(0, 1)], [halves(255)], ("the masks of 'val' hold only 255",)),
    "a JPEG as a mask": ([encoded(halves(0, 1), "JPEG")], None, ("train0.png: this mask is a JPEG; a mask must be a PNG",)),
}  # fmt: skip


@pytest.mark.fast
@pytest.mark.fault("F31")
@pytest.mark.parametrize("case", NOTHING)
def test_what_measures_nothing_is_refused(tmp_path, case):
    train, val, words = NOTHING[case]
    message = refusal(scenes(tmp_path / "voc", train, val))
    assert all(word in message for word in words), message


@pytest.mark.fast
@pytest.mark.fault("F31")
def test_classes_are_those_of_both_splits(tmp_path, tiny_shards, capsys):
    """What only 'val' has is counted, in training and in every evaluation, and told."""
    folder = scenes(tmp_path / "voc", [halves(0, 1)] * 2, [halves(0, 1, 2)] * 2)
    check_scenes(folder)
    assert "no mask of 'train' has 2, which other masks have: nothing can learn it" in capsys.readouterr().out
    run = write_run(tmp_path / "run", tiny_shards)
    assert commands.main(["report", str(run), "--data", str(folder)]) == 0
    assert json.loads((run / "results.json").read_text())["settings"]["segmentation"]["classes"] == 3


@pytest.mark.fast
@pytest.mark.parametrize("source", [pytest.param("classes.txt", marks=pytest.mark.fault("F31")), "--classes"])
def test_too_few_classes_are_mended_where_they_were_given(tmp_path, source):
    folder = scenes(tmp_path / "voc", [halves(0, 1)], [halves(0, 1, 7)])
    if source == "classes.txt":
        tree(folder, {"classes.txt": b"ground\nthing\n"})
    message = refusal(folder, "linear_seg", *(["--classes", 2] if source == "--classes" else []))
    assert "val0.png: class 7, but there are 2 classes (0 to 1): the masks of 'val' hold 0, 1 and 7; " in message
    mend = f"write 8 names into {folder}/classes.txt, one a line, or move it away"
    assert message.endswith("--classes 8 counts them all" if source == "--classes" else mend)


@pytest.mark.fast
@pytest.mark.fault("F31")
@pytest.mark.parametrize("mask", [colored((0, 0, 0), (128, 0, 0)), halves(0, 255)], ids=["colors", "0 and 255"])
def test_training_names_no_option_that_it_does_not_have(tmp_path, tiny_config, mask):
    folder = scenes(tmp_path / "voc", [mask])
    with pytest.raises(UserError) as refused:
        train.train(load_config(tiny_config, [f"eval.voc={folder}"], processes=1), dry_run=True)
    assert f"{folder}/palette.txt)" in str(refused.value)
    assert "--palette" not in str(refused.value)


@pytest.mark.fault("F31")
@pytest.mark.parametrize("command", ["cluster_seg", "retrieval_seg", "compare", "report", "show"])
def test_every_command_refuses_one_class(tmp_path, tiny_shards, command):
    """Exit code 2 and one line, whatever reads the masks."""
    folder = scenes(tmp_path / "voc", [halves(0, 255)] * 2)
    run, options = write_run(tmp_path / "run", tiny_shards), ["--data", folder]
    words = ["tools.show", "segmentation", run, folder] if command == "show" else ["eval", command, run, *options]
    error = run_program("-m", *words, expect=2).stderr
    assert error.startswith(f"error: {folder}: the masks of '")
    assert error.count("\n") == 1


@pytest.mark.fast
@pytest.mark.fault("F31")
@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((0, 2, 5), "the masks hold 0, 2 and 5 of 6 classes; no pixel has 1, 3 or 4, which counts as 0"),
        ((1, 2, 3, 255), "the masks hold 1 to 3 of 4 classes; no pixel has 0,"),
        ((0, 128, 255), "the masks hold 0 and 128 of 129 classes; no pixel has 1 to 127,"),
    ],
)
def test_gaps_are_told(tmp_path, capsys, numbers, said):
    refusal(scenes(tmp_path / "voc", [halves(*numbers)]))  # of the network: the masks are accepted
    out = capsys.readouterr().out
    assert out.startswith(f"warning: {tmp_path}/voc: ")
    assert said in out


def gray(bits: int, values: list[int]) -> bytes:
    """A gray PNG of some bits a value, 12 x 12 pixels of equal stripes."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = np.repeat(values, 12 // len(values))
    packed = np.packbits(((row[:, None] >> np.arange(bits - 1, -1, -1)) & 1).astype(np.uint8))
    header = struct.pack(">IIBBBBB", 12, 12, bits, 0, 0, 0, 0)
    lines = zlib.compress((b"\0" + packed.tobytes()) * 12)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


@pytest.mark.fast
@pytest.mark.fault("F31")
@pytest.mark.parametrize(("bits", "values"), [(1, [0, 1]), (2, [0, 1, 2]), (4, [0, 1, 5]), (16, [0, 1, 9])])
def test_gray_of_few_or_many_bits_is_read_as_numbers(tmp_path, bits, values):
    """Pillow stretches 2 and 4 bits to 0 … 255, which made 0, 1, 2 the classes 0, 85, 170."""
    made = VocSegmentation(scenes(tmp_path / "voc", [gray(bits, values)]), "val", 12)
    assert np.unique(made[0][1]).tolist() == values
    assert made.classes == values[-1] + 1


# ------------------------------------------------------------------------------------------------------------- colors


@pytest.mark.fast
@pytest.mark.fault("F31")
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colors_are_listed(tmp_path, mode):
    mask = encoded(Image.fromarray(colored((0, 0, 0), (0, 0, 0), (128, 0, 0))).convert(mode), "PNG")
    message = refusal(scenes(tmp_path / "voc", [mask] * 30))
    assert f"train0.png: a mask must be a palette or gray PNG of class numbers, this one has mode {mode}" in message
    assert "the first 20 masks of 'train' hold 2 colors: 0 0 0 (66.7 %), 128 0 0 (33.3 %)" in message
    assert (
        f"a line `R G B NAME` for each in {tmp_path}/voc/palette.txt, or in another file with --palette FILE" in message
    )


@pytest.mark.fast
@pytest.mark.fault("F31")
@pytest.mark.parametrize("where", ["palette.txt", "numbers", "palette PNG", "0 and 255"])
def test_a_palette_makes_colors_classes(tmp_path, where):
    mask: np.ndarray | bytes = colored((0, 0, 0), (128, 0, 0), (224, 224, 192), (0, 128, 0))
    text, expected, names = NAMED, [0, 1, 2, 255], ["background", "aeroplane", "bicycle"]
    if where == "numbers":
        text, expected, names = "0 0 0 3\n128 0 0 1\n224 224 192 ignore\n0 128 0 1\n", [1, 3, 255], []
    elif where == "palette PNG":
        mask = encoded(Image.fromarray(mask).quantize(), "PNG")
    elif where == "0 and 255":
        mask, text, expected, names = (
            halves(0, 255),
            "0 0 0 background\n255 255 255 object\n",
            [0, 1],
            ["background", "object"],
        )
    made = VocSegmentation(tree(scenes(tmp_path / "voc", [mask]), {"palette.txt": text.encode()}), "val", 12)
    assert np.unique(made[0][1]).tolist() == expected
    assert made.names == names


@pytest.mark.fast
@pytest.mark.fault("F31")
@pytest.mark.parametrize("command", [*SEGMENTATIONS, "compare", "report", "show"])
def test_every_command_reads_a_palette(tmp_path, tiny_shards, capsys, command):
    folder = scenes(tmp_path / "voc", [colored((0, 0, 0), (128, 0, 0), (224, 224, 192), (0, 128, 0))] * 2)
    palette, run = tmp_path / "colors.txt", write_run(tmp_path / "run", tiny_shards)
    palette.write_text(NAMED)
    options = [str(run), "--data", str(folder), "--palette", str(palette)]
    if command == "show":
        options[1:3] = [str(folder), "--images", "2"]
        show.main(["segmentation", *options])
        assert Image.open(run / "pictures" / "segmentation.png").size[0] > 100
        return
    options += {"compare": ["--measures", "retrieval_seg"], "cluster_seg": ["--clusters", "3", "--seeds", "1"]}.get(
        command, []
    )
    assert commands.main([command, *options]) == 0
    screen = capsys.readouterr().out
    if command == "compare":
        (column,) = json.loads((run / "measures.json").read_text())["networks"].values()
        assert len(column["retrieval_seg_iou"]) == 3
    elif command == "report":
        results = json.loads((run / "results.json").read_text())
        assert results["settings"]["segmentation"]["classes"] == 3
        assert 0 < results["miou"] <= 100
    else:
        assert "aeroplane" in screen or "3 classes" in screen


WRONG = {  # palette file: message
    "0 0 0\n": "line 1: '0 0 0' is not `R G B CLASS`, as in `128 0 0 aeroplane`",
    "0 0 0 a\n# b\n0 256 0 b\n": "line 3: '0 256 0 b' is not `R G B CLASS`",
    "0 0 0 a\n0 0 0 b\n": "line 2: the color 0 0 0 is also 'a'",
    "0 0 0 0\n1 1 1 cat\n": "classes are numbers or names, not both; this file has '0' and 'cat'",
    "0 0 0 300\n": "1 to 254 classes, numbered 0 to 253, can be named",
    "0 0 0 a\n0 128 0 b\n": "train0.png: the color 128 0 0 (72 pixels) is not in {file}; add its line",
}


@pytest.mark.fast
@pytest.mark.fault("F31")
@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_palette_is_refused(tmp_path, text):
    folder, file = scenes(tmp_path / "voc", [colored((0, 0, 0), (128, 0, 0))]), tmp_path / "colors.txt"
    file.write_text(text)
    message = refusal(folder, "linear_seg", "--palette", file)
    assert WRONG[text].format(file=file) in message
    assert str(file) in message
    assert "no such file" in refusal(folder, "cluster_seg", "--palette", tmp_path / "none.txt")
