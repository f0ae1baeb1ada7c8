"""Prepared sequences as the examples that the recommenders train on and are evaluated with."""

from collections.abc import Callable

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from .prepared import Sequences


def as_sequences(
    dataset: datasets.Dataset, name: str, rows_of: Callable[[list[str]], list[int]] | None = None
) -> Sequences:
    """
    A split out of a dataset of one's own: `history`, a list of items, oldest first, and `target`, the one that
    follows. Items are rows from 1, or raw ids that `rows_of` turns into rows.

    Raises:
        ValueError: If a column is missing or has gaps, or holds neither; the sentence calls the dataset by its `name`.
    """
    for column in ("history", "target"):
        if column not in dataset.column_names:
            raise ValueError(
                f"{name} has the columns {', '.join(dataset.column_names)}; give history, a list of items, oldest "
                "first, and target, the item that follows."
            )
    table = dataset.select_columns(["history", "target"]).with_format("arrow")[:]
    history, target = (table[column].combine_chunks() for column in ("history", "target"))
    if history.null_count or target.null_count or not _is_list(history.type):
        raise ValueError(f"{name} has a history that is no list, or no target; leave such rows out.")
    offsets = np.concatenate([[0], np.cumsum(pc.list_value_length(history).to_numpy(), dtype=np.int64)])
    histories, targets = (_rows(column, name, rows_of) for column in (pc.list_flatten(history), target))
    user_ids = dataset["user_id"][:] if "user_id" in dataset.column_names else list(map(str, range(len(targets))))
    return Sequences(user_ids, histories, offsets, targets)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _rows(column: pa.Array, name: str, rows_of: Callable[[list[str]], list[int]] | None) -> np.ndarray:
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        if rows_of is None:
            raise ValueError(f"{name} holds raw item ids; give the processor as processing_class, or rows instead.")
        ids = column.dictionary_encode()
        return np.array(rows_of(ids.dictionary.to_pylist()), np.int32)[ids.indices.to_numpy()]
    if not pa.types.is_integer(column.type) or column.null_count or (len(column) and pc.min(column).as_py() < 1):
        raise ValueError(f"{name} holds items that are neither rows from 1 nor raw ids in quotes; correct them.")
    return column.to_numpy().astype(np.int32)


class TrainingWindows(torch.utils.data.Dataset):
    """
    Training sequences cut into windows of at most `max_length` inputs, from the end backwards, so that every item but
    a user's first is a target exactly once and the latest window is the full one.

    Args:
        sequences (`Sequences`): The training split.
        max_length (`int`): Longest history of an example.
    """

    def __init__(self, sequences: Sequences, max_length: int):
        lengths = np.diff(sequences.offsets)
        # A user's training sequence is the history with the target behind it.
        self.items = np.insert(sequences.histories, sequences.offsets[1:], sequences.targets).astype(np.int64)
        starts = sequences.offsets[:-1] + np.arange(len(sequences))
        windows = []
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            stops = range(length, 0, -max_length)
            windows += [(start + max(stop - max_length, 0), start + stop) for stop in stops]
        self.windows = np.asarray(windows, dtype=np.int64).reshape(-1, 2)
        self._starts, self._user_ids = starts, sequences.user_ids

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """`history`: the inputs; `targets`: the item that follows each of them."""
        start, stop = self.windows[index]
        return {"history": self.items[start:stop], "targets": self.items[start + 1 : stop + 1]}

    def users_of(self, histories: np.ndarray) -> list[str]:
        """Raw ids of the users of whom an example is among `histories` `(batch, length)`, rows padded with 0."""
        wanted = {row[row > 0].tobytes() for row in histories.astype(np.int64)}
        found = [self.items[start:stop].tobytes() in wanted for start, stop in self.windows]
        users = np.searchsorted(self._starts, self.windows[found, 0], side="right") - 1
        return [self._user_ids[user] for user in np.unique(users)]

    @property
    def lengths(self) -> list[int]:
        return (self.windows[:, 1] - self.windows[:, 0]).tolist()


class EvaluationHistories(torch.utils.data.Dataset):
    """A held-out split, longest history first: batches then hold histories of like length, and memory peaks in the
    first."""

    def __init__(self, sequences: Sequences):
        self.sequences = sequences
        self.order = np.argsort(-np.diff(sequences.offsets), kind="stable")

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict:
        """`history`: everything before the target; `target`: the row to be ranked."""
        return self.sequences[int(self.order[index])]
