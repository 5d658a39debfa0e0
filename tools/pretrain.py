"""What `make pretrain` starts: train.py, in one process or, by torchrun, in several.

    python -m tools.pretrain [--run FOLDER] [--method NAME] [--shards SHARDS] [--val SHARDS] [--gpus N|all] [--restarts N]
        CONFIG [words of train.py ...]

An empty value is as if it were not given. Paths are taken as they are, not as YAML; SHARDS may be several, with blanks
between them, and a folder of photos: its shards are made first, once, into the cache (photo_shards.py). Several processes
are started after `train.py --check` has found nothing wrong, so that a wrong input is reported once and in seconds. The
trainer replaces this program, so that signals reach it.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from runtime.errors import UserError, run_cli
from tools.docstring import make_parser


def count_devices() -> int:
    """CUDA devices that a process started here would see: asked of the driver, because importing torch takes seconds."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    found = cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0
    return count.value if found else 0


def has_cpu_torch() -> bool:
    """Whether the torch installed here is a build without CUDA."""
    try:
        return version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return False


def count_processes(gpus: str) -> int:
    """The number of processes that GPUS=`gpus` means; 1 if it is empty. Raises UserError."""
    if gpus == "all":
        if has_cpu_torch():
            raise UserError(
                "GPUS=all: the torch in this environment is a CPU build; `make setup TORCH=cuda` replaces it"
            )
        if devices := count_devices():
            return devices
        raise UserError("GPUS=all: this machine has no CUDA device; without GPUS, one process trains on the CPU")
    return positive("GPUS", gpus or "1", ", or all")


def positive(name: str, word: str, alternative: str = "") -> int:
    """Raise UserError if the value `word` of a variable of make is no whole number above 0."""
    if not word.isdecimal() or int(word) < 1:
        raise UserError(f"{name}={word}: a whole number above 0{alternative}, for example {name}=2")
    return int(word)


def resolve_folders(args: argparse.Namespace, trains: bool) -> None:
    """Put shards in the place of folders of photos; they are made if it `trains`. Raises UserError, also for a run.folder
    among the words."""
    for word in args.words:
        if word.startswith("run.folder="):
            raise UserError(f"ARGS='{word}': the run folder is given as RUN={word.partition('=')[2]}")
    for name in ("shards", "val"):
        given = getattr(args, name)
        if given and os.path.isdir(given) and not os.path.exists(os.path.join(given, "manifest.json")):
            from tools.photo_shards import is_photo_folder, shards_of

            if is_photo_folder(given):
                if trains:
                    check_run(args)
                setattr(args, name, shards_of(name.upper(), given, make=trains))


def check_run(args: argparse.Namespace) -> None:
    """Raise UserError for what is wrong with the config, the run folder or the weights: shards may take hours to make."""
    from eval import preflight
    from runtime.config import is_path, load_config

    config = load_config(args.config, [*overrides(args), *(word for word in args.words if not word.startswith("-"))])
    folder = Path(config.run.folder or "run")
    preflight.check_writable(folder)
    resuming, init = (folder / "checkpoints").is_dir(), config.model.init
    preflight.check_weights(init, resuming)
    if is_path(init) and not resuming:
        from model import methods, weights

        weights.load_pretrained(methods.build(weights.with_architecture(config)), init)


def overrides(args: argparse.Namespace) -> list[str]:
    """The words a.b=c of the options. In JSON, which is YAML too: a folder 2026, or a: b, stays text."""
    values = {"run.folder": args.run, "method": args.method, "data.val": args.val}
    words = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in values.items() if value]
    if args.shards:
        from runtime.config import shards_word

        words.append(shards_word(args.shards))
    if args.shards and not args.val:  # the config's own validation shards belong to its own data
        words.append("data.val=null")
    return words


def describe_devices(processes: int, config: str, words: list[str]) -> str:
    """Where the processes train. Raises UserError if there are fewer devices. The config is known to be valid."""
    from runtime.config import load_config

    devices = 0 if has_cpu_torch() else count_devices()
    wanted = load_config(config, [word for word in words if "=" in word and not word.startswith("-")]).speed.device
    if wanted == "cpu" or not devices:
        return "on the CPU"
    if processes > devices:
        raise UserError(f"GPUS={processes}: this machine has {devices} CUDA devices; GPUS=all uses them")
    return "each on a CUDA device"


def main(argv: list[str] | None = None) -> int:
    parser = make_parser("tools.pretrain", "tools.pretrain")
    for name in ("run", "method", "shards", "val", "gpus", "restarts"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("config")
    parser.add_argument("words", nargs=argparse.REMAINDER)
    args = parser.parse_args(argv)
    processes = count_processes(args.gpus.strip())
    restarts = positive("RESTARTS", args.restarts.strip()) if args.restarts else 0
    resolve_folders(args, trains=not {"--dry-run", "--check", "--help", "-h"} & {*args.words})
    words = [*overrides(args), *args.words]
    program = [sys.executable, "train.py", args.config, *words]
    if processes == 1 and not restarts:
        os.execv(sys.executable, program)
    os.environ["WORLD_SIZE"] = str(processes)  # as torchrun will set it
    if "--dry-run" in words:
        os.execv(sys.executable, program)
    checked = subprocess.run([*program, "--check"], check=False)
    if checked.returncode:
        return checked.returncode
    several = "processes" if processes > 1 else "process"
    print(f"starting {processes} {several}, {describe_devices(processes, args.config, words)}", flush=True)
    # with the address store shared between the starts, the processes of a second start connect to those that exited
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        f"--max-restarts={restarts}",
    ]
    os.execv(sys.executable, [sys.executable, *torchrun, *program[1:]])


if __name__ == "__main__":
    run_cli(main)
