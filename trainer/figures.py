"""Pictures that a stage draws beside its checkpoint, for the card."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure


# Points of a scatter: more only paint it black.
MAXIMUM_POINTS = 5_000


def draw_code_use(path: Path, codes: dict[str, torch.Tensor], codebook_size: int) -> None:
    """
    How many items chose each code, most frequent first: one panel a modality, one line a level.

    Args:
        path (`Path`): The PNG file.
        codes (`dict[str, torch.Tensor]` of shape `(items + 1, num_quantizers)` a modality):
            Codes, -1 for items without the modality.
        codebook_size (`int`): Codes a level chooses from.
    """
    figure = Figure(figsize=(4.5 * len(codes), 3.5), layout="constrained")
    for panel, (modality, values) in zip(_panels(figure, len(codes)), codes.items()):
        for level, column in enumerate(values[values[:, 0] >= 0].numpy().T, start=1):
            panel.plot(np.sort(np.bincount(column, minlength=codebook_size))[::-1], label=f"level {level}")
        panel.set(title=modality, xlabel="code, most frequent first", ylabel="items", ylim=(0, None))
        panel.legend()
    figure.savefig(path, dpi=120)


def draw_distances(path: Path, distances: dict[str, tuple[np.ndarray, np.ndarray]], titles: dict[str, str]) -> None:
    """
    Distances after quantization over those before: one panel a modality, at most 5,000 evenly spaced pairs of items.

    Args:
        path (`Path`): The PNG file.
        distances (`dict[str, tuple[np.ndarray, np.ndarray]]` of shape `(pairs,)` each):
            Distances before and after, by modality.
        titles (`dict[str, str]`): What stands above each panel.
    """
    figure = Figure(figsize=(4.5 * len(distances), 4), layout="constrained")
    for panel, (modality, (before, after)) in zip(_panels(figure, len(distances)), distances.items()):
        spaced = np.linspace(0, len(before) - 1, min(len(before), MAXIMUM_POINTS)).astype(np.int64)
        panel.scatter(before[spaced], after[spaced], s=3, alpha=0.3, linewidths=0)
        panel.set(title=titles[modality], xlabel="distance of embeddings", ylabel="distance of quantized vectors")
    figure.savefig(path, dpi=120)


def _panels(figure: Figure, count: int) -> np.ndarray:
    return figure.subplots(1, count, squeeze=False)[0]
