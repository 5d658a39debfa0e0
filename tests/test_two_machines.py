"""Two machines, started with the README's command: two network namespaces with host names and addresses, connected by a veth
pair. They share a folder, and their result equals that of one process."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from tests.faults.program import Program, final, log

NAMES = ("node0", "node1")


@pytest.fixture
def machines():
    """[the prefix that runs a command on each machine]; skips if namespaces cannot be created."""
    tag = f"dd{os.getpid()}"
    spaces = [f"{tag}-{name}" for name in NAMES]
    hosts = "127.0.0.1 localhost\n" + "".join(f"10.77.0.{i + 1} {name}\n" for i, name in enumerate(NAMES))
    if not all(shutil.which(program) for program in ("ip", "unshare")):
        pytest.skip("no ip (iproute2) or unshare (util-linux) here")

    def ip(*words: str) -> None:
        done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no network namespaces here: {done.stderr.strip()}")

    try:
        for space in spaces:
            ip("netns", "add", space)
            folder = Path("/etc/netns", space)  # `ip netns exec` mounts its files over /etc
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(hosts)
        ip("link", "add", f"{tag}a", "netns", spaces[0], "type", "veth", "peer", "name", f"{tag}b", "netns", spaces[1])
        for i, (space, cable) in enumerate(zip(spaces, (f"{tag}a", f"{tag}b"), strict=True)):
            ip("-n", space, "addr", "add", f"10.77.0.{i + 1}/24", "dev", cable)
            ip("-n", space, "link", "set", cable, "up")
            ip("-n", space, "link", "set", "lo", "up")
        named = 'hostname "$0" && exec "$@"'
        yield [
            ["ip", "netns", "exec", s, "unshare", "--uts", "sh", "-c", named, n]
            for s, n in zip(spaces, NAMES, strict=True)
        ]
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)
            shutil.rmtree(Path("/etc/netns", space), ignore_errors=True)


def readme_command() -> list[str]:
    """The README's command for each machine, up to train.py."""
    text = (ROOT / "README.md").read_text()
    found = re.search(r"torchrun (--nnodes=2 [^\\]*)\\", text)
    assert found
    return found[1].split()


def test_two_machines_agree_with_one(machines, tiny_config, tmp_path):
    words = [
        "model.drop_path=0",
        "speed.precision=float64",
        "optim.epochs=2",
        "run.log_every=1",
        "run.log_samples=true",
    ]
    launcher = [w.replace("HOST", NAMES[0]) for w in readme_command()]
    launcher = [w if not w.startswith("--nproc-per-node") else "--nproc-per-node=1" for w in launcher]
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, "train.py", str(tiny_config), *words]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    started = [
        subprocess.Popen([*machine, *command, f"run.folder={tmp_path / 'two'}"], **pipes)  # type: ignore[call-overload]
        for machine in machines
    ]
    try:
        for process in started:
            _, err = process.communicate(timeout=180)
            assert process.returncode == 0, err
    finally:
        for process in started:
            process.kill()
    code, _, err = Program(tiny_config, *words, f"run.folder={tmp_path / 'one'}").end()
    assert code == 0, err
    ours, theirs = log(tmp_path / "one"), log(tmp_path / "two")
    for step in range(10):
        assert theirs["losses"][step] == pytest.approx(ours["losses"][step], rel=1e-9)
        shares = [theirs[f"samples{of}.jsonl"][step]["samples"] for of in ("", "-1")]
        assert sorted(shares[0] + shares[1]) == sorted(ours["samples.jsonl"][step]["samples"])
    one, two = final(tmp_path / "one"), final(tmp_path / "two")
    assert all((two[n] - t).abs().max() <= 1e-9 * max(1.0, float(t.abs().max())) for n, t in one.items())
