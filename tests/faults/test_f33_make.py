"""F33: odd words for make. What is typed arrives as typed, or is refused in one line; nothing is installed unasked."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, env_without_make, run_program

from runtime.config import load_config
from runtime.errors import UserError

pytestmark = pytest.mark.fault("F33")

ODD = """my s(1) 'a' "b" $c & #d `e`;f"""
ARGV = """#!{python}
import json, sys
print(json.dumps(sys.argv[1:]))
"""


class Clone:
    """A clone of the repository as `make` sees it, with an environment that it must not touch: PYTHON=false."""

    def __init__(self, folder: Path, python: str):
        self.folder = folder
        folder.mkdir()
        for name in ("configs", "eval", "model", "pipeline", "runtime", "tools", "train.py"):
            (folder / name).symlink_to(ROOT / name)
        for name in ("Makefile", "requirements.lock"):
            shutil.copy(ROOT / name, folder)
        (folder / ".venv/bin").mkdir(parents=True)
        (folder / ".venv/bin/python").write_text(python)
        (folder / ".venv/bin/python").chmod(0o755)
        self.ready("cuda")

    def ready(self, kind: str, older: float = 0.0) -> None:
        """The environment is complete, `older` seconds older than the lock."""
        ready = self.folder / ".venv/.ready"
        ready.write_text(f"{kind}\n" if kind else "")
        now = time.time()
        os.utime(self.folder / "requirements.lock", (now - 1000, now - 1000))
        os.utime(ready, (now - 900 - older, now - 900 - older))

    def make(self, *words: object, expect: int = 0) -> subprocess.CompletedProcess:
        env = env_without_make()
        command = ["make", *(str(word) for word in words)]
        done = subprocess.run(
            command, cwd=self.folder, env=env | {"PYTHON": "false"}, capture_output=True, text=True, check=False
        )
        assert done.returncode == expect, f"{command}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def argv(self, *words: object) -> list[list[str]]:
        """What the programs of a target get."""
        return [json.loads(line) for line in self.make(*words).stdout.splitlines()]


@pytest.fixture
def clone(tmp_path) -> Clone:
    """Its programs run."""
    return Clone(tmp_path / "clone", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')


@pytest.fixture
def echo(tmp_path) -> Clone:
    """Its programs print what they get, and do nothing."""
    return Clone(tmp_path / "echo", ARGV.format(python=sys.executable))


# ------------------------------------------------------------------------------------------------ words arrive as typed


@pytest.mark.fast
@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("shards", ["SRC", "DST"]),
        ("verify", ["DST"]),
        ("index", ["DST"]),
        ("eval", ["RUN"]),
        ("export", ["RUN", "DST"]),
        ("features", ["RUN", "SRC", "OUT"]),
        ("bench WHAT=data", ["SHARDS", "OUT"]),
        ("gpu", ["SHARDS", "OUT"]),
        ("bench WHAT=shards", ["SRC", "OUT"]),
        ("bench WHAT=checkpoint", ["CONFIG", "OUT"]),
    ],
)
def test_paths_are_one_word_each_and_args_are_passed_on(echo, target, names):
    first, *_ = echo.argv(*target.split(), *(f"{name}={name} {ODD}" for name in names), "ARGS=--one '2 3'")
    assert [word for word in first if ODD in word] == [f"{name} {ODD}" for name in names]
    assert first[-2:] == ["--one", "2 3"]


@pytest.mark.fast
def test_pretrain_passes_all_on(echo):
    given = {name: f"{name} {ODD}" for name in ("RUN", "METHOD", "SHARDS", "VAL", "GPUS", "RESTARTS", "CONFIG")}
    train, finish = echo.argv("pretrain", *(f"{name}={value}" for name, value in given.items()), "ARGS=seed=1 a.b=2")
    *options, config = given
    assert train == [
        "-m", "tools.pretrain", *(f"--{name.lower()}={given[name]}" for name in options), given[config], "seed=1", "a.b=2"
    ]  # fmt: skip
    assert finish == ["-m", "tools.finish_run", given["RUN"], "--skip-existing"]


@pytest.mark.fast
def test_a_config_path_with_blanks_names_the_run(echo):
    train, finish = echo.argv("pretrain", "CONFIG=my configs/the one.yaml", "METHOD=dino")
    assert "--run=runs/the one-dino" in train
    assert finish[2] == "runs/the one-dino"


