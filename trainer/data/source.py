"""What every reader of raw data yields: a catalogue of items and the interactions of users with them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass
class Catalogue:
    """
    Items in the order in which they become rows.

    Args:
        item_ids (`list[str]`): Raw id of every item, no two alike.
        titles (`list[str]`): Title of every item, empty if it has none.
        texts (`list[str]`): What a text encoder reads of every item, empty if there is nothing.
        images (`list[Path | bytes | None]`, *optional*): Picture of every item, as a file or as the bytes of one,
            `None` where an item has none; `None` instead of a list if the source has no pictures at all.
    """

    item_ids: list[str]
    titles: list[str]
    texts: list[str]
    images: list[Path | bytes | None] | None = None

    def __len__(self) -> int:
        return len(self.item_ids)


@dataclass
class Interactions:
    """
    One entry an interaction, in any order.

    Args:
        user_ids (`list[str]`): Raw id of every user, no two alike.
        users (`np.ndarray`): `(interactions,)` int32 positions in `user_ids`.
        items (`np.ndarray`): `(interactions,)` int32 positions in the catalogue.
        times (`np.ndarray`): `(interactions,)` int64; anything that grows with time. Equal times of one user keep the
            order they are given in.
    """

    user_ids: list[str]
    users: np.ndarray
    items: np.ndarray
    times: np.ndarray

    def __len__(self) -> int:
        return len(self.users)


@dataclass
class Source:
    """
    Args:
        name (`str`): Where the data come from, for the statistics and the dataset card.
        licence (`str`): Terms under which they may be used.
        synthetic (`bool`): Whether they were generated; said wherever results on them appear.
        catalogue (`Catalogue`): The items.
        interactions (`Interactions`): What users did with them.
    """

    name: str
    licence: str
    synthetic: bool
    catalogue: Catalogue
    interactions: Interactions
