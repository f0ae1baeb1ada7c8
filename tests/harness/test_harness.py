"""A part of what `make faults` and `make fuzz` do at length."""

from pathlib import Path

from ..processes import run_python


RUN = """if 1:
    import importlib, sys
    root, name, *flags = sys.argv[1:]
    sys.path.append(root)
    sys.argv = [name]
    sys.exit(importlib.import_module(f"tests.harness.{name}").main(flags))
"""
ROOT = Path(__file__).parents[2]


def test_a_stage_that_is_killed_ends_as_an_undisturbed_one():
    flags = "--stages sasrec --step 40 --random 3 --trials killed".split()
    finished = run_python("-c", RUN, ROOT, "faults", *flags)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.splitlines()[-1].endswith(" trials, 0 faults")


def test_damaged_files_are_accepted_or_named():
    finished = run_python("-c", RUN, ROOT, "fuzz", "--inputs", "12")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.splitlines()[-1].endswith(" inputs, 0 faults")
