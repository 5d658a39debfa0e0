"""How long the missing runs of the tables will take. Imports no torch."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from runtime.config import Config, load_config
from runtime.errors import plural
from tools.paper.runs import Run, Scale

# what is known before any run of a folder has trained: images/s of configs/photos64.yaml on one thread of a shared machine,
# and seconds of each measure on the demo's scenes on one thread (docs/howto/paper-tables.md)
KNOWN_CONFIG, KNOWN_SPEED = "configs/photos64.yaml", 110
KNOWN_MEASURES = {"knn": 6, "linear_seg": 12, "points": 8, "retrieval_seg": 35, "cluster_seg": 55}


class Estimate(NamedTuple):
    """Seconds of what is missing of each run, by its folder; None: nothing is known yet."""

    seconds: dict[Path, float] | None
    source: str


def estimate(runs: Sequence[Run], scale: Scale, on_gpu: bool) -> Estimate:
    """How long the runs will take, one at a time: by the runs of this folder that have trained, else by a known speed."""
    logged = [(run.config, run.logged_steps(), run.train_seconds()) for run in runs if run.config]
    done = [(config, steps, seconds) for config, steps, seconds in logged if seconds]
    rates: dict[str, float] = {}  # seconds of a unit of work, by method
    if done:
        rate = _rate(done)
        methods = {config.method for config, *_ in done}
        rates = {method: _rate([d for d in done if d[0].method == method]) for method in methods}
        source = f"by the steps of {plural(len(done), 'run')} of {scale.folder}"
    elif on_gpu or scale.base.model.arch != "custom":
        return Estimate(
            None, "hours are not known: no GPU has been measured; start, and --dry-run tells them from the first steps"
        )
    else:
        reference = load_config(KNOWN_CONFIG)
        rate = reference.optim.global_batch_size / KNOWN_SPEED / work(reference)
        source = f"by {KNOWN_SPEED} images/s of {KNOWN_CONFIG} on one thread (docs/results.md)"
    columns = [run.figures(scale.scenes) for run in runs]
    seconds = {}
    for run in runs:
        left = 0.0
        if run.config:
            steps = max(0, run.steps - run.trained_steps())
            left = steps * work(run.config) * rates.get(run.config.method, rate)
        for key in (f"{measure}_seconds" for measure in run.missing(scale.scenes)):
            known = [column[key] for column in columns if key in column]
            left += fmean(known) if known else KNOWN_MEASURES.get(key.removesuffix("_seconds"), 60)
        seconds[run.folder] = left
    return Estimate(seconds, source)


def _rate(done: Sequence[tuple[Config, int, float]]) -> float:
    """Seconds of a unit of work: of (config, its steps, their seconds)."""
    return sum(seconds for *_, seconds in done) / sum(steps * work(config) for config, steps, _ in done)


def work(config: Config) -> float:
    """Arithmetic of a step, in units that compare configs of one network: tokens of the student, thrice for its backward
    pass, and of the teacher. A reference token counts twice, because it passes a head too (model.cost of the demo: DenseDINO
    over DINO 1.21, M = 32 over 4 2.23; here 1.22 and 2.24)."""
    views, model = config.views, config.model
    tokens = 0.0
    for view in views:
        patches = 1 + (view.size // model.patch) ** 2
        student = 1 if view.teacher else 2  # pairs that a view is in (docs/fidelity.md)
        tokens += 3 * (patches + 2 * student * config.points)
        if view.teacher:
            tokens += patches + 2 * (len(views) - 1) * config.points
    block = math.prod((model.width or 1, model.width or 1, model.depth or 1))
    return tokens * block * config.optim.global_batch_size
