"""What would be trained, and what it needs: for `--dry-run` and the first lines of a run. And its last lines."""

import shlex
import sys
from pathlib import Path
from typing import Any

from runtime.command import again
from runtime.config import Config


def describe(config: Config, plan: Any, world_size: int, device: str, dtype: str) -> str:
    """One line: what is trained, and on what."""
    groups = " + ".join(f"{g.count}x{g.size}" for g in config.data.views)
    points = f", {config.points} points a pair" if config.points else ""
    return (
        f"{config.method}: {config.model.arch}/{config.model.patch}, views {groups}{points}; {plan.samples} samples, "
        f"{plan.steps_per_epoch} steps an epoch of {config.optim.global_batch_size} images; {world_size} x {device}, "
        f"{dtype.removeprefix('torch.')}"
    )


def print_summary(
    config: Config, plan: Any, steps: int, cost: Any, world_size: int, messages: list[str] | tuple[str, ...] = ()
) -> None:
    """Print what --dry-run reports. cost: `model.cost.Cost`; world_size: how many processes would train; messages: what the
    run would say before its first step, empty ones among them."""
    views, images = len(config.views), config.optim.global_batch_size // (world_size * config.speed.grad_accum_steps)
    print(describe(config, plan, 1, "device", "dtype"))
    print(f"steps        {steps} ({plan.steps_per_epoch} an epoch)")
    print(f"parameters   {cost.parameters:,} in the student, {cost.backbone:,} of them in its backbone")
    print(f"arithmetic   {cost.flops / 1e9:.1f} GFLOP per image and step, forward and backward")
    print(
        f"memory       {cost.memory(images) / 2**30:.1f} GiB on each device in float32: {cost.state / 2**30:.1f} "
        f"for weights and optimizer, {images} images of {cost.activations / 2**20:.0f} MiB (about half of that in "
        f"bfloat16); speed.grad_accum_steps or speed.activation_checkpointing: true need less"
    )
    for group in config.data.views:
        patches = (group.size // config.model.patch) ** 2
        references = config.points * ((views - 1) if group.teacher else 2)
        print(
            f"tokens       {group.count} views of {group.size}: 1 + {patches} patches + {references} reference tokens"
        )
    for message in filter(None, messages):
        print(message)


def describe_finished(folder: Path, checkpoint: Path, steps: int, *, trained: float, asked: float) -> str:
    """What is said of a run that has nothing left to train. trained, asked: epochs of the run, and of the command."""
    less = f" ({asked:g} epochs asked for, the run already has {trained:g})" if asked < trained else ""
    longer = again(f"optim.epochs={2 * trained:g}", "--allow-change", "optim.epochs")
    return (
        f"{folder} is finished: {steps} steps, {checkpoint}{less}. Start another run with RUN=another/folder, or train "
        f"longer (docs/howto/train-longer.md), e.g. twice as long: `{longer}`"
    )


def describe_end(folder: Path, steps: int, loading: list[str], measurable: bool = True) -> str:
    """The last lines of a run: where its backbone is, the lines of Python that load it, and three commands. measurable:
    whether the run has photos with classes to test on, or scenes."""
    run, export = str(folder), str(Path("exported", folder.resolve().name))
    python = Path(sys.executable)
    python = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    figures = "k-NN and segmentation" if measurable else "no labels: the effective rank"
    if measurable:
        last = {shlex.join([str(python), "-m", "eval", "compare", run, "--untrained"]): "every measure; name more runs"}
    else:
        last = {shlex.join([str(python), "-m", "tools.show", "run", run]): "pictures, among them nearest neighbors"}
    commands = {
        shlex.join(["make", "eval", f"RUN={run}"]): f"{figures}, beside the untrained network",
        shlex.join(["make", "export", f"RUN={run}", f"DST={export}"]): "a folder for timm; ARGS=--onnx: ONNX too",
        **last,
    }
    width = max(map(len, commands))
    return "\n".join(
        [
            f"finished: {steps} steps; the backbone is {folder}/backbone.safetensors. In Python:",
            *(f"    {line}" for line in loading),
            "next:",
            *(f"    {command:{width}}  # {what}" for command, what in commands.items()),
        ]
    )
