"""F14: reproducibility. Threads, workers, prefetch, clock and time zone change no bit; processes and gradient accumulation
change no sample, window, point or color, and the loss only by rounding; another seed changes everything."""

import pytest

from runtime.metrics import read_jsonl
from tests.conftest import write_config
from tests.faults.program import Program, equal, final, has_dali, log, with_fault

pytestmark = pytest.mark.fault("F14")

WORDS = ("optim.epochs=2", "optim.warmup_epochs=0")  # 10 steps
DRAWN = """
    with open(os.environ["DRAWN"] + str(rank), "a") as file:
        for i, sample in enumerate(batch.ids.tolist()):
            draws = [batch.windows[i].tolist(), batch.view_points[i].tolist(), batch.color[i].tolist()]
            print(json.dumps({"step": step, "sample": sample, "draws": draws}), file=file)
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
    """Of DALI, the only reader that has decoder threads."""
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


@pytest.mark.parametrize("split", ["processes", "accumulation"])
def test_processes_and_accumulation(same, tmp_path, monkeypatch, split):
    """Draws are keyed by (seed, epoch, sample): they do not depend on the process or piece of a step that has the sample."""
    config, _ = same
    words = ["model.drop_path=0", "speed.precision=float64"]
    other = (
        {"options": {"processes": 2}, "words": []}
        if split == "processes"
        else {"options": {}, "words": ["speed.grad_accum_steps=2"]}
    )

    def drawn(name, *extra, **options):
        monkeypatch.setenv("DRAWN", str(tmp_path / f"{name}-drawn-"))
        losses = run(config, tmp_path / name, *words, *extra, script=with_fault(tmp_path, DRAWN.strip()), **options)[0][
            "losses"
        ]
        rows = [row for path in tmp_path.glob(f"{name}-drawn-*") for row in read_jsonl(path)]
        return losses, {(row["step"], row["sample"]): row["draws"] for row in rows}

    losses, draws = drawn("one")
    their_losses, their_draws = drawn("other", *other["words"], **other["options"])
    assert len(draws) == 10 * 16
    assert their_draws == draws
    for ours, theirs in zip(losses, their_losses, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-9)


def test_clock_and_time_zone(same, tmp_path, monkeypatch):
    config, first = same
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    assert is_same(run(config, tmp_path / "back", script=with_fault(tmp_path, setup=CLOCK)), first)


def test_another_seed_is_another_run(same, tmp_path):
    config, first = same
    logged, state = run(config, tmp_path / "other", "seed=1")
    assert logged["samples.jsonl"] != first[0]["samples.jsonl"]
    assert logged["losses"] != first[0]["losses"]
    assert not equal(state, first[1])
