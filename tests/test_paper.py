"""The paper's tables in one command: what each row trains, what is left to do, what the tables say."""

import json
import os
import signal
import time
from types import SimpleNamespace

import pytest
from conftest import run_program
from PIL import Image

from eval.tables import measure_of
from eval.target import MEASURES
from runtime import command
from runtime.command import again
from runtime.config import load_config
from runtime.errors import UserError
from tools.paper import hours, jobs, pages, runs
from tools.paper.__main__ import check_words, main, read_rows, read_weights
from tools.paper.tables import CLS, FIGURES, SEG, Row, Table, low_size, make_tables

TINY = [
    "data.val=null", "data.holdout=0.2", "eval.voc=null", "data.views.0.size=24", "optim.epochs=1",
    "optim.warmup_epochs=0.1",
    "optim.global_batch_size=16", "model.width=24", "model.depth=1", "head.hidden=32", "head.bottleneck=16",
    "head.prototypes=40", "speed.workers=0", "speed.device=cpu",
]  # fmt: skip


@pytest.fixture
def scale(tiny_shards, tmp_path):
    """The small scale on tiny photos, with a network that trains four steps."""
    words = [f"data.shards={tiny_shards}", *TINY]
    base = load_config("configs/demo.yaml", words)
    return runs.Scale("small", "configs/demo.yaml", words, None, tmp_path / "runs" / "small", base)


@pytest.fixture
def tables(scale):
    return make_tables(scale.base)


def paper(*words, scale, **options):
    """The program on tiny photos."""
    return run_program("-m", "tools.paper", *scale.words, *words, "--runs", scale.folder.parent, **options)


# --------------------------------------------------------------------------------------------------------------- tables


def views_of(row, config="configs/densedino_vitti16.yaml"):
    return [(g.count, g.size, g.scale, g.teacher) for g in load_config(config, row.words).data.views]


def test_the_rows_are_those_of_the_paper():
    tables = make_tables(load_config("configs/densedino_vitti16.yaml"))
    large, local = (0.4, 1.0), (0.05, 0.4)
    table2 = {row.name.removeprefix("densedino-"): views_of(row) for row in tables["table2"].rows[4:]}
    assert table2 == {
        "2-views": [(2, 224, large, True)],
        "2-global-4-local": [(2, 224, large, True), (4, 96, local, False)],
        "2-global-4-low": [(2, 224, large, True), (4, 96, large, False)],
        "6-views": [(2, 224, large, True), (4, 224, large, False)],
    }
    assert [row.paper for row in tables["table3"].rows] == [
        {CLS: 56.7, SEG: 46.4}, {CLS: 42.4, SEG: 55.9}, {CLS: 55.7, SEG: 57.4},
    ]  # fmt: skip
    alphas = [load_config("configs/densedino_vitti16.yaml", row.words).loss.alpha for row in tables["table3"].rows]
    assert alphas == [0.5, 0, 0.5]  # the first is method: dino
    points = [load_config("configs/densedino_vitti16.yaml", row.words).points for row in tables["figure5"].rows]
    assert points == [1, 2, 4, 8, 16, 32]
    sigmas = [load_config("configs/demo.yaml", row.words).reference.locality for row in tables["locality"].rows]
    assert sigmas == [None, None, 2, 1, 0.7, 0.5, 0.35]


def test_the_last_row_of_table_2_is_the_config_of_the_ablations():
    config = "configs/densedino_vitti16.yaml"
    row = make_tables(load_config(config))["table2"].rows[-1]
    assert load_config(config, row.words) == load_config(config)


def test_small_views_are_whole_patches():
    for config, size in (
        ("configs/demo.yaml", None),
        ("configs/photos64.yaml", 24),
        ("configs/densedino_vits16.yaml", 96),
    ):
        base = load_config(config)
        assert low_size(base) % base.model.patch == 0
        assert size is None or low_size(base) == size
        for table in make_tables(base).values():
            for row in table.rows:
                if not row.optional:
                    load_config(config, row.words)


def test_signs_are_those_of_the_papers_figures(tables):
    rows = {row.name: row for row in tables["table2"].rows}
    six = rows["densedino-6-views"]
    assert [six.sign(key, rows["dino-6-views"]) for key in (CLS, SEG, "knn_top1_patches")] == [-1, 1, 0]


