"""The plots of a comparison, in PNG and SVG, drawn without a display."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from .report import MAIN_METRIC


WIDTH = 7.2
INCHES_PER_ROW = 0.28
RESOLUTION = 110


def draw_models(directory: Path, runs: pd.DataFrame, baselines: Sequence[str]) -> str:
    """A row for each model: the mean over seeds on test with its standard deviation, and every seed. Writes
    `models.png` and `models.svg` and returns the name."""
    names = list(dict.fromkeys(runs.model))
    figure, axes = _rows(names, f"test {MAIN_METRIC}")
    for place, name in enumerate(names):
        values = runs[runs.model == name][f"test {MAIN_METRIC}"].to_numpy()
        colour = "tab:grey" if name in baselines else "tab:blue"
        spread = values.std(ddof=1) if len(values) > 1 else 0
        axes.errorbar(values.mean(), place, xerr=spread, fmt="o", color=colour, capsize=3)
        axes.scatter(values, np.full(len(values), place), s=8, color=colour, alpha=0.5)
    axes.set_title("mean ± sd over seeds; baselines grey", fontsize="small")
    axes.set_xlim(left=0)
    return _save(figure, directory, "models")


def draw_differences(directory: Path, comparisons: pd.DataFrame) -> str:
    """A row for each model and one it is held against: the difference on test with its 95% interval. Writes
    `differences.png` and `differences.svg` and returns the name."""
    rows = comparisons[comparisons.metric == MAIN_METRIC]
    figure, axes = _rows(
        [f"{row.model} - {row.against}" for row in rows.itertuples()], f"difference in test {MAIN_METRIC}"
    )
    for place, row in enumerate(rows.itertuples()):
        colour = "tab:grey" if row.p_holm >= 0.05 else "tab:green" if row.difference > 0 else "tab:red"
        axes.plot([row.low, row.high], [place, place], color=colour)
        axes.scatter(row.difference, place, s=24, color=colour)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_title("95% interval, paired bootstrap over users; grey: p (Holm) is .05 or more", fontsize="small")
    return _save(figure, directory, "differences")


def draw_groups(directory: Path, groups: pd.DataFrame) -> str:
    """A line for each model over how often training saw the target. Writes `by_frequency.png` and `by_frequency.svg`
    and returns the name."""
    order = list(dict.fromkeys(groups.occurrences))
    names = list(dict.fromkeys(groups.model))
    figure = Figure(figsize=(WIDTH, max(3.6, 1 + 0.2 * len(names))), dpi=RESOLUTION, layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(names):
        rows = groups[groups.model == name].set_index("occurrences")
        # Ten colours, then the same again in other lines.
        style = ("-", "--", ":", "-.")[number // 10 % 4]
        axes.plot(order, [rows[MAIN_METRIC].get(group, np.nan) for group in order], style, marker=".", label=name)
    axes.set(xlabel="training interactions of the target", ylabel=f"test {MAIN_METRIC}", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="x-small")
    return _save(figure, directory, "by_frequency")


def _rows(names: Sequence[str], x_label: str):
    figure = Figure(figsize=(WIDTH, 1.2 + INCHES_PER_ROW * len(names)), dpi=RESOLUTION, layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(x_label)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Figure, directory: Path, name: str) -> str:
    # Without versions, dates and random ids in the files: the same figures give the same bytes.
    figure.savefig(directory / f"{name}.png", metadata={"Software": None})
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(directory / f"{name}.svg", metadata={"Date": None, "Creator": None})
    return name
