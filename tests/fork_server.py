"""Programs from a warm start: a server that has imported torch, timm and this repository forks a process for each program.

A program of ours imports for six CPU-seconds before it does anything, and the tests start some hundreds. What is forked is a
process of its own, with its own memory, signals, files and exit code: it can be stopped, killed and looked at as any other.
What a fork cannot show (imports, memory from the start, variables that torch reads when it is loaded) a test shows with a
process started afresh: `subprocess`.

One server for each process of pytest (`server`), ended with it. Protocol: one connection for each program; the client
sends a JSON text and its ends of two pipes, and is sent the pid, and the wait status at the end.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]


# -------------------------------------------------------------------------------------------------------------- client


@cache
def server() -> str:
    """The address of this process's server, started at the first call."""
    address = f"{tempfile.mkdtemp(prefix='fork-server-')}/socket"
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen(64)
    # the pipe's other end closes with this process, however it ends: the server's sign to end too
    alive, _held = os.pipe()
    command = [sys.executable, "-m", "tests.fork_server", str(listening.fileno()), str(alive)]
    # threads do not outlive a fork; one for each program, as torchrun gives them, and as two workers of pytest need it
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    subprocess.Popen(command, cwd=ROOT, env=env, pass_fds=[listening.fileno(), alive], stdin=subprocess.DEVNULL)
    listening.close()
    os.close(alive)
    return address


class Forked(subprocess.Popen):
    """`subprocess.Popen` of [python, script | -m module, words...], forked from the server instead of started.

    Output is captured as text, stdout and stderr apart (or together: stderr=subprocess.STDOUT); the process leads a session
    of its own.
    """

    def __init__(
        self, words: list[str], cwd: Path = ROOT, env: dict[str, str] | None = None, stderr: int = subprocess.PIPE
    ):
        self.args, self.returncode, self.stdin = [sys.executable, *words], None, None
        self._waitpid_lock, self._child_created, self._communication_started = threading.Lock(), True, False
        self._input, self.encoding, self.errors, self.text_mode = None, None, None, True
        out, write_out = os.pipe()
        err, write_err = (None, write_out) if stderr == subprocess.STDOUT else os.pipe()
        self.stdout = open(out, encoding="utf-8", errors="replace")  # noqa: SIM115
        self.stderr = None if err is None else open(err, encoding="utf-8", errors="replace")  # noqa: SIM115
        self._server = socket.socket(socket.AF_UNIX)
        self._server.connect(server())
        job = {"words": words, "cwd": str(cwd), "env": dict(os.environ if env is None else env)}
        message = json.dumps(job).encode()
        self._server.sendall(len(message).to_bytes(8, "little"))
        socket.send_fds(self._server, [message[:1]], [write_out, write_err])
        self._server.sendall(message[1:])
        for end in {write_out, write_err}:
            os.close(end)
        self.pid = int(self._server.recv(8, socket.MSG_WAITALL))

    def _try_wait(self, flags: int) -> tuple[int, int]:
        """What `os.waitpid` says of a child; the parent is the server here."""
        self._server.setblocking(not flags & os.WNOHANG)
        try:
            status = self._server.recv(8, socket.MSG_WAITALL)
        except BlockingIOError:
            return 0, 0
        return self.pid, int(status or signal.SIGKILL)  # no answer: the server is gone

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid:
                self._handle_exitstatus(status)
        return self.returncode

    def __del__(self, *_):
        self._server.close()


# -------------------------------------------------------------------------------------------------------------- server

NOT_LOADED = ("dali", "gpu_code", "__main__")


def load() -> None:
    """Everything that a program of ours imports."""
    import torch.utils.tensorboard  # noqa: F401

    for package in ("runtime", "model", "pipeline", "eval"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            if not name.endswith(NOT_LOADED):
                importlib.import_module(name)
    importlib.import_module("train")
    threads = os.listdir("/proc/self/task") if os.path.isdir("/proc/self/task") else [""]
    assert len(threads) == 1, "a thread that an import started would be missing in every fork"


def serve(listening: socket.socket, alive: int) -> list[str]:
    """Fork for each connection until the client's process is gone. Returns in the forked process, with the words."""
    children: dict[int, socket.socket] = {}
    signal.signal(signal.SIGCHLD, lambda *_: None)
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    while True:
        ready, _, _ = select.select([listening, alive, wake], [], [])
        if wake in ready:
            os.read(wake, 4096)
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            with children.pop(pid) as client, contextlib.suppress(OSError):
                client.sendall(b"%8d" % status)
        if alive in ready:
            os._exit(0)
        if listening not in ready:
            continue
        client, _ = listening.accept()
        size = int.from_bytes(client.recv(8, socket.MSG_WAITALL), "little")
        message, fds, _, _ = socket.recv_fds(client, 1, 2)
        job = json.loads(message + client.recv(size - 1, socket.MSG_WAITALL))
        pid = os.fork()
        if pid:
            client.sendall(b"%8d" % pid)
            children[pid] = client
            for fd in fds:
                os.close(fd)
            continue
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        os.dup2(fds[0], 1)
        os.dup2(fds[1], 2)
        for fd in (
            *fds,
            alive,
            wake,
            woken,
            listening.detach(),
            client.detach(),
            *(c.detach() for c in children.values()),
        ):
            os.close(fd)
        sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = sys.__stderr__ = open(  # noqa: SIM115
            2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False
        )
        os.environ.clear()
        os.environ.update(job["env"])
        os.chdir(job["cwd"])
        return job["words"]


def run(first: str, *words: str) -> int:
    """The program's exit code, as python -m module or python script would have it."""
    try:
        if first == "-m":
            module, *words = words
            sys.argv, sys.path[0] = [module, *words], os.getcwd()
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = [first, *words], str(Path(first).resolve().parent)
            runpy.run_path(first, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    listening = socket.socket(fileno=int(sys.argv[1]))
    load()
    gc.collect()
    gc.freeze()  # so that a collection does not write to memory that all forks share
    code = run(*serve(listening, int(sys.argv[2])))
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as the interpreter's end does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking every module apart, the rest of that end, takes a second


if __name__ == "__main__":
    main()
