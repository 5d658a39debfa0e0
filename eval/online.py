"""While training: measures of the evaluated network that no step waits for.

At a due step process 0 copies its weights to host memory, which is all that the step waits for. A thread writes
them to RUN/measuring/, and another process (online_process.py) measures them there: on the CPU, at the lowest priority.
Nothing else of the run takes part, so a run trains the same with and without it, and no other process of it waits.

A file in RUN/measuring/ is weights that are still to be measured. After a stop, or a kill, the next start measures them.
Imports no torch until the first copy.
"""

import json
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar

from eval.preflight import why_no_knn
from pipeline.mixture import AnyShards
from pipeline.plan import Plan
from runtime.config import Config
from runtime.cores import usable_cores
from runtime.errors import UserError

if TYPE_CHECKING:
    from model.vit import ViT
    from runtime.run_log import RunLog
    from runtime.watchdog import StopSignal

FOLDER = "measuring"  # of a run
NAMES = ("knn", "points", "linear_seg")  # as online_process.py has them
MAX_THREADS = 16  # of the measuring process
POLL = 0.1  # seconds between two looks at it, at the end of a run


@dataclass(frozen=True)
class Job:
    """Weights to be measured. file: of the backbone after `step` steps."""

    step: int
    measures: tuple[str, ...]
    file: Path

    @staticmethod
    def of(folder: Path, step: int, measures: Iterable[str]) -> "Job":
        kept = tuple(name for name in NAMES if name in {*measures})
        return Job(step, kept, folder / f"{step:08d}-{'-'.join(kept)}.safetensors")

    @staticmethod
    def read(file: Path) -> "Job":
        step, *measures = file.stem.split("-")
        return Job(int(step), tuple(measures), file)


