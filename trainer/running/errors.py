"""What the command `mmesid` and the stages, started as modules, share: help, and errors as sentences."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .help import HELP_FLAGS, stage_help


TRACEBACK_FLAG = "--traceback"


# Exit statuses besides 0: an error in what was read or done, a command that cannot be understood, Ctrl-C.
ERROR, USAGE, INTERRUPTED = 1, 2, 130


class UsageError(ValueError):
    """Flags, or a file of settings in their place, that do not make a command."""


@contextmanager
def one_sentence(command: str, argv: list[str]) -> Iterator[None]:
    """Ends a user's error in one sentence and the exit status `ERROR` or, for a [`UsageError`], `USAGE`; with
    `--traceback` in `argv` it stays an exception."""
    try:
        yield
    except BrokenPipeError:
        # Whoever read the output has gone, as `head` does: nobody is there to be told.
        raise
    # OSError: an unknown name on the Hub, a full disk.
    except (ValueError, OSError) as error:
        if TRACEBACK_FLAG in argv:
            raise
        print(f"mmesid {command}: error: {error}", file=sys.stderr)
        sys.exit(USAGE if isinstance(error, UsageError) else ERROR)


def run_stage(stage: str, main: Callable[[list[str]], None], argv: list[str]) -> None:
    """Calls a stage's `main` with its flags, or prints its help."""
    if not HELP_FLAGS.isdisjoint(argv):
        print(stage_help(stage, all_settings="--help_all" in argv))
        return
    with one_sentence(stage, argv):
        main([argument for argument in argv if argument != TRACEBACK_FLAG])


def run_as_script(stage: str, main: Callable[[list[str]], None]) -> None:
    """Runs a stage as `mmesid <stage>` does, for `python -m mmesid.trainer.stages.<stage>`."""
    with quiet_end():
        run_stage(stage, main, sys.argv[1:])


@contextmanager
def quiet_end() -> Iterator[None]:
    """Ends a process without a traceback where its output is no longer read, or Ctrl-C stops it."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left to write goes nowhere, and Python does not try once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(ERROR)
    except KeyboardInterrupt:
        print("mmesid: interrupted; the same command goes on from what is already there.", file=sys.stderr)
        sys.exit(INTERRUPTED)
