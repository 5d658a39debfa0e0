"""Pretrain DenseDINO: read the papers, build, loop, save.

    python train.py configs/demo.yaml data.shards=data/scenes/shards
    torchrun --nproc-per-node=8 train.py configs/densedino_vits16.yaml data.shards=/data/imagenet/train

The same command resumes a run that was stopped, at the step where its newest checkpoint stands.
"""

import argparse
import math
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.config import RESULTS, Config, dump_config, load_config
from runtime.mistake import Mistake, tell_mistakes

if TYPE_CHECKING:
    from model.dense_dino import DenseDINO
    from runtime.schedule import Schedules


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("config", help="a file of configs/, or the config.yaml of a run")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="laid over the config")
    parser.add_argument("--dry-run", action="store_true", help="tell what would be trained, and stop")
    args = parser.parse_intermixed_args()
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the Makefile says; before torch starts its threads
    config = load_config(args.config, args.overrides)  # a wrong word is told before torch is loaded
    return train(config, args.dry_run)


def train(config: Config, dry_run: bool = False) -> int:
    import torch

    from model import weights
    from model.dense_dino import DenseDINO
    from pipeline.draws import hash64
    from pipeline.loader import Loader
    from pipeline.shards import Plan, Shards
    from runtime import checkpoint, parallel, record, schedule

    # ------------------------------------------------------------------------------------------- read the papers
    if config.data.shards is None:
        raise Mistake(
            "data.shards: which shards? `make pretrain SHARDS=folder`, made by `make shards SRC=photos/ DST=folder`"
        )
    world = parallel.world_size()
    if config.optim.batch % (world * config.speed.accumulate):
        raise Mistake(
            f"optim.batch: {config.optim.batch} images do not fall into {world} processes x "
            f"speed.accumulate: {config.speed.accumulate} equal pieces"
        )
    shards = Shards(config.data.shards, config.data.max_lost)
    holdout = 0.0 if config.data.val else config.data.holdout
    plan = Plan(shards, batch=config.optim.batch, seed=config.seed, holdout=holdout)
    schedules = schedule.make_schedules(config, plan.steps_per_epoch)
    steps = len(schedules)
    if dry_run:
        return tell_run(config, plan, schedules, DenseDINO(config))
    folder = Path(config.run.folder or "run")
    refuse_another_run(folder, config)

    # ----------------------------------------------------------------------------------------------------- build
    processes = parallel.start(config.speed)
    torch.manual_seed(weights.weights_seed(config.seed))
    model = DenseDINO(config)  # the same weights in every process
    if processes.first:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(dump_config(config))
    processes.place(model)
    optimizer = schedule.Optimizer(model.student, schedules, config.optim.clip, split_positions=config.points > 0)
    start = 0
    found = checkpoint.newest_checkpoint(folder / "checkpoints")
    if found:
        path, start, _, tensors = found
        checkpoint.restore(model, optimizer.adamw, tensors)
        del found, tensors
    if not processes.agree(start):
        raise Mistake(
            f"{folder}: the processes find different checkpoints; it must be one folder that all machines share"
        )
    if start >= steps and (folder / "backbone.safetensors").is_file():
        print(f"{folder} is finished: {start} steps, {path}. RUN=another/folder starts another run.")
        return 0
    note = parallel.compile_parts(model.parts(), processes.device) if config.speed.compile else ""
    trained = parallel.distribute(model, processes)
    loader = Loader(
        config, shards, plan, device=processes.device, dtype=processes.dtype, start=start, stop=steps,
        rank=processes.rank, world=processes.world, compile=config.speed.compile and not note.startswith("running"),
    )  # fmt: skip
    screen = None
    if processes.first:
        screen = record.Record(folder, steps, plan.steps_per_epoch, start, config.optim.batch)
        record.append_jsonl(
            folder / "versions.jsonl", {"step": start, "command": record.program(), **record.versions()}
        )
        screen.say(describe(config, plan, processes.world, str(processes.device), str(processes.dtype)))
        screen.say(f"resumed at step {start} from {path}" if start else f"a new run in {folder}")
        if shards.told_lost:
            screen.say(shards.told_lost)
        screen.say(f"reading through {loader.reader}: {loader.why}")
        if note:
            screen.say(note)
    stopping = StopSignal()

    # ------------------------------------------------------------------------------------------------------ loop
    sums: dict[str, torch.Tensor] = {}
    damaged: Counter[int] = Counter()  # of this process, by epoch
    since, begun = start, time.perf_counter()
    try:
        for batch in loader:
            step = batch.step
            torch.manual_seed(int(hash64(config.seed, "drop path", step, processes.rank) >> 1))
            temperature = float(schedules.teacher_temperature[step])
            means: list[torch.Tensor] = []
            parts = batch.split(config.speed.accumulate)
            for i, piece in enumerate(parts):
                last = i == len(parts) - 1
                with parallel.unsynchronised(trained, last), processes.autocast():
                    log, piece_means = trained(piece, temperature)
                    (log["loss"] / len(parts)).backward()
                means = [m / len(parts) + (means[k] if means else 0) for k, m in enumerate(piece_means)]
                for name, value in log.items():
                    sums[name] = sums.get(name, 0) + value.detach() / len(parts)
            optimizer.step(step)
            model.update_teacher(float(schedules.teacher_momentum[step]))
            model.update_centers(processes.mean(means))

            done = step + 1
            saving = done % config.run.checkpoint_every == 0 or done == steps
            beat = saving or done % config.run.log_every == 0
            if beat:  # the only place where the CPU waits for the device
                n = done - since
                for at, planned, read in loader.damaged():
                    name = "damaged.jsonl" if processes.first else f"damaged-{processes.rank}.jsonl"
                    record.append_jsonl(
                        folder / name, {"step": at, "planned": planned, "read": read, **shards.describe(planned)}
                    )
                    damaged[plan.epoch(at)] += not shards.is_lost(planned)  # which data.max_lost bears
                here = [float(stopping.asked), loader.waited(), float(max(damaged.values(), default=0))]
                told = [torch.tensor(here, device=processes.device), torch.stack([sums[name] / n for name in sums])]
                (stop, waited, bad), values = (t.tolist() for t in processes.mean(told))
                seconds = time.perf_counter() - begun
                metrics = dict(zip(sums, values, strict=True)) | {
                    "lr": float(schedules.lr[step]),
                    "images_per_second": n * config.optim.batch / seconds,
                    "data_wait_percent": 100 * waited / seconds,
                }
                if screen:
                    screen.metrics(done, metrics)
                if bad * processes.world > config.data.max_bad * plan.samples:
                    raise Mistake(
                        f"{round(bad * processes.world)} of {plan.samples} samples are damaged in one epoch, more than "
                        f"data.max_bad: {config.data.max_bad:g}; {folder}/damaged.jsonl lists them"
                    )
                if not math.isfinite(metrics["loss"]):
                    print(f"the loss is {metrics['loss']} at step {done}; the last checkpoint stands", file=sys.stderr)
                    return 1
                sums, since, begun = {}, done, time.perf_counter()
            stop_now = stopping.asked if processes.world == 1 else beat and stop > 0
            if stop_now or saving:
                pause = time.perf_counter()
                if processes.first:
                    saved = folder / "checkpoints"
                    checkpoint.save_checkpoint(
                        saved, done, model, optimizer.adamw, dump_config(config), config.run.keep
                    )
                begun += time.perf_counter() - pause  # images per second are the step's, without the pause
            if stop_now:
                if screen:
                    screen.say(f"stopped and saved at step {done}; the same command goes on from there")
                return 130
    finally:
        loader.close()
        if screen:
            screen.close()
        processes.close()

    # ------------------------------------------------------------------------------------------------------ save
    if processes.first:
        backbone = model.teacher.backbone
        about = weights.about_backbone(backbone, steps, config.method)
        checkpoint.save_backbone(folder / "backbone.safetensors", backbone, about)
        print(f"finished: {steps} steps; the teacher's backbone is {folder}/backbone.safetensors")
    return 0


