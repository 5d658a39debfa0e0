"""Where a run's curves go besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow (`run.loggers`).

Each logger has a thread, in which it is opened, written to and closed: training waits for no network. A logger that fails is
closed with one message, and the run trains further. metrics.jsonl has every row; the next start of the run sends what a
logger lacks. A resumed run appends to its own run at W&B and MLflow: RUN/loggers.json has the ids. No step is sent twice.

What these programs read from the environment they still read: WANDB_MODE=offline, WANDB_PROJECT, WANDB_ENTITY, WANDB_DIR,
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME.
"""

import json
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from runtime.config import Config, dump_run_config, flatten
from runtime.config.yaml import parse
from runtime.errors import UserError
from runtime.files import write_atomic

IDS = "loggers.json"
OPEN_SECONDS = 300  # to connect, when a run begins: its user waits
RESUME_SECONDS = 30  # the same when it resumes; then rows wait for the logger, and training does not
CLOSE_SECONDS = 60  # to send what is left, at the end of a run
STOP_SECONDS = 5  # the same after a stop signal: run.grace is 25 s
PROJECT = "densedino"  # at W&B and MLflow, unless the environment names one

Row = dict[str, float]  # of metrics.jsonl


class Logger(Protocol):
    """Something that draws curves.

    id: what it calls this run. where: a line that says where the curves are. sent: the last step that it has; None: it does
    not say.
    """

    id: str
    where: str
    sent: int | None

    def write(self, step: int, values: Row) -> None:
        """Add a point to each curve."""

    def write_late(self, step: int, values: Row) -> None:
        """The same for a step before the last one: what was measured of its weights."""

    def close(self, finished: bool) -> None:
        """Send what is left. finished: whether the run was trained to its end."""


class TensorBoard:
    """RUN/tensorboard. Steps that are made again replace those of the first time."""

    id = where = ""
    sent: int | None = None

    def __init__(self, folder: Path, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def write(self, step: int, values: Row) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    write_late = write

    def close(self, finished: bool) -> None:
        self._writer.close()


class Wandb:
    """A run at Weights & Biases, or with WANDB_MODE=offline in RUN/wandb. The screen stays ours."""

    def __init__(self, folder: Path, config: Config, id: str):
        import wandb

        self.id = id or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        place = os.environ.get("WANDB_DIR") or str(folder.absolute())
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT, name=os.environ.get("WANDB_NAME") or folder.name,
            id=self.id, resume="allow", dir=place, config=parse(dump_run_config(config), "config")[0],
            settings=wandb.Settings(console="off", silent=True),
        )  # fmt: skip
        # the server knows it; offline no file tells: what was on its way to W&B's process at a kill -9 is lost
        self.sent: int | None = self._run.step - 1 if id and not self._run.offline else None
        upload = f"offline in {place}/wandb; `wandb sync --append {place}/wandb/offline-run-*-{self.id}` uploads it"
        self.where = f"wandb: {upload if self._run.offline else self._run.url}"
        self._late: list[Row] = []

    def write(self, step: int, values: Row) -> None:
        late = self._late.pop(0) if self._late else {}
        self._run.log(values | late, step=step, commit=True)

    def write_late(self, step: int, values: Row) -> None:
        """W&B takes no step before its last one: these values come with the next row, and their curves are drawn over
        `measured_step`."""
        for name in values:
            self._run.define_metric(name, step_metric="measured_step")
        self._late.append(values | {"measured_step": step})

    def close(self, finished: bool) -> None:
        for late in self._late:
            self._run.log(late)
        self._run.finish(exit_code=0 if finished else 1)


class MLflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI or MLflow's own default. Its parameters are the run's config."""

    def __init__(self, folder: Path, config: Config, id: str):
        import mlflow
        from mlflow.entities import Metric, Param

        self._metric, self._client = Metric, mlflow.MlflowClient()
        self.sent: int | None = None
        if id:
            self._client.update_run(id, status="RUNNING")
            self.sent = max((point.step for point in self._client.get_metric_history(id, "epoch")), default=0)
        self.id = id or self._begin(folder.name, [Param(key, str(value)) for key, value in flatten(config).items()])
        self.where = f"mlflow: run {self.id} at {mlflow.get_tracking_uri()}"

    def _begin(self, name: str, parameters: list[Any]) -> str:
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
        found = self._client.get_experiment_by_name(project)
        experiment = found.experiment_id if found else self._client.create_experiment(project)
        id = self._client.create_run(experiment, run_name=name).info.run_id
        for at in range(0, len(parameters), 100):  # as many as a request takes
            self._client.log_batch(id, params=parameters[at : at + 100])
        return id

    def write(self, step: int, values: Row) -> None:
        now = int(1000 * time.time())
        self._client.log_batch(self.id, [self._metric(name, value, now, step) for name, value in values.items()])

    write_late = write

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self.id, "FINISHED" if finished else "KILLED")


class Sender:
    """A logger in its thread. sent: the last step that it has; error: what ended it."""

    def __init__(self, name: str, sent: int, open_logger: Callable[[], Logger]):
        self.name, self.sent = name, sent
        self.logger: Logger | None = None
        self.error: BaseException | None = None
        self.finished, self.opened, self.reported = False, False, False
        self._rows: queue.SimpleQueue[Row | None] = queue.SimpleQueue()  # 1 kB a row: a day without network is little
        self._opened = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(open_logger,), name=f"logger {name}", daemon=True)
        self._thread.start()

    def _run(self, open_logger: Callable[[], Logger]) -> None:
        try:
            self.logger = open_logger()
            if self.logger.sent is not None:
                self.sent = self.logger.sent
            self._opened.set()
            newest = 0  # of all rows so far, also of those that it had before
            while (row := self._rows.get()) is not None:
                step, values = int(row["step"]), {name: value for name, value in row.items() if name != "step"}
                if step <= newest:
                    values.pop("epoch")  # the row of this step had it
                    self.logger.write_late(step, values)
                elif step > self.sent:
                    self.logger.write(step, values)
                    self.sent = step
                newest = max(newest, step)
            self.logger.close(self.finished)
        except BaseException as error:  # whatever a client raises, SystemExit among it: it is no error of the run
            self.error = error
        self._opened.set()

    def wait_open(self, seconds: float) -> bool:
        """Whether it opened within so many seconds."""
        return self._opened.wait(seconds) and self.error is None

    def write(self, row: Row) -> None:
        if not self.error:
            self._rows.put(row)

    def close(self, finished: bool, seconds: float) -> bool:
        """Send what is left; whether that was done within so many seconds."""
        self.finished = finished
        self._rows.put(None)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def reason(self) -> str:
        """What went wrong, in a line."""
        if self.error is None:
            return f"no answer within {OPEN_SECONDS} s"
        lines = str(self.error).strip().splitlines()
        return f"{type(self.error).__name__}: {lines[0]}" if lines else type(self.error).__name__


class Loggers:
    """All loggers of a run, opened. Only process 0 has them.

    start: steps done before. last: the last step of metrics.jsonl before rows from `start` on were removed. rows: of
    metrics.jsonl now. notes: lines for the user. Raises UserError if a logger cannot be opened for the first time: then the
    user is still there. Later it is a note.
    """

    def __init__(self, folder: Path, config: Config, start: int, last: int, rows: list[Row]):
        self.folder, self.notes = folder, list[str]()
        self._ids = read_ids(folder)
        self._senders: list[Sender] = []
        for name in config.run.loggers:
            if name == "jsonl":  # always written, by MetricLogger
                continue
            known: dict[str, Any] = self._ids.get(name, {})
            begun = (folder / "tensorboard").is_dir() if name == "tensorboard" else name in self._ids
            has = start if name == "tensorboard" else last
            sent = min(known.get("sent", has), has) if begun else 0
            self._senders.append(Sender(name, sent, self._opener(name, config, start, known.get("id", ""))))
        for sender in self._senders:
            self._finish_opening(sender, start, rows)
        self._save()

    def _opener(self, name: str, config: Config, start: int, id: str) -> Callable[[], Logger]:
        if name == "tensorboard":
            return partial(TensorBoard, self.folder, start)
        return partial(Wandb if name == "wandb" else MLflow, self.folder, config, id)

    def _finish_opening(self, sender: Sender, start: int, rows: list[Row]) -> None:
        name, begun = sender.name, sender.name in self._ids
        if not sender.wait_open(RESUME_SECONDS if begun else OPEN_SECONDS) and not begun:
            offline = "WANDB_MODE=offline keeps its curves on this disk; " if name == "wandb" else ""
            others = [other.name for other in self._senders if other is not sender]
            raise UserError(
                f"run.loggers: {name} cannot be opened ({sender.reason()}); {offline}"
                f"run.loggers=[{','.join(['jsonl', *others])}] trains without it"
            )
        self.notes += self._news()
        if sender.sent > start and not sender.error:
            self.notes.append(f"{name} has steps {start + 1} to {sender.sent} already; they are not sent again")
        newest, may_lack = 0, "sent" in self._ids.get(name, {})
        for row in rows:
            late = row["step"] <= newest  # it was sent between two rows: before the next one, if that was sent
            newest = max(newest, int(row["step"]))
            if not late or newest > sender.sent or (newest == sender.sent and may_lack):
                sender.write(row)

    def write(self, row: Row) -> list[str]:
        """Send a row; returns messages, one for each logger that has opened or failed since."""
        for sender in self._senders:
            sender.write(row)
        return self._news()

    def close(self, finished: bool) -> list[str]:
        """Send what is left; returns messages."""
        until = time.monotonic() + (CLOSE_SECONDS if finished else STOP_SECONDS)
        late = [s for s in self._senders if not s.close(finished, max(0.0, until - time.monotonic())) and not s.error]
        messages = self._news()
        self._save({sender.name for sender in late})
        return messages + [f"warning: {sender.name} has not sent everything yet; {LATER}" for sender in late]

    def _news(self) -> list[str]:
        """A line for each logger that has opened since the last call, and a message for each that has failed."""
        places = [s.logger.where for s in self._senders if s.logger and s.logger.where and not s.opened]
        for sender in self._senders:
            sender.opened = sender.logger is not None
        failed = [sender for sender in self._senders if sender.error and not sender.reported]
        for sender in failed:
            sender.reported = True
        if failed:
            self._save()
        return places + [f"warning: {s.name} failed after step {s.sent} ({s.reason()}); {LATER}" for s in failed]

    def _save(self, late: set[str] | frozenset[str] = frozenset()) -> None:
        """Write loggers.json: for each logger its id, and its last step if later ones did not reach it."""
        for sender in self._senders:
            known = self._ids.get(sender.name, {})
            if sender.logger is None and not known:
                continue
            entry: dict[str, Any] = {"id": sender.logger.id if sender.logger else known["id"]}
            if sender.error or sender.name in late:
                entry["sent"] = sender.sent
            self._ids[sender.name] = entry
        if self._senders:
            tree = {"folder": str(self.folder.absolute()), **self._ids}
            write_atomic(self.folder / IDS, json.dumps(tree, indent=1) + "\n")


LATER = "training does not need it: metrics.jsonl has every row, and the next start of this run sends what is missing"


def read_ids(folder: Path) -> dict[str, dict[str, Any]]:
    """{logger: {"id", "sent"}} of loggers.json. Empty for a copy of a run that is still there: two runs share no curves."""
    try:
        tree = json.loads((folder / IDS).read_text(encoding="utf-8"))
        origin = Path(tree.pop("folder"))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return {}
    is_copy = origin != folder.absolute() and (origin / IDS).is_file() and not origin.samefile(folder)
    return {} if is_copy else {name: entry for name, entry in tree.items() if isinstance(entry, dict)}
