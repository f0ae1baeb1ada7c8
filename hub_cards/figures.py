"""The pictures on a recommender's card, small PNGs drawn without a display."""

import os
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


# Inches and dots an inch: 528 by 326 pixels, some fifteen kilobytes.
SIZE = (4.8, 2.96)
RESOLUTION = 110


def draw_singular_spectrum(path: str | os.PathLike, spectra: dict[str, np.ndarray], threshold: float) -> None:
    """
    Singular values over their largest, on a logarithmic scale, with a line where a dimension counts as collapsed.

    Args:
        path (`str` or `os.PathLike`): The PNG file to write.
        spectra (`dict[str, np.ndarray]` of shape `(dimensions,)` each): Singular values by name, largest first.
        threshold (`float`): The share of the largest singular value under which a dimension counts as collapsed.
    """
    figure, axes = _axes("dimension", "singular value / largest")
    for name, values in spectra.items():
        axes.plot(np.arange(1, len(values) + 1), values / values[0], label=name)
    axes.axhline(threshold, color="grey", linestyle="--", linewidth=1, label=f"{threshold:.0%} of the largest")
    axes.set_yscale("log")
    # What is further down is rounding, and would squeeze the rest.
    axes.set_ylim(bottom=max(axes.get_ylim()[0], threshold / 100))
    _save(figure, axes, path)


def draw_fusion_weights(path: str | os.PathLike, frequencies: np.ndarray, weights: dict[str, np.ndarray]) -> None:
    """
    What share of an item's vector comes from which source, over how often the item was seen in training.

    Args:
        path (`str` or `os.PathLike`): The PNG file to write.
        frequencies (`np.ndarray` of shape `(points,)`): Occurrences in training, rising.
        weights (`dict[str, np.ndarray]` of shape `(points,)` each): Weight by source, summing to one at every point.
    """
    figure, axes = _axes("occurrences in training", "fusion weight")
    for name, values in weights.items():
        axes.plot(frequencies, values, marker="." if len(frequencies) < 30 else None, label=name)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_ylim(0, 1)
    _save(figure, axes, path)


def _axes(x_label: str, y_label: str):
    figure = Figure(figsize=SIZE, dpi=RESOLUTION, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Figure, axes, path: str | os.PathLike) -> None:
    axes.legend(fontsize="small")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # Without the version of the library in the file: the same figures give the same bytes.
    figure.savefig(path, format="png", metadata={"Software": None})
