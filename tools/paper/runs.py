"""The runs of the tables: what each is, and what of it is there already.

A run is a row's config with a seed, in a folder of its own; rows whose configs are the same share it. A run may start from
the weights of another run of the same seed, which is trained before it. Imports no torch.
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from eval import preflight
from eval.compare import ON_PHOTOS
from eval.html import read_metrics
from eval.masks import check_scenes
from eval.provenance import known_weights, weights_of
from eval.tables import read_object
from pipeline.mixture import AnyShards, open_training
from pipeline.plan import Plan
from runtime.checkpoint import identify, latest_valid, same_data
from runtime.command import again
from runtime.config import TIMM, Config, diff, dump_config, load_config
from runtime.config.messages import COMMAND_LINE
from runtime.errors import UserError, suggest_path
from runtime.files import refusal
from tools.paper.tables import Row, Table

BACKBONE = "backbone.safetensors"  # of a run folder: what a finished run has learned
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
    processes: int = 1  # of each training


@dataclass
class Run:
    """A row with a seed: something to train and measure, or only to measure."""

    name: str
    row: Row
    folder: Path
    config_file: str = ""
    words: list[str] = field(default_factory=list)
    config: Config | None = None  # None: nothing is trained, only measured
    seed: int | None = None
    start: "Run | None" = None  # from whose weights it is trained, or whose network before training it is
    measures: list[str] = field(default_factory=list)  # of all its tables, those that the data allows
    photos: tuple[str | None, str | None] = (None, None)  # that it is measured on, (train, val); None: its own
    steps: int = 0

    @property
    def network(self) -> str:
        """What is measured: the run's folder, or the row's weights."""
        of = self.start if self.row.untrained and self.start else self
        return of.row.weights or str(of.folder)

    @property
    def weights(self) -> str:
        """What a run that starts from this one loads: the backbone that is evaluated."""
        return self.row.weights or str(self.folder / BACKBONE)

    def trained_steps(self) -> int:
        weights = known_weights(self.folder) if self.config else None
        return int((weights or {}).get("step") or 0)

    def is_trained(self) -> bool:
        if self.config is None:
            return True
        return self.trained_steps() >= self.steps and (self.folder / BACKBONE).is_file()

    def figures(self, scenes: str | None) -> dict[str, Any]:
        """The column of the run's measures.json that belongs to its weights, these scenes and the tables' protocols; {}
        if there is none."""
        results = read_object(self.folder / "measures.json")
        weights = known_weights(self.network)
        own = {"data": scenes, "bank": self.photos[0], "val": self.photos[1]}
        own |= dict.fromkeys(("limit", "size", "palette"))  # a part of the photos, another size
        try:
            if all(results["settings"].get(name) == value for name, value in own.items()) and weights:
                columns = [c for c in results["networks"].values() if c["untrained"] == self.row.untrained]
                if self.row.untrained:  # the hash of its weights is in no file
                    return next(c for c in columns if c["path"] == str(Path(self.network)))
                return next(c for c in columns if c["weights"] == weights)
        except (KeyError, TypeError, AttributeError, StopIteration):
            pass
        return {}

    def missing(self, scenes: str | None) -> list[str]:
        """The measures that have not been taken of its weights, though they can be."""
        column = self.figures(scenes)
        impossible = column.get("skipped", {})
        return [m for m in self.measures if f"{m}_seconds" not in column and m not in impossible]

    def logged_steps(self) -> int:
        rows = read_metrics(self.folder) if self.config else []
        return int(rows[-1]["step"]) if rows else 0

    def train_seconds(self) -> float:
        """Seconds of the steps that were logged, without start, checkpoints and evaluations."""
        seconds, before = 0.0, 0
        for row in read_metrics(self.folder):
            if row.get("images_per_second") and self.config:  # a row of measures alone has none
                images = (row["step"] - before) * self.config.optim.global_batch_size
                seconds += images / row["images_per_second"]
                before = int(row["step"])
        return seconds


@dataclass
class Selection:
    """The chosen tables, and the runs that their rows need."""

    tables: list[Table]  # with the chosen rows that the config's checks allow, and the chosen measures beside their own
    runs: list[Run]  # all first seeds, then all second seeds: a whole table is there early
    of_row: dict[tuple[str, str], list[Run]]  # (table, row): a run for each seed
    left_out: dict[str, list[str]]  # table: rows that the checks refuse, and why


# ------------------------------------------------------------------------------------------------------- from rows to runs


def select(
    tables: dict[str, Table], chosen: Sequence[str], scale: Scale, seeds: Sequence[int], rows: Sequence[str] = (),
    measures: Sequence[str] = (),
) -> Selection:  # fmt: skip
    """The runs of the chosen tables. rows: names of those to train, with their baselines and starts; none: all. Other rows
    are shown if they have been measured before. measures: those to take; none: those of each table.

    Raises UserError for a row whose config is wrong, unless the row may be left out.
    """
    names: dict[str, str] = {}  # of a config, as text: the name of the first row that has it, in whatever table
    found = Selection([], [], {}, {name: [] for name in chosen})
    by_folder: dict[Path, Run] = {}
    for table in tables.values():
        wanted = _with_others(table, rows) if rows else None
        kept = []
        runs_of: dict[str | None, list[Run]] = {None: []}  # of the rows so far
        for row in table.rows:
            here = table.name in chosen
            needed = here and (wanted is None or row.name in wanted)
            try:
                config = _config_of(row, table, scale)
            except UserError as error:
                reason = str(error).removeprefix(f"{COMMAND_LINE}: ")
                if needed and not row.optional:
                    raise UserError(f"{table.name}, row {row.name}: {reason}{_others(table, rows, scale)}") from None
                if needed:
                    found.left_out[table.name].append(f"{row.label}: {reason}")
                continue
            what = f"weights {row.weights}" if row.weights else f"{row.start} untrained"
            name = names.setdefault(dump_config(config) if config else what, row.name)
            made = _runs_of(row, name, config, scale, seeds, runs_of.get(row.start, [])) if here else []
            runs = runs_of[row.name] = [by_folder.get(run.folder, run) for run in made]
            if needed:
                by_folder |= {run.folder: run for run in runs}
                for run in runs:
                    run.measures += [m for m in measures or table.measures if m not in run.measures]
            if needed or any(run.figures(scale.scenes) for run in runs):
                kept.append(row)
                found.of_row[table.name, row.name] = runs
        if kept:
            found.tables.append(replace(table, rows=tuple(kept), measures=(*table.measures, *measures)))
    order = {seed: i for i, seed in enumerate([None, *seeds])}
    found.runs = sorted(by_folder.values(), key=lambda run: order[run.seed])
    return found


def _others(table: Table, rows: Sequence[str], scale: Scale) -> str:
    """The end of a message on a row whose config is wrong: rows that can be made without it."""
    wrong = set()
    for row in table.rows:
        try:
            _config_of(row, table, scale)
        except UserError:
            wrong.add(row.name)
    sound = [row.name for row in table.rows if not wrong & _with_others(table, [row.name])]
    sound = [name for name in sound if not rows or name in rows]
    return f"; the others: --rows {','.join(sound)}" if sound else ""


def _with_others(table: Table, names: Sequence[str]) -> set[str | None]:
    """The named rows of a table, with the rows that they are compared with or start from."""
    found: set[str | None] = set(names)
    for row in reversed(table.rows):  # a start is above its row
        if row.name in found:
            found |= {row.baseline, row.start}
    return found


def _config_of(row: Row, table: Table, scale: Scale) -> Config | None:
    """The config of a row; None if nothing is trained. Raises UserError if it is wrong."""
    if row.untrained and row.start and table.row(row.start).weights:
        raise UserError(f"{row.start} is weights of others, whose network before training is not known")
    if row.weights or row.untrained:
        return None
    start = [f"model.init={row.start}"] if row.start else []  # its name: the seed's own file is not known yet
    words = [*scale.words, *row.words, *start]
    config = load_config(row.config or scale.config, words, processes=scale.processes)
    config.run.folder = None  # the name of the file, which is no part of a run
    return config


def _runs_of(
    row: Row, name: str, config: Config | None, scale: Scale, seeds: Sequence[int], starts: Sequence[Run]
) -> list[Run]:
    """A run for each seed; one in all for weights. starts: those of the row's `start`, one for each seed, or one for all."""
    if row.untrained:
        return [Run(f"{name}-{s.seed}", row, scale.folder / f"{name}-{s.seed}", seed=s.seed, start=s) for s in starts]
    if config is None:  # weights know no photos
        data = scale.base.data
        return [Run(name, row, scale.folder / name, photos=(str(data.shards), data.val))]
    runs = []
    for i, seed in enumerate(seeds):
        own, start = copy.deepcopy(config), starts[i % len(starts)] if starts else None
        own.seed = seed
        words = [*scale.words, *row.words, f"seed={seed}"]
        if start:
            own.model.init = start.weights
            words.append(f"model.init={json.dumps(start.weights, ensure_ascii=False)}")
        file = row.config or scale.config
        runs.append(Run(f"{name}-{seed}", row, scale.folder / f"{name}-{seed}", file, words, own, seed, start=start))
    return runs


