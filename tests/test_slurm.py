"""The job script for Slurm: preempted twice, it ends with the undisturbed run's weights. Slurm itself is a stub of four
programs, which do what its manual says: sbatch runs the script, and again after a requeue; srun starts a task for each node;
scancel signals their processes; scontrol lists the nodes. Nodes are two network namespaces where the machine has them."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, env_without_make, run_program

from runtime.config import load_config
from tests.faults.program import equal, final, steps
from tests.machines import NAMES, two_machines

STUBS = {
    "sbatch": """
        export SLURM_JOB_ID=4711 SLURM_JOB_NODELIST='node[0-1]' SLURM_JOB_NUM_NODES=2 SLURM_RESTART_COUNT=0
        while :; do
            rm -f "$STATE/requeue"
            bash "$1" & echo $! > "$STATE/batch"; echo >> "$STATE/starts"
            wait $!; code=$?
            [ -e "$STATE/requeue" ] || exit $code
            SLURM_RESTART_COUNT=$((SLURM_RESTART_COUNT + 1))
        done""",
    "srun": """
        while [[ $1 == --* ]]; do [[ $1 == --ntasks=* ]] && tasks=${1#*=}; shift; done
        : > "$STATE/tasks"; pids=(); worst=0
        for ((i = 0; i < tasks; i++)); do
            SLURM_NODEID=$i setsid "$STATE/node" $i "$@" & pids+=($!); echo $! >> "$STATE/tasks"
        done
        for pid in "${pids[@]}"; do wait $pid; code=$?; ((code > worst)) && worst=$code; done
        exit $worst""",
    "scancel": """
        [ "$*" = "--signal=TERM 4711" ] || exit 1
        while read -r pid; do kill -TERM -- "-$pid"; done < "$STATE/tasks" """,
    "scontrol": """
        case $1 in
            show) cat "$STATE/hosts" ;;
            requeue) touch "$STATE/requeue" ;;
        esac""",
}


@pytest.fixture
def slurm(tmp_path) -> Iterator[dict[str, str]]:
    """The environment of a machine with Slurm."""
    with ExitStack() as stack:
        try:
            nodes, hosts = stack.enter_context(two_machines()).prefixes, NAMES
        except pytest.skip.Exception:  # no network namespaces: both nodes are this machine
            nodes, hosts = [["env"], ["env"]], ("127.0.0.1", "127.0.0.1")
        yield write_stubs(tmp_path / "state", tmp_path / "bin", nodes, hosts)


def write_stubs(state: Path, programs: Path, nodes: list[list[str]], hosts: Sequence[str]) -> dict[str, str]:
    """Write the stubs; the environment that finds them. nodes: the prefix that runs a command on each node."""
    state.mkdir()
    programs.mkdir()
    node = state / "node"  # runs a command on the node of a number
    node.write_text(
        "#!/bin/sh\nn=$1; shift\ncase $n in\n"
        + "".join(f'{i}) exec {shlex.join(machine)} "$@" ;;\n' for i, machine in enumerate(nodes))
        + "esac\n"
    )
    node.chmod(0o755)
    (state / "hosts").write_text("\n".join(hosts) + "\n")
    for name, body in STUBS.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)
    return env_without_make() | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "STATE": str(state),
        "OMP_NUM_THREADS": "1",
    }


SLOW = """
import time
from model.methods.densedino import DenseDINO

class Slow(DenseDINO):
    def forward(self, batch, at):
        time.sleep(0.05)  # a run on a fast machine would be over before the second signal
        return super().forward(batch, at)
