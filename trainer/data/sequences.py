"""From interactions to sequences: k-core, order in time, leave-one-out split, frequencies."""

from dataclasses import dataclass

import numpy as np

from .source import Interactions


# How many items at a user's end are not in the history of a split's example; the first of them is its target.
HELD_OUT = {"train": 3, "validation": 2, "test": 1}

# One item to train on, one to validate on, one to test on.
SHORTEST_SEQUENCE = 3


@dataclass
class UserSequences:
    """
    Args:
        users (`np.ndarray`): `(users,)` positions of the kept users among the source's.
        kept_items (`np.ndarray`): `(items,)` positions of the kept items among the source's; row `r` is
            `kept_items[r - 1]`.
        rows (`np.ndarray`): `(interactions,)` int32 rows, 1 to `len(kept_items)`, user by user, oldest first.
        offsets (`np.ndarray`): `(users + 1,)` int64; user `u` has `rows[offsets[u] : offsets[u + 1]]`.
        short_users (`int`): Users of the source with fewer than three interactions, who cannot be split.
        filtered_users (`int`): Further users dropped by the k-core.
        filtered_items (`int`): Items dropped by the k-core.
    """

    users: np.ndarray
    kept_items: np.ndarray
    rows: np.ndarray
    offsets: np.ndarray
    short_users: int
    filtered_users: int
    filtered_items: int

    def split(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        The examples of `"train"`, `"validation"` or `"test"`: histories `(entries,)` and their offsets
        `(users + 1,)`, targets `(users,)`.
        """
        held_out = HELD_OUT[name]
        lengths = np.diff(self.offsets)
        position_from_end = np.repeat(self.offsets[1:], lengths) - np.arange(len(self.rows))
        offsets = np.concatenate([[0], np.cumsum(lengths - held_out)])
        return self.rows[position_from_end > held_out], offsets, self.rows[self.offsets[1:] - held_out]

    def training_frequencies(self) -> np.ndarray:
        """`(items + 1,)` int32: how often every row occurs in the training split; 0 for row 0."""
        histories, _, targets = self.split("train")
        counts = np.bincount(histories, minlength=len(self.kept_items) + 1)
        return (counts + np.bincount(targets, minlength=len(self.kept_items) + 1)).astype(np.int32)


def k_core(
    users: np.ndarray, items: np.ndarray, num_users: int, num_items: int, min_user: int, min_item: int
) -> np.ndarray:
    """
    The largest set of interactions in which every user has at least `min_user` of them, every item `min_item`.

    Args:
        users (`np.ndarray`): `(interactions,)` user of every interaction.
        items (`np.ndarray`): `(interactions,)` item of every interaction.
        num_users (`int`): Number of users.
        num_items (`int`): Number of items.
        min_user (`int`): Fewest interactions of a user.
        min_item (`int`): Fewest interactions of an item.

    Returns:
        `np.ndarray`: `(interactions,)` bool, whether an interaction is kept.
    """
    kept = np.ones(len(users), dtype=bool)
    while True:
        user_counts = np.bincount(users[kept], minlength=num_users)
        item_counts = np.bincount(items[kept], minlength=num_items)
        remaining = kept & (user_counts[users] >= min_user) & (item_counts[items] >= min_item)
        if remaining.sum() == kept.sum():
            return kept
        kept = remaining


def build_sequences(interactions: Interactions, num_items: int, min_interactions: int = 0) -> UserSequences:
    """
    Filters the interactions and orders them in time. Users with fewer than three are dropped whatever the filter.

    Args:
        interactions (`Interactions`): The raw interactions.
        num_items (`int`): Size of the catalogue.
        min_interactions (`int`, *optional*, defaults to `0`): Keep users and items with this many interactions, to a
            fixed point. With 0 every item of the catalogue stays, those without interactions too.

    Raises:
        ValueError: If nothing is left, or if `min_interactions` is negative.
    """
    if min_interactions < 0:
        raise ValueError(f"min_interactions is a count, 0 or more, got {min_interactions}.")
    users, items = interactions.users, interactions.items
    num_users = len(interactions.user_ids)
    short_users = int((np.bincount(users, minlength=num_users) < SHORTEST_SEQUENCE).sum())
    kept = k_core(users, items, num_users, num_items, max(min_interactions, SHORTEST_SEQUENCE), min_interactions)
    if not kept.any():
        raise ValueError(
            f"No user of {num_users} is left with min_interactions={min_interactions} and {SHORTEST_SEQUENCE} "
            "interactions a user at least; lower min_interactions or bring more data."
        )
    users, items, times = users[kept], items[kept], interactions.times[kept]
    order = np.lexsort((times, users))
    users, items = users[order], items[order]
    kept_users, lengths = np.unique(users, return_counts=True)
    kept_items = np.unique(items) if min_interactions > 0 else np.arange(num_items)
    return UserSequences(
        users=kept_users,
        kept_items=kept_items,
        rows=(np.searchsorted(kept_items, items) + 1).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        short_users=short_users,
        filtered_users=num_users - short_users - len(kept_users),
        filtered_items=num_items - len(kept_items),
    )
