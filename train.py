"""Pretrain DenseDINO: read the papers, build, loop, save.

    python train.py configs/demo.yaml data.shards=data/scenes/shards
    torchrun --nproc-per-node=8 train.py configs/densedino_vits16.yaml data.shards=/data/imagenet/train

The same command resumes a run that was stopped, at the step where its newest checkpoint stands.
"""

import argparse
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.config import Config, dump_config, load_config, nearest_value
from runtime.mistake import Failure, Mistake, nearest, tell_mistakes

if TYPE_CHECKING:
    from model.dense_dino import DenseDINO
    from runtime.schedule import Schedules


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("config", help="a file of configs/, or the config.yaml of a run")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="laid over the config")
    parser.add_argument("--dry-run", action="store_true", help="tell what would be trained, and stop")
    parser.add_argument(
        "--force", metavar="NAME", action="append", default=[],
        help="go on in a run folder although this value differs (loss.alpha, data.shards); may be repeated",
    )  # fmt: skip
    args, unknown = parser.parse_known_intermixed_args()
    words = [*args.overrides, *(word for word in unknown if not word.startswith("-"))]
    wrong = []
    for word in (word for word in unknown if word.startswith("-")):
        meant = nearest_value(word.lstrip("-")) or nearest(word, ("--dry-run", "--force", "--help"))
        wrong.append(f"{word}: no such option{meant}")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the Makefile says; before torch starts its threads
    processes = int(os.environ.get("WORLD_SIZE", 1))  # torchrun's word
    config = load_config(args.config, words, processes=processes, forced=args.force, wrong=wrong)
    return train(config, args.dry_run, args.force)


