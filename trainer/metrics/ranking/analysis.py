"""What lies behind a mean over users: how sure it is, and whom it serves."""

import numpy as np
from tqdm.auto import tqdm

from .ranking import metrics, user_values


# Pareto's rule: the fifth of the items with the most training interactions is the head.
HEAD_SHARE = 0.2
# First and last length of every group of histories.
HISTORY_LENGTHS = ((1, 5), (6, 10), (11, 20), (21, 50), (51, None))
# First and last number of training interactions of every group of items.
OCCURRENCES = ((0, 0), (1, 5), (6, 10), (11, 20), (21, 50), (51, None))

# Counts of resampled ranks held at a time: 64 MiB.
COUNTS_PER_BLOCK = 2**23


def confidence_intervals(ranks: np.ndarray, seed: int = 0, resamples: int = 1000) -> dict[str, list[float]]:
    """The 95% interval `[low, high]` of every metric of `ranks` `(users,)`, by a percentile bootstrap over users
    ([Efron, 1979](https://doi.org/10.1214/aos/1176344552)): what another draw of as many users would have given. It
    says nothing of another seed of the training."""
    # Equal ranks are drawn together, by how often each occurs: the same distribution as drawing user by user.
    distinct, counts = np.unique(ranks, return_counts=True)
    values = user_values(distinct)
    table = np.stack(list(values.values()), axis=1)
    generator = np.random.default_rng(seed)
    step = max(COUNTS_PER_BLOCK // len(distinct), 1)
    means = np.concatenate(
        [
            generator.multinomial(len(ranks), counts / len(ranks), size=min(step, resamples - start)) @ table
            for start in tqdm(range(0, resamples, step), desc="Bootstrap", unit="block", leave=False, delay=2)
        ]
    ) / len(ranks)
    bounds = np.quantile(means, [0.025, 0.975], axis=0)
    return {name: bounds[:, column].tolist() for column, name in enumerate(values)}


def frequency_groups(frequencies: np.ndarray) -> np.ndarray:
    """Group `(items + 1,)` of every item by its training interactions `(items + 1,)`: `"cold"` has none, `"head"` is
    among the `HEAD_SHARE` of the items that have the most (with all that have as many as the last of them), `"tail"`
    is the rest; row 0 means nothing."""
    descending = np.sort(frequencies[1:])[::-1]
    threshold = descending[int(np.ceil(HEAD_SHARE * len(descending))) - 1]
    return np.where(frequencies == 0, "cold", np.where(frequencies >= threshold, "head", "tail"))


def metrics_by_frequency(ranks: np.ndarray, targets: np.ndarray, frequencies: np.ndarray) -> dict[str, dict]:
    """Users and metrics of `ranks` `(users,)` by the group of the target, of [`frequency_groups`]; `targets` are rows,
    `(users,)`, and groups without a user are left out."""
    groups = frequency_groups(frequencies)[targets]
    return _grouped(ranks, {name: groups == name for name in ("cold", "tail", "head")})


def metrics_by_occurrences(ranks: np.ndarray, occurrences: np.ndarray) -> dict[str, dict]:
    """The same by the training interactions of each target, `occurrences` `(users,)`."""
    return _grouped(ranks, _ranges(OCCURRENCES, occurrences))


def metrics_by_history_length(ranks: np.ndarray, lengths: np.ndarray) -> dict[str, dict]:
    """The same by the number of items in each history, `lengths` `(users,)`."""
    return _grouped(ranks, _ranges(HISTORY_LENGTHS, lengths))


def _ranges(ranges: tuple, values: np.ndarray) -> dict[str, np.ndarray]:
    return {
        str(first) if first == last else f"{first}+" if last is None else f"{first}-{last}": (values >= first)
        & (values <= (np.inf if last is None else last))
        for first, last in ranges
    }


def _grouped(ranks: np.ndarray, groups: dict[str, np.ndarray]) -> dict[str, dict]:
    return {
        name: {"users": int(inside.sum())} | metrics(ranks[inside]) for name, inside in groups.items() if inside.any()
    }
