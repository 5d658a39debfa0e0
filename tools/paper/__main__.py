"""The paper's tables: train what is missing, measure it, and show the paper's figures beside ours.

    python -m tools.paper table1|table2|table3|figure5|locality|variants|continued|all [--scale small|paper] [--seeds N]
        [--dry-run] [--photos SHARDS VAL] [--voc FOLDER] [--rows NAME,...] [--weights ROW=FILE] [--measures NAME,...]
        [--jobs N] [--gpus N|all] [--runs FOLDER] [--out FOLDER] [a.b=c ...]

table1: methods (DINO, DenseDINO, Leopart, SwAV, MoCo-v2, DenseCL) and two controls. table2: view recipes. table3: loss
terms. figure5: reference points of a pair. locality: width of the Gaussian prior on what a reference token attends to, and
variants: other forms of that prior. continued: runs of DINO continued with reference tokens (none of the three is in the
paper). all: all but table1, variants and continued.

--scale small: the demo's network and painted scenes (configs/demo.yaml; other methods: configs/<method>_scenes.yaml), or
with --photos, but not for table1, that of configs/photos64.yaml on these shards. --scale paper: ViT-Ti/16 as in the paper
(configs/densedino_vitti16.yaml), for table1 ViT-S/16 (configs/<method>_vits16.yaml), on all GPUs of the machine.
--weights ROW=FILE: weights of others stand in this row, of a ViT or a ResNet-50.
Words a.b=c change every row. docs/howto/paper-tables.md has examples and hours.

Everything is kept in runs/paper/<scale>/<row>-<seed>; the same command resumes where it was stopped. Of each table the
files OUT/<table>-<scale>.json, .md and .png are written.
"""

import argparse
import contextlib
import json
import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.command import again
from runtime.cores import usable_cores
from runtime.errors import UserError, require_positive, run_cli, suggest
from tools.docstring import make_parser

if TYPE_CHECKING:
    from tools.paper.runs import Scale, Selection
    from tools.paper.tables import Row