@pytest.mark.fast
def test_the_config_of_a_run_names_its_folder(echo):
    """Only if a run has started there."""
    (echo.folder / "my runs/b/checkpoints").mkdir(parents=True)
    (echo.folder / "my runs/b/checkpoints/checkpoint-00000001.safetensors").touch()
    assert echo.argv("pretrain", "CONFIG=my runs/b/config.yaml")[1][2] == "my runs/b"
    assert echo.argv("pretrain", "CONFIG=my runs/c/config.yaml")[1][2] == "runs/config"


@pytest.mark.fast
def test_a_dry_run_is_not_evaluated(echo):
    (train,) = echo.argv("pretrain", "CONFIG=configs/photos64.yaml", "ARGS=--dry-run seed=1")
    assert train[-2:] == ["--dry-run", "seed=1"]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("it's (my) $HOME", marks=pytest.mark.fast),
        'a "quoted" one',
        "a`touch canary`",
        "$$;\\",
    ],
)
def test_verify_an_oddly_named_folder(clone, tiny_shards, tmp_path, name):
    shutil.copytree(tiny_shards, tmp_path / name)
    assert f"{tmp_path / name}: " in clone.make("verify", f"DST={tmp_path / name}", "ARGS=--processes 1").stdout
    assert not (clone.folder / "canary").exists()


@pytest.mark.fast
@pytest.mark.parametrize("name", ["2026", "null", "a: b", "[x]", "it's", "x #1", '"', "a\\b", "ü", "runs/x"])
def test_a_path_is_no_yaml(name):
    from tools.pretrain import overrides

    args = type("Args", (), {"run": name, "method": "", "shards": f"{name}1", "val": f"{name}2"})
    config = load_config(ROOT / "configs/demo.yaml", overrides(args))
    assert (config.run.folder, config.data.shards, config.data.val) == (name, f"{name}1", f"{name}2")


def test_train_on_oddly_named_paths(tiny_config, tiny_shards, tmp_path):
    """tools.pretrain, which make calls with these words; a folder [/b] is no markup of the screen."""
    config, shards, run = tmp_path / "my config.yaml", tmp_path / "s (1)", tmp_path / "it's [/b]: #1"
    shutil.copy(tiny_config, config)
    shutil.copytree(tiny_shards, shards)
    words = [f"--run={run}", f"--shards={shards}", "--method=", "--val=", "--gpus=", "--restarts=", config]
    out = run_program("-m", "tools.pretrain", *words, "optim.epochs=1", "optim.warmup_epochs=0").stdout
    assert f"a new run in {run}" in out
    assert (run / "backbone.safetensors").is_file()


# ------------------------------------------------------------------------------------------------------ words refused


@pytest.mark.fast
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretrain", "EPOCHS=3"], "EPOCHS: no such variable; a value of the config is given as ARGS='optim.epochs=3'"),
        (["pretrain", "optim.lr=1e-3"], "a value of the config is given as ARGS='optim.lr=1e-3'"),
        (["pretrain", "BATCH_SIZE=64"], "a value of the config is given as ARGS='optim.global_batch_size=64'"),
        (["pretrain", "shards=my s(1)'"], "shards: no such variable, did you mean SHARDS=my s(1)'?"),
        (["shards", "SOURCE=x"], "SOURCE: no such variable, did you mean SRC=x?"),
        (["pretrain", "XYZZY=1"], "XYZZY: no such variable; `make` lists them"),
        (["eval", "SHARDS=x"], "SHARDS: `make eval` takes no SHARDS, only ARGS, CONFIG, METHOD,"),
        (["pretrian"], "pretrian: no such target, did you mean 'pretrain'?"),
        (["tools"], "tools: no such target"),  # a folder that exists
        (["verify", "evall", "DST=x"], "evall: no such target, did you mean 'eval'?"),
        (["pretrain", "my/x.yaml"], "my/x.yaml: no such target; a config is given as CONFIG=my/x.yaml"),
        (["setup", "TORCH=gpu"], "TORCH=gpu: cpu or cuda"),
        (["verify", "DST=x", "TORCH=cpu"], ".venv has torch for cuda; `make setup TORCH=cpu` replaces it"),
    ],
)
def test_a_word_that_make_does_not_know(clone, words, message):
    done = clone.make(*words, expect=2)
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.fast
def test_variables_of_programs_pass_and_no_others(echo):
    assert echo.argv("verify", "DST=x", "OMP_NUM_THREADS=1", "CUDA_VISIBLE_DEVICES=0")[0][-1] == "x"
    assert "OMP=1" in echo.make("verify", "DST=x", "OMP=1", expect=2).stderr


