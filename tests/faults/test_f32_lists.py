"""F32: lists of scenes as people write them. One name a line, extension and case forgiven; an error names the list and its
line; nothing outside the folder is opened.

The cases go through the data set that every segmentation command reads; one goes through a command.
"""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import run_program
from pictures import encoded, photo, tree

from eval.datasets import VocSegmentation
from runtime.errors import UserError

MASK = encoded(np.tile(np.uint8([0, 1]), (30, 20)), "PNG")
PHOTO, PNG = photo(1), encoded(np.zeros((30, 40, 3), np.uint8), "PNG")
LIST = "ImageSets/Segmentation/val.txt"


def scenes(folder: Path, lines: str | bytes, photos: dict[str, bytes], masks: tuple[str, ...]) -> VocSegmentation:
    """The split 'val' of a folder with this list and these files."""
    text = lines.encode() if isinstance(lines, str) else lines
    files = {f"JPEGImages/{name}": data for name, data in photos.items()}
    of = {True: MASK, False: PHOTO}
    tree(
        folder, {LIST: text} | files | {f"SegmentationClass/{name}": of[name.lower().endswith("png")] for name in masks}
    )
    return VocSegmentation(folder, "val", 16, classes=2)


FOUND = {  # case: (list, photos, masks, the photo that is found)
    "blanks inside": ("my photo 1\n", {"my photo 1.jpg": PHOTO}, ("my photo 1.png",), "my photo 1.jpg"),
    "a blank at the end": ("a \n", {"a.jpg": PHOTO}, ("a.png",), "a.jpg"),
    "a name that ends in a blank": ("a \n", {"a .jpg": PHOTO, "a.jpg": PNG}, ("a .png",), "a .jpg"),
    "with its extension": ("a.jpg\n", {"a.jpg": PHOTO}, ("a.png",), "a.jpg"),
    "with another extension": ("a.png\n", {"a.jpg": PHOTO}, ("a.png",), "a.jpg"),
    "a dot in the name": ("v1.2-000\n", {"v1.2-000.jpg": PHOTO}, ("v1.2-000.png",), "v1.2-000.jpg"),
    "JPG": ("a\n", {"a.JPG": PHOTO}, ("a.png",), "a.JPG"),
    "JPG listed": ("a.JPG\n", {"a.JPG": PHOTO}, ("a.PNG",), "a.JPG"),
    "jpeg": ("a\n", {"a.jpeg": PHOTO}, ("a.png",), "a.jpeg"),
    "JPEG": ("a\n", {"a.JPEG": PHOTO}, ("a.png",), "a.JPEG"),
    "Png": ("a\n", {"a.Png": PNG}, ("a.png",), "a.Png"),
    "another case": ("IMG_7\n", {"img_7.jpg": PHOTO}, ("Img_7.png",), "img_7.jpg"),
    "its own case first": ("a\n", {"A.jpg": PNG, "a.jpg": PHOTO}, ("a.png",), "a.jpg"),
    "lines of Windows": ("a\r\n", {"a.jpg": PHOTO}, ("a.png",), "a.jpg"),
    "a mark at the begin": (b"\xef\xbb\xbfa\n", {"a.jpg": PHOTO}, ("a.png",), "a.jpg"),
    "below a folder": ("city/a\n", {"city/a.jpg": PHOTO}, ("city/a.png",), "city/a.jpg"),
}


BEFORE = ("a dot in the name", "below a folder", "a blank at the end", "its own case first", "jpeg", "lines of Windows")


@pytest.mark.fast
@pytest.mark.fault("F32")
@pytest.mark.parametrize("case", [case for case in FOUND if case not in BEFORE])
def test_a_name_finds_its_photo(tmp_path, case):
    lines, photos, masks, found = FOUND[case]
    made = scenes(tmp_path, lines, photos, masks)
    assert made.images == [tmp_path / "JPEGImages" / found]
    assert made[0][0].shape == (3, 16, 16)


@pytest.mark.parametrize("case", BEFORE)
def test_a_name_that_was_found_before_still_is(tmp_path, case):
    lines, photos, masks, found = FOUND[case]
    assert scenes(tmp_path, lines, photos, masks).images == [tmp_path / "JPEGImages" / found]


