"""Training and measuring runs, some beside each other, each step as a program of its own.

`tools.pretrain` starts train.py, or torchrun for several GPUs; `eval compare --skip-existing` measures. Both resume by
themselves, so a stop at any moment loses little: a training saves a checkpoint when it is asked to stop.
"""

import os
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from tools.paper.runs import Run, Scale

LOG = "tables.log"  # of a run: what its programs print
TICK = 0.2  # seconds between two looks at the programs
PROGRESS = 60  # seconds between two lines of progress
TRAINING = "training"  # what the first program of a run does
PATIENCE = 60  # seconds that a program has to end after it was asked to; a training saves within run.grace, 25


class Job:
    """The programs that a run still needs, one after the other."""

    def __init__(self, run: Run, scale: Scale, gpus: str, cluster_seeds: int, environment: dict[str, str]):
        self.run, self.environment = run, environment
        self.programs: deque[tuple[str, list[str]]] = deque()
        if not run.is_trained():
            words = ["--run", str(run.folder), "--gpus", gpus, run.config_file, *run.words]
            self.programs.append((TRAINING, ["-m", "tools.pretrain", *words]))
        if run.missing(scale.scenes):
            words = [run.network, "--measures", ",".join(run.measures), "--seeds", str(cluster_seeds)]
            words += ["--skip-existing", "--out", str(run.folder)]
            words += ["--data", scale.scenes] if scale.scenes else []
            words.append("--only-untrained" if run.row.untrained else "--only-trained")
            for option, photos in zip(("--train", "--val"), run.photos, strict=True):
                words += [option, photos] if photos else []
            self.programs.append(("measuring", ["-m", "eval", "compare", *words]))
        self.process: subprocess.Popen | None = None
        self.doing = ""

    @property
    def log(self) -> Path:
        return self.run.folder / LOG

    def start_next(self) -> None:
        """Start the next program; it writes to the run's log."""
        self.doing, words = self.programs.popleft()
        self.run.folder.mkdir(parents=True, exist_ok=True)
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(f"$ {shlex.join(['python', *words])}\n")
            log.flush()
            command = [sys.executable, *words]
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=self.environment
            )

    def explain(self) -> str:
        """Why its program failed: the last message of its log."""
        assert self.process is not None
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if "error: " in line.lower()] or lines
        return f"{self.doing} failed with exit code {self.process.returncode}: {errors[-1].strip()} (see {self.log})"


def run_all(
    runs: Sequence[Run], scale: Scale, *, jobs: int, gpus: str, cluster_seeds: int, finished: Callable[[], None]
) -> list[str]:
    """Train and measure what is missing; returns a message for each run that failed. A run that starts from another waits
    until that one is trained.

    jobs: runs beside each other. gpus: processes of each training, as GPUS of make. cluster_seeds: as `eval compare
    --seeds`. finished: called after each run that is complete. When it is interrupted, every program is asked to stop and
    waited for.
    """
    environment = {name: value for name, value in os.environ.items() if name != "STARTED_BY"}
    if jobs > 1:  # with a thread each, two trainings on two cores get more done than one with two threads
        environment.setdefault("OMP_NUM_THREADS", "1")
    waiting = deque(Job(run, scale, gpus, cluster_seeds, environment) for run in runs)
    waiting = deque(job for job in waiting if job.programs)
    total, started = len(waiting), 0
    active: list[Job] = []
    failures: list[str] = []
    failed: list[Run] = []  # whose weights there are not
    shown = time.monotonic()
    try:
        while waiting or active:
            for job in [job for job in waiting if job.run.start in failed]:
                assert job.run.start is not None
                failed.append(job.run)
                failures.append(f"{job.run.name}: not started, because {job.run.start.name} failed")
                waiting.remove(job)
            for job in list(islice((job for job in waiting if _can_start(job, active)), jobs - len(active))):
                started += 1
                waiting.remove(job)
                active.append(job)
                job.start_next()
                print(f"[{started} of {total}] {job.run.name}: {job.doing}; its output: {job.log}", flush=True)
            time.sleep(TICK)
            for job in [job for job in active if job.process and job.process.poll() is not None]:
                assert job.process is not None
                if job.process.returncode:
                    if job.doing == TRAINING:
                        failed.append(job.run)
                    failures.append(f"{job.run.name}: {job.explain()}")
                    print(failures[-1], flush=True)
                elif job.programs:
                    job.start_next()
                    continue
                else:
                    print(f"{job.run.name}: {describe(job.run, scale)}", flush=True)
                    finished()
                active.remove(job)
            if time.monotonic() - shown > PROGRESS:
                shown = time.monotonic()
                print("; ".join(_progress(job) for job in active), flush=True)
    finally:
        stop([job.process for job in active if job.process])
    return failures


def _can_start(job: Job, active: Sequence[Job]) -> bool:
    """Whether the run that it starts from, if any, is trained."""
    start = job.run.start
    return start is None or (
        start.is_trained() and not any(other.run is start and other.doing == TRAINING for other in active)
    )


def describe(run: Run, scale: Scale) -> str:
    """The figures of a finished run, in a line."""
    column, seconds = run.figures(scale.scenes), run.train_seconds()
    shown = {"k-NN": "knn_top1", "mIoU": "linear_seg_miou", "small things": "points_patch_small"}
    figures = [f"{name} {column[key]:.1f}" for name, key in shown.items() if key in column]
    trained = [f"{run.steps:,} steps in {seconds / 60:.1f} min"] if seconds else []
    return ", ".join([*trained, *figures])


def _progress(job: Job) -> str:
    of = f", step {job.run.logged_steps():,} of {job.run.steps:,}" if job.doing == TRAINING else ""
    return f"{job.run.name}: {job.doing}{of}"


def stop(processes: Sequence[subprocess.Popen]) -> None:
    """Ask programs to end, and wait until they have. Ctrl-C in a terminal has reached them already."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.terminate()
    for process in running:
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