# ----------------------------------------------------------------------------------------------------------------- runs


def test_rows_with_the_same_config_are_one_run(tables, scale):
    chosen = runs.select(tables, list(tables), scale, [0, 1])
    of_row = {key: [run.name for run in own] for key, own in chosen.of_row.items()}
    assert of_row["table3", "densedino-6-views"] == ["densedino-6-views-0", "densedino-6-views-1"]
    assert of_row["figure5", "densedino-6-views-m4"] == of_row["table3", "densedino-6-views"]
    assert of_row["locality", "densedino"] == of_row["table2", "densedino-2-views"]
    assert len({run.folder for run in chosen.runs}) == len(chosen.runs)
    assert [run.seed for run in chosen.runs] == sorted(run.seed for run in chosen.runs)
    alone = runs.select(tables, ["figure5"], scale, [0, 1])  # the same names, whatever is chosen
    assert of_row["figure5", "densedino-6-views-m4"] == [
        run.name for run in alone.of_row["figure5", "densedino-6-views-m4"]
    ]


def test_what_the_checks_refuse_is_left_out_with_the_reason(tables, scale):
    chosen = runs.select(tables, ["figure5"], scale, [0])
    assert "M = 32: reference.points: 32 make 160 reference tokens" in chosen.left_out["figure5"][-1]
    assert "M = 4" in [row.label for row in chosen.tables[0].rows]


def test_a_row_brings_its_baseline(tables, scale):
    chosen = runs.select(tables, ["locality"], scale, [0], ["densedino-sigma-1"])
    assert [run.name for run in chosen.runs] == ["densedino-2-views-0", "densedino-sigma-1-0"]
    with pytest.raises(UserError, match="did you mean 'densedino-sigma-1'"):
        read_rows("densedino-sigm-1", [row.name for row in tables["locality"].rows])


def test_a_row_whose_config_is_wrong_is_named_and_the_others_too(tables, scale, scenes):
    scale.words += ["data.min_overlap=0"]  # of DINO's rows only
    with pytest.raises(
        UserError, match=r"table3, row reference-loss-6-views: data\.min_overlap: must be .*--rows dino-6-views$"
    ):
        runs.select(tables, ["table3"], scale, [0])
    runs.select(tables, ["table3"], scale, [0], ["dino-6-views"])
    scale.words[-1:] = [f"eval.voc={scenes}", "eval.every.points=1"]  # a check of train.py's, of the other rows only
    with pytest.raises(UserError, match=r"row dino-6-views: eval\.every\.points: method: dino has no reference tokens"):
        runs.select(tables, ["table3"], scale, [0])


def test_words_that_no_row_follows():
    def check(table, word):
        rows = make_tables(load_config("configs/photos64.yaml", [*TINY, word, "data.shards=any"]))[table].rows
        check_words(SimpleNamespace(words=[table, word]), rows)

    for table, word in (("table2", "reference.locality=2"), ("figure5", "reference.points=3")):
        with pytest.raises(UserError, match=f"^{word}: every row of the table has"):
            check(table, word)
    for table, word in (
        ("table3", "optim.epochs=7"), ("table3", "loss.alpha=0.3"), ("figure5", "reference.points=8"),
        ("table2", "data.views.0.size=32"), ("variants", "reference.points=2"), ("continued", "reference.locality=2.0"),
    ):  # fmt: skip
        check(table, word)


def test_weights_name_a_row_and_a_file():
    assert read_weights(["swav=a=b.pth", "dino=runs/x"], ["dino", "swav"]) == {"swav": "a=b.pth", "dino": "runs/x"}
    for words, message in {
        ("swav",): "--weights swav: write it as ROW=FILE",
        ("swaw=a.pth",): "the row must be among dino, swav, did you mean 'swav'",
        ("swav=a.pth", "swav=b.pth"): "--weights swav=b.pth: swav has a.pth already",
    }.items():
        with pytest.raises(UserError, match=message):
            read_weights(words, ["dino", "swav"])


