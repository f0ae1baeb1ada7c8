"""Weights of what scores beside the decoder, chosen on held-out histories."""

import numpy as np
import torch

from mmesid.trainer.recommender.score_weights import WEIGHTS, fit_score_weights
from tests.modeling_mmesid.conftest import NUM_ITEMS, new_model


def held_out(model, target_of) -> list[dict]:
    """Histories of two items; `target_of` gives the target of the last."""
    pairs = [(first, last) for first in range(6, 12) for last in range(12, 30)]
    return [{"history": np.array(pair), "target": target_of(pair)} for pair in pairs]


def ndcg(model, histories: list[dict]) -> float:
    table, total = model.item_table(), 0.0
    for user in histories:
        scores = (model.encode_histories([user["history"].tolist()]) @ table.T)[0].detach()
        scores[[0, *user["history"].tolist()]] = -torch.inf
        rank = int((scores >= scores[user["target"]]).sum())
        total += 1 / np.log2(rank + 1) if rank <= 10 else 0.0
    return total / len(histories)


def test_the_weight_is_that_which_ranks_best():
    model = new_model(similarity_weights={"text": 1.0, "collaborative": 1.0})
    vectors = model.parts(model.item_table())[1]
    likeness = vectors @ vectors.T

    def target_of(pair):
        # Like the last item in its text, but not the most of all: the decoder has a say.
        likest = likeness[pair[1]].argsort(descending=True).tolist()
        return [item for item in likest if item and item not in pair][pair[0] % 3]

    histories = held_out(model, target_of)
    weights = fit_score_weights(model, histories)
    assert model.scorers.weights == weights and weights["text_similarity"] > 0
    best = ndcg(model, histories)
    for weight in WEIGHTS:
        model.scorers.weights = weights | {"text_similarity": weight}
        assert ndcg(model, histories) <= best + 1e-9


def test_a_source_that_does_not_help_stays_out():
    model = new_model(similarity_weights={"text": 2.0})
    vectors = model.parts(model.item_table())[1]
    plain = new_model()
    scores = plain.item_table().detach()
    assert scores.shape[0] == NUM_ITEMS + 1 == len(vectors)

    def target_of(pair):
        # What the decoder itself ranks first.
        return int(plain.recommend([list(pair)], top_k=1).items[0, 0])

    assert fit_score_weights(model, held_out(model, target_of)) == {"text_similarity": 0.0}
    assert fit_score_weights(plain, held_out(plain, target_of)) == {}
