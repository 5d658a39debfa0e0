"""Many processes: 8 as threads with torch's threaded process group (`make bench WHAT=ranks` has 512). They have the order of
one process, resume at one step, stop at one vote, and agree on which is the slowest; one of all reads a checkpoint."""

import numpy as np
import pytest
import torch
from conftest import run_program

from runtime.distributed import DistributedContext
from runtime.errors import RunError
from runtime.metric_sums import Interval
from runtime.metrics import read_jsonl
from runtime.watchdog import Watchdog
from tools.bench.plan import simulate
from tools.bench.ranks import Rank, check_ranks, simulate_ranks


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated")
    simulate(folder, 24_000)
    return folder


def test_eight_ranks_are_one_run(data):
    all_ranks = simulate_ranks(data, ranks=8, per_node=4, steps=3)
    check_ranks(all_ranks, data)
    assert [rank.opened is all_ranks[4].opened for rank in all_ranks] == [
        i == 4 for i in range(8)
    ]  # each maps the index
    all_ranks[3].ids[1] = np.roll(all_ranks[3].ids[1], 1)
    with pytest.raises(AssertionError, match="not the order of one process"):
        check_ranks(all_ranks, data)


def test_ranks_that_are_dealt_to_machines_in_turn_are_refused(data, monkeypatch):
    """As some launchers do: then the first process of a machine is not LOCAL_RANK before a rank."""

    def dealt(self, *words):
        original(self, *words)
        self.context.local_rank = self.context.rank // 2

    original = Rank.__init__
    monkeypatch.setattr(Rank, "__init__", dealt)
    with pytest.raises(RunError, match="the processes of a machine need consecutive ranks, as torchrun gives them"):
        simulate_ranks(data, ranks=4, per_node=2, steps=1)


def row(waits: list[float], forwards: list[float]) -> dict[str, float]:
    interval = Interval(5, 1.0, {}, 0, 0, False, 0, waits, forwards)
    return interval.row(16, 0.1, DistributedContext(0, len(waits), torch.device("cpu"), torch.float32), None)


def test_the_slowest_rank_is_that_with_the_most_time_of_its_own():
    found = row([0.1, 0.0, 0.1, 0.0], [0.1, 0.4, 0.2, 0.1])
    assert (found["slowest_rank"], found["slowest_rank_percent"]) == (1, pytest.approx(100))  # 0.4 beside 0.2
    found = row([0.3, 0.0], [0.1, 0.1])
    assert (found["slowest_rank"], found["slowest_rank_percent"]) == (0, pytest.approx(300))
    assert "slowest_rank" not in row([0.0, 0.0], [0.0, 0.0])  # the first row: nothing was counted
    assert "slowest_rank" not in row([0.3], [0.1])


def test_the_watchdog_names_the_machine_if_there_are_several(monkeypatch):
    """By what processes publish: here process 1 is gone, 2 lives, 3 has never come."""
    store = torch.distributed.HashStore()
    watchdog = object.__new__(Watchdog)
    watchdog._rank, watchdog._world_size, watchdog._store, watchdog._where = 0, 4, store, "in step 7"
    for rank, (where, host) in enumerate([("in step 7", " on a"), ("in step 6", " on b"), ("in step 7", " on b")]):
        store.set(str(rank), f"1|{where}|{host}")
    ticks = iter(range(2, 9))
    monkeypatch.setattr("runtime.watchdog.time.sleep", lambda _: store.set("2", f"{next(ticks)}|in step 7| on b"))
    assert watchdog.unresponsive_ranks() == (
        "process 1 on b is silent or gone, last heard of in step 6; "
        "process 3 is silent or gone, last heard of before the first step"
    )
    store.set("3", "1|in step 5| on c")  # all have come: one request for all
    assert watchdog._elsewhere() == "process 1 on b is in step 6; process 3 on c is in step 5"


@pytest.mark.slow
def test_one_process_reads_a_checkpoint(tmp_path):
    """Four processes as two machines: process 0 reads the file once, where each of them read it before."""
    out = tmp_path / "rows.jsonl"
    words = ["--gigabytes", "0.05", "--ranks", "4", "--per-node", "2", "--dst", tmp_path, "--out", out]
    run_program("-m", "tools.bench", "resume", *words)
    each, main = read_jsonl(out)
    assert each["asked_gb"] >= 4 * each["gigabytes"]
    assert main["asked_gb"] < 1.1 * main["gigabytes"]
    assert main["fetched_gb"] < 1.1 * main["gigabytes"]
