"""The runs of the tables: what each is, what of it is there already, how long the rest will take.

A run is a row's config with a seed, in a folder of its own; rows whose configs are the same share it. Imports no torch.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from eval import preflight
from eval.compare import ON_PHOTOS
from eval.html import read_metrics
from eval.masks import check_scenes
from eval.provenance import TIMM, known_weights
from eval.tables import read_object
from eval.target import open_shards
from pipeline.plan import Plan
from pipeline.shards import Shards
from runtime.checkpoint import fingerprint, latest_valid
from runtime.command import again
from runtime.config import Config, diff, dump_config, load_config
from runtime.config.messages import COMMAND_LINE
from runtime.errors import UserError, suggest_path
from tools.paper.tables import Row, Table

# what is known before any run of a folder has trained: images/s of configs/photos64.yaml on one thread of a shared machine,
# and seconds of each measure on the demo's scenes on one thread (docs/howto/paper-tables.md)
KNOWN_CONFIG, KNOWN_SPEED = "configs/photos64.yaml", 110
KNOWN_MEASURES = {"knn": 6, "linear_seg": 12, "points": 8, "retrieval_seg": 35, "cluster_seg": 55}
OF_MEASURES = ("k", "temperature", "seg_epochs", "seg_lr", "ignore_classes")  # keys of `eval` that change figures


@dataclass
class Scale:
    """Where the tables are made: a base config, words over it, scenes."""

    name: str  # small, photos or paper
    config: str
    words: list[str]
    scenes: str | None  # to segment
    folder: Path  # of its runs
    base: Config


@dataclass
class Run:
    """A row with a seed: something to train and measure, or only to measure."""

    name: str
    row: Row
    folder: Path
    config_file: str = ""
    words: list[str] = field(default_factory=list)
    config: Config | None = None  # None: weights that are not trained here
    seed: int | None = None
    measures: list[str] = field(default_factory=list)  # of all its tables, those that the data allows
    steps: int = 0

    @property
    def network(self) -> str:
        """What is measured: the run's folder, or the row's weights."""
        return self.row.weights or str(self.folder)

    def trained_steps(self) -> int:
        weights = known_weights(self.folder) if self.config else None
        return int((weights or {}).get("step") or 0)

    def is_trained(self) -> bool:
        if self.config is None:
            return True
        return self.trained_steps() >= self.steps and (self.folder / "backbone.safetensors").is_file()

    def figures(self, scenes: str | None) -> dict[str, Any]:
        """The column of the run's measures.json that belongs to its weights and these scenes; {} if there is none."""
        results = read_object(self.folder / "measures.json")
        weights = known_weights(self.network)
        try:
            if results["settings"]["data"] == scenes and weights:
                columns = results["networks"].values()
                return next(c for c in columns if c["weights"] == weights and not c["untrained"])
        except (KeyError, TypeError, AttributeError, StopIteration):
            pass
        return {}

    def missing(self, scenes: str | None) -> list[str]:
        """The measures that have not been taken of its weights."""
        column = self.figures(scenes)
        return [measure for measure in self.measures if f"{measure}_seconds" not in column]

    def logged_steps(self) -> int:
        rows = read_metrics(self.folder) if self.config else []
        return int(rows[-1]["step"]) if rows else 0

    def train_seconds(self) -> float:
        """Seconds of the steps that were logged, without start, checkpoints and evaluations."""
        seconds, before = 0.0, 0
        for row in read_metrics(self.folder):
            if row.get("images_per_second") and self.config:
                images = (row["step"] - before) * self.config.optim.global_batch_size
                seconds += images / row["images_per_second"]
            before = int(row["step"])
        return seconds


@dataclass
class Selection:
    """The chosen tables, and the runs that their rows need."""

    tables: list[Table]  # with the chosen rows that the config's checks allow
    runs: list[Run]  # all first seeds, then all second seeds: a whole table is there early
    of_row: dict[tuple[str, str], list[Run]]  # (table, row): a run for each seed
    left_out: dict[str, list[str]]  # table: rows that the checks refuse, and why


# ------------------------------------------------------------------------------------------------------- from rows to runs


def select(
    tables: dict[str, Table], chosen: Sequence[str], scale: Scale, seeds: Sequence[int], rows: Sequence[str] = (),
    measures: Sequence[str] = (),
) -> Selection:  # fmt: skip
    """The runs of the chosen tables. rows: names of those to train, and their baselines; none: all. Other rows are
    shown if they have been measured before. measures: those to take; none: those of each table.

    Raises UserError for a row whose config is wrong, unless the row may be left out.
    """
    names: dict[str, str] = {}  # of a config, as text: the name of the first row that has it, in whatever table
    found = Selection([], [], {}, {name: [] for name in chosen})
    by_folder: dict[Path, Run] = {}
    for table in tables.values():
        wanted = {*rows, *(row.baseline for row in table.rows if row.name in rows)} if rows else None
        kept = []
        for row in table.rows:
            here = table.name in chosen
            needed = here and (wanted is None or row.name in wanted)
            try:
                config = None if row.weights else _config_of(row, scale)
            except UserError as error:
                if needed and not row.optional:
                    raise
                if needed:
                    found.left_out[table.name].append(f"{row.label}: {str(error).removeprefix(f'{COMMAND_LINE}: ')}")
                continue
            name = names.setdefault(dump_config(config) if config else f"weights {row.weights}", row.name)
            runs = [by_folder.get(run.folder, run) for run in _runs_of(row, name, config, scale, seeds)] if here else []
            if needed:
                by_folder |= {run.folder: run for run in runs}
                for run in runs:
                    run.measures += [m for m in measures or table.measures if m not in run.measures]
            if needed or any(run.figures(scale.scenes) for run in runs):
                kept.append(row)
                found.of_row[table.name, row.name] = runs
        if kept:
            found.tables.append(replace(table, rows=tuple(kept)))
    order = {seed: i for i, seed in enumerate([None, *seeds])}
    found.runs = sorted(by_folder.values(), key=lambda run: order[run.seed])
    return found


