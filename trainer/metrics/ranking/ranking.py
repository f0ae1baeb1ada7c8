"""Full-ranking metrics with one target per user, as an `evaluate` module that is fed batch by batch."""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np


_DESCRIPTION = """
Hit rate and normalised discounted cumulative gain at several cut-offs and the mean reciprocal rank, for one target a
user. With a single target HR@k equals Recall@k and nDCG@k is 1 / log2(1 + rank) for ranks up to k.
"""

_INPUTS = """
Args:
    ranks (`list[int]`): Rank of each user's target in the whole catalogue, from 1.
    cutoffs (`list[int]`, *optional*, defaults to `[5, 10, 20]`): The values of k.
Returns:
    `dict[str, float]` with `hr@k` and `ndcg@k` for every k, and `mrr`.
Examples:
    >>> metric = evaluate.load("trainer/metrics/ranking")
    >>> metric.add_batch(ranks=[1, 3, 40])
    >>> metric.compute(cutoffs=[5])
    {'hr@5': 0.6666666666666666, 'ndcg@5': 0.5, 'mrr': 0.45277777777777778}
"""

_CITATION = """
@article{jarvelin2002cumulated, title={Cumulated gain-based evaluation of {IR} techniques}, author={J{\\"a}rvelin,
Kalervo and Kek{\\"a}l{\\"a}inen, Jaana}, journal={ACM Transactions on Information Systems}, year={2002}}
"""


CUTOFFS = (5, 10, 20)


def user_values(ranks: np.ndarray, cutoffs: Sequence[int] = CUTOFFS) -> dict[str, np.ndarray]:
    """What each user, `(users,)`, contributes to `hr@k`, `ndcg@k` and `mrr`, the means over users; `ranks` are
    `(users,)`, from 1, the cutoffs the values of k."""
    ranks = np.asarray(ranks, dtype=np.float64)
    if len(ranks) and ranks.min() < 1:
        raise ValueError(f"A rank is {ranks.min():.0f}; ranks start at 1.")
    values = {}
    for k in cutoffs:
        hit = ranks <= k
        values[f"hr@{k}"] = hit.astype(np.float64)
        values[f"ndcg@{k}"] = hit / np.log2(ranks + 1)
    return values | {"mrr": 1 / ranks}


def metrics(ranks: np.ndarray, cutoffs: Sequence[int] = CUTOFFS) -> dict[str, float]:
    """Means over users of [`user_values`]: what the metric returns, for ranks that are at hand whole."""
    return {name: float(values.mean()) for name, values in user_values(ranks, cutoffs).items()}


class Ranking(evaluate.Metric):
    """Use `metric.add_batch(ranks=...)` as often as needed, then `metric.compute()`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            inputs_description=_INPUTS,
            citation=_CITATION,
            features=datasets.Features({"ranks": datasets.Value("int64")}),
        )

    def _compute(self, ranks, cutoffs=CUTOFFS) -> dict[str, float]:
        return metrics(ranks, cutoffs)
