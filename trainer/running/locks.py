"""One writer at a time: a lock file that names its owner's process."""

import fcntl
import os
import time
from pathlib import Path


class DirectoryLock:
    """
    Held by one process at a time, through the file `path`, which holds the process id of its owner. The system gives
    the lock of a process that has ended to the next one that asks, however it ended; forked children do not inherit
    it. Where it is still held after `wait` seconds, [`~DirectoryLock.acquire`] and `with` raise a `ValueError` that
    names the owner.
    """

    def __init__(self, path: str | os.PathLike, wait: float = 0):
        self.path = Path(path)
        self.wait = wait
        self._file: int | None = None

    def acquire(self) -> None:
        end = time.monotonic() + self.wait
        while not self._try():
            if time.monotonic() >= end:
                raise ValueError(
                    f"'{self.path.parent}' is being written by another run{self._owner()}; wait until it ends, or "
                    "choose another output_dir."
                )
            time.sleep(0.1)

    def release(self) -> None:
        """Removes the file and gives the lock back; does nothing if it is not held."""
        if self._file is not None:
            # In this order: who opened the file before sees that it is no longer the one at `path`.
            self.path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None

    def __enter__(self) -> "DirectoryLock":
        self.acquire()
        return self

    def __exit__(self, *exception) -> None:
        self.release()

    def _try(self) -> bool:
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_at_path(file):
                    os.ftruncate(file, 0)
                    os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
                    self._file = file
                    return True
            except BlockingIOError:
                return False
            finally:
                if self._file != file:
                    os.close(file)

    def _is_at_path(self, file: int) -> bool:
        """Not if its last owner removed it after this process opened it and before it got it: another one counts."""
        try:
            return os.path.samestat(os.fstat(file), self.path.stat())
        except FileNotFoundError:
            return False

    def _owner(self) -> str:
        try:
            return f", process {int(self.path.read_text())}"
        # Between two owners.
        except (OSError, ValueError):
            return ""