ALL = ("table2", "table3", "figure5", "locality")  # what `all` means
TABLES = ("table1", *ALL, "variants", "continued")
TABLE1 = "configs/densedino_vits16.yaml"  # at the paper scale
CONFIGS = {"small": "configs/demo.yaml", "photos": "configs/photos64.yaml", "paper": "configs/densedino_vitti16.yaml"}
PHOTOS64 = ["eval.seg_lr=0.1"]  # as the demo's: the published rate is for features of a large network
SEEDS = {"small": 3, "photos": 3, "paper": 1}
CLUSTER_SEEDS = {"small": 2, "photos": 2, "paper": 5}
RUNS = Path("runs/paper")


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser("tools.paper", "tools.paper.__main__")
    parser.add_argument(
        "words",
        nargs="+",
        metavar="TABLE",
        help=f"{', '.join(TABLES)}; all: {', '.join(ALL)}; a.b=c: for every row",
    )
    parser.add_argument("--scale", default="small", help="small or paper (default: small)")
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N - 1 (default: 3; paper scale: 1)")
    parser.add_argument("--dry-run", action="store_true", help="print runs and hours, and train nothing")
    parser.add_argument("--photos", nargs=2, metavar=("SHARDS", "VAL"), help="photos to train on, and to classify")
    parser.add_argument("--voc", metavar="FOLDER", help="scenes to segment, in Pascal VOC's layout")
    parser.add_argument(
        "--rows", help="train these rows, their baselines and starts only; the tables show those that are there too"
    )
    parser.add_argument(
        "--weights", action="append", default=[], metavar="ROW=FILE", help="weights of others in this row; repeatable"
    )
    parser.add_argument("--measures", help="some of eval compare's (default: those of each table)")
    parser.add_argument(
        "--jobs", type=int, help="runs beside each other (default: 2 on a CPU at the small scale, else 1)"
    )
    parser.add_argument("--gpus", default="", help="GPUs of each run, or all (default: paper scale: all; small: 1)")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of the runs (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder of the tables (default: that of --runs)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_intermixed_args(argv)
    table = read_table(args.words)
    if args.scale not in ("small", "paper"):
        raise UserError(f"--scale {args.scale}: must be small or paper{suggest(args.scale, ('small', 'paper'))}")
    require_positive(args, "seeds", "jobs")
    measures = read_measures(args.measures)

    from tools.paper import runs
    from tools.paper.pages import check_writable
    from tools.paper.table1 import make_table1
    from tools.paper.tables import make_tables
    from tools.pretrain import count_devices, count_processes, has_cpu_torch

    devices = 0 if has_cpu_torch() else count_devices()
    gpus = args.gpus or ("all" if args.scale == "paper" and devices > 1 else "")
    processes = count_processes(gpus)
    scale = read_scale(args, table, processes)
    tables = make_tables(scale.base)
    if table == "table1":
        tables["table1"] = make_table1(scale.base, scale.name, scale.words)
    chosen = ALL if table == "all" else (table,)
    check_words(args, [row for name in chosen for row in tables[name].rows])
    known = [row.name for name in chosen for row in tables[name].rows]
    rows, weights = read_rows(args.rows, known), read_weights(args.weights, known)
    for name in chosen:
        own = [row.with_weights(weights[row.name]) if row.name in weights else row for row in tables[name].rows]
        tables[name] = replace(tables[name], rows=tuple(own))
    seeds = range(args.seeds or SEEDS[scale.name])
    selection = runs.select(tables, chosen, scale, seeds, rows, measures)
    out = args.out or args.runs
    runs.check_writable(scale.folder)
    check_writable(selection.tables, scale.name, out)
    for message in runs.check(selection.runs, scale):
        print(message)
    on_cpu = devices == 0 or scale.base.speed.device == "cpu"
    small_on_cpu = args.scale == "small" and on_cpu and usable_cores() > 1
    jobs = args.jobs or (2 if small_on_cpu else 1)
    print_plan(selection, scale, jobs, not on_cpu)
    if args.dry_run:
        return 0
    return start(selection, scale, jobs, gpus, out)


# ------------------------------------------------------------------------------------------------------- the command line


def read_table(words: Sequence[str]) -> str:
    """The word that names a table; the others are a.b=c. Raises UserError if there is none, or if there are several."""
    named, known = [word for word in words if "=" not in word], (*TABLES, "all")
    if len(named) != 1:
        raise UserError(f"{', '.join(named) or 'which table?'}: one table, or all: {', '.join(known)}")
    if named[0] not in known:
        raise UserError(f"{named[0]}: must be one of {', '.join(known)}{suggest(named[0], known)}")
    return named[0]


def read_measures(text: str | None) -> list[str]:
    """The names of --measures. Raises UserError for an unknown one."""
    from eval.target import MEASURES, require_choice

    return [require_choice("--measures", name, MEASURES) for name in text.split(",")] if text else []


def read_rows(text: str | None, known: Sequence[str]) -> list[str]:
    """The names of --rows. Raises UserError for one that no chosen table has."""
    found = text.split(",") if text else []
    for name in found:
        if name not in known:
            raise UserError(f"--rows {name}: must be among {', '.join(known)}{suggest(name, known)}")
    return found


def read_weights(words: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """{row: file} of --weights ROW=FILE. Raises UserError for another form, and for a row that no chosen table has."""
    found: dict[str, str] = {}
    for word in words:
        row, _, file = word.partition("=")
        if not file:
            raise UserError(f"--weights {word}: write it as ROW=FILE, as in swav=swav_800ep_pretrain.pth.tar")
        if row not in known:
            raise UserError(f"--weights {word}: the row must be among {', '.join(known)}{suggest(row, known)}")
        if row in found:
            raise UserError(f"--weights {word}: {row} has {found[row]} already")
        found[row] = file
    return found


def check_words(args: argparse.Namespace, rows: Sequence["Row"]) -> None:
    """Raises UserError for a word a.b=c that none of the rows follows. The rows' own views are made from data.views."""
    values = [[_pair(word) for word in row.words] for row in rows]
    for word in (word for word in args.words if "=" in word and not word.startswith("data.views=")):
        key, value = _pair(word)
        if all(key in dict(own) and (key, value) not in own for own in values):
            raise UserError(f"{word}: every row of the table has a {key} of its own, so this changes none")


def _pair(word: str) -> tuple[str, object]:
    """(key, value) of a.b=c; 2 and 2.0 are one value."""
    key, _, value = word.partition("=")
    with contextlib.suppress(ValueError):
        return key, float(value)
    return key, value


def read_scale(args: argparse.Namespace, table: str, processes: int) -> "Scale":
    """The base config and what it is trained and measured on. Raises UserError if something is missing."""
    from runtime.config import is_path, load_config, missing
    from tools.paper.runs import Scale

    name = "photos" if args.photos and args.scale == "small" else args.scale
    values = [word for word in args.words if "=" in word]
    refused = {
        "seed": "seeds are given as --seeds N",
        "run.folder": "see --runs FOLDER",
        "method": "each row has its method; to add a row: docs/howto/paper-tables.md",
    }
    refused |= dict.fromkeys(("data.shards", "data.val"), "--photos names them already") if args.photos else {}
    refused |= {"eval.voc": "--voc names them already"} if args.voc else {}
    for word in values:
        if reason := refused.get(word.partition("=")[0]):
            raise UserError(f"{word}: {reason}")
    if name == "photos" and table == "table1":
        raise UserError(
            "table1: at the small scale it is made on the painted scenes only; without --photos, or with --scale paper"
        )
    config = TABLE1 if (name, table) == ("paper", "table1") else CONFIGS[name]
    words = PHOTOS64[:] if name == "photos" else []
    if args.photos:
        places = zip(("data.shards", "data.val"), args.photos, strict=True)
        words += [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in places]
    elif name == "paper":
        raise UserError(
            "--scale paper: which photos? --photos SHARDS VAL, for example --photos /data/imagenet/train /data/imagenet/val"
        )
    if args.voc:
        if is_path(args.voc) and (problem := missing(args.voc)):
            raise UserError(f"--voc {args.voc}: {problem}")
        words.append(f"eval.voc={json.dumps(args.voc, ensure_ascii=False)}")
    words += values
    base = load_config(config, words, processes=processes)
    if isinstance(base.data.shards, list):
        raise UserError("data.shards: the paper's tables are made on one folder of shards, not on a mixture")
    scenes = os.path.abspath(base.eval.voc) if base.eval.voc else None
    return Scale(name, config, words, scenes, args.runs / name, base, processes)


# ---------------------------------------------------------------------------------------------------------- plan and run


def print_plan(selection: "Selection", scale: "Scale", jobs: int, on_gpu: bool) -> None:
    """What there is, what is missing, and how long it will take."""
    from tools.paper.hours import estimate

    seconds, source = estimate(selection.runs, scale, on_gpu)
    tables: dict[Path, list[str]] = {run.folder: [] for run in selection.runs}
    for (table, _), runs_of_row in selection.of_row.items():
        for run in runs_of_row:
            if run.folder in tables:  # rows measured before are shown, though not asked for
                tables[run.folder].append(table)
    states = {"finished": 0, "started": 0, "missing": 0}
    width = max(len(run.name) for run in selection.runs)
    print(f"runs in {scale.folder}:")
    for run in selection.runs:
        steps, missing = run.trained_steps(), run.missing(scale.scenes)
        if run.is_trained() and not missing:
            state, what = "finished", "finished"
        elif run.is_trained():
            state = "started" if run.config or run.figures(scale.scenes) else "missing"
            what = f"{'trained; ' if run.config else ''}to measure: {', '.join(missing)}"
        else:
            state = "started" if steps else "missing"
            what = f"started, step {steps:,} of {run.steps:,}" if steps else f"missing, {run.steps:,} steps"
            what += f" from {run.start.name}" if run.start else ""
        states[state] += 1
        left = f"{seconds[run.folder] / 60:6.1f} min" if seconds and state != "finished" else " " * 10
        print(f"  {run.name:{width}}  {left}  {what}  ({', '.join(dict.fromkeys(tables[run.folder]))})")
    for table, rows in selection.left_out.items():
        for row in rows:
            print(f"  left out of {table}: {row}")
    count = ", ".join(f"{n} {state}" for state, n in states.items())
    if seconds is None:
        print(f"{len(selection.runs)} runs: {count}; {source}")
    else:
        minutes = sum(seconds.values()) / jobs / 60
        time = f"{minutes / 60:.1f} hours" if minutes >= 60 else f"{minutes:.0f} min"
        print(f"{len(selection.runs)} runs: {count}; about {time}, {jobs} at a time, estimated {source}")


def start(selection: "Selection", scale: "Scale", jobs: int, gpus: str, out: Path) -> int:
    """Train and measure what is missing, then print and write the tables; returns the exit code."""
    from tools.paper import pages
    from tools.paper.jobs import run_all

    def write() -> None:
        for table in selection.tables:
            pages.write(pages.collect(table, selection, scale), out)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)  # of a job's end: the trainings save too
    try:
        failures = run_all(
            selection.runs, scale, jobs=jobs, gpus=gpus, cluster_seeds=CLUSTER_SEEDS[scale.name], finished=write
        )
    except KeyboardInterrupt:
        print(f"stopped; what was trained and measured is kept, the same command resumes: `{again()}`")
        return 130
    write()
    for table in selection.tables:
        pages.show(pages.collect(table, selection, scale))
        print(
            "written to " + ", ".join(str(file) for file in pages.names(table.name, scale.name, out) if file.exists())
        )
    for failure in failures:
        print(f"failed: {failure}")
    if failures:
        print(f"{len(failures)} of {len(selection.runs)} runs failed; when the cause is mended: `{again()}`")
    return 1 if failures else 0


if __name__ == "__main__":
    run_cli(main)