def train(config: Config, dry_run: bool = False, forced: list[str] | tuple[str, ...] = ()) -> int:
    # ------------------------------------------------------------------------------------------- read the papers
    from pipeline.shards import Plan, Shards  # what is wrong is told before torch is loaded
    from runtime import checkpoint, watch

    assert config.data.shards is not None  # load_config asked for them
    shards = Shards(config.data.shards, config.speed, config.data.max_lost)
    holdout = 0.0 if config.data.val else config.data.holdout
    plan = Plan(shards, batch=config.optim.batch, seed=config.seed, holdout=holdout)
    folder, data = Path(config.run.folder or "run"), checkpoint.fingerprint(shards.manifest)
    found, notes = checkpoint.go_on_from(folder, config, data, forced)
    _lock = watch.lock(folder) if os.environ.get("RANK", "0") == "0" and not dry_run else None  # held to the end

    import torch

    from eval.online import OnlineKnn
    from model import weights
    from model.dense_dino import DenseDINO, count_cost
    from pipeline.draws import hash64
    from pipeline.loader import Loader, choose_reader
    from runtime import parallel, record, schedule

    schedules = schedule.make_schedules(config, plan.steps_per_epoch)
    steps = len(schedules)
    if dry_run:
        return tell_run(config, plan, schedules, DenseDINO(config))

    # ----------------------------------------------------------------------------------------------------- build
    # whoever hangs is named by watch.Watch, before a reduction gives up
    processes = parallel.start(config.speed, timeout=watch.FIRST_STEP * config.run.step_timeout + config.run.grace)
    start = found.step if found else 0
    if start < steps:  # remote shards come while the network is built; a cache that cannot hold them is told now
        shards.prefetch(plan, start, processes.rank, processes.world)
    torch.manual_seed(weights.weights_seed(config.seed))
    model = DenseDINO(config)  # the same weights in every process
    begun_with = weights.initialise(model, config.model.init) if config.model.init and not found else ""
    # counted on the CPU, before anything is placed or compiled; a short run is over before the figure is worth its seconds
    flops = count_cost(model, config).flops if processes.first and steps > 200 else None
    processes.place(model)
    optimizer = schedule.Optimizer(model.student, schedules, config.optim.clip, split_positions=config.points > 0)
    if found:
        checkpoint.restore(model, optimizer.adamw, found.tensors())
    if not processes.agree(start):
        raise Mistake(
            f"{folder}: the processes find different checkpoints; it must be one folder that all machines share"
        )
    if found and start >= steps and (folder / "backbone.safetensors").is_file():
        print(f"{folder} is finished: {start} steps, {found.path}. RUN=another/folder starts another run.")
        return 0
    screen = writer = None
    if processes.first:  # before the loader starts: a folder that cannot be written ends the run
        versions, resolved = record.versions(), dump_config(config)
        made_with = {
            "world size": str(processes.world), "precision": str(processes.dtype).removeprefix("torch."),
            "device": processes.device.type, "reader": choose_reader(config.speed.reader, processes.device)[0], **versions,
        }  # fmt: skip
        writer = checkpoint.Writer(folder / "checkpoints", config.run.keep, resolved, data, made_with)
        (folder / "config.yaml").write_text(resolved)
    damaged: Counter[int] = Counter()  # of this process, by epoch
    if processes.first:
        for row in record.take_up(folder, start):  # of all processes
            damaged[plan.epoch(row["step"])] += not shards.is_lost(row["planned"])
    note = parallel.compile_parts(model.parts(), processes.device) if config.speed.compile else ""
    trained = parallel.distribute(model, processes)
    knn = OnlineKnn(config, shards, plan, processes)
    loader = Loader(
        config, shards, plan, device=processes.device, dtype=processes.dtype, start=start, stop=steps,
        rank=processes.rank, world=processes.world, compile=config.speed.compile and not note.startswith("running"),
    )  # fmt: skip
    if processes.first:
        screen = record.Record(folder, steps, plan.steps_per_epoch, start, config.optim.batch, config.head.prototypes)
        record.append_jsonl(folder / "versions.jsonl", {"step": start, "command": record.program(), **versions})
        screen.say(describe(config, plan, processes.world, str(processes.device), str(processes.dtype)))
        screen.say(f"resumed at step {start} from {found.path}" if found else f"a new run in {folder}")
        if begun_with:
            screen.say(begun_with)
        for line in (*notes, *checkpoint.made_otherwise(found, made_with)):
            screen.say(line)
        if shards.told_lost:
            screen.say(shards.told_lost)
        screen.say(f"reading through {loader.reader}: {loader.why}")
        if processes.dtype == torch.bfloat16 and not parallel.has_bfloat16(processes.device):
            screen.say(
                "bfloat16 is not in this device's hardware, torch's stand-in is slow: use speed.precision=float32"
            )
        if note:
            screen.say(note)
        if knn.skipped:
            screen.say(knn.skipped)
    profiler = record.profile(folder / "profile") if config.run.profile and processes.first else None
    stopping = watch.StopSignal()
    watching = watch.Watch(processes, stopping, config.run.step_timeout, config.run.grace)
    alone = processes.world == 1
    if alone:  # nobody waits for this process's next step, and it need not wait for the batch
        loader.interrupted = lambda: stopping.number > 0

    # ------------------------------------------------------------------------------------------------------ loop
    sums: dict[str, torch.Tensor] = {}  # over the steps since the last beat, as far as they were taken
    skipped = torch.zeros(2, device=processes.device)  # steps that were not finite: since the last beat, in a row
    seen: list[tuple[int, torch.Tensor]] = []  # steps and their samples, since the last beat
    done = since = saved = start
    begun = time.perf_counter()

    def note_down() -> None:
        """What only this process knows of the steps since the last beat."""
        own = "" if processes.first else f"-{processes.rank}"
        for at, planned, read in loader.damaged():
            row = {"step": at, "planned": planned, "read": read, **shards.describe(planned)}
            record.append_jsonl(folder / f"damaged{own}.jsonl", row)
            damaged[plan.epoch(at)] += not shards.is_lost(planned)  # which data.max_lost bears
        for at, ids in seen:
            record.append_jsonl(folder / f"samples{own}.jsonl", {"step": at, "samples": ids.tolist()})
        seen.clear()

    try:
        for batch in loader:
            step = batch.step
            watching.at(f"in step {step}", first=step == start)
            torch.manual_seed(int(hash64(config.seed, "drop path", step, processes.rank) >> 1))
            temperature = float(schedules.teacher_temperature[step])
            parts = batch.split(config.speed.accumulate)
            log: dict[str, torch.Tensor] = {}
            means: list[torch.Tensor] = []
            for i, piece in enumerate(parts):
                last = i == len(parts) - 1
                with parallel.unsynchronised(trained, last), processes.autocast():
                    piece_log, piece_means = trained(piece, temperature)
                    means = [m / len(parts) + (means[k] if means else 0) for k, m in enumerate(piece_means)]
                    log = {name: value.detach() / len(parts) + log.get(name, 0) for name, value in piece_log.items()}
                    if last:  # reduced beside the backward pass
                        reduced = processes.begin_mean([*means, log["loss"].isfinite()])
                with parallel.unsynchronised(trained, last):  # autocast is for the forward pass alone
                    (piece_log["loss"] / len(parts)).backward()
            *means, finite = reduced()
            taken, norm = optimizer.step(step, finite == 1)
            model.update_teacher(float(schedules.teacher_momentum[step]), taken)
            model.update_centers(means, taken)
            for name, value in (log | {"gradient_norm": norm}).items():
                sums[name] = sums.get(name, 0) + torch.where(taken > 0, value, 0)
            skipped = (skipped + 1 - taken) * torch.stack([torch.ones_like(taken), 1 - taken])
            if profiler:
                profiler.step()
            if config.run.log_samples:
                seen.append((step, batch.ids))

            done = step + 1
            saving = done % config.run.checkpoint_every == 0 or done == steps
            stop_now = alone and stopping.number > 0
            beat = saving or stop_now or knn.due(done) or done % config.run.log_every == 0
            if beat:  # the only place where the CPU waits for the device
                n = done - since
                note_down()
                waits = [0.0] * processes.world
                waits[processes.rank] = loader.waited() * processes.world
                here = [float(stopping.number > 0), float(max(damaged.values(), default=0)), *waits]
                of_steps = torch.stack([sums[name] / (n - skipped[0]) for name in sums])
                told = [torch.tensor(here, device=processes.device), of_steps, skipped.to(of_steps.dtype)]
                (stop, bad, *waits), values, (unfinite, in_a_row) = (t.tolist() for t in processes.mean(told))
                stop_now = stop > 0
                seconds = time.perf_counter() - begun
                metrics = dict(zip(sums, values, strict=True)) | {
                    "lr": float(schedules.lr[step]),
                    "images_per_second": n * config.optim.batch / seconds,
                    "data_wait_percent": 100 * sum(waits) / len(waits) / seconds,
                    "peak_memory_mb": parallel.peak_memory(processes.device),
                }
                if not alone:
                    metrics["slowest_data_wait_percent"] = 100 * max(waits) / seconds
                if unfinite:
                    metrics["skipped_steps"] = unfinite
                if knn.due(done):
                    watching.at(f"in the k-NN after step {step}", first=True)
                    top1 = knn(model.teacher.backbone)
                    metrics |= {} if top1 is None else {"knn_top1": top1}
                if screen:
                    screen.metrics(done, metrics | processes.arithmetic(flops, metrics["images_per_second"]))
                if in_a_row >= config.run.max_skipped:
                    if processes.first:
                        lost = range(done - int(in_a_row), done)
                        told_of = {"steps": list(lost), "ids": {i: plan.samples_of(i).tolist() for i in lost}}
                        record.write_json(folder / "replay.json", told_of | {"config": dump_config(config)})
                        print(
                            f"error: loss or gradient was not finite for {int(in_a_row)} steps in a row, up to step "
                            f"{done - 1} (run.max_skipped: {config.run.max_skipped}); nothing has moved since, the last "
                            f"checkpoint stands; {folder}/replay.json names the steps and their samples",
                            file=sys.stderr,
                        )
                    return 1
                if bad * processes.world > config.data.max_bad * plan.samples:
                    raise Mistake(
                        f"{round(bad * processes.world)} of {plan.samples} samples are damaged in one epoch, more than "
                        f"data.max_bad: {config.data.max_bad:g}; {folder}/damaged.jsonl lists them"
                    )
                if writer:
                    writer.check()  # a checkpoint that could not be written ends the run
                skipped[0] = 0
                sums, since, begun = {}, done, time.perf_counter()
            if saving:
                pause = time.perf_counter()
                if writer:
                    writer.save(done, model, optimizer.adamw)  # waits for the copy off the device, not for the disk
                begun, saved = begun + time.perf_counter() - pause, done  # images per second are the step's alone
            watching.at(f"waiting for the batch of step {done}")
            if stop_now:
                break
        note_down()
        if writer:
            if saved < done:
                writer.save(done, model, optimizer.adamw)
            writer.finish()
        if done < steps:
            if screen:
                screen.say(f"stopped and saved at step {done}; the same command goes on from there")
            return watch.exit_code(stopping.number)
    except RuntimeError as error:
        if parallel.is_out_of_memory(error):
            raise Failure(
                f"out of memory in step {done}, {parallel.peak_memory(processes.device):,.0f} MiB were in use; "
                f"speed.accumulate={2 * config.speed.accumulate} holds half as many images at a time, speed.recompute=true "
                "takes less for each (--dry-run estimates both); the newest checkpoint stands"
            ) from error
        if failed := parallel.compile_failure(error):
            raise Failure(f"{failed}; the newest checkpoint, if there is one, stands") from error
        gone = watching.silent()
        if not gone:
            raise
        why = str(error).partition("\n")[0].partition(". ")[0]
        raise Failure(f"{gone}; the newest checkpoint stands ({why})") from error
    finally:
        loader.close()
        if writer:
            writer.wait()
        if screen:
            screen.close()
        processes.close()
        watching.close()

    # ------------------------------------------------------------------------------------------------------ save
    if processes.first:
        backbone = model.teacher.backbone
        about = weights.about_backbone(backbone, steps, config.method)
        checkpoint.save_backbone(folder / "backbone.safetensors", backbone, about)
        print(f"finished: {steps} steps; the teacher's backbone is {folder}/backbone.safetensors")
    return 0


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
    """--dry-run: what would be trained, and what it takes."""
    from model.dense_dino import count_cost
    from runtime import parallel

    parameters = sum(p.numel() for p in model.student.parameters())
    backbone = sum(p.numel() for p in model.student.backbone.parameters())
    views = len(config.views)
    print(describe(config, plan, 1, "device", "dtype"))
    print(f"steps        {len(schedules)} ({plan.steps_per_epoch} an epoch)")
    print(f"parameters   {parameters:,} of the student, {backbone:,} of them its backbone's")
    cost, here = count_cost(model, config), parallel.world_size() * config.speed.accumulate
    print(f"arithmetic   {cost.flops / 1e9:.1f} GFLOP per image and step, forward and backward")
    state = 4 * (2 + 3) * parameters  # student, teacher; gradient and AdamW's two moments
    images = config.optim.batch // here
    print(
        f"memory       {(state + images * cost.activations) / 2**30:.1f} GiB on each device in float32: {state / 2**30:.1f} "
        f"of weights and optimiser, {images} images of {cost.activations / 2**20:.0f} MiB (about half of that in "
        f"bfloat16); speed.accumulate or speed.recompute: true need less"
    )
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
