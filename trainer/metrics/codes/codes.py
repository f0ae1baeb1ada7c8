"""Health of semantic IDs, as an `evaluate` module that is fed batch by batch."""

import datasets
import evaluate
import numpy as np


_DESCRIPTION = """
How well items are spread over codes: for every level the share of codes in use, the number of dead ones and the
perplexity of their frequencies, and the share of items whose whole ID another item has as well.
"""

_INPUTS = """
Args:
    codes (`list[list[int]]`): The codes of each item, one per level, from 0. To look at the ID that several modalities
        make together, give their codes one after the other.
    codebook_size (`int`): Codes that a level chooses from.
Returns:
    `dict[str, float]` with `use@l` (from 0 to 1), `dead@l` (a number of codes) and `perplexity@l` (from 1 to
    `codebook_size`) for every level l from 1, and `collisions` (from 0 to 1): the share of items that are not alone
    with their ID.
Examples:
    >>> metric = evaluate.load("trainer/metrics/codes")
    >>> metric.add_batch(codes=[[0, 1], [1, 1], [1, 1]])
    >>> metric.compute(codebook_size=2)
    {'use@1': 1.0, 'dead@1': 0, 'perplexity@1': 1.889881574842309, 'use@2': 0.5, 'dead@2': 1, 'perplexity@2': 1.0,
    'collisions': 0.6666666666666666}
"""  # fmt: skip


def collisions(codes: np.ndarray) -> float:
    """Share of the items, `(items, levels)`, that are not alone with their codes."""
    _, owners = np.unique(codes, axis=0, return_counts=True)
    return float(owners[owners > 1].sum() / len(codes))


def code_health(codes: np.ndarray, codebook_size: int) -> dict[str, float]:
    """What the metric returns, for `(items, levels)` codes that are at hand whole."""
    if codes.min() < 0 or codes.max() >= codebook_size:
        wrong = codes.min() if codes.min() < 0 else codes.max()
        raise ValueError(f"A code is {wrong}; codes go from 0 to {codebook_size - 1}.")
    metrics = {}
    for level, column in enumerate(codes.T, start=1):
        counts = np.bincount(column, minlength=codebook_size)
        shares = counts[counts > 0] / len(column)
        metrics[f"use@{level}"] = len(shares) / codebook_size
        metrics[f"dead@{level}"] = codebook_size - len(shares)
        metrics[f"perplexity@{level}"] = float(np.exp(-(shares * np.log(shares)).sum()))
    return metrics | {"collisions": collisions(codes)}


class Codes(evaluate.Metric):
    """Use `metric.add_batch(codes=...)` as often as needed, then `metric.compute(codebook_size=...)`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            inputs_description=_INPUTS,
            citation="",
            features=datasets.Features({"codes": datasets.Sequence(datasets.Value("int64"))}),
        )

    def _compute(self, codes, codebook_size: int) -> dict[str, float]:
        return code_health(np.asarray(codes, dtype=np.int64), codebook_size)
