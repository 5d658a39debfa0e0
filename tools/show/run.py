"""Draw all pictures of a run in one process.

    python -m tools.show run RUN [--skip-existing]

Views, attention, principal components, similarity and nearest neighbors; points if the run has reference tokens;
segmentation if it has scenes (`eval.voc`). The pictures go to RUN/pictures/.
"""

from pathlib import Path

from runtime.config import load_config
from runtime.errors import UserError


def pictures_of(run: Path) -> list[str]:
    """Names of the pictures that a run has, each a subcommand of `tools.show`. Raises UserError if it is no run folder."""
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: no run folder (no config.yaml)")
    config = load_config(run / "config.yaml")
    names = ["views", "attention", "pca", "similarity", "neighbors"]
    names += ["points"] if config.points else []
    return names + (["segmentation"] if config.eval.voc else [])
