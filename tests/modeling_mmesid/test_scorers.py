"""Similarity to the history and SASRec, whose scores are added to the decoder's."""

import numpy as np
import pytest
import torch
from transformers import set_seed

from modeling_mmesid import MMESIDForSequentialRecommendation, SASRecConfig, SASRecForSequentialRecommendation
from modeling_mmesid.packing import pack_histories

from .conftest import HISTORIES, NUM_ITEMS, item_tables, new_model


DECAY, WEIGHT = 0.5, 1.5


@pytest.fixture(scope="module")
def sasrec() -> SASRecForSequentialRecommendation:
    set_seed(2)
    # Shorter than the recommender's histories, which it reads from their end.
    config = SASRecConfig(num_items=NUM_ITEMS, hidden_size=8, max_history=3, initializer_range=1.0)
    return SASRecForSequentialRecommendation(config).eval()


def with_scorers(sasrec=None, **kwargs) -> MMESIDForSequentialRecommendation:
    settings = {"similarity_weights": {"text": WEIGHT}, "similarity_decay": DECAY, "similarity_dim": 5}
    if sasrec is not None:
        settings |= {"sasrec_config": sasrec.config, "sasrec_weight": 0.25}
    model = new_model(**settings | kwargs)
    # Everything else as in a model without, whatever else was drawn at random.
    model.load_state_dict(new_model(**kwargs).state_dict(), strict=False)
    if sasrec is not None:
        model.scorers.sasrec.load_state_dict(sasrec.model.state_dict())
    return model


def scores(model, histories=HISTORIES) -> torch.Tensor:
    return (model.encode_histories(histories) @ model.item_table().T).detach()


def similarity_by_hand(history: list[int]) -> np.ndarray:
    """Of every item to a history, from the singular value decomposition of the texts that there are."""
    tables = item_tables()
    present = tables["present"]["text"].numpy()
    texts = tables["embeddings"]["text"].numpy().astype(np.float64)
    left, _, _ = np.linalg.svd(texts[present] - texts[present].mean(0), full_matrices=False)
    vectors = np.zeros((NUM_ITEMS + 1, 5))
    vectors[present] = left[:, :5] / np.linalg.norm(left[:, :5], axis=1, keepdims=True)
    return sum(DECAY**age * vectors @ vectors[item] for age, item in enumerate(reversed(history)))


def test_similarity_is_that_of_whitened_embeddings_to_the_latest_items():
    added = scores(with_scorers()) - scores(new_model())
    for row, history in zip(added, HISTORIES, strict=True):
        np.testing.assert_allclose(row, WEIGHT * similarity_by_hand(history), atol=1e-5)


def test_sasrec_adds_its_own_scores(sasrec):
    added = scores(with_scorers(sasrec)) - scores(with_scorers())
    torch.testing.assert_close(added, 0.25 * scores(sasrec), rtol=1e-4, atol=1e-5)


def test_autocast_reads_the_float32_table_that_scores(sasrec):
    model = with_scorers(sasrec)
    table = model.item_table().detach()
    _, expected, _ = model.parts(model.encode_histories(HISTORIES).detach())
    with torch.no_grad():
        kept = model.item_table()
        with torch.autocast("cpu", torch.bfloat16):
            _, similarity, _ = model.parts(model.encode_histories(HISTORIES))
        assert model.item_table() is kept
    assert torch.equal(kept, table) and torch.equal(similarity, expected)


def test_every_score_is_explained_by_its_sources(sasrec):
    model = with_scorers(sasrec)
    best = model.recommend(HISTORIES, top_k=6, return_contributions=True)
    assert list(best.contributions) == ["id", "collaborative", "text", "text_similarity", "sasrec"]
    torch.testing.assert_close(sum(best.contributions.values()), best.scores, rtol=1e-5, atol=1e-5)
    expected = torch.stack([0.25 * scores(sasrec)[user, items] for user, items in enumerate(best.items)])
    torch.testing.assert_close(best.contributions["sasrec"], expected, rtol=1e-5, atol=1e-5)


