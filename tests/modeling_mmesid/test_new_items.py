"""Items that come and go after training."""

import pytest
import torch
from transformers import LlamaTokenizerFast, set_seed

from modeling_mmesid import MMESIDForSequentialRecommendation, MMESIDProcessor, MMRQVAEConfig, MMRQVAEModel

from .conftest import HISTORIES, NUM_ITEMS, item_tables, new_model


NEW = [NUM_ITEMS + 1, NUM_ITEMS + 2, NUM_ITEMS + 3]


def new_quantizer(seed: int) -> MMRQVAEModel:
    set_seed(seed)
    config = MMRQVAEConfig(
        modalities=["collaborative", "text"],
        embedding_dims=[8, 12],
        num_quantizers=3,
        codebook_size=6,
        codebook_dim=16,
        objective="mse",
        initializer_range=1.0,
    )
    return MMRQVAEModel(config).eval()


@pytest.fixture(scope="module")
def quantizer() -> MMRQVAEModel:
    return new_quantizer(seed=3)


def model_of(quantizer: MMRQVAEModel, **kwargs) -> MMESIDForSequentialRecommendation:
    """A recommender whose items have the quantizer's codes."""
    model = new_model(**kwargs)
    if model.config.num_quantizers:
        for name, modality in model.model.items.modalities.items():
            codes = quantizer.encode({name: modality.embeddings}).codes[name]
            modality.codes.copy_(codes * modality.present[:, None])
    return model


def new_embeddings() -> dict[str, torch.Tensor]:
    """Three items; the second has no text, and none was seen by any user."""
    generator = torch.Generator().manual_seed(9)
    text = torch.randn(3, 12, generator=generator)
    text[1] = 0
    return {"collaborative": torch.randn(3, 8, generator=generator), "text": text}


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"share_item_table": False}, {"use_item_ids": False}, {"use_embeddings": False}, {"num_quantizers": 0}],
)
def test_new_items_score_by_what_they_have_and_change_nothing_else(kwargs, quantizer):
    model = model_of(quantizer, **kwargs)
    before = model.recommend(HISTORIES)
    embeddings = new_embeddings()
    # As an encoder may give them.
    arrays = {name: table.double().numpy() for name, table in embeddings.items()}
    assert model.add_items(arrays, quantizer=quantizer if model.config.num_quantizers else None) == NEW
    assert model.config.num_items == NUM_ITEMS + 3
    after = model.recommend(HISTORIES, denied_items=NEW)
    assert torch.equal(before.items, after.items)
    # A product of another width may sum in another order.
    torch.testing.assert_close(before.scores, after.scores, rtol=1e-5, atol=1e-6)

    best = model.recommend(HISTORIES, top_k=2, allowed_items=[NEW[0], NEW[1]], return_contributions=True)
    assert best.items.sort().values.tolist() == [NEW[:2]] * 3
    assert (best.contributions["text"][best.items == NEW[1]] == 0).all()

    # By hand: weighed as the rarest, and with the mean ID vector of the rarest twentieth, which are items 1 and 2.
    items, index = model.model.items, 0
    logits = items.fusion.output(torch.nn.functional.gelu(items.fusion.hidden(torch.zeros(1))))
    weights = torch.softmax(logits, dim=-1) * len(logits)
    vector = weights[0] * items.id_embeddings.weight[1:3].mean(0) if items.has_id_source else 0
    for weight, (name, modality) in zip(weights[-2:], items.modalities.items(), strict=True):
        x = (embeddings[name][index] - modality.center) * modality.scale
        source = modality.projection(x) if model.config.use_embeddings else 0
        if model.config.share_item_table and model.config.num_quantizers:
            codes = quantizer.encode({name: embeddings[name]}).codes[name][index]
            source = source + sum(modality.code_vectors[level, code] for level, code in enumerate(codes.tolist()))
        vector = vector + weight * source
    torch.testing.assert_close(model.item_table()[NEW[0]], vector, rtol=1e-5, atol=1e-6)
    assert model.recommend([[NEW[0], 3, NEW[1]]]).items.shape == (1, 10)


