from pathlib import Path

import evaluate
import numpy as np
import pytest

from mmesid.trainer.metrics.ranking.ranking import Ranking


FOLDER = Path(__file__).parents[3] / "trainer" / "metrics" / "ranking"


def test_batches_add_up_to_the_whole():
    ranks = np.random.default_rng(0).integers(1, 60, size=101)
    batched, whole = Ranking(keep_in_memory=True), Ranking(keep_in_memory=True)
    for batch in np.array_split(ranks, 7):
        batched.add_batch(ranks=batch)
    whole.add_batch(ranks=ranks)
    assert batched.compute() == whole.compute()


def test_values_by_hand():
    metric = Ranking(keep_in_memory=True)
    metric.add_batch(ranks=[1, 2, 5, 6, 1000])
    values = metric.compute(cutoffs=[1, 5])
    assert values["hr@1"] == pytest.approx(1 / 5)
    assert values["hr@5"] == pytest.approx(3 / 5)
    assert values["ndcg@5"] == pytest.approx((1 + 1 / np.log2(3) + 1 / np.log2(6)) / 5)
    assert values["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 5 + 1 / 6 + 1 / 1000) / 5)


def test_loads_as_an_evaluate_module_from_its_folder(tmp_path):
    metric = evaluate.load(str(FOLDER), keep_in_memory=True, cache_dir=str(tmp_path))
    metric.add_batch(ranks=[1, 3, 40])
    assert metric.compute(cutoffs=[5]) == pytest.approx(
        {"hr@5": 2 / 3, "ndcg@5": 0.5, "mrr": (1 + 1 / 3 + 1 / 40) / 3}
    )


def test_ranks_start_at_one():
    metric = Ranking(keep_in_memory=True)
    metric.add_batch(ranks=[0, 1])
    with pytest.raises(ValueError, match="ranks start at 1"):
        metric.compute()