def test_a_known_speed_until_runs_have_trained(tables, scale):
    chosen = runs.select(tables, ["table2"], scale, [0])
    runs.check(chosen.runs, scale)
    first, others = chosen.runs[0], chosen.runs[1:]
    seconds, source = hours.estimate(chosen.runs, scale, on_gpu=False)
    assert seconds is not None
    assert "110 images/s of configs/photos64.yaml" in source
    assert seconds[others[-1].folder] > seconds[first.folder]  # more views, points
    assert hours.estimate(chosen.runs, scale, on_gpu=True).seconds is None
    first.folder.mkdir(parents=True)
    (first.folder / "metrics.jsonl").write_text(json.dumps({"step": 4, "images_per_second": 16 / 100}) + "\n")
    seconds, source = hours.estimate(chosen.runs, scale, on_gpu=False)
    assert seconds
    assert seconds[first.folder] == pytest.approx(100 * first.steps + hours.KNOWN_MEASURES["knn"])
    assert source == f"by the steps of 1 run of {scale.folder}"


def test_work_is_that_of_the_counted_arithmetic():
    from model.cost import count_cost

    base = load_config("configs/demo.yaml")
    for words in (["method=dino"], ["reference.points=16"]):
        config = load_config("configs/demo.yaml", words)
        counted = count_cost(config).flops / count_cost(base).flops
        assert hours.work(config) / hours.work(base) == pytest.approx(counted, rel=0.15)


def test_a_folder_of_another_run_is_refused(tables, scale):
    chosen = runs.select(tables, ["table3"], scale, [0])
    folder = chosen.runs[0].folder
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("optim: {epochs: 7, warmup_epochs: 1}\n")
    with pytest.raises(UserError, match=r"dino-6-views-0 holds another run \(.*optim.epochs: saved 7.0, current 1.0"):
        runs.check(chosen.runs, scale)


def test_what_cannot_be_measured_is_said_before_anything_is_trained(tables, scale):
    scale.words += ["data.holdout=0"]  # no photo is left to test on
    chosen = runs.select(tables, ["table3"], scale, [0])
    with pytest.raises(
        UserError, match=r"nothing can be measured: knn: .*data\.val=FOLDER.*; .*linear_seg.*see --voc FOLDER"
    ):
        runs.check(chosen.runs, scale)


@pytest.mark.parametrize(
    "other", [{"limit": 10}, {"size": 48}, {"bank": "other"}, {"val": "other"}, {"palette": "p.txt"}, {"data": "other"}]
)
def test_figures_of_another_protocol_are_not_the_tables(tables, scale, other, monkeypatch):
    """measures.json of a run folder is also what `eval compare` writes."""
    run = runs.select(tables, ["table3"], scale, [0]).runs[0]
    monkeypatch.setattr(runs, "known_weights", lambda _: {"step": 4})
    run.folder.mkdir(parents=True)
    settings = {"data": None, "bank": None, "val": None, "limit": None, "palette": None}
    column = {"path": str(run.folder), "untrained": False, "weights": {"step": 4}, CLS: 50.0}
    for more, figures in (({}, column), (other, {})):
        results = {"settings": settings | more, "networks": {run.name: column}}
        (run.folder / "measures.json").write_text(json.dumps(results))
        assert run.figures(None) == figures


# ---------------------------------------------------------------------------------------------------------------- pages


@pytest.fixture
def measured(scale, tmp_path, monkeypatch):
    """A table of two rows with two seeds each, measured: DINO 50 and 52, DenseDINO 56 and 53, mIoU."""
    rows = (
        Row("dino", "DINO", ("method=dino",), paper={SEG: 46.4}),
        Row("dense", "Dense", baseline="dino", paper={SEG: 57.4}, expected={"points_patch_small": 1}),
    )
    table = Table("table9", "Table 9", "A table.", rows)
    values = {"dino-0": (50, 20), "dino-1": (52, 20), "dense-0": (56, 19), "dense-1": (53, 22)}

    def figures(run, _):
        miou, small = values[run.name]
        return {SEG: miou, "points_patch_small": small, "linear_seg_seconds": 1.0, "weights": {"step": 4}}

    monkeypatch.setattr(runs.Run, "figures", figures)
    return table, runs.select({"table9": table}, ["table9"], scale, [0, 1], measures=["linear_seg"])


