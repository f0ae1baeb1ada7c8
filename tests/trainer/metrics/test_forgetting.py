"""Kendall's tau against a count of all pairs."""

import itertools
import math

import numpy as np
import pytest

from mmesid.trainer.metrics.forgetting.forgetting import kendall_tau

from .conftest import load


def counted_tau(before, after) -> float:
    concordant = discordant = before_ties = after_ties = 0
    for (a, b), (c, d) in itertools.combinations(zip(before, after), 2):
        product = (a - c) * (b - d)
        concordant += product > 0
        discordant += product < 0
        before_ties += a == c
        after_ties += b == d
    pairs = len(before) * (len(before) - 1) / 2
    return (concordant - discordant) / math.sqrt((pairs - before_ties) * (pairs - after_ties))


@pytest.mark.parametrize("levels", [1000, 4])
def test_tau_equals_a_count_of_pairs_with_ties_and_without(levels):
    generator = np.random.default_rng(0)
    before = generator.integers(levels, size=60).astype(float)
    after = before + generator.integers(levels, size=60)
    assert kendall_tau(before, after) == pytest.approx(counted_tau(before, after))
    assert kendall_tau(before, before) == pytest.approx(1)
    assert kendall_tau(before, -before) == pytest.approx(-1)
    assert math.isnan(kendall_tau(before, np.zeros(60)))


def test_tau_is_the_mean_of_the_groups_and_pooled_is_over_all_pairs():
    metric = load("forgetting")
    groups = {
        3: ([1.0, 2.0, 3.0], [1.0, 3.0, 2.0]),
        8: ([1.0, 5.0], [2.0, 2.0]),
        9: ([4.0], [4.0]),
        11: ([2.0, 2.0], [0.0, 1.0]),
    }
    # Out of order, and the second group in two batches.
    metric.add_batch(groups=[8, 3], before=[1.0, 1.0], after=[2.0, 1.0])
    metric.add_batch(
        groups=[3, 3, 8, 9, 11, 11], before=[2.0, 3.0, 5.0, 4.0, 2.0, 2.0], after=[3.0, 2.0, 2.0, 4.0, 0.0, 1.0]
    )
    values = metric.compute()
    # Group 8 cannot be ordered any more, which counts 0; 9 and 11 had no order to lose.
    assert values["tau"] == pytest.approx((counted_tau(*groups[3]) + 0) / 2)
    flat = [sum((list(group[side]) for group in groups.values()), []) for side in (0, 1)]
    assert values["tau_pooled"] == pytest.approx(counted_tau(*flat))
