"""
What befalls a process, done to a function of this one in a fork: it is killed at its n-th change of a file, or after a
time, or what a kill at any of its changes would leave is kept. A fork starts in milliseconds where a new interpreter
imports for seconds, so that every point can be tried.

Nothing that starts threads may have run in the process that forks.
"""

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path


CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.utime"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def kill_at(point: int, root: str) -> None:
    """From here on the process is killed right before its `point`-th change (from 1) of a file below `root`."""
    changes = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal changes
        if _is_change(event, arguments, root):
            changes += 1
            if changes == point:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def keep_states(root: str, states: Path) -> None:
    """
    From here on a copy of `root` as it is right before each change of a file below it goes to `states`, numbered by
    the change; a copy that would equal the one before is left out. That is what a process leaves that is killed there:
    what it has written and not yet handed to the system is in neither.
    """
    lock, is_copying, changes, last = threading.RLock(), False, 0, None

    def watch(event: str, arguments: tuple) -> None:
        nonlocal is_copying, changes, last
        if not _is_change(event, arguments, root):
            return
        # Threads wait for the copy, whose own changes are none.
        with lock:
            if is_copying:
                return
            is_copying = True
            changes += 1
            paths = sorted(Path(root).rglob("*"))
            found = [(path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
            if found != last:
                last = found
                shutil.copytree(root, states / f"{changes:05}")
            is_copying = False

    sys.addaudithook(watch)


def _is_change(event: str, arguments: tuple, root: str) -> bool:
    """Whether an event of `sys.addaudithook` changes a file below `root`."""
    if event == "open":
        path, _, flags = arguments
        if not (isinstance(flags, int) and flags & WRITING):
            return False
    elif event in CHANGES:
        path = arguments[0]
    else:
        return False
    path = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
    # Of a whole tree that is removed, names are relative to the folder that is open.
    return not os.path.isabs(path) or path.startswith(root)


def forked(work: Callable[[], None], output: Path, before: Callable[[], None] | None = None, wait: bool = True) -> int:
    """Calls `before` and `work` in a fork whose stdout and stderr go to the file `output`; the exit status, minus the
    signal if one ended it, or without `wait` the process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return status_of(child) if wait else child
    code = 1
    try:
        os.setsid()
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(file, 1)
        os.dup2(file, 2)
        if before is not None:
            before()
        work()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def status_of(child: int, seconds: float | None = None) -> int:
    """Waits for the end of a process, which is killed after so many seconds."""
    end = None if seconds is None else time.monotonic() + seconds
    while end is not None and time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    if end is not None:
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
