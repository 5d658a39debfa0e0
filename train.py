"""Pretrain a vision transformer: build, loop, save.

    python train.py configs/demo.yaml data.shards=data/scenes/shards
    torchrun --nproc-per-node=8 train.py configs/densedino_vits16.yaml data.shards=/data/imagenet/train

The same command resumes a run that was stopped, from its newest checkpoint.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.config import Config, dump_config, load_config, suggest_key
from runtime.errors import UserError, run_cli, suggest

OPTIONS = ("--dry-run", "--allow-change", "--help")

if TYPE_CHECKING:
    import torch
    from torch import nn

    from model.methods import Method
    from pipeline.batch import Batch
    from runtime.distributed import DistributedContext
    from runtime.schedule import Optimizer, StepValues


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("config", help="a file of configs/, or the config.yaml of a run")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="laid over the config")
    parser.add_argument("--dry-run", action="store_true", help="print what would be trained, and stop")
    parser.add_argument(
        "--allow-change", metavar="NAME", action="append", default=[],
        help="resume a run although this value differs (loss.alpha, data.shards); may be repeated",
    )  # fmt: skip
    args, unknown = parser.parse_known_intermixed_args()
    words = [*args.overrides, *(word for word in unknown if not word.startswith("-"))]
    wrong = [f"{word}: no such option{suggest_key(word.lstrip('-')) or suggest(word, OPTIONS)}"
             for word in unknown if word.startswith("-")]  # fmt: skip
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the Makefile says; before torch starts its threads
    processes = int(os.environ.get("WORLD_SIZE", 1))  # torchrun's word
    config = load_config(args.config, words, processes=processes, forced=args.allow_change, wrong=wrong)
    return train(config, args.dry_run, args.allow_change)


def train_step(
    batch: "Batch", method: "Method", forward: "nn.Module", optimizer: "Optimizer", at: "StepValues",
    processes: "DistributedContext", pieces: int = 1,
) -> "dict[str, torch.Tensor]":  # fmt: skip
    """One step of the optimizer, the only training step there is.

    batch: the loader's form. forward: the method, or DDP around it. at: the schedules' values of this step. pieces: the
    batch goes through in so many equal parts, and gradients add up. Returns the metrics of all processes' batches, 0-dim
    each on the device: the loss, the method's own, the gradient's norm before clipping, and "step_applied", 0 where a loss
    or a gradient was not finite and nothing moved. The host waits for nothing.
    """
    from runtime import distributed

    method.before_step(at)
    metrics: dict[str, torch.Tensor] = {}
    statistics: list[torch.Tensor] = []
    for i, piece in enumerate(batch.split(pieces)):
        last = i == pieces - 1
        with distributed.no_sync(forward, last):
            with processes.autocast():
                out = forward(piece, at)
            for name, value in ({"loss": out.loss.detach()} | out.metrics).items():
                metrics[name] = metrics.get(name, 0) + value / pieces
            statistics = [x / pieces + (statistics[k] if i else 0) for k, x in enumerate(out.statistics)]
            if last:  # reduced beside the backward pass
                finite = metrics["loss"].isfinite().to(metrics["loss"].dtype)
                reduced = processes.all_reduce_mean_async([*statistics, finite])
            (out.loss / pieces).backward()
    *statistics, finite = reduced()
    applied, norm = optimizer.step(at, finite == 1)
    method.after_step(statistics, at, applied)
    return metrics | {"gradient_norm": norm, "step_applied": applied}


def train(config: Config, dry_run: bool = False, forced: list[str] | tuple[str, ...] = ()) -> int:
    # ------------------------------------------------------------------------------- checks, before torch is loaded
    from pipeline.shards import Plan, Shards
    from runtime import checkpoint, watchdog

    assert config.data.shards is not None  # load_config asked for them
    shards = Shards(config.data.shards, config.speed, config.data.max_missing)
    holdout = 0.0 if config.data.val else config.data.holdout
    plan = Plan(shards, batch=config.optim.global_batch_size, seed=config.seed, holdout=holdout)
    folder, data = Path(config.run.folder or "run"), checkpoint.fingerprint(shards.manifest)
    found, notes = checkpoint.find_resume(folder, config, data, forced)
    _lock = watchdog.lock(folder) if os.environ.get("RANK", "0") == "0" and not dry_run else None  # held to the end

    import torch

    from eval.online import OnlineKnn
    from model import methods, weights
    from model.cost import count_cost
    from pipeline.loader import Loader, choose_reader
    from pipeline.random import hash64
    from runtime import distributed, metric_sums, schedule, summary
    from runtime import metrics as run_metrics

    schedules = schedule.make_schedules(config, plan.steps_per_epoch)
    steps, start = len(schedules), found.step if found else 0
    if dry_run:
        summary.print_summary(config, plan, steps, count_cost(config), distributed.world_size())
        return 0

    # ----------------------------------------------------------------------------------------------------- build
    # whoever hangs is named by watchdog.Watchdog, before a reduction gives up
    processes = distributed.start(
        config.speed, timeout=watchdog.FIRST_STEP * config.run.step_timeout + config.run.grace
    )
    if start < steps:  # remote shards come while the network is built; a cache that cannot hold them is told now
        shards.prefetch(plan, start, processes.rank, processes.world)
    torch.manual_seed(weights.weights_seed(config.seed))
    method = methods.build(config)  # the same weights in every process
    if config.model.init and not found:
        notes.append(weights.load_pretrained(method, config.model.init))
    # a short run is over before the figure is worth its seconds
    flops = count_cost(config).flops if processes.first and steps > 200 else None
    processes.place(method)
    optimizer = schedule.Optimizer(
        method.student,
        config.optim.clip_grad,
        groups=method.parameter_groups(),
        split_positions=method.clip_positions_apart,
    )
    if found:
        checkpoint.restore(method, optimizer.adamw, found.tensors())
    if not processes.agree(start):
        raise UserError(f"{folder}: the processes find different checkpoints; all machines must share this one folder")
    if found and start >= steps and (folder / "backbone.safetensors").is_file():
        print(f"{folder} is finished: {start} steps, {found.path}. RUN=another/folder starts another run.")
        return 0
    run_files = writer = None
    damage = run_metrics.Damage(folder, shards, plan, start, processes.rank)
    if processes.first:  # before the loader starts: a folder that cannot be written ends the run
        versions = run_metrics.versions()
        environment = {
            "world size": str(processes.world), "precision": str(processes.dtype).removeprefix("torch."),
            "device": processes.device.type, "reader": choose_reader(config.speed.reader, processes.device)[0], **versions,
        }  # fmt: skip
        writer = checkpoint.Writer(
            folder / "checkpoints", config.run.keep_checkpoints, dump_config(config), data, environment
        )
        run_files = run_metrics.Record(folder, steps, plan, start, config.head.prototypes)
        run_files.begin(dump_config(config), versions)
        notes += checkpoint.environment_changes(found, environment)
    compiled = distributed.compile_parts(method.compile_units(), processes.device) if config.speed.compile else ""
    forward = distributed.distribute(method, processes)
    knn = OnlineKnn(config, shards, plan, processes)
    loader = Loader(
        config, shards, plan, device=processes.device, dtype=processes.dtype, start=start, stop=steps,
        rank=processes.rank, world=processes.world, compile=compiled.startswith("compiling"),
    )  # fmt: skip
    if run_files:
        run_files.say(summary.describe(config, plan, processes.world, str(processes.device), str(processes.dtype)))
        run_files.say(f"resumed at step {start} from {found.path}" if found else f"a new run in {folder}")
        notes += [shards.missing_summary, f"reading through {loader.reader}: {loader.why}", compiled, knn.skipped or ""]
        for line in [*notes, distributed.slow_precision(processes)]:
            if line:
                run_files.say(line)
    profiler = run_metrics.profile(folder / "profile") if config.run.profile and processes.first else None
    stopping = watchdog.StopSignal()
    watching = watchdog.Watchdog(processes, stopping, config.run.step_timeout, config.run.grace)
    alone = processes.world == 1
    if alone:  # nobody waits for this process's next step, and it need not wait for the batch
        loader.interrupted = lambda: stopping.number > 0

    # ------------------------------------------------------------------------------------------------------ loop
    sums = metric_sums.MetricSums(start)
    done = saved = start
    try:
        for batch in loader:
            step = batch.step
            watching.at(f"in step {step}", first=step == start)
            torch.manual_seed(int(hash64(config.seed, "drop path", step, processes.rank) >> 1))
            at, pieces = schedules.at(step), config.speed.grad_accum_steps
            sums.add(train_step(batch, method, forward, optimizer, at, processes, pieces))
            if profiler:
                profiler.step()
            if config.run.log_samples:
                damage.saw(step, batch.ids)

            done = step + 1
            saving = done % config.run.checkpoint_every == 0 or done == steps
            stop_now = alone and stopping.number > 0
            if saving or stop_now or knn.due(done) or done % config.run.log_every == 0:
                # the only place where the host waits for the device
                damage.write(loader.damaged())
                seen = sums.read(processes, stopping.number > 0, damage.most(), loader.waited(), done)
                stop_now = seen.stop
                metrics = seen.metrics(config.optim.global_batch_size, schedules.lr[step], processes, flops)
                if knn.due(done):
                    watching.at(f"in the k-NN after step {step}", first=True)
                    top1 = knn(method.backbone)
                    metrics |= {} if top1 is None else {"knn_top1": top1}
                if run_files:
                    run_files.metrics(done, metrics)
                if seen.not_finite_in_a_row >= config.run.max_nonfinite_steps:
                    if run_files:
                        run_files.write_replay(done, seen.not_finite_in_a_row, plan, config)
                    return 1
                damage.check(seen.damaged, config.data.max_corrupt)
                if writer:
                    writer.check()  # a checkpoint that could not be written ends the run
            if saving:
                with sums.paused():  # images per second are the step's alone
                    if writer:
                        writer.save(
                            done, method, optimizer.adamw
                        )  # waits for the copy off the device, not for the disk
                saved = done
            watching.at(f"waiting for the batch of step {done}")
            if stop_now:
                break
        damage.write(loader.damaged())
        if writer:
            if saved < done:
                writer.save(done, method, optimizer.adamw)
            writer.finish()
        if done < steps:
            if run_files:
                run_files.say(f"stopped and saved at step {done}; the same command goes on from there")
            return watchdog.exit_code(stopping.number)
    except RuntimeError as error:
        if failure := distributed.explain(error, config.speed, processes.device, done, watching.silent):
            raise failure from error
        raise
    finally:
        loader.close()
        if writer:
            writer.wait()
        if run_files:
            run_files.close()
        processes.close()
        watching.close()

    # ------------------------------------------------------------------------------------------------------ save
    if processes.first:
        about = weights.about_backbone(method.backbone, steps, config.method)
        checkpoint.save_backbone(folder / "backbone.safetensors", method.backbone, about)
        print(f"finished: {steps} steps; the teacher's backbone is {folder}/backbone.safetensors")
    return 0


if __name__ == "__main__":
    run_cli(main)
    sys.exit()
