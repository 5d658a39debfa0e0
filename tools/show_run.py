"""Paint all pictures of a run: views, attention, points, components, likeness, and segmentation where it has scenes.

    python -m tools.show_run RUN [--if-missing]

One process for what `python -m tools.show_…` paint one by one, into RUN/pictures/.
"""

import argparse
from pathlib import Path

from runtime.config import load_config
from runtime.mistake import Mistake, tell_mistakes
from tools import show_attention, show_pca, show_points, show_segmentation, show_similarity, show_views


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m tools.show_run", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--if-missing", action="store_true", help="leave pictures that are there alone")
    args = parser.parse_args(argv)

    if not (args.run / "config.yaml").is_file():
        raise Mistake(f"{args.run}: no run folder (no config.yaml)")
    config = load_config(args.run / "config.yaml")
    shows = [show_views, show_attention, show_pca, show_similarity]
    shows += [show_points] if config.points else []
    shows += [show_segmentation] if config.eval.voc else []
    for tool in shows:
        tool.main([str(args.run), *(["--if-missing"] if args.if_missing else [])])


if __name__ == "__main__":
    tell_mistakes(main)
