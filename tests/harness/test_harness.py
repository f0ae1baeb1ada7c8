"""A part of what `make faults` and `make fuzz` do at length."""

from pathlib import Path

from ..processes import run_python
from .compat import LIBRARIES, constraints_of


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


def test_the_oldest_libraries_are_those_that_the_package_allows_and_the_newest_are_free():
    pinned = dict(line.split("==") for line in constraints_of("oldest").splitlines() if "==" in line)
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f'"{name}>={pinned[name]}' in declared for name in LIBRARIES)
    free = dict(line.split("==") for line in constraints_of("newest").splitlines() if "==" in line)
    assert free == {name: version for name, version in pinned.items() if name not in LIBRARIES} and "torch" in free
