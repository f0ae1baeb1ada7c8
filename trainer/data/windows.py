"""Prepared sequences as the examples that the recommenders train on and are evaluated with."""

import numpy as np
import torch

from .prepared import Sequences


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

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """`history`: the inputs; `targets`: the item that follows each of them."""
        start, stop = self.windows[index]
        return {"history": self.items[start:stop], "targets": self.items[start + 1 : stop + 1]}

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
