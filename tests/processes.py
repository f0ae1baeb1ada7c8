"""
New processes that start warm. Of the seconds that a test's process takes, nearly all go by while it imports torch and
its kin, so these are forked from a process that has imported them already. Nothing of this project is imported before
the fork: in all else they are as new as those of `subprocess`.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path


# Forks for every line it reads. The child in the middle waits for its own, so that this one can read on.
SERVER = """
import gc, json, os, runpy, signal, sys
import accelerate, datasets, peft, torch, transformers
from transformers import AutoTokenizer, PreTrainedModel, Trainer, pipeline

gc.freeze()
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    if os.fork() == 0:
        break
else:
    sys.exit()
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
request = json.loads(line)
if child := os.fork():
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(request["files"] + "/code.part", "w") as file:
        file.write(str(code))
    os.rename(request["files"] + "/code.part", request["files"] + "/code")
    os._exit(0)
with open(request["files"] + "/pid", "w") as file:
    file.write(str(os.getpid()))
for number, name, flags in ((0, os.devnull, os.O_RDONLY), (1, "stdout", os.O_WRONLY), (2, "stderr", os.O_WRONLY)):
    os.dup2(os.open(os.path.join(request["files"], name), flags), number)
sys.stdin = open(0, closefd=False)
os.chdir(request["cwd"])
os.environ.clear()
os.environ.update(request["env"])
kind, program, *sys.argv[1:] = request["arguments"]
sys.argv[0] = kind
if kind == "-c":
    exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
else:
    runpy.run_module(program, run_name="__main__", alter_sys=True)
"""

# As `python -m torch.distributed.run --standalone --nproc_per_node 2`, which would start two new interpreters.
IN_TWO = """
import runpy, sys
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

def work(kind, program, *arguments):
    sys.argv = [kind, *arguments]
    if kind == "-c":
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)

standalone = {"run_id": "tests", "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
elastic_launch(LaunchConfig(1, 1, 2, start_method="fork", **standalone), work)(*sys.argv[1:])
"""


_servers: dict[tuple, subprocess.Popen] = {}


def _server(env: Mapping[str, str]) -> subprocess.Popen:
    """The one whose imports read this environment: what libraries read of it later may differ."""
    key = tuple(sorted((name, env[name]) for name in env if name.startswith(("HF_", "PYTHON")) and name != "HF_TOKEN"))
    if key not in _servers:
        _servers[key] = subprocess.Popen(
            [sys.executable, "-c", SERVER], env=env, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
    return _servers[key]


class Process:
    """A running process, with the names of `subprocess.Popen`."""

    def __init__(self, arguments: tuple[str, ...], env: Mapping[str, str], cwd: str | os.PathLike):
        self.args = list(arguments)
        self._keep = tempfile.TemporaryDirectory()
        self._files = Path(self._keep.name)
        for name in ("stdout", "stderr"):
            (self._files / name).touch()
        self._server = _server(env)
        request = {"arguments": arguments, "env": dict(env), "cwd": str(cwd), "files": str(self._files)}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()

    @property
    def returncode(self) -> int | None:
        """The exit status, minus the signal if one ended it; `None` before the end."""
        return int(self._read("code")) if self._read("code") else None

    def kill(self) -> None:
        while not self._read("pid"):
            self._pause()
        os.kill(int(self._read("pid")), signal.SIGKILL)

    def communicate(self, timeout: float = 900) -> tuple[str, str]:
        """Waits for the end; what was written to stdout and stderr."""
        end = time.monotonic() + timeout
        while self.returncode is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self._pause()
        return self._read("stdout"), self._read("stderr")

    def _read(self, name: str) -> str:
        file = self._files / name
        return file.read_text(errors="replace") if file.exists() else ""

    def _pause(self) -> None:
        if self._server.poll() is not None:
            raise RuntimeError(f"The process to fork from has ended with status {self._server.returncode}.")
        time.sleep(0.01)


def start_python(
    *arguments: str | os.PathLike, env: Mapping[str, str] | None = None, cwd: str | os.PathLike = "."
) -> Process:
    """As `subprocess.Popen([sys.executable, *arguments])`, for `-c code ...` and `-m module ...`."""
    return Process(tuple(map(str, arguments)), os.environ if env is None else env, Path(cwd).absolute())


def run_python(*arguments: str | os.PathLike, timeout: float = 900, **kwargs) -> subprocess.CompletedProcess:
    """As `subprocess.run([sys.executable, *arguments], capture_output=True, text=True)`."""
    process = start_python(*arguments, **kwargs)
    output = process.communicate(timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, *output)


def run_in_two(*arguments: str | os.PathLike) -> subprocess.CompletedProcess:
    """The same in two processes that `torch.distributed` joins, each of one thread."""
    return run_python("-c", IN_TWO, *arguments, env=os.environ | {"OMP_NUM_THREADS": "1"})
