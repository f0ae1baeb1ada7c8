"""How many directions a table of vectors really uses, as an `evaluate` module that is fed batch by batch."""

import datasets
import evaluate
import numpy as np


_DESCRIPTION = """
Collapse of embeddings, seen in the singular values s of a table: information abundance sum(s) / max(s), effective rank
exp(entropy of s / sum(s)), and the share of dimensions whose singular value is under 1% of the largest. A table that
uses all its d dimensions alike has abundance d, rank d and share 0; one whose rows lie on a line has 1, 1 and 1 - 1/d.
"""

_INPUTS = """
Args:
    embeddings (`list[list[float]]`): Rows of the table, without padding.
Returns:
    `dict[str, float]` with `information_abundance` and `effective_rank` (from 1 to the number of dimensions) and
    `collapsed_dimensions` (from 0 to 1).
Examples:
    >>> metric = evaluate.load("trainer/metrics/collapse")
    >>> metric.add_batch(embeddings=[[1.0, 0.0], [0.0, 1.0]])
    >>> metric.compute()
    {'information_abundance': 2.0, 'effective_rank': 2.0, 'collapsed_dimensions': 0.0}
"""

_CITATION = """
@inproceedings{guo2024embedding, title={On the Embedding Collapse When Scaling up Recommendation Models}, author={Guo,
Xingzhuo and Pan, Junwei and Wang, Ximei and Chen, Baixu and Jiang, Jie and Long, Mingsheng}, booktitle={International
Conference on Machine Learning}, year={2024}}
@inproceedings{roy2007effective, title={The effective rank: A measure of effective dimensionality}, author={Roy,
Olivier and Vetterli, Martin}, booktitle={European Signal Processing Conference}, year={2007}}
"""

# Below this share of the largest singular value a dimension counts as collapsed.
COLLAPSED = 0.01


def singular_values(embeddings: np.ndarray) -> np.ndarray:
    """Singular values `(dimensions,)` of an `(items, dimensions)` table, largest first; what is under a ten-millionth
    of the largest is rounding."""
    # From the Gram matrix: memory grows with the square of the dimensions, whatever the number of items.
    embeddings = embeddings.astype(np.float64)
    return np.sqrt(np.clip(np.linalg.eigvalsh(embeddings.T @ embeddings), 0, None))[::-1]


def collapse_metrics(values: np.ndarray) -> dict[str, float]:
    """What the metric returns, from singular values, `(dimensions,)`, largest first."""
    if values[0] == 0:
        raise ValueError("All embeddings are zero; a table without any direction has no spectrum.")
    shares = values / values.sum()
    positive = shares[shares > 0]
    return {
        "information_abundance": float(values.sum() / values[0]),
        "effective_rank": float(np.exp(-(positive * np.log(positive)).sum())),
        "collapsed_dimensions": float((values < COLLAPSED * values[0]).mean()),
    }


class Collapse(evaluate.Metric):
    """Use `metric.add_batch(embeddings=...)` as often as needed, then `metric.compute()`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            inputs_description=_INPUTS,
            citation=_CITATION,
            features=datasets.Features({"embeddings": datasets.Sequence(datasets.Value("float64"))}),
        )

    def _compute(self, embeddings) -> dict[str, float]:
        return collapse_metrics(singular_values(np.asarray(embeddings)))
