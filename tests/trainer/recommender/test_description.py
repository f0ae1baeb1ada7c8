"""What is said of a recommender's items, against computations of another kind."""

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mmesid.trainer.quantizer.semantic_ids import semantic_id_examples
from mmesid.trainer.recommender.description import describe_items, semantic_ids

from ...modeling_mmesid.conftest import NUM_ITEMS, new_model


class Processor:
    """The ids and titles of a processor, without its tokenizer."""

    item_ids = [f"id-{row}" for row in range(1, NUM_ITEMS + 1)]
    titles = [f"part {row}" for row in range(1, NUM_ITEMS + 1)]


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    model, directory = new_model(share_item_table=False), tmp_path_factory.mktemp("described")
    # Not seen by training, after which a model is still in the mode for it.
    model.model.items.fusion.frequencies[1:4] = 0
    said = describe_items(model.train(), Processor, directory)
    assert model.training
    return model.eval(), directory, *said


def test_the_spectra_are_those_of_tokens_and_table(described):
    model, _, metrics, _ = described
    rows = torch.arange(1, NUM_ITEMS + 1)
    with torch.no_grad():
        tables = {"item_tokens": model.model.items.tokens(rows), "scoring_table": model.item_table()[1:]}
    for name, table in tables.items():
        values = torch.linalg.svdvals(table.double())
        assert metrics[name]["information_abundance"] == pytest.approx(float(values.sum() / values[0]), rel=1e-4)
        shares = values / values.sum()
        rank = float(torch.special.entr(shares).sum().exp())
        assert metrics[name]["effective_rank"] == pytest.approx(rank, rel=1e-4)


def test_the_file_of_semantic_ids_is_what_the_model_holds(described):
    model, directory, metrics, _ = described
    table = pq.read_table(directory / "semantic_ids.parquet").to_pydict()
    assert table["item_id"] == Processor.item_ids
    text = model.model.items.modalities["text"]
    for row in range(1, NUM_ITEMS + 1):
        assert table["text"][row - 1] == (text.codes[row].tolist() if text.present[row] else None)
    # Items 3, 4 and 5 lack a text.
    assert [row for row, codes in enumerate(table["text"], start=1) if codes is None] == [3, 4, 5]
    assert 0 <= metrics["semantic_ids"]["collisions"] <= 1


def test_pictures_are_small_and_the_same_each_time(described, tmp_path):
    model, directory, _, _ = described
    describe_items(model, Processor, tmp_path)
    for name in ("singular_spectrum.png", "fusion_weights.png"):
        content = (directory / "figures" / name).read_bytes()
        assert content == (tmp_path / "figures" / name).read_bytes()
        assert len(content) < 50_000
        with Image.open(directory / "figures" / name) as picture:
            assert picture.width > 400 and len(picture.convert("RGB").getcolors(2**20)) > 20


def test_examples_show_the_next_of_kin_of_the_most_frequent(described):
    model, _, _, details = described
    codes, frequencies = semantic_ids(model), model.model.items.fusion.frequencies
    examples = details["semantic_id_examples"]
    assert len(examples) == 8 and len({example["item_id"] for example in examples}) == 8
    # Frequencies rise with the row.
    assert examples[0]["item_id"] == f"id-{NUM_ITEMS}" and examples[0]["title"] == f"part {NUM_ITEMS}"
    shown = []

    def shared(left, right):
        pairs = zip(codes["text"][left].tolist(), codes["text"][right].tolist())
        return next((level for level, (one, other) in enumerate(pairs) if one != other), 3)

    for first, second in zip(examples[::2], examples[1::2]):
        row, kin = (int(example["item_id"].removeprefix("id-")) for example in (first, second))
        left = [other for other in range(1, NUM_ITEMS + 1) if other not in (*shown, row, 3, 4, 5)]
        assert row > max(left)
        # The longest common beginning, and of those the most frequent.
        assert (shared(row, kin), frequencies[kin]) == max((shared(row, other), frequencies[other]) for other in left)
        shown += [row, kin]


def test_a_recommender_of_ids_alone_has_no_semantic_ids(tmp_path):
    metrics, details = describe_items(new_model(modalities=[], embedding_dims=[]), Processor, tmp_path)
    assert set(metrics) == {"item_tokens"} and details == {}
    assert not (tmp_path / "semantic_ids.parquet").exists()


def test_fewer_items_than_examples():
    codes = {"text": torch.tensor([[-1, -1], [0, 1], [0, 2], [-1, -1]])}
    examples = semantic_id_examples(codes, torch.tensor([0, 1, 2, 3]), ["", "a", "b", "c"], ["", "A", "B", "C"])
    assert [example["title"] for example in examples] == ["B", "A"]
    assert semantic_id_examples({"text": codes["text"][[0, 3]]}, torch.tensor([0, 1]), ["", "c"], ["", "C"]) == []