REFUSED = {  # case: (list, photos, masks, message)
    "no photo": ("a\n\nIMG 0008\n", {"a.jpg": PHOTO, "IMG 0007.jpg": PHOTO}, ("a.png",),
                 "val.txt, line 3: no image of 'IMG 0008' in {folder}/JPEGImages, did you mean 'IMG 0007'?"),
    "no mask": ("a\nb.jpg\n", {"a.jpg": PHOTO, "b.jpg": PHOTO}, ("a.png",),
                "val.txt, line 2: no mask of 'b.jpg' in {folder}/SegmentationClass"),
    "two columns": ("a.jpg a.png\n", {"a.jpg": PHOTO}, ("a.png",), "val.txt, line 1: two paths, 'a.jpg' and 'a.png'"),
    "two paths": ("/JPEGImages/a.jpg /SegmentationClass/a.png\n", {"a.jpg": PHOTO}, ("a.png",),
                  "one name a line, here 'a': `sed -i.bak -E "),
    "two paths below": ("JPEGImages/b/a.jpg SegmentationClass/b/a.png\n", {"b/a.jpg": PHOTO}, ("b/a.png",), "here 'b/a': `"),
    "a flag": ("a  1\n", {"a.jpg": PHOTO}, ("a.png",), "val.txt, line 1: 'a' and a flag '1', as in VOC's lists of"),
    "a flag below 0": ("a -1\n", {"a.jpg": PHOTO}, ("a.png",), "val.txt, line 1: 'a' and a flag '-1'"),
    "a photo of another kind": ("a\n", {"a.bmp": PHOTO}, ("a.png",),
                                "the image of 'a' is {folder}/JPEGImages/a.bmp; it must end in .jpg or .jpeg or"),
    "a mask that is a JPEG": ("a\n", {"a.jpg": PHOTO}, ("a.jpg",),
                             "the mask of 'a' is {folder}/SegmentationClass/a.jpg; a mask must be a PNG"),
    "leads up": ("a\n../out\n", {"a.jpg": PHOTO}, ("a.png",), "val.txt, line 2: '../out' leads out of {folder}"),
    "leads up inside": ("b/../../../out\n", {"b/a.jpg": PHOTO}, (), "val.txt, line 1: 'b/../../../out' leads out"),
    "absolute": ("{folder}/../out\n", {"a.jpg": PHOTO}, (), "val.txt, line 1: '{folder}/../out' leads out of"),
    "a zero byte": ("a\n\0\n", {"a.jpg": PHOTO}, ("a.png",), "val.txt, line 2"),
    "no text": (b"a\n\xff\xfe\n", {"a.jpg": PHOTO}, ("a.png",), "val.txt: byte 2 is not UTF-8 text"),
    "two in another case": ("aB\n", {"ab.jpg": PHOTO, "AB.jpg": PHOTO}, ("ab.png",),
                            "val.txt, line 1: 'aB' may be AB.jpg or ab.jpg in {folder}/JPEGImages"),
}  # fmt: skip


@pytest.mark.fast
@pytest.mark.fault("F32")
@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_line_is_named(tmp_path, case):
    lines, photos, masks, message = REFUSED[case]
    folder = tmp_path / "voc"
    tree(tmp_path, {"out.jpg": PHOTO, "out.png": MASK})  # must not be opened
    lines = lines.replace("{folder}", str(folder)) if isinstance(lines, str) else lines
    with pytest.raises(UserError) as refused:
        scenes(folder, lines, photos, masks)
    assert message.format(folder=folder) in str(refused.value)


@pytest.mark.fast
@pytest.mark.fault("F32")
@pytest.mark.parametrize("line", ["/JPEGImages/b/v1.2-0.jpg /SegmentationClass/b/v1.2-0.png", "b/v1.2-0  -1"])
def test_the_command_mends_the_list(tmp_path, line):
    files = ({"b/v1.2-0.jpg": PHOTO}, ("b/v1.2-0.png",))
    with pytest.raises(UserError) as refused:
        scenes(tmp_path / "my voc", f"{line}\n", *files)
    subprocess.run(str(refused.value).split("`")[1], shell=True, check=True)
    made = VocSegmentation(tmp_path / "my voc", "val", 16, classes=2)
    assert made.images == [tmp_path / "my voc/JPEGImages/b/v1.2-0.jpg"]
    assert (tmp_path / "my voc" / f"{LIST}.bak").read_text() == f"{line}\n"


@pytest.mark.fast
@pytest.mark.fault("F32")
def test_a_split_outside_the_folder_is_refused(tmp_path):
    scenes(tmp_path, "a\n", {"a.jpg": PHOTO}, ("a.png",))
    shutil.copy(tmp_path / LIST, tmp_path / "out.txt")
    with pytest.raises(UserError, match=r"no split '../../out' \(available: val\)"):
        VocSegmentation(tmp_path, "../../out", 16, classes=2)


@pytest.mark.fault("F32")
def test_a_command_names_the_line(tmp_path):
    scenes(tmp_path / "voc", "a b\n", {"a b.JPG": PHOTO}, ("a b.png",))
    shutil.copy(tmp_path / "voc" / LIST, tmp_path / "voc" / LIST.replace("val", "train"))
    (tmp_path / "voc" / LIST).write_text("a b\nc d\n")
    (tmp_path / "weights.pth").write_bytes(b"")
    done = run_program("-m", "eval", "linear_seg", tmp_path / "weights.pth", "--data", tmp_path / "voc", expect=2)
    assert done.stderr.startswith(f"error: {tmp_path}/voc/{LIST}, line 2: no image of 'c d'")