def test_figures_of_the_paper_beside_ours(measured, scale, tmp_path, capsys):
    results = pages.collect(*measured, scale)
    dense = results["rows"][1]
    assert dense["figures"][SEG] == {"mean": 54.5, "low": 53, "high": 56, "of": 2}
    difference = dict(dense["differences"][SEG])
    assert difference.pop("paper") == pytest.approx(11)
    assert difference == {"mean": 3.5, "low": 1, "high": 6, "of": 2, "expected": 1, "as_expected": True, "agreeing": 2}
    assert dense["differences"]["points_patch_small"] == {
        "mean": 0.5, "low": -1, "high": 2, "of": 2, "expected": 1, "as_expected": True, "agreeing": 1,
    }  # fmt: skip
    pages.write(results, tmp_path)
    assert json.loads((tmp_path / "table9-small.json").read_text()) == json.loads(json.dumps(results))
    page = (tmp_path / "table9-small.md").read_text()
    assert "| Dense | 57.4 | 54.5 (53.0 – 56.0) | +11.0 | +3.5 (+1.0 – +6.0) | + yes (2 of 2 seeds) |" in page
    assert Image.open(tmp_path / "table9-small.png").size[0] > 300
    pages.show(results)
    assert "+3.5 (+1.0 – +6.0)" in capsys.readouterr().out
    pages.check_writable([measured[0]], "small", tmp_path)  # its own files are replaced


def test_a_page_of_nothing_says_so(measured, scale, tmp_path, monkeypatch):
    monkeypatch.setattr(runs.Run, "figures", lambda *_: {})
    pages.write(pages.collect(*measured, scale), tmp_path)
    page = (tmp_path / "table9-small.md").read_text()
    assert "**Not complete**: nothing has been measured yet." in page
    assert ".png" not in page
    assert not (tmp_path / "table9-small.png").exists()


def test_every_measure_that_can_be_asked_for_is_shown():
    shown = {measure_of(key) for key in FIGURES}
    assert shown == {*MEASURES}


@pytest.mark.parametrize("ending", ["json", "md", "png"])
def test_other_peoples_files_are_not_replaced(ending, measured, tmp_path):
    (tmp_path / f"table9-small.{ending}").write_text("{}")
    with pytest.raises(UserError, match=f"table9-small.{ending}: this file was not written by"):
        pages.check_writable([measured[0]], "small", tmp_path)


# ----------------------------------------------------------------------------------------------------------- the program


def test_a_row_is_trained_and_measured_once(scale):
    """The real programs: train.py, eval compare; then nothing is left to do."""
    one = ("table2", "--rows", "dino-2-views", "--seeds", "1", "--jobs", "1")
    planned = paper(*one, "--dry-run", scale=scale).stdout
    assert "1 runs: 0 finished, 0 started, 1 missing" in planned
    assert "missing, 4 steps" in planned
    assert not scale.folder.exists()
    first = paper(*one, scale=scale).stdout
    assert "dino-2-views-0: 4 steps in" in first
    assert "written to" in first
    assert "cannot be measured (no scenes to segment, see --voc FOLDER)" in first
    run = scale.folder / "dino-2-views-0"
    before = {path: path.stat().st_mtime_ns for path in (run / "backbone.safetensors", run / "measures.json")}
    second = paper(*one, scale=scale).stdout
    assert "1 runs: 1 finished" in second
    assert "[1 of" not in second
    assert {path: path.stat().st_mtime_ns for path in before} == before
    refused = paper(*one, "optim.epochs=2", scale=scale, expect=2).stderr
    assert f"error: {run} holds another run (optim.epochs: saved 1.0, current 2.0)" in refused
    assert "`python -m tools.paper data.shards=" in refused
    assert "--runs another/folder`" in refused
    results = json.loads((scale.folder.parent / "table2-small.json").read_text())
    assert results["complete"]
    assert 0 <= results["rows"][0]["figures"][CLS]["mean"] <= 100


@pytest.fixture
def programs(tables, scale, monkeypatch):
    """The runs of a table, whose programs are some lines of Python instead."""

    def start(lines: str):
        chosen = runs.select(tables, ["table3"], scale, [0])
        monkeypatch.setattr(jobs.Job, "__init__", initialize(lines))
        return chosen.runs

    def initialize(lines):
        def init(self, run, *_):
            self.run, self.environment, self.process, self.doing = run, dict(os.environ), None, ""
            self.programs = jobs.deque([("training", ["-c", lines, run.name])])

        return init

    return start


