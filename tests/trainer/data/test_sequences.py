"""Filter, order and split, against slow computations of the same thing."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.sequences import build_sequences, k_core
from trainer.data.source import Interactions


def interactions_of(pairs: list[tuple[int, int]], times: list[int] | None = None, num_users: int = 12) -> Interactions:
    pairs_array = np.array(pairs, dtype=np.int32).reshape(-1, 2)
    return Interactions(
        user_ids=[f"u{user}" for user in range(num_users)],
        users=pairs_array[:, 0],
        items=pairs_array[:, 1],
        times=np.arange(len(pairs)) if times is None else np.array(times, dtype=np.int64),
    )


def one_at_a_time_core(pairs: list[tuple[int, int]], min_user: int, min_item: int) -> list[bool]:
    """Removes one interaction of an offender at a time until there is no offender; the order cannot matter."""
    kept = [True] * len(pairs)
    while True:
        remaining = [pair for pair, is_kept in zip(pairs, kept) if is_kept]
        users, items = Counter(user for user, _ in remaining), Counter(item for _, item in remaining)
        offenders = [
            index
            for index, (user, item) in enumerate(pairs)
            if kept[index] and (users[user] < min_user or items[item] < min_item)
        ]
        if not offenders:
            return kept
        kept[offenders[len(offenders) // 2]] = False


pairs_strategy = st.lists(st.tuples(st.integers(0, 11), st.integers(0, 8)), max_size=70)


@settings(max_examples=60, deadline=None)
@given(pairs=pairs_strategy, min_user=st.integers(0, 6), min_item=st.integers(0, 6))
def test_k_core_is_the_fixed_point(pairs, min_user, min_item):
    data = interactions_of(pairs)
    kept = k_core(data.users, data.items, 12, 9, min_user, min_item)
    assert kept.tolist() == one_at_a_time_core(pairs, min_user, min_item)


@settings(max_examples=60, deadline=None)
@given(
    pairs=pairs_strategy,
    min_interactions=st.integers(0, 4),
    seed=st.integers(0, 100),
)
def test_splits_follow_from_the_sequences_in_time(pairs, min_interactions, seed):
    times = np.random.default_rng(seed).integers(0, 10, size=len(pairs)).tolist()
    kept = one_at_a_time_core(pairs, max(min_interactions, 3), min_interactions)
    expected = {}
    for position in sorted(range(len(pairs)), key=lambda position: (times[position], position)):
        if kept[position]:
            user, item = pairs[position]
            expected.setdefault(user, []).append(item)
    if not expected:
        with pytest.raises(ValueError, match="No user of 12 is left"):
            build_sequences(interactions_of(pairs, times), 9, min_interactions, duplicates="keep")
        return

    sequences = build_sequences(interactions_of(pairs, times), 9, min_interactions, duplicates="keep")
    assert sequences.users.tolist() == sorted(expected)
    assert len(set(sequences.kept_items.tolist())) == len(sequences.kept_items)
    if min_interactions == 0:
        assert sequences.kept_items.tolist() == list(range(9)), "items without interactions stay"
    users_in = Counter(user for user, _ in pairs)
    assert sequences.dropped["short_users"] == sum(users_in[user] < 3 for user in range(12))
    assert sequences.dropped["short_users"] + sequences.dropped["users"] + len(expected) == 12
    assert sequences.dropped["items"] + len(sequences.kept_items) == 9

    recount = Counter()
    for name, held_out in (("train", 3), ("validation", 2), ("test", 1)):
        users, histories, offsets, targets = sequences.split(name)
        assert users.tolist() == sequences.users.tolist()
        for index, user in enumerate(users):
            items = (sequences.kept_items[histories[offsets[index] : offsets[index + 1]] - 1]).tolist()
            target = int(sequences.kept_items[targets[index] - 1])
            assert items == expected[user][:-held_out] and target == expected[user][-held_out]
            if name == "train":
                recount.update([*items, target])
    frequencies = sequences.training_frequencies()
    assert frequencies[0] == 0
    assert {int(item): int(frequencies[row]) for row, item in enumerate(sequences.kept_items, 1)} == {
        int(item): recount[item] for item in sequences.kept_items
    }


def test_equal_times_keep_the_order_they_came_in():
    data = interactions_of([(0, 5), (0, 3), (0, 4), (0, 1)], times=[7, 7, 7, 2])
    sequences = build_sequences(data, 9)
    assert sequences.kept_items[sequences.rows - 1].tolist() == [1, 5, 3, 4]
