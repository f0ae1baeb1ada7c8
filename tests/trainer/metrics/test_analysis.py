import numpy as np
import pytest
from tqdm import tqdm

from mmesid.trainer.metrics.ranking import analysis
from mmesid.trainer.metrics.ranking.analysis import (
    confidence_intervals,
    frequency_groups,
    metrics,
    metrics_by_frequency,
    metrics_by_history_length,
)


def test_interval_is_that_of_drawing_user_by_user():
    """Against the bootstrap as it is told: draw users with replacement, take the mean, a thousand times."""
    random = np.random.default_rng(0)
    ranks = random.integers(1, 40, size=400)
    draws = ranks[random.integers(0, len(ranks), size=(4000, len(ranks)))]
    expected = np.quantile((draws <= 10).mean(1), [0.025, 0.975])
    np.testing.assert_allclose(confidence_intervals(ranks, resamples=4000)["hr@10"], expected, atol=0.006)


def test_interval_covers_the_truth_as_often_as_it_says():
    """Coin flips with a known chance: about 95 of 100 samples' intervals hold it."""
    random = np.random.default_rng(1)
    samples = np.where(random.random((200, 500)) < 0.3, 1, 100)
    intervals = [confidence_intervals(ranks, resamples=300)["hr@5"] for ranks in samples]
    assert 0.9 <= np.mean([low <= 0.3 <= high for low, high in intervals]) <= 0.99


def test_intervals_follow_the_seed_and_shrink_with_users():
    ranks = np.random.default_rng(2).integers(1, 60, size=300)
    assert confidence_intervals(ranks, seed=3) == confidence_intervals(ranks, seed=3)
    assert confidence_intervals(ranks, seed=3) != confidence_intervals(ranks, seed=4)
    low, high = confidence_intervals(ranks)["ndcg@20"]
    many_low, many_high = confidence_intervals(np.tile(ranks, 16))["ndcg@20"]
    assert many_high - many_low == pytest.approx((high - low) / 4, rel=0.2)


def test_long_draws_show_how_far_they_are(monkeypatch, capsys):
    ranks = np.arange(1, 101)
    confidence_intervals(ranks)
    assert "Bootstrap" not in capsys.readouterr().err, "it took no two seconds"
    monkeypatch.setattr(analysis, "COUNTS_PER_BLOCK", 100 * 50)
    monkeypatch.setattr(
        analysis, "tqdm", lambda blocks, **settings: tqdm(blocks, **settings | {"delay": 0, "mininterval": 0})
    )
    confidence_intervals(ranks, resamples=120)
    printed = capsys.readouterr().err
    assert "Bootstrap" in printed and "2/3" in printed


@pytest.mark.parametrize(
    ("frequencies", "groups"),
    [
        # Twenty items: the fourth of the most frequent has 6, as has the fifth.
        ([0, 0, 9, 8, 7, 6, 6, *[2] * 13], ["cold"] * 2 + ["head"] * 5 + ["tail"] * 13),
        ([0] * 5, ["cold"] * 5),
    ],
)
def test_frequency_groups_by_hand(frequencies, groups):
    assert frequency_groups(np.array([99, *frequencies]))[1:].tolist() == groups


def test_groups_hold_their_users():
    frequencies = np.array([0, 0, 5, 1, 1, 1])
    ranks, targets = np.array([1, 2, 30, 4]), np.array([2, 2, 1, 3])
    by_frequency = metrics_by_frequency(ranks, targets, frequencies)
    assert by_frequency["head"] == {"users": 2} | metrics(ranks[:2])
    assert by_frequency["cold"] == {"users": 1} | metrics(ranks[2:3])
    assert by_frequency["tail"]["hr@5"] == 1.0
    by_length = metrics_by_history_length(ranks, np.array([5, 6, 51, 1000]))
    assert {name: group["users"] for name, group in by_length.items()} == {"1-5": 1, "6-10": 1, "51+": 2}
