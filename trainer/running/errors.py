"""What the command `mmesid` and the stages, started as modules, share: help, and errors as sentences."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .help import HELP_FLAGS, stage_help


TRACEBACK_FLAG = "--traceback"


@contextmanager
def one_sentence(command: str, argv: list[str]) -> Iterator[None]:
    """Ends a user's error in one sentence and exit status 2; with `--traceback` in `argv` it stays an exception."""
    try:
        yield
    # OSError: an unknown name on the Hub, a full disk.
    except (ValueError, OSError) as error:
        if TRACEBACK_FLAG in argv:
            raise
        print(f"mmesid {command}: error: {error}", file=sys.stderr)
        sys.exit(2)


def run_stage(stage: str, main: Callable[[list[str]], None], argv: list[str]) -> None:
    """Calls a stage's `main` with its flags, or prints its help."""
    if not HELP_FLAGS.isdisjoint(argv):
        print(stage_help(stage, all_settings="--help_all" in argv))
        return
    with one_sentence(stage, argv):
        main([argument for argument in argv if argument != TRACEBACK_FLAG])


def run_as_script(stage: str, main: Callable[[list[str]], None]) -> None:
    """Runs a stage as `mmesid <stage>` does, for `python -m mmesid.trainer.stages.<stage>`."""
    run_stage(stage, main, sys.argv[1:])
