"""A job script for Slurm that trains on several nodes and resumes itself.

    python -m tools.slurm --gpus N [--nodes N] [--run FOLDER] [--method NAME] [--shards SHARDS] [--val SHARDS] [--out FILE]
        [--time 24:00:00] [--partition NAME] [--account NAME] [--option qos=high ...] [--setup 'module load cuda' ...]
        CONFIG [a.b=c ...]

Writes FILE (RUN.sbatch) and never over an existing one. The config, the data and the batch for so many processes are checked
first. Each node runs torchrun with a process for each GPU. Before the time limit, Slurm signals the job (SIGUSR1): the run
saves a checkpoint and the job goes back into the queue. The run folder must be one that all nodes see.

--option is any option of sbatch; --setup is a line of shell before training, such as one that activates an environment (then
its `python` is used, else the one that runs this program). --notice: seconds before the time limit; --cpus: for each GPU.
"""

import argparse
import re
import shlex
import sys
from pathlib import Path

from runtime.config import Config, load_config, unknown_option
from runtime.errors import UserError, require_positive, run_cli
from tools.docstring import make_parser
from tools.pretrain import overrides, positive, resolve_folders

BODY = Path(__file__).with_name("job.sh")
REPOSITORY = Path(__file__).parents[2]
NOTICE = 120  # seconds; Slurm's clock is up to a minute late, and saving may take run.grace
TIME = re.compile(r"\d+(-\d+(:\d+){0,2}|(:\d+){0,2})")  # 90, 24:00:00, 2-12, 2-12:30:00
OPTIONS = ("--time", "--partition", "--account", "--option", "--setup", "--notice", "--cpus")


def check(args: argparse.Namespace) -> None:
    """Raises UserError for options that are no lines of a job script."""
    require_positive(args, "notice", "cpus")
    for name in ("partition", "account"):
        if re.search(r"\s", getattr(args, name)):
            raise UserError(f"--{name} {getattr(args, name)!r}: one word is expected")
    for line in args.setup:
        if "\n" in line:
            raise UserError(f"--setup {line!r}: one line is expected; the option may be repeated")
    if args.time and not TIME.fullmatch(args.time):
        expected = "minutes, hours:minutes:seconds or days-hours, for example 24:00:00"
        raise UserError(f"--time {args.time}: expected {expected}")
    for option in args.option:
        if not re.fullmatch(r"-*[a-z][a-z-]*(=\S+)?", option):
            raise UserError(f"--option {option}: expected an option of sbatch, for example --option qos=high")


def directives(args: argparse.Namespace, nodes: int, gpus: int, cpus: int, name: str, log: Path) -> list[str]:
    """The #SBATCH lines."""
    lines = [
        f"--job-name={_quoted(name)}", f"--nodes={nodes}", "--ntasks-per-node=1", f"--gpus-per-node={gpus}",
        f"--cpus-per-task={cpus * gpus}", f"--output={_quoted(log)}", "--open-mode=append", "--requeue",
        f"--signal=B:USR1@{args.notice}",
    ]  # fmt: skip
    lines += [f"--{key}={getattr(args, key)}" for key in ("time", "partition", "account") if getattr(args, key)]
    lines += [f"--{option.lstrip('-')}" for option in args.option]
    return [f"#SBATCH {line}" for line in lines]


def _quoted(word: Path | str) -> str:
    """As sbatch reads it: no shell, but quotes around blanks."""
    return f'"{word}"' if " " in str(word) else str(word)


def script(args: argparse.Namespace, config: Config, words: list[str], nodes: int, gpus: int, out: Path) -> str:
    """The whole job script."""
    run = Path(config.run.folder or "run").absolute()
    cpus = args.cpus or max(1, config.speed.workers) + 1
    settings = {
        "repository": str(REPOSITORY), "python": "python" if args.setup else sys.executable, "run": str(run),
        "gpus": str(gpus),
    }  # fmt: skip
    train = ["train.py", str(Path(args.config).absolute()), *words]
    log = out.absolute().with_name(f"{out.stem}-%j.log")
    return "\n".join(
        [
            "#!/bin/bash", *directives(args, nodes, gpus, cpus, run.name, log), "", *args.setup,
            *(f"{name}={shlex.quote(value)}" for name, value in settings.items()), f"train=({shlex.join(train)})", "",
            BODY.read_text(encoding="utf-8"),
        ]
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = make_parser("tools.slurm", "tools.slurm.__main__")
    for name in ("nodes", "gpus", "run", "method", "shards", "val", "out", "time", "partition", "account"):
        parser.add_argument(f"--{name}", default="")
    for name in ("option", "setup"):
        parser.add_argument(f"--{name}", action="append", default=[])
    parser.add_argument("--notice", type=int, default=NOTICE)
    parser.add_argument("--cpus", type=int)
    parser.add_argument("config")
    parser.add_argument("words", nargs="*")
    args, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        raise UserError(unknown_option(unknown[0], OPTIONS))
    check(args)
    nodes, gpus = positive("NODES", args.nodes or "1"), positive("GPUS", args.gpus)
    args.run = str(Path(args.run).absolute()) if args.run else ""
    resolve_folders(args, trains=True)
    words = [*overrides(args), *args.words]
    config = load_config(args.config, words, processes=nodes * gpus)
    out = Path(args.out or f"{config.run.folder}.sbatch")
    text = script(args, config, words, nodes, gpus, out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"{out}: exists; remove it, or name another file: OUT=another.sbatch") from None
    except OSError as error:
        raise UserError(f"{out}: cannot write there ({error.strerror})") from None
    several = f"{nodes} nodes" if nodes > 1 else "1 node"
    print(f"wrote {out}: {several} with {gpus} GPUs each; submit it: sbatch {shlex.quote(str(out))}")
    return 0


if __name__ == "__main__":
    run_cli(main)
