import numpy as np
import pytest
from scipy.stats import bootstrap, ttest_1samp

from mmesid.trainer.metrics.ranking.comparison import holm, paired_bootstrap


def test_interval_is_that_of_another_implementation():
    """Most users differ in nothing, as they do where both models miss."""
    random = np.random.default_rng(0)
    differences = random.normal(0.05, 0.3, size=(500, 2)) * (random.random((500, 1)) < 0.3)
    intervals, _ = paired_bootstrap(differences, resamples=4000)
    expected = bootstrap((differences,), np.mean, n_resamples=4000, method="percentile", rng=random)
    np.testing.assert_allclose(intervals, np.stack(expected.confidence_interval, axis=1), atol=0.003)


def test_p_values_are_near_those_of_a_t_test_and_uniform_without_a_difference():
    random = np.random.default_rng(1)
    real = random.normal(0.02, 0.3, size=(800, 3))
    np.testing.assert_allclose(paired_bootstrap(real)[1], ttest_1samp(real, 0).pvalue, atol=0.02)
    _, p_values = paired_bootstrap(random.normal(0, 0.3, size=(300, 200)), resamples=1000)
    assert 0.02 <= np.mean(p_values < 0.05) <= 0.1


def test_the_sign_decides_nothing_and_equal_models_differ_in_nothing():
    differences = np.random.default_rng(2).normal(0.1, 0.5, size=(200, 1))
    (interval,), p = paired_bootstrap(differences, resamples=500)
    (mirrored,), same = paired_bootstrap(-differences, resamples=500)
    np.testing.assert_allclose(mirrored, -interval[::-1])
    assert p == same >= 2 / 501
    intervals, p = paired_bootstrap(np.zeros((50, 2)), resamples=100)
    assert not intervals.any() and (p == 1).all()


@pytest.mark.parametrize(
    ("p_values", "corrected"),
    [
        # By hand: .005 x 4, then the largest so far of .01 x 3, .03 x 2, .04 x 1.
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.5, 0.9], [1.0, 1.0]),
        ([0.2], [0.2]),
        ([], []),
    ],
)
def test_holm_by_hand(p_values, corrected):
    np.testing.assert_allclose(holm(np.array(p_values)), corrected)
