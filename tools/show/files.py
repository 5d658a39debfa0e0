"""Files of the pictures: where a picture goes, whether it is kept, and whether the images that it shows exist."""

from collections.abc import Iterable
from pathlib import Path

from eval.provenance import Weights, png_weights
from runtime.errors import UserError, suggest


def output_path(name: str, run: Path | None, out: Path | None) -> Path:
    """The path of a picture: `out` if given, else RUN/pictures/NAME.png, else NAME.png in the current folder."""
    return out or (run / "pictures" / f"{name}.png" if run else Path(f"{name}.png"))


def keep_existing(out: Path, skip_existing: bool, weights: list[Weights]) -> bool:
    """Whether a picture of these weights exists and is kept; says so, or why it is drawn again."""
    if not skip_existing or not out.exists():
        return False
    drawn = png_weights(out)
    if drawn == weights:
        print(f"{out}: already there")
        return True
    steps = [w.get("step") for w in drawn or ()]
    of = f"of step {steps[0]}" if steps and steps[0] is not None else "of another network, or of an unknown one"
    print(f"{out}: {of}; drawn again")
    return False


def check_images(paths: Iterable[Path]) -> None:
    """Raise UserError if one of the images or folders does not exist."""
    for path in paths:
        if not path.exists():
            siblings = path.parent.iterdir() if path.parent.is_dir() else ()
            raise UserError(f"{path}: no such image{suggest(str(path), map(str, siblings))}")
