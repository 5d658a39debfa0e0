"""F14: the same twice, whatever the machine: threads, workers, prefetch, clock and time zone change no bit; processes and
accumulation change no sample, window, point or color, and no loss beyond rounding; another seed changes all."""

import pytest

from runtime.metrics import read_jsonl
from tests.conftest import write_config
from tests.faults.program import Program, equal, final, has_dali, hurt, log

pytestmark = pytest.mark.fault("F14")

WORDS = ("optim.epochs=2", "optim.warmup_epochs=0")  # 10 steps
DRAWN = """
    with open(os.environ["DRAWN"] + str(rank), "a") as file:
        for i, sample in enumerate(batch.ids.tolist()):
            what = [batch.windows[i].tolist(), batch.view_points[i].tolist(), batch.color[i].tolist()]
            print(json.dumps({"step": step, "sample": sample, "drawn": what}), file=file)
"""
CLOCK = """
import datetime
yesterday = time.time
time.time = lambda: yesterday() - 30 * 365 * 86400
time.tzset()
"""


@pytest.fixture(scope="module")
def same(tiny_shards, tmp_path_factory):
    """(config, the run it is compared with: its log and state)"""
    folder = tmp_path_factory.mktemp("same")
    config = write_config(folder / "tiny.yaml", tiny_shards, folder / "run")
    return config, run(config, folder / "first")


def run(config, folder, *words, **options):
    code, _, err = Program(config, *WORDS, f"run.folder={folder}", *words, **options).end()
    assert code == 0, err
    return log(folder), final(folder)


def is_same(a, b) -> bool:
    return a[0] == b[0] and equal(a[1], b[1])


def test_twice(same, tmp_path):
    config, first = same
    assert is_same(run(config, tmp_path / "again"), first)


def test_threads(same, tmp_path):
    """Of DALI, the one reader that has some."""
    if not has_dali():
        pytest.skip("DALI is not installed here")
    config, _ = same
    one = run(config, tmp_path / "one", "speed.reader=dali", "speed.dali_threads=1", "speed.workers=1")
    assert is_same(run(config, tmp_path / "three", "speed.reader=dali", "speed.dali_threads=3", "speed.workers=1"), one)


def test_workers(same, tmp_path):
    config, first = same
    for workers in (1, 3):
        assert is_same(run(config, tmp_path / str(workers), f"speed.workers={workers}"), first)


def test_prefetch(same, tmp_path):
    config, first = same
    for ahead in (1, 5):
        assert is_same(run(config, tmp_path / str(ahead), "speed.workers=2", f"speed.prefetch={ahead}"), first)


@pytest.mark.parametrize("how", ["processes", "accumulation"])
def test_processes_and_accumulation(same, tmp_path, monkeypatch, how):
    """Keyed by (seed, epoch, sample): the draws are equal whichever process or piece of a step holds the sample."""
    config, _ = same
    words = ["model.drop_path=0", "speed.precision=float64"]
    other = (
        {"options": {"processes": 2}, "words": []}
        if how == "processes"
        else {"options": {}, "words": ["speed.grad_accum_steps=2"]}
    )

    def drawn(name, *extra, **options):
        monkeypatch.setenv("DRAWN", str(tmp_path / f"{name}-drawn-"))
        losses = run(config, tmp_path / name, *words, *extra, script=hurt(tmp_path, DRAWN.strip()), **options)[0][
            "losses"
        ]
        told = [row for path in tmp_path.glob(f"{name}-drawn-*") for row in read_jsonl(path)]
        return losses, {(row["step"], row["sample"]): row["drawn"] for row in told}

    losses, draws = drawn("one")
    their_losses, their_draws = drawn("other", *other["words"], **other["options"])
    assert len(draws) == 10 * 16
    assert their_draws == draws
    for ours, theirs in zip(losses, their_losses, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-9)


def test_clock_and_time_zone(same, tmp_path, monkeypatch):
    config, first = same
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    assert is_same(run(config, tmp_path / "back", script=hurt(tmp_path, before=CLOCK)), first)


def test_another_seed_is_another_run(same, tmp_path):
    config, first = same
    told, state = run(config, tmp_path / "other", "seed=1")
    assert told["samples.jsonl"] != first[0]["samples.jsonl"]
    assert told["losses"] != first[0]["losses"]
    assert not equal(state, first[1])
