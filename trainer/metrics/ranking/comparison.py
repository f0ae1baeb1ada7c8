"""Whether one model ranks better than another for the same users, or happens to."""

import numpy as np
from tqdm.auto import tqdm


# Counts of drawn users held at a time: 64 MiB.
COUNTS_PER_BLOCK = 2**23


def paired_bootstrap(differences: np.ndarray, seed: int = 0, resamples: int = 10_000) -> tuple[np.ndarray, np.ndarray]:
    """
    Interval and significance of mean differences between two models on the same users, by a paired bootstrap over
    users ([Koehn, 2004](https://aclanthology.org/W04-3250)): what other draws of as many users would have given. It
    says nothing of another seed of the training.

    Args:
        differences (`np.ndarray` of shape `(users, comparisons)`): What one model's metric is above the other's for
            each user, a comparison in each column; all columns are drawn together.
        seed (`int`, *optional*, defaults to 0): Seed of the draws.
        resamples (`int`, *optional*, defaults to 10000): Draws of all users.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: The 95% percentile interval `(comparisons, 2)` of each mean, and the two-sided
        p-value `(comparisons,)` of no difference: twice the share of draws on the other side of 0 or on it, the
        observed one among them, so that it is never 0.
    """
    users, comparisons = differences.shape
    # Of the users to whom no comparison makes a difference, most of them, it only counts how many are drawn.
    decisive = differences[(differences != 0).any(axis=1)]
    generator = np.random.default_rng(seed)
    drawn = generator.binomial(users, len(decisive) / users, size=resamples)
    means = np.empty((resamples, comparisons))
    step = max(COUNTS_PER_BLOCK // max(len(decisive), 1), 1)
    for start in tqdm(range(0, resamples, step), desc="Paired bootstrap", unit="block", leave=False, delay=2):
        counts = [
            np.bincount(generator.integers(max(len(decisive), 1), size=size), minlength=len(decisive))
            for size in drawn[start : start + step]
        ]
        means[start : start + step] = np.stack(counts).astype(np.float64) @ decisive / users
    intervals = np.quantile(means, [0.025, 0.975], axis=0).T
    other_side = np.minimum((means <= 0).sum(0), (means >= 0).sum(0))
    return intervals, np.minimum(2 * (other_side + 1) / (resamples + 1), 1.0)


def holm(p_values: np.ndarray) -> np.ndarray:
    """P-values `(tests,)` corrected for there being several
    ([Holm, 1979](https://www.jstor.org/stable/4615733)): if none of the differences is real, any of them falls below a
    level at most that often."""
    order = np.argsort(p_values, kind="stable")
    corrected = np.empty(len(p_values))
    factors = len(p_values) - np.arange(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(p_values[order] * factors), 1)
    return corrected
