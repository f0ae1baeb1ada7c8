"""Filter, order and split, against slow computations of the same thing."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmesid.trainer.data.sequences import SequenceSettings, build_sequences, k_core, keep_unrepeated, split_global_time
from mmesid.trainer.data.source import Interactions


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


@given(pairs=pairs_strategy, min_user=st.integers(0, 6), min_item=st.integers(0, 6))
def test_k_core_is_the_fixed_point(pairs, min_user, min_item):
    data = interactions_of(pairs)
    kept = k_core(data.users, data.items, 12, 9, min_user, min_item)
    assert kept.tolist() == one_at_a_time_core(pairs, min_user, min_item)


@given(pairs=pairs_strategy, min_interactions=st.integers(0, 4), seed=st.integers(0, 100))
def test_splits_follow_from_the_sequences_in_time(pairs, min_interactions, seed):
    times = np.random.default_rng(seed).integers(0, 10, size=len(pairs)).tolist()
    kept = one_at_a_time_core(pairs, max(min_interactions, 3), min_interactions)
    expected = {}
    for position in sorted(range(len(pairs)), key=lambda position: (times[position], position)):
        if kept[position]:
            user, item = pairs[position]
            expected.setdefault(user, []).append(item)
    settings = SequenceSettings(min_interactions=min_interactions, duplicates="keep")
    if not expected:
        with pytest.raises(ValueError, match="No user of 12 is left"):
            build_sequences(interactions_of(pairs, times), 9, settings)
        return

    sequences = build_sequences(interactions_of(pairs, times), 9, settings)
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


@pytest.mark.parametrize("duplicates", ["drop", "keep"])
@pytest.mark.parametrize("repeats", ["keep", "first", "last"])
@given(entries=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), max_size=30))
def test_duplicates_and_repeats_against_a_walk_through_time(duplicates, repeats, entries):
    in_time = sorted(range(len(entries)), key=lambda position: entries[position][2])
    kept, seen = [], set()
    for position in in_time:
        if duplicates == "keep" or entries[position] not in seen:
            kept.append(position)
        seen.add(entries[position])
    unique = len(kept)
    if repeats != "keep":
        walk = kept if repeats == "first" else reversed(kept)
        first_met = {}
        for position in walk:
            first_met.setdefault(entries[position][:2], position)
        kept = list(first_met.values())
    columns = np.array(entries, dtype=np.int64).reshape(-1, 3).T
    mask, num_duplicates, num_repeats = keep_unrepeated(*columns, duplicates, repeats)
    assert np.flatnonzero(mask).tolist() == sorted(kept)
    assert (num_duplicates, num_repeats) == (len(entries) - unique, unique - len(kept))


@given(
    pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8)), min_size=8, max_size=60),
    seed=st.integers(0, 1000),
    shares=st.sampled_from([(0.1, 0.1), (0.3, 0.2), (0.2, 0.5)]),
)
def test_a_split_in_time_learns_nothing_from_what_happened_later(pairs, seed, shares):
    times = np.random.default_rng(seed).integers(0, 20, size=len(pairs))
    in_time = {"split": "global_time", "validation_fraction": shares[0], "test_fraction": shares[1]}
    data = interactions_of(pairs, times.tolist())
    try:
        sequences = build_sequences(data, 9, SequenceSettings(duplicates="keep", **in_time))
    except ValueError as error:
        assert "is left" in str(error) or "No user is in the" in str(error)
        return
    starts = sequences.starts
    by_user = {}
    for position in np.argsort(times, kind="stable"):
        user, item = pairs[position]
        by_user.setdefault(user, []).append((int(times[position]), item))
    by_user = {user: entries for user, entries in by_user.items() if len(entries) > 1}
    kept_times = [time for entries in by_user.values() for time, _ in entries]
    # At most the shares that were asked for come before a moment; only ties with it are missing.
    for split, share in (("validation", 1 - sum(shares)), ("test", 1 - shares[1])):
        before, until = (sum(ended) for ended in zip(*((t < starts[split], t <= starts[split]) for t in kept_times)))
        assert before <= share * len(kept_times) <= until

    examples = {}
    for name in ("train", "validation", "test"):
        users, histories, offsets, targets = sequences.split(name)
        rows = [histories[start:stop].tolist() for start, stop in zip(offsets, offsets[1:])]
        examples[name] = {int(u): [row - 1 for row in [*r, t]] for u, r, t in zip(users, rows, targets)}
    end_of_training = {user: [i for t, i in entries if t < starts["validation"]] for user, entries in by_user.items()}
    assert examples["train"] == {user: items for user, items in end_of_training.items() if items}
    for name, end in (("validation", starts["test"]), ("test", np.inf)):
        expected = {}
        for user, entries in by_user.items():
            before = [item for time, item in entries if time < starts[name]]
            period = [item for time, item in entries if starts[name] <= time < end]
            if before and period:
                expected[user] = [*before, period[0]]
        assert examples[name] == expected
    recount = Counter(item for items in examples["train"].values() for item in items)
    assert sequences.training_frequencies().tolist() == [0, *(recount[item] for item in range(9))]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_interactions": -1}, "min_interactions is a count, 0 or more, got -1"),
        ({"split": "leave_two_out"}, "split is 'leave_two_out'; choose one of leave_one_out, global_time"),
        ({"duplicates": "first"}, "duplicates is 'first'; choose one of drop, keep"),
        ({"repeats": True}, "repeats is True; choose one of keep, first, last"),
        *(
            ({"validation_fraction": one, "test_fraction": other}, "are shares that leave some")
            for one, other in ((0.5, 0.5), (0, 0.1), (0.1, -1))
        ),
    ],
)
def test_settings_that_are_none_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SequenceSettings(**settings)


def test_moments_that_leave_nothing_to_train_on_are_refused():
    offsets = np.array([0, 5, 10])
    with pytest.raises(ValueError, match="No user is in the train split when validation starts at time 4"):
        split_global_time(np.full(10, 4), offsets, 0.2, 0.2)


def test_low_ratings_and_missing_ones_are_dropped_before_the_core():
    data = interactions_of([(0, 1), (0, 2), (0, 3), (0, 4), (1, 1), (1, 2), (1, 3)])
    data.ratings = np.array([5, 4, np.nan, 4, 5, 1, 5], dtype=np.float32)
    sequences = build_sequences(data, 9, SequenceSettings(min_rating=4))
    assert sequences.kept_items[sequences.rows - 1].tolist() == [1, 2, 4]
    assert (sequences.dropped["low_ratings"], sequences.dropped["short_users"]) == (2, 11)
    data.ratings = None
    with pytest.raises(ValueError, match="min_rating is 4, but the source has no ratings"):
        build_sequences(data, 9, SequenceSettings(min_rating=4))
