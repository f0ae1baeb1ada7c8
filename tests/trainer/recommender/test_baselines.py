"""The baselines against what their docstrings say, one item at a time, and near ties apart."""

import numpy as np
import pytest
import torch

from mmesid.trainer.data.prepared import Sequences
from mmesid.trainer.data.tables import EmbeddingTable
from mmesid.trainer.recommender.baselines import COUNT_WEIGHT, co_occurrence, text_neighbours, transitions


ITEMS = 12


@pytest.fixture(scope="module")
def lists() -> list[list[int]]:
    """Whole training sequences; an item may come again. No user has the items 11 and 12."""
    random = np.random.default_rng(0)
    return [random.integers(1, 11, size=random.integers(1, 7)).tolist() for _ in range(30)]


@pytest.fixture(scope="module")
def train(lists) -> Sequences:
    offsets = np.cumsum([0, *(len(items) - 1 for items in lists)])
    histories = np.array([item for items in lists for item in items[:-1]], dtype=np.int32)
    return Sequences([str(user) for user in range(30)], histories, offsets, np.array([items[-1] for items in lists]))


@pytest.fixture(scope="module")
def table() -> EmbeddingTable:
    embeddings = torch.randn(ITEMS + 1, 5, generator=torch.Generator().manual_seed(0))
    embeddings[[0, 4]] = 0
    return EmbeddingTable(embeddings, embeddings.any(1))


HISTORIES = [np.array([3, 7]), np.array([11]), np.array([2, 2, 9])]


def cosine(first, second):
    norm = np.linalg.norm(first) * np.linalg.norm(second)
    return first @ second / norm if norm else 0.0


@pytest.mark.parametrize("most", [2, 1000])
def test_co_occurrence(lists, train, most, monkeypatch):
    monkeypatch.setattr("mmesid.trainer.recommender.baselines.MOST_TOGETHER", most)
    users = [{user for user, items in enumerate(lists) if item in items[-most:]} for item in range(ITEMS + 1)]
    scores = co_occurrence(train, ITEMS)(HISTORIES)
    for row, history in enumerate(HISTORIES):
        for item in range(1, ITEMS + 1):
            expected = sum(
                len(users[item] & users[other]) / np.sqrt(len(users[item]) * len(users[other]))
                for other in set(history.tolist()) - {item}
                if users[item] and users[other]
            )
            assert scores[row, item] == pytest.approx(expected, abs=1e-6)


def test_text_neighbours(table):
    scores = text_neighbours(table)(HISTORIES)
    embeddings = table.embeddings.numpy()
    for row, history in enumerate(HISTORIES):
        expected = [cosine(embeddings[history[-1]], one) for one in embeddings]
        np.testing.assert_allclose(scores[row], expected, atol=1e-6)


def test_transitions(lists, train, table):
    """Items in the order that the words give."""
    counts = np.zeros((ITEMS + 1, ITEMS + 1))
    for items in lists:
        for before, after in zip(items, items[1:]):
            counts[before, after] += 1
    embeddings = table.embeddings.numpy()
    scores = transitions(train, table)(HISTORIES)
    for row, history in enumerate(HISTORIES):
        last = history[-1]
        first = set(counts[last].nonzero()[0].tolist())
        second = {after for one in first for after in counts[one].nonzero()[0].tolist()} - first
        others = set(range(1, ITEMS + 1)) - first - second

        def text(item, last=last):
            return cosine(embeddings[last], embeddings[item])

        def text_and_count(item, last=last):
            return text(item) + COUNT_WEIGHT * np.log1p(counts[last, item]) / np.log1p(counts[last].max())

        expected = [*sorted(first, key=text_and_count, reverse=True), *sorted(second, key=text, reverse=True)]
        expected += sorted(others, key=text, reverse=True)
        assert scores[row, 1:].argsort(descending=True, stable=True).add(1).tolist() == expected
    assert first and second and others