def run_all(chosen, scale, count=2):
    return jobs.run_all(chosen, scale, jobs=count, gpus="", cluster_seeds=1, finished=lambda: None)


def test_a_run_that_fails_does_not_end_the_others(programs, scale, capsys):
    chosen = programs("import sys; sys.exit('error: no more photos' if 'reference' in sys.argv[1] else 0)")
    [failure] = run_all(chosen, scale)
    assert failure == (
        "reference-loss-6-views-0: training failed with exit code 1: error: no more photos "
        f"(see {scale.folder}/reference-loss-6-views-0/tables.log)"
    )
    assert "[3 of 3]" in capsys.readouterr().out


def test_a_stop_asks_the_programs_to_save_and_waits(programs, scale):
    lines = (
        "import signal, sys, time, pathlib\n"
        f"here = pathlib.Path({str(scale.folder)!r}, sys.argv[1])\n"
        "def save(*_):\n    time.sleep(.2); (here / 'saved').touch(); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save); (here / 'started').touch(); time.sleep(60)"
    )
    chosen = programs(lines)
    folders = [run.folder for run in chosen[:2]]

    def interrupt(*_):
        if all((folder / "started").exists() for folder in folders):
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_all(chosen, scale)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert all((folder / "saved").exists() for folder in folders)
    assert time.monotonic() - start < 30
    assert not (chosen[2].folder).exists()


def test_weights_that_someone_else_trained(scale, tiny_shards, tmp_path):
    """A row of weights is measured on the scale's photos, not trained."""
    rows = (Row("theirs", "Theirs", weights="timm:vit_tiny_patch16_224", paper={CLS: 70.0}),)
    chosen = runs.select({"table1": Table("table1", "Table 1", "", rows)}, ["table1"], scale, [0, 1], measures=["knn"])
    [run] = chosen.runs
    runs.check(chosen.runs, scale)
    assert run.folder == scale.folder / "theirs"
    assert run.is_trained()
    assert run.missing(None) == ["knn"]
    [(doing, words)] = jobs.Job(run, scale, "", 2, {}).programs
    assert doing == "measuring"
    assert words[3] == "timm:vit_tiny_patch16_224"
    assert words[words.index("--train") + 1] == str(tiny_shards)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["tabel2"],
            "tabel2: must be one of table1, table2, table3, figure5, locality, variants, continued, all, "
            "did you mean 'table2'?",
        ),
        (["table2", "table3"], "table2, table3: one table, or all"),
        (["all", "--scale", "large"], "--scale large: must be small or paper"),
        (["all", "--scale", "paper"], "--scale paper: which photos? --photos SHARDS VAL"),
        (["table1", "--photos", "a", "b"], "table1: at the small scale it is made on the painted scenes only"),
        (["all", "--seeds", "0"], "--seeds 0: must be more than 0"),
        (["all", "--measures", "kn"], "--measures kn: must be one of"),
        (["all", "seed=3"], "seed=3: seeds are given as --seeds N"),
        (["all", "method=dino"], "method=dino: each row has its method"),
        (["all", "--voc", "no/scenes"], "--voc no/scenes: no such folder"),
        (["all", "--photos", "a", "b", "data.val=c"], "data.val=c: --photos names them already"),
        (["all", "--voc", "tests", "eval.voc=c"], "eval.voc=c: --voc names them already"),
    ],
)
def test_wrong_words(words, message):
    with pytest.raises(UserError) as error:
        main(words)
    assert str(error.value).startswith(message)


def test_the_command_to_go_on(monkeypatch):
    """Of make, as the user typed it."""
    for name in command.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("STARTED_BY", "make tables")
    given = {"TABLE": "table2", "SEEDS": "2", "CONFIG": "configs/demo.yaml", "RUN": "runs/demo", "ARGS": ""}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert again() == "make tables TABLE=table2 SEEDS=2"
    assert again("--runs", "x") == "make tables TABLE=table2 SEEDS=2 ARGS='--runs x'"
