"""The pictures of the analyses, each as a PNG and an SVG file, drawn without a display."""

import os
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from mmesid.trainer.metrics.collapse.collapse import COLLAPSED


SIZE = (5.2, 3.4)  # inches, without the legend, which stands above
RESOLUTION = 110  # dots per inch
# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#F0E442")
DASHES = ("-", "--", "-.", (0, (5, 1)), ":")


def draw_spectra(path: Path, spectra: dict[str, np.ndarray]) -> None:
    """Singular values `(dimensions,)` over their largest, a line for each kind of token."""
    figure, axes = _spectrum_axes(len(spectra) + 1)
    for place, (name, values) in enumerate(spectra.items()):
        axes.plot(*_relative(values), linestyle=DASHES[place % len(DASHES)], color=_colour(place), label=name)
    _finish_spectra(figure, axes, path)


def draw_fine_tuning(path: Path, spectra: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Singular values over their largest, before (dashed) and after fine-tuning, a colour for each recommender."""
    figure, axes = _spectrum_axes(2 * len(spectra) + 1)
    for place, (name, (before, after)) in enumerate(spectra.items()):
        axes.plot(*_relative(before), "--", color=_colour(place), linewidth=1, label=f"{name}, before")
        axes.plot(*_relative(after), "-", color=_colour(place), label=f"{name}, after fine-tuning")
    _finish_spectra(figure, axes, path)


def draw_taus(path: Path, taus: dict[str, dict[str, tuple[float, float]]]) -> None:
    """Kendall's tau and half of its 95% interval by state and modality: a group of bars for each modality."""
    modalities = list(next(iter(taus.values())))
    figure, axes = _axes(len(taus), columns=1)
    width = 0.8 / len(taus)
    for place, (state, values) in enumerate(taus.items()):
        found = [name in values for name in modalities]
        centres = np.arange(len(modalities))[found] + (place - (len(taus) - 1) / 2) * width
        means, errors = np.array([values[name] for name in modalities if name in values]).reshape(-1, 2).T
        axes.bar(centres, means, width * 0.92, yerr=errors, color=_colour(place), label=state, capsize=2)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(modalities)), modalities)
    axes.set_xlabel("modality")
    axes.set_ylabel("Kendall's tau, target to history")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    _save(figure, axes, path, columns=1)


def _axes(entries: int, columns: int = 2):
    height = SIZE[1] + 0.2 * -(-entries // columns)
    figure = Figure(figsize=(SIZE[0], height), dpi=RESOLUTION, layout="constrained")
    return figure, figure.subplots()


def _spectrum_axes(entries: int):
    figure, axes = _axes(entries)
    axes.set_xlabel("dimension of the item token, by singular value")
    axes.set_ylabel("singular value / largest")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    return figure, axes


def _finish_spectra(figure: Figure, axes, path: Path) -> None:
    axes.axhline(COLLAPSED, color="grey", linestyle=":", linewidth=1.2, label=f"collapsed below {COLLAPSED:.0%}")
    # What is further down is rounding, and would squeeze the rest.
    axes.set_ylim(COLLAPSED / 10, 1.5)
    _save(figure, axes, path)


def _relative(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(1, len(values) + 1), values / values[0]


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _save(figure: Figure, axes, path: Path, columns: int = 2) -> None:
    """Writes both files, each in one move and the same bytes for the same figures."""
    handles = axes.get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=columns, fontsize="small", frameon=False)
    for ending, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        temporary = path.with_name(f".{path.name}.{ending}.partial")
        with matplotlib.rc_context({"svg.hashsalt": path.name}):
            figure.savefig(temporary, format=ending, metadata=metadata)
        os.replace(temporary, path.with_name(f"{path.name}.{ending}"))
