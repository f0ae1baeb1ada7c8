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
        max_targets (`int`, *optional*): Train on a user's latest so many items alone; all by default.
    """

    def __init__(self, sequences: Sequences, max_length: int, max_targets: int | None = None):
        lengths = np.diff(sequences.offsets)
        # A user's training sequence is the history with the target behind it.
        self.items = np.insert(sequences.histories, sequences.offsets[1:], sequences.targets).astype(np.int64)
        starts = sequences.offsets[:-1] + np.arange(len(sequences))
        windows = []
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            first_target = 0 if max_targets is None else max(length - max_targets, 0)
            for stop in range(length, first_target, -max_length):
                begin = max(stop - max_length, 0)
                windows.append((start + begin, start + stop, max(first_target - begin, 0)))
        self.windows = np.asarray(windows, dtype=np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """`history`: the inputs; `targets`: the item that follows each of them, -100 where it is not trained on."""
        start, stop, untrained = self.windows[index]
        targets = self.items[start + 1 : stop + 1].copy()
        targets[:untrained] = -100
        return {"history": self.items[start:stop], "targets": targets}

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