def test_what_weighs_nothing_takes_no_room(sasrec):
    model = with_scorers(sasrec)
    width = model.item_table().shape[1]
    model.scorers.weights = {"text_similarity": 0.0, "sasrec": 0.0}
    assert model.item_table().shape[1] == width - 5 - 8 == model.config.hidden_size
    assert torch.equal(scores(model), scores(new_model()))


def test_training_sees_the_decoder_alone(sasrec):
    batch = pack_histories([[3, 9, 1]], [7, 8], [[9, 1, 22]])
    losses, gradients = [], []
    for model in (new_model(), with_scorers(sasrec)):
        loss = model.train()(**batch).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert torch.equal(*losses) and gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": ["up_proj"]}])
def test_scorers_are_part_of_the_checkpoint(tmp_path, base_model, sasrec, lora):
    model = with_scorers(sasrec)
    if lora is not None:
        settings = {name: getattr(model.config, name) for name in ("prompt_prefix_ids", "prompt_suffix_ids")}
        fresh = MMESIDForSequentialRecommendation.from_backbone_pretrained(
            base_model,
            lora=lora,
            **settings
            | {name: value for name, value in model.config.to_dict().items() if name in (
                "num_items", "modalities", "embedding_dims", "num_quantizers", "codebook_size", "codebook_dim",
                "similarity_weights", "similarity_dim", "similarity_decay",
            )},
            sasrec_config=sasrec.config,
        )  # fmt: skip
        fresh.initialize_items(**item_tables())
        fresh.scorers.sasrec.load_state_dict(sasrec.model.state_dict())
        model = fresh.eval()
    model.save_pretrained(tmp_path / "saved")
    loaded = MMESIDForSequentialRecommendation.from_pretrained(tmp_path / "saved")
    assert torch.equal(scores(loaded), scores(model))
    assert isinstance(loaded.config.sasrec_config, SASRecConfig)
    without = MMESIDForSequentialRecommendation.from_pretrained(tmp_path / "saved", sasrec_weight=0.0)
    assert "sasrec" not in without.recommend(HISTORIES, return_contributions=True).contributions
    model.save_pretrained(tmp_path / "merged", merge_backbone=True)
    merged = MMESIDForSequentialRecommendation.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(scores(merged), scores(model), rtol=1e-4, atol=1e-5)


def test_new_items_are_compared_at_once_and_rare_ones_to_sasrec(sasrec):
    model = with_scorers(sasrec, num_quantizers=0)
    before = scores(model)
    tables = item_tables()["embeddings"]
    # The texts of items 9 and 2 again, under new names.
    new = model.add_items({name: table[[9, 2]] for name, table in tables.items()})
    after = scores(model)
    torch.testing.assert_close(after[:, : NUM_ITEMS + 1], before, rtol=1e-5, atol=1e-5)
    parts = model.score_contributions(model.encode_histories(HISTORIES), torch.tensor([[9, 2, *new]] * 3))
    torch.testing.assert_close(parts["text_similarity"][:, :2], parts["text_similarity"][:, 2:])
    # Items 1 and 2 are the rarest twentieth.
    rare = 0.25 * scores(sasrec)[:, 1:3].mean(-1, keepdim=True).expand(-1, 2)
    torch.testing.assert_close(parts["sasrec"][:, 2:], rare, rtol=1e-5, atol=1e-5)
    # SASRec passes over what it does not know.
    widths = model.config.hidden_size, 5, 8
    states = model.encode_histories([[3, new[0], 9, new[1]], [3, 9], [new[0]]]).split(widths, dim=-1)[2]
    torch.testing.assert_close(states[0], states[1])
    assert not states[2].any()


@pytest.mark.parametrize(
    "kwargs, words",
    [
        ({"similarity_weights": {"visual": 1.0}}, "visual"),
        ({"similarity_weights": {"text": -1.0}}, "0 or more"),
        ({"similarity_dim": 0}, "similarity_dim"),
        ({"similarity_decay": 1.5}, "similarity_decay"),
        ({"sasrec_weight": -0.1}, "sasrec_weight"),
    ],
)
def test_settings_are_checked(kwargs, words):
    with pytest.raises(Exception, match=words):
        new_model(**kwargs)
