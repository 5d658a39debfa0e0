"""Paint all pictures of a run: views, attention, points, components, likeness, and segmentation where it has scenes.

    python -m tools.show.run RUN [--skip-existing]

One process for what `python -m tools.show_…` paint one by one, into RUN/pictures/.
"""

import argparse
from pathlib import Path

from runtime.config import load_config
from runtime.errors import UserError, run_cli
from tools.show import attention, pca, points, segmentation, similarity, views


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m tools.show.run", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--skip-existing", action="store_true", help="leave pictures that are there alone")
    args = parser.parse_args(argv)

    if not (args.run / "config.yaml").is_file():
        raise UserError(f"{args.run}: no run folder (no config.yaml)")
    config = load_config(args.run / "config.yaml")
    shows = [views, attention, pca, similarity]
    shows += [points] if config.points else []
    shows += [segmentation] if config.eval.voc else []
    for tool in shows:
        tool.main([str(args.run), *(["--skip-existing"] if args.skip_existing else [])])


if __name__ == "__main__":
    run_cli(main)
