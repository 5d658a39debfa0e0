"""Table 1: rows that start from the weights of other rows, weights of others in a row, and what the rows train."""

# ruff: noqa: F811 - fixtures of another file
import json

import pytest

from runtime.config import load_config
from runtime.errors import UserError
from tests.runs import write_run
from tests.test_paper import programs, run_all, scale, tables  # noqa: F401 - fixtures
from tools.paper import hours, jobs, pages, runs
from tools.paper.table1 import make_table1
from tools.paper.tables import CLS, SEG, Row, Table


@pytest.fixture
def dependent(scale):
    """A table whose second row starts from the first, and whose third is the first's network before training."""
    rows = (
        Row("dino", "DINO", ("method=dino",)),
        Row("tuned", "tuned", ("method=dino",), start="dino", baseline="dino"),
        Row("untrained", "untrained", start="dino", untrained=True, optional=True, baseline="dino"),
    )
    return Table("table9", "Table 9", "A table.", rows, measures=("knn",))


def test_a_row_starts_from_another_seed_by_seed(dependent, scale):
    chosen = runs.select({"table9": dependent}, ["table9"], scale, [0, 1], ["tuned"])
    assert [run.name for run in chosen.runs] == ["dino-0", "tuned-0", "dino-1", "tuned-1"]
    runs.check(chosen.runs, scale)  # the weights need not exist yet
    dino, tuned = chosen.runs[2:]
    assert tuned.start is dino
    assert tuned.config.model.init == str(scale.folder / "dino-1" / "backbone.safetensors")
    [(doing, words), _] = jobs.Job(tuned, scale, "", 2, {}).programs
    assert doing == "training"
    assert f'model.init="{tuned.config.model.init}"' in words


def test_an_untrained_network_is_measured_in_a_folder_of_its_own(dependent, scale):
    chosen = runs.select({"table9": dependent}, ["table9"], scale, [0])
    dino, _, untrained = chosen.runs
    assert (untrained.folder, untrained.network) == (scale.folder / "untrained-0", str(dino.folder))
    [(doing, words)] = jobs.Job(untrained, scale, "", 2, {}).programs
    assert doing == "measuring"
    assert words[3] == str(dino.folder)
    assert "--only-untrained" in words
    assert "--train" not in words
    write_run(dino.folder, scale.base.data.shards)
    columns = {"dino-0, untrained": {"path": str(dino.folder), "untrained": True, "weights": {}, "knn_seconds": 1.0}}
    untrained.folder.mkdir()
    (untrained.folder / "measures.json").write_text(json.dumps({"settings": {"data": None}, "networks": columns}))
    assert untrained.missing(None) == []
    assert pages.collect(chosen.tables[0], chosen, scale)["rows"][2]["runs"][0]["steps"] == 0


def test_weights_of_others_stand_in_a_row(dependent, scale, tmp_path):
    """What starts from the row starts from them, whatever the seed; their network before training is not known."""
    weights = tmp_path / "theirs.pth"
    weights.touch()
    rows = (dependent.rows[0].with_weights(str(weights)), *dependent.rows[1:])
    chosen = runs.select({"table9": Table("table9", "", "", rows)}, ["table9"], scale, [0, 1])
    assert [run.name for run in chosen.runs] == ["dino", "tuned-0", "tuned-1"]
    assert [run.config.model.init for run in chosen.runs[1:]] == [str(weights)] * 2
    assert rows[0].label == "DINO: theirs.pth"
    assert chosen.left_out["table9"] == [
        "untrained: dino is weights of others, whose network before training is not known"
    ]
    runs.check(chosen.runs, scale)
    weights.unlink()
    with pytest.raises(UserError, match=r"theirs\.pth: no such file or run"):
        runs.check(chosen.runs, scale)
    weights.mkdir()
    with pytest.raises(UserError, match=r"theirs\.pth: neither a run nor a folder of checkpoints"):
        runs.check(chosen.runs, scale)


def test_hours_are_those_of_the_same_method(dependent, scale):
    rows = (*dependent.rows[:1], Row("dense", "Dense"))
    chosen = runs.select({"table9": Table("table9", "", "", rows, measures=())}, ["table9"], scale, [0, 1])
    runs.check(chosen.runs, scale)
    for run, speed in zip(chosen.runs[:2], (0.5, 0.1), strict=True):
        run.folder.mkdir(parents=True)
        (run.folder / "metrics.jsonl").write_text(json.dumps({"step": 4, "images_per_second": 16 * speed}) + "\n")
    seconds, _ = hours.estimate(chosen.runs, scale, on_gpu=False)
    left = {run.name: seconds[run.folder] / run.steps for run in chosen.runs}
    assert left == pytest.approx({"dino-0": 2, "dense-0": 10, "dino-1": 2, "dense-1": 10})


def test_a_run_waits_for_the_one_that_it_starts_from(dependent, scale, programs, monkeypatch):
    """Programs that note the order in which they end; the first takes a while, and one fails."""
    rows = (*dependent.rows, Row("other", "other", ("seed=3",)), Row("after", "after", start="other"))
    order = scale.folder.parent / "order"
    lines = (
        "import sys, time, pathlib\nname = sys.argv[1]\ntime.sleep(.4 * (name == 'dino-0'))\n"
        f"open({str(order)!r}, 'a').write(name + ' ')\npathlib.Path({str(scale.folder)!r}, name, 'done').touch()\n"
        "sys.exit('error: no more photos' if name == 'other-0' else 0)"
    )
    programs(lines)
    monkeypatch.setattr(runs.Run, "is_trained", lambda run: (run.folder / "done").exists())
    chosen = runs.select({"table9": Table("table9", "", "", rows, measures=())}, ["table9"], scale, [0])
    failures = run_all(chosen.runs, scale, count=3)
    ended = order.read_text().split()
    assert set(ended) == {"other-0", "dino-0", "tuned-0", "untrained-0"}
    assert ended.index("dino-0") < min(ended.index("tuned-0"), ended.index("untrained-0"))
    assert failures[1] == "after-0: not started, because other-0 failed"
    assert len(failures) == 2


METHODS = ("leopart", "swav", "mocov2", "densecl")


@pytest.mark.parametrize(("name", "config"), [("small", "demo"), ("paper", "densedino_vits16")])
def test_table_1_has_every_method_on_the_same_images(name, config):
    base = load_config(f"configs/{config}.yaml")
    table = make_table1(base, name, ())
    configs = {row.name: load_config(row.config or f"configs/{config}.yaml", row.words) for row in table.rows[:-1]}
    assert [configs[method].method for method in METHODS] == [*METHODS]
    assert (configs["dino"].method, configs["densedino"].method) == ("dino", "densedino")
    images = {name: c.optim.epochs for name, c in configs.items() if name not in ("leopart", "dino-longer")}
    assert set(images.values()) == {base.optim.epochs}
    assert configs["dino-longer"].optim.epochs == base.optim.epochs + configs["leopart"].optim.epochs
    assert [(row.name, row.start) for row in table.rows if row.start] == [("leopart", "dino"), ("untrained", "dino")]
    dino = table.row("dino")
    signs = {row.name: (row.sign(CLS, dino), row.sign(SEG, dino)) for row in table.rows[1:3]}
    assert signs == {"densedino": (-1, 1), "leopart": (-1, 1)}
