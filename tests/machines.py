"""Two machines on this one: network namespaces with host names and addresses of their own, connected by a veth pair."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.conftest import ROOT

NAMES = ("node0", "node1")


class Machines:
    """prefixes: what runs a command on each machine. Each has a network device of its own (`cables`)."""

    def __init__(self, spaces: list[str], cables: list[str]):
        self.spaces, self.cables = spaces, cables
        named = 'hostname "$0" && exec "$@"'
        self.prefixes = [
            ["ip", "netns", "exec", space, "unshare", "--uts", "sh", "-c", named, name]
            for space, name in zip(spaces, NAMES, strict=True)
        ]

    def start(self, *words: str) -> list[subprocess.Popen]:
        """train.py with these words on both machines, one process each, started with the README's command."""
        text = (ROOT / "README.md").read_text()
        found = re.search(r"torchrun (--nnodes=2 [^\\]*)\\", text)
        assert found
        launcher = [w.replace("HOST", NAMES[0]) for w in found[1].split()]
        launcher = [w if not w.startswith("--nproc-per-node") else "--nproc-per-node=1" for w in launcher]
        command = [sys.executable, "-m", "torch.distributed.run", *launcher, "train.py", *words]
        return [
            subprocess.Popen([*prefix, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
            for prefix in self.prefixes
        ]

    def slow_cable(self, machine: int) -> None:
        """Make a machine's cable slow and lossy with netem, or only slow (tbf) where the kernel has no netem."""
        device = f"ip netns exec {self.spaces[machine]} tc qdisc add dev {self.cables[machine]} root".split()
        netem, tbf = "netem delay 10ms 5ms loss 1%", "tbf rate 20mbit burst 32kbit latency 200ms"
        forms = [netem.split(), tbf.split()]
        if not any(
            subprocess.run([*device, *form], capture_output=True, check=False).returncode == 0 for form in forms
        ):
            pytest.skip("this kernel has neither netem nor tbf")

    def cut_cable(self, machine: int) -> None:
        subprocess.run(["ip", "-n", self.spaces[machine], "link", "set", self.cables[machine], "down"], check=True)


@contextmanager
def two_machines() -> Iterator[Machines]:
    """Skips the test if namespaces cannot be created here. At the end every process in them is killed."""
    tag = f"dd{os.getpid()}"
    spaces, cables = [f"{tag}-{name}" for name in NAMES], [f"{tag}a", f"{tag}b"]
    hosts = "127.0.0.1 localhost\n" + "".join(f"10.77.0.{i + 1} {name}\n" for i, name in enumerate(NAMES))
    if not all(shutil.which(program) for program in ("ip", "unshare", "tc")):
        pytest.skip("no ip and tc (iproute2) or unshare (util-linux) here")

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
        ip("link", "add", cables[0], "netns", spaces[0], "type", "veth", "peer", "name", cables[1], "netns", spaces[1])
        for i, (space, cable) in enumerate(zip(spaces, cables, strict=True)):
            ip("-n", space, "addr", "add", f"10.77.0.{i + 1}/24", "dev", cable)
            ip("-n", space, "link", "set", cable, "up")
            ip("-n", space, "link", "set", "lo", "up")
        yield Machines(spaces, cables)
    finally:
        for space in spaces:
            inside = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, check=False).stdout
            for pid in inside.split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)
            shutil.rmtree(Path("/etc/netns", space), ignore_errors=True)
