import numpy as np
import pytest

from mmesid.trainer.data.prepared import Sequences
from mmesid.trainer.data.windows import EvaluationHistories, TrainingWindows


def sequences(histories, targets) -> Sequences:
    offsets = np.cumsum([0] + [len(history) for history in histories]).astype(np.int64)
    flat = np.array([row for history in histories for row in history], dtype=np.int32)
    return Sequences([f"u{user}" for user in range(len(targets))], flat, offsets, np.array(targets, dtype=np.int32))


def examples(dataset) -> list[tuple[list[int], list[int]]]:
    return [(example["history"].tolist(), example["targets"].tolist()) for example in dataset]


@pytest.mark.parametrize(
    ("histories", "targets", "max_length", "expected"),
    [
        ([[5, 6, 7]], [8], 10, [([5, 6, 7], [6, 7, 8])]),
        # The latest window is the full one.
        ([[1, 2, 3, 4, 5]], [6], 2, [([4, 5], [5, 6]), ([2, 3], [3, 4]), ([1], [2])]),
        # A user with one training item gives no example.
        ([[], [3]], [9, 4], 5, [([3], [4])]),
    ],
)
def test_windows_hold_next_items(histories, targets, max_length, expected):
    windows = TrainingWindows(sequences(histories, targets), max_length)
    assert examples(windows) == expected and windows.lengths == [len(history) for history, _ in expected]


@pytest.mark.parametrize("seed", range(4))
def test_every_item_but_the_first_is_a_target_exactly_once(seed):
    random = np.random.default_rng(seed)
    histories = [random.integers(1, 9, size=random.integers(0, 12)).tolist() for _ in range(20)]
    targets = random.integers(1, 9, size=20).tolist()
    expected = sorted(
        row for history, target in zip(histories, targets, strict=True) for row in [*history, target][1:]
    )
    seen = [row for _, following in examples(TrainingWindows(sequences(histories, targets), 3)) for row in following]
    assert sorted(seen) == expected


def test_evaluation_is_longest_first_and_loses_nobody():
    split = sequences([[1], [1, 2, 3], [4, 5]], [7, 8, 9])
    dataset = EvaluationHistories(split)
    assert [(example["history"].tolist(), example["target"]) for example in dataset] == [
        ([1, 2, 3], 8),
        ([4, 5], 9),
        ([1], 7),
    ]


def test_a_batch_is_told_by_its_users():
    windows = TrainingWindows(sequences([[1, 2, 3], [], [4, 5], [1, 2]], [4, 9, 6, 7]), max_length=2)
    assert windows.users_of(np.array([[4, 5, 0], [1, 0, 0]])) == ["u0", "u2"]
    # The latest items of one user, which are the first of nobody.
    assert windows.users_of(np.array([[2, 3]])) == ["u0"]