def _config_of(row: Row, scale: Scale) -> Config:
    config = load_config(row.config or scale.config, [*scale.words, *row.words])
    config.run.folder = None  # the name of the file, which is no part of a run
    return config


def _runs_of(row: Row, name: str, config: Config | None, scale: Scale, seeds: Sequence[int]) -> list[Run]:
    if config is None:
        return [Run(name, row, scale.folder / name)]
    runs = []
    for seed in seeds:
        own = copy.deepcopy(config)
        own.seed = seed
        words = [*scale.words, *row.words, f"seed={seed}"]
        runs.append(
            Run(f"{name}-{seed}", row, scale.folder / f"{name}-{seed}", row.config or scale.config, words, own, seed)
        )
    return runs


# ------------------------------------------------------------------------------------------ before anything is started


def check(runs: Sequence[Run], scale: Scale) -> list[str]:
    """Fills in each run's steps, and takes out the measures that the data does not allow; returns their names.

    Raises UserError if data or weights are missing, or if a folder holds something else than its run. Writes nothing.
    """
    opened: dict[str, tuple[Shards, dict[str, Any]]] = {}
    for run in runs:
        if run.config is None:
            if not run.network.startswith(TIMM) and not Path(run.network).exists():
                raise UserError(f"{run.network}: no such file or run{suggest_path(run.network)}")
            continue
        config, place = run.config, str(run.config.data.shards)
        first = place not in opened
        if first:
            shards = open_shards(place, config)
            opened[place] = shards, fingerprint(shards.manifest)
        shards, data = opened[place]
        holdout = 0.0 if config.data.val else config.data.holdout
        plan = Plan(shards, batch=config.optim.global_batch_size, seed=config.seed, holdout=holdout)
        run.steps = config.steps(plan.steps_per_epoch)
        if first:
            preflight.check_photos(config, shards, plan)
        preflight.check_writable(run.folder)
        preflight.check_weights(config.model.init, bool(run.trained_steps()))
        _check_same(run, data)
    if scale.scenes is not None:
        check_scenes(scale.scenes, palette_option=False)
        return []
    impossible = {measure for run in runs for measure in run.measures if measure not in ON_PHOTOS}
    for run in runs:
        run.measures = [measure for measure in run.measures if measure in ON_PHOTOS]
    return sorted(impossible)


def _check_same(run: Run, data: dict[str, Any]) -> None:
    """Raises UserError if the run's folder holds another run. data: fingerprint of the shards to train on."""
    assert run.config is not None
    changes: list[str] = []
    if (run.folder / "config.yaml").is_file():
        saved = load_config(run.folder / "config.yaml")
        changes += diff(saved, run.config).values()
        for key in OF_MEASURES:
            old, new = getattr(saved.eval, key), getattr(run.config.eval, key)
            changes += [f"eval.{key}: saved {old}, current {new}"] if old != new else []
    checkpoint = latest_valid(run.folder / "checkpoints")
    if checkpoint and checkpoint.data != data:
        changes.append(f"data.shards: it trained on {checkpoint.data['samples']:,} photos that are not today's")
    if changes:
        raise UserError(
            f"{run.folder} holds another run ({'; '.join(changes)}); to keep it, train these elsewhere: "
            f"`{again('--runs', 'another/folder')}`"
        )


# -------------------------------------------------------------------------------------------------------------- how long


class Estimate(NamedTuple):
    """Seconds of what is missing of each run, by its folder; None: nothing is known yet."""

    seconds: dict[Path, float] | None
    source: str


def estimate(runs: Sequence[Run], scale: Scale, on_gpu: bool) -> Estimate:
    """How long the runs will take, one at a time: by the runs of this folder that have trained, else by a known speed."""
    logged = [(run.config, run.logged_steps(), run.train_seconds()) for run in runs if run.config]
    done = [(config, steps, seconds) for config, steps, seconds in logged if seconds]
    if done:
        rate = sum(seconds for *_, seconds in done) / sum(steps * work(config) for config, steps, _ in done)
        source = f"by the steps of {len(done)} run{'s' if len(done) > 1 else ''} of {scale.folder}"
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
        left = max(0, run.steps - run.trained_steps()) * work(run.config) * rate if run.config else 0.0
        for key in (f"{measure}_seconds" for measure in run.missing(scale.scenes)):
            known = [column[key] for column in columns if key in column]
            left += fmean(known) if known else KNOWN_MEASURES.get(key.removesuffix("_seconds"), 60)
        seconds[run.folder] = left
    return Estimate(seconds, source)


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
