"""A folder in Pascal VOC's layout, read without torch: its splits, files and class names.

folder/JPEGImages/<id>.jpg  SegmentationClass/<id>.png  ImageSets/Segmentation/<split>.txt
folder/SegmentationClassAug/<id>.png    optional: the masks of `trainaug` (VOC's own where one is missing)
folder/classes.txt                      optional: the names of the classes, one per line
"""

from pathlib import Path

from runtime.errors import UserError, suggest

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def read_split(folder: str | Path, split: str) -> list[str]:
    """The ids of a split's scenes, in the order of the list.

    Raises UserError if the folder does not have VOC's layout, or if the split is missing or empty.
    """
    lists = Path(folder) / "ImageSets" / "Segmentation"
    if not lists.is_dir():
        raise UserError(f"{folder}: not in Pascal VOC's layout (no ImageSets/Segmentation/)")
    if not (lists / f"{split}.txt").is_file():
        known = sorted(path.stem for path in lists.glob("*.txt"))
        raise UserError(f"{lists}: no split '{split}'{suggest(split, known)} (available: {', '.join(known)})")
    ids = (lists / f"{split}.txt").read_text().split()
    if not ids:
        raise UserError(f"{lists / split}.txt: the split is empty")
    return ids


def default_train_split(folder: str | Path) -> str:
    """`trainaug` if the folder has it, else `train`."""
    has_aug = (Path(folder) / "ImageSets" / "Segmentation" / "trainaug.txt").is_file()
    return "trainaug" if has_aug else "train"


def find_image(folder: Path, scene: str, split: str) -> Path:
    """The image of a scene. Raises UserError if it is missing."""
    return _find(folder, ["JPEGImages"], scene, IMAGE_SUFFIXES, f"no such image, but split '{split}' lists it")


def find_mask(folder: Path, scene: str, split: str) -> Path:
    """The mask of a scene; splits named `...aug` prefer SegmentationClassAug. Raises UserError if it is missing."""
    folders = ["SegmentationClassAug", "SegmentationClass"] if split.endswith("aug") else ["SegmentationClass"]
    return _find(folder, folders, scene, (".png",), f"no such mask, but split '{split}' lists it")


def class_names(folder: Path) -> list[str]:
    """The names in classes.txt; empty if there is no such file."""
    file = folder / "classes.txt"
    lines = file.read_text().split("\n") if file.is_file() else []
    return [line.strip() for line in lines if line.strip()]


def _find(folder: Path, subfolders: list[str], scene: str, suffixes: tuple[str, ...], problem: str) -> Path:
    for subfolder in subfolders:
        for suffix in suffixes:
            path = folder / subfolder / (scene + suffix)
            if path.is_file():
                return path
    raise UserError(f"{folder / subfolders[-1] / scene}{suffixes[0]}: {problem}")
