"""Pretrain a vision transformer: build, loop, save.

    python train.py configs/demo.yaml data.shards=data/scenes/shards/train
    torchrun --nproc-per-node=8 train.py configs/densedino_vits16.yaml data.shards=/data/imagenet/train

The same command resumes a stopped run from its newest checkpoint.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.config import Config, dump_run_config, load_config, parse_config, unknown_option
from runtime.errors import run_cli

OPTIONS = ("--dry-run", "--check", "--allow-change", "--help")

if TYPE_CHECKING:
    import torch
    from torch import nn

    from model.methods import Method
    from pipeline.batch import Batch
    from pipeline.mixture import Mixture
    from pipeline.shards import Shards
    from runtime.distributed import DistributedContext
    from runtime.schedule import Optimizer, StepValues


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("config", help="a file in configs/, or the config.yaml of a run")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that override the config's")
    parser.add_argument("--dry-run", action="store_true", help="print what would be trained and what it needs")
    parser.add_argument("--check", action="store_true", help="check config, data and run folder, and stop")
    parser.add_argument(
        "--allow-change", metavar="KEY", action="append", default=[], help="resume although KEY differs"
    )
    args, unknown = parser.parse_known_intermixed_args()
    words = [*args.overrides, *(word for word in unknown if not word.startswith("-"))]
    errors = [unknown_option(word, OPTIONS) for word in unknown if word.startswith("-")]
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as in the Makefile; before torch starts its threads
    processes = int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
    config = load_config(args.config, words, processes=processes, allowed=args.allow_change, errors=errors)
    return train(config, args.dry_run, args.allow_change, args.check, words)


def train_step(
    batch: "Batch", method: "Method", forward: "nn.Module", optimizer: "Optimizer", at: "StepValues",
    context: "DistributedContext", pieces: int = 1,
) -> "dict[str, torch.Tensor]":  # fmt: skip
    """One optimizer step: the only training step there is.

    batch: from the loader. forward: the method, or DDP around it. at: the schedules' values of this step. pieces: the batch
    is split into so many equal parts, whose gradients add up. Returns metrics averaged over the pieces of this process's
    batch, 0-dim each on the device: the loss, the method's own, "gradient_norm" before clipping, and "step_applied", 0 if a
    loss or a gradient was not finite and nothing changed. The host does not wait for the device.
    """
    from runtime import distributed

    method.before_step(at)
    metrics: dict[str, torch.Tensor] = {}
    statistics: list[torch.Tensor] = []
    for i, piece in enumerate(batch.split(pieces)):
        last = i == pieces - 1
        with distributed.no_sync(forward, last):
            with context.autocast():
                out = forward(piece, at)
            for name, value in ({"loss": out.loss.detach()} | out.metrics).items():
                metrics[name] = metrics.get(name, 0) + value / pieces
            statistics = [x / pieces + (statistics[k] if i else 0) for k, x in enumerate(out.statistics)]
            if last:  # the reduction runs beside the backward pass
                finite = metrics["loss"].isfinite().to(metrics["loss"].dtype)
                reduced = context.all_reduce_mean_async([*statistics, finite])
            (out.loss / pieces).backward()
    *statistics, finite = reduced()
    step_applied, gradient_norm = optimizer.step(at, finite == 1, method.before_update)
    method.after_step(statistics, at, step_applied)
    return metrics | {"gradient_norm": gradient_norm, "step_applied": step_applied}


def train(
    config: Config, dry_run: bool = False, allowed: Sequence[str] = (), check: bool = False, words: Sequence[str] = ()
) -> int:
    """Train a run to its end, or until a stop signal; returns the exit code. allowed: keys of --allow-change. check: stop
    before torch is loaded. words: those of the command line that are in the config, for the notes."""
    # ------------------------------------------------------------------------------- checks, before torch is loaded
    from eval import preflight
    from pipeline.mixture import open_training
    from pipeline.plan import Plan
    from runtime import checkpoint, watchdog

    # hundreds of processes may start at once on one shared disk: the first of each machine looks at the shards, process 0
    # alone at the run folder and at files of weights; the others wait for it in `distributed.start`
    is_main = os.environ.get("RANK", "0") == "0"
    is_first_of_node = is_main or os.environ.get("LOCAL_RANK", "0") == "0"
    opened = open_training(config) if is_first_of_node else None
    holdout = 0.0 if config.data.val else config.data.holdout
    make_plan = partial(Plan, batch=config.optim.global_batch_size, seed=config.seed, holdout=holdout)
    folder = Path(config.run.folder or "run")
    resume, messages = None, list[str]()
    if is_main and opened:
        resume, messages = checkpoint.find_resume(folder, config, checkpoint.identify(opened), allowed)
        messages += preflight.check(config, opened, make_plan(opened), folder, resuming=bool(resume))
    if check or (dry_run and not is_main):
        return 0
    _lock = watchdog.lock(folder) if is_main and not dry_run else None  # held until exit

    import torch

    from model import methods, weights
    from model.cost import count_cost, count_memory
    from runtime import distributed, metrics, notes, schedule, summary

    before = parse_config(resume.config, str(resume.path)) if resume else None
    if is_main:
        preflight.check_scene_size(config)
        config = weights.with_architecture(config, before)
    # the watchdog names a process that hangs before a reduction times out
    timeout = watchdog.FIRST_STEP_FACTOR * config.run.step_timeout + config.run.grace
    context = distributed.alone() if dry_run else distributed.start(config.speed, timeout)
    shards: Shards | Mixture = context.from_first_of_node(opened)
    decided = resume, config.model
    resume, model = context.from_main(lambda: decided)
    config = replace(config, model=model)
    plan, data = make_plan(shards), checkpoint.identify(shards)
    before = parse_config(resume.config, str(resume.path)) if resume else None
    schedules = schedule.make_schedules(config, plan.steps_per_epoch)
    steps, start = len(schedules), resume.step if resume else 0
    messages += notes.notes(config, plan.steps_per_epoch, words)
    if resume and before:
        same = checkpoint.same_data(resume.data, data)
        per_epoch = (plan.samples if same else resume.data["samples"]) // before.optim.global_batch_size
        messages.append(schedule.describe_change(schedule.make_schedules(before, per_epoch), schedules, start))
    messages += summary.describe_sources(shards, plan)
    if dry_run:
        if config.model.init and not resume:
            messages.append(weights.load_pretrained(methods.build(config), config.model.init))
        cost, memory = count_cost(config), count_memory(config)
        summary.print_summary(config, plan, steps, cost, memory, distributed.env_world_size(), messages)
        return 0

    # ----------------------------------------------------------------------------------------------------- build
    from eval.online import Online, is_measured
    from eval.unlabeled import OnlineRank
    from pipeline.loader import Loader, choose_reader
    from pipeline.random import hash64
    from runtime.compile import compile_parts
    from runtime.forward_time import ForwardTime
    from runtime.run_log import RunLog

    if start < steps:  # remote shards are downloaded while the network is built; too small a cache is refused here
        plan.prefetch(shards, start, context.rank, context.world_size)
    torch.manual_seed(weights.weights_seed(config.seed))
    method = methods.build(config)  # the same weights in every process
    if init := config.model.init if not resume else None:
        messages.append(context.from_main(lambda: weights.load_pretrained(method, init)))
    # counting takes seconds: not for a short run
    flops = count_cost(config).flops if context.is_main and steps > 200 else None
    context.to_device(method)
    for t in method.state_dict().values() if init else ():
        t.copy_(context.broadcast(t))
    optimizer = schedule.Optimizer.of(method, config.optim)
    if resume:
        tensors = ((name, context.broadcast(t)) for name, t in resume.stream(read=context.is_main))
        checkpoint.restore(method, optimizer.adamw, resume, tensors)
    backbone = folder / "backbone.safetensors"
    if resume and before and start >= steps and context.from_main(lambda: backbone.is_file() and is_measured(folder)):
        if context.is_main:
            for message in checkpoint.update_evaluation(folder, resume, config):
                print(message)
            epochs = {"trained": before.optim.epochs, "asked": config.optim.epochs}
            print(summary.describe_finished(folder, resume.path, start, **epochs))
        return 0
    writer = None
    if context.is_main:  # before the loader starts: a folder that cannot be written to ends the run
        environment = metrics.environment(context, choose_reader(config.speed.reader, context.device)[0])
        messages += checkpoint.environment_changes(resume, environment)
        keep, text = config.run.keep_checkpoints, dump_run_config(config)
        writer = checkpoint.Writer(folder / "checkpoints", keep, text, data, environment)
    run_log = RunLog(folder, config, shards, plan, steps, start, context, flops)
    compiled = compile_parts(method.compile_units(), context.device) if config.speed.compile else ""
    forward, forward_time = distributed.wrap_ddp(method, context), ForwardTime(method, context.device)
    rank = OnlineRank(config, steps, context)
    online = Online(folder, config, shards, plan, start) if context.is_main else None
    loader = Loader(
        config, shards, plan, device=context.device, dtype=context.dtype, start=start, stop=steps,
        rank=context.rank, world_size=context.world_size, compile=compiled.startswith("compiling"),
    )  # fmt: skip
    messages += [
        shards.missing_summary,
        f"reader: {loader.reader}, {loader.why}",
        loader.note,
        *(online.notes if online else ()),
    ]
    profiler = metrics.profile(folder / "profile") if config.run.profile and context.is_main else None
    stop = watchdog.StopSignal()
    watch = watchdog.Watchdog(context, stop, config.run.step_timeout, shutdown_timeout=config.run.grace)
    single_process = context.world_size == 1
    if single_process:  # no other process waits for its next step, so it need not wait for the batch
        loader.interrupted = lambda: stop.received

    # ------------------------------------------------------------------------------------------------------ loop
    run_log.start_steps(resume.path if resume else None, messages, compiled)
    done = saved = start
    trained = measured = False
    try:
        for batch in loader:
            step = batch.step
            watch.heartbeat(f"in step {step}", first=step == start)
            torch.manual_seed(int(hash64(config.seed, "method", step, context.rank) >> 1))
            at, pieces = schedules.at(step), config.speed.grad_accum_steps
            run_log.add(step, batch.ids, train_step(batch, method, forward, optimizer, at, context, pieces))
            if profiler:
                profiler.step()

            done = step + 1
            stop_now = single_process and stop.received
            save_now = done % config.run.checkpoint_every == 0 or done == steps
            log_now = save_now or stop_now or done % config.run.log_every == 0
            if log_now:  # the only place where the host waits for the device
                interval = run_log.read(done, stop.received, loader.damaged(), loader.waited(), forward_time.read())
                stop_now = interval.stop
                extra: dict[str, float] = {}
                if rank.due(done):
                    with run_log.metric_sums.paused():
                        extra["effective_rank"] = rank(method.backbone, batch)
                run_log.write(done, interval, schedules.lr[step], extra)  # raises if the run went wrong
                if writer:
                    writer.check()  # raises if a checkpoint could not be written
            if online:  # waits for the copy off the device, not for what is measured
                online.after_step(done, method.backbone, run_log)
            if save_now:
                with run_log.metric_sums.paused():  # images_per_second counts the steps only
                    if writer:  # waits for the copy off the device, not for the disk
                        writer.save(done, method, optimizer.adamw)
                saved = done
            watch.heartbeat(f"waiting for the batch of step {done}")
            if stop_now:
                break
        run_log.flush(loader.damaged())
        if writer:
            if saved < done:
                writer.save(done, method, optimizer.adamw)
            writer.finish()
        if done < steps:
            left = f", and measures {online.left()}" if online and online.left() else ""
            run_log.log(f"stopped and saved at step {done}; the same command resumes from there{left}")
            return watchdog.exit_code(stop.number)
        trained = True
    except RuntimeError as error:
        if explained := distributed.explain_error(error, config.speed, context.device, done, watch.unresponsive_ranks):
            raise explained from error
        raise
    finally:
        loader.close()
        if writer:
            writer.wait()
        context.close()  # the other processes end here: none waits for the measures
        watch.close()
        if online:
            measured = trained and online.finish(run_log, stop)
            online.close()
        run_log.close()

    # ------------------------------------------------------------------------------------------------------ save
    if online and not measured:
        print(f"trained and saved; the same command measures {online.left()}, and ends the run")
        return watchdog.exit_code(stop.number)
    if context.is_main:
        about = weights.about_backbone(method.backbone, steps, config.method)
        checkpoint.save_backbone(backbone, method.backbone, about)
        measurable = preflight.is_measurable(config, shards, plan)
        print(summary.describe_end(folder, steps, weights.loading_lines(method.backbone, backbone), measurable))
    return 0


if __name__ == "__main__":
    run_cli(main)
