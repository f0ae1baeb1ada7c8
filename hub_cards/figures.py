"""The pictures on the cards, small PNGs drawn without a display."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .cards import SPLITS, label


# Inches of a panel, and dots per inch: 528 by 326 pixels, some fifteen kilobytes.
SIZE = (4.8, 2.96)
RESOLUTION = 110
# Points of a scatter: more only paint it black.
MAXIMUM_POINTS = 5_000


def draw_training(path: str | os.PathLike, log: dict) -> None:
    """
    The curves of a training: the loss, and the metric that evaluations were compared by, the best of them marked.
    Nothing is drawn where nothing was logged.

    Args:
        path (`str` or `os.PathLike`): The PNG file to write.
        log (`dict`): `history`, entries with `epoch`, `loss` and `evaluation`, as far as there are any; `metric`,
            `best_epoch` and `best_value`, `None` without an evaluation; `split`, what was evaluated on.
    """
    history, metric = log["history"], log["metric"]
    held_out = log["split"] if log["split"] in SPLITS else "held-out data"
    curves = {
        "training loss": _points(history, lambda row: row.get("loss")),
        f"loss on {held_out}": _points(history, lambda row: row.get("evaluation", {}).get("loss")),
    }
    panels = [{name: points for name, points in curves.items() if points[0]}]
    if metric not in (None, "loss"):
        panels.append(
            {f"{label(metric)} on {held_out}": _points(history, lambda row: row.get("evaluation", {}).get(metric))}
        )
    panels = [panel for panel in panels if panel]
    if not panels:
        return
    figure = _figure(len(panels))
    for axes, panel in zip(_panels(figure, len(panels)), panels):
        for place, (name, (epochs, values)) in enumerate(panel.items()):
            axes.plot(epochs, values, color=f"C{place}", marker="." if len(epochs) < 30 else None, label=name)
        if panel is panels[-1] and metric is not None:
            axes.plot(log["best_epoch"], log["best_value"], "o", mfc="none", ms=9, color="C3", label="best")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    _save(figure, path)


def draw_results(path: str | os.PathLike, results: dict[str, float], intervals: dict, metric: str) -> None:
    """
    One bar per model with its interval.

    Args:
        path (`str` or `os.PathLike`): The PNG file to write.
        results (`dict[str, float]`): The metric by the model's name.
        intervals (`dict[str, Sequence[float]]`): Lower and upper end of the interval, by the model's name.
        metric (`str`): How the metric is called.
    """
    figure = Figure(figsize=(SIZE[0], 0.9 + 0.32 * len(results)), dpi=RESOLUTION, layout="constrained")
    axes = figure.subplots()
    for place, (name, value) in enumerate(results.items()):
        axes.barh(place, value, color=f"C{place % 10}", alpha=0.8)
        low, high = intervals[name]
        axes.errorbar(value, place, xerr=[[max(value - low, 0)], [max(high - value, 0)]], color="black", capsize=3)
    axes.set_yticks(range(len(results)), [name if len(name) < 32 else f"{name[:30]}…" for name in results])
    axes.invert_yaxis()
    axes.set_xlabel(metric)
    axes.grid(axis="x", alpha=0.3)
    _save(figure, path)


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
    axes.legend(fontsize="small")
    _save(figure, path)


def draw_fusion_weights(path: str | os.PathLike, frequencies: np.ndarray, weights: dict[str, np.ndarray]) -> None:
    """
    The share of each source in the vectors of items, over how often training saw the items.

    Args:
        path (`str` or `os.PathLike`): The PNG file to write.
        frequencies (`np.ndarray` of shape `(points,)`): Occurrences in training, in ascending order.
        weights (`dict[str, np.ndarray]` of shape `(points,)` each): Weight by source, summing to one at every point.
    """
    figure, axes = _axes("occurrences in training", "fusion weight")
    for name, values in weights.items():
        axes.plot(frequencies, values, marker="." if len(frequencies) < 30 else None, label=name)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_ylim(0, 1)
    axes.legend(fontsize="small")
    _save(figure, path)


def draw_code_use(path: str | os.PathLike, codes: dict[str, np.ndarray], codebook_size: int) -> None:
    """
    How many items chose each code, most frequent first: one panel per modality, one line per level.

    Args:
        path (`str` or `os.PathLike`): The PNG file to write.
        codes (`dict[str, np.ndarray]` of shape `(items + 1, num_quantizers)` each):
            Codes by modality, -1 for items without the modality.
        codebook_size (`int`): Codes per level.
    """
    figure = _figure(len(codes))
    for panel, (modality, values) in zip(_panels(figure, len(codes)), codes.items()):
        for level, column in enumerate(values[values[:, 0] >= 0].T, start=1):
            panel.plot(np.sort(np.bincount(column, minlength=codebook_size))[::-1], label=f"level {level}")
        panel.set(title=modality, xlabel="code, most frequent first", ylabel="items", ylim=(0, None))
        panel.legend(fontsize="small")
    _save(figure, path)


def draw_distances(
    path: str | os.PathLike, distances: dict[str, tuple[np.ndarray, np.ndarray]], titles: dict[str, str]
) -> None:
    """
    Distances after quantization over distances before it: one panel per modality, with at most 5,000 evenly spaced
    pairs of items.

    Args:
        path (`str` or `os.PathLike`): The PNG file to write.
        distances (`dict[str, tuple[np.ndarray, np.ndarray]]` of shape `(pairs,)` each):
            Distances before and after, by modality.
        titles (`dict[str, str]`): What stands above each panel.
    """
    figure = _figure(len(distances))
    for panel, (modality, (before, after)) in zip(_panels(figure, len(distances)), distances.items()):
        spaced = np.linspace(0, len(before) - 1, min(len(before), MAXIMUM_POINTS)).astype(np.int64)
        panel.scatter(before[spaced], after[spaced], s=3, alpha=0.3, linewidths=0)
        panel.set(title=titles[modality], xlabel="distance of embeddings", ylabel="distance of quantized vectors")
    _save(figure, path)


def _points(history: list[dict], value_of: Callable[[dict], float | None]) -> tuple[list[float], list[float]]:
    """Epochs and values of the entries that have the value."""
    found = [(row["epoch"], value) for row in history if (value := value_of(row)) is not None]
    return [epoch for epoch, _ in found], [value for _, value in found]


def _figure(panels: int = 1) -> Figure:
    return Figure(figsize=(SIZE[0] * panels, SIZE[1]), dpi=RESOLUTION, layout="constrained")


def _panels(figure: Figure, count: int) -> np.ndarray:
    return figure.subplots(1, count, squeeze=False)[0]


def _axes(x_label: str, y_label: str):
    figure = _figure()
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Figure, path: str | os.PathLike) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    # Without the version of the library in the file: the same figures give the same bytes.
    figure.savefig(path, format="png", metadata={"Software": None})