def test_new_items_are_part_of_the_checkpoint_and_of_training(tmp_path, quantizer):
    model = model_of(quantizer)
    model.add_items(new_embeddings(), quantizer=quantizer)
    model.remove_items([8])
    expected = model.recommend([[3, NEW[1]]], top_k=20)
    model.save_pretrained(tmp_path)
    loaded = MMESIDForSequentialRecommendation.from_pretrained(tmp_path)
    again = loaded.recommend([[3, NEW[1]]], top_k=20)
    assert torch.equal(again.items, expected.items) and torch.equal(again.scores, expected.scores)
    loaded.item_table().sum().backward()
    gradient = loaded.model.items.id_embeddings.weight.grad
    assert (gradient[NEW] == 0).all() and (gradient[1:NUM_ITEMS] != 0).any()


def test_an_item_that_nobody_chose_is_no_better_off_for_what_training_did_to_it():
    tables = item_tables()
    tables["frequencies"][[7, 9]] = 0
    model = new_model()
    model.initialize_items(**tables)
    vectors = model.item_table()
    # Pushed down by every step, for it is never a target.
    model.model.items.id_embeddings.weight.data[7] -= 5
    torch.testing.assert_close(model.item_table(), vectors)
    # In training it is a vector like others.
    assert not torch.equal(model.train().item_table()[7], vectors[7])
    # Nor is there anybody to stand for it where nothing was seen.
    model.eval().model.items.fusion.frequencies.zero_()
    assert torch.isfinite(model.item_table()).all()


def test_removed_items_are_read_but_never_recommended():
    model = new_model()
    everything = model.recommend(HISTORIES, top_k=NUM_ITEMS, exclude_history=False).items
    model.remove_items([9, 30])
    left = model.recommend(HISTORIES, top_k=NUM_ITEMS - 2, exclude_history=False).items
    for user in range(len(HISTORIES)):
        assert left[user].tolist() == [item for item in everything[user].tolist() if item not in (9, 30)]
    with pytest.raises(ValueError, match="37 items can be recommended to history 0"):
        model.recommend([[3]], top_k=38)
    with pytest.raises(ValueError, match="rows holds row 41, outside 1..40"):
        model.remove_items([41])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda new: new.update(text=new["text"][:, :5]), r"'text' are .* shape \(3, 5\), where .* \(3, 12\)"),
        (lambda new: new.update(visual=torch.ones(3, 4)), "embeddings are given for"),
        (lambda new: new["text"][2].fill_(torch.nan), "'text' hold NaN or infinity in row 2"),
        (lambda new: new["collaborative"][1].fill_(0), "New item 1 has no modality at all"),
        (lambda new: new.update(text=new["text"][:2]), r"shape \(2, 12\), where .* \(3, 12\)"),
    ],
)
def test_what_cannot_be_added_is_named_and_changes_nothing(change, words, quantizer):
    model, embeddings = model_of(quantizer), new_embeddings()
    before = model.recommend(HISTORIES).scores
    change(embeddings)
    with pytest.raises(ValueError, match=words):
        model.add_items(embeddings, quantizer=quantizer)
    assert model.config.num_items == NUM_ITEMS
    assert torch.equal(model.recommend(HISTORIES).scores, before)


def test_the_model_s_quantizer_is_needed_and_the_id_only_model_takes_no_items():
    with pytest.raises(ValueError, match="give the quantizer that made them"):
        new_model().add_items(new_embeddings())
    model = model_of(new_quantizer(seed=3))
    with pytest.raises(ValueError, match=r"other codes of '\w+' than they have \(\d\d?% agree\)"):
        model.add_items(new_embeddings(), quantizer=new_quantizer(seed=4))
    assert model.config.num_items == NUM_ITEMS
    with pytest.raises(ValueError, match="nothing but trained ID vectors"):
        new_model(modalities=[], embedding_dims=[]).add_items(new_embeddings())


def test_the_processor_names_new_items():
    processor = MMESIDProcessor(LlamaTokenizerFast(), ["a", "b"], ["A", "B"])
    assert processor.add_items(["c", "d"], ["C", "D"]) == [3, 4]
    assert processor([["d", "a"]]) == [[4, 1]]
    assert processor.convert_rows_to_titles([3]) == ["C"]
    for item_ids, titles, words in (
        (["a"], ["A"], "'a' occurs more than once"),
        (["x", "x"], ["X", "X"], "'x' occurs more than once"),
        (["x"], None, "one title for each"),
    ):
        with pytest.raises(ValueError, match=words):
            processor.add_items(item_ids, titles)
