"""Tables as a dataset: batches, splits, refusals."""

import pytest
import torch

from mmesid.trainer.data.tables import EmbeddingTable
from mmesid.trainer.quantizer.items import ItemTables

from .conftest import toy_items


def test_batches_hold_the_rows_asked_for_and_never_the_padding(items):
    assert 0 not in items.rows
    batch = items.__getitems__([3, 1])
    rows = items.rows[[3, 1]]
    for name, (embeddings, present) in items.tables.items():
        assert torch.equal(batch["embeddings"][name], embeddings[rows])
        assert torch.equal(batch["present"][name], present[rows])
        assert torch.equal(items.rows_with(name), present.nonzero()[:, 0])
    both = items.tables["text"].present & items.tables["collaborative"].present
    assert torch.equal(items.rows_with("text", "collaborative"), both.nonzero()[:, 0])


def test_tables_of_two_catalogues_are_refused():
    tables = {name: EmbeddingTable(torch.zeros(rows, 2), torch.ones(50) > 0) for name, rows in [("a", 51), ("b", 50)]}
    with pytest.raises(ValueError, match="'a': 51, 'b': 50"):
        ItemTables(tables)


@pytest.mark.parametrize(("count", "fraction", "held_out"), [(50, 0.1, 5), (50, 0.001, 3)])
def test_split_is_a_partition(count, fraction, held_out):
    items = toy_items(count)
    training, rest = items.split(fraction, torch.Generator().manual_seed(3))
    assert len(rest) == held_out
    assert sorted([*training.rows.tolist(), *rest.rows.tolist()]) == items.rows.tolist()
