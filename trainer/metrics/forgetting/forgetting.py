"""What is left of the distances between items, as an `evaluate` module that is fed batch by batch."""

import datasets
import evaluate
import numpy as np


_DESCRIPTION = """
Kendall's tau (the variant b, which accounts for ties) between distances before and after a change of representation,
such as from an item's target to the items of the history, in the original embedding and after quantization. 1: the
order of the distances is the same; 0: nothing is left of it.
"""

_INPUTS = """
Args:
    groups (`list[int]`): Which user (or other group) a pair of items belongs to.
    before (`list[float]`): The distance of the pair before.
    after (`list[float]`): The distance of the same pair afterwards.
Returns:
    `dict[str, float]` with `tau`, the mean over the groups of the tau within each (groups whose distances before are
    all the same, or of fewer than two pairs, are left out; a group whose distances are all the same afterwards counts
    0), and `tau_pooled`, the tau over all pairs, of which at most 20,000 evenly spaced ones are looked at. Both are
    nan if no group is left.
Examples:
    >>> metric = evaluate.load("trainer/metrics/forgetting")
    >>> metric.add_batch(groups=[0, 0, 0], before=[1.0, 2.0, 3.0], after=[1.0, 3.0, 2.0])
    >>> metric.compute()
    {'tau': 0.3333333333333333, 'tau_pooled': 0.3333333333333333}
"""

_CITATION = """
@article{kendall1938new, title={A new measure of rank correlation}, author={Kendall, Maurice G.}, journal={Biometrika},
year={1938}}
"""

# Every pair of distances is compared with every other: 20,000 of them take two seconds.
MAXIMUM_POOLED = 20_000


def kendall_tau(before: np.ndarray, after: np.ndarray) -> float:
    """Kendall's tau-b of two `(n,)` arrays; nan if either is constant. Takes n^2 time and n memory."""
    concordant = before_ties = after_ties = 0.0
    n = len(before)
    step = max(2**22 // max(n, 1), 1)
    for start in range(0, n, step):
        left = np.sign(before[start : start + step, None] - before[None]).astype(np.float32)
        right = np.sign(after[start : start + step, None] - after[None]).astype(np.float32)
        concordant += float((left * right).sum(dtype=np.float64))
        before_ties += float((left * left).sum(dtype=np.float64))
        after_ties += float((right * right).sum(dtype=np.float64))
    return concordant / np.sqrt(before_ties * after_ties) if before_ties and after_ties else float("nan")


def group_taus(groups: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Tau `(groups left,)` within each group that has an order to lose, in the order of the groups' numbers; 0 for
    one whose distances are all the same afterwards."""
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order])) + 1
    taus = []
    for members in np.split(order, starts):
        if len(members) > 1 and np.ptp(before[members]) > 0:
            tau = kendall_tau(before[members], after[members])
            taus.append(0.0 if np.isnan(tau) else tau)
    return np.array(taus)


def mean_tau(groups: np.ndarray, before: np.ndarray, after: np.ndarray) -> float:
    """The metric's `tau`, for arrays that are at hand whole: feeding them to the metric costs more than the taus."""
    taus = group_taus(groups, before, after)
    return float(taus.mean()) if len(taus) else float("nan")


def pooled_tau(before: np.ndarray, after: np.ndarray) -> float:
    """The metric's `tau_pooled`."""
    spaced = np.linspace(0, len(before) - 1, min(len(before), MAXIMUM_POOLED)).astype(np.int64)
    return kendall_tau(before[spaced], after[spaced])


class Forgetting(evaluate.Metric):
    """Use `metric.add_batch(groups=..., before=..., after=...)` as often as needed, then `metric.compute()`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            inputs_description=_INPUTS,
            citation=_CITATION,
            features=datasets.Features(
                {
                    "groups": datasets.Value("int64"),
                    "before": datasets.Value("float32"),
                    "after": datasets.Value("float32"),
                }
            ),
        )

    def _compute(self, groups, before, after) -> dict[str, float]:
        groups, before, after = np.asarray(groups), np.asarray(before), np.asarray(after)
        return {"tau": mean_tau(groups, before, after), "tau_pooled": pooled_tau(before, after)}
