"""
What `mmesid doctor` says before anything starts: versions, devices and extras, whether the runs of a recipe can begin,
and what each of them will take.

Settings and data are read as the stages read them, so that what would stop a stage is told here; nothing is written.
"""

import importlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

import torch

from .data.prepared import PreparedDataset
from .estimates import MEASURED, WORK, Known, Machine, Work, read_data, this_machine
from .running.arguments import parse
from .running.declarations import stage_declaration
from .running.files import to_flags
from .running.records import installed_versions, processor_name


# What stages cannot do without, by the name of its import and of the extra.
NEEDED = {"index": ("faiss", "index"), "demo": ("gradio", "demo")}


@dataclass
class Estimate:
    """What a run of a stage takes: `rows` are what it goes through, `steps` those of the optimizer, if it does not
    stop early, `memory` is in bytes. `None` where nobody knows."""

    stage: str
    name: str
    rows: str | None = None
    steps: int | None = None
    seconds: float | None = None
    memory: float | None = None


@dataclass
class Report:
    """What was found; `problems` keep the recipe from running."""

    versions: dict[str, str]
    machine: Machine
    missing_extras: dict[str, list[str]]
    estimates: list[Estimate] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def missing_extras() -> dict[str, list[str]]:
    """Packages that are not installed, by the extra that would install them."""
    missing: dict[str, list[str]] = {}
    for line in requires("mmesid") or []:
        if found := re.match(r"([\w.-]+).*extra == ['\"](\w+)['\"]", line):
            try:
                version(found[1])
            except PackageNotFoundError:
                missing.setdefault(found[2], []).append(found[1])
    return missing


def examine(
    runs: Iterable[tuple[str, dict]], directory: Path, clock: Callable[[], float] = time.perf_counter
) -> Report:
    """
    Goes through the runs of a recipe as they would start, reading settings and data and writing nothing.

    Args:
        runs (`Iterable[tuple[str, dict]]`): Stages with their settings, from [`~mmesid.trainer.recipes.plan`].
        directory (`Path`): Where the recipe writes, for the space on its disk.
        clock (`Callable[[], float]`, *optional*): What the machine's speed is measured with.

    Returns:
        [`Report`]
    """
    report = Report(installed_versions(), this_machine(directory, clock), missing_extras())
    known: Known | None = None
    for stage, settings in runs:
        estimate = Estimate(stage, settings.get("modality") or Path(settings.get("output_dir", "")).name)
        report.estimates.append(estimate)
        try:
            module = importlib.import_module(f".stages.{stage}", __package__)
            arguments = parse(getattr(module, stage_declaration(stage).node.name), to_flags(settings))
            package, extra = NEEDED.get(stage, ("torch", ""))
            if find_spec(package) is None:
                raise ValueError(f"It needs {package}, which is not installed; pip install 'mmesid[{extra}]'.")
            if stage == "prepare":
                known = read_data(arguments)
                if known is None:
                    report.notes.append("The data are on the Hub: `mmesid prepare` reads them, then they are counted.")
            elif (
                known is None
                and "prepared_dir" in settings
                and not any(one.stage == "prepare" for one in report.estimates)
            ):
                data = PreparedDataset.load(settings["prepared_dir"])
                known = Known(data, data.num_items - data.statistics["missing_image"])
            if known is not None and stage in WORK:
                complete(estimate, WORK[stage](arguments, known), arguments, report)
        # What would end the stage in a sentence.
        except (ValueError, OSError) as error:
            report.problems.append(f"{stage} {estimate.name}: {error}")
    return report


def complete(estimate: Estimate, work: Work, arguments, report: Report) -> None:
    """Turns the work of a stage into seconds and bytes of the machine."""
    machine, training = report.machine, arguments.training
    half = training is not None and (training.bf16 or training.fp16)
    estimate.rows, estimate.steps = work.rows, work.steps or None
    estimate.seconds = machine.seconds(work, half)
    estimate.memory = work.memory + (MEASURED.process if machine.device == "cpu" else 0)
    if estimate.memory > machine.memory:
        report.notes.append(
            f"{estimate.stage} {estimate.name} takes about {estimate.memory / 2**30:.0f} GiB, and the device has "
            f"{machine.memory / 2**30:.0f}; docs/faq.md says what makes it smaller."
        )


def page(report: Report) -> str:
    """The report for people."""
    machine = report.machine
    speeds = ", ".join(f"{speed / 1e9:,.0f} in {name}" for name, speed in machine.speed.items())
    missing = ", ".join(f"{extra} ({', '.join(names)})" for extra, names in sorted(report.missing_extras.items()))
    lines = [
        ", ".join(f"{name} {number}" for name, number in report.versions.items()),
        f"{machine.device}, {os.cpu_count()} x {processor_name()}, {torch.get_num_threads()} threads, "
        f"{_size(machine.memory)} of memory, {_size(machine.disk)} free on the disk",
        f"billions of operations per second, measured now: {speeds}",
        f"extras that are not installed: {missing or 'none'}",
    ]
    if report.estimates:
        rows = [("stage", "", "goes through", "steps", "memory", "time")]
        rows += [(one.stage, one.name, *_cells(one)) for one in report.estimates]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines += ["", *("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)]
        total = sum(one.seconds or 0 for one in report.estimates)
        lines.append(f"in all about {duration(total)}, give or take a factor of three; trainings may stop earlier")
    lines += [f"note: {note}" for note in report.notes] + [f"problem: {problem}" for problem in report.problems]
    return "\n".join([*lines, "", "It can run." if not report.problems else "It cannot run as it is."])


def _cells(one: Estimate) -> tuple[str, str, str, str]:
    if one.rows is None or one.seconds is None or one.memory is None:
        return "", "", "", ""
    return one.rows, f"{one.steps:,}" if one.steps else "", _size(one.memory), duration(one.seconds)


def page_as_json(report: Report) -> str:
    machine = report.machine._asdict()
    return json.dumps(asdict(report) | {"machine": machine, "can_run": not report.problems}, indent=2)


def _size(number: float) -> str:
    return f"{number / 2**30:,.1f} GiB"


def duration(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
