"""Ranking metrics against values by hand."""

import numpy as np
import pytest

from .conftest import load


def test_values_by_hand():
    metric = load("ranking")
    metric.add_batch(ranks=[1, 2, 5])
    metric.add_batch(ranks=[6, 1000])
    values = metric.compute(cutoffs=[1, 5])
    assert values["hr@1"] == pytest.approx(1 / 5)
    assert values["hr@5"] == pytest.approx(3 / 5)
    assert values["ndcg@5"] == pytest.approx((1 + 1 / np.log2(3) + 1 / np.log2(6)) / 5)
    assert values["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 5 + 1 / 6 + 1 / 1000) / 5)


def test_ranks_start_at_one():
    with pytest.raises(ValueError, match="ranks start at 1"):
        load("ranking").compute(ranks=[0, 1])
