"""From interactions to sequences: filters to a fixed point, order in time, split, frequencies."""

from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin

import numpy as np
from tqdm.auto import tqdm

from .source import Interactions


SPLITS = ("train", "validation", "test")

# How many items at a user's end are not in the history of a leave-one-out example; the first of them is its target.
HELD_OUT = {"train": 3, "validation": 2, "test": 1}

# Leave-one-out needs one item to train on, one to validate on, one to test on. A user with one interaction is no
# example of the other splits either.
SHORTEST_SEQUENCE = {"leave_one_out": 3, "global_time": 2, "none": 2}

# Interactions that a step copies at a time: copies of them all would be the most that a preparation holds.
_AT_ONCE = 2**20


@dataclass
class UserSequences:
    """What the filters left, user by user, oldest first: user `u` has `rows[offsets[u] : offsets[u + 1]]`."""

    # (users,) positions of the kept users among the source's.
    users: np.ndarray
    # (items,) positions of the kept items among the source's; row `r` is `kept_items[r - 1]`.
    kept_items: np.ndarray
    # (interactions,) int32.
    rows: np.ndarray
    # (users + 1,) int64.
    offsets: np.ndarray
    # Per split, the users that are in it, as positions in `users`, and where in `rows` their targets are. The history
    # is what the user has before the target.
    targets: dict[str, tuple[np.ndarray, np.ndarray]]
    # What the filters took away, by name.
    dropped: dict[str, int]
    # When validation and test start, for a split in time; otherwise empty.
    starts: dict[str, int]

    def split(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """
        The examples of `"train"`, `"validation"` or `"test"`: the users `(examples,)` as positions in the source,
        histories `(entries,)` and their offsets `(examples + 1,)`, targets `(examples,)`.
        """
        users, targets = self.targets[name]
        starts = self.offsets[users]
        lengths = targets - starts
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        entries = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
        return self.users[users], self.rows[entries], offsets, self.rows[targets]

    def training_frequencies(self) -> np.ndarray:
        """`(items + 1,)` int32: how often every row occurs in the training split; 0 for row 0."""
        _, histories, _, targets = self.split("train")
        counts = np.bincount(histories, minlength=len(self.kept_items) + 1)
        return (counts + np.bincount(targets, minlength=len(self.kept_items) + 1)).astype(np.int32)


def k_core(
    users: np.ndarray, items: np.ndarray, num_users: int, num_items: int, min_user: int, min_item: int
) -> np.ndarray:
    """The largest set of interactions in which every user has at least `min_user` of them and every item `min_item`,
    as `(interactions,)` bool; `users` and `items` are `(interactions,)` positions."""
    kept = np.ones(len(users), dtype=bool)
    while True:
        user_counts = _counts(users, kept, num_users)
        item_counts = _counts(items, kept, num_items)
        remaining = kept & (user_counts >= min_user)[users] & (item_counts >= min_item)[items]
        if remaining.sum() == kept.sum():
            return kept
        kept = remaining


def _counts(positions: np.ndarray, kept: np.ndarray, size: int) -> np.ndarray:
    """`(size,)`: how many of the kept interactions have each position. `np.bincount` works on a copy in int64."""
    counts = np.zeros(size, np.int64)
    for start in range(0, len(positions), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        counts += np.bincount(positions[part][kept[part]], minlength=size)
    return counts


def keep_unrepeated(
    users: np.ndarray, items: np.ndarray, times: np.ndarray, duplicates: str, repeats: str
) -> tuple[np.ndarray, int, int]:
    """
    Which of the interactions of a user with one item are kept, `(interactions,)` bool, and the numbers of duplicates
    and of repeats that are not. Equal times keep the order they are given in; `duplicates` and `repeats` are those of
    [`SequenceSettings`].
    """
    if (duplicates, repeats) == ("keep", "keep") or len(users) == 0:
        return np.ones(len(users), bool), 0, 0
    order = np.lexsort((times, items, users))

    def same_as_before(*columns: np.ndarray) -> np.ndarray:
        same = np.ones(len(order) - 1, bool)
        for start in range(0, len(same), _AT_ONCE):
            part = same[start : start + _AT_ONCE]
            positions = order[start : start + len(part) + 1]
            for column in columns:
                ordered = column[positions]
                part &= ordered[1:] == ordered[:-1]
        return same

    if duplicates == "drop":
        order = order[np.append(True, ~same_as_before(users, items, times))]
    num_duplicates = len(users) - len(order)
    if repeats == "first":
        order = order[np.append(True, ~same_as_before(users, items))]
    elif repeats == "last":
        order = order[np.append(~same_as_before(users, items), True)]
    kept = np.zeros(len(users), bool)
    kept[order] = True
    return kept, num_duplicates, len(users) - num_duplicates - len(order)


def split_global_time(
    times: np.ndarray, offsets: np.ndarray, validation_fraction: float, test_fraction: float
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], dict[str, int]]:
    """
    `UserSequences.targets` and `UserSequences.starts` of a split at two moments that are the same for all users, so
    that nothing is learnt from what happened later: `times` `(interactions,)` is ascending within a user.

    Training has every user's interactions before validation starts. The target of a user in validation or test is the
    first interaction of the period, and the history everything before it; users without one are not in the split.
    Interactions at a moment belong to what follows, so that the shares are exact up to ties.
    """
    ranks = [int((1 - validation_fraction - test_fraction) * len(times)), int((1 - test_fraction) * len(times))]
    validation_start, test_start = (int(time) for time in np.partition(times, ranks)[ranks])
    num_users = len(offsets) - 1
    owners = np.repeat(np.arange(num_users, dtype=np.int32), np.diff(offsets))
    trained = np.bincount(owners[times < validation_start], minlength=num_users)
    seen = np.bincount(owners[times < test_start], minlength=num_users)
    everything = np.diff(offsets)
    # Target: the last of training, the first of the others. Only a training sequence may have an empty history.
    counts = {
        "train": (trained > 0, trained - 1),
        "validation": ((trained > 0) & (seen > trained), trained),
        "test": ((seen > 0) & (everything > seen), seen),
    }
    targets = {}
    for name, (present, before) in counts.items():
        users = np.flatnonzero(present)
        if len(users) == 0:
            raise ValueError(
                f"No user is in the {name} split when validation starts at time {validation_start} and test at "
                f"{test_start}; change validation_fraction and test_fraction."
            )
        targets[name] = (users, offsets[users] + before[users])
    return targets, {"validation": validation_start, "test": test_start}


@dataclass
class SequenceSettings:
    """
    Which interactions count, and how they are split.

    Args:
        > Filters

        min_rating (`float`, *optional*): Keep interactions with this rating or a better one.
        duplicates (`str`, *optional*, defaults to `"drop"`): What to do with further entries of one user, item and
            time.
        repeats (`str`, *optional*, defaults to `"keep"`): Which to keep of a user's interactions with one item at
            different times; keep: all.
        min_interactions (`int`, *optional*, defaults to `0`): Keep users and items with this many interactions, until
            nothing changes (k-core). 0 keeps all items of the catalogue, those without interactions too.

        > Split

        split (`str`, *optional*, defaults to `"leave_one_out"`): leave_one_out: each user's last item is the test
            target, the one before it the validation target; global_time: two moments for all users, and the target is
            a user's first item after them; none: everything is for training, for a model that is to serve and was
            measured before (train it with `--eval_strategy no`).
        validation_fraction (`float`, *optional*, defaults to `0.1`): global_time: share of the interactions between
            the two moments.
        test_fraction (`float`, *optional*, defaults to `0.1`): global_time: share of the interactions after the second
            moment.

    Raises:
        ValueError: If a value is none of its choices, `min_interactions` is negative, or the shares are no shares.
    """

    min_rating: float | None = None
    duplicates: Literal["drop", "keep"] = "drop"
    repeats: Literal["keep", "first", "last"] = "keep"
    min_interactions: int = 0
    split: Literal["leave_one_out", "global_time", "none"] = "leave_one_out"
    validation_fraction: float = 0.1
    test_fraction: float = 0.1

    def __post_init__(self):
        for setting in fields(SequenceSettings):
            value, choices = getattr(self, setting.name), get_args(setting.type)
            if get_origin(setting.type) is Literal and value not in choices:
                raise ValueError(f"{setting.name} is {value!r}; choose one of {', '.join(choices)}.")
        if self.min_interactions < 0:
            raise ValueError(f"min_interactions is a count, 0 or more, got {self.min_interactions}.")
        shares = (self.validation_fraction, self.test_fraction)
        if not (min(shares) > 0 and sum(shares) < 1):
            raise ValueError(
                "validation_fraction and test_fraction are shares that leave some to train on, got "
                f"{self.validation_fraction} and {self.test_fraction}; lower them."
            )


def build_sequences(
    interactions: Interactions, num_items: int, settings: SequenceSettings | None = None
) -> UserSequences:
    """
    Filters the interactions, by rating, repetition and k-core in this order, and orders and splits the rest in time.
    Users too short for the split are dropped whatever the filters; `num_items` is the size of the catalogue.
    """
    settings = settings or SequenceSettings()
    min_interactions, min_rating, split = settings.min_interactions, settings.min_rating, settings.split
    with tqdm(total=4, desc="building sequences", unit="step", delay=2) as progress:
        users, items, times = interactions.users, interactions.items, interactions.times
        num_users = len(interactions.user_ids)
        low_ratings = 0
        if min_rating is not None:
            if interactions.ratings is None:
                raise ValueError(f"min_rating is {min_rating}, but the source has no ratings; leave it out.")
            # Not the negation of a comparison: an interaction without rating is not known to be good.
            good = interactions.ratings >= min_rating
            low_ratings = int(len(good) - good.sum())
            users, items, times = users[good], items[good], times[good]
        progress.update()

        unrepeated, num_duplicates, num_repeats = keep_unrepeated(
            users, items, times, settings.duplicates, settings.repeats
        )
        if num_duplicates or num_repeats:
            users, items = users[unrepeated], items[unrepeated]
        progress.update()

        shortest = SHORTEST_SEQUENCE[split]
        short_users = int((_counts(users, np.ones(len(users), bool), num_users) < shortest).sum())
        kept = k_core(users, items, num_users, num_items, max(min_interactions, shortest), min_interactions)
        if not kept.any():
            raise ValueError(
                f"No user of {num_users} is left with min_interactions={min_interactions} and {shortest} "
                "interactions per user at least; lower min_interactions or bring more data."
            )
        progress.update()
        # The times are filtered once little of them is left: no filter in between reads them.
        users, items = users[kept], items[kept]
        unrepeated[unrepeated] = kept
        times = times[unrepeated]
        order = np.lexsort((times, users))
        users, items, times = users[order], items[order], times[order]
        kept_users, lengths = np.unique(users, return_counts=True)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        progress.update()
        kept_items = np.unique(items) if min_interactions > 0 else np.arange(num_items)
        if split == "leave_one_out":
            everyone, starts = np.arange(len(kept_users)), dict[str, int]()
            targets = {name: (everyone, offsets[1:] - held_out) for name, held_out in HELD_OUT.items()}
        elif split == "none":
            nobody = np.zeros(0, np.int64)
            targets, starts = dict.fromkeys(SPLITS[1:], (nobody, nobody)), {}
            targets["train"] = np.arange(len(kept_users)), offsets[1:] - 1
        else:
            targets, starts = split_global_time(times, offsets, settings.validation_fraction, settings.test_fraction)
    return UserSequences(
        users=kept_users,
        kept_items=kept_items,
        rows=(np.searchsorted(kept_items, items) + 1).astype(np.int32),
        offsets=offsets,
        targets=targets,
        dropped={
            "low_ratings": low_ratings,
            "duplicates": num_duplicates,
            "repeats": num_repeats,
            "short_users": short_users,
            "users": num_users - short_users - len(kept_users),
            "items": num_items - len(kept_items),
            "with_users_and_items": len(interactions) - low_ratings - num_duplicates - num_repeats - len(items),
        },
        starts=starts,
    )