"""


def preempt(job: subprocess.Popen, state: Path, run: Path, step: int) -> None:
    """Signal the job script as Slurm does, when the run has trained so many steps."""
    until = time.monotonic() + 600
    while steps(run) < step and job.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    assert job.poll() is None, job.communicate()
    os.kill(int((state / "batch").read_text()), signal.SIGUSR1)


@pytest.mark.slow
def test_preempted_twice_it_equals_the_undisturbed_run(slurm, tiny_config, tmp_path):
    state, scripts = Path(slurm["STATE"]), {}
    (tmp_path / "slow.py").write_text(SLOW)
    slurm["PYTHONPATH"] = str(tmp_path)
    for name in ("whole", "cut"):
        scripts[name] = tmp_path / f"{name}.sbatch"
        words = ["-s", "slurm", "NODES=2", "GPUS=1", f"CONFIG={tiny_config}", f"RUN={tmp_path / name}"]
        words += [f"OUT={scripts[name]}", "METHOD=slow:Slow", "ARGS=--time 1:00:00 optim.epochs=12"]
        made = subprocess.run(["make", *words], cwd=ROOT, env=slurm, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stderr
        assert f"submit it: sbatch {scripts[name]}" in made.stdout
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=slurm)
    job = subprocess.Popen(["sbatch", scripts["cut"]], start_new_session=True, **pipes)  # type: ignore[call-overload]
    try:
        preempt(job, state, tmp_path / "cut", 6)
        while len((state / "starts").read_text()) < 2 and job.poll() is None:
            time.sleep(0.005)
        saved = steps(tmp_path / "cut")
        preempt(job, state, tmp_path / "cut", saved + 6)
        out, _ = job.communicate(timeout=900)
    finally:
        if job.poll() is None:  # what it started is not among its processes
            os.killpg(job.pid, signal.SIGKILL)
            for pid in (state / "tasks").read_text().split():
                os.killpg(int(pid), signal.SIGTERM)
    assert job.returncode == 0, out
    assert out.count("saved; back into the queue") == 2
    assert "start 3 on node[0-1]" in out
    assert out.count("resumed at step") == 2
    whole = subprocess.run(["sbatch", scripts["whole"]], **pipes, check=False)  # type: ignore[call-overload]
    assert whole.returncode == 0, whole.stdout
    assert equal(final(tmp_path / "cut"), final(tmp_path / "whole"))
    assert (tmp_path / "cut" / "report.html").is_file()


def write_script(config: Path, out: Path, *words: object, expect: int = 0) -> str:
    """Call the program; the script, or its error."""
    done = run_program("-m", "tools.slurm", "--gpus", "2", "--out", out, *words, config, expect=expect)
    return out.read_text() if expect == 0 else done.stderr


def test_options_are_lines_of_the_script(tiny_config, tmp_path):
    out = tmp_path / "a job.sbatch"
    text = write_script(
        tiny_config, out, "--nodes", 4, "--time", "2-12", "--partition", "gpu", "--account", "me", "--option", "qos=high",
        "--setup", "module load cuda", "--setup", "source env/bin/activate", "--notice", 300,
    )  # fmt: skip
    lines = text.splitlines()
    for line in (
        "nodes=4", "ntasks-per-node=1", "gpus-per-node=2", "time=2-12", "partition=gpu", "account=me", "qos=high",
        "requeue", "open-mode=append", "signal=B:USR1@300", f'output="{tmp_path}/a job-%j.log"',
    ):  # fmt: skip
        assert f"#SBATCH --{line}" in lines
    assert "#SBATCH" not in text.partition("\n\n")[2]  # sbatch reads none after the first command
    assert lines.index("module load cuda") < lines.index("source env/bin/activate") < lines.index("python=python")
    assert subprocess.run(["bash", "-n", out], check=False).returncode == 0
    if checker := shutil.which("shellcheck"):
        assert subprocess.run([checker, out], check=False).returncode == 0
    assert f"python={sys.executable}" in write_script(tiny_config, tmp_path / "b.sbatch")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "4x"], "NODES=4x: a whole number above 0, for example NODES=2"),
        (["--nodes", "3"], "optim.global_batch_size: 16 is not divisible by 6 processes"),
        (["--time", "a day"], "--time a day: expected minutes, hours:minutes:seconds or days-hours"),
        (["--partition", "gpu\n#SBATCH --x"], "one word is expected"),
        (["--notice", "0"], "--notice 0: must be more than 0"),
        (["--option", "qos high"], "--option qos high: expected an option of sbatch"),
        (["--tme=1"], "--tme=1: no such option, did you mean '--time'?"),
        (["optim.lrr=1"], "optim.lrr: no such key, did you mean 'optim.lr'?"),
    ],
)
def test_wrong_words_are_named(tiny_config, tmp_path, words, message):
    out = tmp_path / "job.sbatch"
    options = [word for word in words if not word.startswith("optim")]
    done = run_program(
        "-m", "tools.slurm", "--gpus", "2", "--out", out, *options, tiny_config, *words[len(options) :], expect=2
    )
    assert message in done.stderr
    assert not out.exists()


def test_a_script_is_never_overwritten(tiny_config, tmp_path):
    out = tmp_path / "job.sbatch"
    out.write_text("mine")
    assert f"{out}: exists; remove it, or name another file" in write_script(tiny_config, out, expect=2)
    assert out.read_text() == "mine"


def test_the_howto_names_what_exists():
    """The YAML of docs/howto/cluster.md is YAML, and its words are words of train.py and keys of the config."""
    text = (ROOT / "docs/howto/cluster.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    replicas = yaml.safe_load(block)["spec"]["pytorchReplicaSpecs"]
    assert replicas["Master"] == replicas["Worker"]
    (container,) = replicas["Master"]["template"]["spec"]["containers"]
    launcher, program, config, *words = container["command"] + container["args"]
    assert (launcher, program) == ("torchrun", "train.py")
    assert load_config(ROOT / config, words).run.folder == "/runs/vits16"
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in replicas["Master"]["template"]["spec"]["volumes"]}
    options = set(
        re.findall(r"(--[a-z-]+)", " ".join(re.findall(r"torch\.distributed\.run (.*?)train\.py", text, re.DOTALL)))
    )
    known = run_program("-m", "torch.distributed.run", "--help").stdout
    assert options
    assert all(option in known for option in options)
