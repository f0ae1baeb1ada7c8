"""What the command `mmesid` and the stages, started as modules, share: errors as sentences."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


TRACEBACK_FLAG = "--traceback"


@contextmanager
def one_sentence(command: str, show_traceback: bool) -> Iterator[None]:
    """Ends a user's error in one sentence and exit status 2; with `show_traceback` it stays an exception."""
    try:
        yield
    # OSError: an unknown name on the Hub, a full disk.
    except (ValueError, OSError) as error:
        if show_traceback:
            raise
        print(f"mmesid {command}: error: {error}", file=sys.stderr)
        sys.exit(2)


def take_traceback_flag(argv: list[str]) -> tuple[list[str], bool]:
    """The flags without `--traceback`, and whether it was among them."""
    return [argument for argument in argv if argument != TRACEBACK_FLAG], TRACEBACK_FLAG in argv


def run_as_script(stage: str, main: Callable[[list[str]], None]) -> None:
    """Runs a stage's `main` as `mmesid <stage>` does, for `python -m mmesid.trainer.stages.<stage>`."""
    argv, show_traceback = take_traceback_flag(sys.argv[1:])
    with one_sentence(stage, show_traceback):
        main(argv)
