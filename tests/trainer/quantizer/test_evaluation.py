"""Codes of all items and what they do to distances."""

import numpy as np
import pytest
import torch

from mmesid.trainer.quantizer.evaluation import code_metrics, encode_items, history_distances, quantized_rows
from mmesid.trainer.quantizer.initialization import initialize

from .conftest import toy_items, toy_model, toy_trainer


def test_present_items_get_codes_and_the_others_none(items, model):
    for name, codes in encode_items(model, items).items():
        embeddings, present = items.tables[name]
        assert torch.equal(codes[present].long(), model.encode({name: embeddings[present]}).codes[name])
        assert (codes[~present] == -1).all()
        assert (quantized_rows(model, name, codes)[~present] == 0).all()


def test_resolved_ids_are_unique_within_each_modality(items):
    model = toy_model(codebook_size=24)
    initialize(model, items)
    before = encode_items(model, items)
    model.config.resolve_collisions = True
    codes = encode_items(model, items)
    for modality, (_, present) in items.tables.items():
        assert code_metrics(before, 24)[f"collisions_{modality}"] > 0
        assert code_metrics(codes, 24)[f"collisions_{modality}"] == 0
        assert ((codes[modality] >= 0).all(1) == present).all()
        kept = (codes[modality] == before[modality]).all(1)
        assert len(torch.unique(before[modality][present], dim=0)) == (kept & present).sum()


def test_history_distances_are_those_of_present_pairs_and_identity_has_tau_one(items, model):
    codes = encode_items(model, items)
    quantized = quantized_rows(model, "text", codes["text"])
    sequences = [{"history": [1, 2, 3, 4, 5], "target": 6}, {"history": [7, 8, 9], "target": 10}]
    pairs = history_distances(model, "text", items, codes["text"], sequences)
    present = items.tables["text"].present
    expected = [
        (user, (quantized[item] - quantized[example["target"]]).norm().item())
        for user in np.random.default_rng(0).permutation(2)
        for example in [sequences[user]]
        for item in example["history"]
        if present[item] and present[example["target"]]
    ]
    assert list(zip(pairs.users, pairs.after)) == [(user, pytest.approx(value)) for user, value in expected]
    pairs.after = pairs.before * 2
    assert pairs.metrics() == {"tau": pytest.approx(1), "tau_pooled": pytest.approx(1)}


def test_held_out_recall_and_tau_equal_a_count(model, tmp_path):
    # So few that every held-out item is compared with all that are trained on.
    items = toy_items(80)
    trainer = toy_trainer(tmp_path, model, items)
    metrics = trainer.evaluate()
    rows, codes = trainer.eval_dataset.rows, encode_items(model, items)
    quantized = {name: quantized_rows(model, name, values).double().numpy() for name, values in codes.items()}
    both = trainer.eval_dataset.rows_with("collaborative", "text")
    left, right = quantized["collaborative"][both], quantized["text"][both]
    cosine = (left @ right.T) / np.linalg.norm(left, axis=1)[:, None] / np.linalg.norm(right, axis=1)
    found = [int((row >= row[item] - 1e-6).sum() == 1) for item, row in enumerate(cosine)]
    assert metrics["eval_recall@1_text"] == pytest.approx(np.mean(found))

    embeddings, present = items.tables["text"]
    trained, taus = trainer.train_dataset.rows_with("text"), []
    for row in rows[present[rows]]:
        before = np.linalg.norm(embeddings[row].numpy() - embeddings[trained].numpy(), axis=1)
        after = np.linalg.norm(quantized["text"][row] - quantized["text"][trained], axis=1)
        signs = [np.sign(values[:, None] - values) for values in (before, after)]
        taus.append((signs[0] * signs[1]).sum() / np.sqrt(np.abs(signs[0]).sum() * np.abs(signs[1]).sum()))
    assert metrics["eval_tau_text"] == pytest.approx(np.mean(taus), abs=0.01)