class Online:
    """The measures of a run, each every so many steps. Only process 0 has them.

    One step is measured at a time, and one waits. If a later one is due while one waits, the later one is measured instead,
    with the measures of both: training never waits, and the newest weights are measured.

    start: steps done before. every: steps between two evaluations, by measure. notes: messages on what cannot be measured.
    process: the one that measures, once there is one.
    """

    program: ClassVar = [sys.executable, "-m", "eval.online_process"]

    def __init__(self, folder: Path, config: Config, shards: AnyShards, plan: Plan, start: int):
        self.run, self.folder, self.method = folder, folder / FOLDER, config.method
        self.every, self.notes = steps_between(config, plan.steps_per_epoch), list[str]()
        if "knn" in self.every and (reason := why_no_knn(config, shards, plan)):
            del self.every["knn"]
            self.notes.append(f"k-NN while training is skipped: {reason}")
        self._free_cores = free_cores(config)
        self.process: subprocess.Popen[str] | None = None
        self._errors: IO[bytes] | None = None  # what the process prints besides
        self._yields = True  # whether the process has the lowest priority
        self._changed = threading.Condition()
        self._waiting, self._closed = self._left_by_last_start(start), False
        self._current: Job | None = None
        self._replaced = 0
        self._results: queue.SimpleQueue[tuple[Job, dict[str, float], list[str]]] = queue.SimpleQueue()
        self._copies: Any = None
        self._write: threading.Thread | None = None
        self._measure: threading.Thread | None = None
        if self._waiting:
            self._begin()

    def _left_by_last_start(self, start: int) -> list[Job]:
        """Jobs of steps that are done; files of later steps, which are made again, are removed."""
        jobs = []
        for leftover in self.folder.glob(".*.tmp"):  # of a process that was killed during a write
            leftover.unlink()
        for file in sorted(self.folder.glob("*-*.safetensors")):
            job = Job.read(file)
            if job.step <= start and (wanted := tuple(name for name in job.measures if name in self.every)):
                jobs.append(replace(job, measures=wanted))
            else:
                file.unlink()
        return jobs

    # ------------------------------------------------------------------------------------------- for the training loop

    def due(self, done: int) -> list[str]:
        """The measures to be taken after `done` steps."""
        return [name for name, steps in self.every.items() if done % steps == 0]

    def after_step(self, done: int, backbone: "ViT", run_log: "RunLog") -> None:
        """Copy the weights after `done` steps if a measure is due, and log what has been measured meanwhile."""
        if measures := self.due(done):
            self.start(done, measures, backbone, run_log)
        self.deliver(run_log)

    def start(self, step: int, measures: list[str], backbone: "ViT", run_log: "RunLog") -> None:
        """Copy the weights after `step` steps, to be measured while the next steps run."""
        from model.weights import about_backbone
        from runtime.checkpoint import HostCopies

        if self._write:
            self._write.join()
        with self._changed:
            old = self._waiting.pop() if self._waiting and self._current else None
        if old:
            self._replaced += 1
            if self._replaced == 1:
                run_log.log(
                    f"step {old.step} is not measured, step {step} is instead: measuring takes longer than eval.every, and "
                    "training does not wait for it"
                )
        job = Job.of(self.folder, step, [*measures, *(old.measures if old else ())])
        self._copies = self._copies or HostCopies()
        tensors = self._copies({name: t.detach() for name, t in backbone.state_dict().items()})
        about = about_backbone(backbone, step, self.method)
        self._write = threading.Thread(
            target=self._save, args=(job, tensors, about, old), name="weights to be measured"
        )
        self._write.start()
        self._begin()

    def deliver(self, run_log: "RunLog") -> None:
        """Write the rows of what has been measured since the last call. The run log has them before their weights go."""
        while not self._results.empty():
            job, metrics, messages = self._results.get()
            if metrics:
                run_log.write_measured(job.step, metrics)
            for message in messages:
                run_log.log(f"warning: a measure of step {job.step} failed, and training does not need it: {message}")
            job.file.unlink(missing_ok=True)

    def finish(self, run_log: "RunLog", stop: "StopSignal") -> bool:
        """At the end of a run: wait for what is not measured yet. Returns whether all is, False after a stop signal."""
        self.deliver(run_log)
        if self.left() and not stop.received:
            run_log.log(f"trained; measuring {self.left()} (Ctrl-C leaves that to the next start)")
            self._stop_yielding()
        while self._jobs() and not stop.received:
            with self._changed:
                self._changed.wait(POLL)
            self.deliver(run_log)
        self.deliver(run_log)
        if self._replaced > 1:
            run_log.log(
                f"{self._replaced} steps were not measured: a larger eval.every, or a smaller eval.limit, needs less"
            )
        return not self._jobs()

    def left(self) -> str:
        """The steps that are not measured yet, in words; "" if there are none."""
        if self._write:
            self._write.join()
        return " and ".join(f"step {job.step}" for job in self._jobs())

    def close(self) -> None:
        """End the measuring process. What is not measured stays in RUN/measuring/."""
        if self._write:
            self._write.join()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._kill()
        if self._measure:
            self._measure.join()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    # --------------------------------------------------------------------------------------------------- its two threads

    def _begin(self) -> None:
        if not self._measure:
            self._measure = threading.Thread(target=self._measure_all, name="measuring", daemon=True)
            self._measure.start()

    def _jobs(self) -> list[Job]:
        """What is not measured, or not delivered, yet."""
        with self._changed:
            return [*([self._current] if self._current else []), *self._waiting]

    def _save(self, job: Job, tensors: dict[str, Any], about: dict[str, Any], old: Job | None) -> None:
        from runtime.checkpoint import save_tensors

        try:
            save_tensors(job.file, tensors, {"densedino": json.dumps(about)})
        except UserError as error:
            self._results.put((job, {}, [str(error)]))
            return
        finally:
            if old:
                old.file.unlink(missing_ok=True)
        with self._changed:
            self._waiting.append(job)
            self._changed.notify_all()

    def _measure_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                if self._closed:
                    return
                self._current = job = self._waiting.pop(0)
            if (answer := self._ask(job)) is None:
                return
            self._results.put((job, answer["metrics"], answer["messages"]))
            with self._changed:
                self._current = None
                self._changed.notify_all()

    def _ask(self, job: Job) -> dict[str, Any] | None:
        """The answer of the process, which is started if there is none; None if the run ends meanwhile."""
        while True:
            with self._changed:
                if self._closed:
                    return None
                try:
                    process = self.process or self._start_process()
                except OSError as error:
                    return {"metrics": {}, "messages": [f"the measuring process does not start: {error.strerror}"]}
            answer = self._exchange(process, {"file": str(job.file), "measures": job.measures})
            if answer.endswith("\n"):
                return json.loads(answer)
            with self._changed:
                if self._closed:
                    return None
                if self.process is not process:  # another one is to take its place: `_stop_yielding`
                    continue
                self.process = None
            process.kill()
            return {"metrics": {}, "messages": [f"the measuring process {self._reason(process.wait())}"]}

    def _exchange(self, process: "subprocess.Popen[str]", question: dict[str, Any]) -> str:
        """The line that the process answers; "" if it has ended, or is not the run's any more. One of the lowest priority
        needs a core even to die, so its end is not waited for."""
        assert process.stdin
        assert process.stdout
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            answered = select.poll()
            answered.register(process.stdout, select.POLLIN)
            while self.process is process:
                if answered.poll(1000 * POLL):
                    return process.stdout.readline()
        except OSError:
            pass
        return ""

    # ------------------------------------------------------------------------------------------------- the process itself

    def _start_process(self) -> "subprocess.Popen[str]":
        """Start the process. It uses no GPU: there it would slow this process's steps, for which all others wait, and take
        memory that training may need. Ctrl-C does not reach it."""
        threads = max(1, min(MAX_THREADS, self._free_cores)) if self._yields else min(MAX_THREADS, usable_cores())
        paths = os.pathsep.join(path for path in sys.path if path)
        env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths}
        words = [str(self.run), str(os.getpid()), "yields" if self._yields else "alone"]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process lives
        self.process = subprocess.Popen(
            [*self.program, *words], env=env, text=True, process_group=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip
        return self.process

    def _stop_yielding(self) -> None:
        """Training has ended. Where it had all cores, the process has hardly run, and it cannot raise its own priority: it
        is started again. `_ask` repeats its question."""
        with self._changed:
            if self._free_cores < 1:
                self._yields = False
                self._kill()

    def _kill(self) -> None:
        process, self.process = self.process, None
        if process:
            process.kill()

    def _reason(self, code: int) -> str:
        """How the process ended, with the last line that it printed."""
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        lines: list[str] = []
        if self._errors:
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").strip().splitlines()
        hint = " (is memory short?)" if code == -signal.SIGKILL else ""
        return how + hint + (f": {lines[-1]}" if lines else "")


def is_measured(run: Path) -> bool:
    """Whether no weights of a run wait to be measured."""
    return not any((run / FOLDER).glob("*.safetensors"))


def steps_between(config: Config, steps_per_epoch: int) -> dict[str, int]:
    """Steps between two evaluations, by measure. Of a number for all measures, the point probe is left out where it cannot
    be taken; runtime/config/checks.py refuses it by its name."""
    possible = {"points": bool(config.eval.voc and config.points)}
    return {
        name: max(1, round(epochs * steps_per_epoch))
        for name, epochs in config.eval.measures.items()
        if possible.get(name, True)
    }


def free_cores(config: Config) -> int:
    """Cores of this machine that neither a training process nor what reads its images needs; less than 1: none."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return usable_cores() - local * (1 + max(config.speed.workers, config.speed.dali_threads))
