"""
Baselines that nobody trains: popularity, items bought together, neighbours of the text, and the graph of transitions
with the text. Each is a function that counts what it needs and returns a scorer: histories in, scores of all items
out.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.sparse import csr_array, diags_array

from ..data.prepared import Sequences
from ..data.tables import EmbeddingTable


# Histories, each of rows, oldest first and not empty, to scores `(batch, items + 1)`; those of row 0 mean nothing.
Scorer = Callable[[Sequence[np.ndarray]], torch.Tensor]

# What the count of a transition adds to its cosine at most: the better of .5 and 1 on Beauty's validation.
COUNT_WEIGHT = 1.0
# Between the successors of an item, their successors, and all other items: more than the scores of two items differ.
TIER = 4.0
# Items of a training sequence that count as bought together, its latest: pairs grow with the square, and one customer
# who is a reseller or a robot would fill the memory.
MOST_TOGETHER = 1000


def popularity(frequencies: torch.Tensor) -> Scorer:
    """Items by their training interactions, `(items + 1,)`, the same for every user."""
    return lambda histories: frequencies.float().repeat(len(histories), 1)


def co_occurrence(train: Sequences, num_items: int) -> Scorer:
    """Items by the cosine between their users and those of an item of the history, summed over the history
    ([Deshpande and Karypis, 2004](https://doi.org/10.1145/963770.963776)). Of a training sequence the latest
    `MOST_TOGETHER` items count."""
    owned = _items_of([_whole(train, user)[-MOST_TOGETHER:] for user in range(len(train))], num_items)
    together = owned.T @ owned
    norms = np.sqrt(np.maximum(together.diagonal(), 1))
    together.setdiag(0)
    scaling = diags_array(1 / norms)
    cosines = csr_array(scaling @ together @ scaling)
    return lambda histories: torch.from_numpy((_items_of(histories, num_items) @ cosines).toarray())


def text_neighbours(table: EmbeddingTable) -> Scorer:
    """Items by the cosine between their embedding and that of the history's last item."""
    embeddings = torch.nn.functional.normalize(table.embeddings, dim=-1)
    return lambda histories: embeddings[_last(histories)] @ embeddings.T


def transitions(train: Sequences, table: EmbeddingTable) -> Scorer:
    """
    The graph of transitions with the text: first the items that followed the history's last one in training, by the
    cosine between their embedding and its own plus `COUNT_WEIGHT` times log(1 + how often they did), over that of its
    most frequent successor; then their successors, by the cosine; then all others, by the cosine.
    """
    pairs = [np.stack([items[:-1], items[1:]]) for items in (_whole(train, user) for user in range(len(train)))]
    before, after = np.concatenate(pairs, axis=1)
    size = len(table.embeddings)
    counts = csr_array((np.ones(len(before), np.float32), (before, after)), shape=(size, size))
    counts.sum_duplicates()
    follows, weights = (csr_array(counts, copy=True) for _ in range(2))
    follows.data[:] = 1
    largest = np.repeat(np.maximum(counts.max(axis=1).toarray(), 1), np.diff(counts.indptr))
    weights.data = (2 * TIER + COUNT_WEIGHT * np.log1p(counts.data) / np.log1p(largest)).astype(np.float32)
    by_text = text_neighbours(table)

    def score(histories: Sequence[np.ndarray]) -> torch.Tensor:
        last = _last(histories).numpy()
        first = torch.from_numpy(weights[last].toarray())
        second = torch.from_numpy((follows[last] @ follows).toarray())
        return by_text(histories) + torch.where(first > 0, first, TIER * (second > 0))

    return score


def _whole(train: Sequences, user: int) -> np.ndarray:
    """A user's training sequence, which is the history with the target behind it."""
    example = train[user]
    return np.append(example["history"], example["target"])


def _last(histories: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.tensor([int(history[-1]) for history in histories])


def _items_of(histories: Sequence[np.ndarray], num_items: int) -> csr_array:
    """Which items each history holds, `(histories, items + 1)`, sparse."""
    ends = np.cumsum([len(history) for history in histories])
    items = np.concatenate(histories)
    matrix = csr_array(
        (np.ones(len(items), np.float32), items, np.insert(ends, 0, 0)), shape=(len(histories), num_items + 1)
    )
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix
