"""Measures while training: which are due, what they measure, and the process that takes them beside the steps."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, run_processes, run_program

from eval import online as online_module
from eval.datasets import voc_splits
from eval.knn import photo_knn
from eval.linear_seg import Protocol, fit
from eval.online import Online
from eval.online_process import Measures
from eval.points import measure
from eval.preflight import check_photos
from model.vit import ViT
from pipeline.plan import Plan
from pipeline.shards import Shards
from runtime.checkpoint import read_tensors
from runtime.config import load_config
from runtime.errors import UserError
from runtime.metrics import read_jsonl
from tests.test_eval_knn import home  # noqa: F401 - a fixture

ANSWER = 'print(json.dumps({"metrics": {"knn_top1": float(Path(job["file"]).name[:8])}, "messages": []}), flush=True)'


@pytest.fixture
def network():
    torch.manual_seed(0)
    return ViT(width=24, depth=1, heads=2, patch=8, image_size=24)


@pytest.fixture
def make_config(home, tmp_path):  # noqa: F811
    """The config of a run on photos of three colors, a fifth held out; takes changes."""
    path = tmp_path / "colors.yaml"
    path.write_text(
        f"data: {{shards: {home / 'shards'}, holdout: 0.2, views: [{{count: 2, size: 24, teacher: true}}]}}\n"
        "model: {arch: custom, width: 24, depth: 1, heads: 2, patch: 8}\noptim: {global_batch_size: 8}\n"
        "eval: {every: 0.5, k: 5, seg_epochs: 2}\n"
    )
    return lambda *changes: load_config(path, changes)


@pytest.fixture
def make_online(make_config, tmp_path):
    """Makes an Online of this run; takes changes of the config."""
    made = []

    def make(*changes: str, start: int = 0) -> Online:
        config = make_config(*changes)
        shards = Shards(config.data.shards)
        holdout = 0.0 if config.data.val else config.data.holdout
        made.append(Online(tmp_path / "run", config, shards, Plan(shards, batch=8, seed=0, holdout=holdout), start))
        return made[-1]

    yield make
    for online in made:
        online.close()


class Log:
    """What a RunLog is given."""

    def __init__(self):
        self.rows, self.lines = {}, []

    def write_measured(self, step, values):
        self.rows[step] = values

    def log(self, message):
        self.lines.append(message)


@pytest.fixture
def log():
    return Log()


@pytest.fixture
def program(monkeypatch, tmp_path):
    """Puts a script in the place of the measuring process: it gets a job, and the folder `tmp`."""

    def put(on_job: str) -> None:
        script = tmp_path / "measuring.py"
        script.write_text(
            f"import json, os, sys, time\nfrom pathlib import Path\ntmp = Path({str(tmp_path)!r})\n"
            f"for line in sys.stdin:\n    job = json.loads(line)\n    {on_job}\n    {ANSWER}\n"
        )
        monkeypatch.setattr(Online, "program", [sys.executable, str(script)])

    return put


NOT_STOPPED = SimpleNamespace(received=False)


def wait_for(holds) -> None:
    until = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------------------------- when


def test_each_measure_is_due_every_so_many_epochs(make_online, scenes):
    due = make_online().due
    assert [done for done in range(1, 20) if due(done)] == [4, 8, 12, 16]  # 9 steps an epoch, half of one
    voc = f"eval.voc={scenes}"
    assert make_online(voc).due(4) == ["knn", "points"]  # as a number says it
    assert make_online(voc, "method=dino").due(4) == ["knn"]
    every = make_online(voc, "eval.every={knn: 0.5, points: 0, linear_seg: 1}").due
    assert {done: every(done) for done in range(1, 20) if every(done)} == {
        4: ["knn"], 8: ["knn"], 9: ["linear_seg"], 12: ["knn"], 16: ["knn"], 18: ["linear_seg"],
    }  # fmt: skip
    never = make_online("eval.every=0")  # and that is not reported as skipped
    assert (never.every, never.notes) == ({}, [])


def test_what_a_number_means_and_cannot_be_is_skipped_what_is_named_is_refused(make_online, make_config, home):  # noqa: F811
    unlabeled, none_held_out = f"data.shards={home / 'unlabeled'}", "data.holdout=0"
    for change, why in ((unlabeled, "has no classes"), (none_held_out, "all photos are trained on")):
        online = make_online(change)
        assert why in online.notes[0]
        assert not any(online.due(done) for done in range(1, 20))
        config = make_config(change, "eval.every={knn: 1}")
        shards = Shards(config.data.shards)
        with pytest.raises(UserError, match=rf"^eval\.every\.knn: no k-NN is possible: .*{why}"):
            check_photos(config, shards, Plan(shards, batch=8, seed=0, holdout=config.data.holdout))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("eval.every=-1",), "eval.every: expected a number, 0 or more, or a mapping, found -1"),
        (("eval.every={kn: 1}",), "eval.every.kn: no such key, did you mean 'eval.every.knn'?"),
        (("eval.every={seg: 1}",), "eval.every.seg: no such key, did you mean 'eval.every.linear_seg'?"),
        (("eval.every={points: -1}",), "eval.every.points: expected a number, 0 or more, found -1"),
        (
            ("eval.every.knn=1",),
            "eval.every.knn: 'eval.every' is 0.5, it has no 'knn'; 'eval.every={knn: …}' replaces it",
        ),
        (("eval.limit=0",), "eval.limit: expected a whole number above 0, found 0"),
    ],
)
def test_wrong_settings_are_refused(make_config, words, message):
    with pytest.raises(UserError) as refused:
        make_config(*words)
    assert str(refused.value) == f"command line: {message}"


def test_measures_without_data_are_refused(make_config, tmp_path, scenes):
    def refused(*words: str) -> str:
        with pytest.raises(UserError) as error:
            load_config(tmp_path / "colors.yaml", words, processes=1)
        return str(error.value)

    assert "eval.every.linear_seg: needs scenes: eval.voc=FOLDER" in refused("eval.every={linear_seg: 1}")
    words = ("eval.every={points: 1}", f"eval.voc={scenes}", "method=dino")
    assert "eval.every.points: method: dino has no reference tokens" in refused(*words)


# ------------------------------------------------------------------------------------------------------------- what


def test_what_is_measured_is_what_the_evaluations_measure(make_config, network, home, scenes):  # noqa: F811
    config = make_config(f"eval.voc={scenes}")
    measures = Measures(config, threads=1)
    train, val = measures.photos
    assert (len(train), len(val)) == (72, 18)
    assert not set(train.ids) & set(val.ids)
    network.eval()
    metrics, messages = measures(network, ["knn", "points", "linear_seg"])
    assert messages == []
    assert (
        metrics.pop("knn_top1") == photo_knn(network, train, val, k=5)["cls"][0] > 90
    )  # three colors: chance is a third
    splits = voc_splits(scenes, 24)
    protocol = Protocol(24, 12, augment=False, epochs=2)
    assert metrics.pop("linear_seg_miou") == fit(network, *splits, protocol)[-1].miou
    score = measure(network, *splits)
    assert metrics == {f"points_{kind}_{on}": score.knn[on][kind] for on in score.knn for kind in score.knn[on]}


def test_a_limit_holds_for_both_sets(make_config, home):  # noqa: F811
    train, val = Measures(make_config("eval.limit=9", f"data.val={home / 'val'}"), threads=1).photos
    assert (len(train), len(val)) == (9, 9)
    assert set(train.shards.index["label"][train.ids]) == {0, 1, 2}
    assert val.shards.folder == home / "val"


def test_a_measure_that_fails_leaves_the_others(make_config, network, tmp_path, monkeypatch):
    monkeypatch.setattr(Shards, "is_valid", lambda *_: False)
    config = make_config(f"eval.voc={tmp_path / 'gone'}")
    config.eval.ignore_classes = []
    metrics, messages = Measures(config, threads=1)(network.eval(), ["knn", "points"])
    assert metrics == {}
    assert messages[0].startswith("knn: ")
    assert messages[0].endswith("none of the 18 photos is readable and has a known class")
    assert messages[1].startswith(f"points: {tmp_path / 'gone'}")


# ---------------------------------------------------------------------------------------------- beside the steps


def test_the_newest_weights_take_the_place_of_those_that_wait(make_online, network, log, program):
    program("while not (tmp / 'free').exists(): time.sleep(0.01)")
    online = make_online()
    online.start(4, ["knn"], network, log)
    wait_for(lambda: online.left() == "step 4" and not online._waiting)
    online.start(8, ["linear_seg"], network, log)
    wait_for(lambda: online.left() == "step 4 and step 8")
    online.start(12, ["knn"], network, log)
    assert online.left() == "step 4 and step 12"
    names = sorted(file.name for file in online.folder.iterdir())
    assert names == ["00000004-knn.safetensors", "00000012-knn-linear_seg.safetensors"]  # the measures of both
    online.deliver(log)
    assert log.rows == {}  # no step has waited
    (online.run.parent / "free").touch()
    assert online.finish(log, NOT_STOPPED)
    assert [*log.rows] == [4, 12]
    assert len(log.lines) == 2  # that step 8 is replaced, and the end
    online.close()
    assert not online.folder.exists()


def test_weights_are_those_of_their_step(make_online, network, log, program):
    """The copy is made before the next step changes them."""
    program("while True: time.sleep(1)")
    online, before = make_online(), {name: t.clone() for name, t in network.state_dict().items()}
    online.start(4, ["knn"], network, log)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(1)
    assert online.left() == "step 4"
    written = read_tensors(online.folder / "00000004-knn.safetensors")
    assert written.keys() == before.keys()
    assert all(torch.equal(written[name], t) for name, t in before.items())


def test_a_process_that_dies_is_one_line(make_online, network, log, program):
    """And the next weights are measured by a new one."""
    program("if '04-' in job['file']: sys.exit('no space on the moon')")
    online = make_online()
    online.start(4, ["knn"], network, log)
    wait_for(lambda: online.left() == "")
    online.after_step(5, network, log)
    failed = "a measure of step 4 failed, and training does not need it: the measuring process ended with code 1"
    assert log.lines == [f"warning: {failed}: no space on the moon"]
    online.start(8, ["knn"], network, log)
    assert online.finish(log, NOT_STOPPED)
    assert [*log.rows] == [8]


def test_what_was_not_measured_is_measured_by_the_next_start(make_online, network, log, program):
    program("while True: time.sleep(1)")
    online = make_online("eval.every={knn: 0.5, linear_seg: 0.5}", "eval.voc=x")
    for step, measures in ((4, ["knn"]), (8, ["linear_seg"])):
        online.start(step, measures, network, log)
    assert not online.finish(log, SimpleNamespace(received=True))  # a stop signal: it does not wait
    online.close()
    assert len([*online.folder.iterdir()]) == 2
    (online.folder / ".00000008-knn.safetensors.tmp").touch()  # of a process that was killed
    later = online.folder / "00000012-knn.safetensors"
    later.touch()
    program("pass")
    resumed = make_online(start=8)  # step 12 is made again; linear_seg is not wanted any more
    assert resumed.finish(log, NOT_STOPPED)
    assert [*log.rows] == [4]
    assert not any(online.folder.iterdir())


def test_a_process_without_a_core_of_its_own_is_started_again_when_training_ends(
    make_online, network, log, program, monkeypatch
):
    program("while sys.argv[3] == 'yields': time.sleep(1)")
    monkeypatch.setattr(online_module, "free_cores", lambda config: 0)
    online = make_online()
    online.start(4, ["knn"], network, log)
    assert online.finish(log, NOT_STOPPED)
    assert [*log.rows] == [4]


def test_the_process_ends_with_the_run(tmp_path):
    """However that ends: here by kill -9."""
    child = "import os, time; from runtime.child import end_with_parent; end_with_parent(os.getppid()); print(1, flush=True)"
    parent = (
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child + '; time.sleep(100)'!r}], "
        "stdout=subprocess.PIPE); p.stdout.readline(); print(p.pid, flush=True); p.wait()"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.close()

    def ended() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    wait_for(ended)


# ----------------------------------------------------------------------------------------------------------- a run


def samples_and_weights(run: Path) -> tuple[list, dict[str, torch.Tensor]]:
    return read_jsonl(run / "samples.jsonl"), read_tensors(run / "backbone.safetensors")


def assert_same(a: tuple, b: tuple) -> None:
    assert a[0] == b[0]
    assert all(torch.equal(a[1][name], t) for name, t in b[1].items())


def measured(run: Path) -> dict[int, dict[str, float]]:
    rows = [row for row in read_jsonl(run / "metrics.jsonl") if "loss" not in row]
    return {row.pop("step"): row for row in rows}


WORDS = ("run.log_samples=true", "optim.epochs=4", "model.drop_path=0.1", "eval.seg_epochs=1")
EVERY = "eval.every={knn: 2, points: 4, linear_seg: 4}"


def test_a_run_with_measures_is_the_run_without(tiny_config, tmp_path, scenes):
    run, without = tmp_path / "with", tmp_path / "without"
    run_program("train.py", tiny_config, *WORDS, f"run.folder={without}")
    stdout = run_program("train.py", tiny_config, *WORDS, EVERY, f"eval.voc={scenes}", f"run.folder={run}").stdout
    assert_same(samples_and_weights(run), samples_and_weights(without))
    rows = measured(run)
    assert [*rows] == [10, 20]
    assert rows[10].keys() == {"epoch", "knn_top1"}
    assert {"knn_top1", "points_cls_small", "linear_seg_miou"} < rows[20].keys()
    assert f"measured at step 10 · k-NN {rows[10]['knn_top1']:.1f} %\n" in stdout
    assert not (run / "measuring").exists()


@pytest.mark.slow
def test_two_processes_measure_the_same(tiny_config, tmp_path):
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        run_processes("train.py", tiny_config, "eval.every=2", f"run.folder={folder}", processes=processes)
    assert [*measured(tmp_path / "1")] == [*measured(tmp_path / "2")] == [10, 20]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_while_it_measures(tiny_config, tmp_path, scenes, number):
    """The next start measures what was not measured, and trains the same."""
    run, without = tmp_path / "run", tmp_path / "without"
    words = [*WORDS, "optim.epochs=40", f"eval.voc={scenes}"]
    run_program("train.py", tiny_config, *words, f"run.folder={without}")
    command = [
        sys.executable,
        "train.py",
        str(tiny_config),
        *words,
        "eval.every={knn: 2, points: 2}",
        f"run.folder={run}",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: any((run / "measuring").glob("*.safetensors")))
    os.kill(process.pid, number)
    stdout, _ = process.communicate()
    left = {int(file.name[:8]) for file in (run / "measuring").glob("*.safetensors")}
    if number == signal.SIGTERM:
        assert process.returncode == 143
        assert "the same command resumes from there, and measures step " in stdout
        assert left
    resumed = run_program(*command[1:]).stdout
    assert "resumed at step" in resumed or number == signal.SIGKILL
    assert "finished: 200 steps" in resumed
    assert_same(samples_and_weights(run), samples_and_weights(without))
    steps = [*measured(run)]
    assert len(steps) == len({*steps})  # none twice
    assert 200 in steps
    if "resumed at step" in resumed:
        start = int(resumed.partition("resumed at step ")[2].split()[0])
        assert {step for step in left if step <= start} <= {*steps}
    assert not (run / "measuring").exists()
    assert json.loads((run / "versions.jsonl").read_text().splitlines()[-1])["step"] >= 0