def refuse_another_run(folder: Path, config: Config) -> None:
    """A folder that holds a run of other settings is left alone: what changes results must be the same to go on."""
    path = folder / "config.yaml"
    if not path.is_file():
        return
    before = load_config(path)
    differences: list[str] = []

    def compare(a: object, b: object, at: str) -> None:
        if hasattr(a, "__dataclass_fields__"):
            for name in a.__dataclass_fields__:
                compare(getattr(a, name), getattr(b, name), f"{at}.{name}")
        elif a != b:
            differences.append(f"{at}: {a} there, {b} now")

    for section in RESULTS:
        compare(getattr(before, section), getattr(config, section), section)
    if differences:
        raise Mistake(f"{folder} holds another run ({'; '.join(differences)}); RUN=another/folder starts a new one")


class StopSignal:
    """Ctrl-C, SIGTERM and SIGUSR1 ask the loop to save and stop; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def describe(config: Config, plan, world: int, device: str, dtype: str) -> str:
    """One line: what is trained, on what."""
    groups = " + ".join(f"{g.count}x{g.size}" for g in config.data.views)
    points = f", {config.points} points a pair" if config.points else ""
    return (
        f"{config.method}: {config.model.arch}/{config.model.patch}, views {groups}{points}; {plan.samples} samples, "
        f"{plan.steps_per_epoch} steps an epoch of {config.optim.batch} images; {world} x {device}, "
        f"{dtype.removeprefix('torch.')}"
    )


def tell_run(config: Config, plan, schedules: "Schedules", model: "DenseDINO") -> int:
    """--dry-run: what would be trained."""
    parameters = sum(p.numel() for p in model.student.parameters())
    backbone = sum(p.numel() for p in model.student.backbone.parameters())
    views = len(config.views)
    print(describe(config, plan, 1, "device", "dtype"))
    print(f"steps        {len(schedules)} ({plan.steps_per_epoch} an epoch)")
    print(f"parameters   {parameters:,} of the student, {backbone:,} of them its backbone's")
    for group in config.data.views:
        patches = (group.size // config.model.patch) ** 2
        references = config.points * ((views - 1) if group.teacher else 2)
        print(
            f"tokens       {group.count} views of {group.size}: 1 + {patches} patches + {references} reference tokens"
        )
    return 0


if __name__ == "__main__":
    tell_mistakes(main)
    sys.exit()