@pytest.mark.fast
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus=x"], "GPUS=x: a whole number above 0, or all"),
        (["--gpus=0"], "GPUS=0: a whole number above 0, or all"),
        (["--restarts=often"], "RESTARTS=often: a whole number above 0"),
        (
            ["--gpus=2", "configs/demo.yaml", "run.folder=x y"],
            "ARGS='run.folder=x y': the run folder is given as RUN=x y",
        ),
    ],
)
def test_processes_that_cannot_be_counted(words, message):
    words = words if "configs/demo.yaml" in words else [*words, "configs/demo.yaml"]
    stderr = run_program("-m", "tools.pretrain", *words, expect=2).stderr
    assert message in stderr
    assert stderr.count("\n") == 1


@pytest.mark.fast
def test_all_gpus_of_a_machine_without():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    stderr = run_program("-m", "tools.pretrain", "--gpus=all", "configs/demo.yaml", expect=2).stderr
    assert "GPUS=all: " in stderr
    assert stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method=dinoo"], "found the text 'dinoo', did you mean 'dino'?"),
        (["--shards=/nowhere"], "/nowhere: no such folder"),
        (["--gpus=3"], "is not divisible by 3 processes"),
    ],
)
def test_several_processes_are_checked_once_without_torch(tiny_config, words, message):
    """In less time than torch takes to be imported; one line, not one a process, and no traceback."""
    start = time.monotonic()
    command = [sys.executable, "-X", "importtime", "-m", "tools.pretrain", "--gpus=2", *words, str(tiny_config)]
    env = os.environ | {"PYTHONPROFILEIMPORTTIME": "1"}  # of the check, too
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    own = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2
    assert len(own) == 1
    assert message in own[0]
    assert not any(line.endswith("| torch") for line in done.stderr.splitlines())
    assert time.monotonic() - start < 30


def test_two_processes_say_where_they_train(tiny_config, tmp_path):
    words = ["--gpus=2", "--restarts=1", f"--run={tmp_path / 'my run'}", tiny_config]
    out = run_program("-m", "tools.pretrain", *words, "optim.epochs=1", "optim.warmup_epochs=0").stdout
    assert out.splitlines()[0] == "starting 2 processes, on the CPU"
    assert "2 x cpu" in out
    assert "finished: 5 steps" in out


@pytest.mark.fast
@pytest.mark.parametrize("path", ["config/photos64.yaml", "photos64", "photos64.yaml"])
def test_the_nearest_config(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=r"no such config, did you mean 'configs/photos64\.yaml'\?"):
        load_config(path)


def test_a_bench_of_checkpoints_has_an_out(tiny_config, tmp_path):
    out = tmp_path / "my rows.jsonl"
    run_program("-m", "tools.bench", "checkpoint", "--config", tiny_config, "--rounds", 1, "--out", out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["part"] for row in rows] == ["before", "pause", "on disk"]
    assert all(row["seconds"] > 0 and row["megabytes"] >= 0 for row in rows)


# ---------------------------------------------------------------------------------------------------- the environment


NOTICE = "requirements.lock is newer than .venv: `make setup` updates it\n"


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_a_newer_lock_is_told_and_installs_nothing(clone, tiny_shards, kind):
    """PYTHON=false fails if anything is installed."""
    clone.ready(kind, older=200)
    done = clone.make("verify", f"DST={tiny_shards}")
    assert done.stderr == NOTICE
    assert "all agree" in done.stdout
    clone.ready(kind)
    assert clone.make("verify", f"DST={tiny_shards}").stderr == ""


CPU, CUDA = "download.pytorch.org/whl/cpu", "-r requirements.lock"


@pytest.mark.fast
@pytest.mark.parametrize(
    ("remembered", "dist_info", "words", "installs"),
    [
        ("cpu", "torch-2.15.0", [], CPU),
        ("", "torch-2.15.0+cpu", [], CPU),  # an environment made before the kind was written down
        ("cuda", "torch-2.15.0", ["TORCH=cpu"], CPU),
    ],
)
def test_setup_keeps_the_kind_of_torch(clone, remembered, dist_info, words, installs):
    (clone.folder / f".venv/lib/python3.11/site-packages/{dist_info}.dist-info").mkdir(parents=True)
    clone.ready(remembered, older=200)
    commands = clone.make("-n", "setup", *words).stdout
    assert installs in commands
    assert (CPU in commands) != (CUDA in commands)
    assert ("echo cpu > .venv/.ready" in commands) == (installs == CPU)


@pytest.mark.fast
def test_setup_of_a_current_environment_does_nothing(clone):
    clone.ready("cpu")
    assert "pip" not in clone.make("-n", "setup").stdout
    assert CUDA in clone.make("-n", "setup", "TORCH=cuda").stdout