# ------------------------------------------------------------------------------------------ before anything is started


def check(runs: Sequence[Run], scale: Scale) -> list[str]:
    """Fills in each run's steps, and takes out the measures that the data does not allow; returns messages on them.

    Raises UserError if data or weights are missing, if nothing can be measured, or if a folder holds something else than its
    run. Writes nothing.
    """
    opened: dict[str, tuple[AnyShards, dict[str, Any]]] = {}
    no_photos = ""
    for run in runs:
        if run.row.untrained:
            continue
        if run.config is None:
            if not run.network.startswith(TIMM) and not Path(run.network).exists():
                raise UserError(f"{run.network}: no such file or run{suggest_path(run.network)}")
            weights_of(run.network)  # raises for a folder that holds none
            continue
        config, place = run.config, str(run.config.data.shards)
        first = place not in opened
        if first:
            shards = open_training(config)
            opened[place] = shards, identify(shards)
        shards, data = opened[place]
        holdout = 0.0 if config.data.val else config.data.holdout
        plan = Plan(shards, batch=config.optim.global_batch_size, seed=config.seed, holdout=holdout)
        run.steps = config.steps(plan.steps_per_epoch)
        if first:
            no_photos = preflight.why_no_knn(config, shards, plan)
        preflight.check_writable(run.folder)
        if run.start is None or run.start.config is None:  # else the weights are made before they are needed
            preflight.check_weights(config.model.init, bool(run.trained_steps()))
        _check_same(run, data)
    if scale.scenes is not None:
        check_scenes(scale.scenes, palette_option=False)
    no_scenes = "no scenes to segment, see --voc FOLDER" if scale.scenes is None else ""
    messages = []
    for reason, on_photos in ((no_photos, True), (no_scenes, False)):
        lost = {m: None for run in runs for m in run.measures if reason and (m in ON_PHOTOS) == on_photos}
        for run in runs:
            run.measures = [m for m in run.measures if m not in lost]
        messages += [f"{', '.join(lost)}: cannot be measured ({reason})"] if lost else []
    if messages and not any(run.measures for run in runs):
        raise UserError(f"nothing can be measured: {'; '.join(messages)}")
    return messages


def check_writable(folder: Path) -> None:
    """Raises UserError if the runs' folder cannot be written to."""
    if reason := refusal(folder):
        raise UserError(f"--runs {folder.parent}: nothing can be written there ({reason})")


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
    if checkpoint and not same_data(checkpoint.data, data):
        changes.append(f"data.shards: it trained on {checkpoint.data['samples']:,} photos that are not today's")
    if changes:
        raise UserError(
            f"{run.folder} holds another run ({'; '.join(changes)}); to keep it, train these elsewhere: "
            f"`{again('--runs', 'another/folder')}`"
        )
