"""How long training waits for measures beside it: steps with the measuring process and steps without, in turns in one run.

    python -m tools.bench online [--config FILE] [--shards FOLDER] [--voc FOLDER] [--rounds 20] [--steps 10] [--out FILE]

The process measures k-NN, the point probe and linear segmentation again and again, which is more than any `eval.every` asks
for. In one half of every round it is stopped by a signal. The price is how much longer the steps of the other half take, by
the clock and in the CPU time of the training process, median of the rounds; one copy of the weights is timed by itself.
Other load on the machine slows both halves, and the measuring process most of all: the load is printed, and which share of
a core the process had, which is the most that it can have taken from training.
"""

import argparse
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from eval.online import NAMES, Online
from model.methods import build
from pipeline.loader import Loader
from pipeline.mixture import open_training
from pipeline.plan import Plan
from runtime import distributed, schedule
from runtime.checkpoint import HostCopies
from runtime.config import dump_run_config, load_config, shards_word
from tools.bench.rows import cpu_name, make_table, median_and_range, report_rows
from train import train_step


class Log:
    """What the measures are written to."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def write_measured(self, step: int, values: dict[str, float]) -> None:
        self.rows.append(values)

    def log(self, message: str) -> None:
        print(message, flush=True)


def cpu_seconds(pid: int) -> float:
    """Of a process so far (Linux)."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def run(args: argparse.Namespace) -> None:
    every = "eval.every={" + ", ".join(f"{name}: 1" for name in NAMES) + "}"
    config = load_config(args.config, [shards_word(args.shards), "data.val=null", f"eval.voc={args.voc}", every])
    shards = open_training(config)
    plan = Plan(shards, batch=config.optim.global_batch_size, seed=0, holdout=config.data.holdout)
    context = distributed.start(config.speed)
    method = build(config)
    context.to_device(method)
    schedules = schedule.make_schedules(config, plan.steps_per_epoch)
    optimizer = schedule.Optimizer(method.student, config.optim.clip_grad, split_positions=method.clip_positions_apart)
    log: Any = Log()
    shares: list[float] = []  # of a core that the process had
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.yaml").write_text(dump_run_config(config))
        online = Online(Path(folder), config, shards, plan, 0)

        def measure(step: int) -> None:
            """Copy the weights, if the last ones are measured."""
            online.deliver(log)
            if not online.left():
                online.start(step, [*NAMES], method.backbone, log)

        measure(0)
        loader = Loader(
            config, shards, plan, device=context.device, dtype=context.dtype, start=0, stop=2 * args.rounds * args.steps + 5
        )  # fmt: skip

        def times(steps: int, measuring: bool) -> tuple[float, float]:
            """Seconds of one step: by the clock, and of CPU."""
            while not online.process:
                time.sleep(0.01)
            os.kill(online.process.pid, signal.SIGCONT if measuring else signal.SIGSTOP)
            start, own, worked = time.perf_counter(), time.process_time(), cpu_seconds(online.process.pid)
            for _ in range(steps):
                batch = next(loader)
                train_step(batch, method, method, optimizer, schedules.at(0), context)
                if measuring:
                    measure(batch.step)
            took = time.perf_counter() - start
            if measuring:
                shares.append(100 * (cpu_seconds(online.process.pid) - worked) / took)
            return took / steps, (time.process_time() - own) / steps

        times(5, measuring=True)
        halves = [[times(args.steps, which) for which in order] for order in _orders(args.rounds)]
        loader.close()
        online.close()
        copy, copies = HostCopies(), list[float]()
        for _ in range(11):  # the first takes new memory
            start = time.perf_counter()
            copy({name: t.detach() for name, t in method.backbone.state_dict().items()})
            copies.append(1000 * (time.perf_counter() - start))
    with_it, without = ([half[order.index(which)] for half, order in zip(halves, _orders(args.rounds), strict=True)]
                        for which in (True, False))  # fmt: skip
    row: dict[str, Any] = {"what": "online", "config": args.config, "device": cpu_name()}
    row |= median_and_range("ms_a_step", [1000 * wall for wall, _ in without])
    row |= median_and_range("ms_while_measuring", [1000 * wall for wall, _ in with_it])
    for i, name in enumerate(("price_percent", "cpu_price_percent")):
        row |= median_and_range(name, [100 * (a[i] / b[i] - 1) for a, b in zip(with_it, without, strict=True)])
    row |= {"ms_a_copy": round(statistics.median(copies[1:]), 2), "core_percent": round(statistics.mean(shares), 1)}
    row |= {"measured": len(log.rows), "load": round(os.getloadavg()[0], 1)}
    names = (
        "ms_a_step",
        "ms_while_measuring",
        "price_percent",
        "cpu_price_percent",
        "ms_a_copy",
        "core_percent",
        "measured",
        "load",
    )
    table = make_table(f"{args.config}, {row['device']}: steps with and without the measuring process", names)
    table.add_row(*(f"{row[name]:.4g}" for name in names))
    report_rows(table, [row], args.out)


def _orders(rounds: int) -> list[list[bool]]:
    """Of each round, whether the first and the second half measure: turn by turn."""
    return [[True, False] if n % 2 else [False, True] for n in range(rounds)]
